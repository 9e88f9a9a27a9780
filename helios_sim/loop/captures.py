"""CUDA graphs that an iteration wants and that are not there: captured in it, and charged."""

from __future__ import annotations

from typing import Any

from helios_sim import cost
from helios_sim.loop.compiled import compiled
from helios_sim.loop.state import EMBEDS, FILLS, RUNS, TELLS, World


@compiled
def take_graph(w: World, r: int, rep: Any, kind: int, level: int, rows: float) -> int:
    """1 where a graph has to be captured, which is there from now on; 0 where there is none to."""
    if rows > w.graph_rows[rep.model] or w.captured[r, kind, level, int(rows)] != 0:
        return 0
    w.captured[r, kind, level, int(rows)] = 1
    return 1


@compiled
def capture(
    w: World,
    r: int,
    rep: Any,
    passed: int,
    asked: int,
    stops_at: int,
    rows: float,
    filled_rows: float,
) -> tuple[int, float]:
    """Capture the graphs that a decode wants and that are not there; how many, in what seconds.

    It embeds unless exits were `passed`, runs to the level `stops_at` by way of all before it, asks
    the levels from `asked` on, and fills the KV beyond for `filled_rows`.
    """
    if w.graph_rows[rep.model] == 0:
        return 0, 0.0
    graphs = 0
    exits = 0
    ran_layers = 0
    filled_layers = 0
    if passed == 0:
        graphs += take_graph(w, r, rep, EMBEDS, 0, rows)
    for level in range(passed, rep.level + 1):
        layers = w.exit_layers[rep.model, level]
        if level > 0:
            layers -= w.exit_layers[rep.model, level - 1]
        if level <= stops_at:
            new = take_graph(w, r, rep, RUNS, level, rows)
            graphs += new
            ran_layers += new * layers
            if level >= asked:
                exits += take_graph(w, r, rep, TELLS, level, rows)
        elif filled_rows > 0.0:
            new = take_graph(w, r, rep, FILLS, level, filled_rows)
            graphs += new
            filled_layers += new * layers
    seconds = cost.capture_seconds(
        w.coefficients[rep.model],
        float(graphs),
        float(exits),
        float(ran_layers),
        float(filled_layers),
    )
    return graphs + exits, seconds
