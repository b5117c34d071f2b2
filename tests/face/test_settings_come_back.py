"""Settings that are written come back: each one by itself, with values at its ends too, and many together."""

import dataclasses
import math
import random
from types import UnionType
from typing import get_args, get_origin

import pytest

from plopfast.support import files
from plopfast.support.config import RunConfig, TrainConfig
from plopfast.support.errors import ConfigError
from plopfast.support.settings_file import load_settings

WORDS = ("a", "ß", "two words", "日本", "dash-", 'a "quoted" one', "back\\slash", "x" * 50)


def value_for(item, draw):
    """A value that an option allows, at random."""
    kinds = get_args(item.type) if isinstance(item.type, UnionType) or get_origin(item.type) else (item.type,)
    kind, rules = draw.choice(kinds), item.metadata
    if kind is type(None):
        return None
    if rules["choices"]:
        return draw.choice(rules["choices"])
    if kind is bool:
        return draw.random() < 0.5
    if kind is int:
        return draw.randint(1, int(min(rules["below"], 2**63)) - 1)
    if kind is float:
        values = [
            draw.uniform(1e-12, min(1.0, rules["below"])),
            10 ** draw.uniform(-30, math.log10(rules["below"]) - 1),
        ]
        return draw.choice([*values, *([] if rules["positive"] else [0.0])])
    text = lambda: draw.choice(WORDS)  # noqa: E731
    return text() if kind is str else tuple(text() for _ in range(draw.randint(2, 4)))


ALSO = {  # what an option needs beside it
    "ranks": {"budget": "2M"},
    "granularity": {"budget": "2M"},
    "cap": {"budget": "2M", "granularity": "module"},
    "unlabeled_share": {"unlabeled": "text.txt"},
    "quantize_head": {"quantize": "nf4"},
    "resident_share": {"stream": True},
}


def also_of(name, group):
    known = {item.name for item in dataclasses.fields(group)}
    return {other: value for other, value in ALSO.get(name, {}).items() if other in known}


def comes_back(config, folder):
    files.write_json(folder / "config.json", {"settings": dataclasses.asdict(config)})
    again = type(config)(**load_settings(folder / "config.json"))
    return again == config and repr(again) == repr(config)


GROUPS = pytest.mark.parametrize("group", [RunConfig, TrainConfig], ids=lambda group: group.__name__)


@GROUPS
def test_each_setting(group, tmp_path):
    draw = random.Random(0)
    for item in dataclasses.fields(group):
        also = also_of(item.name, group)
        for _ in range(6):
            config = group(**{**also, item.name: value_for(item, draw)})
            assert comes_back(config, tmp_path), item.name


@GROUPS
def test_settings_together(group, tmp_path):
    draw, made, refused = random.Random(0), 0, 0
    while made < 60:
        some = [item for item in dataclasses.fields(group) if draw.random() < 0.2]
        values = {item.name: value_for(item, draw) for item in some}
        values = {**{name: value for key in values for name, value in also_of(key, group).items()}, **values}
        try:
            config = group(**values)
        except ConfigError:  # some contradict each other
            refused += 1
            assert refused < 120
            continue
        made += 1
        assert comes_back(config, tmp_path)
