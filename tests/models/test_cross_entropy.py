"""chunked_cross_entropy in plain torch: its numbers, what it refuses, and how large its chunks are."""

import pytest
import torch
from torch import nn

from plopfast.kernels import codes
from plopfast.kernels.accuracy import assert_no_worse
from plopfast.models import cross_entropy
from plopfast.models.cross_entropy import LEAST, MOST, chunk_bytes, chunked_cross_entropy
from plopfast.models.quantized import quantized

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("multiplier, cap", [(1.0, None), (0.3, 2.0)])
@pytest.mark.parametrize("vocabulary", [1, 37, 1000])
def test_numbers_are_those_of_log_softmax_to_the_bit(dtype, multiplier, cap, vocabulary):
    """Chunk by chunk, written out with a tensor for each step. The chunks share their memory."""
    draw = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 16, generator=draw).to(dtype).requires_grad_() for n in (9, vocabulary))
    bias = torch.randn(vocabulary, generator=draw).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (9,), generator=draw)
    total, dh, dw, dbias = torch.zeros(()), [], torch.zeros(vocabulary, 16), torch.zeros(vocabulary)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", 4 * vocabulary)
        found = chunked_cross_entropy(h.detach(), w, targets, bias, multiplier=multiplier, cap=cap)
        with torch.enable_grad():
            again = chunked_cross_entropy(h, w, targets, bias, multiplier=multiplier, cap=cap)
        again.backward()
        for rows in torch.arange(9).split(4):
            z = torch.nn.functional.linear(h[rows], w, bias).float() * multiplier
            z = z if cap is None else (z / cap).tanh() * cap
            logp = z.log_softmax(-1)
            total = total - logp.gather(1, targets[rows, None]).sum()
            dz = logp.exp()
            dz[torch.arange(len(rows)), targets[rows]] -= 1
            dz = dz if cap is None else dz * ((z / cap) ** 2).neg().add(1)
            dz = dz * multiplier
            dh.append(dz.to(dtype) @ w)
            dw += dz.to(dtype).T @ h[rows]
            dbias += dz.sum(0)
    assert found.dtype == torch.float32 and torch.equal(found, total) and torch.equal(again, total)
    assert torch.equal(h.grad, torch.cat(dh)) and torch.equal(w.grad, dw.to(dtype))
    assert torch.equal(bias.grad, dbias.to(dtype))


def test_no_tokens():
    h, w = torch.zeros(0, 4, requires_grad=True), torch.zeros(7, 4, requires_grad=True)
    total = chunked_cross_entropy(h, w, torch.zeros(0, dtype=torch.long))
    total.backward()
    assert total.item() == 0 and h.grad.shape == (0, 4) and not w.grad.any()


def test_what_does_not_fit_is_refused():
    h, w, t = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.long)
    for wrong, message in (
        ((h[None], w, t), r"expected hidden states \[n, H\].*got \[1, 3, 4\]"),
        ((h, w.T, t), r"got \[3, 4\] torch.float32 and \[4, 7\]"),
        ((h.double(), w, t), "of one dtype, got .*float64"),
        ((h, w, t[:2]), r"targets \[3\], one for each hidden state, got torch.int64 \[2\]"),
        ((h, w, t.int()), "int64 targets .* got torch.int32"),
        ((h, w, t, torch.zeros(3)), r"expected a bias \[7\], got \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            chunked_cross_entropy(*wrong)


@pytest.fixture
def gpu(monkeypatch):
    """Stands for a GPU: `gpu(free, reserved, allocated)` in bytes."""

    def set_memory(free, reserved=0, allocated=0, capturing=False):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    return set_memory


def test_chunks_take_a_fourth_of_what_is_free(gpu):
    for free, want in ((0, 64), (100, 64), (512, 128), (1023, 128), (1024, 256), (2048, 512), (70_000, 512)):
        gpu(free << 20)
        assert chunk_bytes(GPU) == want << 20, free
        gpu(0, reserved=(free + 300) << 20, allocated=300 << 20)
        assert chunk_bytes(GPU) == want << 20, f"{free} held by the allocator"
    assert (LEAST, MOST) == (64 << 20, 512 << 20)


def test_no_memory_is_asked_for_while_a_graph_is_captured(gpu):
    gpu(0, capturing=True)
    assert chunk_bytes(GPU) == MOST


def test_an_estimate_of_a_card_counts_the_smallest_chunk():
    assert chunk_bytes(torch.device("meta")) == LEAST


def test_a_chunk_holds_as_many_logits_as_its_bytes(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", {})
    monkeypatch.setattr(cross_entropy, "chunk_bytes", lambda device: 4000)
    sizes, plain = [], cross_entropy._product
    monkeypatch.setattr(cross_entropy, "_product", lambda h, *a: sizes.append(len(h)) or plain(h, *a))
    h, w = torch.zeros(25, 4, dtype=torch.bfloat16), torch.zeros(100, 4, dtype=torch.bfloat16)
    chunked_cross_entropy(h, w, torch.zeros(25, dtype=torch.long))
    assert sizes == [10, 10, 5], "in plain torch they are float32"


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantised_head_is_decoded_in_slices(dtype, kind, monkeypatch):
    """Losses and gradients are those of the decoded head, to the dtype's precision."""
    monkeypatch.setattr(codes, "SLICE", 128 * 64)
    torch.manual_seed(0)
    head = quantized(nn.Linear(64, 500).to(dtype).requires_grad_(False), kind)
    weight, targets = head.codes.new(), torch.randint(500, (30,))
    hidden = torch.randn(30, 64).to(dtype).requires_grad_()
    assert len(head.codes.slices()) == 4
    losses, found = [], []
    for one, bias in ((head.codes, head.bias), (weight, head.bias), (weight.double(), head.bias.double())):
        h = hidden.double() if one.dtype == torch.float64 else hidden
        loss = chunked_cross_entropy(h, one, targets, bias, multiplier=0.7, cap=5.0)
        losses.append(loss.detach())
        found.append(torch.autograd.grad(loss, hidden)[0])
    assert_no_worse(losses[0].view(1), losses[1].view(1), losses[2].view(1))
    assert_no_worse(found[0], found[1], found[2])
