"""What plopfast wrote in a folder is its own; nothing else is replaced or deleted."""

import json
import os

import pytest

from plopfast.support import files, previous
from plopfast.support.errors import FileError
from plopfast.support.ledger import HISTORY, Ledger
from plopfast.support.previous import PREVIOUS, Previous

DONE = {"command": "plopfast run", "seconds": 1.5, "peak_mib": 2.5}


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "run")


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_only_claimed_files_are_removed(ledger):
    ledger.claim({"a.json": (), "steps": ("step-*.bin",)})
    fill(ledger.folder, "a.json", "steps/step-1.bin", "b.json")
    ledger.remove(["a.json", "steps", "absent"])
    assert sorted(path.name for path in ledger.folder.iterdir()) == ["b.json", HISTORY]
    with pytest.raises(FileError, match="b.json: in the way, and history.jsonl does not say that plopfast wrote it"):
        ledger.remove(["b.json"])


@pytest.mark.parametrize(
    "foreign",
    ["file inside", "file in a folder inside", "link inside", "link", "folder for a file", "file for a folder", "pipe"],
)
def test_nothing_is_removed_where_one_thing_is_foreign(ledger, tmp_path, foreign):
    ledger.claim({"a.json": (), "steps": ("step-*.bin",)})
    fill(ledger.folder, "a.json", "steps/step-1.bin")
    fill(tmp_path / "own", "years of work")
    if foreign == "file inside":
        fill(ledger.folder, "steps/notes.txt")
    elif foreign == "file in a folder inside":
        fill(ledger.folder, "steps/deep/er/notes.txt")
    elif foreign == "link inside":
        (ledger.folder / "steps" / "step-2.bin").symlink_to(tmp_path / "own")
    elif foreign == "link":
        (ledger.folder / "steps" / "step-1.bin").unlink()
        (ledger.folder / "steps").rmdir()
        (ledger.folder / "steps").symlink_to(tmp_path / "own")
    elif foreign == "pipe":
        (ledger.folder / "a.json").unlink()
        os.mkfifo(ledger.folder / "a.json")
    elif foreign == "folder for a file":
        (ledger.folder / "a.json").unlink()
        fill(ledger.folder, "a.json/notes.txt")
    else:
        (ledger.folder / "steps" / "step-1.bin").unlink()
        (ledger.folder / "steps").rmdir()
        fill(ledger.folder, "steps")
    before = sorted(ledger.folder.rglob("*"))
    for act in (ledger.remove, ledger.check, lambda names: ledger.claim(dict.fromkeys(names, ()))):
        with pytest.raises(FileError, match="in the way"):
            act(["a.json", "steps"])
    with pytest.raises(FileError, match="in the way"):
        Previous(ledger).set_aside("train", {"train": ["a.json", "steps"]})
    assert sorted(ledger.folder.rglob("*")) == before and (tmp_path / "own" / "years of work").exists()


def test_clearing_leaves_what_is_foreign(ledger):
    ledger.claim({"steps": ("step-*.bin", ".step-*/*")})
    fill(ledger.folder, "steps/step-1.bin", "steps/.step-2.x/step-2.bin", "steps/notes.txt")
    ledger.clear("steps")
    assert sorted(path.name for path in ledger.folder.rglob("*")) == sorted([HISTORY, "steps", "notes.txt"])
    (ledger.folder / "steps" / "notes.txt").unlink()
    ledger.clear("steps")
    assert not (ledger.folder / "steps").exists()


def test_a_line_that_a_kill_cut_short_is_left_out(ledger):
    ledger.add("begin", stage="score")
    with ledger.path.open("a") as file:
        file.write('{"plopfast": "history", "ev')
    ledger.add("done", stage="score", **DONE)
    assert [event["event"] for event in ledger.events()] == ["begin", "done"]


def test_odd_line_breaks_in_a_text_end_no_line(ledger):
    ledger.add("begin", stage="score", command="a\u2028b\x85c\r\nd")
    assert [event["command"] for event in ledger.events()] == ["a\u2028b\x85c\r\nd"]


@pytest.mark.parametrize("written", ["", '{"plopf', '{"plopfast": "history", "ev'])
def test_a_first_line_that_a_full_disk_cut_short_is_left_out(ledger, written):
    ledger.folder.mkdir()
    ledger.path.write_text(written)
    ledger.claim({"a.json": ()}, stage="score", command="c")
    assert [event["event"] for event in ledger.events()] == ["begin"] and ledger.exists()


@pytest.mark.parametrize("text", ["[1]\n", "loss 1\n", '{"epoch": 1}\n', '{"plopfast": "config"}\n'])
def test_a_history_of_the_users_is_not_touched(ledger, text):
    ledger.folder.mkdir()
    ledger.path.write_text(text)
    with pytest.raises(FileError, match="not a history of plopfast"):
        ledger.claim({"a.json": ()})
    assert ledger.path.read_text() == text


@pytest.mark.parametrize(
    "change",
    [
        {"claims": {"../own": []}}, {"claims": {"a": "*"}}, {"claims": []}, {"event": 3}, {"event": "other"}, {"moved": [".."]},
        {"event": "done", "stage": "score", "command": "x", "seconds": -1, "peak_mib": 1}, {"event": "done"}, {"time": None},
    ],
)  # fmt: skip
def test_a_line_that_was_changed_is_refused(ledger, change):
    ledger.add("begin", stage="score")
    line = json.loads(ledger.path.read_text()) | change
    ledger.path.write_text(json.dumps(line) + "\n")
    with pytest.raises(FileError, match=r"history.jsonl, line 1: "):
        ledger.claims()


def states(ledger):
    return sorted(ledger.done())


def test_what_is_done(ledger):
    for stage in ("score", "place", "train"):
        ledger.claim({f"{stage}.json": ()}, stage=stage, command="c")
        ledger.add("done", stage=stage, **DONE)
    assert states(ledger) == ["place", "score", "train"] and ledger.done()["score"]["claims"] == {"score.json": []}
    ledger.add("begin", stage="place")
    assert states(ledger) == ["score", "train"]
    ledger.add("failed", stage="place")
    assert states(ledger) == ["place", "score", "train"], "its earlier result is as it was"
    fill(ledger.folder, "train.json")
    assert Previous(ledger).set_aside("train", {"train": ["train.json"]})
    assert (ledger.folder / PREVIOUS / "train.json").exists()
    ledger.add("begin", stage="train")
    assert states(ledger) == ["place", "score"]
    ledger.add("failed", stage="train")
    Previous(ledger).bring_back("train")
    assert states(ledger) == ["place", "score", "train"] and (ledger.folder / "train.json").exists()
    assert not (ledger.folder / PREVIOUS).exists()


def test_earlier_results_wait_until_the_new_ones_are_complete(ledger):
    ledger.claim({"a.json": (), "steps": ("*.bin",)})
    fill(ledger.folder, "a.json", "steps/1.bin", "config.json")
    names = {"train": ["a.json", "steps"]}
    assert Previous(ledger).set_aside("train", names, copied=["config.json"]) and Previous(ledger).waiting() == "train"
    old = sorted(
        path.relative_to(ledger.folder / PREVIOUS).as_posix() for path in (ledger.folder / PREVIOUS).rglob("*")
    )
    assert old == ["a.json", "config.json", "steps", "steps/1.bin"] and (ledger.folder / "config.json").exists()
    fill(ledger.folder, "steps/2.bin")  # a work that was stopped, and is begun anew
    ledger.claim({"b.json": ()})
    fill(ledger.folder, "b.json")
    Previous(ledger).set_aside("train", {"train": ["a.json", "steps", "b.json"]})
    assert (ledger.folder / PREVIOUS / "b.json").exists() and not (ledger.folder / "b.json").exists(), "it was complete"
    assert not (ledger.folder / "steps").exists() and (ledger.folder / PREVIOUS / "steps" / "1.bin").exists()
    Previous(ledger).complete("score")
    assert Previous(ledger).waiting() == "train", "another stage is no reason"
    fill(ledger.folder, PREVIOUS + "/notes.txt")
    Previous(ledger).complete("train")
    assert [path.name for path in (ledger.folder / PREVIOUS).iterdir()] == ["notes.txt"], "the user's"


def test_a_line_that_was_cut_within_a_character_is_left_out(ledger):
    ledger.add("begin", stage="score")
    with ledger.path.open("ab") as file:
        file.write('{"plopfast": "history", "command": "ä'.encode()[:-1])
    ledger.add("begin", stage="place")
    assert [event["stage"] for event in ledger.events()] == ["score", "place"]


def test_a_folder_called_previous_stays(ledger):
    ledger.claim({"a.json": ()})
    fill(ledger.folder, "a.json", PREVIOUS + "/notes.txt")
    with pytest.raises(FileError, match="previous: in the way"):
        Previous(ledger).set_aside("train", {"train": ["a.json"]})
    assert (ledger.folder / "a.json").exists()


@pytest.mark.parametrize("again", [False, True])
def test_a_move_that_was_interrupted_is_ended(ledger, again, monkeypatch):
    ledger.claim({"a.json": (), "b.json": ()})
    fill(ledger.folder, "a.json", "b.json")
    if again:
        assert Previous(ledger).set_aside("train", {"train": ["a.json"]})
        Previous(ledger).complete("train")
        fill(ledger.folder, "a.json")
    plain, moves = previous._move, []

    def killed(path, target):
        moves.append(path)
        if len(moves) == 2:
            raise KeyboardInterrupt
        plain(path, target)

    monkeypatch.setattr(previous, "_move", killed)
    with pytest.raises(KeyboardInterrupt):
        Previous(ledger).set_aside("train", {"train": ["a.json", "b.json"]})
    monkeypatch.setattr(previous, "_move", plain)
    Previous(ledger).tidy()
    assert sorted(path.name for path in (ledger.folder / PREVIOUS).iterdir()) == ["a.json", "b.json"]
    Previous(ledger).bring_back("train")
    assert (ledger.folder / "a.json").exists() and (ledger.folder / "b.json").exists()


def test_replacing_loses_nothing_of_others(tmp_path):
    fill(tmp_path, "adapter/weights", "adapter/notes.txt")
    with (
        pytest.raises(FileError, match="notes.txt: in a folder that is to be replaced"),
        files.replacing(tmp_path / "adapter") as new,
    ):
        fill(new, "weights")
    assert (tmp_path / "adapter" / "weights").read_text() == "adapter/weights" and not list(tmp_path.glob(".*"))
    (tmp_path / "link").symlink_to(tmp_path / "adapter")
    with pytest.raises(FileError, match="a symbolic link"), files.replacing(tmp_path / "link") as new:
        fill(new, "weights", "notes.txt")
    assert (tmp_path / "adapter" / "notes.txt").exists() and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("state", ["before", "between", "between, new one torn", "after"])
def test_a_swap_that_a_kill_interrupted_is_ended(tmp_path, state):
    scratch = tmp_path / f".adapter.abcd1234{files.SCRATCH}"
    if state == "before":
        fill(tmp_path, "adapter/old", f"{scratch.name}/adapter/half")
    elif state.startswith("between"):
        fill(tmp_path, f"{scratch.name}/old/old", f"{scratch.name}/usual")
        if state == "between":
            fill(tmp_path, f"{scratch.name}/adapter/new")
    else:
        fill(tmp_path, "adapter/new", f"{scratch.name}/old/old")
    Ledger(tmp_path).tidy()
    wanted = {"before": "old", "between": "new", "between, new one torn": "old", "after": "new"}[state]
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == [wanted]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_swaps_inside_claimed_folders_are_ended(ledger):
    """As a kill leaves them in the folders of a trial's trainings."""
    ledger.claim({"trial": ("*/result.json", "*/adapter/weights")})
    half = f"trial/plop/.adapter.abcd1234{files.SCRATCH}/adapter"
    fill(ledger.folder, "trial/plop/result.json", f"{half}/weights", f"{half}/.config.abcd1234{files.SCRATCH}/usual")
    fill(ledger.folder, f"own/.adapter.abcd1234{files.SCRATCH}/usual")
    assert ledger.foreign("trial")
    ledger.tidy()
    assert not ledger.foreign("trial") and [path.name for path in ledger.folder.glob("trial/plop/*")] == ["result.json"]
    assert list(ledger.folder.glob("own/.adapter*/usual")), "a folder of the user's"


def test_a_hidden_folder_of_the_users_stays(tmp_path):
    fill(tmp_path, f".adapter.abcd1234{files.SCRATCH}/notes.txt")
    fill(tmp_path, "mine/adapter/weights")
    (tmp_path / f".adapter.efgh5678{files.SCRATCH}").symlink_to(tmp_path / "mine")
    Ledger(tmp_path).tidy()
    assert list(tmp_path.rglob("notes.txt")) and (tmp_path / "mine" / "adapter" / "weights").exists()


def test_a_folder_that_is_replaced_as_a_whole_is_claimed_first(ledger):
    with ledger.replacing("merged") as new:
        fill(new, "model.safetensors", "deep/file.json")
    assert ledger.claims() == {"merged": {"model.safetensors", "deep/file.json"}}
    with ledger.replacing("merged") as new:
        fill(new, "model-1.safetensors")
    assert [path.name for path in (ledger.folder / "merged").iterdir()] == ["model-1.safetensors"]
    fill(ledger.folder, "merged/notes.txt")
    with pytest.raises(FileError, match="notes.txt"), ledger.replacing("merged") as new:
        fill(new, "model.safetensors")
    assert json.loads(ledger.path.read_text().splitlines()[0])["event"] == "claim"


def finished(ledger, *stages):
    for stage in stages:
        ledger.claim({f"{stage}.json": ()}, stage=stage, command="c")
        fill(ledger.folder, f"{stage}.json")
        ledger.add("done", stage=stage, **DONE)


def test_results_that_wait_for_another_stage_are_not_deleted_with_it(ledger):
    finished(ledger, "train", "trial")
    Previous(ledger).set_aside("train", {"train": ["train.json"]})
    with pytest.raises(
        FileError, match=r"previous: in the way: what is in it waits until train is complete \(plopfast train --resume"
    ):
        Previous(ledger).set_aside("trial", {"trial": ["trial.json"]})
    assert (ledger.folder / "trial.json").exists() and (ledger.folder / PREVIOUS / "train.json").exists()
    assert (
        Previous(ledger).set_aside("run", {"train": ["train.json"], "trial": ["trial.json"]})
        and Previous(ledger).waiting() == "run"
    )


def test_a_new_result_is_not_deleted_because_an_older_one_waits(ledger):
    finished(ledger, "score", "train")
    Previous(ledger).set_aside("run", {"score": ["score.json"], "train": ["train.json"]})
    finished(ledger, "train")
    with pytest.raises(FileError, match="waits until run is complete"):
        Previous(ledger).set_aside("train", {"train": ["train.json"]})
    assert (ledger.folder / "train.json").exists()


def test_what_came_back_is_done_though_it_was_moved_twice(ledger):
    finished(ledger, "data", "train")
    names = {"data": ["data.json"], "train": ["train.json"]}
    Previous(ledger).set_aside("run", names)
    finished(ledger, "data")
    Previous(ledger).set_aside("run", names)
    Previous(ledger).bring_back("run")
    assert states(ledger) == ["data", "train"] and (ledger.folder / "train.json").exists()


@pytest.mark.parametrize("when", ["waiting", "later"])
def test_what_a_user_puts_into_previous_stays(ledger, when):
    ledger.claim({"steps": ("*.bin",)})
    fill(ledger.folder, "steps/1.bin")
    Previous(ledger).set_aside("train", {"train": ["steps"]})
    own = ledger.folder / PREVIOUS / "steps" / ("notes.txt" if when == "waiting" else "1.bin")
    if when == "later":
        Previous(ledger).complete("train")
    fill(own.parent, own.name)
    Previous(ledger).complete("train")
    Previous(ledger).tidy()
    assert own.exists()
    fill(ledger.folder, "steps/1.bin")
    with pytest.raises(FileError, match="in the way"):
        Previous(ledger).set_aside("train", {"train": ["steps"]})
    assert own.exists() and (ledger.folder / "steps" / "1.bin").exists()


@pytest.mark.parametrize("text", ["", '{"plopfast": "history", "event": "beg'])
def test_a_first_line_that_a_full_disk_cut_short(ledger, text):
    ledger.folder.mkdir()
    ledger.path.write_text(text)
    ledger.claim({"a.json": ()})
    assert ledger.claims() == {"a.json": set()}


def test_names_with_other_separators_of_lines(ledger):
    ledger.claim({"a.json": ()}, data={"train": {"file": "a\u2028b\x85c"}})
    assert ledger.claims() == {"a.json": set()}


def test_a_history_that_is_a_link_is_refused(ledger, tmp_path):
    other = Ledger(tmp_path / "other")
    other.claim({"a.json": ()})
    before = other.path.read_text()
    ledger.folder.mkdir()
    ledger.path.symlink_to(other.path)
    with pytest.raises(FileError, match="a symbolic link"):
        ledger.claim({"a.json": ()})
    assert other.path.read_text() == before


def test_results_that_the_user_took_back_are_done(ledger):
    finished(ledger, "train")
    Previous(ledger).set_aside("run", {"train": ["train.json"]})
    (ledger.folder / PREVIOUS / "train.json").rename(ledger.folder / "train.json")
    Previous(ledger).tidy()
    assert states(ledger) == ["train"] and not Previous(ledger).waiting()


def test_what_was_not_made_again_is_done_no_more(ledger):
    finished(ledger, "score", "train", "trial")
    Previous(ledger).set_aside("run", {name: [f"{name}.json"] for name in ("score", "train", "trial")})
    finished(ledger, "score", "train")
    Previous(ledger).complete("run")
    assert states(ledger) == ["score", "train"]
