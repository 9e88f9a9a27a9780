"""Who proposes trials: a grid, a Sobol sequence, or Optuna's TPE and NSGA-II by ask and tell."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from helios_sim.errors import InputError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

    from helios_sim.search.space import Range, Space

Values = dict[str, Any]
"""A setting for each range, by its key."""

MAX_GRID: Final = 100_000
VIOLATIONS: Final = "violations"


class Sampler(Protocol):
    """Proposes settings in batches, and learns what became of them in the order of asking."""

    def propose(self, num: int) -> list[Values]:
        """The next settings, at most so many; fewer where there are no more."""
        ...

    def learn(self, scores: Sequence[Sequence[float] | None], violations: Sequence[float]) -> None:
        """What the last proposals scored (None where they cannot be), and how much they violate."""
        ...


class Listed:
    """Settings that are known beforehand: nothing is learnt."""

    def __init__(self, values: Iterator[Values]) -> None:
        self._values = values

    def propose(self, num: int) -> list[Values]:
        """The next settings of the list."""
        return list(islice(self._values, num))

    def learn(self, scores: Sequence[Sequence[float] | None], violations: Sequence[float]) -> None:
        """Nothing."""


class OptunaSampler:
    """A study of Optuna, asked for a batch and told of it together.

    The journal is for looking at; nothing is read back from it.
    """

    def __init__(
        self,
        space: Space,
        name: str,
        seed: int,
        batch: int,
        better: Sequence[str],
        journal: Path | None,
    ) -> None:
        optuna = _optuna()
        self._space = space
        with _quietly():
            self._distributions = {one.key: _distribution(one) for one in space.ranges}
            sampler: Any
            if name == "nsga2":
                sampler = optuna.samplers.NSGAIISampler(
                    population_size=max(2, batch), seed=seed, constraints_func=_violations
                )
            else:
                sampler = optuna.samplers.TPESampler(
                    seed=seed, multivariate=True, constant_liar=True, constraints_func=_violations
                )
            self._study = optuna.create_study(
                directions=["maximize" if one == "higher" else "minimize" for one in better],
                sampler=sampler,
                storage=None if journal is None else _journal(journal),
                study_name="helios tune",
            )
        self._asked: list[Trial] = []

    def propose(self, num: int) -> list[Values]:
        """Ask the study."""
        with _quietly():
            self._asked = [self._study.ask(self._distributions) for _ in range(num)]
        return [_values(self._space, trial.params) for trial in self._asked]

    def learn(self, scores: Sequence[Sequence[float] | None], violations: Sequence[float]) -> None:
        """Tell the study."""
        optuna = _optuna()
        with _quietly():
            for trial, score, violation in zip(self._asked, scores, violations, strict=True):
                if score is None:
                    self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
                    continue
                trial.set_user_attr(VIOLATIONS, [violation])
                self._study.tell(trial, list(score))


def make_sampler(
    space: Space,
    name: str,
    seed: int,
    batch: int,
    num_trials: int,
    better: Sequence[str],
    journal: Path | None,
) -> Sampler:
    """The sampler of this name."""
    if name == "grid":
        if space.grid_size > MAX_GRID:
            raise InputError(
                f"The grid has {space.grid_size:,} combinations; at most {MAX_GRID:,} are allowed. "
                "Give fewer points a range, or another sampler.",
                f"{space.where}, search.ranges",
            )
        return Listed(space.grid())
    if name == "sobol":
        shares = sobol_shares(len(space.ranges), num_trials, seed)
        return Listed(space.at(one) for one in shares)
    return OptunaSampler(space, name, seed, batch, better, journal)


def sobol_shares(num_dimensions: int, num: int, seed: int) -> list[Sequence[float]]:
    """The first points of a scrambled Sobol sequence, which covers the cube evenly."""
    from scipy.stats import qmc

    power = max(0, (num - 1).bit_length())
    # Scrambling draws from the generator; its bits are the same on every machine.
    sequence = qmc.Sobol(num_dimensions, scramble=True, rng=np.random.default_rng(seed))
    shares: list[Sequence[float]] = sequence.random_base2(power)[:num].tolist()
    return shares


def _violations(trial: FrozenTrial) -> Sequence[float]:
    given: Sequence[float] = trial.user_attrs.get(VIOLATIONS, [0.0])
    return given


def _distribution(one: Range) -> BaseDistribution:
    distributions = _optuna().distributions
    found: BaseDistribution
    if one.choices:
        # Places stand for choices, which may be lists, and Optuna stores plain values alone.
        found = distributions.CategoricalDistribution(tuple(range(len(one.choices))))
    elif one.is_whole:
        found = distributions.IntDistribution(
            int(one.low), int(one.high), log=one.log, step=int(one.step or 1)
        )
    else:
        found = distributions.FloatDistribution(one.low, one.high, log=one.log, step=one.step)
    return found


def _values(space: Space, params: Mapping[str, Any]) -> Values:
    found: Values = {}
    for one in space.ranges:
        given = params[one.key]
        if one.choices:
            found[one.key] = one.choices[given]
        else:
            found[one.key] = one.fitted(given)
    return found


def _optuna() -> Any:
    import optuna
    import optuna.storages.journal

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _journal(path: Path) -> Any:
    """A fresh journal; what an earlier, perhaps killed, run left is replaced."""
    optuna = _optuna()
    for old in (path, path.with_name(f"{path.name}.lock")):
        old.unlink(missing_ok=True)
    lock = optuna.storages.journal.JournalFileOpenLock(str(path))
    backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=lock)
    return optuna.storages.JournalStorage(backend)


@contextmanager
def _quietly() -> Iterator[None]:
    """Optuna warns of features that are new, and of steps that miss an end: both are on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
