"""Points and studies: found by content, in order, kept as they come, whatever dies."""

from __future__ import annotations

import errno
import itertools
import subprocess
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from helios_sim.errors import InputError
from helios_sim.experiment import prepare
from helios_sim.runs.latencies import columns_of
from helios_sim.scenario import Scenario, parse_scenario
from helios_sim.search.executors import InlineExecutor, Workers, open_workers
from helios_sim.search.points import Point, _judged, code_files, point_of, run_point
from helios_sim.search.store import Store
from helios_sim.search.studies import Outcome, Standing, Study, carry_out
from helios_sim.search.traffic import Traffic, at_rate
from helios_sim.settings.slo import parse_slo
from helios_sim.workload.requests import generate
from tests.runs.test_metrics import pencil_run

INLINE = Workers(InlineExecutor(), 1)


def scenario(folder: Path, rate_per_s: float = 4.0, **more: Any) -> Scenario:
    data = {
        "name": "small",
        "workload": {
            "num_requests": 50,
            "arrivals": {"kind": "poisson", "rate_per_s": rate_per_s},
            "prompt": {"kind": "constant", "tokens": 50},
            "output": {"kind": "constant", "tokens": 20},
        },
        "fleet": {"profile": "opt-a100-40gb"},
        "slo": {"text": "ttft:p99<500ms;tpot:50;itl:p50<40"},
        "policy": [{"use": "never"}],
        **more,
    }
    return parse_scenario(data, "x.toml", folder)


def points_of(folder: Path, rates: Sequence[float]) -> list[Point]:
    return [point_of(scenario(folder, rate), folder, "ttft:p99<500ms") for rate in rates]


def asking(points: Sequence[Point], batch: int) -> Study[list[Outcome]]:
    """A study that asks for its points in batches and returns what it was sent."""

    def steps() -> Generator[Sequence[Point], list[Outcome], list[Outcome]]:
        got: list[Outcome] = []
        for at in range(0, len(points), batch):
            got += yield points[at : at + batch]
        return got

    return Study(steps(), len(points))


def test_a_point_is_named_by_what_decides_it_and_by_nothing_else(tmp_path: Path) -> None:
    (point,) = points_of(tmp_path, [4.0])
    renamed = scenario(tmp_path, name="other", question="why", notes=["a"])
    assert point_of(renamed, tmp_path, "ttft:p99<500ms").key == point.key
    labelled = scenario(tmp_path, policy=[{"use": "never", "label": "mine"}])
    assert point_of(labelled, tmp_path, "ttft:p99<500ms").key == point.key
    others = [
        *points_of(tmp_path, [4.5]),
        point_of(scenario(tmp_path, seed=2), tmp_path, "ttft:p99<500ms"),
        point_of(scenario(tmp_path, policy=[{"use": "vanilla"}]), tmp_path, "ttft:p99<500ms"),
        point_of(scenario(tmp_path), tmp_path, "ttft:p98<500ms"),
    ]
    assert len({point.key, *(other.key for other in others)}) == 5


def test_another_content_of_a_named_file_is_another_point(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    lines = [f'{{"timestamp":{n * 100},"input_length":9,"output_length":5}}\n' for n in range(9)]
    trace.write_text("".join(lines))
    replay = scenario(tmp_path, workload={"trace": {"file": "t.jsonl"}})
    before = point_of(replay, tmp_path).key
    trace.write_text("".join(lines[:-1]))
    assert point_of(replay, tmp_path).key != before


def test_another_content_of_servegen_s_lengths_is_another_point(tmp_path: Path) -> None:
    (tmp_path / "m_trace.parquet").write_bytes(b"rates")
    (tmp_path / "m_dataset.parquet").write_bytes(b"lengths")
    replay = scenario(tmp_path, workload={"trace": {"file": "m_trace.parquet"}})
    before = point_of(replay, tmp_path).key
    (tmp_path / "m_dataset.parquet").write_bytes(b"other lengths")
    assert point_of(replay, tmp_path).key != before


def test_another_source_of_an_imported_policy_is_another_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class comes from a module on the Python path, by way of a module that only names it."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "named_here.py").write_text("from made_there import Mine\n")
    (library / "made_there.py").write_text(
        "from helios_sim.policy.baselines import Never\nclass Mine(Never):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(library))
    base = scenario(tmp_path)
    policy = base.policy[0].model_copy(update={"use": "named_here:Mine"})
    own = base.model_copy(update={"policy": (policy,)})
    before = point_of(own, tmp_path).key
    with (library / "made_there.py").open("a") as file:
        file.write("    name = 'another'\n")
    assert point_of(own, tmp_path).key != before


def test_what_judges_a_point_is_part_of_its_code_and_what_shows_it_is_not() -> None:
    files = set(code_files())
    assert {"search/points.py", "runs/metrics.py", "settings/slo.py", "policy/helios.py"} <= files
    assert not {"search/page.py", "search/tune.py", "report/page.py"} & files
    assert not {"fidelity/page.py", "profiles/published.py", "profiles/roofline.py"} & files
    assert not {"wording.py", "console/terminal.py"} & files


def test_all_that_runs_a_point_is_part_of_its_code() -> None:
    """But for what writes files: a fresh process that runs one loads nothing else of ours."""
    program = """
import sys, tempfile
from pathlib import Path
from helios_sim import __file__ as package
from helios_sim.scenario import parse_scenario
from helios_sim.search.points import code_files, point_of, run_point
data = {
    "name": "small",
    "workload": {
        "num_requests": 20,
        "arrivals": {"kind": "poisson", "rate_per_s": 1.0},
        "prompt": {"kind": "constant", "tokens": 50},
        "output": {"kind": "constant", "tokens": 5},
    },
    "fleet": {"profile": "opt-a100-40gb"},
    "slo": {"text": "ttft:500"},
    "policy": [{"use": "helios"}],
}
run_point(point_of(parse_scenario(data, "here", Path()), Path(), "ttft:p99<500ms"))
root = Path(package).parent
ours = [module.__file__ for name, module in sys.modules.items() if name.startswith("helios_sim")]
loaded = {Path(file).relative_to(root).as_posix() for file in ours if file}
print(*sorted(loaded - {*code_files()}))
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["folders.py", "search/__init__.py"]


def test_outcomes_come_in_the_order_of_asking_and_errors_among_them(tmp_path: Path) -> None:
    wrong = scenario(tmp_path, fleet={"profile": "opt-a100-40g"})
    good, other = (
        point_of(scenario(tmp_path, rate), tmp_path, "ttft:p99<500ms") for rate in (1.0, 9.0)
    )
    broken = Point(wrong, tmp_path)
    object.__setattr__(broken, "key", "f" * 64)
    found = carry_out([asking([good, broken, other], 3)], INLINE, Store())
    assert isinstance(found[0][1], InputError)
    spans = [found[0][place]["summary"]["duration"] for place in (0, 2)]  # type: ignore[index]
    assert spans[0] > spans[1]


def test_studies_share_points_and_a_second_look_runs_none(tmp_path: Path) -> None:
    points = points_of(tmp_path, [1.0, 2.0])
    store = Store(tmp_path / "points")
    first = carry_out([asking(points, 1), asking(points[::-1], 2)], INLINE, store)
    assert len(list((tmp_path / "points").iterdir())) == 2
    assert first[0] == first[1][::-1]
    again = Store(tmp_path / "points")
    assert carry_out([asking(points, 2)], Workers(Dying(0), 1), again) == [first[0]]


@pytest.mark.parametrize("content", ["", "{", '{"key": "x"}', "[]", "\x00" * 100])
def test_a_point_s_file_that_is_not_whole_counts_as_absent(tmp_path: Path, content: str) -> None:
    (point,) = points_of(tmp_path, [2.0])
    store = Store(tmp_path / "points")
    (before,) = carry_out([asking([point], 1)], INLINE, store)
    file = tmp_path / "points" / f"{point.key}.json"
    whole = file.read_bytes()
    file.write_text(content)
    (after,) = carry_out([asking([point], 1)], INLINE, Store(tmp_path / "points"))
    assert after == before
    assert file.read_bytes() == whole


def test_progress_counts_up_to_all_and_knows_what_is_left(tmp_path: Path) -> None:
    told: list[Standing] = []
    carry_out([asking(points_of(tmp_path, [1.0, 2.0, 3.0]), 2)], INLINE, Store(), told.append)
    assert [one.num_done for one in told] == [0, 1, 2, 3]
    assert told[0].left_s is None
    assert [one.num_expected for one in told] == [3, 3, 3, 3]
    assert told[-1].left_s == 0.0


def test_a_full_disk_ends_clearly_and_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = points_of(tmp_path, [1.0, 2.0, 3.0])
    written = Path.write_bytes
    folder = tmp_path / "points"
    store = Store(folder)

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        if len(list(folder.iterdir())) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"No space left.* 2 finished points are kept.*--resume"):
        carry_out([asking(points, 1)], INLINE, store)
    monkeypatch.undo()
    assert len(list((tmp_path / "points").iterdir())) == 2
    carry_out([asking(points, 1)], Workers(Dying(1), 1), Store(tmp_path / "points"))
    assert len(list((tmp_path / "points").iterdir())) == 3


class Dying(Executor):
    """Runs so many calls, then its worker is dead."""

    def __init__(self, lives: int) -> None:
        self.lives = lives

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.lives -= 1
        if self.lives < 0:
            future.set_exception(BrokenProcessPool("gone"))
        else:
            future.set_result(fn(*args, **kwargs))
        return future


def test_a_worker_that_dies_ends_clearly_and_keeps_what_is_finished(tmp_path: Path) -> None:
    store = Store(tmp_path / "points")
    points = points_of(tmp_path, [1.0, 2.0, 3.0])
    with pytest.raises(InputError, match=r"A worker died.*1 finished point is kept.*--resume"):
        carry_out([asking(points, 3)], Workers(Dying(1), 1), store)


class OtherVersion(InlineExecutor):
    """A worker of which the second point meets a program that has been changed."""

    def __init__(self) -> None:
        self.num_asked = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.num_asked += 1
        code, *rest = args
        return super().submit(fn, code if self.num_asked == 1 else "another", *rest, **kwargs)


def test_figures_of_a_worker_with_other_code_are_not_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "points")
    points = points_of(tmp_path, [2.0, 4.0])
    with pytest.raises(
        InputError, match=r"another version of this program.*1 finished point is kept.*--resume"
    ):
        carry_out([asking(points, 2)], Workers(OtherVersion(), 1), store)
    assert [store.get(point.key) is None for point in points] == [False, True]


def test_limits_are_judged_over_the_requests_sent(tmp_path: Path) -> None:
    """One in fifty requests can never fit: infinitely late, so p99 is unknown and p90 is not."""
    base = scenario(tmp_path, fleet={"profile": "opt-a100-40gb", "candidates": ["opt-1.3b"]})
    values = {"kind": "values", "values": [50, 100_000], "weights": [0.94, 0.06]}
    workload = base.workload.model_dump(exclude_none=True) | {"prompt": values}
    mixed = scenario(
        tmp_path, fleet={"profile": "opt-a100-40gb", "candidates": ["opt-1.3b"]}, workload=workload
    )
    found = run_point(point_of(mixed, tmp_path, "ttft:p99<60s;ttft:p50<60s;itl:p99<60s"))
    refused = found["summary"]["num_refused"]
    assert 0 < refused < 20
    p99, p50, gaps = found["judged"]
    assert p99["value_ms"] is None
    assert p99["share"] == pytest.approx(1 - refused / 50)
    assert 0 < p50["value_ms"] < 60_000
    assert gaps["share"] == pytest.approx(1 - refused / 50)
    assert gaps["value_ms"] is None
    assert found["together"] is None
    plain = run_point(point_of(mixed, tmp_path, "ttft:p50<1us;ttft:60s;e2e:60s"))
    assert plain["together"] == pytest.approx(1 - refused / 50)


def test_a_percentile_is_the_latency_within_which_that_share_of_the_sent_are() -> None:
    """Of four requests one is refused; the others take 100, 200 and 400 ms to their first token.

    Half of the four are there within 200 ms, three quarters within 400 ms, and no more ever.
    """
    run = pencil_run()
    slo = parse_slo("ttft:p50<1s;ttft:p75<1s;ttft:p75.1<1s;tpot:p50<1s;ttft:300")
    found = _judged(run, columns_of(run), slo)
    told = [one["value_ms"] for one in found]
    assert told[2] is None
    assert [told[0], told[1], told[3]] == pytest.approx([200.0, 400.0, 100.0])
    assert [one["share"] for one in found] == [0.75, 0.75, 0.75, 0.75, 0.5]


def test_processes_give_the_same_bytes_as_this_one(tmp_path: Path) -> None:
    points = points_of(tmp_path, [1.0, 2.0, 3.0, 4.0])
    here, there = Store(tmp_path / "a"), Store(tmp_path / "b")
    carry_out([asking(points, 4)], INLINE, here)
    with open_workers(2) as workers:
        carry_out([asking(points, 4)], workers, there)
    files = sorted((tmp_path / "a").iterdir())
    assert len(files) == 4
    assert [file.read_bytes() for file in files] == [
        (tmp_path / "b" / file.name).read_bytes() for file in files
    ]


def test_samples_of_a_replayed_trace_are_stretches_at_the_rate_asked_for(tmp_path: Path) -> None:
    lines = []
    at_ms = 0
    for n in range(400):
        at_ms += 100 if n < 200 else 400
        lines.append(f'{{"timestamp":{at_ms},"input_length":9,"output_length":5}}\n')
    (tmp_path / "t.jsonl").write_text("".join(lines))
    replay = scenario(tmp_path, workload={"trace": {"file": "t.jsonl"}})
    traffic = Traffic(replay, tmp_path, "x.toml", 100, 4, 0.1)
    assert [part.num_requests for part in traffic.stretches] == [100] * 4
    for index in range(4):
        for rate in (1.0, 20.0):
            sample = traffic.sample(replay, index, rate, 2)
            experiment = prepare(sample, tmp_path)
            requests, _ = experiment.requests(sample.seed)
            assert len(requests) == 200
            assert len(requests) / requests.span_s == pytest.approx(rate, rel=0.02)
            assert sample.measure.warmup_requests == 20
    with pytest.raises(InputError, match="the trace has 4 windows"):
        traffic.sample(replay, 4, 1.0)
    whole = at_rate(replay, traffic, 2 * traffic.rate_per_s)
    assert whole.workload.trace is not None
    assert whole.workload.trace.rate_scale == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("num_windows", "order"),
    [(2, [0, 1]), (3, [0, 2, 1]), (8, [0, 4, 2, 6, 1, 5, 3, 7]), (6, [0, 4, 2, 1, 5, 3])],
)
def test_the_first_samples_of_a_plan_are_spread_over_its_trace(
    tmp_path: Path, num_windows: int, order: list[int]
) -> None:
    """A search takes them in order of time: it is tried on what comes after what it is tuned on."""
    replay = replayed(tmp_path, 480)
    planned = Traffic(replay, tmp_path, "x.toml", 100, num_windows, 0.1)
    assert planned.windows == tuple(planned.stretches[place] for place in order)
    for index, place in enumerate(order):
        trace = planned.sample(replay, index, 1.0).workload.trace
        assert trace is not None
        assert trace.start_s == planned.stretches[place].start_s
    searched = Traffic(replay, tmp_path, "x.toml", 100, num_windows, 0.1, "search")
    assert searched.windows == searched.stretches == planned.stretches


def replayed(folder: Path, num: int, step_ms: float = 100, **more: Any) -> Scenario:
    """So many requests, one every 100 ms from 0 s on."""
    times = [step_ms * i for i in range(num)]
    lines = [f'{{"timestamp":{at},"input_length":9,"output_length":5}}\n' for at in times]
    (folder / "t.jsonl").write_text("".join(lines))
    workload = {"trace": {"file": "t.jsonl", **more.pop("trace", {})}, **more}
    return scenario(folder, workload=workload)


@pytest.mark.parametrize(
    "cut",
    [
        {"trace": {"max_requests": 200}},
        {"trace": {"max_requests": 200, "end_s": 10_000.0}},
        {"num_requests": 200},
        {"num_requests": 200, "trace": {"end_s": 10_000.0, "repeat": 2}},
        {"duration_s": 20.0},
        {"duration_s": 10.0, "trace": {"rate_scale": 2.0}},
    ],
)
def test_windows_end_with_the_last_request_that_a_run_replays(
    tmp_path: Path, cut: dict[str, Any]
) -> None:
    """200 of 400 requests at 10 a second are four windows of 50, at the trace's own rate."""
    replay = replayed(tmp_path, 400, **cut)
    traffic = Traffic(replay, tmp_path, "x.toml", 100, 4, 0.1)
    assert [part.num_requests for part in traffic.stretches] == [50] * 4
    assert traffic.stretches[-1].end_s == pytest.approx(19.9, abs=1e-3)
    assert replay.workload.trace is not None
    own = 10.0 * replay.workload.trace.rate_scale
    assert traffic.rate_per_s == pytest.approx(own, rel=0.01)
    sample = traffic.sample(replay, 3)
    requests, _ = prepare(sample, tmp_path).requests(sample.seed)
    assert len(requests) == 50
    assert requests.span_s == pytest.approx(49 / own)


@pytest.mark.parametrize("start_s", [0.1, 2.3])
def test_a_window_plays_the_requests_that_it_counts(tmp_path: Path, start_s: float) -> None:
    """Its first request is its own, whatever digits the edges end in."""
    replay = replayed(tmp_path, 400, step_ms=33.7, trace={"start_s": start_s})
    traffic = Traffic(replay, tmp_path, "x.toml", 100, 7, 0.1)
    for place, stretch in enumerate(traffic.windows):
        sample = traffic.sample(replay, place)
        requests, _ = prepare(sample, tmp_path).requests(sample.seed)
        assert len(requests) == stretch.num_requests


def test_a_trace_of_fewer_requests_than_a_run_asks_for_is_refused(tmp_path: Path) -> None:
    traffic = Traffic(replayed(tmp_path, 300, num_requests=400), tmp_path, "x.toml", 100, 2, 0.1)
    with pytest.raises(InputError, match=r"x\.toml, workload\.num_requests: num_requests is 400"):
        traffic.check()


def test_windows_of_a_replayed_trace_drift_as_the_run_does_there(tmp_path: Path) -> None:
    """40 s at 10 a second; code comes at 20 s. Its window is the second, at whatever pace."""
    domains = [{"name": "text", "shares": [[0, 1], [19, 1], [21, 0]]}]
    domains.append({"name": "code", "shares": [[0, 0], [19, 0], [21, 1]]})
    replay = replayed(tmp_path, 400, domains=domains, trace={"end_s": 40.0})
    traffic = Traffic(replay, tmp_path, "x.toml", 100, 2, 0.1)
    text, code = replay.workload.domains
    for rate, pace in ((None, 1.0), (40.0, 4.0)):
        for index, times in itertools.product((0, 1), (1, 2)):
            sample = traffic.sample(replay, index, rate, times)
            for own, played in zip((text, code), sample.workload.domains, strict=True):
                at_s = np.arange(0.05, 19.9, 0.1)
                expected = np.tile(own.share_at(20.0 * index + at_s), times)
                at_s = np.concatenate([20.0 * number + at_s for number in range(times)])
                assert played.share_at(at_s / pace) == pytest.approx(expected, abs=1e-3)
    whole = at_rate(replay, traffic, 2.0 * traffic.rate_per_s)
    assert whole.workload.domains[1].shares == ((0.0, 0.0), (9.5, 0.0), (10.5, 1.0))


def test_a_longer_sample_of_a_trace_is_its_stretch_played_again(tmp_path: Path) -> None:
    """300 requests in two windows, each of 75 s at two a second and here played ten times."""
    traffic = Traffic(replayed(tmp_path, 300), tmp_path, "x.toml", 100, 2, 0.1, grows=True)
    assert traffic.sample_s(2.0) == 75.0
    sample = traffic.sample(traffic.scenario, 1, 2.0, 2, lengthened=5)
    experiment = prepare(sample, tmp_path, "x.toml")
    requests, _ = experiment.requests(sample.seed)
    assert len(requests) == 1500
    assert requests.span_s == pytest.approx(750.0, rel=0.01)
    assert traffic.most_lengthened(2) == 200_000 // 150 // 2
    assert replace(traffic, grows=False).most_lengthened(2) == 1


def test_samples_of_drawn_traffic_are_seeds_at_the_rate_asked_for(tmp_path: Path) -> None:
    base = scenario(tmp_path)
    traffic = Traffic(base, tmp_path, "x.toml", 3000, 4, 0.1)
    one, other = (traffic.sample(base, index, 7.0) for index in (0, 1))
    assert (one.seed, other.seed) == (1, 2)
    requests, _ = prepare(one, tmp_path).requests(one.seed)
    assert len(requests) / requests.span_s == pytest.approx(7.0, rel=0.1)
    day = {
        "duration_s": 400.0,
        "arrivals": {"kind": "schedule", "points": [[0, 1.0], [200, 3.0]]},
        "prompt": {"kind": "constant", "tokens": 50},
        "output": {"kind": "constant", "tokens": 20},
    }
    shaped = scenario(tmp_path, workload=day)
    traffic = Traffic(shaped, tmp_path, "x.toml", 3000, 4, 0.1)
    sample = traffic.sample(shaped, 0, 2 * traffic.rate_per_s)
    assert [rate for _, rate in sample.workload.arrivals.points] == [2.0, 6.0]  # type: ignore[union-attr]
    # The whole day at twice its rate, of which a tenth of the requests are not measured.
    num_requests = 2 * traffic.rate_per_s * 400.0
    assert sample.workload.duration_s == 400.0
    assert sample.measure.warmup_requests == pytest.approx(0.1 * num_requests, abs=1.0)


SHORT = {"prompt": {"kind": "constant", "tokens": 50}, "output": {"kind": "constant", "tokens": 20}}
SCHEDULE = {"kind": "schedule", "points": [[0, 1.0], [300, 5.0], [400, 0.5]]}
"""300 requests are expected in the first five minutes and 500 in the 100 s after them."""


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("workload", "rate_per_s"),
    [
        ({"duration_s": 400.0, "arrivals": SCHEDULE}, 2.0),
        ({"duration_s": 600.0, "arrivals": SCHEDULE}, 1.5),
        ({"num_requests": 800, "arrivals": SCHEDULE}, 2.0),
        ({"duration_s": 400.0, "arrivals": {**SCHEDULE, "cv": 4.0}}, 2.0),
        (
            {
                "duration_s": 7200.0,
                "arrivals": {
                    "kind": "daily",
                    "mean_rate_per_s": 2.0,
                    "hourly_weights": [1.0, 3.0] * 12,
                    "start_hour": 0.5,
                },
            },
            2.0,
        ),
    ],
)
def test_the_mean_rate_of_a_changing_one_is_its_integral_whatever_the_seed(
    tmp_path: Path, seed: int, workload: dict[str, Any], rate_per_s: float
) -> None:
    """With one draw of it in the way, every rate of a plan would be off by that draw's luck."""
    base = scenario(tmp_path, workload={**workload, **SHORT}, seed=seed)
    traffic = Traffic(base, tmp_path, "x.toml", 100, 4, 0.1)
    assert traffic.rate_per_s == pytest.approx(rate_per_s, rel=1e-12)


DRIFT = [
    {"name": "text", "shares": [[0, 1.0], [400, 0.0]]},
    {"name": "code", "shares": [[0, 0.0], [400, 1.0]]},
]


@pytest.mark.parametrize(
    "workload",
    [
        pytest.param({"arrivals": SCHEDULE}, id="a schedule"),
        pytest.param(
            {"arrivals": {"kind": "poisson", "rate_per_s": 2.0}, "domains": DRIFT},
            id="drifting domains",
        ),
    ],
)
def test_a_workload_that_changes_lasts_as_long_at_every_rate_also_where_a_number_ends_it(
    tmp_path: Path, workload: dict[str, Any]
) -> None:
    """800 requests in 400 s: at half the rate 400 of them, and the peak stays inside."""
    base = scenario(tmp_path, workload={"num_requests": 800, **workload, **SHORT})
    traffic = Traffic(base, tmp_path, "x.toml", 100, 4, 0.1)
    for factor in (0.5, 1.0, 8.0):
        rate_per_s = 2.0 * factor
        sample = traffic.sample(base, 0, rate_per_s)
        whole = at_rate(base, traffic, rate_per_s)
        for played in (sample.workload, whole.workload):
            assert played.num_requests == 800 * factor
            requests = generate(played, 1, tmp_path, ("text", "code"))
            assert requests.span_s == pytest.approx(400.0, rel=0.15)
        assert traffic.sample_s(rate_per_s) == pytest.approx(400.0)
        assert traffic.num_in_run(rate_per_s) == 800 * factor
        assert sample.measure.warmup_requests == 80 * factor
    assert traffic.sample(base, 0).workload == base.workload


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"num_requests": 301}, "ends at rate 0 after about 300 requests; num_requests = 301"),
        ({"duration_s": 20.0}, "No request is expected within duration_s = 20;"),
    ],
)
def test_a_schedule_that_never_brings_what_is_asked_for_has_no_mean_rate(
    tmp_path: Path, size: dict[str, Any], said: str
) -> None:
    arrivals = {"kind": "schedule", "points": [[0, 0.0], [100, 3.0], [200, 0.0]]}
    base = scenario(tmp_path, workload={"arrivals": arrivals, **size, **SHORT})
    traffic = Traffic(base, tmp_path, "x.toml", 100, 4, 0.1)
    with pytest.raises(InputError, match=rf"^x\.toml, workload\.arrivals: .*{said}"):
        _ = traffic.rate_per_s


def test_every_sample_expects_the_lengths_of_all_the_traffic(tmp_path: Path) -> None:
    """Not those of its own seed; what the scenario gives stays."""
    drawn = scenario(tmp_path)
    lengths = {"kind": "uniform", "min_tokens": 1, "max_tokens": 1000}
    workload = drawn.workload.model_dump(exclude_none=True) | {"prompt": lengths}
    base = scenario(tmp_path, workload=workload, serving={"expected_output_tokens": 9})
    traffic = Traffic(base, tmp_path, "x.toml", 50, 4, 0.1)
    of_base = prepare(base, tmp_path).setup.serving
    own = set()
    for index in range(3):
        sample = traffic.sample(base, index, 7.0)
        assert sample.serving.expected_prompt_tokens == of_base.expected_prompt_tokens
        assert sample.serving.expected_output_tokens == 9
        own.add(prepare(sample, tmp_path).requests(sample.seed)[0].mean_prompt_tokens)
    assert len(own) == 3


def of_rows(folder: Path, num: int, **more: Any) -> Scenario:
    """Poisson arrivals with the lengths of a trace in which every prompt has its row's length."""
    lines = [
        f'{{"timestamp":{100 * i},"input_length":{1 + i},"output_length":5}}\n' for i in range(num)
    ]
    (folder / "rows.jsonl").write_text("".join(lines))
    arrivals = {"kind": "poisson", "rate_per_s": 4.0}
    workload = {"num_requests": 50, "arrivals": arrivals, "trace": {"file": "rows.jsonl"}, **more}
    return scenario(folder, workload=workload)


def rows_of(sample: Scenario, folder: Path) -> list[int]:
    """The rows of the trace that a sample takes, counted from 0."""
    requests = generate(sample.workload, sample.seed, folder, ("text",))
    return [int(tokens) - 1 for tokens in requests.prompt_tokens]


@pytest.mark.parametrize(
    ("table", "places"), [("plan", [0, 4, 2, 1, 5, 3]), ("search", [0, 1, 2, 3, 4, 5])]
)
def test_samples_that_take_a_trace_s_lengths_in_order_take_rows_of_their_own(
    tmp_path: Path, table: Literal["plan", "search"], places: list[int]
) -> None:
    """Six samples of 100 rows each share none of 600, at any rate; longer ones begin as they do.

    Else every seed would bring the same lengths, and no bound would hold what others would do.
    """
    base = of_rows(tmp_path, 600)
    traffic = Traffic(base, tmp_path, "x.toml", 100, 4, 0.1, table, most_samples=6)
    for index, place in enumerate(places):
        for rate in (None, 9.0):
            rows = rows_of(traffic.sample(base, index, rate), tmp_path)
            assert rows == list(range(100 * place, 100 * place + 100))
        longer = rows_of(traffic.sample(base, index, 9.0, 2), tmp_path)
        assert longer == [(100 * place + row) % 600 for row in range(200)]
    assert traffic.sample(base, 0).workload.first_trace_row is None
    later = of_rows(tmp_path, 600, first_trace_row=550)
    traffic = replace(traffic, scenario=later)
    assert rows_of(traffic.sample(later, 1), tmp_path)[0] == (550 + 100 * places[1]) % 600


def test_a_whole_workload_that_changes_takes_rows_of_its_own_too(tmp_path: Path) -> None:
    base = of_rows(tmp_path, 600, arrivals=SCHEDULE)
    traffic = Traffic(base, tmp_path, "x.toml", 100, 4, 0.1, "search", most_samples=3)
    firsts = [rows_of(traffic.sample(base, index), tmp_path)[0] for index in range(3)]
    assert firsts == [0, 200, 400]


def test_samples_share_rows_where_the_trace_is_too_short_for_all_of_them(tmp_path: Path) -> None:
    """Of six places the first three are two apart; one sample shares rows once it wraps around."""
    base = of_rows(tmp_path, 600)
    traffic = Traffic(base, tmp_path, "x.toml", 100, 4, 0.1, most_samples=6)
    for num_samples, apart in ((1, 600), (3, 200), (6, 100)):
        assert not traffic.share_rows(apart, num_samples)
        assert traffic.share_rows(apart + 1, num_samples)
    repeated = of_rows(tmp_path, 600, trace={"file": "rows.jsonl", "repeat": 9})
    assert replace(traffic, scenario=repeated).num_rows == 600
    for more in ({"trace_rows": "random"}, {"arrivals": {"kind": "trace"}}):
        other = replace(traffic, scenario=of_rows(tmp_path, 600, **more))
        assert other.num_rows is None and not other.share_rows(10_000, 6)


def test_a_closed_loop_has_no_rate_to_search(tmp_path: Path) -> None:
    closed = scenario(
        tmp_path,
        workload={
            "num_requests": 50,
            "arrivals": {"kind": "closed", "num_users": 2, "think_s": 1.0},
            "prompt": {"kind": "constant", "tokens": 50},
            "output": {"kind": "constant", "tokens": 20},
        },
    )
    with pytest.raises(InputError, match="A closed loop has no rate"):
        Traffic(closed, tmp_path, "x.toml", 100, 4, 0.1)
