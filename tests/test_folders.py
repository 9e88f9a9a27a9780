from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from helios_sim.folders import file_in_place, folder_in_place, write_whole


@pytest.fixture
def open_to_the_group() -> Iterator[None]:
    before = os.umask(0o007)
    yield
    os.umask(before)


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.usefixtures("open_to_the_group")
def test_a_folder_takes_the_place_of_another_and_follows_the_umask(tmp_path: Path) -> None:
    """Parents are made, the old content goes, and who may read it is the user's choice."""
    target = tmp_path / "above" / "target"
    for name in ("old", "new"):
        with folder_in_place(target) as draft:
            assert draft.parent == target.parent
            (draft / name).write_text(name)
    assert names_in(target) == ["new"]
    assert names_in(target.parent) == ["target"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o770


@pytest.mark.parametrize("moves", [True, False])
def test_a_folder_that_is_not_finished_or_not_moved_leaves_the_old_one(
    moves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    with folder_in_place(target) as draft:
        (draft / "old").write_text("old")
    rename = Path.rename

    def stuck(path: Path, to: Path) -> Path:
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(path, to)

    if not moves:
        monkeypatch.setattr(Path, "rename", stuck)
    with pytest.raises(KeyboardInterrupt), folder_in_place(target) as draft:
        (draft / "new").write_text("new")
        if moves:
            raise KeyboardInterrupt
    assert names_in(tmp_path) == ["target"]
    assert names_in(target) == ["old"]


def test_a_link_keeps_leading_to_the_folder_that_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    with folder_in_place(tmp_path / "link") as draft:
        (draft / "new").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert names_in(tmp_path / "far") == ["new"]


@pytest.mark.parametrize("fails", [True, False])
def test_a_file_is_the_old_one_or_the_new_one(fails: bool, tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_whole(target, b"old")
    expected: AbstractContextManager[object] = pytest.raises(OSError) if fails else nullcontext()
    with expected, file_in_place(target) as partial:
        partial.write_bytes(b"ne")
        assert target.read_bytes() == b"old"
        if fails:
            raise OSError
        partial.write_bytes(b"new")
    assert target.read_bytes() == (b"old" if fails else b"new")
    assert names_in(tmp_path) == ["file"]


def test_what_stands_in_the_way_of_a_file_is_the_error(tmp_path: Path) -> None:
    """The cleaning up hides no error behind one of its own."""
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "file", b"new")
    assert names_in(tmp_path) == ["file"]
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "file", b"new")
    assert names_in(tmp_path) == ["file"]
