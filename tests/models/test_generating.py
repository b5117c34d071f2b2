"""Answers in batches are those of each prompt alone, of plain, quantised, streamed and adapted models; nothing is left changed."""

import random
import warnings

import pytest
import torch
import transformers
from helpers import CONFIGS, SMALL, adapted, build, randomise
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

import plopfast as pf
from plopfast.lora.layer import adapters
from plopfast.models import generating
from plopfast.models.generating import Answer, batches, ends_of_text, generate
from plopfast.support.errors import ConfigError, DataError, ModelError

LENGTHS = (3, 17, 1, 3, 40, 8, 29, 5)


def prompts(lengths=LENGTHS, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, 300) for _ in range(length)] for length in lengths]


def lively(model):
    """The model with larger weights, and biases of 0: a new small model hardly looks at its prompt."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 0 if name.endswith("bias") else 1)
    return model


def alone(model, tokenizer, given, **settings):
    return [generate(model, tokenizer, [prompt], **settings)[0] for prompt in given]


def by_hand(model, prompt, count, ends):
    """The likeliest next token, again and again, without padding, cache or transformers' own loop."""
    tokens = []
    with torch.no_grad():
        while len(tokens) < count:
            tokens.append(
                int(model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, -1].argmax())
            )
            if tokens[-1] in ends:
                return tokens[:-1], True
    return tokens, False


@pytest.mark.parametrize("batch_tokens", [1, 60, 8192])
def test_batches_answer_as_each_prompt_alone(any_model, tokenizer, batch_tokens):
    given = prompts()
    lively(any_model)
    found = generate(any_model, tokenizer, given, max_new_tokens=9, batch_tokens=batch_tokens)
    assert found == alone(any_model, tokenizer, given, max_new_tokens=9)
    for prompt, answer in zip(given, found, strict=True):
        assert ([*answer.tokens], answer.ended) == by_hand(any_model, prompt, 9, {2})
        assert answer.text == tokenizer.decode(answer.tokens, skip_special_tokens=True)
    assert len({answer.tokens for answer in found}) > 5, "the prompts matter"


@pytest.mark.parametrize("kind", ["nf4", "int8", "streamed", "adapted"])
def test_models_of_every_kind(kind, model_folder, tokenizer):
    if kind == "adapted":
        model = adapted()
        randomise(model)
        plain = generate(build("llama"), tokenizer, prompts(), max_new_tokens=6)
    else:
        more = {"stream": True} if kind == "streamed" else {"quantize": kind}
        model, _ = pf.load_model(model_folder, **more)
        plain = None
    found = generate(model, tokenizer, prompts(), max_new_tokens=6)
    assert found == alone(model, tokenizer, prompts(), max_new_tokens=6) != plain
    if kind == "streamed":
        assert found == generate(pf.load_model(model_folder)[0], tokenizer, prompts(), max_new_tokens=6)


def spoken(llama, tokenizer, given, token):
    """A model whose likeliest token is always `token`."""
    with torch.no_grad():
        llama.lm_head = nn.Linear(32, 300, bias=True)
        llama.lm_head.weight.zero_(), llama.lm_head.bias.zero_()
        llama.lm_head.bias[token] = 9.0
    return generate(llama, tokenizer, given, max_new_tokens=4)


def test_an_end_by_itself(llama, tokenizer):
    given = prompts((3, 5))
    assert spoken(llama, tokenizer, given, 2) == [Answer("", (), True)] * 2
    assert [(answer.tokens, answer.ended) for answer in spoken(llama, tokenizer, given, 77)] == [((77,) * 4, False)] * 2
    for ends in (77, [9, 77]):
        llama.generation_config.eos_token_id = ends
        assert ends_of_text(llama, tokenizer) == {2, 77} | ({9} if ends != 77 else set())
        assert spoken(llama, tokenizer, given, 77) == [Answer("", (), True)] * 2
    llama.generation_config.eos_token_id = None
    assert spoken(llama, tokenizer, given, 2) == [Answer("", (), True)] * 2, "the tokenizer's"


def test_one_answer_ends_before_the_others(llama, tokenizer):
    """What follows its end in the batch is none of its tokens."""
    given = prompts()
    usual = generate(llama, tokenizer, given, max_new_tokens=8)
    token = usual[1].tokens[3]
    llama.generation_config.eos_token_id = token
    found = generate(llama, tokenizer, given, max_new_tokens=8)
    for before, answer in zip(usual, found, strict=True):
        at = before.tokens.index(token) if token in before.tokens else None
        assert (answer.tokens, answer.ended) == (before.tokens[:at], at is not None)
    assert {answer.ended for answer in found} == {True, False}


def test_the_context_bounds_the_answers(llama, tokenizer):
    """128 tokens: each prompt has its own room, whoever is in its batch."""
    given = prompts((120, 127, 3, 120))
    found = generate(llama, tokenizer, given, max_new_tokens=20)
    assert [len(answer.tokens) for answer in found if not answer.ended] == [8, 1, 20, 8]
    assert found == alone(llama, tokenizer, given, max_new_tokens=20)
    with pytest.raises(
        DataError, match=r"prompt 2: the prompt has 128 tokens, and the model's context of 128 leaves no room"
    ):
        generate(llama, tokenizer, prompts((3, 128)))
    llama.config.max_position_embeddings = -1  # as XLNet's says that there is none
    assert len(generate(llama, tokenizer, prompts((127,)), max_new_tokens=3)[0].tokens) == 3
    gpt2 = build("gpt2")
    assert len(generate(gpt2, tokenizer, prompts((126,)), max_new_tokens=20)[0].tokens) <= 2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens: expected a number above 0"),
        ({"temperature": -1.0}, ConfigError, "temperature: expected a number of at least 0"),
        ({"temperature": float("nan")}, ConfigError, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, ConfigError, "top_p: expected a number above 0"),
        ({"temperature": 1.0, "top_p": 1.5}, ConfigError, "top_p: expected a number above 0 and at most 1, got 1.5"),
        ({"top_p": 0.5}, ConfigError, "top_p 0.5: at temperature 0 nothing is drawn"),
        ({"stream": print}, ConfigError, "stream: expected a single prompt"),
    ],
)
def test_settings_that_cannot_be(llama, tokenizer, settings, error, message):
    with pytest.raises(error, match=message):
        generate(llama, tokenizer, prompts(), **settings)


def test_what_cannot_answer(llama, tokenizer):
    with pytest.raises(DataError, match="prompt 2: no tokens"):
        generate(llama, tokenizer, [[3], []])
    with pytest.raises(ModelError, match="Linear generates no text"):
        generate(nn.Linear(2, 2), tokenizer, [[3]])
    assert generate(llama, tokenizer, []) == []
    with torch.no_grad():
        llama.lm_head.weight[5] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(ModelError, match="logits are NaN"):
            generate(llama, tokenizer, [[3]], temperature=temperature)


def test_drawing_follows_the_seed_and_leaves_torchs_own(llama, tokenizer):
    given, state = prompts(), torch.get_rng_state()
    draw = {"temperature": 1.0, "max_new_tokens": 6}
    one = generate(llama, tokenizer, given, seed=3, **draw)
    torch.manual_seed(99)
    assert generate(llama, tokenizer, given, seed=3, **draw | {"temperature": 1, "top_p": 1}) == one
    torch.set_rng_state(state)
    assert (
        generate(llama, tokenizer, given, seed=4, **draw) != one != generate(llama, tokenizer, given, max_new_tokens=6)
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_drawn_from(llama, tokenizer):
    """All tokens (transformers' own default is 50), and with top_p the likeliest alone; a low temperature is greedy."""
    given = [[5, 6, 7]] * 400
    with torch.no_grad():
        chances = llama(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    order = chances.sort(descending=True)
    drawn = generate(llama, tokenizer, given, max_new_tokens=1, temperature=1.0)
    seen = {token for answer in drawn for token in answer.tokens}
    assert len(seen - {*order.indices[:50].tolist()}) > 50
    inside = {*order.indices[: int((order.values.cumsum(0) < 0.2).sum()) + 1].tolist()}
    some = generate(llama, tokenizer, given, max_new_tokens=1, temperature=1.0, top_p=0.2)
    assert {token for answer in some for token in answer.tokens} <= inside and len({a.tokens for a in some}) > 3
    lively(llama)
    cold = generate(llama, tokenizer, prompts(), max_new_tokens=4, temperature=1e-4)
    assert cold == generate(llama, tokenizer, prompts(), max_new_tokens=4)


def test_the_models_own_sampling_settings_do_not_count(llama, tokenizer):
    usual = generate(llama, tokenizer, prompts(), max_new_tokens=9)
    llama.generation_config.update(
        repetition_penalty=50.0, do_sample=True, temperature=5.0, min_new_tokens=9, num_beams=2
    )
    assert generate(llama, tokenizer, prompts(), max_new_tokens=9) == usual


@pytest.mark.parametrize("fails", [False, True])
def test_all_is_as_before_afterwards(tokenizer, fails, monkeypatch):
    model = adapted()
    model.train()
    model.model.layers[1].eval()
    model.config.use_cache = False
    model.generation_config.max_length = 55
    config, side = model.generation_config, tokenizer.padding_side
    facts = (
        config.to_dict(),
        model.config.to_dict(),
        [m.training for m in model.modules()],
        torch.get_rng_state().tolist(),
    )
    if fails:
        monkeypatch.setattr(type(model), "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(model, tokenizer, prompts(), temperature=1.0)
    else:
        generate(model, tokenizer, prompts(), temperature=1.0, max_new_tokens=3)
    assert model.generation_config is config and tokenizer.padding_side == side
    assert facts == (
        config.to_dict(),
        model.config.to_dict(),
        [m.training for m in model.modules()],
        torch.get_rng_state().tolist(),
    )
    assert not any(p.grad is not None for m in adapters(model).values() for p in m.parameters())


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=["greedy", "drawn"])
def test_nothing_warns(any_model, tokenizer, settings, caplog, monkeypatch, capsys):
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
    any_model.generation_config.temperature, any_model.generation_config.top_k = 0.6, 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(any_model, tokenizer, prompts(), max_new_tokens=3, **settings)
    assert not caplog.records and capsys.readouterr() == ("", "")


class NoPlaces(transformers.LlamaForCausalLM):
    """Counts its positions from the first token of a row, padding or not: as models do that get no mask."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None, **more):
        more.pop("position_ids", None)
        return super().forward(
            input_ids=torch.where(input_ids == 0, 9, input_ids), past_key_values=past_key_values, **more
        )


class ByCache(transformers.LlamaForCausalLM):
    """Counts the positions of new tokens by what the cache holds, padding too."""

    def forward(self, input_ids, past_key_values=None, position_ids=None, **more):
        held = past_key_values.get_seq_length() if past_key_values is not None else 0
        position_ids = position_ids if not held else torch.full_like(position_ids, held)
        return super().forward(input_ids=input_ids, past_key_values=past_key_values, position_ids=position_ids, **more)


@pytest.mark.parametrize("kind", [NoPlaces, ByCache])
def test_a_model_that_sees_padding_gets_prompts_of_one_length(tokenizer, kind):
    torch.manual_seed(0)
    model = lively(kind(transformers.LlamaConfig(**SMALL)).eval())
    model.generation_config.eos_token_id = None
    with pytest.warns(UserWarning, match=f"{kind.__name__} answers otherwise after padding on the left"):
        found = generate(model, tokenizer, prompts(), max_new_tokens=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found == alone(model, tokenizer, prompts(), max_new_tokens=5), "which needs no padding"


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_these_take_padding(architecture, tokenizer, monkeypatch):
    monkeypatch.setattr(generating.warnings, "warn", lambda *_, **__: pytest.fail("prompts of one length alone"))
    generate(build(architecture), tokenizer, prompts(), max_new_tokens=1)


def test_how_batches_are_made():
    assert [*batches([9, 2, 3], [5, 5, 5], 16)] == [[1, 2], [0]]
    assert [*batches([9, 2, 3], [5, 5, 5], 999)] == [[1, 2, 0]]
    assert [*batches([9, 2, 3], [5, 5, 5], 1)] == [[1], [2], [0]]
    assert [*batches([9, 2, 3, 2], [5, 5, 4, 5], 999)] == [[1, 3, 0], [2]], "one limit"
    assert [*batches([9, 2, 3, 2], [5, 5, 5, 5], 999, mixed=False)] == [[1, 3], [2], [0]]
    assert [*batches([], [], 9)] == []
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 30))]
        limits = [min(20, 50 - length) for length in lengths]
        made = [*batches(lengths, limits, 200)]
        assert sorted(i for batch in made for i in batch) == list(range(len(lengths)))
        for batch in made:
            assert len(batch) == 1 or len(batch) * (max(lengths[i] for i in batch) + limits[batch[0]]) <= 200


@pytest.fixture
def of_bytes():
    """A tokenizer with a token for each byte, from 3 on."""
    known = {"<pad>": 0, "<s>": 1, "</s>": 2} | {
        byte: 3 + i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    bpe = Tokenizer(models.BPE(vocab=known, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize(("text", "ended"), [("naïve 日本 ✓ finch\n fin ", True), ("a 日", True), ("naïve 日", False)])
def test_the_pieces_are_the_answer(llama, of_bytes, text, ended):
    """Character by character, whole ones, though the bytes of one come in several tokens; the last one may break off."""
    spelled = of_bytes(text, add_special_tokens=False)["input_ids"]
    assert len(spelled) == len(text.encode())
    step = iter([*spelled, 2])

    def say(module, args, output):
        output.logits = torch.full_like(output.logits, -9.0)
        output.logits[:, -1, next(step)] = 9.0
        return output

    handle, pieces = llama.register_forward_hook(say), []
    limit = len(spelled) + (1 if ended else -1)
    (answer,) = generate(llama, of_bytes, [[5, 6]], max_new_tokens=limit, stream=pieces.append)
    handle.remove()
    assert "".join(pieces) == answer.text and answer.ended == ended
    if ended:
        assert pieces == [*text] and answer.tokens == (*spelled,)
    else:
        assert answer.text.startswith(text[:-1]) and answer.text.endswith("\ufffd")
