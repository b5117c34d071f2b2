"""The audit: each control and criterion against a computation of its own, what is left out and why, and the command."""

import html
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import CONFIGS, SMALL, build, exact_inputs

import plopfast as pf
from plopfast.cli import main
from plopfast.data.batches import batches_of, collate
from plopfast.data.example import Example
from plopfast.data.labels import tokenize
from plopfast.data.rows import DEMO, read_jsonl
from plopfast.models.linears import linear_modules
from plopfast.scoring.report import ModuleScore, NFNReport
from plopfast.studies.agreement import kendall_tau, pick, subset_rows
from plopfast.studies.audit import audit, audit_text, verdict
from plopfast.studies.controls import random_model, random_tokens, shuffled_words
from plopfast.studies.criteria import condition_numbers, explained_variance, gradient_energy, random_ranks
from plopfast.support import memory
from plopfast.support.config import ScoreSettings
from plopfast.support.errors import AdapterError, ConfigError, DataError, ModelError, PlacementError
from plopfast.support.ledger import Ledger


def report_of(sums, counts, types):
    """A report whose modules have the given statistics [modules, prompts]."""
    values = sums.sum(1) / counts.sum(1)
    scores = {
        f"m{i}": ModuleScore(float(v), 0.0, 1, t, None if t == "head" else i, 4, 4)
        for i, (v, t) in enumerate(zip(values, types, strict=True))
    }
    return NFNReport(scores, 1, sums.shape[1], 0.0, prompt_stats=torch.stack([sums, counts]).double())


def prompts(tokenizer, count=12, split="train"):
    return tokenize(read_jsonl(DEMO[split])[:count], tokenizer)


# Kendall's tau


@pytest.mark.parametrize(
    ("one", "other", "want"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 2, 4, 3], 4 / 6),
        ([1, 1, 2], [1, 2, 3], 2 / math.sqrt(2 * 3)),  # one tie: tau-b's correction
        ([1, 1, 1], [1, 2, 3], 0.0),
        ([1], [1], 0.0),
        ([], [], 0.0),
    ],
)
def test_kendall_tau_of_known_lists(one, other, want):
    assert kendall_tau(one, other) == pytest.approx(want)


def test_kendall_tau_by_brute_force():
    rng = random.Random(0)
    for _ in range(50):
        one, other = ([rng.randint(0, 4) for _ in range(7)] for _ in range(2))
        pairs = [(one[i] - one[j], other[i] - other[j]) for i in range(7) for j in range(i)]
        untied = [sum(pair[side] != 0 for pair in pairs) for side in (0, 1)]
        score = sum((a * b > 0) - (a * b < 0) for a, b in pairs)
        assert kendall_tau(one, other) == pytest.approx(score / math.sqrt(untied[0] * untied[1]))


# stability


def test_subsets_of_steady_prompts_agree():
    counts = torch.randint(1, 9, (4, 40), generator=torch.Generator().manual_seed(0)).double()
    rows = subset_rows(report_of(counts * torch.tensor([[1.0], [2], [3], [9]]), counts, ["a", "b", "c", "head"]), 1)
    assert [row["what"] for row in rows] == ["8 prompts", "16 prompts", "32 prompts"]
    assert all((row["tau"], row["tau_low"], row["same_pick"], row["repeats"]) == (1, 1, 1, 100) for row in rows)


def test_subsets_of_unsteady_prompts():
    """Types a and b differ by one odd prompt in 20, which a subset of n has n times in 20."""
    values = torch.ones(3, 20, dtype=torch.float64)
    values[0, 7], values[1], values[2] = 0.0, 0.99, 5.0
    report = report_of(values, torch.ones_like(values), ["a", "b", "c"])
    rows = subset_rows(report, 1, seed=3, repeats=4000)
    assert rows == subset_rows(report, 1, seed=3, repeats=4000), "seeded"
    for row, share in zip(rows, (8 / 20, 16 / 20), strict=True):
        assert row["same_pick"] == pytest.approx(share, abs=0.03)
        assert row["tau"] == pytest.approx(share + (1 - share) / 3, abs=0.03)
        assert row["tau_low"] == pytest.approx(1 / 3)


def test_prompts_without_a_counted_token_are_none():
    counts = torch.ones(2, 12)
    counts[:, :4] = 0
    with pytest.raises(ConfigError, match="8 prompts: too few for subsets of 8; score more"):
        subset_rows(report_of(counts * torch.tensor([[1.0], [2]]), counts, ["a", "b"]), 1)


def test_no_subsets_without_statistics():
    with pytest.raises(ConfigError, match="no statistics of single prompts"):
        subset_rows(NFNReport({}, 1, 1, 0.0), 1)


# controls


def test_random_tokens(tokenizer):
    examples = prompts(tokenizer, 60)
    drawn = random_tokens(examples, tokenizer, seed=1)
    assert drawn == random_tokens(examples, tokenizer, seed=1) != random_tokens(examples, tokenizer, seed=2)
    special = set(tokenizer.all_special_ids)
    seen = set()
    for old, new in zip(examples, drawn, strict=True):
        assert (new.start, new.where, len(new.tokens)) == (old.start, old.where, len(old.tokens))
        for a, b in zip(old.tokens, new.tokens, strict=True):
            assert a == b if a in special else b not in special
        seen |= set(new.tokens) - special
    assert len(seen) > 0.9 * (len(tokenizer) - len(special)), "uniform over the whole vocabulary"


def test_reserved_special_tokens_are_never_drawn(tokenizer):
    reserved = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)  # names none of them
    drawn = random_tokens(prompts(tokenizer, 60), reserved)
    assert not {0, 1} & {token for e in drawn for token in e.tokens}


def test_shuffled_words(tokenizer):
    rows = [("a:1", {"prompt": "one two  three\nfour five:", "completion": " six seven"}), ("a:2", {"text": "x y z w"})]
    examples = tokenize(rows, tokenizer)
    changed = shuffled_words(examples, tokenizer, seed=1)
    assert changed == shuffled_words(examples, tokenizer, seed=1)
    pair, text = changed
    before, after = ("one two  three\nfour five:", tokenizer.decode(pair.tokens[: pair.start]))
    assert sorted(after.split()) == sorted(before.split()) and after != before
    assert "".join(c if c.isspace() else "" for c in after) == " " + "  " + "\n" + " ", "white space stays"
    assert sorted(tokenizer.decode(pair.tokens[pair.start : -1]).split()) == ["seven", "six"]
    assert pair.tokens[-1] == tokenizer.eos_token_id == text.tokens[-1]
    assert sorted(tokenizer.decode(text.tokens[:-1]).split()) == sorted("xyzw") and text.start == 1


def test_shuffled_roles_stay_with_their_words(tokenizer):
    def ids(text):
        return tokenizer(text)["input_ids"]

    user, bot = ids("one two three"), ids("four five six")
    example = Example.after_prompt(
        (1, *user, 2, *bot), len(user) + 2, None, "", ("user",) * (len(user) + 2) + ("bot",) * len(bot)
    )
    (new,) = shuffled_words([example], tokenizer)
    for role, words in (("user", "one two three"), ("bot", "four five six")):
        tokens = [t for t, r in zip(new.tokens, new.roles, strict=True) if r == role and t > 2]
        assert sorted(tokenizer.decode(tokens).split()) == sorted(words.split())
    assert new.tokens[0] == 1 and new.tokens[new.start - 1] == 2


def test_shuffled_rows_are_cut_where_the_context_ends(tokenizer):
    examples = prompts(tokenizer, 50)
    whole = shuffled_words(examples, tokenizer, 1)
    assert max(len(e.tokens) for e in whole) > 20
    for long, short in zip(whole, shuffled_words(examples, tokenizer, 1, max_length=20), strict=True):
        assert short.tokens == long.tokens[:20] and short.start == min(long.start, 20)


def test_controls_that_cannot_be_built(tokenizer, llama):
    single = tokenize([("a:1", {"prompt": "one", "completion": " two"}), ("a:2", {"text": "same same"})], tokenizer)
    with pytest.raises(DataError, match="none of the 2 rows has two different words"):
        shuffled_words(single, tokenizer)
    for make in (random_tokens, shuffled_words):
        with pytest.raises(ConfigError, match="need the model's tokenizer, got none"):
            make(single, None)
    with pytest.raises(DataError, match="all tokens of the 1 rows are special"):
        random_tokens([Example.after_prompt((1, 2), 1, None, "")], tokenizer)
    nothing = SimpleNamespace(all_special_ids=[0, 1], get_vocab=lambda: {"<s>": 0, "</s>": 1})
    with pytest.raises(DataError, match="the tokenizer's vocabulary holds special tokens only"):
        random_tokens(single, nothing)
    with pytest.raises(ModelError, match="Linear has no transformers configuration"):
        random_model(torch.nn.Linear(2, 2))
    llama.config = transformers.T5Config()  # no causal language model
    with pytest.raises(ModelError, match="a random LlamaForCausalLM cannot be built: Unrecognized configuration"):
        random_model(llama)


def test_random_model_needs_memory(llama, monkeypatch):
    monkeypatch.setattr(memory, "free_mib", lambda device: 0.01)
    with pytest.raises(ModelError, match=r"a random model takes 0 MiB, 0 MiB are free on cpu"):
        random_model(llama)


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_random_weights_score_near_one(architecture, tokenizer):
    """With wider weights than the other tests', as a random matrix keeps norms only up to 1 / sqrt(2 n_out)."""
    config = CONFIGS[architecture]()
    for name, value in {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "n_embd": 128}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    trained = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for info in linear_modules(trained):
            info.module.weight[:, 0] *= 50  # far from random
    before = torch.get_rng_state()
    model = random_model(trained, seed=5)
    assert torch.equal(torch.get_rng_state(), before), "torch's generator is left alone"
    again = random_model(trained, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in trained.named_parameters()]
    assert not model.training and next(model.parameters()).dtype == next(trained.parameters()).dtype
    report = pf.score(model, batches_of(prompts(tokenizer, 8), 8))
    assert all(abs(value - 1) < 0.1 for value in report.types.values()), report.types


def test_random_model_keeps_the_dtype(llama):
    assert {p.dtype for p in random_model(llama.bfloat16()).parameters()} == {torch.bfloat16}


# criteria


def test_condition_numbers(any_model):
    found = condition_numbers(any_model)
    assert list(found) == [info.name for info in linear_modules(any_model)]
    for info in linear_modules(any_model):
        assert found[info.name] == pytest.approx(float(torch.linalg.cond(info.frozen.dequantize().double())), rel=1e-6)


def test_condition_number_of_odd_weights(llama):
    down = llama.model.layers[0].mlp.down_proj
    with torch.no_grad():
        down.weight.copy_(torch.outer(torch.ones(32), torch.randn(48)))
    limit = 1 / math.sqrt(32 * torch.finfo(torch.float64).eps)
    assert condition_numbers(llama)["model.layers.0.mlp.down_proj"] == pytest.approx(limit)
    for bad in (0.0, math.nan, math.inf):
        down.weight.data.fill_(bad)
        with pytest.raises(
            ModelError, match=r"layers.0.mlp.down_proj: the weight is all zeros, or holds NaN or infinity"
        ):
            condition_numbers(llama)


def test_explained_variance(llama, tokenizer):
    batches = batches_of(prompts(tokenizer, 8), 4)
    found = explained_variance(pf.score(llama, batches, eva_rank=3))
    for name, x in exact_inputs(llama, batches, found).items():
        values = torch.linalg.svdvals(x).square()
        assert found[name] == pytest.approx(float(values[:3].sum() / values.sum()), rel=1e-4), name
    with pytest.raises(DataError, match="no spectrum of the inputs"):
        explained_variance(pf.score(llama, batches))


def weight_gradients(model, examples):
    """Module -> gradient [out, in] of the mean label loss, from transformers' own loss, row by row in float64."""
    model = model.double().requires_grad_(True)
    total = sum(e.label_tokens for e in examples)
    for e in examples:
        batch = collate([e])
        out = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False)
        (out.loss * e.label_tokens / total).backward()
    found = {i.name: i.module.weight.grad.T if i.transposed else i.module.weight.grad for i in linear_modules(model)}
    model.zero_grad(set_to_none=True)
    model.float()
    return found


def test_gradient_energy(any_model, tokenizer):
    """dL/dB = (dL/dW) A^T with the A that inject draws."""
    examples = prompts(tokenizer, 9)
    rank, exact = 2, weight_gradients(any_model, examples)
    found = gradient_energy(any_model, examples, rank=rank, seed=4)
    shapes = {info.name: (info.n_in, info.n_out) for info in linear_modules(any_model)}
    placement = pf.Placement(dict.fromkeys(shapes, (rank, 1.0)), [], "", 0)
    pf.inject(any_model, placement, seed=4, init="gaussian")
    for name, value in found.items():
        a = any_model.get_submodule(name).lora_A.detach().double()
        want = (exact[name] @ a.T).square().sum() / (rank * sum(shapes[name]))
        assert value == pytest.approx(float(want), rel=1e-4), name


def state_of(model):
    return (
        {n: (p.detach().clone(), p.requires_grad, p.grad) for n, p in model.named_parameters()},
        {n: (type(m), m.training) for n, m in model.named_modules()},
    )


def assert_unchanged(model, before):
    parameters, modules = state_of(model)
    assert modules == before[1] and parameters.keys() == before[0].keys()
    for name, (value, needed, grad) in parameters.items():
        old = before[0][name]
        assert torch.equal(value, old[0]) and needed == old[1] and grad is old[2], name


def test_gradient_energy_leaves_the_model_alone(llama, tokenizer):
    examples = prompts(tokenizer, 4)
    llama.train()
    llama.model.norm.eval()
    llama.lm_head.requires_grad_(False)
    llama.model.norm.weight.grad = torch.ones(32)
    before = state_of(llama)
    assert gradient_energy(llama, examples, 2) == gradient_energy(llama, examples, 2), "seeded, and undone"
    assert_unchanged(llama, before)
    with pytest.raises(PlacementError, match="rank 17 does not fit"):
        gradient_energy(llama, examples, 17)
    assert_unchanged(llama, before)
    with pytest.raises(DataError, match="no label token in 1 rows"):
        gradient_energy(llama, [Example.after_prompt((5, 6), 2, None, "")], 2)
    with pytest.raises(IndexError):  # a token beyond the vocabulary: the forward pass itself fails
        gradient_energy(llama, [Example.after_prompt((600, 5), 1, None, "")], 2)
    assert_unchanged(llama, before)
    llama.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(DataError, match="the loss is not finite"):
        gradient_energy(llama, examples, 2)


def test_gradient_energy_leaves_adapters_alone(llama, tokenizer):
    names = pf.inject(llama, pf.Placement({"model.layers.0.mlp.up_proj": (2, 4.0)}, [], "", 0))
    with pytest.raises(AdapterError, match="has LoRA adapters already"):
        gradient_energy(llama, prompts(tokenizer, 2), 2)
    assert pf.unload(llama) == names


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_random_order_is_that_of_place(llama, tokenizer, k):
    report = pf.score(llama, batches_of(prompts(tokenizer, 2), 2))
    by_module = random_ranks(llama, seed=k)
    types = {score.type: by_module[name] for name, score in report.scores.items()}
    assert pick(types, k) == pf.place(report, "random", k=k, rank=2, seed=k).types


# the whole


def flat(rows):
    return [row["what"] for row in rows]


def test_audit(llama, tokenizer):
    examples, before = prompts(tokenizer, 20), state_of(llama)
    others = [prompts(tokenizer, 20, "valid"), prompts(tokenizer, 20, "test")]
    lines = []
    found = audit(llama, tokenizer, examples, ScoreSettings(k=2, rank=2), others=others, say=lines.append)
    assert_unchanged(llama, before)
    found = json.loads(json.dumps(found, allow_nan=False))
    report = pf.score(llama, batches_of(examples, 8))
    assert found["types"] == pytest.approx(report.types) and found["pick"] == list(report.types)[:2]
    assert (found["prompts"], found["scored_tokens"], found["k"], found["rank"]) == (20, report.tokens, 2, 2)
    lengths = [n for n in (8, 16, 32, 64) if n < max(len(e.tokens) for e in examples)]
    want = ["8 prompts", "16 prompts", *(f"first {n} tokens" for n in lengths), "2 other samples"]
    assert flat(found["stability"]) == want and found["stability"][-1]["repeats"] == 2
    assert flat(found["tokens"]) == ["all tokens", "without the first token", "prompt tokens", "completion tokens"]
    completion = pf.score(llama, batches_of(examples, 8, "completion"))
    assert found["tokens"][3]["types"] == pytest.approx(completion.types)
    assert found["tokens"][0] == {"what": "all tokens", "types": found["types"], "pick": found["pick"], "tau": 1.0}
    assert flat(found["controls"]) == ["random tokens", "shuffled words", "random weights"]
    shuffled = pf.score(llama, batches_of(shuffled_words(examples, tokenizer), 8))
    assert found["controls"][1]["types"] == pytest.approx(shuffled.types)
    assert found["verdict"] == verdict(found["pick"], found["controls"])
    names = ["NFN", "input spectrum", "condition number", "gradient energy", "random"]
    assert [row["name"] for row in found["criteria"]] == names
    nfn, _, kappa, gradient, _ = found["criteria"]
    assert (nfn["tau"], nfn["agrees"], nfn["cost"], nfn["pick"]) == (1.0, True, 1.0, found["pick"])
    by_module = condition_numbers(llama)
    logs = [math.log(v) for name, v in by_module.items() if name.endswith("q_proj")]
    assert kappa["types"]["q_proj"] == pytest.approx(math.exp(sum(logs) / 3))
    assert list(gradient["types"].values()) == sorted(gradient["types"].values(), reverse=True)
    assert gradient["pick"] == list(gradient["types"])[:2] and gradient["chooses"] == "highest"
    for row in found["criteria"]:
        assert row["agrees"] == (set(row["pick"]) == set(found["pick"])) and row["extra_mib"] >= 0
    (missing,) = found["missing"]
    assert missing["what"] == "tokens by role" and "control: random tokens" in lines
    text = audit_text(found)
    for part in ("random weights", found["verdict"], "gradient energy", "skipped: tokens, tokens by role: the rows"):
        assert part in text


def test_an_audit_of_a_mixture(tokenizer):
    """NFN has types of experts, and criteria of linear modules alone are compared on the types that they have."""
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=4)).eval()
    found = audit(model, tokenizer, prompts(tokenizer, 9), ScoreSettings(k=6, rank=2))
    experts = {"experts.down_proj", "experts.gate_up_proj"}
    rows = {row["name"]: set(row["types"]) for row in found["criteria"]}
    assert experts <= rows["NFN"] == rows["random"] == set(found["types"])
    for name in ("input spectrum", "condition number", "gradient energy"):
        assert rows[name] == rows["NFN"] - experts, name
    assert [one["why"] for one in found["missing"] if one["what"] == "experts"] == [
        "criteria other than NFN are of linear modules alone, and compared on their types"
    ]
    with pytest.raises(ConfigError, match="k = 7: expected 1 to 6, this model's module types"):
        audit(model, tokenizer, prompts(tokenizer, 9), ScoreSettings(k=7, rank=2))


def test_what_cannot_be_had_is_said(tokenizer):
    """Short rows of single words, no tokenizer, a rank that does not fit, a configuration that builds no model."""
    model = build("llama")
    model.config = transformers.T5Config(bos_token_id=1)
    rows = [Example.after_prompt((7, 8, 9 + i), 1, None, f"a:{i}") for i in range(4)]
    found = audit(model, None, rows, ScoreSettings(k=1, rank=33))
    why = {(row["kind"], row["what"]): row["why"] for row in found["missing"]}
    for key, message in {
        ("stability", "random subsets of the prompts"): "4 prompts: too few for subsets of 8",
        ("stability", "shorter rows"): "no row is longer than 8 tokens",
        ("stability", "other samples"): "none was given",
        ("tokens", "prompt and completion tokens"): "plain text, without a prompt",
        ("tokens", "tokens by role"): "the rows are no messages",
        ("control", "random tokens"): "need the model's tokenizer, got none",
        ("control", "shuffled words"): "need the model's tokenizer, got none",
        ("control", "random weights"): "cannot be built: Unrecognized configuration",
        ("criterion", "input spectrum"): "eva_rank 33: expected 1 to 32",
        ("criterion", "gradient energy"): "rank 33 does not fit",
    }.items():
        assert message in why.pop(key)
    assert not why
    assert (found["stability"], found["controls"]) == ([], [])
    assert [row["name"] for row in found["criteria"]] == ["NFN", "condition number", "random"]
    assert "stays open" in found["verdict"] and "skipped: control, random weights" in audit_text(found)


def test_impossible_requests(llama, tokenizer):
    examples = prompts(tokenizer, 2)
    with pytest.raises(ConfigError, match="k = 8: expected 1 to 7, this model's module types"):
        audit(llama, tokenizer, examples, ScoreSettings(k=8))
    with pytest.raises(ConfigError, match="k: expected a number above 0"):
        audit(llama, tokenizer, examples, ScoreSettings(k=0))
    with pytest.raises(DataError, match="no prompt to score"):
        audit(llama, tokenizer, [])
    with pytest.raises(DataError, match="needs rows of messages"):
        audit(llama, tokenizer, examples, ScoreSettings(score_tokens="user"))


def control(what, picked, low=1.0, high=1.0):
    return {"what": what, "pick": picked, "types": {"a": low, "b": high, "c": 1.0, "d": 1.0}}


@pytest.mark.parametrize(
    ("controls", "want"),
    [
        (
            [control("random tokens", ["b", "a"]), control("shuffled words", ["a", "b"]), control("random weights", [], 0.97)],
            "The pick (a, b) stays the same on random tokens and on shuffled words: it reflects the model rather than the "
            "task. With random weights the types score 0.97 to 1.00, near 1 as they should.",
        ),
        (
            [control("random tokens", ["a", "c"]), control("shuffled words", ["a", "b"])],
            "The pick (a, b) depends on the text: random tokens give a, c; shuffled words leave it as it is.",
        ),
        (
            [control("random tokens", ["a", "c"]), control("shuffled words", ["d", "b"])],
            "The pick (a, b) depends on the text: random tokens give a, c; shuffled words give d, b.",
        ),
        (
            [control("shuffled words", ["a", "b"])],
            "The pick (a, b) stays the same on shuffled words, but without the other control this settles nothing.",
        ),
        (
            [control("random tokens", ["a", "b"]) | {"types": {"a": 1.0, "b": 1.0}}],
            "Every module type is picked, so there is no choice to control.",
        ),
        (
            [control("random weights", ["a", "b"], 0.5)],
            "Neither random tokens nor shuffled words could be scored, so it stays open whether the pick (a, b) reflects the task. "
            "With random weights the types score 0.50 to 1.00, not near 1: this architecture alone moves the scores.",
        ),
    ],
)  # fmt: skip
def test_verdicts(controls, want):
    assert verdict(["a", "b"], controls) == want


def test_roles_of_chats(llama, tokenizer):
    rows = [
        Example.after_prompt((1, *range(10, 20 + i)), 6, None, "", ("user",) * 6 + ("assistant",) * (5 + i)) for i in range(3)
    ]  # fmt: skip
    found = audit(llama, tokenizer, rows, ScoreSettings(k=1, rank=2, score_tokens="assistant"))
    assert flat(found["tokens"])[-2:] == ["assistant tokens", "user tokens"]
    assert found["tokens"][-2]["types"] == found["types"] and found["score_tokens"] == "assistant"


def test_command(model_folder, tmp_path, capsys):
    def plopfast(*arguments):
        code = main.main([*map(str, arguments), "--out", str(tmp_path / "run")])
        return code, *capsys.readouterr()

    data = tmp_path / "train.jsonl"
    data.write_text("".join(line + "\n" for line in DEMO["train"].read_text().splitlines()[:40]))
    settings = ["--model", model_folder, "--train", data, "--valid", data, "--rank", 2, "--seed", 3]
    code, out, err = plopfast("audit", *settings, "--score-prompts", 18, "--k", 2)
    assert code == 0 and "picks" in out and "control: shuffled words" in err
    found = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert (found["plopfast"], found["prompts"], found["k"], found["seed"]) == ("audit", 18, 2, 3)
    assert found["stability"][-1] == {**found["stability"][-1], "what": "3 other samples", "repeats": 3}
    assert Ledger(tmp_path / "run").done()["audit"]["peak_mib"] == found["peak_mib"]
    assert plopfast("report")[0] == 0, "of a folder that holds nothing else"
    page = html.unescape((tmp_path / "run" / "report.html").read_text())
    assert (
        f'<p class="lede">{found["verdict"]} </p>' in page and "gradient energy" in page and "3 other samples" in page
    )
    code, _, err = plopfast("audit")
    assert code == 2 and "audit.json: exists already" in err
    code, out, _ = plopfast("audit", "--overwrite", "--score-prompts", 100)
    assert code == 0 and "other samples: none was given" in out
    code, _, err = plopfast("audit", "--overwrite", "--k", 9)
    assert code == 2 and "k = 9: expected 1 to 7" in err
    assert plopfast("score", "--compat", "official")[0] == 0
    code, _, err = plopfast("audit", "--overwrite")
    assert code == 2 and "--compat official does not keep" in err
