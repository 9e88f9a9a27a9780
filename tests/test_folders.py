from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import polars as pl
import pytest
import typer

from helios_sim.console.command import run_app
from helios_sim.errors import InputError
from helios_sim.folders import file_in_place, folder_in_place, write_whole
from helios_sim.runs.columns import write_table


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


def test_where_no_folder_can_be_made_the_target_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "target"
    making = folder_in_place(target)
    with pytest.raises(InputError, match="No folder can be made there") as refused, making:
        pass
    assert refused.value.where == str(target)


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


def test_an_old_folder_that_cannot_be_put_back_either_is_kept_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    with folder_in_place(target) as draft:
        (draft / "old").write_text("old")
    rename = Path.rename

    def stuck(path: Path, to: Path) -> Path:
        if to == target:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", stuck)
    with pytest.raises(OSError, match="kept as") as caught, folder_in_place(target):
        pass
    (aside,) = tmp_path.iterdir()
    assert names_in(aside / "target") == ["old"]
    assert str(aside / "target") in str(caught.value)


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


def test_a_full_disk_is_told_of_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(InputError) as found, folder_in_place(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(found.value) == f"{target}: It cannot be written: the disk is full."
    assert names_in(tmp_path) == []


def test_what_is_wrong_within_a_draft_is_told_of_what_it_was_to_become(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with (
        pytest.raises(InputError, match="no such thing") as found,
        folder_in_place(target) as draft,
        folder_in_place(draft / "inner") as inner,
    ):
        raise InputError("There is no such thing.", str(inner / "page.html"))
    assert found.value.where == str(target / "inner" / "page.html")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a device of Linux")
@pytest.mark.parametrize("rows", [3, 1_000_000])
def test_a_table_that_no_disk_has_room_for_is_a_full_disk(rows: int) -> None:
    with pytest.raises(OSError) as found:
        write_table(pl.DataFrame({"a": range(rows)}), Path("/dev/full"))
    assert found.value.errno == errno.ENOSPC


def test_a_table_that_cannot_be_one_is_no_matter_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(pl.exceptions.PolarsError):
        write_table(pl.DataFrame({"a": [object()]}), tmp_path / "a.parquet")


def test_a_command_whose_disk_is_full_ends_with_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    app = typer.Typer()

    @app.command()
    def write() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit) as end:
        run_app(app, "helios", [])
    assert end.value.code == 2
    assert capsys.readouterr().err == "helios: The disk is full; what it held before is kept.\n"
