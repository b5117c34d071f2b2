"""Text is readable in both colour modes, and what colour says is also said by lightness, form or words."""

import re
from pathlib import Path

import pytest

import plopfast.report

STYLE = (Path(plopfast.report.__file__).parent / "style.css.j2").read_text()
ON_PAPER = ("ink", "soft", "on", "off", "axis", "warn")
PAIRS = [  # text, what is behind it
    *((text, "paper") for text in ON_PAPER), ("ink", "panel"), ("soft", "panel"), ("ink", "tint"), ("soft", "tint"), ("axis", "panel"),
    ("onink", "on"), ("paper", "ink"), ("ink", "s1"), ("ink", "s3"), ("warn", "warnbg"), ("ink", "grid"),
]  # fmt: skip


def colours(mode: str) -> dict[str, tuple[float, ...]]:
    light, dark = (block for block in re.findall(r":root\{([^}]*)\}", STYLE))
    text = light if mode == "light" else dark
    return {name: linear(value) for name, value in re.findall(r"--(\w+):(#\w+)", text)}


def linear(value: str) -> tuple[float, ...]:
    digits = value[1:] if len(value) == 7 else "".join(2 * digit for digit in value[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    return tuple(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)


def luminance(colour: tuple[float, ...]) -> float:
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), colour, strict=True))


def contrast(one, other) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize(("text", "behind"), PAIRS)
def test_text_stands_out(mode, text, behind):
    found = colours(mode)
    assert contrast(found[text], found[behind]) >= 4.5


@pytest.mark.parametrize(("mode", "text"), [("light", "#0c1116"), ("dark", "#fff")])
def test_the_numbers_of_many_mistakes_stand_out(mode, text):
    assert f"color:{text}" in STYLE and contrast(linear(text), colours(mode)["mid"]) >= 4.5


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_heat_map_reads_in_black_and_white(mode):
    found = colours(mode)
    shades = [luminance(found[f"h{at}"]) for at in range(7)]
    assert shades == sorted(shades, reverse=mode == "dark")
    steps = [contrast(found[f"h{at}"], found[f"h{at + 1}"]) for at in range(6)]
    assert min(steps) > 1.15 and contrast(found["h0"], found["h6"]) > 8


def test_marks_differ_by_form():
    for rule in (
        ".dot{stroke:var(--off);stroke-width:2;fill:var(--paper)}",
        ".ref{stroke:var(--axis);stroke-width:1.25;stroke-dasharray",
    ):
        assert rule in STYLE, "open dots, dashed references"


def test_the_reader_chooses_and_print_is_light():
    assert "@media screen and (prefers-color-scheme:dark){:root{" in STYLE, "paper is not dark"
    small = (Path(plopfast.report.__file__).parent / "style_small.css.j2").read_text()
    assert "details::details-content{content-visibility:visible" in small and "nav{display:none}" in small
