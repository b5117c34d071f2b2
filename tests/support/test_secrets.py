"""Secrets do not reach what is written down."""

import shlex

import pytest

from plopfast.support.secrets import masked


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("run --hf-token abc --rank 8", "run --hf-token *** --rank 8"),
        ("run --api_key=abc", "run --api_key=***"),
        ("run --key=a=b", "run --key=***"),
        ("run --secret -abc", "run --secret ***"),  # a value may begin with a dash
        ("run --Password PW --token-file f", "run --Password *** --token-file ***"),
        ("run --token --rank 8", "run --token --rank 8"),  # no value was given
        ("run --token", "run --token"),
        ("run --batch-tokens 64 --score-tokens all", "run --batch-tokens 64 --score-tokens all"),
        ("run --keyword a --monkey b", "run --keyword a --monkey b"),
        ("run --train https://me:pw@host/a", "run --train https://***@host/a"),
        ("run --train https://token@host/a", "run --train https://***@host/a"),
        ("run --train=https://me:p@w@host/a@b", "run --train=https://***@host/a@b"),
        ("run --train https://h/a?x=1&access_token=abc#part", "run --train https://h/a?x=1&access_token=***#part"),
        ("run --train https://h/a?tokens=3", "run --train https://h/a?tokens=3"),
        ("env HF_TOKEN=abc plopfast run", "env HF_TOKEN=*** plopfast run"),
        ("run --columns prompt=question", "run --columns prompt=question"),
        ("run --train me@host", "run --train me@host"),
    ],
)
def test_masked(words, shown):
    assert masked(words.split()) == shlex.join(shown.split())


def test_the_line_can_be_pasted():
    argv = ["plopfast", "run", "--out", "a b", "--train", "it's.jsonl", ""]
    assert shlex.split(masked(argv)) == argv
