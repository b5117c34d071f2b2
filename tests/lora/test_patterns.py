"""PEFT's patterns are matched as PEFT matches them, and none can hang."""

import re

import pytest
from peft.utils.other import get_pattern_key

from plopfast.lora.patterns import MOST_STEPS, matches
from plopfast.support.errors import AdapterError

NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in range(12)
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
] + ["lm_head", "odd-name.a+b", "q_proj"]


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj", "up_proj", "self_attn.q_proj", r"layers\.1\.self_attn\.q_proj", "layers.1.self_attn.q_proj", "proj", "",
        r".*layers\.[0-3]\..*_proj", r"(q|k)_proj", r"self_attn\.(?:q|k)_proj", r"\d+\.mlp\.up_proj", "^model.*q_proj$", "lm_head",
        "1.mlp.up_proj", ".", ".*", r"layers\.\d{2}\..*", "q_pro?j", "(model.)?layers.*", r"odd-name\.a\+b", "odd-name.a+b", "x|lm_head",
        r"[^l].*", r"model\.layers\.1[01]\.mlp\.up_proj", "[]]", r"[\]q]_proj", "mlp.*?up_proj", "mlp.up_proj|q_proj", r"\w+_proj",
    ],
)  # fmt: skip
def test_the_same_modules_as_in_peft(pattern):
    patterns = {"other": 1, pattern: 2, "up_proj": 3}
    found = matches(patterns, NAMES, "file: rank_pattern")
    for name in NAMES:
        theirs = patterns.get(get_pattern_key(patterns, name))
        assert (found[name][0] if found[name] else None) == theirs, name


def test_names_written_by_peft_and_plopfast():
    patterns = {re.escape(name): i for i, name in enumerate(NAMES)}
    found = matches(patterns, NAMES[:-1], "")
    assert [values[0] for values in found.values()] == list(range(len(NAMES) - 1))
    assert found["model.layers.0.self_attn.q_proj"] == [0, len(NAMES) - 1], "all that match, in their order"


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$", "(.*)*x", "(a|aa)+$", "(?:a*)*b", "(a*)*", "([a-z]+)*z", "(.*){1,9}x", "(x+x+)+y", ".*.*.*.*.*.*.*x", "a?" * 60 + "a" * 60,
        "(a|a)" * 40, "a." * 100_000, "[" * 200_000, "(" * 400 + ")" * 400, "(" * 30 + "a" + ")" * 30, r"(a)\1", "(?i)a", "(?=a+)b", "(?P<n>a)", "(?<!a)b",
        "(?#comment)a", "a{0,40}" * 9, "(.*a){20}", "[a-z]*" * 10, "(((a+)+)+)+", "(a?){30}a", ".+" * 20,
    ],
    ids=lambda p: p[:20],
)  # fmt: skip
def test_patterns_that_could_hang_are_refused(pattern):
    with pytest.raises(AdapterError, match=r"file: alpha_pattern: .*(too complex|too long).*write the modules' names"):
        matches({pattern: 1}, [f"model.layers.{i}." + "a" * 60 for i in range(300)], "file: alpha_pattern")


@pytest.mark.parametrize(
    "pattern", ["(", ")", "[", "*", "a)", "(a", "a**", "+", "?", r"\9", "a{99999999999}", "[z-a]", "(?", "(?:", "\\"]
)
def test_what_is_no_regular_expression(pattern):
    with pytest.raises(AdapterError, match="write the modules' names"):
        matches({pattern: 1}, NAMES, "file: alpha_pattern")


def test_a_huge_name_is_only_looked_up():
    assert matches({"a" * 10**6: 1}, NAMES, "")["q_proj"] == []


def test_many_harmless_patterns_are_bounded_together():
    many = {f"{i}.*": i for i in range(100_000)}
    with pytest.raises(AdapterError, match="too long to match"):
        matches(many, NAMES, "")
    assert MOST_STEPS == 10**9


def test_a_name_for_each_of_many_modules():
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(60) for j in range(64)]
    found = matches({re.escape(name): i for i, name in enumerate(names)}, names, "")
    assert list(found.values()) == [[i] for i in range(len(names))]
