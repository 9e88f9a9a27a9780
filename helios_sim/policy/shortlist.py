"""The shortlist: the TopK candidates that the hardware and the service level objectives admit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from helios_sim.errors import InputError, listed
from helios_sim.policy.contract import Candidate, Objective, Slo
from helios_sim.policy.objective import meets_slo, score


@dataclass(frozen=True)
class Shortlist:
    """Candidates worth evaluating, best first, and the sentence that says how they were found."""

    candidates: tuple[Candidate, ...]
    reason: str


def deepest(candidate: Candidate) -> int:
    """The exit level of full depth."""
    return len(candidate.exit_layers) - 1


def shallowest(candidate: Candidate) -> int:
    """The exit level of the fewest layers."""
    return 0


class NothingFits(InputError):
    """No candidate leaves room for a typical request at the exit level that it needs."""

    def __init__(
        self,
        message: str,
        where: str | None = None,
        level_of: Callable[[Candidate], int] = deepest,
    ) -> None:
        super().__init__(message, where)
        self.level_of = level_of


def fitting(
    candidates: Sequence[Candidate], level_of: Callable[[Candidate], int] = deepest
) -> tuple[Candidate, ...]:
    """The candidates whose weights, up to an exit level, leave room for a typical request.

    Who evaluates candidates, or may load more of them, needs full depth to fit.
    """
    fit = tuple(c for c in candidates if c.batch_limit[level_of(c)] >= 1)
    if not fit:
        where = "full depth" if level_of is deepest else "the depth to be loaded"
        raise NothingFits(
            f"None of the models {listed(c.name for c in candidates)} fits in memory with one "
            f"request of the workload's typical length at {where}; at least one must.",
            level_of=level_of,
        )
    return fit


def sharing_a_tokenizer(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The largest group with one tokenizer, so that perplexities compare; ties by its name."""
    sizes: dict[str, int] = {}
    for candidate in candidates:
        sizes[candidate.tokenizer] = sizes.get(candidate.tokenizer, 0) + 1
    chosen = min(sizes, key=lambda tokenizer: (-sizes[tokenizer], tokenizer))
    return tuple(c for c in candidates if c.tokenizer == chosen)


def ranked(
    candidates: Sequence[Candidate], objective: Objective, max_batch: int
) -> tuple[Candidate, ...]:
    """Candidates by the objective at their shallowest exit, from the card alone; ties by name.

    A card says nothing about quality: there the larger model comes first.
    """

    def rank(candidate: Candidate) -> tuple[float, str]:
        if objective == "quality":
            return -float(candidate.weight_bytes[-1]), candidate.name
        return -score(objective, candidate, 0, None, max_batch), candidate.name

    return tuple(sorted(candidates, key=rank))


def make_shortlist(
    candidates: Sequence[Candidate], slo: Slo, objective: Objective, max_batch: int, top_k: int
) -> Shortlist:
    """Memory, then SLO, then one tokenizer, then the best `top_k`.

    History plays no part, so the shortlist changes only with the hardware or the SLO. Where no
    candidate keeps the SLO the best by objective is taken all the same.
    """
    fit = fitting(candidates)
    within = [c for c in fit if meets_slo(c, 0, None, slo)]
    if not within:
        best = ranked(fit, objective, max_batch)[:1]
        return Shortlist(
            best, f"no candidate meets the SLO, {best[0].name} is best for {objective}"
        )
    best = ranked(sharing_a_tokenizer(within), objective, max_batch)[:top_k]
    return Shortlist(
        best, f"{len(best)} of {len(candidates)} candidates shortlisted for {objective}"
    )
