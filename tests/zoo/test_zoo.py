"""A dozen families of models, tried end to end; `python tests/zoo` tries all of them."""

import families
import pytest
import steps
import transformers

FAMILIES = [
    "llama", "gpt2", "qwen3", "gemma3_text", "phi3", "gpt_neox", "qwen3_next", "deepseek_v3", "mamba", "bamba", "zamba", "opt",
]  # fmt: skip
RESUMED = {"llama", "mamba"}  # it takes as long as all other steps


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    tried = [step for step in steps.STEPS if step != "resume" or family in RESUMED]
    found = steps.run(family, tried)
    assert found["steps"] == dict.fromkeys(tried, "ok")
    assert found["facts"]["weights"] < 1e6 and found["facts"].get("score_off", 0) < steps.TOLERANCE


@pytest.mark.slow
def test_every_family_has_a_configuration():
    """Also those of later versions: what cannot be built is listed with its reason, or this fails."""
    failing = {}
    for family in families.names().keys() - families.CANNOT.keys():
        try:
            families.config_of(family)
        except Exception as error:
            failing[family] = str(error)[:200]
    assert not failing, f"transformers {transformers.__version__}"
    assert families.CANNOT.keys() <= families.names().keys()
