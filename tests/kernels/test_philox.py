"""The dropout mask: right generator, right rate, a function of position alone."""

import pytest
import torch

from plopfast.kernels import philox

# known answers of the Random123 library (Salmon et al. 2011), kat_vectors
KNOWN = [
    (7, 0x00000000, 0x00000000, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, 0xFFFFFFFF, 0xFFFFFFFF, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (10, 0x00000000, 0x00000000, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, 0xFFFFFFFF, 0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "want"), KNOWN)
def test_known_answers(rounds, counter, key, want):
    word = torch.tensor([counter])
    got = philox.philox4x32((word, word, word, word), (key, key), rounds)
    assert tuple(int(w) for w in got) == want


def test_mask_depends_on_position_alone():
    whole = philox.keep_mask(7, 37, 53, 0.3)
    assert torch.equal(philox.keep_mask(7, 11, 53, 0.3), whole[:11])
    assert torch.equal(philox.keep_mask(7, 37, 16, 0.3), whole[:, :16])
    assert not torch.equal(philox.keep_mask(8, 37, 53, 0.3), whole)
    assert not torch.equal(philox.keep_mask(7 + (1 << 40), 37, 53, 0.3), whole), "the seed's high word counts"


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9])
def test_rate(p):
    mask = philox.keep_mask(3, 2000, 1000, p)
    n = mask.numel()
    assert abs(mask.float().mean().item() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5 + 1e-9 + 2**-17
    assert mask.float().mean(0).std() < 0.03 and mask.float().mean(1).std() < 0.04, "no row or column is special"


def test_scale_makes_the_expectation_exact():
    for p in (0.1, 1 / 3, 0.7):
        assert (1 - philox.threshold(p) / 2**16) * philox.inverse_keep(p) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7)])
def test_odd_shapes(shape):
    assert philox.keep_mask(1, *shape, 0.5).shape == shape
