"""What is not beaten in every respect: fronts, and the points that give up least."""

from __future__ import annotations

from collections.abc import Sequence

Costs = Sequence[float]
"""One number an objective, lower is better."""


def dominates(a: Costs, b: Costs) -> bool:
    """Whether `a` is nowhere worse than `b` and somewhere better."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(
        x < y for x, y in zip(a, b, strict=True)
    )


def front(points: Sequence[Costs]) -> list[int]:
    """Places of the points that no other dominates, in their order."""
    return [
        place
        for place, point in enumerate(points)
        if not any(dominates(other, point) for other in points)
    ]


def ranks(points: Sequence[Costs]) -> list[int]:
    """For each point the number of the front it is on: 0 for the first, peeled one by one."""
    found = [0] * len(points)
    left = list(range(len(points)))
    rank = 0
    while left:
        on = {left[place] for place in front([points[place] for place in left])}
        for place in on:
            found[place] = rank
        left = [place for place in left if place not in on]
        rank += 1
    return found


def best_first(points: Sequence[Costs], most: int) -> list[int]:
    """Places of so many points: front by front, on one from where it gives up least on."""
    if points and len(points[0]) == 1:
        return sorted(range(len(points)), key=lambda place: (points[place][0], place))[:most]
    found: list[int] = []
    left = list(range(len(points)))
    while left and len(found) < most:
        on = [left[place] for place in front([points[place] for place in left])]
        left = [place for place in left if place not in on]
        found += [on[place] for place in _from_knee([points[place] for place in on])]
    return found[:most]


def _from_knee(points: Sequence[Costs]) -> list[int]:
    """Places, the nearest to the best of every objective first, each scaled to its spread."""
    low = [min(column) for column in zip(*points, strict=True)]
    high = [max(column) for column in zip(*points, strict=True)]

    def distance(point: Costs) -> float:
        return sum(
            ((x - least) / (most - least)) ** 2 if most > least else 0.0
            for x, least, most in zip(point, low, high, strict=True)
        )

    return sorted(range(len(points)), key=lambda place: (distance(points[place]), place))
