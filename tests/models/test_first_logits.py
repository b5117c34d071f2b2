"""What training by the next token takes of a model is tried on two short rows; others are refused with the reason."""

import copy

import pytest
import torch
from helpers import build
from transformers import (
    CpmAntConfig,
    CpmAntForCausalLM,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    ProphetNetConfig,
    ProphetNetForCausalLM,
    ReformerConfig,
    ReformerModelWithLMHead,
    XLMConfig,
    XLMWithLMHeadModel,
)

import plopfast as pf
from plopfast.models.running import first_logits, run_for_logits
from plopfast.support.errors import ModelError
from plopfast.training.loss import Objective

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def musicgen(books):
    return MusicgenForCausalLM(MusicgenDecoderConfig(**SMALL, ffn_dim=48, num_codebooks=books))


def out_of_memory(**_):
    raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: XLMWithLMHeadModel(XLMConfig(vocab_size=64, emb_dim=32, n_layers=2, n_heads=4)), "is not causal"),
        (lambda: CpmAntForCausalLM(CpmAntConfig(**SMALL, dim_head=8, dim_ff=48, prompt_length=4)), "is not causal"),
        (lambda: musicgen(4), "does not take 2 rows of 4 tokens: RuntimeError"),
        (lambda: ReformerModelWithLMHead(ReformerConfig(is_decoder=True)), "trains on rows of one length alone"),
    ],
    ids=["xlm", "cpmant", "musicgen", "reformer"],
)  # fmt: skip
def test_a_model_that_cannot_be_trained_so_is_refused(make, said):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    for use in (first_logits, Objective):
        with pytest.raises(ModelError, match=said):
            use(model)


def test_errors_of_the_models_own_code_are_explained():
    model = build("llama")
    broken = copy.deepcopy(model)
    broken.forward = lambda **given: given["input_ids"][9]
    with pytest.raises(ModelError, match=r"LlamaForCausalLM does not take 2 rows of 4 tokens: IndexError"):
        first_logits(broken)
    full = copy.deepcopy(model)
    full.forward = out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        first_logits(full)
    short = copy.deepcopy(model)
    short.forward = lambda **given: model.forward(given["input_ids"][:, 1:])
    with pytest.raises(ModelError, match=rf"logits \[2, 3, {model.config.vocab_size}\] for \[2, 4\] tokens"):
        first_logits(short)


def test_hidden_states_that_are_no_tokens():
    config = ProphetNetConfig(
        vocab_size=64, hidden_size=32, num_encoder_layers=1, num_decoder_layers=1, num_decoder_attention_heads=4,
        num_encoder_attention_heads=4, decoder_ffn_dim=48, encoder_ffn_dim=48, is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    model = ProphetNetForCausalLM(config).eval()
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(
        ModelError, match=r"output head gets \[1, 2, 3\] hidden states, where the batch has \[1, 3\] tokens"
    ):
        run_for_logits(model, {"input_ids": ids}, torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ModelError, match="its output head, a ModuleList, is never called itself"):
        run_for_logits(musicgen(1), {"input_ids": ids}, torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_causal_model_is_taken(dtype):
    """One token at another expert is no reason to refuse it, and no generator is drawn from."""
    model = build("llama").to(dtype)
    before = torch.get_rng_state()
    ids, logits = first_logits(model)
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    torch.testing.assert_close(logits, model(input_ids=ids).logits.float())
    forward = model.forward

    def one_flips(**given):
        found = forward(**given)
        found.logits[0, 1] *= 1.5
        return found

    model.forward = one_flips
    first_logits(model)
    assert pf.linear_modules(model)
