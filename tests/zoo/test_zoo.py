"""A dozen families of models, tried end to end; `python tests/zoo` tries all of them."""

import families
import pytest
import steps
import transformers

FAMILIES = (
    "llama gpt2 qwen3 gemma3_text phi3 gpt_neox qwen3_next deepseek_v3 mamba bamba bloom opt"  # and what KNOWN names
).split()
# family -> step -> how it begins, and why. An entry that is no longer true fails: take it out.
KNOWN = {
    "deepseek_v3": {"peft": "WRONG: the logits in PEFT are"},
    "mamba": {"peft": "WRONG: PEFT raises ValueError: [PEFT:PeftType.LORA] Module 'out_proj' is incompatible"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    found = steps.run(family)
    known = KNOWN.get(family, {})
    assert set(found["steps"]) == set(steps.STEPS)
    for step, said in found["steps"].items():
        expected = known.get(step, "ok")
        assert said.startswith(expected), f"{step}: {said}" + ("; take it out of KNOWN" if said == "ok" else "")
    assert found["facts"]["weights"] < 1e6 and found["facts"].get("score_off", 0) < steps.TOLERANCE


def test_every_family_has_a_configuration():
    """Also those of later versions: what cannot be built is listed with its reason, or this fails."""
    failing = {}
    for family in families.names().keys() - families.CANNOT.keys():
        try:
            families.config_of(family)
        except Exception as error:
            failing[family] = str(error)[:200]
    assert not failing, f"transformers {transformers.__version__}"
    assert families.CANNOT.keys() <= families.names().keys() and KNOWN.keys() <= set(FAMILIES)
