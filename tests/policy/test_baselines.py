"""What each baseline does, event by event."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from helios_sim.errors import InputError
from helios_sim.policy import make_policy
from helios_sim.policy.contract import (
    Decision,
    Evaluate,
    Event,
    ExitMode,
    Keep,
    LoadLayers,
    Serve,
    Slo,
    Switch,
    Watching,
)
from helios_sim.policy.contract_suite import ScriptedHost, example_candidates

SMALL, LARGE, MIDDLE, OTHER = example_candidates()
PAIR = (SMALL, LARGE)
PARTIAL = ExitMode.LOADED_DEPTH


def told(use: str, options: dict[str, Any] | None = None, num_cycles: int = 3) -> list[Decision]:
    """The decisions of a walk over the pair, without their reasons."""
    host = ScriptedHost(make_policy(use, options), PAIR)
    return [replace(decision, reason="") for decision, _ in host.walk(num_cycles)]


def test_vanilla_serves_the_largest_model_at_full_depth_without_exits() -> None:
    """One decision, and it asks never to be asked again."""
    assert told("vanilla") == [Serve(LARGE.name, 32, ExitMode.FULL, "")]
    assert told("vanilla", {"model": SMALL.name}) == [Serve(SMALL.name, 24, ExitMode.FULL, "")]
    assert make_policy("vanilla").watching == Watching()


def test_the_default_model_is_the_largest_that_fits() -> None:
    """A larger model with no room for a request is passed over."""
    too_big = replace(LARGE, batch_limit=(9, 1, 0))
    decision, _ = ScriptedHost(make_policy("vanilla"), (SMALL, too_big)).ask(Event.START)
    assert isinstance(decision, Serve)
    assert decision.model == SMALL.name


def test_the_default_model_is_the_one_of_most_weights_in_all() -> None:
    """9 of 10 GB by the first exit are more than 5.2 of 14.4."""
    front = replace(SMALL, weight_bytes=(9 * 10**9, 9 * 10**9, 10**10))
    decision, _ = ScriptedHost(make_policy("vanilla"), (front, LARGE)).ask(Event.START)
    assert decision == Serve(LARGE.name, 32, ExitMode.FULL, decision.reason)


def test_who_evaluates_nothing_needs_room_for_what_it_loads_alone() -> None:
    """A full depth without room keeps out those who may come to load it, and nobody else."""
    too_big = replace(LARGE, batch_limit=(9, 1, 0))
    for use, options, depth in (
        ("static-depth", {}, 9),
        ("static-depth", {"depth": 17}, 17),
        ("always", {}, 9),
    ):
        decision, _ = ScriptedHost(make_policy(use, options), (too_big,)).ask(Event.START)
        assert decision == Serve(LARGE.name, depth, PARTIAL, decision.reason)
    for use, options, where in (
        ("static-depth", {"depth": 32}, "the depth to be loaded"),
        ("vanilla", {}, "full depth"),
        ("clairvoyant", {}, "full depth"),
        ("helios", {}, "full depth"),
    ):
        with pytest.raises(InputError, match=f"typical length at {where}; at least one must"):
            ScriptedHost(make_policy(use, options), (too_big,)).ask(Event.START)


@pytest.mark.parametrize("mode", ["solo", "wait", "rebatch"])
def test_ee_single_serves_all_layers_in_the_named_mode(mode: str) -> None:
    """The EE-LLM way and its two batched relatives."""
    assert told("ee-single", {"exit_mode": mode}) == [Serve(LARGE.name, 32, ExitMode(mode), "")]


def test_static_depth_serves_one_depth_the_shallowest_unless_told() -> None:
    """9 of 32 layers by default; another exit by name; what is no exit is refused."""
    assert told("static-depth") == [Serve(LARGE.name, 9, PARTIAL, "")]
    options = {"model": SMALL.name, "depth": 12}
    assert told("static-depth", options) == [Serve(SMALL.name, 12, PARTIAL, "")]
    with pytest.raises(InputError, match=r"'depth' was given 10; .* one of \[9, 17, 32\]"):
        told("static-depth", {"depth": 10})


@pytest.mark.parametrize("use", ["vanilla", "ee-single", "static-depth"])
def test_a_model_that_is_no_candidate_is_refused_with_the_nearest(use: str) -> None:
    """The sentence lists the candidates and suggests one."""
    with pytest.raises(InputError, match=r"'opt-6.7b'\. Did you mean 'opt-6.7b'\?"):
        told(use, {"model": "opt-67b"})


def test_switch_only_and_load_only_answer_breaches_in_one_way() -> None:
    """HELIOS otherwise: they evaluate and reassess alike."""
    reactions = {
        use: {type(d) for d in told(use)} for use in ("helios", "switch-only", "load-only")
    }
    assert reactions["switch-only"] == {Evaluate, Serve, Switch}
    assert reactions["load-only"] == {Evaluate, Serve, LoadLayers}


def test_never_evaluates_once_and_keeps_its_choice() -> None:
    """The first round of HELIOS, then nothing, whatever it is asked."""
    host = ScriptedHost(make_policy("never"), PAIR)
    kinds = [type(decision) for decision, _ in host.walk()]
    assert kinds == [Evaluate, Evaluate, Serve]
    for event in (Event.BREACHED, Event.REASSESS):
        decision, _ = host.ask(event)
        assert isinstance(decision, Keep)


def test_always_switches_to_the_next_candidate_at_every_reassessment() -> None:
    """Round and round at the shallowest exits, with nothing evaluated."""
    assert told("always") == [
        Serve(SMALL.name, 6, PARTIAL, ""),
        Switch(LARGE.name, 9, PARTIAL, ""),
        Switch(SMALL.name, 6, PARTIAL, ""),
        Switch(LARGE.name, 9, PARTIAL, ""),
    ]
    alone = ScriptedHost(make_policy("always"), (SMALL,))
    assert [type(d) for d, _ in alone.walk(1)] == [Serve, Keep]


def test_always_goes_round_among_models_of_one_tokenizer() -> None:
    host = ScriptedHost(make_policy("always"), (SMALL, LARGE, OTHER))
    served = [decision.model for decision, _ in host.walk(3)]  # type: ignore[union-attr]
    assert served == [SMALL.name, LARGE.name, SMALL.name, LARGE.name]


def test_clairvoyant_follows_the_coming_exits_without_evaluating() -> None:
    """At batch 1 it goes where the dominant coming exit takes the fewest milliseconds."""
    first, second, third = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
    host = ScriptedHost(make_policy("clairvoyant"), PAIR, max_batch=1)
    script = [
        (Event.START, first, first),
        (Event.REASSESS, second, first),
        (Event.REASSESS, second, first),
        (Event.REASSESS, third, second),
        (Event.REASSESS, third, first),
        (Event.REASSESS, second, second),
    ]
    decisions = []
    for event, small, large in script:
        decision, _ = host.ask(event, foresight={SMALL.name: small, LARGE.name: large})
        decisions.append(replace(decision, reason=""))
    assert decisions == [
        Serve(SMALL.name, 6, PARTIAL, ""),
        Switch(LARGE.name, 9, PARTIAL, ""),
        Keep(""),
        LoadLayers(17, PARTIAL, ""),
        Serve(LARGE.name, 9, PARTIAL, ""),
        Switch(SMALL.name, 12, PARTIAL, ""),
    ]


def test_of_equal_candidates_the_clairvoyant_takes_the_first_by_name() -> None:
    """Two names of one model, whose coming tokens leave alike."""
    twin = replace(SMALL, name="opt-1.3b-again")
    coming = {SMALL.name: (1.0, 0.0, 0.0), twin.name: (1.0, 0.0, 0.0)}
    for candidates in ((twin, SMALL), (SMALL, twin)):
        host = ScriptedHost(make_policy("clairvoyant"), candidates, max_batch=1)
        decision, _ = host.ask(Event.START, foresight=coming)
        assert replace(decision, reason="") == Serve(SMALL.name, 6, PARTIAL, "")


def test_the_clairvoyant_takes_a_model_that_keeps_the_slo_at_the_depth_it_would_load() -> None:
    """Both do at their shallowest exit; the larger one not where its coming tokens leave."""
    coming = {SMALL.name: (1.0, 0.0, 0.0), LARGE.name: (0.0, 0.0, 1.0)}
    slo = Slo(tpot_s=LARGE.decode_iteration_s[0][0])
    policy = make_policy("clairvoyant", {"objective": "quality"})
    decision, _ = ScriptedHost(policy, PAIR).ask(Event.START, foresight=coming)
    assert replace(decision, reason="") == Serve(LARGE.name, 32, PARTIAL, "")
    decision, _ = ScriptedHost(policy, PAIR, slo=slo).ask(Event.START, foresight=coming)
    assert replace(decision, reason="") == Serve(SMALL.name, 6, PARTIAL, "")
    assert "SLO" not in decision.reason


def test_the_clairvoyant_takes_the_tokenizer_of_the_models_that_may_keep_the_slo() -> None:
    """Two models take 6 and 9 ms an iteration at the least; the lone one of another 4 ms."""
    coming = {SMALL.name: (1.0, 0.0, 0.0), LARGE.name: (1.0, 0.0, 0.0), OTHER.name: (1.0, 0.0, 0.0)}
    for slo, served in (
        (Slo(tpot_s=0.007), Serve(SMALL.name, 6, PARTIAL, "")),
        (Slo(tpot_s=0.005), Serve(OTHER.name, 4, PARTIAL, "")),
    ):
        host = ScriptedHost(make_policy("clairvoyant"), (SMALL, LARGE, OTHER), slo=slo)
        decision, _ = host.ask(Event.START, foresight=coming)
        assert replace(decision, reason="") == served


def test_where_no_model_keeps_the_slo_the_clairvoyant_compares_them_at_their_depths() -> None:
    """The one that leads at its shallowest exit does not where its coming tokens leave."""
    coming = {SMALL.name: (0.0, 0.0, 1.0), LARGE.name: (1.0, 0.0, 0.0)}
    host = ScriptedHost(make_policy("clairvoyant"), PAIR, max_batch=1, slo=Slo(tpot_s=1e-6))
    decision, _ = host.ask(Event.START, foresight=coming)
    assert replace(decision, reason="") == Serve(LARGE.name, 9, PARTIAL, "")
    assert "No candidate keeps the SLO at its depth." in decision.reason
