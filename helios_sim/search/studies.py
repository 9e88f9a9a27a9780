"""Studies ask for points and get figures; many are carried out at once by the same workers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from helios_sim.errors import InputError
from helios_sim.search.executors import Workers, is_death
from helios_sim.search.points import Figures, Point, run_point
from helios_sim.search.store import Store

T = TypeVar("T")

Outcome: TypeAlias = Figures | InputError
"""What becomes of a point: figures, or why it cannot run."""

Steps: TypeAlias = Generator[Sequence[Point], list[Outcome], T]
"""A study: yields the points it needs next, is sent their outcomes in that order, returns."""


@dataclass(frozen=True)
class Study(Generic[T]):
    """A study under a name, with a guess at the number of points it will ask for."""

    name: str
    steps: Steps[T]
    expected_points: int


@dataclass(frozen=True)
class Standing:
    """How far studies are: for a bar and a time."""

    num_done: int
    num_expected: int
    elapsed_s: float

    @property
    def left_s(self) -> float | None:
        """An estimate of the seconds left; None while nothing is known."""
        if not self.num_done:
            return None
        share = self.num_done / max(self.num_done, self.num_expected)
        return self.elapsed_s * (1.0 - share) / share


OnPoint = Callable[[Standing], None]


class _Course(Generic[T]):
    """A study under way: what it waits for and what it got."""

    def __init__(self, study: Study[T]) -> None:
        self.study = study
        self.asked: Sequence[Point] = ()
        self.outcomes: dict[int, Outcome] = {}
        self.num_points = 0
        self.result: T | None = None
        self.ended = False

    def step(self, outcomes: list[Outcome] | None) -> None:
        """Let the study ask for its next points, or end."""
        try:
            if outcomes is None:
                self.asked = next(self.study.steps)
            else:
                self.asked = self.study.steps.send(outcomes)
        except StopIteration as end:
            self.result, self.ended = end.value, True
            return
        self.outcomes = {}
        self.num_points += len(self.asked)

    @property
    def expected(self) -> int:
        """Points in all, as far as one can tell."""
        if self.ended:
            return self.num_points
        return max(self.study.expected_points, self.num_points)


def carry_out(
    studies: Sequence[Study[T]],
    workers: Workers,
    store: Store,
    on_point: OnPoint | None = None,
) -> list[T]:
    """The results of studies, in their order; each study moves on as soon as it is answered.

    A study sees its own points alone, so neither the number of workers nor the order in which
    they finish changes any result. Finished points are kept as they come.
    """
    courses = [_Course(study) for study in studies]
    waiting: dict[str, list[tuple[_Course[T], int]]] = {}
    pending: deque[Point] = deque()
    running: dict[Future[Any], str] = {}
    started_s = time.monotonic()
    num_run = 0

    def tell() -> None:
        if on_point is not None:
            expected = sum(course.expected for course in courses)
            known = sum(course.num_points for course in courses) - sum(map(len, waiting.values()))
            left = max(expected - known, len(waiting))
            on_point(Standing(num_run, num_run + left, time.monotonic() - started_s))

    def move(course: _Course[T], outcomes: list[Outcome] | None) -> None:
        """Step a study for as long as all it asks for is known; then run what is not."""
        while True:
            course.step(outcomes)
            if course.ended:
                return
            for place, point in enumerate(course.asked):
                found = store.get(point.key)
                if found is not None:
                    course.outcomes[place] = found
            if len(course.outcomes) == len(course.asked):
                outcomes = [course.outcomes[place] for place in range(len(course.asked))]
                continue
            for place, point in enumerate(course.asked):
                if place in course.outcomes:
                    continue
                if point.key not in waiting:
                    pending.append(point)
                waiting.setdefault(point.key, []).append((course, place))
            return

    def answer(key: str, outcome: Outcome) -> None:
        ready: list[_Course[T]] = []
        for course, place in waiting.pop(key):
            course.outcomes[place] = outcome
            if len(course.outcomes) == len(course.asked):
                ready.append(course)
        for course in ready:
            move(course, [course.outcomes[place] for place in range(len(course.asked))])

    for course in courses:
        move(course, None)
    tell()
    try:
        while pending or running:
            while pending and len(running) < workers.max_in_flight:
                point = pending.popleft()
                running[_submit(workers, point, store)] = point.key
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                key = running.pop(future)
                num_run += 1
                answer(key, _outcome(future, key, store))
                tell()
    except BaseException:
        for future in running:
            future.cancel()
        raise
    return [course.result for course in courses]  # type: ignore[misc]


def _submit(workers: Workers, point: Point, store: Store) -> Future[Figures]:
    try:
        return workers.executor.submit(run_point, point)
    except Exception as error:
        if is_death(error):
            raise _worker_died(store, error) from error
        raise


def _outcome(future: Future[Figures], key: str, store: Store) -> Outcome:
    try:
        figures = future.result()
    except InputError as error:
        return error
    except Exception as error:
        if is_death(error):
            raise _worker_died(store, error) from error
        raise
    return store.put(key, figures)


def _worker_died(store: Store, error: BaseException) -> InputError:
    words = f" ({error})" if str(error) and type(error).__name__ == "KilledWorker" else ""
    return InputError(
        f"A worker died{words}, perhaps for lack of memory. {store.kept()} Give the command again "
        "with --resume, with fewer --processes or shorter runs.",
        "search",
    )


def figures_of(outcomes: Sequence[Outcome]) -> list[Figures]:
    """The figures of outcomes; the first that could not run raises its error."""
    found = []
    for outcome in outcomes:
        if isinstance(outcome, InputError):
            raise outcome
        found.append(outcome)
    return found
