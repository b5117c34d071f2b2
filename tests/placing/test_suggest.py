"""pf.suggest: the placement of a run from one call, of rows in any form, and nothing is left changed."""

import copy
import json

import datasets
import pytest
import torch
from helpers import build
from peft import LoraConfig, get_peft_model

import plopfast as pf
from plopfast.data.rows import DEMO
from plopfast.placing import suggest as module
from plopfast.placing.by_settings import placed
from plopfast.run.run import Run
from plopfast.run.stages import run_place, run_score
from plopfast.support.config import PlaceSettings
from plopfast.support.errors import ConfigError, DataError, ModelError, PlacementError

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: "
    "{% endif %}"
)
PAIRS = [row for _, row in pf.read_jsonl(DEMO["valid"])[:40]]


@pytest.fixture
def chat(tokenizer):
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = TEMPLATE
    return with_template


@pytest.fixture
def examples(monkeypatch):
    """Those that the last call scored, in their order."""
    seen = []
    monkeypatch.setattr(
        module, "scored", lambda m, rows, *a, real=module.scored: seen.append(rows) or real(m, rows, *a)
    )
    return seen


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def call(arguments):
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


def test_it_is_the_placement_of_a_run(llama, tokenizer, model_folder, tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    settings = {"score_prompts": 24, "k": 2, "rank": 4, "seed": 5, "alpha": 6.0}
    config = pf.RunConfig(model=str(model_folder), train=str(train), valid=str(DEMO["test"]), **settings)
    run = Run(tmp_path / "run", config)
    run_score(run)
    theirs = run_place(run)
    for rows in (
        train,
        str(train),
        pf.read_rows(train),
        pf.read_jsonl(train),
        PAIRS,
        datasets.Dataset.from_list(PAIRS),
    ):
        ours = pf.suggest(run.model, rows, run.tokenizer, **settings)
        assert (ours.modules, ours.margin, ours.notes) == (theirs.modules, theirs.margin, theirs.notes)
    assert pf.suggest(run.model, PAIRS, run.tokenizer, **{**settings, "seed": 6}).margin != theirs.margin


FORMS = {  # rows of a prompt and an answer -> a row of the form, and what is tokenised of it
    "pair": (lambda p, c: {"prompt": p, "completion": c}, lambda p, c: None),
    "messages": (lambda p, c: {"messages": [user(p), assistant(c)]}, lambda p, c: f"<s>user: {p}</s><s>assistant: {c}</s>"),
    "chat": (
        lambda p, c: {"prompt": [user(p)], "completion": [assistant(c)]},
        lambda p, c: f"<s>user: {p}</s><s>assistant: {c}</s>",
    ),
    "alpaca": (
        lambda p, c: {"instruction": p, "input": "", "output": c},
        lambda p, c: f"<s>user: {p}</s><s>assistant: {c}</s>",
    ),
    "text": (lambda p, c: {"text": p + c}, lambda p, c: f"{p}{c}</s>"),
    "prompts of text": (lambda p, c: {"prompt": p, "solution": c}, lambda p, c: p),
    "prompts of messages": (
        lambda p, c: {"prompt": [user(p)], "solution": c},
        lambda p, c: f"<s>user: {p}</s><s>assistant: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_each_form(form, llama, chat, examples, capsys):
    make, text = FORMS[form]
    rows = [make(row["prompt"], row["completion"]) for row in PAIRS]
    kept = copy.deepcopy(rows)
    one = pf.suggest(llama, rows, chat, k=2, rank=4)
    two = pf.suggest(llama, datasets.Dataset.from_list(rows), chat, k=2, rank=4)
    assert rows == kept and one == two and one.modules
    order = [int(example.where.removeprefix("row ")) - 1 for example in examples[0]]
    assert sorted(order) == list(range(len(rows))) and order != sorted(order)
    for number, example in zip(order, examples[0], strict=True):
        if wanted := text(PAIRS[number]["prompt"], PAIRS[number]["completion"]):
            assert list(example.tokens) == chat(wanted, add_special_tokens=False)["input_ids"]
    printed = capsys.readouterr().out
    assert str(one) in printed and f"of {len(rows)} rows" in printed and "forward passes alone" in printed
    assert ("prompts alone" in printed) == (form.startswith("prompts"))


def test_keys_that_a_data_set_fills_in_are_not_there(llama, chat, examples):
    """Arrow gives every row, and every message, the keys of all others."""
    chat.chat_template = TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}"
    )
    calls = [{"city": "Bern"}, {"hour": 7}]
    rows = [
        {"messages": [user(row["prompt"]), assistant(row["completion"]) | {"tool_calls": [call(calls[i % 2])]}]}
        for i, row in enumerate(PAIRS)
    ]
    for given in rows, datasets.Dataset.from_list(rows):
        pf.suggest(llama, given, chat, rank=4)
    one, two = ([(e.where, e.tokens) for e in seen] for seen in examples)
    assert one == two


def test_prompts_score_as_their_own_batches_do(llama, tokenizer):
    prompts = [row["prompt"] for row in PAIRS]
    placement = pf.suggest(llama, [{"prompt": p, "answer": 1} for p in prompts], tokenizer, k=1, rank=2)
    batch = tokenizer([*prompts, "x"], padding=True, return_tensors="pt")
    batch = {name: batch[name][:-1] for name in ("input_ids", "attention_mask")}
    theirs = pf.place(pf.score(llama, [batch]), k=1, rank=2)
    assert placement.types == theirs.types


def test_without_a_length_the_first_rows_are_taken(llama, tokenizer, examples, capsys):
    left = iter(PAIRS)
    placement = pf.suggest(llama, left, tokenizer, score_prompts=10, rank=4)
    assert [example.where for example in examples[0]] == [f"row {n}" for n in range(1, 11)]
    assert "of the first 10 rows" in capsys.readouterr().out and next(left) == PAIRS[10]
    stream = datasets.Dataset.from_list(PAIRS).to_iterable_dataset()
    assert pf.suggest(llama, stream, tokenizer, score_prompts=10, rank=4) == placement


def test_only_the_drawn_rows_are_read(llama, tokenizer):
    class Rows(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

        def __iter__(self):
            raise AssertionError("a large data set must not be read as a whole")

    read = []
    pf.suggest(llama, Rows(PAIRS), tokenizer, score_prompts=5, rank=4)
    assert len(set(read)) == len(read) == 5 and read != [0, 1, 2, 3, 4]


def test_long_rows_are_cut_and_counted(llama, tokenizer, chat, examples, capsys):
    pf.suggest(llama, PAIRS, tokenizer, rank=4, max_length=12)
    assert max(len(e.tokens) for e in examples[0]) == 12 and "cut to 12 tokens" in capsys.readouterr().out
    prompts = [{"prompt": [user(row["prompt"] * 20)]} for row in PAIRS]
    pf.suggest(llama, prompts, chat, rank=4)
    assert {len(e.tokens) for e in examples[1]} == {128} and "40 rows" in capsys.readouterr().out, "the model's context"
    whole = chat.apply_chat_template(prompts[0]["prompt"], add_generation_prompt=True)["input_ids"]
    assert next(list(e.tokens) for e in examples[1] if e.where == "row 1") == whole[-128:]


def test_model_and_tokenizer_stay_as_they_are(llama, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    llama.train().model.layers[0].eval()
    llama.model.norm.weight.requires_grad_(False)
    modes, grads = (
        {n: m.training for n, m in llama.named_modules()},
        {n: p.requires_grad for n, p in llama.named_parameters()},
    )
    random, known = torch.get_rng_state(), repr(tokenizer)
    pf.suggest(llama, PAIRS, tokenizer, rank=4)
    assert modes == {n: m.training for n, m in llama.named_modules()}
    assert grads == {n: p.requires_grad for n, p in llama.named_parameters()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())
    assert all(p.grad is None for p in llama.parameters())
    assert repr(tokenizer) == known and tokenizer.padding_side == "left" and torch.equal(torch.get_rng_state(), random)


def test_options_of_place_are_handed_on(llama, tokenizer):
    placement = pf.suggest(llama, PAIRS, tokenizer, rule="mlp", alpha=5, budget="2000")
    assert placement.types and all("mlp" in name for name in placement.modules) and placement.parameters <= 2000
    assert {alpha for _, alpha in placement.modules.values()} == {5}
    named = pf.suggest(llama, PAIRS, tokenizer, rule="v_proj,q_proj", rank=2)
    assert set(named.types) == {"v_proj", "q_proj"} and {rank for rank, _ in named.modules.values()} == {2}


def test_a_wrong_rule_is_found_before_scoring(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "scored", None)
    with pytest.raises(PlacementError, match="neither a module type nor"):
        pf.suggest(llama, PAIRS, tokenizer, rule="no_proj")


def wrapped(model):
    return get_peft_model(model, LoraConfig(target_modules=["v_proj"]))


BAD = {
    "no rows": ([], {}, DataError, "expected one at least, got none"),
    "an empty data set": (datasets.Dataset.from_list([]), {}, DataError, "expected one at least"),
    "an empty generator": (iter([]), {}, DataError, "expected one at least"),
    "no iterable": (7, {}, DataError, "expected a list or a data set of dicts.*got 7"),
    "no such file": ("/nowhere/rows.jsonl", {}, DataError, "no such data file"),
    "texts": (["a", "b"], {}, DataError, "row [12]: expected a dict, got '[ab]'"),
    "splits": (
        datasets.DatasetDict({"train": datasets.Dataset.from_list(PAIRS)}), {}, DataError, r"give one split.*data\['train'\]",
    ),
    "another form": ([{"question": "a"}] * 3, {}, DataError, r"row \d: expected a row like"),
    "an empty prompt": ([{"prompt": ""}], {}, DataError, "row 1: expected a row like"),
    "tokens": ([{"input_ids": [1, 2]}], {}, DataError, "row 1: has a column 'input_ids'; they are tokens already"),
    "preferences": (
        [{"prompt": "a", "chosen": "b", "rejected": "c"}], {}, DataError, "'chosen'; preferences have two answers",
    ),
    "prompts among others": ([PAIRS[0], {"prompt": "a"}], {}, DataError, "row 2: a prompt alone, where row 1 is prompt and"),
    "messages without a template": ([{"prompt": [user("a")]}], {}, DataError, "row 1: messages need a tokenizer"),
    "k 0": (PAIRS, {"k": 0}, ConfigError, "k: expected a number above 0"),
    "k 99": (PAIRS, {"k": 99}, ConfigError, "k = 99: expected 1 to 7"),
    "rank 0": (PAIRS, {"rank": 0}, ConfigError, "rank: expected a number above 0"),
    "rank 99": (PAIRS, {"rank": 99}, PlacementError, "rank 99 does not fit"),
    "no prompts": (PAIRS, {"score_prompts": 0}, ConfigError, "score_prompts: expected a number above 0"),
    "no length": (PAIRS, {"max_length": 0}, ConfigError, "max_length: expected a number above 0"),
    "no such rule": (PAIRS, {"rule": "v_prj"}, PlacementError, "did you mean"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case, llama, tokenizer, capsys):
    rows, options, kind, said = BAD[case]
    with pytest.raises(kind, match=said):
        pf.suggest(llama, rows, tokenizer, **{"rank": 4, **options})
    assert not capsys.readouterr().out


def test_a_wrapped_model_is_refused(llama, tokenizer):
    theirs = wrapped(llama)
    for model in (theirs, theirs.get_base_model()):
        with pytest.raises(ModelError, match="from before get_peft_model"):
            pf.suggest(model, PAIRS, tokenizer)
    assert pf.suggest(theirs.unload(), PAIRS, tokenizer, rank=4).modules


@pytest.mark.parametrize("odd", ["HuggingFaceTB/SmolLM2-135M-Instruct", PAIRS])
def test_what_is_no_tokenizer(odd, llama):
    with pytest.raises(ConfigError, match=f"expected a Hugging Face tokenizer, got {type(odd).__name__}"):
        pf.suggest(llama, PAIRS, odd)


def test_arguments_in_another_order(llama, tokenizer):
    with pytest.raises(DataError, match="rows: expected a list or a data set"):
        pf.suggest(llama, tokenizer, tokenizer)


def test_a_tokenizer_of_another_model(llama, tokenizer):
    llama.resize_token_embeddings(250)
    with pytest.raises(ModelError, match=r"token 2\d\d, and the model's embedding has 250 rows"):
        pf.suggest(llama, PAIRS, tokenizer)


def test_one_rank_of_several_speaks(llama, tokenizer, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    for rank, speaks in ("0", True), ("1", False):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        pf.suggest(llama, PAIRS, tokenizer, rank=4)
        assert bool(capsys.readouterr().out) == speaks


def test_a_refused_prompt_is_named(llama, chat):
    chat.chat_template = "{{ raise_exception('odd') }}"
    with pytest.raises(DataError, match="row 1: the model's chat template refuses this row"):
        pf.suggest(llama, [{"prompt": [user("a")]}], chat)


def test_a_model_of_transformers_without_a_context_length():
    """GPT-2's configuration calls it n_positions; the setting's name is mapped."""
    assert module.context_length(build("gpt2")) == 128


def test_placing_by_settings_is_place():
    report = pf.score(build("llama"), [{"input_ids": torch.randint(3, 300, (4, 9))}])
    settings = PlaceSettings(rule="plop", k=2, rank=3, alpha=7)
    assert placed(report, settings) == pf.place(report, "plop", k=2, rank=3, alpha=7)
