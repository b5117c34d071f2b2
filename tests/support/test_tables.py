"""The one table: what it shows on the terminal, what it writes, and bad rows."""

import csv

import pytest

from plopfast.support.tables import DIFFERS, Column, Table

LOSSES = Table(
    "Losses",
    [Column("arm"), Column("loss", ".2f"), Column("chosen")],
    [("plop", 0.12345, True), ("all", None, False), ("mlp", f"{DIFFERS}12.00", False)],
    "Nats per token.",
)


def test_the_terminal_shows_aligned_text():
    assert str(LOSSES).splitlines() == [
        "Losses",
        "arm      loss  chosen",
        "plop     0.12  yes",
        "all         -  no",
        "mlp   * 12.00  no",
        "Nats per token.",
    ]


def test_a_list_without_headings_has_no_head_line():
    assert str(Table("", [Column(""), Column("")], [("loss", "1.0"), ("accuracy", "0.5")])).splitlines() == [
        "loss      1.0",
        "accuracy  0.5",
    ]


def test_no_rows_leave_the_headings():
    assert str(Table("", [Column("arm"), Column("loss", ".2f")], [])) == "arm  loss"


def test_csv_keeps_full_precision(tmp_path):
    LOSSES.write_csv(tmp_path / "losses.csv")
    with (tmp_path / "losses.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["arm", "loss", "chosen"]
    assert rows[1] == ["plop", "0.12345", "True"] and rows[2] == ["all", "", "False"]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="argument"):
        list(Table("", [Column("arm"), Column("loss")], [("plop",)]).cells())


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t", "\r"])
def test_no_csv_cell_is_a_formula(tmp_path, begin):
    """A spreadsheet shows texts as they are; numbers stay numbers."""
    table = Table("", [Column(f"{begin}1"), Column("loss", ".2f")], [(f"{begin}cmd|x", -1.5), ("a=b", -2)])
    table.write_csv(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [[f"'{begin}1", "loss"], [f"'{begin}cmd|x", "-1.5"], ["a=b", "-2"]]
