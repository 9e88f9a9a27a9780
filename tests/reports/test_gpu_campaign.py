"""A campaign goes through its steps whatever becomes of each, within its time, and packs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import sys
import tarfile
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helios_sim.errors import InputError
from reports.fidelity.cases import CASES as STUDIED
from reports.forked import Nursery, children_can
from reports.gpu import campaign as campaigns
from reports.gpu import cli
from reports.gpu.campaign import GRACE_S, STEPS_FILE, Call, Campaign, Step, Try, chosen
from reports.gpu.packages import how_to_install, missing
from reports.gpu.packing import MANIFEST, MOST_FILES, pack, unpack, worth_keeping
from reports.gpu.steps import CASES, CUDA_TESTS, PRESETS, steps_of, study_size


def fake(name: str, code: str, **options) -> Step:
    settings = {"extra_s": 600.0, "least_s": 0.5} | options
    return Step(name, lambda call: [sys.executable, "-S", "-c", code], **settings)


def leaving(name: str, **options) -> Step:
    return fake(name, f"open({name!r}, 'w').close()", leaves=name, **options)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake steps write where they run."""
    monkeypatch.setattr("reports.gpu.campaign.ROOT", tmp_path)


@pytest.fixture
def limit_when_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that leaves a file `ready` is at its limit, however long it took to get there."""
    waited, ready = Campaign._waited, tmp_path / "ready"

    def until_ready(
        self: Campaign, process: campaigns.Process, seconds: float, interruptions: int
    ) -> bool:
        if seconds > self.grace_s:
            while process.poll() is None and not ready.exists():
                time.sleep(0.01)
            if ready.exists():
                ready.unlink()
                seconds = 0.0
        return waited(self, process, seconds, interruptions)

    monkeypatch.setattr(Campaign, "_waited", until_ready)


def run(out: Path, *steps: Step, budget_s: float = 36_000.0, **options) -> Campaign:
    campaign = Campaign(steps, out, budget_s, say=lambda text: None, **options)
    campaign.run(steps)
    return campaign


def verdicts(campaign: Campaign) -> dict[str, str]:
    return {one.step: one.verdict for one in campaign.results}


def on_disk(out: Path) -> list[dict]:
    return json.loads((out / STEPS_FILE).read_text())


def test_a_failing_step_ends_none_but_those_that_need_it(tmp_path: Path) -> None:
    campaign = run(
        tmp_path,
        fake("first", "raise SystemExit(7)", leaves="first"),
        fake("second", "", after=("first",)),
        leaving("third"),
        fake("fourth", "print('after the third')", after=("third",)),
    )
    assert verdicts(campaign) == {
        "first": "failed",
        "second": "skipped",
        "third": "done",
        "fourth": "done",
    }
    assert campaign.exit_code() == 1
    first, second, *_ = on_disk(tmp_path)
    assert first["rc"] == 7 and "code 7" in first["reason"]
    assert second["reason"] == "first has left nothing to go on with"
    assert "after the third" in (tmp_path / "logs/04-fourth.log").read_text()


def test_a_step_at_its_limit_is_interrupted_and_what_it_took_is_kept(
    tmp_path: Path, limit_when_ready: None
) -> None:
    code = (
        "import time\nprint('taken', flush=True)\n"
        "try: open('ready', 'w').close(); time.sleep(60)\n"
        "except KeyboardInterrupt: print('exported'); raise SystemExit(130)"
    )
    campaign = run(tmp_path, fake("slow", code), fake("next", ""))
    assert verdicts(campaign) == {"slow": "out of time", "next": "done"}
    assert campaign.exit_code() == 3
    assert (tmp_path / "logs/01-slow.log").read_text().split("\n")[-3:] == ["taken", "exported", ""]


def test_a_step_that_does_not_listen_is_killed_with_what_it_started(
    tmp_path: Path, limit_when_ready: None
) -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\nopen('ready', 'w').close()\ntime.sleep(600)"
    )
    campaign = run(tmp_path, fake("deaf", code), grace_s=0.2)
    assert campaign.results[0].rc == -signal.SIGKILL
    child = int((tmp_path / "logs/01-deaf.log").read_text().split()[-1])
    end_s = time.monotonic() + 60.0
    while _runs(child) and time.monotonic() < end_s:
        time.sleep(0.02)
    assert not _runs(child)


MODULE = """
import os, signal, subprocess, sys, time
alone = os.getpgrp() == os.getpid()
print(sys.argv[1:], os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"], alone, __name__)
print("to the other", file=sys.stderr)
if sys.argv[1] == "code":
    raise SystemExit(int(sys.argv[2]))
if sys.argv[1] == "words":
    raise SystemExit("what it says")
if sys.argv[1] == "error":
    raise ValueError("what went wrong")
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    open("ready", "w").close()
    time.sleep(60)
if sys.argv[1] == "slow":
    try:
        open("ready", "w").close()
        time.sleep(60)
    except KeyboardInterrupt:
        print("exported")
        raise SystemExit(130)
"""


def of_module(name: str, *words: str, **options) -> Step:
    """A step that runs a module, as those of a campaign do."""
    settings = {"extra_s": 600.0, "least_s": 0.5} | options
    return Step(name, lambda call: [sys.executable, "-m", "a_step", *words], **settings)


def test_a_module_is_a_child_that_ends_as_its_own_process_would(
    tmp_path: Path, limit_when_ready: None
) -> None:
    (tmp_path / "a_step.py").write_text(MODULE)
    campaign = run(
        tmp_path,
        of_module("plain", "none"),
        of_module("coded", "code", "7"),
        of_module("worded", "words"),
        of_module("broken", "error"),
        of_module("slow", "slow"),
    )
    codes = {one.step: one.rc for one in campaign.results}
    assert codes == {"plain": 0, "coded": 7, "worded": 1, "broken": 1, "slow": 130}
    assert verdicts(campaign)["slow"] == "out of time"
    said = {path.stem[3:]: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert "['none'] 1 True __main__\nto the other\n" in said["plain"]
    assert "what it says" in said["worded"]
    assert "ValueError: what went wrong" in said["broken"]
    assert "exported" in said["slow"]
    deaf = run(tmp_path / "deaf", of_module("deaf", "deaf"), grace_s=0.2)
    assert deaf.results[0].rc == -signal.SIGKILL


def test_without_children_a_module_is_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a_step.py").write_text(MODULE)
    step = of_module("plain", "none")
    assert verdicts(run(tmp_path, step, forks=False)) == {"plain": "done"}
    assert "['none'] 1 True __main__" in (tmp_path / "logs/01-plain.log").read_text()


def test_what_children_can_is_asked_of_one() -> None:
    def fails() -> None:
        raise RuntimeError("initialization error")

    assert children_can(lambda: None)
    assert not children_can(fails)
    assert not children_can(lambda: time.sleep(60), limit_s=0.2)


def test_a_nursery_runs_modules_one_after_another_and_says_how_each_ended(
    tmp_path: Path,
) -> None:
    (tmp_path / "a_ward.py").write_text(
        "import os, sys\nprint('from', os.getppid())\nprint(*sys.argv[1:], file=sys.stderr)\n"
        "sys.exit(len(sys.argv) - 1)\n"
    )
    with closing(Nursery(("json", "no_such_module"), tmp_path)) as nursery:
        assert _runs(nursery.pid)
        assert nursery.run("a_ward", []) == (0, f"from {nursery.pid}")
        assert nursery.run("a_ward", ["two words", "more"]) == (2, "two words more")
        assert nursery.run("no_such_module", [])[0] == 1
        os.kill(nursery.pid, signal.SIGKILL)
        assert nursery.run("a_ward", []) == (1, "the process that begins others is gone")


def test_a_nursery_that_is_closed_ends_what_it_runs(tmp_path: Path) -> None:
    """An interruption may end the one who asked alone."""
    pid = tmp_path / "pid"
    (tmp_path / "a_sleep.py").write_text(
        "import os, time\nopen('draft', 'w').write(str(os.getpid()))\n"
        "os.rename('draft', 'pid')\ntime.sleep(60)\n"
    )
    with closing(Nursery((), tmp_path)) as nursery:
        waiting = threading.Thread(target=nursery.run, args=("a_sleep", []), daemon=True)
        waiting.start()
        end_s = time.monotonic() + 60.0
        while not pid.is_file() and time.monotonic() < end_s:
            time.sleep(0.02)
        os.kill(nursery.pid, signal.SIGTERM)
        waiting.join(30.0)
        assert not waiting.is_alive()
        assert not _runs(int(pid.read_text()))


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_what_is_done_is_not_done_again_and_what_failed_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    counted = "open('count', 'a').write('x')"
    flaky = "import os; raise SystemExit(not os.path.exists('mended'))"
    steps = (fake("good", counted), fake("flaky", flaky))
    assert verdicts(run(out, *steps)) == {"good": "done", "flaky": "failed"}
    (tmp_path / "mended").touch()
    again = run(out, *steps)
    assert verdicts(again) == {"good": "done", "flaky": "done"}
    assert again.exit_code() == 0
    assert (tmp_path / "count").read_text() == "x"
    assert [one["step"] for one in on_disk(out)] == ["good", "flaky", "flaky"]


def test_what_is_done_is_done_again_where_its_input_is_new(tmp_path: Path) -> None:
    flaky = fake("a", "import os; open('a', 'w'); raise SystemExit(not os.path.exists('b'))")
    steps = (replace(flaky, leaves="a"), leaving("b", after=("a",)))
    assert verdicts(run(tmp_path, *steps)) == {"a": "failed", "b": "done"}
    run(tmp_path, *steps)
    run(tmp_path, *steps)
    assert [one["step"] for one in on_disk(tmp_path)] == ["a", "b", "a", "b"]


def test_what_is_done_and_gone_is_not_made_anew_below_what_came_of_it(tmp_path: Path) -> None:
    steps = (leaving("weights"), leaving("readings", after=("weights",)))
    run(tmp_path, *steps)
    (tmp_path / "weights").unlink()
    for _ in range(2):
        again = run(tmp_path, *steps, fake("next", "", after=("weights",)))
        assert verdicts(again) == {"weights": "skipped", "readings": "done", "next": "skipped"}
        assert "bring it back or give another --out" in again.results[0].reason


def test_what_was_too_little_for_the_next_step_is_gone_on_with(tmp_path: Path) -> None:
    readings = fake("measure", "open('points', 'a').write('x')", leaves="points", resumes=True)
    fit = fake("fit", "raise SystemExit(len(open('points').read()) < 2)", after=("measure",))
    assert verdicts(run(tmp_path, readings, fit)) == {"measure": "done", "fit": "failed"}
    assert verdicts(run(tmp_path, readings, fit)) == {"measure": "done", "fit": "done"}
    run(tmp_path, readings, fit)
    assert (tmp_path / "points").read_text() == "xx"


def test_the_budget_is_kept_and_what_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    """Real time: a busy machine leaves less of it, which no step may be given more than."""
    sleeping = "import time; time.sleep(60)"
    campaign = run(
        tmp_path,
        *(fake(name, sleeping, least_s=1.5) for name in ("one", "two")),
        budget_s=3.0,
        margin_s=1.0,
    )
    assert verdicts(campaign) == {"one": "out of time", "two": "out of time"}
    one, two = on_disk(tmp_path)
    assert one["limit_s"] is None or one["limit_s"] <= 2.0
    assert "it takes 2 s at least" in two["reason"]
    assert two["command"] == []
    assert campaign.left_s < 1.5
    assert campaign.exit_code() == 3


def test_an_interruption_ends_the_step_in_hand_and_is_on_disk(tmp_path: Path) -> None:
    # The step itself interrupts, since nobody else knows that it runs.
    code = (
        "import os, signal, time\n"
        f"time.sleep(0.5)\nos.kill({os.getpid()}, signal.SIGINT)\ntime.sleep(60)"
    )
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fake("long", code), fake("next", ""))
    assert [one["verdict"] for one in on_disk(tmp_path)] == ["interrupted"]


@pytest.mark.parametrize("moment", ["before", "begun", "ending"])
def test_an_interruption_at_any_moment_of_a_step_leaves_nothing_running_and_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    begun, ended = campaigns._begun, Campaign._ended
    processes = []

    def interrupt(when: str) -> None:
        if when == moment:
            os.kill(os.getpid(), signal.SIGINT)

    def begin(*arguments: object) -> object:
        interrupt("before")
        processes.append(begun(*arguments))  # type: ignore[arg-type]
        interrupt("begun")
        return processes[-1]

    def end(self: Campaign, *arguments: object) -> int:
        interrupt("ending")
        return ended(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(campaigns, "_begun", begin)
    monkeypatch.setattr(Campaign, "_ended", end)
    code = "" if moment == "ending" else "import time; time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fake("long", code), fake("next", ""))
    (process,) = processes
    assert process.returncode is not None
    expected = "done" if moment == "ending" else "interrupted"
    assert [one["verdict"] for one in on_disk(tmp_path)] == [expected]


def test_an_unknown_step_is_refused_and_the_nearest_named(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--only: There is no step 'meassure'. Did you mean 'measure'"
    ):
        chosen(steps_of("cuda", "cuda"), ["meassure"], [])
    names = [step.name for step in chosen(steps_of("cuda", "cuda"), ["fit", "train"], ["train"])]
    assert names == ["fit"]


def test_a_missing_package_skips_the_step_and_is_named_with_what_brings_it(tmp_path: Path) -> None:
    campaign = run(tmp_path, fake("needs", "", packages=("no_such_package",)))
    assert verdicts(campaign) == {"needs": "skipped"}
    assert "no_such_package is not installed; pip install" in campaign.results[0].reason
    assert campaign.exit_code() == 1
    assert missing(("json", "no_such_package")) == ["no_such_package"]
    assert "bring" in how_to_install(["a", "b"])


def test_steps_that_make_no_sense_here_do_not_count(tmp_path: Path) -> None:
    campaign = run(tmp_path, fake("shapes", "", unsuited="it is a rehearsal"), fake("next", ""))
    assert verdicts(campaign) == {"shapes": "skipped", "next": "done"}
    assert campaign.exit_code() == 0


def test_every_step_is_a_command_and_names_only_steps_before_it(tmp_path: Path) -> None:
    for device, preset in (("cuda", "cuda"), ("cpu", "tiny")):
        steps = steps_of(device, preset)
        for at, step in enumerate(steps):
            assert {*step.after} <= {one.name for one in steps[:at]}
            words = step.words(Call(tmp_path, 100.0))
            assert words[:2] == [sys.executable, "-m"]
            forked = step.words(Call(tmp_path, 100.0, forks=True))
            assert ("--forked" in forked) is (step.name == "fidelity")
            assert "--forked" not in words
            assert "cuda" not in words or device == "cuda" or "not" in " ".join(words)


def test_all_test_files_for_a_gpu_are_run() -> None:
    folder = Path(__file__).parents[1] / "calibration"
    marked = {
        path.stem.removeprefix("test_")
        for path in folder.glob("test_*.py")
        if "mark.cuda" in (text := path.read_text()) or "tiny.DEVICES" in text
    }
    assert marked == {*CUDA_TESTS, "doctor"}


def test_the_study_takes_what_fits_and_goes_on_as_it_began() -> None:
    assert set(CASES) <= {case.name for case in STUDIED}
    size = PRESETS["cuda"]
    cases, seconds, repeats = study_size(Call(Path(), 200.0), size)
    assert (len(cases), repeats) == (8, "1")
    assert len(cases) * (float(seconds) + size.serving_s) + size.study_s <= 200.0
    cases, seconds, _ = study_size(Call(Path(), 215.0), size)
    assert (len(cases), seconds) == (9, "3")
    assert study_size(Call(Path(), 60.0), size) == (CASES[:8], "3", "1")
    assert study_size(Call(Path(), 1800.0), size) == (CASES, "15", "3")
    words = ("x", "--seconds", "4", "--repeats", "2", "--case", "a", "--case", "b")
    assert study_size(Call(Path(), 900.0, words), size) == (("a", "b"), "4", "2")


@pytest.mark.parametrize("budget_s", [45.0, 100.0, 300.0, 3600.0])
def test_the_study_is_planned_to_end_before_it_is_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget_s: float
) -> None:
    calls: list[Call] = []
    limits: list[float] = []
    study = next(step for step in steps_of("cuda", "cuda") if step.name == "fidelity")
    study = replace(study, after=(), packages=(), words=lambda call: calls.append(call) or ("x",))
    monkeypatch.setattr(Campaign, "_run", lambda self, step, words, limit_s: limits.append(limit_s))
    run(tmp_path, study, budget_s=budget_s)
    (call,), (limit_s,) = calls, limits
    assert 0.0 < call.work_s <= limit_s - min(GRACE_S, limit_s / 4)


@pytest.mark.parametrize(
    ("forked", "apart", "forks"),
    [
        ({True}, None, True),
        ({False}, False, True),
        ({False}, True, False),
        (set(), False, False),
    ],
)
def test_another_process_looks_for_the_gpu_only_where_a_child_cannot_use_it(
    monkeypatch: pytest.MonkeyPatch, forked: set[bool], apart: bool | None, forks: bool
) -> None:
    """`forked` are the readings of a meter, wanted or not, with which a child works."""
    asked = []
    monkeypatch.setattr(cli, "children_can", lambda work: work.keywords["meters"] in forked)
    monkeypatch.setattr(cli, "_require", lambda: asked.append(apart) or apart)
    assert cli._children_can_use_gpu() is forks
    assert asked == ([] if apart is None else [apart])


def filled(out: Path) -> Path:
    for name, data in {
        "steps.json": b"[]",
        "logs/01-doctor.log": b"pass\n" * 1000,
        "points/points.parquet": os.urandom(60_000),
        "family/general-12l/model.safetensors": os.urandom(1000),
        "family/training.json": b"{}",
        "study/runs/case/discarded/real-1/totals.json": b"{}",
        "study/runs/case/real/report.html": b"<html>",
        "study/runs/case/real/tokens.parquet": os.urandom(50_000),
        "study/runs/case/real/large.parquet": os.urandom(200_000),
    }.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return out


def test_packing_leaves_weights_and_discarded_runs_out_and_keeps_to_sizes(tmp_path: Path) -> None:
    out, packed, restored = filled(tmp_path / "out"), tmp_path / "packed", tmp_path / "restored"
    sizes = {"most_bytes": 100_000, "most_together": 200_000}
    assert pack(out, packed, **sizes) == ["study/runs/case/real/large.parquet"]
    files = sorted(packed.iterdir())
    assert [file.name for file in files] == [MANIFEST, "part-1.tar.gz", "part-2.tar.gz"]
    assert len(files) <= MOST_FILES
    assert all(file.stat().st_size <= 100_000 for file in files)
    assert unpack(packed, restored) == (2, [])
    found = {path.relative_to(restored).as_posix() for path in restored.rglob("*.*")}
    assert found == {
        "steps.json",
        "logs/01-doctor.log",
        "points/points.parquet",
        "family/training.json",
        "study/runs/case/real/tokens.parquet",
    }
    same = (restored / "points/points.parquet").read_bytes()
    assert same == (out / "points/points.parquet").read_bytes()
    before = [file.read_bytes() for file in files]
    pack(out, packed, **sizes)
    assert [file.read_bytes() for file in sorted(packed.iterdir())] == before


def test_what_is_larger_than_an_archive_comes_in_pieces_that_wait_for_each_other(
    tmp_path: Path,
) -> None:
    out, packed, restored = filled(tmp_path / "out"), tmp_path / "packed", tmp_path / "restored"
    large = Path("study/runs/case/real/large.parquet")
    assert pack(out, packed, most_bytes=100_000) == []
    assert all(file.stat().st_size <= 100_000 for file in packed.iterdir())
    # Readings and the last piece lie in the first archive, two pieces in one each.
    lost = packed / "part-3.tar.gz"
    lost.rename(tmp_path / lost.name)
    assert unpack(packed, restored) == (3, [lost.name, large.as_posix()])
    assert (restored / "steps.json").is_file() and not (restored / large).exists()
    (tmp_path / lost.name).rename(lost)
    assert unpack(packed, restored) == (4, [])
    assert (restored / large).read_bytes() == (out / large).read_bytes()
    assert not list(restored.rglob("*.piece-*"))


def test_repeats_beyond_the_first_are_packed_last_and_left_out_first(tmp_path: Path) -> None:
    for case in "ab":
        for repeat in (1, 2):
            path = tmp_path / f"study/runs/{case}/real/repeat-{repeat}/exits.parquet"
            path.parent.mkdir(parents=True)
            path.write_bytes(os.urandom(10_000))
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes/points.parquet").write_bytes(os.urandom(10_000))
    found = [path.relative_to(tmp_path).as_posix() for path in worth_keeping(tmp_path)]
    assert found == [
        "study/runs/a/real/repeat-1/exits.parquet",
        "study/runs/b/real/repeat-1/exits.parquet",
        "shapes/points.parquet",
        "study/runs/a/real/repeat-2/exits.parquet",
        "study/runs/b/real/repeat-2/exits.parquet",
    ]
    # Three files of 10 kB and what is set aside for headers.
    assert pack(tmp_path, tmp_path / "packed", most_together=55_000) == found[3:]


def test_what_a_step_took_is_packed_before_the_next_one_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that is killed at its limit comes to no end at which it could pack."""
    packed = tmp_path / "packed"
    looks = f"import os; raise SystemExit(not os.path.exists({str(packed / MANIFEST)!r}))"
    steps = [leaving("first"), fake("second", looks)]
    monkeypatch.setattr(cli, "steps_of", lambda device, preset: steps)
    monkeypatch.setattr(cli, "import_ahead", lambda names: None)
    words = ["--out", str(tmp_path), "--device", "cpu", "--pack", str(packed)]
    assert cli.app(words, standalone_mode=False, obj=time.monotonic()) == 0
    assert [one["verdict"] for one in on_disk(tmp_path)] == ["done", "done"]


def test_a_folder_that_takes_no_archive_ends_no_campaign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "steps_of", lambda device, preset: [fake("one", ""), fake("two", "")])
    monkeypatch.setattr(cli, "import_ahead", lambda names: None)
    (tmp_path / "packed").write_text("")
    words = ["--out", str(tmp_path), "--device", "cpu", "--pack", str(tmp_path / "packed")]
    with pytest.raises(OSError, match="packed"):
        cli.app(words, standalone_mode=False, obj=time.monotonic())
    assert [one["verdict"] for one in on_disk(tmp_path)] == ["done", "done"]
    assert capsys.readouterr().out.count("Nothing could be packed yet") == 2


def test_archives_of_an_earlier_call_stay_until_new_ones_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, packed = filled(tmp_path / "out"), tmp_path / "packed"
    pack(out, packed)
    before = {file.name: file.read_bytes() for file in packed.iterdir()}

    def killed(pieces: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr("reports.gpu.packing._archive", killed)
    with pytest.raises(KeyboardInterrupt):
        pack(out, packed)
    assert {file.name: file.read_bytes() for file in packed.iterdir()} == before


def planted(folder: Path, member: str, name: str = "part-1.tar.gz") -> Path:
    """A folder whose archive has one member of this name."""
    folder.mkdir()
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        info = tarfile.TarInfo(member)
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    (folder / "part-1.tar.gz").write_bytes(data.getvalue())
    facts = {"bytes": 1, "sha256": hashlib.sha256(data.getvalue()).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps({"files": {name: facts}}))
    return folder


def test_unpacking_refuses_paths_outside_and_changed_archives(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="refused"):
        unpack(planted(tmp_path / "a", "../outside"), tmp_path / "target")
    assert not (tmp_path / "outside").exists()
    with pytest.raises(InputError, match="no name of an archive"):
        unpack(planted(tmp_path / "b", "inside", "../a/part-1.tar.gz"), tmp_path / "target")
    changed = planted(tmp_path / "c", "inside")
    (changed / "part-1.tar.gz").write_bytes(b"else")
    with pytest.raises(InputError, match="not what the manifest says"):
        unpack(changed, tmp_path / "target")
    with pytest.raises(InputError, match="manifest cannot be read"):
        unpack(tmp_path / "nothing", tmp_path / "target")
    with pytest.raises(InputError, match="It cannot be unpacked"):
        unpack(planted(tmp_path / "d", "inside"), changed / MANIFEST)
    (changed / MANIFEST).write_text('{"files": {"part-1.tar.gz": 5}}')
    with pytest.raises(InputError, match="manifest cannot be read"):
        unpack(changed, tmp_path / "target")


def test_unpacking_where_python_cannot_keep_paths_inside_says_which_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(InputError, match=r"unpack with Python 3\.11\.4 or later"):
        unpack(planted(tmp_path / "a", "inside"), tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_steps_so_far_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / STEPS_FILE).write_text("[{]")
    with pytest.raises(InputError, match=STEPS_FILE):
        run(tmp_path, fake("one", ""))
    assert Try("a", "done").command == ()


def test_options_that_cannot_be_used_are_refused_with_what_can(tmp_path: Path) -> None:
    def called(*words: str) -> None:
        cli.app(["--out", str(tmp_path / "out"), *words], standalone_mode=False)

    with pytest.raises(InputError, match="--budget: A budget of 9 s was given; 30 s is the least"):
        called("--device", "cpu", "--budget", "9s", "--pack", str(tmp_path), "--only", "fit")
    with pytest.raises(InputError, match="--device: 'tpu' was given; there are cuda and cpu"):
        called("--device", "tpu")
    with pytest.raises(InputError, match="manifest cannot be read"):
        called("--unpack", str(tmp_path / "nothing"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    words = ["--out", str(tmp_path / "file"), "--device", "cpu", "--only", "environment"]
    with pytest.raises(InputError, match="No campaign can be kept there"):
        cli.app(words, standalone_mode=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_that_is_absent_is_said_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--device: CUDA is not available.*Give --device cpu"):
        cli.app(["--out", str(tmp_path / "out")], standalone_mode=False)


def remembering(told: list[tuple[str, ...]], **options) -> Step:
    """A step that never ends well, and that notes what it is told of its last command."""

    def words(call: Call) -> list[str]:
        told.append(call.earlier)
        return [sys.executable, "-S", "-c", f"raise SystemExit({len(told)})"]

    return Step("study", words, extra_s=30.0, least_s=0.5, **options)


@pytest.mark.parametrize("missed", ["out of time", "skipped"])
def test_a_step_goes_on_as_it_began_though_a_call_had_no_time_or_means_for_it(
    missed: str, tmp_path: Path
) -> None:
    told: list[tuple[str, ...]] = []
    study = remembering(told)
    hindered = {
        "out of time": replace(study, least_s=1e6),
        "skipped": replace(study, packages=("no_such_package",)),
    }
    run(tmp_path, study)
    assert verdicts(run(tmp_path, hindered[missed])) == {"study": missed}
    run(tmp_path, study)
    assert told == [(), tuple(on_disk(tmp_path)[0]["command"])]
    assert [one["verdict"] for one in on_disk(tmp_path)] == ["failed", missed, "failed"]


def test_a_step_whose_input_is_newer_than_its_last_command_begins_anew(tmp_path: Path) -> None:
    """Be it that the input was made in a call which had no time for the step itself."""
    told: list[tuple[str, ...]] = []
    flaky = fake("a", "import os; open('a', 'w'); raise SystemExit(not os.path.exists('b'))")
    made = replace(flaky, leaves="a")
    study = remembering(told, after=("a",))
    run(tmp_path, made, study)
    (tmp_path / "b").touch()
    run(tmp_path, made, replace(study, least_s=1e6))
    run(tmp_path, made, study)
    assert told == [(), ()]
    run(tmp_path, made, study)
    assert told[2]


def test_what_is_done_is_done_again_where_its_input_was_made_anew_in_another_call(
    tmp_path: Path,
) -> None:
    flaky = fake("a", "import os; open('a', 'w'); raise SystemExit(not os.path.exists('b'))")
    steps = (replace(flaky, leaves="a"), leaving("b", after=("a",)))
    run(tmp_path, *steps)
    campaign = Campaign(steps, tmp_path, 60.0, say=lambda text: None)
    campaign.run(steps[:1])
    run(tmp_path, *steps)
    assert [one["step"] for one in on_disk(tmp_path)] == ["a", "b", "a", "b"]
