"""Rows that branch give the numbers of plain rows, for fewer tokens; models that cannot run them are told so."""

import warnings
from functools import partial

import pytest
import torch
import transformers
from helpers import CONFIGS, SMALL, build

import plopfast as pf
from plopfast.data.example import Example
from plopfast.data.rows import DEMO
from plopfast.training import evaluate as evaluation, likelihoods
from plopfast.training.evaluate import choices_of, evaluate

BASE = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {**SMALL, "head_dim": 8, "sliding_window": 64}
MORE = {
    "gemma3, wide": lambda: transformers.Gemma3TextConfig(**WIDE),
    "gemma2": lambda: transformers.Gemma2Config(**WIDE),
    "neox": lambda: transformers.GPTNeoXConfig(**SMALL),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "gemma2, narrow": lambda: transformers.Gemma2Config(**{**WIDE, "sliding_window": 16}),
    "bloom": lambda: transformers.BloomConfig(**BASE, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda: transformers.MptConfig(vocab_size=300, d_model=32, n_heads=4, n_layers=2),
    "mamba": lambda: transformers.MambaConfig(**BASE, hidden_size=32, num_hidden_layers=2, state_size=4),
    "falcon_h1": lambda: transformers.FalconH1Config(
        **SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
    ),
    "lfm2": lambda: transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention", "conv"]),
}
CANNOT = {
    "gemma3": "its attention reaches 16 tokens back, and the longest row has 2",
    "gemma2, narrow": "its attention reaches 16 tokens back",
    "bloom": "BloomForCausalLM refuses rows that branch",
    "mpt": "MptForCausalLM computes other log-probabilities in rows that branch",
    "mamba": "MambaForCausalLM carries a state from token to token",
    "falcon_h1": "FalconH1ForCausalLM carries a state",
    "lfm2": "Lfm2ForCausalLM has conv layers",
}
ANSWERS = [(20, 21), (20, 22, 23), (24, 25), (26,)]


def made(name):
    if name in CONFIGS:
        return build(name)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(MORE[name]()).eval()


def rows(answers=ANSWERS, count=24, longest=22, before=(1, 5, 6, 7)):
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        length = int(torch.randint(2, longest, (), generator=generator))
        prompt = (*before, *torch.randint(30, 300, (length,), generator=generator).tolist())
        answer = answers[i % len(answers)]
        found.append(Example.after_prompt((*prompt, *answer, 2), len(prompt), str(answer), f"x:{i}", closing=1))
    return found


@pytest.fixture
def both(monkeypatch):
    """Runs an evaluation plainly and as it is: (plain metrics, metrics, tokens of the plain one, tokens)."""

    def run(model, examples, **options):
        tokens = [0, 0]
        found = []
        for way in (0, 1):
            count = lambda _m, _a, named, way=way: tokens.__setitem__(way, tokens[way] + named["input_ids"].numel())  # noqa: E731
            hook = model.register_forward_pre_hook(count, with_kwargs=True)
            with monkeypatch.context() as patch:
                if way == 0:
                    patch.setattr(evaluation, "likelihoods", partial(likelihoods.likelihoods, plain=True))
                found.append(evaluate(model, examples, **options))
            hook.remove()
        return *found, *tokens

    return run


def same(one, two):
    assert two.loss == pytest.approx(one.loss, rel=1e-6)
    for name in ("accuracy", "metric", "examples", "tokens", "right"):
        assert getattr(one, name) == getattr(two, name)


@pytest.mark.parametrize("name", sorted({*CONFIGS, *MORE} - CANNOT.keys()))
def test_same_numbers(name, both):
    examples = rows()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, fast, before, after = both(made(name), examples, choices=choices_of(examples), batch_tokens=128)
    assert plain.metric == "choice" and 0 < plain.accuracy < 1
    same(plain, fast)
    assert after < 0.75 * before


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "falcon_h1")) for name in sorted(CANNOT)]
)
def test_models_that_cannot_are_named(name, both):
    examples = rows()
    with pytest.warns(UserWarning, match=f"evaluation runs each row and choice on its own.*{CANNOT[name]}") as caught:
        plain, fast, *_ = both(made(name), examples, choices=choices_of(examples), batch_tokens=128)
    assert [w.filename for w in caught if "evaluation" in str(w.message)] == [__file__]
    same(plain, fast)


class WithoutPositions(transformers.LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


class WithoutMemory(transformers.LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        if attention_mask is not None:
            raise torch.OutOfMemoryError("no memory")
        return super().forward(input_ids=input_ids, use_cache=use_cache)


class WithoutMask(transformers.LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        return super().forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)


@pytest.mark.parametrize(
    ("kind", "reason"), [(WithoutPositions, "takes no position_ids"), (WithoutMask, "computes other log-probabilities")]
)
def test_models_that_leave_an_input_out(kind, reason, both):
    examples = rows()
    with pytest.warns(UserWarning, match=reason):
        same(*both(kind(CONFIGS["llama"]()).eval(), examples, choices=choices_of(examples))[:2])


def test_other_attention_is_named(llama, both, monkeypatch):
    monkeypatch.setattr(likelihoods, "MASKED", ("eager",))
    examples = rows()
    with pytest.warns(UserWarning, match='its attention "sdpa" takes no mask of trees'):
        same(*both(llama, examples, choices=choices_of(examples))[:2])


def test_rows_too_long_for_a_mask_are_named(llama, both, monkeypatch):
    monkeypatch.setattr(likelihoods, "MOST", 20)
    examples = rows()
    with pytest.warns(UserWarning, match="the longest row has 2. tokens, too many for a mask"):
        same(*both(llama, examples, choices=choices_of(examples))[:2])


def test_too_little_memory_is_no_refusal():
    examples = rows()
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(WithoutMemory(CONFIGS["llama"]()).eval(), examples, choices=choices_of(examples))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kinds_of_attention_and_numbers(implementation, dtype, both):
    model = build("llama").to(dtype)
    model.set_attn_implementation(implementation)
    examples = rows()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, fast, before, after = both(model, examples, choices=choices_of(examples))
    assert (
        fast.loss == pytest.approx(plain.loss, rel=1e-6 if dtype is torch.float32 else 0.01) and after < 0.75 * before
    )


def several_turns():
    found = []
    for i, row in enumerate(rows()):
        begin, end = row.answer
        turn = (31 + i, 9, 10, 11)  # of which two tokens are learned
        found.append(
            Example(
                turn + row.tokens,
                ((2, 4), (begin + 4, end + 5)),
                (begin + 4, end + 4),
                row.completion,
                row.where,
            )
        )
    return found


@pytest.mark.parametrize(
    "examples",
    [
        rows([(20,), (21,), (22,)], before=(1, *range(40, 80))),
        rows([(20, 21, 5), (20, 21, 6), (20, 7, 8, 9)]),
        several_turns(),
        rows(longest=90),
        [*rows([(20,), ()], 11), rows()[1]],
    ],
    ids=["one token after a long common beginning", "choices that begin alike", "several turns", "long", "empty"],
)
def test_kinds_of_rows(examples, both, llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, fast, before, after = both(llama, examples, choices=choices_of(examples), batch_tokens=64)
    same(plain, fast)
    assert after <= before


def test_a_third_of_the_tokens(both, llama, tokenizer):
    """On rows of the default task, with names of categories that are several tokens; the check is counted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = pf.read_jsonl(str(DEMO["test"]))
        named = [(where, {**row, "completion": row["completion"] + " kind"}) for where, row in list(rows)[:96]]
        examples = pf.tokenize(named, tokenizer, 128)
    choices = choices_of(examples)
    assert len(choices) == 8 and min(map(len, choices)) > 1
    plain, fast, before, after = both(llama, examples, choices=choices)
    same(plain, fast)
    assert after <= before / 3


def test_a_row_that_asks_nothing(llama):
    """Its prompt fills it, so that it has no label; it is the longest, and is run alone."""
    (row, *_) = rows()
    empty = Example((1, *range(40, 90)), (), (51, 51), "", "x:1")
    alone, beside = (evaluate(llama, some, batch_tokens=32) for some in ([row], [row, empty]))
    assert (beside.loss, beside.tokens, beside.right) == (alone.loss, alone.tokens, [*alone.right, 1.0])


def test_plain_text_that_begins_alike(both, llama):
    examples = [Example.after_prompt((1, *range(40, 90), 5 + i, 6, 7), 1, None, f"x:{i}") for i in range(24)]
    plain, fast, before, after = both(llama, examples)
    same(plain, fast)
    assert plain.metric == "token" and after < before / 2


def test_where_little_is_shared_nothing_is_tried(both, llama, monkeypatch):
    monkeypatch.setattr(likelihoods, "_why_not", lambda *_: pytest.fail("trees were tried"))
    examples = rows([(20,), (21,), (22,)], before=())
    plain, fast, before, after = both(llama, examples, choices=choices_of(examples))
    same(plain, fast)
    assert before == after


def test_dropout_is_off_while_it_lasts():
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL, attention_dropout=0.5))
    examples = rows()
    losses = [evaluate(model.train(mode), examples).loss for mode in (False, True)]
    assert losses[0] == losses[1] and model.training


def test_the_bar_counts_rows(llama, monkeypatch):
    seen = []
    bar = likelihoods.bar
    monkeypatch.setattr(likelihoods, "bar", lambda *arguments: seen.append(bar(*arguments)) or seen[-1])
    examples = rows()
    evaluate(llama, examples, choices=choices_of(examples), progress="test")
    (meter,) = seen
    assert meter.total == meter.n == len(examples)
    assert not any(p.grad_fn for p in llama.parameters())


def test_the_longest_row_is_run_both_ways(llama, monkeypatch):
    """A model may go wrong on long rows alone."""
    seen, examples = [], rows(longest=40)
    note = lambda model, sample, ways: seen.append(max(one.deepest for one in sample)) or ""  # noqa: E731
    monkeypatch.setattr(likelihoods, "_disagreement", note)
    evaluate(llama, examples, choices=choices_of(examples))
    assert seen == [max(len(example.tokens) - 1 for example in examples)]
