"""Bars, pieces of work and lines between them, as stderr shows them."""

import subprocess
import sys
import time

import pytest

from plopfast.support.progress import Work, bar, say


def test_nothing_is_shown_unless_asked(capsys):
    with Work("trial", 2, show=False) as work, bar("train", 3, "steps", False) as meter:
        work.skip()
        with work.piece("one"):
            meter.update(3)
            meter.set_postfix_str("x")
    assert capsys.readouterr() == ("", "")


def test_pieces_are_counted_unless_they_raise(capsys):
    with Work("trial", 3, show=True) as work:
        work.skip()
        with work.piece("one"):
            pass
        with pytest.raises(ValueError), work.piece("two"):
            raise ValueError
    last = capsys.readouterr().err.rstrip().rpartition("\r")[2]
    assert "2/3" in last and "two" in last and last.startswith("trial")


def test_pieces_done_earlier_do_not_shorten_the_time_left():
    with Work("trial", 12, show=True) as work:
        for _ in range(10):
            work.skip()
        with work.piece("one"):
            time.sleep(0.2)
        facts = work._bar.format_dict
    assert (facts["n"], facts["initial"]) == (11, 10)
    assert (facts["n"] - facts["initial"]) / facts["elapsed"] < 6, "pieces a second"


def test_a_bar_within_another_one_goes_away(capsys):
    with bar("outer", 1, "pieces", True):
        with bar("inner", 1, "steps", True) as inner:
            inner.update()
        shown = capsys.readouterr().err
    assert "inner" in shown and "inner" not in shown.rpartition("\r")[2], "blanks are drawn over it"


def test_lines_do_not_tear_bars(capsys):
    with bar("train", 3, "steps", True):
        say("a line")
    err = capsys.readouterr().err
    assert "\ra line\n" in err.replace(" ", "").replace("aline", "a line"), repr(err)


def test_lines_without_tqdm():
    code = "import sys\nfrom plopfast.support.progress import say\nsay('a line')\nassert 'tqdm' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "a line\n"
