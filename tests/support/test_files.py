"""Files are written as a whole or not at all, read only if they are files, and known by what they hold."""

import hashlib
import json
import os
import re
import stat
from pathlib import Path

import pytest

from plopfast.run.folder import hashes_in
from plopfast.support import files
from plopfast.support.errors import DataError, FileError


def contents(folder: Path) -> dict:
    return {
        path.relative_to(folder).as_posix(): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("fault", [None, ValueError, KeyboardInterrupt, OSError])
def test_the_old_or_the_new_one_is_there_and_nothing_else(tmp_path, kind, fault):
    path, inner = tmp_path / "result", "" if kind == "file" else "a/b.txt"

    def write(at: Path, text: str) -> None:
        at = at / inner if inner else at
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_text(text)

    write(path, "old")
    before = contents(tmp_path)
    try:
        with files.replacing(path) as scratch:
            write(scratch, "new")
            if fault:
                raise fault
    except (ValueError, KeyboardInterrupt, FileError):
        assert fault and contents(tmp_path) == before
    else:
        assert not fault and contents(tmp_path) == dict.fromkeys(before, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"], "no temporary folder is left"


def test_a_folder_that_cannot_take_its_place_leaves_the_earlier_one(tmp_path, monkeypatch):
    path, replace = tmp_path / "result", Path.replace
    path.mkdir()
    (path / "a").write_text("old")

    def failing(self, target):
        if self.name == "result" and self.parent != tmp_path:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(FileError), files.replacing(path) as scratch:
        scratch.mkdir()
        (scratch / "a").write_text("new")
    assert contents(tmp_path) == {"result/a": b"old"}


def test_nothing_of_others_is_lost(tmp_path):
    path, outside = tmp_path / "result", tmp_path / "outside"
    path.mkdir()
    outside.write_text("mine")
    for name in ("a", "notes"):
        (path / name).write_text("old")
    (path / "link").symlink_to(outside)
    for mine in (lambda name: False, lambda name: name == "notes"):
        with pytest.raises(FileError), files.replacing(path, mine=mine) as scratch:
            scratch.mkdir()
            for name in ("a", "link"):  # a file of the link's name would not be its successor
                (scratch / name).write_text("new")
        assert (path / "a").read_text() == "old" and outside.read_text() == "mine"
    (path / "link").unlink()
    with files.replacing(path, mine=lambda name: name == "notes") as scratch:
        scratch.mkdir()
        (scratch / "a").write_text("new")
    assert contents(path) == {"a": b"new"}


@pytest.mark.parametrize("state", ["before", "moved aside", "complete", "others"])
def test_recovery_after_a_kill(tmp_path, state):
    path, scratch = tmp_path / "result", tmp_path / f".result.abc{files.SCRATCH}"
    scratch.mkdir()
    (path if state == "before" else scratch / "old").mkdir()
    ((path if state == "before" else scratch / "old") / "a").write_text("old")
    if state == "complete":
        (scratch / "result").mkdir()
        (scratch / "result" / "a").write_text("new")
    if state == "others":
        (scratch / "notes").write_text("mine")
    files.recover(scratch)
    if state == "others":
        assert (scratch / "notes").read_text() == "mine"
    else:
        assert contents(tmp_path) == {"result/a": b"new" if state == "complete" else b"old"}


def test_files_have_the_permissions_of_new_files(tmp_path):
    (tmp_path / "usual").touch()
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    with files.replacing(tmp_path / "folder") as scratch:
        (scratch / "in").mkdir(parents=True)
        for name in ("a", "in/b"):
            (scratch / name).touch(mode=0o600)
    with files.replacing(tmp_path / "file") as scratch:
        scratch.touch(mode=0o600)
    for name in ("folder/a", "folder/in/b", "file"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == usual


def test_hashes_are_of_what_the_file_holds_now(tmp_path):
    path = tmp_path / "a"
    for data in (b"", b"x", b"y", os.urandom(3 << 20)):  # x and y have one length; the last one several blocks
        path.write_bytes(data)
        assert files.sha256(path) == hashlib.sha256(data).hexdigest()
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "b").write_text("b")
    assert hashes_in(tmp_path, ["a", "in", "gone"]).keys() == {"a", "in/deep/b"}


def test_what_may_be_in_the_way(tmp_path):
    empty, full, file = tmp_path / "empty", tmp_path / "full", tmp_path / "full" / "a"
    empty.mkdir(), full.mkdir(), file.write_text("")
    for path in (empty, tmp_path / "gone"):
        files.refuse_existing(path, overwrite=False)
    for path in (full, file):
        files.refuse_existing(path, overwrite=True)
        with pytest.raises(FileError, match=re.escape(str(path))):
            files.refuse_existing(path, overwrite=False)


def test_what_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert files.read_json(path, "you") == {"a": "é"}, "without the byte order mark"
    path.write_bytes(b"\xff")
    for error in (FileError, DataError):
        with pytest.raises(error, match=r"a\.json"):
            files.read_text(path, "gone", error)
        with pytest.raises(error, match="gone"):
            files.read_text(tmp_path / "none", "gone", error)
        with pytest.raises(error, match="folder"):
            files.read_text(tmp_path, "gone", error)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="pipe"):
        files.read_text(tmp_path / "pipe", "gone")
    path.write_text('{"a": 1}\n\n{"b": 2}\n{')
    with pytest.raises(FileError, match="line 4"):
        files.read_json_lines(path, "you")
    path.write_text(json.dumps({"plopfast": "scores", "a": 1}))
    assert files.read_kind(path, "scores", "you") == {"a": 1}
    for text in ('{"plopfast": "scores"}', '{"a": 1}', "[1]", "3"):
        path.write_text(text)
        with pytest.raises(FileError, match="expected a file of the kind"):
            files.read_kind(path, "placement", "you")


@pytest.mark.parametrize(("digits", "fits"), [(19, True), (20, True), (21, False), (400, False)])
def test_counts_have_few_digits(digits, fits):
    text = '{"a": %s}' % ("1" * digits)
    if fits:
        assert files.parse_json("here", text) == {"a": int("1" * digits)}
    else:
        with pytest.raises(FileError, match=f"here.*{digits} digits"):
            files.parse_json("here", text)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PLOPFAST_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert files.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("PLOPFAST_CACHE")
    assert files.cache_dir() == tmp_path / "b" / "plopfast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / ".cache" / "plopfast"
