"""Conversations, notices, time limits and the edges of rows against plain accounts of them."""

import copy
import random
import signal
import types

import pytest
from tokenizers import processors

import plopfast as pf
from plopfast.data import deadline
from plopfast.data.conversation import conversation_of
from plopfast.data.deadline import LARGEST, Watch, check_template
from plopfast.data.encoding import Encoder
from plopfast.data.notices import Notices
from plopfast.support.errors import DataError, ModelError


def random_talk(rng, roles):
    """(messages as in a file, as a template takes them, whether each has the weight 0)"""
    given, plain, muted = [], [], []
    for role in roles:
        text, weight = rng.choice(("a", "b c", "")), rng.choice(("none", None, 0, 1, 1.0))
        parts = rng.choice((text, [{"type": "text", "text": text}, "x", {"text": "y"}]))
        message = {"role": role, "content": parts, "name": rng.choice((None, "n"))}
        given.append(message | ({} if weight == "none" else {"weight": weight}))
        plain.append({"role": role, "content": text if parts is text else f"{text}xy"})
        if message["name"]:
            plain[-1]["name"] = "n"
        muted.append(weight == 0)
    return given, plain, muted


def learnable(plain, muted, begin):
    return [
        message["role"] == "assistant" and number >= begin and not mute
        for number, (message, mute) in enumerate(zip(plain, muted, strict=True))
    ]


def test_which_messages_may_be_learned():
    """The assistant's, of a completion only its own, but none of weight 0; the row stays as it was."""
    rng = random.Random(0)
    for _ in range(200):
        roles = [rng.choice(("system", "user", "assistant", "tool")) for _ in range(rng.randint(1, 6))]
        given, plain, muted = random_talk(rng, roles)
        begin = rng.randint(0, len(roles))
        chat = {"prompt": given[:begin], "completion": given[begin:]}
        for kind, row, first in (("messages", {"messages": given}, 0), ("chat", chat, begin)):
            kept = copy.deepcopy(row)
            found = conversation_of("x:1", row, kind, Notices())
            assert (found.messages, found.muted) == (plain, muted) and row == kept
            assert found.may_learn == learnable(plain, muted, first)


def test_sharegpt_and_alpaca_as_messages():
    rng = random.Random(1)
    speakers = {
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "model": "assistant",
        "system": "system",
        "tool": "tool",
    }
    for _ in range(100):
        turns = [(rng.choice(sorted(speakers)), rng.choice("ab")) for _ in range(rng.randint(1, 5))]
        system = [{"role": "system", "content": "be"}] * rng.randint(0, 1)
        row = {"conversations": [{"from": who, "value": text} for who, text in turns]} | (
            {"system": "be"} if system else {}
        )
        found = conversation_of("x:1", row, "sharegpt", Notices())
        plain = system + [{"role": speakers[who], "content": text} for who, text in turns]
        assert found.messages == plain and found.may_learn == learnable(plain, [False] * len(plain), 0)
        history = [[f"q{i}", f"a{i}"] for i in range(rng.randint(0, 2))]
        more = rng.choice(("", "input"))
        row = {
            "instruction": "do",
            "output": "done",
            "input": more,
            "history": history,
            "system": "be" if system else "",
        }
        found = conversation_of("x:1", row, "alpaca", Notices())
        past = [{"role": r, "content": t} for turn in history for r, t in zip(("user", "assistant"), turn, strict=True)]
        asked = {"role": "user", "content": "do\n\ninput" if more else "do"}
        assert found.messages == [*system, *past, asked, {"role": "assistant", "content": "done"}]
        assert found.may_learn == [False] * (len(found.messages) - 1) + [True], "the output alone"


def test_every_call_of_a_turn_is_kept():
    calls = [{"name": f"f{i}", "arguments": '{"a": 1}' if i else {"b": 2}} for i in range(3)]
    for given in (calls, calls[:1]):
        message = {"role": "assistant", "tool_calls": given}
        (found,) = conversation_of("x:1", {"messages": [message]}, "messages", Notices()).messages
        assert found["tool_calls"] == [
            {"name": c["name"], "arguments": {"a": 1} if i else {"b": 2}} for i, c in enumerate(given)
        ]
    value = '[{"name": "f"}, {"name": "g"}]'
    row = {
        "conversations": [
            {"from": "function_call", "value": value},
            {"from": "function_call", "value": '{"name": "h"}'},
        ]
    }
    found = conversation_of("x:1", row, "sharegpt", Notices()).messages
    assert [[call["function"]["name"] for call in m["tool_calls"]] for m in found] == [["f", "g"], ["h"]]


def test_notices_are_counted_as_in_a_dict():
    rng = random.Random(2)
    for _ in range(50):
        told, said = set(), set()
        for _ in range(3):
            notices, plain = Notices(), {}
            for place in range(rng.randint(0, 9)):
                text = rng.choice("abc")
                notices.add(text, f"x:{place}", once=text == "a")
                plain.setdefault(text, []).append(f"x:{place}")
            shown = {text: places for text, places in plain.items() if text not in said}
            lines = notices.lines(told)
            assert len(lines) == len(shown)
            for line, (text, places) in zip(lines, shown.items(), strict=True):
                assert line.startswith(f"{len(places)} row") and f"(first: {places[0]})" in line and line.endswith(text)
            said |= {"a"} & plain.keys()
            assert told == said and len(notices.lines()) == len(plain)


def test_templates_may_count_to_a_million():
    for source in (f"{{{{ range({LARGEST}) }}}}", "{{ 1_000_000 * 2 }}", "{{ 0xF4240 }}", "a ** b 10000000"):
        check_template(source, "it")
    for source in (
        f"{{{{ range({LARGEST + 1}) }}}}",
        "{{ 1_000_001 }}",
        "{{ 0xF4241 }}",
        "{{ 2 ** 3 }}",
        "{% set a = 9 ** 9 %}",
    ):
        with pytest.raises(ModelError):
            check_template(source, "it")


def test_a_watch_leaves_the_timer_and_the_handler_as_they_were(monkeypatch):
    """Returning and raising; the time runs within a call alone."""
    clock = {"now": 100.0}
    monkeypatch.setattr(deadline, "time", types.SimpleNamespace(monotonic=lambda: clock["now"]))

    def spin(seconds):
        clock["now"] += seconds
        signal.raise_signal(signal.SIGALRM)  # as the timer does
        return seconds

    def ours(number, frame):
        raise AssertionError("the alarm of a watch that is over")

    before = signal.signal(signal.SIGALRM, ours)
    try:
        watch = Watch("it", seconds=2.0)
        for _ in range(2):
            with watch:
                assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 2.0, "it looks often enough"
                assert watch.timed(spin, 2.0) == 2.0
                spin(9.0)  # between calls
                with pytest.raises(ModelError):
                    watch.timed(spin, 2.1)
                spin(9.0)
            assert signal.getsignal(signal.SIGALRM) is ours and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, 100)
        with watch:  # somebody's alarm goes on, and nothing is watched
            assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
            assert watch.timed(lambda: 0.3) == 0.3
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def closed(tokenizer, single):
    tokenizer = copy.deepcopy(tokenizer)
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize(
    "single, front, back",
    [("$A", [], []), ("<s> $A", [1], []), ("$A </s>", [], [2]), ("<s> <s> $A </s> </s>", [1, 1], [2, 2])],
)
def test_what_a_tokenizer_puts_around_texts(tokenizer, single, front, back):
    tokenizer = closed(tokenizer, single)
    encoder = Encoder(tokenizer)
    assert (encoder.front, encoder.back, encoder.end) == (front, back, back or [2])
    texts = ["a", "bc", "a", "", "bc", "a d"]
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert encoder.encode(texts) == plain == encoder.encode_inside(texts) and encoder.encode([]) == []
    assert encoder.keeps(" a  bc", plain[0] + plain[1]) and not encoder.keeps("abd", plain[0] + plain[1])
    row = [("x:1", {"prompt": "ab", "completion": " cd"})]
    ((whole,), (every,)) = pf.tokenize(row, tokenizer), pf.tokenize(row, tokenizer, learn="all")
    prompt, completion = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ab", " cd"))
    assert list(whole.tokens) == list(every.tokens) == front + prompt + completion + (back or [2])
    begin = len(front) + len(prompt)
    assert whole.learned == ((begin, len(whole.tokens)),) and whole.answer == (begin, begin + len(completion))
    assert every.learned == ((max(1, len(front)), len(every.tokens)),)


def test_a_row_has_two_tokens_at_least(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    for text, tokens in (("", 0), ("a", 1), ("a b c", None)):
        row = [("x:1", {"text": text})]
        if tokens is None:
            assert pf.tokenize(row, tokenizer, notices=Notices())[0].label_tokens >= 1
        else:
            assert len(tokenizer(text)["input_ids"]) == tokens
            with pytest.raises(DataError):
                pf.tokenize(row, tokenizer, notices=Notices())
