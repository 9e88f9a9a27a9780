"""A policy of one's own: HELIOS, with a hot rule that lets at most two requests run at once."""

from __future__ import annotations

from typing import ClassVar

from helios_sim.policy.helios import Helios

LIMIT = 2


def may_join(
    num_running: int,
    max_batch: int,
    needed_blocks: int,
    free_blocks: int,
    watermark_blocks: int,
) -> bool:
    """As the shipped rule, with a smaller batch."""
    if num_running >= min(max_batch, LIMIT):
        return False
    if num_running == 0:
        return needed_blocks <= free_blocks
    return needed_blocks + watermark_blocks <= free_blocks


class AtMostTwo(Helios):
    """HELIOS with a batch of two."""

    hot_rules: ClassVar = {"may_join": may_join}
