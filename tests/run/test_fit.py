"""--fit: which options are taken, in which order, and what is said of them. A model of plain numbers stands for the count."""

import dataclasses

import pytest
import torch

from plopfast.run import fit as fitting
from plopfast.run.fit import LADDER, Rung, fit, limit_of
from plopfast.support.config import RunConfig
from plopfast.support.errors import ConfigError, ModelError
from plopfast.training.dry import Estimate

WEIGHTS, KEPT, HEAD, WIDE = 1000.0, 600.0, 200.0, 100.0  # MiB


@dataclasses.dataclass
class Counted:
    """What shapes ask for: sums of the settings. `seen` are the settings that were counted, with the layers."""

    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("meta"))
    layers: int = 4
    refuses: str = ""
    wrong: float = 0.0  # how much more the whole model takes than its few layers say
    seen: list = dataclasses.field(default_factory=list)

    def count(self, config, layers=None):
        self.seen.append((config, layers))
        if self.refuses and getattr(config, self.refuses):
            raise ModelError("not this model")
        parts = {
            "linear weights": WEIGHTS
            * {None: 1, "nf4": 0.25}.get(config.quantize, 0.5)
            * (0.1 if config.stream else 1),
            "kept": KEPT * (0.2 if config.checkpointing else 1),
            "head": HEAD * (0.25 if config.quantize_head else 1),
            "wide": WIDE * (0.5 if config.mlp_rows else 1),
        }
        total, share = sum(parts.values()), (layers or self.layers) / self.layers
        flops = 10.0 * (4 / 3 if config.checkpointing else 1) * share
        crossed = WEIGHTS if config.stream else 0.0
        total = total * share + (self.wrong if layers is None else 0)
        return Estimate("", [], 1, 0, 0, 0, 0, total, flops, parts, 0.0, crossed)


def words(fitted, config=None):
    plain = dataclasses.asdict(config or RunConfig())
    return {name: value for name, value in dataclasses.asdict(fitted.config).items() if value != plain[name]}


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        ("1900MiB", {}),
        ("1420MiB", {"checkpointing": True}),
        ("680MiB", {"checkpointing": True, "quantize": "nf4"}),
        ("630MiB", {"checkpointing": True, "quantize": "nf4", "mlp_rows": 512}),
        ("480MiB", {"checkpointing": True, "quantize": "nf4", "mlp_rows": 512, "quantize_head": True}),
        ("260MiB", {"checkpointing": True, "quantize": "nf4", "mlp_rows": 512, "quantize_head": True, "stream": True, "resident_share": 0.5}),
    ],
)  # fmt: skip
def test_the_cheapest_options_that_fit(budget, chosen):
    counted = Counted()
    found = fit(counted, RunConfig(), budget)
    assert words(found) == chosen
    assert found.estimate.total_mib <= limit_of(budget)
    assert found.estimate == counted.count(found.config), "the whole model was counted"


def test_what_turns_out_not_to_be_needed_is_left_out():
    """Streaming makes room for what came before it; the weights stay as they are where that is enough."""
    assert words(fit(Counted(), RunConfig(quantize="int8"), "300MiB"), RunConfig(quantize="int8")) == {
        "checkpointing": True, "stream": True, "resident_share": 0.5, "quantize_head": True, "mlp_rows": 512,
    }  # fmt: skip
    found = fit(Counted(), RunConfig(), "520MiB")
    assert words(found) == {"checkpointing": True, "quantize": "nf4", "quantize_head": True}, "not --mlp-rows"


def test_what_the_user_chose_stays():
    """Not another kind of codes, nor other tiles."""
    given = RunConfig(quantize="fp8", mlp_rows=64)
    assert words(fit(Counted(), given, "760MiB"), given) == {"checkpointing": True, "quantize_head": True}
    full = RunConfig(full=True)
    with pytest.raises(ConfigError, match=r"The least is 1\.34 GiB, with --checkpointing --mlp-rows 512"):
        fit(Counted(), full, "1300MiB")


def test_an_option_that_a_model_refuses_is_skipped():
    found = fit(Counted(refuses="checkpointing"), RunConfig(), "1200MiB")
    assert words(found) == {"quantize": "nf4"}


def test_options_that_save_nothing_are_not_taken():
    ladder = (Rung("--packing", {"packing": True}), *LADDER)
    assert "packing" not in words(fit(Counted(), RunConfig(), "680MiB", ladder))


def test_a_card_has_options_that_the_cpu_has_not():
    def ladder_of(device):
        counted = Counted(torch.device(device))
        with pytest.raises(ConfigError, match="nothing that plopfast can choose"):
            fit(counted, RunConfig(), "1MiB")
        return {config.embedding for config, _ in counted.seen}

    assert ladder_of("meta") == {"device", "cpu"} and ladder_of("cpu") == {"device"}


def test_few_layers_stand_for_many_while_it_chooses():
    """And the whole model decides: where it takes more, the next option is taken, too."""
    counted = Counted(layers=40)
    found = fit(counted, RunConfig(), "680MiB")
    assert words(found) == {"checkpointing": True, "quantize": "nf4"}
    assert {layers for _, layers in counted.seen} == {fitting.FEW, fitting.MORE, None}
    assert sum(layers is None for _, layers in counted.seen) == 1
    more = fit(Counted(layers=40, wrong=45.0), RunConfig(), "680MiB")
    assert words(more) == {"checkpointing": True, "quantize": "nf4", "mlp_rows": 512}


def test_what_is_said():
    said = fit(Counted(), RunConfig(), "260MiB").lines
    assert said[0] == (
        "fit 260MiB: --checkpointing --quantize nf4 --mlp-rows 512 --quantize-head --stream --resident-share 0.5: 0.24 GiB"
    )
    assert "  --checkpointing: 0.47 GiB less; 33% more FLOPs" in said
    assert any(line.startswith("  --stream") and "0.98 GiB a step between CPU and GPU" in line for line in said)
    assert said[-1].endswith("--quantize nf4 and --quantize-head changes the results: chosen by --fit, not by you")
    assert fit(Counted(), RunConfig(), "2GiB").lines == ["fit 2GiB: 1.86 GiB, as the settings are"]


def test_the_least_that_would_fit_is_named():
    with pytest.raises(
        ConfigError, match=r"The least is 0\.24 GiB, with --checkpointing.*its largest part: kept, 0\.12 GiB"
    ):
        fit(Counted(), RunConfig(), "1MiB")


@pytest.mark.parametrize("text", ["6", "6M", "GB", "-1GB", "0GB", "6 TB", "6GBs", "nan", "1e3MB", "٣GB"])
def test_nonsense(text):
    with pytest.raises(ConfigError, match="fit: expected a size of memory such as 6GB"):
        fit(Counted(), RunConfig(), text)


def test_sizes():
    assert [limit_of(text) for text in ("1GiB", "4.5GiB", " 512 MiB", "1048576B")] == [1024, 4608, 512, 1]
    assert limit_of("6GB") == pytest.approx(6e9 / 2**20) and limit_of("512kB") == pytest.approx(512e3 / 2**20)
