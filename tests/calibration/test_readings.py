"""Readings on disk: nothing taken is lost, nothing half written is believed."""

from __future__ import annotations

import errno
from dataclasses import asdict
from pathlib import Path

import polars as pl
import pytest

from calibration.measuring.readings import (
    POINTS_FILE,
    READINGS_FILE,
    SCHEMA,
    Reading,
    Readings,
    alone_in,
    read_points,
    usual_reference_s,
)
from calibration.measuring.timing import Timing
from helios_sim.errors import InputError


def decode(batch: int = 1, trial: int = 0, seconds: float = 0.001) -> Reading:
    return Reading(
        "decode_layers",
        model="tiny",
        mode="eager",
        layers=4,
        batch=batch,
        context_tokens=64,
        trial=trial,
        seconds=seconds,
    )


def test_a_reading_is_on_disk_as_soon_as_it_is_taken(tmp_path: Path) -> None:
    readings = Readings(tmp_path)
    readings.append(decode())
    assert (tmp_path / READINGS_FILE).read_text().count("\n") == 1
    assert Readings(tmp_path).all == (decode(),)


def test_a_reading_that_exists_is_known_by_its_key_and_not_taken_twice(tmp_path: Path) -> None:
    readings = Readings(tmp_path)
    readings.append(decode(seconds=0.001))
    assert decode(seconds=0.5).key in readings
    readings.append(decode(seconds=0.5))
    assert len(readings) == 1
    assert decode(trial=1).key not in readings


def test_bytes_belong_to_the_key_only_where_they_are_chosen() -> None:
    assert Reading("load_disk", bytes=1).key != Reading("load_disk", bytes=2).key
    assert Reading("memory_kv", bytes=1).key == Reading("memory_kv", bytes=2).key


def test_a_last_line_cut_short_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    readings = Readings(tmp_path)
    readings.append(decode())
    readings.append(decode(batch=2))
    file = tmp_path / READINGS_FILE
    file.write_text(file.read_text()[:-20])
    again = Readings(tmp_path)
    assert [reading.batch for reading in again.all] == [1]
    again.append(decode(batch=4))
    assert [reading.batch for reading in Readings(tmp_path).all] == [1, 4]


def test_a_line_that_is_no_reading_is_refused_with_its_number(tmp_path: Path) -> None:
    (tmp_path / READINGS_FILE).write_text('{"quantity": "head"}\n{"colour": 1}\n')
    with pytest.raises(InputError, match="Line 2"):
        Readings(tmp_path)


def test_a_full_disk_ends_with_a_sentence_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = Readings(tmp_path)
    readings.append(decode())

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(InputError, match=r"disk is full; 1 readings are kept .* --resume"):
        readings.append(decode(batch=2))
    monkeypatch.undo()
    assert [reading.batch for reading in Readings(tmp_path).all] == [1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_really_full_device_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / READINGS_FILE).symlink_to("/dev/full")
    readings = Readings(tmp_path)
    with pytest.raises(InputError, match="disk is full"):
        readings.append(decode())


def test_points_have_one_typed_column_a_field(tmp_path: Path) -> None:
    readings = Readings(tmp_path)
    readings.append(decode())
    readings.append(Reading("memory_weights", model="tiny", layers=4, bytes=10, predicted_bytes=10))
    readings.export()
    table = pl.read_parquet(tmp_path / POINTS_FILE)
    assert table.schema == SCHEMA
    assert table["joules"].null_count() == 2
    assert read_points(tmp_path).equals(table)


def test_points_of_an_interrupted_run_are_read_from_its_lines(tmp_path: Path) -> None:
    Readings(tmp_path).append(decode())
    assert read_points(tmp_path)["batch"].to_list() == [1]
    with pytest.raises(InputError, match="neither"):
        read_points(tmp_path / "nowhere")


def test_an_unknown_quantity_is_a_mistake_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantity 'speed'"):
        Readings(tmp_path).append(Reading("speed"))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        Readings(tmp_path / "file" / "folder")


def test_a_timed_reading_counts_the_repetitions_of_all_samples() -> None:
    found = Reading("head", batch=2).timed(
        Timing(0.5, 0.01, repetitions=7, samples=3, lost_share=0.2)
    )
    assert (found.seconds, found.mad_s, found.repetitions, found.idle_share) == (0.5, 0.01, 21, 0.2)


def paced(*trials: tuple[float | None, float | None]) -> pl.DataFrame:
    """Readings by the share of their time that was lost and what known arithmetic took."""
    readings = [
        Reading("head", trial=trial, idle_share=share, reference_s=seconds)
        for trial, (share, seconds) in enumerate(trials)
    ]
    return pl.DataFrame([asdict(one) for one in readings], schema=SCHEMA)


def test_the_usual_pace_is_that_around_trials_that_nobody_disturbed() -> None:
    """On a GPU, and of what was read in earlier versions, nothing is known."""
    quiet = [(0.0, 2.0)] * 4 + [(0.1, 3.0)] * 3 + [(None, 4.0)] * 4
    assert usual_reference_s(paced(*quiet, (0.5, 90.0), (0.9, 90.0), (0.0, None))) == 3.0
    assert usual_reference_s(paced((0.0, None), (None, None))) is None


def test_with_hardly_a_quiet_trial_the_usual_pace_is_that_of_the_quickest_tenth() -> None:
    busy = [(0.5, float(seconds)) for seconds in range(10, 31)]
    assert usual_reference_s(paced(*busy)) == 12.0
    assert usual_reference_s(paced((0.0, 99.0), *busy)) == pytest.approx(12.1)


def test_points_of_an_earlier_version_lack_what_nobody_looked_at(tmp_path: Path) -> None:
    readings = Readings(tmp_path)
    readings.append(decode())
    readings.export()
    file = tmp_path / POINTS_FILE
    pl.read_parquet(file).drop("reference_s").write_parquet(file)
    assert read_points(tmp_path)["reference_s"].to_list() == [None]
    pl.read_parquet(file).drop("idle_share").write_parquet(file)
    with pytest.raises(InputError, match="Columns are missing: idle_share"):
        read_points(tmp_path)


def test_points_of_a_resumed_run_that_was_killed_are_all_read(tmp_path: Path) -> None:
    readings = Readings(tmp_path)
    readings.append(decode())
    readings.export()
    Readings(tmp_path).append(decode(batch=2))
    assert read_points(tmp_path)["batch"].to_list() == [1, 2]


def test_a_folder_that_is_measured_into_is_refused_until_that_ends(tmp_path: Path) -> None:
    with alone_in(tmp_path):
        with (
            pytest.raises(InputError, match="Another process measures into this folder"),
            alone_in(tmp_path),
        ):
            pass
        Readings(tmp_path).append(decode())
    with alone_in(tmp_path):
        assert len(Readings(tmp_path)) == 1


def test_where_a_system_has_no_locks_no_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibration.measuring.readings.fcntl", None)
    with alone_in(tmp_path), alone_in(tmp_path):
        pass
