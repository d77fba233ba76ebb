"""Files are written whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from calsmooth import files
from calsmooth.errors import CalsmoothError, UsageError


def test_a_full_disk_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.write_text(tmp_path / "a.txt", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"ece": float("nan")})
    assert os.listdir(tmp_path) == []


def test_written_files_are_readable_by_others(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        path = files.write_text(tmp_path / "new" / "a.txt", "x")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": }\n')
    with pytest.raises(CalsmoothError, match=r"rows\.jsonl, line 3: not valid JSON"):
        list(files.read_jsonl(path))


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('1\n\n{"a": "ü"}\n', encoding="utf-8")
    assert list(files.read_jsonl(path)) == [(1, 1), (3, {"a": "ü"})]


def test_bytes_that_are_not_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CalsmoothError, match="not UTF-8"):
        list(files.read_jsonl(path))


def test_a_folder_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), files.whole_folder(target) as folder:  # noqa: PT012
        (folder / "weights").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with files.whole_folder(target) as folder:
        (folder / "weights").write_text("all")
        assert not target.exists()
    assert (target / "weights").read_text() == "all"


def test_default_run_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = files.run_folder(None, "bench")
    (first / "a").touch()
    second = files.run_folder(None, "bench")
    assert (first, second) == (Path("runs/bench"), Path("runs/bench-2"))
    assert files.run_folder(None, "bench") == second  # still empty: nothing to protect


def test_a_named_folder_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(UsageError, match="holds files already"):
        files.run_folder(tmp_path, "x")
    with pytest.raises(UsageError, match="is a file"):
        files.run_folder(tmp_path / "a", "x")
    with pytest.raises(UsageError, match=r"a/b/c: .*/a is a file"):
        files.run_folder(tmp_path / "a" / "b" / "c", "x")


def test_a_folder_that_cant_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # root may write anywhere
        patch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        with pytest.raises(UsageError, match=f"--bake {tmp_path}/new: {tmp_path} can't be written"):
            files.check_run_folder(tmp_path / "new", "--bake")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(full))
    with pytest.raises(CalsmoothError, match=r"new: can't be made \(No space left"):
        files.run_folder(tmp_path / "new", "x")


def test_one_variable_says_where_things_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALSMOOTH_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("CALSMOOTH_CACHE")
    assert files.cache_folder() == tmp_path / "xdg" / "calsmooth"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "calsmooth"
