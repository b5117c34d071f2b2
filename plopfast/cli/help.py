"""What --help shows first: the commands in groups, and the few options of each that most people need.

`GROUPS` is the one table: group -> command -> its line in `plopfast --help`, its basics, and an example. A command that is
missing here is listed under "more", and its --help shows all its options.
"""

from typing import NamedTuple

from .parser import Parser, Version, listed, width_of_help, wrapped

DESCRIPTION = (
    "Where do LoRA adapters belong, and how well do they train there? plopfast scores the linear modules on your data with "
    "forward passes only (PLoP, arXiv 2506.20629), puts adapters where scores are lowest, trains them, and writes a PEFT "
    "adapter and a report."
)
EPILOG = """Settings come from, in rising order: defaults, the run folder's config.json, --config FILE, options.
Data rows are {"prompt", "completion"}, {"messages"}, {"conversations"}, {"instruction", "output"} or {"text"}.
Exit codes: 0 done, 1 doctor or verify found something wrong, an answer of --must-keep was lost or a job of multi failed, 2 a clear error, 130 or 143 interrupted (state saved).
On several devices: torchrun --nproc-per-node N -m plopfast run|score|train|eval ..."""
FOOT = """plopfast COMMAND --help shows a command's basics, --help-all all its options.
plopfast --help-all: kinds of data, several devices. plopfast -V, --version.
Exit codes: 0 done, 1 something is wrong, 2 an error, 130 or 143 interrupted."""


class Basics(NamedTuple):
    line: str
    options: str
    example: str


GROUPS: dict[str, dict[str, Basics]] = {
    "the usual way": {
        "run": Basics(
            "score, place, train, evaluate and report in one go",
            "train valid test model quantize rule rank lr epochs out config resume",
            "--train rows.jsonl --out runs/mine",
        ),
        "generate": Basics(
            "answer prompts, with an adapter or without",
            "out adapters prompt prompts_file model quantize temperature max_new_tokens answers",
            "--out runs/mine --prompt 'a small bird'",
        ),
        "chat": Basics(
            "talk with the model, with an adapter or without",
            "out adapter model quantize temperature top_p max_new_tokens seed config", "--out runs/mine",
        ),
        "compare": Basics(
            "compare two finished trainings on the same rows", "A B test model quantize any_base config", "runs/one runs/two"
        ),
        "report": Basics("show a run folder as one page: report.html", "", "--out runs/mine"),
        "merge": Basics(
            "write the model with its adapter merged in", "out adapter model requantize overwrite", "--out runs/mine"
        ),
        "verify": Basics("find out whether a run folder's files are unchanged", "", "runs/mine"),
    },
    "stage by stage, in one run folder": {
        "data": Basics(
            "show what would be learned of your rows", "train valid test model columns learn max_length long out",
            "--train rows.jsonl",
        ),
        "score": Basics(
            "measure where adapters belong: the NFN of each module",
            "train model quantize rule k score_prompts confidence out overwrite config",
            "--train rows.jsonl --out runs/mine",
        ),
        "place": Basics(
            "choose modules by their scores", "out rule k rank alpha budget print_peft overwrite", "--out runs/mine --rank 8"
        ),
        "estimate": Basics(
            "estimate memory and FLOPs before training",
            "out model_config quantize rank batch_rows batch_tokens checkpointing fit overwrite",
            "--model-config smollm2-135m --quantize nf4",
        ),
        "train": Basics(
            "train adapters on the placement",
            "out lr epochs max_steps batch_rows accumulate quantize fit config overwrite resume", "--out runs/mine --lr 5e-4",
        ),
        "eval": Basics(
            "measure loss and accuracy, before and after training",
            "out adapter test must_keep model quantize config overwrite", "--out runs/mine",
        ),
    },
    "other trainings, and studies": {
        "multi": Basics(
            "train several adapters at once on one base",
            "jobs model quantize rank lr epochs at_once out config resume", "--jobs jobs.yaml --out runs/several",
        ),
        "grpo": Basics(
            "train on a reward that can be computed (GRPO)",
            "reward train test model rank lr max_steps generations out config resume",
            "--train prompts.jsonl --reward number --out runs/maths",
        ),
        "trial": Basics(
            "compare placements of equal size, with intervals", "train test model quantize arms lrs seeds budget out config resume",
            "--train rows.jsonl --arms plop,attn,all --out runs/trial",
        ),
        "study": Basics(
            "run trials of several models and tasks, and compare criteria", "plan out config",
            "--plan study.yaml --out runs/study",
        ),
        "search": Basics(
            "search rank, alpha, rate and placement together (Optuna)",
            "train valid test model quantize search_trials max_steps out config resume",
            "--train rows.jsonl --search-trials 20 --out runs/search",
        ),
        "audit": Basics(
            "find out whether the scores can be trusted", "train model quantize score_prompts k seed out overwrite config",
            "--train rows.jsonl --out runs/audit",
        ),
    },
    "this machine": {
        "info": Basics("show versions, devices, and the path of each module", "model quantize rank device out config",
            "--model my-model --quantize nf4"),
        "doctor": Basics(
            "check kernels, gradients and paths", "model quantize rank device seconds out config", "--seconds 30"
        ),
        "bench": Basics(
            "time kernels or a training against PEFT", "train data model tune shapes dtype seconds dry out overwrite",
            "--train --data rows.jsonl",
        ),
    },
}  # fmt: skip
BRIEF = {  # of options whose help is long; the default is added where there is one
    "train": "training rows: .jsonl, .json, .csv, .tsv or .parquet files, a folder, or owner/name:split of the hub (default: the WordNet demo)",
    "valid": "validation rows (default: every 20th training row)",
    "test": "test rows (default: the validation rows)",
    "quantize": "keep the model's weights in 4 (nf4) or 8 bits (int8, fp8)",
    "rule": "where adapters go: plop, all, attn, mlp, or names such as q_proj,v_proj",
    "config": "take settings from this JSON or YAML file",
    "epochs": "passes over the training rows (default: 1; more on little data)",
    "confidence": "stop scoring at this confidence; 0: score every row",
    "batch_rows": "rows in a micro-batch, at most (default: by --batch-tokens)",
    "batch_tokens": "padded tokens in a micro-batch (default: 1024 or the longest row)",
    "fit": "memory of the device, such as 6GB: choose options with which a step fits",
    "model_config": "estimate by a configuration alone: a name, a config.json or a hub id",
    "prompts_file": "answer the rows of this file, as train takes them",
    "adapters": "answer with this adapter (default: OUT's); may be given several times",
    "prompt": "answer this; may be given several times",
    "answers": "write the answers to this file, too (JSONL)",
    "requantize": "of a quantised model: write codes again, not dense weights",
    "reward": "exact, number[:TOLERANCE], regex:PATTERN, json:SCHEMA.json or FILE.py:FUNCTION",
    "budget": "size of all adapters instead of --rank: 2.5M parameters, 10MB or match:RULE:rRANK",
    "temperature": "0 takes the likeliest token, above 0 tokens are drawn (default: 0)",
    "arms": "placements to compare",
}


class Overview(Parser):
    """The parser of `plopfast` itself: its help lists the commands in groups. `helps`: command -> what it does."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self.helps: dict[str, str] = {}
        self.commands: dict[str, Parser] = {}
        self.add_argument("-V", "--version", action=Version)

    def help_text(self, whole: bool = False) -> str:
        width = width_of_help()
        known = {name for group in GROUPS.values() for name in group}
        groups = {title: {name: entry.line for name, entry in group.items()} for title, group in GROUPS.items()}
        groups["more"] = {name: text for name, text in self.helps.items() if name not in known}
        parts = [f"usage: {self.prog} COMMAND [options]", wrapped(DESCRIPTION, width)]
        for title, lines in groups.items():
            rows = [(name, line) for name, line in lines.items() if name in self.helps]
            parts += [f"{title}:\n{listed(rows, width, 4 + max(map(len, self.helps)))}"] if rows else []
        return "\n\n".join([*parts, wrapped(EPILOG if whole else FOOT, width)]) + "\n"


def basics_of(command: str) -> Basics:
    return next((group[command] for group in GROUPS.values() if command in group), Basics("", "", ""))
