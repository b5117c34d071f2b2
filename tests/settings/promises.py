"""What each option promises: which artefacts it changes, command by command, and that it changes no other.

A row gives the option's other value, and what a command then makes differently ("" is nothing: the result is the same, bit
for bit). `also` goes with both runs, `base` with the first one alone. Beside the files of a run folder there are:

    passes       how often the model runs                    threads      what torch was told
    checkpoints  which were written and removed, in order    compiled     how many blocks
    said         what the command printed
    refused      it ends with 2, but not with the first      accepted     it ends with 0, but with 2 with the first

Two runs that are both refused show nothing: that is an error here. `like` are words that give the very same artefacts.

How often the model runs may change where a result does, and is named only where it must.

`run`, `multi`, `trial` and `search` have no column: they promise what their stages do (see `STAGES`).
"""

from dataclasses import dataclass, field

from workshop import ACCEPTED, REFUSED

from plopfast.cli.commands import COMMANDS
from plopfast.cli.options import names_of

LEARNED = "adapter metrics training"
REINFORCED = "adapter grpo rewards"
MOVED = "adapter rewards"  # too little to be seen in the few completions that grpo.json keeps
USED = ("score", "audit", "estimate", "train", "eval")
CHECKED = dict.fromkeys(("data", *USED), ACCEPTED)  # without it they stop
STAGES = {
    "run": ("data", "score", "place", "train", "eval"),
    "multi": ("data", "score", "place", "train", "eval"),
    "trial": ("score", "place", "train"),
    "search": ("score", "place", "train"),
}
ALIKE = {"chat": "generate", "compare": "eval"}  # commands that write nothing, and take their options as these do
MADE = {  # by each stage; what a stage makes may change what later ones make
    "data": "data", "score": "scores prompts eva", "place": "placement", "estimate": "estimate",
    "train": f"{LEARNED} adapter_config model checkpoints compiled tensorboard", "eval": "eval eval_rows",
}  # fmt: skip
AROUND = {"passes", "threads", "checkpoints", "compiled"}  # of a process, not of a stage's files
FILE = "{shop.root}/"


@dataclass(frozen=True)
class Promise:
    """`other` are the words of the option's other value; `reaches`: command -> the artefacts that change."""

    other: str
    also: str = ""
    base: str = ""
    like: str | None = None
    reaches: dict[str, str] = field(default_factory=dict)


PROMISES: dict[str, list[Promise]] = {}


def option(name: str, other: str, also: str = "", base: str = "", like: str | None = None, /, **reaches: str) -> None:
    PROMISES.setdefault(name, []).append(Promise(other, also, base, like, reaches))


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def name_of(word: str) -> str:
    """The setting that an option gives, as --packing and --batch-rows=2 do."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


def words_of(command: str, words: str) -> tuple[str, ...]:
    """The words whose options the command has: a promise's `also` serves several commands."""
    own = names_of(COMMANDS[command])
    return tuple(word for word in words.split() if name_of(word) in own)


SCORES = "scores prompts"

# model and device
option(
    "model",
    "--model={shop.other_model}",
    data="data said",
    score=SCORES,
    audit="audit",
    estimate="estimate",
    train=f"{LEARNED} adapter_config",
    grpo=f"{REINFORCED} adapter_config",
    eval=REFUSED,
    merge=REFUSED,
    generate=REFUSED,
    info="said",
)  # an adapter belongs to its base weights; the other model has another chat template
option(
    "dtype",
    "--dtype=bfloat16",
    score=SCORES,
    audit="audit",
    estimate="estimate",
    train=LEARNED,
    grpo=MOVED,
    eval="eval eval_rows",
    merge="merged",
    generate="said",
    info="",
)
option(
    "quantize",
    "--quantize=int8",
    score=SCORES,
    audit="audit",
    estimate="estimate",
    train=LEARNED,
    eval="eval eval_rows",
    merge="merged",
    generate="said",
    info="said",
)
UNCHANGED = {"score": "", "audit": "", "train": "", "eval": "", "generate": ""}  # bit for bit, on a CPU
option("stream", "--stream", **UNCHANGED, estimate="estimate", run="estimate")
option("resident_share", "--resident-share=0.5", "--stream", **UNCHANGED, estimate="estimate", run="estimate")
option(
    "quantize_head",
    "--quantize-head",
    "--quantize=int8",
    score="",
    audit="",
    estimate="",
    train=LEARNED,
    eval="eval eval_rows",
    merge="merged",
    generate="",
    info="said",
)
WORKING = ("score", "audit", "estimate", "train", "eval", "merge", "generate")
option("embedding", "--embedding=cpu", **dict.fromkeys(WORKING, ""))  # on a CPU, that is where it is
option("model_config", "--model-config=smollm2-135m", estimate=REFUSED)  # in a run folder, which has a model
option("fit", "--fit=1GB", train="passes", estimate="passes")  # it fits as it is; models without values are counted
option("fit", "--fit=1kB", train=REFUSED, estimate=REFUSED)
option("device", "--device=cuda", **dict.fromkeys((*WORKING, "grpo", "info"), REFUSED))
option("threads", "--threads=2", **dict.fromkeys(WORKING, "threads"), grpo=f"threads {MOVED}")  # rounding
option(
    "backend",
    "--backend=fused",
    score=REFUSED,
    audit=REFUSED,
    train=REFUSED,
    eval=REFUSED,
    generate=REFUSED,
    info=REFUSED,
)
option(
    "backend", "--backend=torch", score="", audit="", train="", eval="", generate="", info="said"
)  # what auto takes on a CPU
option("parallel", "--parallel=fsdp", score=REFUSED, train=REFUSED, eval=REFUSED)  # one process has nothing to spread
option("timeout", "--timeout=60", score="", train="", eval="")  # nor anyone to wait for

# data
option(
    "train",
    f"--train={FILE}more.jsonl",
    data="data said",
    score=SCORES,
    audit="audit",
    estimate="estimate",
    train=LEARNED,
    eval="",
)
HELD_OUT = {"data": "data said", "score": "", "audit": "", "estimate": ""}  # rows that nothing is learned of
option("valid", f"--valid={FILE}more.jsonl", **HELD_OUT, train="metrics training", eval="")
option("test", f"--test={FILE}more.jsonl", **HELD_OUT, train="", eval="eval eval_rows", trial="trial")
option(
    "unlabeled", f"--unlabeled={FILE}domain.txt", "--max-steps=6", data="data said", estimate="estimate", train=LEARNED
)
columns, plain = (
    " ".join(
        f"--{split}={FILE}columns{more}{kind}.jsonl" for split, more in (("train", ""), ("valid", "-2"), ("test", "-3"))
    )
    for kind in ("", "-plain")
)
option("columns", "--columns=prompt=q,completion=a", columns, **CHECKED)
option("columns", "--columns=prompt=q,completion=a", columns, "", plain, **dict.fromkeys(USED, ACCEPTED))
option("bad_rows", "--bad-rows=skip", f"--train={FILE}bad.jsonl", **CHECKED)
option("bad_rows", "--bad-rows=skip", f"--train={FILE}bad.jsonl", "", "", **dict.fromkeys(USED, ACCEPTED))
shared = f"--train={FILE}shared.jsonl"
option("allow_overlap", "--allow-overlap", shared, **CHECKED)
option(
    "allow_overlap",
    "--allow-overlap",
    shared,
    "",
    f"{shared} --test={FILE}more.jsonl",
    **dict.fromkeys(USED[:-1], ACCEPTED),
)
option("allow_overlap", "--allow-overlap", shared, "", "", eval=ACCEPTED)
option(
    "learn",
    "--learn=last",
    data="data said",
    score="",
    audit="audit",
    estimate="estimate",
    train=LEARNED,
    eval="eval eval_rows",
)
option("learn", "--learn=last", "--score-tokens=completion", score=SCORES)
option(
    "max_length",
    "--max-length=40",
    "--long=cut",
    data="data said",
    score=SCORES,
    audit="audit",
    estimate="estimate",
    train=LEARNED,
    eval="eval eval_rows",
)
option(
    "long",
    "--long=cut",
    "--max-length=60",
    "--long=skip",
    data="data said",
    score=SCORES,
    train=LEARNED,
    eval="eval eval_rows",
)
option("long", "--long=cut", "--max-length=40", "--long=error", **CHECKED)

# reinforcement learning, whose rows have a prompt
option("train", f"--train={FILE}prompts-3.jsonl", grpo=REINFORCED)
option("test", f"--test={FILE}prompts-3.jsonl", grpo="grpo")
option("bad_rows", "--bad-rows=skip", f"--train={FILE}prompts-bad.jsonl", grpo=ACCEPTED)
option("allow_overlap", "--allow-overlap", f"--test={FILE}prompts.jsonl", grpo=ACCEPTED)
option("reward", "--reward=regex:a", grpo=REINFORCED)
option("generations", "--generations=2", grpo=REINFORCED)
option("prompts", "--prompts=3", grpo=REINFORCED)
option("completion_length", "--completion-length=2", grpo=REINFORCED)
option("temperature", "--temperature=0.5", grpo=REINFORCED)
option("temperature", "--temperature=0", grpo=REFUSED)
option("beta", "--beta=9", grpo=REINFORCED)
option("eval_rows", "--eval-rows=2", grpo="grpo")
PLACED = {  # a placement that is there is taken, whatever is asked for
    "score_prompts": "--score-prompts=9", "confidence": "--confidence=0.5", "rule": "--rule=attn", "k": "--k=1", "rank": "--rank=3",
    "alpha": "--alpha=5.25", "budget": "--budget=2000", "ranks": "--ranks=proportional --budget=5700",
    "granularity": "--granularity=module --budget=700", "cap": "--cap=0 --granularity=module --budget=700",
}  # fmt: skip
for name, words in PLACED.items():
    other, _, also = words.partition(" ")
    option(name, other, also, grpo="")

# answers
option("temperature", "--temperature=3", generate="said")
option("temperature", "--temperature=3", "", "--temperature=0", generate="said")
option("max_new_tokens", "--max-new-tokens=2", generate="said")
option("top_p", "--top-p=0.9", generate=REFUSED)  # of nothing that is drawn
option("top_p", "--top-p=0.01", "--temperature=3", generate="said")

# what is chosen, and how it is scored
SURE = "--confidence=0.5"
option("rule", "--rule=plop-inverse", SURE, score="scores", place="placement")
option("rule", "--rule=attn", place="placement", estimate="")  # with a run folder, each rule is estimated
option("k", "--k=1", SURE, score="scores", place="placement", audit="audit", estimate="")
option("k", "--k=1", "--budget=match:plop:r2", estimate="estimate", place="placement")
option("rank", "--rank=3", score="", place="placement", audit="audit", estimate="estimate", info="said")
option("rank", "--rank=3", "--init=eva", score="eva scores")
option("init", "--init=eva", score="eva scores", place="")
option("init", "--init=eva", "--budget=6000", place=REFUSED)  # ranks above those of the vectors
option("init", "--init=gaussian", train=LEARNED)
option(
    "seed", "--seed=1", score=SCORES, place="", audit="audit", estimate="", train=LEARNED, grpo=REINFORCED, trial=SCORES
)  # its trainings have seeds of their own
option("seed", "--seed=1", "--rule=random", place="placement")
option("seed", "--seed=1", "--temperature=3", generate="said")
option("score_prompts", "--score-prompts=9", score=SCORES, audit="audit")
option("confidence", "--confidence=0.5", score="scores")
option("score_tokens", "--score-tokens=user", score=SCORES, audit="audit")
option("skip_first", "--skip-first", score="scores", audit="audit")
option("baseline", "--baseline=monte-carlo", score=SCORES, audit="audit")
option("compat", "--compat=official", score=SCORES)
option("alpha", "--alpha=5.25", place="placement")
option("budget", "--budget=2000", place="placement", estimate="estimate", search=REFUSED)
option("ranks", "--ranks=proportional", "--budget=5700", place="placement", estimate="estimate")
option("granularity", "--granularity=module", "--budget=700", place="placement")
option("cap", "--cap=0", "--granularity=module --budget=700", place="")  # any number
option("cap", "--cap=1", "--granularity=module --budget=700", place="placement")

# adapters and training
option("rslora", "--rslora", train=f"{LEARNED} adapter_config")
option("dora", "--dora", train=f"{LEARNED} adapter_config", estimate="estimate")
option("full", "--full", train=f"{LEARNED} adapter_config model", eval=REFUSED, search=REFUSED)
option(
    "full", "--full", run=f"{SCORES} placement estimate {LEARNED} adapter_config model eval report passes"
)  # it places nothing
option("batch_tokens", "--batch-tokens=400", train=LEARNED, estimate="estimate")
option("batch_rows", "--batch-rows=2", train=LEARNED, estimate="estimate")
option("accumulate", "--accumulate=2", train=LEARNED, estimate="estimate", grpo=MOVED)
option("packing", "--packing", train=LEARNED, estimate="estimate")
option("dropout", "--dropout=0.25", train=f"{LEARNED} adapter_config", estimate="estimate")
option("ema", "--ema=0.5", train=LEARNED, estimate="estimate")
option(
    "checkpointing",
    "--checkpointing",
    grpo="passes",
    train="passes training",
    estimate="estimate passes",
    trial="passes",
)
option("mlp_rows", "--mlp-rows=24", train="training", estimate="estimate")
option("optimizer", "--optimizer=adamw8bit", estimate="estimate", train="training metrics adapter")
option("keep_best", "--keep-best=cpu", train="", estimate="", trial="")  # on a CPU, that is where they are
option("lr", "--lr=0.01", train=LEARNED, grpo=REINFORCED)
option("schedule", "--schedule=linear", train=LEARNED)
option("schedule", "--schedule=constant", grpo=REINFORCED)
option("schedule", "--schedule=constant", "", "--schedule=linear", train=LEARNED)
option("warmup", "--warmup=0.7", train=LEARNED, grpo=REINFORCED)
option("lora_plus", "--lora-plus=4", train=LEARNED)
option("weight_decay", "--weight-decay=0.5", train=LEARNED, grpo=REINFORCED)
option("clip", "--clip=0.01", train=LEARNED)
option("clip", "--clip=1e-9", grpo=REINFORCED)
option("neftune", "--neftune=5", train=LEARNED)
option("max_steps", "--max-steps=4", train=f"{LEARNED} checkpoints", grpo=REINFORCED)
option("epochs", "--epochs=0.25", "", "--epochs=0.5", train=f"{LEARNED} checkpoints")
option("eval_every", "--eval-every=2", train="metrics training checkpoints")
option("eval_rows", "--eval-rows=2", train="metrics training")
option(
    "patience", "--patience=1", "--lr=1e-30 --max-steps=6", train="metrics training checkpoints", trial=""
)  # which has rates of its own
option("unlabeled_share", "--unlabeled-share=0.5", f"--unlabeled={FILE}domain.txt --max-steps=6", train=LEARNED)
option("nonfinite", "--nonfinite=skip", f"--train={FILE}nan.jsonl --max-steps=12 --eval-every=12", train=ACCEPTED)
option("save_every", "--save-every=2", train="checkpoints", grpo="")
option("keep", "--keep=1", train="checkpoints", grpo="")
option("offload", "--offload", train=REFUSED, estimate=REFUSED)  # the CPU's memory is where it would go
option("compile", "--compile", train="adapter metrics training compiled")  # rounding
option("liger", "--liger", train=REFUSED)  # it needs a GPU
option("log_to", "--log-to=tensorboard", train="tensorboard")

# studies
option("arms", "--arms=plop,plop-inverse,full", "--rank=10", trial="trial checkpoints")
option("lrs", "--lrs=0.01", trial="trial")
option("seeds", "--seeds=1,2,3", trial="trial")
option("finalists", "--finalists=2", "--arms=plop,plop-inverse,full --rank=10", trial="trial")
option("general", f"--general={FILE}general-2.txt", "", f"--general={FILE}general.txt", trial="trial", eval="eval")

# evaluation
option("must_keep", f"--must-keep={FILE}keep-2.jsonl", "", f"--must-keep={FILE}keep.jsonl", eval="eval")
option("search_trials", "--search-trials=2", "", "--search-trials=1", search="search")
