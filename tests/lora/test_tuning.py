"""The tuning table: stored, merged, put in force, and left alone where it is of another version or damaged."""

import json

import pytest
import torch

from plopfast.kernels import dispatch
from plopfast.kernels.dispatch import Target, Tiles
from plopfast.lora import tuning
from plopfast.support.errors import FileError

GPU, OTHER = Target("sm_90", 132, "Test GPU"), Target("gfx942", 304, "AMD Instinct MI300X")
SHAPE = (8192, 4096, 4096, 16)  # M, N, K, R
TILES = Tiles(128, 128, 64, 8, 3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLOPFAST_CACHE", str(tmp_path))
    yield tmp_path
    dispatch.use_table({})


def rows(target, strategy="fused"):
    key = dispatch.key(target, torch.bfloat16, *SHAPE)
    return {key: tuning.row(strategy, TILES, {"lora-first": 0.80, f"fused {TILES}": 0.75}, "2026-11-20")}


def path_of(m, rank=16, backend="auto"):
    return dispatch.plan(torch.device("meta"), torch.bfloat16, m, *SHAPE[1:3], rank, backend)


@pytest.mark.parametrize("strategy", dispatch.STRATEGIES)
def test_a_stored_row_decides_the_path(monkeypatch, strategy):
    monkeypatch.setattr(dispatch, "_driver_target", lambda: GPU)
    before = path_of(8192)
    assert before.backend == "torch" and "not measured" in before.why
    tuning.save(rows(GPU, strategy))
    assert tuning.load() == ""
    for m, rank in ((8192, 16), (5000, 9)):  # one bucket
        plan = path_of(m, rank)
        assert (plan.strategy, plan.tiles, plan.why) == (strategy, TILES, "measured on this GPU")
    assert path_of(8192, backend="fused").tiles == TILES
    assert path_of(2500).why == plan.why and path_of(300).why != plan.why, (
        "for as many tokens, four times more or fewer"
    )
    assert "not measured" in path_of(8192, 17).why


def test_file_is_plain_json_with_a_version_key(cache):
    assert tuning.save(rows(GPU)) == cache / "tune.json" == tuning.table_path()
    table = json.loads((cache / "tune.json").read_text())
    assert table["plopfast"] == "tuning"
    assert table["version"] == {
        "kernels": dispatch.VERSION,
        "torch": torch.__version__,
        "triton": tuning.version()["triton"],
    }
    assert table["rows"] == rows(GPU)
    assert [p.name for p in cache.iterdir()] == ["tune.json"], "no scratch folder is left"


def test_rows_of_other_gpus_are_kept_and_own_ones_replaced():
    tuning.save(rows(GPU))
    tuning.save(rows(OTHER))
    tuning.save(rows(GPU, "lora-first"))
    tuning.load()
    assert {key.split(" bf")[0]: strategy for key, (strategy, _) in dispatch.TABLE.items()} == {
        "Test GPU": "lora-first",
        "AMD Instinct MI300X": "fused",
    }
    line = tuning.describe()
    assert "2 rows" in line and "AMD Instinct MI300X, Test GPU" in line and "\n" not in line


def test_no_file(cache):
    dispatch.use_table({"left": ("fused", TILES)})
    assert tuning.load() == "" and not dispatch.TABLE
    assert "not measured" in tuning.describe() and "bench --tune" in tuning.describe()


@pytest.mark.parametrize("part", ["kernels", "torch", "triton"])
def test_rows_of_another_version_are_not_used(monkeypatch, part):
    path = tuning.save(rows(GPU))
    now = tuning.version()
    monkeypatch.setattr(tuning, "version", lambda: {**now, part: "next"})
    note = tuning.load()
    assert not dispatch.TABLE and "\n" not in note
    assert f"{part} {now[part]}" in note and f"{part} next" in note and "run plopfast bench --tune again" in note
    assert note in tuning.describe()
    tuning.save(rows(OTHER))
    assert json.loads(path.read_text())["rows"].keys() == rows(OTHER).keys()


def spoil(change):
    def text():
        table = {"plopfast": "tuning", "version": tuning.version(), "rows": rows(GPU)}
        change(table, next(iter(table["rows"].values())))
        return json.dumps(table)

    return text


DAMAGE = {
    "cut off": lambda: spoil(lambda table, row: None)()[:-20],
    "binary": lambda: b"\xff\xfe\x00",
    "a list": lambda: "[]",
    "another file": spoil(lambda table, row: table.pop("plopfast")),
    "no rows": spoil(lambda table, row: table.update(rows=[])),
    "row": spoil(lambda table, row: table["rows"].update(x=3)),
    "strategy": spoil(lambda table, row: row.update(strategy="fastest")),
    "tiles": spoil(lambda table, row: row.update(tiles=[1, 2])),
    "tile missing": spoil(lambda table, row: row["tiles"].pop("bm")),
    "tile of another kind": spoil(lambda table, row: row["tiles"].update(bm="128")),
    "tile that Triton cannot take": spoil(lambda table, row: row["tiles"].update(bk=48)),
    "too large a tile": spoil(lambda table, row: row["tiles"].update(bn=1 << 20)),
    "descriptor": spoil(lambda table, row: row["tiles"].update(descriptor=1)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file(cache, damage):
    content = DAMAGE[damage]()
    path = cache / "tune.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileError, match=r"tune\.json(.|\n)*run plopfast bench --tune again"):
        tuning.load()
    assert str(path) in tuning.describe()
    tuning.save(rows(GPU))  # what the message asks for
    assert tuning.load() == "" and len(dispatch.TABLE) == 1


def test_a_path_of_ones_own(tmp_path):
    path = tmp_path / "folder" / "mine.json"
    tuning.save(rows(GPU), path)
    assert not tuning.table_path().exists()
    assert tuning.load(path) == "" and dispatch.TABLE


def test_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLOPFAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(FileError, match="PLOPFAST_CACHE"):
        tuning.save(rows(GPU))


def test_the_versions_are_those_installed():
    triton = pytest.importorskip("triton")
    assert tuning.version() == {"kernels": dispatch.VERSION, "torch": torch.__version__, "triton": triton.__version__}
