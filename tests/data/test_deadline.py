"""A chat template that would run for ever, or fill the memory, ends in one error."""

import copy
import signal
import threading

import pytest
from matrix import made

import plopfast as pf
from plopfast.data.deadline import Watch, check_template
from plopfast.support.errors import ModelError

ROWS = [("d.jsonl:1", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})]
SLOW = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
)


def with_template(source):
    tokenizer = copy.deepcopy(made("bytes"))
    tokenizer.chat_template = source
    return tokenizer


@pytest.mark.parametrize("before", ["", "{{ messages[1].content }}"], ids=["in any call", "where its error is caught"])
def test_a_template_without_end(before, monkeypatch):
    monkeypatch.setattr(Watch.__init__, "__defaults__", (0.3,))
    with pytest.raises(ModelError, match=r"the chat template took longer than 0.3 s for one row"):
        pf.tokenize(ROWS, with_template(before + SLOW))


@pytest.mark.parametrize(
    "source", ["{{ 'a' * 10**10 }}", "{{ 'a' * 10000000000 }}", "{{ 'a' * 0xFFFFFFFF }}", "{{ " + "9" * 5000 + " }}"]
)
def test_a_template_of_huge_numbers_is_not_run(source):
    with pytest.raises(ModelError, match=r"the chat template, line 1: .* can fill the memory"):
        pf.tokenize(ROWS, with_template(source))


def test_usual_numbers_and_broken_templates_pass_the_check():
    check_template("{{ '=' * 78 }} {{ 1_000_000 }} ** 99999999999 {% generation %}{% endgeneration %}", "t")
    check_template("{{ 'a }}", "t")


def test_the_alarm_of_another_program_stays():
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 100)
        with Watch("it", 0.01):
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 50
        signal.setitimer(signal.ITIMER_REAL, 0)
        with Watch("it"):
            assert signal.getitimer(signal.ITIMER_REAL)[1]
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and signal.getsignal(signal.SIGALRM) not in (before, None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_threads_have_no_alarm():
    ended = []
    thread = threading.Thread(target=lambda: ended.append(Watch("it").__enter__()))
    thread.start()
    thread.join()
    assert ended == [None] and signal.getitimer(signal.ITIMER_REAL)[0] == 0
