"""Studies ask for points and get figures; many are carried out at once by the same workers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from helios_sim.errors import InputError
from helios_sim.search.executors import Workers, is_death
from helios_sim.search.points import Figures, OtherCode, Point, code_hash, run_for
from helios_sim.search.store import Store

T = TypeVar("T")

Outcome: TypeAlias = Figures | InputError
"""What becomes of a point: figures, or why it cannot run."""

Steps: TypeAlias = Generator[Sequence[Point], list[Outcome], T]
"""A study: yields the points it needs next, is sent their outcomes in that order, returns."""


@dataclass(frozen=True)
class Study(Generic[T]):
    """A study, with a guess at the number of points it will ask for."""

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
    def is_answered(self) -> bool:
        """Whether the outcomes of all that it asked for are here."""
        return len(self.outcomes) == len(self.asked)

    @property
    def answers(self) -> list[Outcome]:
        """The outcomes in the order of asking."""
        return [self.outcomes[place] for place in range(len(self.asked))]

    @property
    def expected(self) -> int:
        """Points in all, as far as one can tell."""
        if self.ended:
            return self.num_points
        return max(self.study.expected_points, self.num_points)


class _Desk(Generic[T]):
    """Studies under way and the points that they wait for: each runs once, however many ask."""

    def __init__(self, studies: Sequence[Study[T]], workers: Workers, store: Store) -> None:
        self._workers, self._store = workers, store
        self._courses = [_Course(study) for study in studies]
        self._waiting: dict[str, list[tuple[_Course[T], int]]] = {}
        self._pending: deque[Point] = deque()
        self._running: dict[Future[Any], str] = {}
        self._num_run = 0
        self._started_s = time.monotonic()
        for course in self._courses:
            self._move(course, None)

    @property
    def is_busy(self) -> bool:
        """Whether points are still to come."""
        return bool(self._pending or self._running)

    @property
    def standing(self) -> Standing:
        """How far the studies are."""
        expected = sum(course.expected for course in self._courses)
        asked = sum(course.num_points for course in self._courses)
        known = asked - sum(map(len, self._waiting.values()))
        left = max(expected - known, len(self._waiting))
        return Standing(self._num_run, self._num_run + left, time.monotonic() - self._started_s)

    @property
    def results(self) -> list[T]:
        """What the studies returned, once all have ended."""
        return [course.result for course in self._courses]  # type: ignore[misc]

    def submit_some(self) -> None:
        """Give the workers as many points as they take."""
        while self._pending and len(self._running) < self._workers.max_in_flight:
            point = self._pending.popleft()
            self._running[_submit(self._workers, point, self._store)] = point.key

    def collect(self) -> Iterator[Standing]:
        """Wait until points are finished, and hand each one's outcome to the studies."""
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        for future in done:
            key = self._running.pop(future)
            self._num_run += 1
            self._answer(key, _outcome(future, key, self._store))
            yield self.standing

    def cancel(self) -> None:
        """Call back the points that no worker has begun."""
        for future in self._running:
            future.cancel()

    def _move(self, course: _Course[T], outcomes: list[Outcome] | None) -> None:
        """Step a study for as long as all it asks for is known; then ask for what is not."""
        while True:
            course.step(outcomes)
            if course.ended:
                return
            for place, point in enumerate(course.asked):
                found = self._store.get(point.key)
                if found is not None:
                    course.outcomes[place] = found
            if not course.is_answered:
                break
            outcomes = course.answers
        for place, point in enumerate(course.asked):
            if place in course.outcomes:
                continue
            if point.key not in self._waiting:
                self._pending.append(point)
            self._waiting.setdefault(point.key, []).append((course, place))

    def _answer(self, key: str, outcome: Outcome) -> None:
        """Give an outcome to all who wait for it, and move on those that wait for no other."""
        ready: list[_Course[T]] = []
        for course, place in self._waiting.pop(key):
            course.outcomes[place] = outcome
            if course.is_answered:
                ready.append(course)
        for course in ready:
            self._move(course, course.answers)


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
    desk = _Desk(studies, workers, store)
    tell = on_point or (lambda _standing: None)
    tell(desk.standing)
    try:
        while desk.is_busy:
            desk.submit_some()
            for standing in desk.collect():
                tell(standing)
    except BaseException:
        desk.cancel()
        raise
    return desk.results


def _submit(workers: Workers, point: Point, store: Store) -> Future[Figures]:
    try:
        return workers.executor.submit(run_for, code_hash(), point)
    except Exception as error:
        if is_death(error):
            raise _worker_died(store, error) from error
        raise


def _outcome(future: Future[Figures], key: str, store: Store) -> Outcome:
    try:
        figures = future.result()
    except InputError as error:
        return error
    except OtherCode as error:
        raise InputError(
            "A worker runs another version of this program than the command, so that its figures "
            f"may be others. {store.kept()} Begin the workers anew with this version, and run the "
            "command again with --resume.",
            "search",
        ) from error
    except Exception as error:
        if is_death(error):
            raise _worker_died(store, error) from error
        raise
    return store.put(key, figures)


def _worker_died(store: Store, error: BaseException) -> InputError:
    words = f" ({error})" if str(error) and type(error).__name__ == "KilledWorker" else ""
    return InputError(
        f"A worker died{words}, perhaps for lack of memory. {store.kept()} Run the command again "
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
