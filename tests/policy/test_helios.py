"""HELIOS by pencil: its algorithm as a script, its depths, its overheads, its scores."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from helios_sim.errors import InputError
from helios_sim.policy.contract import (
    Assignment,
    Candidate,
    Decision,
    Evaluate,
    Event,
    ExitMode,
    Keep,
    LoadLayers,
    Pace,
    Serve,
    Slo,
    Snapshot,
    Switch,
    Telemetry,
    Watching,
)
from helios_sim.policy.contract_suite import (
    ScriptedHost,
    example_candidates,
    example_evaluation,
)
from helios_sim.policy.depth import dominant_level, fixed_level, greedy_level, quantile_level
from helios_sim.policy.helios import Helios, HeliosSettings
from helios_sim.policy.history import exit_shares, mean_executed_layers
from helios_sim.policy.objective import (
    interpolate,
    meets_slo,
    predicted_token_j,
    predicted_tpot_s,
    score,
    slowdown,
)
from helios_sim.policy.overhead import iteration_shares, overhead_of_load, overhead_of_switch
from helios_sim.policy.shortlist import make_shortlist

SMALL, LARGE, MIDDLE, OTHER = example_candidates()
PAIR = (SMALL, LARGE)

# Published exit histograms in per mille of the tokens.
SMALL_EXITS = (730, 47, 223)
LARGE_EXITS = (736, 48, 216)
EVALUATIONS = {
    SMALL.name: example_evaluation(SMALL, SMALL_EXITS, nll_nats=2000.0),
    LARGE.name: example_evaluation(LARGE, LARGE_EXITS, nll_nats=1000.0),
}


def served(model: str, depth: int, exit_mode: ExitMode = ExitMode.LOADED_DEPTH) -> Assignment:
    return Assignment(model, depth, exit_mode)


def snapshot(
    event: Event = Event.BREACHED,
    *,
    assignment: Assignment | None = None,
    candidates: tuple[Candidate, ...] = PAIR,
    evaluations: dict[str, Telemetry] | None = None,
    round_evaluated: tuple[str, ...] = (),
    load_s: dict[str, tuple[float, ...]] | None = None,
    expected_tokens: float = 1000.0,
    max_batch: int = 1,
    num_waiting: int = 0,
    slo: Slo | None = None,
) -> Snapshot:
    known = EVALUATIONS if evaluations is None else evaluations
    return Snapshot(
        now_s=1.0,
        event=event,
        assignment=assignment,
        telemetry=None,
        candidates=candidates,
        history={c.name: (known[c.name],) if c.name in known else () for c in candidates},
        round_evaluated=round_evaluated,
        load_s=load_s or {c.name: (0.0,) * len(c.exit_layers) for c in candidates},
        num_waiting=num_waiting,
        num_running=1,
        max_batch=max_batch,
        expected_tokens=expected_tokens,
        slo=slo or Slo(),
    )


def transfers(small: tuple[float, ...], large: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
    return {SMALL.name: small, LARGE.name: large}


class TestAlgorithm:
    """The sentence of the algorithm, event by event."""

    def test_a_run_reads_as_the_paper_tells_it(self) -> None:
        """Shortlist, evaluate each, serve greedily, react to breaches, reassess, serve again."""
        host = ScriptedHost(Helios(), PAIR, max_batch=1)
        told: list[tuple[str, Decision]] = []

        def ask(event: Event, evaluated: str | None = None) -> None:
            telemetry = EVALUATIONS[evaluated] if evaluated else None
            decision, _ = host.ask(event, telemetry)
            told.append((str(event), replace(decision, reason="")))

        def evaluate(model: str) -> Evaluate:
            return Evaluate(model, 5, ExitMode.WAIT, "")

        ask(Event.START)
        ask(Event.EVALUATED, SMALL.name)
        ask(Event.EVALUATED, LARGE.name)
        ask(Event.BREACHED)
        ask(Event.REASSESS)
        ask(Event.EVALUATED, LARGE.name)
        ask(Event.EVALUATED, SMALL.name)
        assert told == [
            ("start", evaluate(SMALL.name)),
            ("evaluated", evaluate(LARGE.name)),
            ("evaluated", Serve(SMALL.name, 6, ExitMode.LOADED_DEPTH, "")),
            ("breached", Switch(LARGE.name, 9, ExitMode.LOADED_DEPTH, "")),
            ("reassess", evaluate(LARGE.name)),
            ("evaluated", evaluate(SMALL.name)),
            ("evaluated", Serve(SMALL.name, 6, ExitMode.LOADED_DEPTH, "")),
        ]

    def test_one_candidate_is_evaluated_all_the_same(self) -> None:
        """Its exit histogram is needed for the greedy depth."""
        host = ScriptedHost(Helios(), (SMALL,), max_batch=1)
        first, _ = host.ask(Event.START)
        assert isinstance(first, Evaluate)
        then, _ = host.ask(Event.EVALUATED, EVALUATIONS[SMALL.name])
        assert then == Serve(SMALL.name, 6, ExitMode.LOADED_DEPTH, then.reason)

    def test_without_an_evaluation_at_the_start_the_shallowest_exit_is_served(self) -> None:
        """Nothing is measured yet, so the shortlist's first is loaded to its first exit."""
        policy = Helios(HeliosSettings(evaluate_at_start=False))
        decision = policy.decide(snapshot(Event.START, evaluations={}))
        assert decision == Serve(SMALL.name, 6, ExitMode.LOADED_DEPTH, decision.reason)

    def test_a_fixed_depth_is_served_where_nothing_is_measured_too(self) -> None:
        """It hangs on no histogram."""
        settings = HeliosSettings(evaluate_at_start=False, depth_rule="fixed", fixed_depth=12)
        decision = Helios(settings).decide(snapshot(Event.START, evaluations={}))
        assert decision == Serve(SMALL.name, 12, ExitMode.LOADED_DEPTH, decision.reason)

    def test_an_evaluation_says_which_of_its_round_it_is(self) -> None:
        for done, said in (((), "Evaluation 1 of"), ((SMALL.name,), "Evaluation 2 of")):
            decision = Helios().decide(snapshot(Event.EVALUATED, round_evaluated=done))
            assert decision.reason.startswith(said)

    def test_only_the_best_three_are_evaluated(self) -> None:
        """TopK = 3 of four candidates of one tokenizer, in the order of the objective."""
        fourth = replace(SMALL, name="slow", decode_iteration_s=((0.1,), (0.2,), (0.3,)))
        host = ScriptedHost(Helios(), (fourth, *PAIR, MIDDLE), max_batch=1)
        decisions = [decision for decision, _ in host.round(Event.START)]
        evaluated = [d.model for d in decisions if isinstance(d, Evaluate)]
        assert evaluated == [SMALL.name, MIDDLE.name, LARGE.name]

    def test_the_objective_chooses_whom_to_evaluate(self) -> None:
        """Of a model that takes a ms an iteration and one of less memory, one is evaluated."""
        quick = replace(LARGE, decode_iteration_s=((0.001,),) * 3)
        for objective, winner in (("throughput", quick.name), ("memory", SMALL.name)):
            policy = Helios(HeliosSettings(top_k=1, objective=objective))  # type: ignore[arg-type]
            decision = policy.decide(snapshot(Event.START, candidates=(SMALL, quick)))
            assert decision == Evaluate(winner, 5, ExitMode.WAIT, decision.reason)

    @pytest.mark.parametrize(("max_batch", "winner"), [(1, LARGE), (16, SMALL)])
    def test_whom_to_evaluate_and_to_serve_hangs_on_how_many_may_run_at_once(
        self, max_batch: int, winner: Candidate
    ) -> None:
        """Alone the large one takes 5 ms to the small one's 6, and 16 rows 20 ms to 6."""
        steep = replace(LARGE, batches=(1, 16), decode_iteration_s=((0.005, 0.020),) * 3)
        asked = snapshot(
            Event.START, candidates=(SMALL, steep), evaluations={}, max_batch=max_batch
        )
        first = Helios(HeliosSettings(top_k=1)).decide(asked)
        assert first == Evaluate(winner.name, 5, ExitMode.WAIT, first.reason)
        both = replace(asked, event=Event.EVALUATED, round_evaluated=(SMALL.name, LARGE.name))
        then = Helios().decide(both)
        depth = winner.exit_layers[0]
        assert then == Serve(winner.name, depth, ExitMode.LOADED_DEPTH, then.reason)

    def test_tokens_leave_in_one_mode_when_evaluated_and_in_another_after_loading(self) -> None:
        settings = HeliosSettings(
            evaluation_exit_mode=ExitMode.SOLO, after_load_exit_mode=ExitMode.REBATCH
        )
        first = Helios(settings).decide(snapshot(Event.START))
        assert first == Evaluate(SMALL.name, 5, ExitMode.SOLO, first.reason)
        asked = snapshot(assignment=served(SMALL.name, 6), load_s=transfers((0, 1, 2), (9, 9, 9)))
        then = Helios(settings).decide(asked)
        assert then == LoadLayers(24, ExitMode.REBATCH, then.reason)

    def test_defaults_are_the_published_ones(self) -> None:
        """TopK 3, 5 requests, RI 150, CBCmax 50 in 100 tokens."""
        settings = HeliosSettings()
        assert (settings.top_k, settings.evaluation_requests) == (3, 5)
        assert Helios().watching == Watching(150, 100, 50, "tumbling")
        assert Helios().confidence_threshold is None


class TestDepth:
    """Greedy depth on the published histograms."""

    def test_the_dominant_exit_of_the_opt_pair_is_6_of_24_and_9_of_32(self) -> None:
        """Nearly three quarters of the tokens leave at the first exit of each."""
        assert SMALL.exit_layers[dominant_level(SMALL_EXITS)] == 6
        assert LARGE.exit_layers[dominant_level(LARGE_EXITS)] == 9

    def test_equal_exits_give_the_shallower(self) -> None:
        """A tie costs nothing to break towards fewer layers."""
        assert dominant_level((0.2, 0.4, 0.4)) == 1

    @pytest.mark.parametrize(
        ("quantile", "depth"), [(0.73, 6), (0.731, 12), (0.777, 12), (0.778, 24), (1.0, 24)]
    )
    def test_a_quantile_takes_the_shallowest_exit_that_covers_it(
        self, quantile: float, depth: int
    ) -> None:
        """OPT-1.3B leaves 73.0, 77.7 and 100 % by layers 6, 12 and 24."""
        shares = exit_shares(EVALUATIONS[SMALL.name])
        assert shares is not None
        assert SMALL.exit_layers[quantile_level(shares, quantile)] == depth

    def test_shares_that_add_up_to_the_quantile_on_paper_reach_it(self) -> None:
        """As floats 0.6 and 0.3 are less than 0.9 together."""
        assert 0.6 + 0.3 < 0.9
        assert quantile_level((0.6, 0.3, 0.1), 0.9) == 1

    @pytest.mark.parametrize(("asked", "given"), [(1, 6), (6, 6), (7, 12), (24, 24), (99, 24)])
    def test_a_fixed_depth_takes_the_first_exit_that_reaches_it(
        self, asked: int, given: int
    ) -> None:
        """Seven layers are not an exit of OPT-1.3B, twelve are."""
        assert SMALL.exit_layers[fixed_level(SMALL.exit_layers, asked)] == given

    def test_nothing_measured_gives_the_shallowest_exit(self) -> None:
        """Neither rule has a histogram to look at."""
        assert greedy_level("dominant", None, SMALL.exit_layers, 0.9, None) == 0
        assert greedy_level("quantile", None, SMALL.exit_layers, 0.9, None) == 0

    def test_the_depth_follows_the_last_evaluation(self) -> None:
        """Most tokens left at 6 layers at first, and lately at 24."""
        lately = example_evaluation(SMALL, (100, 0, 900))
        asked = snapshot(Event.EVALUATED, candidates=(SMALL,), round_evaluated=(SMALL.name,))
        history = {SMALL.name: (EVALUATIONS[SMALL.name], lately)}
        decision = Helios().decide(replace(asked, history=history))
        assert decision == Serve(SMALL.name, 24, ExitMode.LOADED_DEPTH, decision.reason)

    def test_mean_executed_layers_are_the_published_ones(self) -> None:
        """10.30 and 14.35 layers a token when each model serves alone."""
        small = mean_executed_layers(EVALUATIONS[SMALL.name])
        large = mean_executed_layers(EVALUATIONS[LARGE.name])
        assert small == pytest.approx(10.296)
        assert large == pytest.approx(14.352)

    def test_tokens_that_prefills_emitted_count_for_no_executed_layers(self) -> None:
        emitted = replace(EVALUATIONS[SMALL.name], num_tokens=2000)
        assert mean_executed_layers(emitted) == pytest.approx(10.296)


class TestOverhead:
    """Load or switch at 1 ms a layer and batch 1; 1,000 tokens are expected."""

    def test_loading_costs_the_transfer_and_the_mean_exit_layer(self) -> None:
        """2 s and 1,000 tokens of 10.296 layers at 1 ms: 2 + 10.296 s."""
        asked = snapshot(load_s=transfers((0, 1, 2), (3, 4, 5)))
        cost = overhead_of_load(SMALL, EVALUATIONS[SMALL.name], ExitMode.WAIT, asked)
        assert cost.transfer_s == 2
        assert cost.serving_s == pytest.approx(10.296)

    def test_switching_costs_the_transfer_and_the_other_ones_depth(self) -> None:
        """3 s and 1,000 tokens of 9 layers at 1 ms: 3 + 9 s."""
        asked = snapshot(load_s=transfers((0, 1, 2), (3, 4, 5)))
        cost = overhead_of_switch(LARGE, 0, EVALUATIONS[LARGE.name], asked)
        assert cost.transfer_s == 3
        assert cost.serving_s == pytest.approx(9.0)

    @pytest.mark.parametrize(("switch_s", "expected"), [(3.29, Switch), (3.30, LoadLayers)])
    def test_the_smaller_expected_overhead_wins(
        self, switch_s: float, expected: type[Decision]
    ) -> None:
        """Loading costs 2 + 10.296 s, so a switch at 9 s of serving may take up to 3.296 s."""
        now = served(SMALL.name, 6)
        asked = snapshot(assignment=now, load_s=transfers((0, 1, 2), (switch_s, 9, 9)))
        decision = Helios().decide(asked)
        assert isinstance(decision, expected)
        if isinstance(decision, LoadLayers):
            assert (decision.depth, decision.exit_mode) == (24, ExitMode.WAIT)
        assert "12.3 s" in decision.reason

    @pytest.mark.parametrize(("switch_s", "expected"), [(1.9, Switch), (2.1, LoadLayers)])
    def test_the_transfer_rule_compares_transfers_alone(
        self, switch_s: float, expected: type[Decision]
    ) -> None:
        """2 s to load the remaining layers are the line."""
        policy = Helios(HeliosSettings(overhead_rule="transfer"))
        now = served(SMALL.name, 6)
        asked = snapshot(assignment=now, load_s=transfers((0, 1, 2), (switch_s, 9, 9)))
        assert isinstance(policy.decide(asked), expected)

    def test_equal_overheads_load_rather_than_switch(self) -> None:
        """Both transfers take 2 s: the model stays."""
        policy = Helios(HeliosSettings(overhead_rule="transfer"))
        now = served(SMALL.name, 6)
        asked = snapshot(assignment=now, load_s=transfers((0, 1, 2), (2, 9, 9)))
        assert isinstance(policy.decide(asked), LoadLayers)

    @pytest.mark.parametrize("rule", ["expected", "transfer"])
    @pytest.mark.parametrize("switch_s", [1e9, math.inf])
    def test_a_prohibitive_switch_cost_means_no_switch(self, rule: str, switch_s: float) -> None:
        """Whatever the rule, thirty years of transfer are not chosen beside two seconds."""
        policy = Helios(HeliosSettings(overhead_rule=rule))  # type: ignore[arg-type]
        now = served(SMALL.name, 6)
        asked = snapshot(assignment=now, load_s=transfers((0, 1, 2), (switch_s,) * 3))
        assert isinstance(policy.decide(asked), LoadLayers)

    def test_nothing_possible_keeps_with_the_reason(self) -> None:
        """No other candidate and no layer left, or an unreachable one, or no action allowed."""
        full = served(SMALL.name, 24, ExitMode.WAIT)
        alone = snapshot(assignment=full, candidates=(SMALL,), load_s={SMALL.name: (0, 0, 0)})
        assert isinstance(Helios().decide(alone), Keep)
        unreachable = snapshot(assignment=full, load_s=transfers((0, 0, 0), (math.inf,) * 3))
        assert isinstance(Helios().decide(unreachable), Keep)
        idle = Helios(HeliosSettings(actions=()))
        decision = idle.decide(snapshot(assignment=served(SMALL.name, 6)))
        assert decision == Keep(decision.reason)
        assert "none" in decision.reason

    def test_nobody_off_the_shortlist_is_switched_to(self) -> None:
        """The large model would be there at once, and the list has room for one alone."""
        asked = snapshot(assignment=served(SMALL.name, 6), load_s=transfers((0, 99, 99), (0, 0, 0)))
        assert isinstance(Helios().decide(asked), Switch)
        assert isinstance(Helios(HeliosSettings(top_k=1)).decide(asked), LoadLayers)

    def test_a_waiting_batch_runs_to_its_deepest_token(self) -> None:
        """With 73.0 / 77.7 / 100 % covered, two tokens both stop at 6 with 53.29 %."""
        shares = (0.73, 0.047, 0.223)
        assert iteration_shares(shares, ExitMode.WAIT, 1) == pytest.approx(list(shares))
        pair = iteration_shares(shares, ExitMode.WAIT, 2)
        assert pair == pytest.approx([0.5329, 0.777**2 - 0.5329, 1 - 0.777**2])
        assert iteration_shares(shares, ExitMode.REBATCH, 2) == list(shares)
        assert iteration_shares(shares, ExitMode.FULL, 2) == [0, 0, 1]

    def test_a_batch_shares_the_seconds_of_serving(self) -> None:
        """Three waiting beside one running, four allowed: a switch serves four at once."""
        asked = snapshot(max_batch=4, num_waiting=9)
        cost = overhead_of_switch(LARGE, 0, EVALUATIONS[LARGE.name], asked)
        assert cost.serving_s == pytest.approx(9.0 / 4)
        solo = overhead_of_load(SMALL, EVALUATIONS[SMALL.name], ExitMode.SOLO, asked)
        assert solo.serving_s == pytest.approx(10.296)

    def test_who_runs_and_who_waits_share_iterations_alike(self) -> None:
        """Two that run and one that waits are three of the four that may."""
        asked = replace(snapshot(max_batch=4, num_waiting=1), num_running=2)
        cost = overhead_of_switch(LARGE, 0, EVALUATIONS[LARGE.name], asked)
        assert cost.serving_s == pytest.approx(9.0 / 3)

    def test_a_reaction_is_timed_at_the_batch_that_shares_its_iterations(self) -> None:
        """At four rows an iteration takes twice as long, so a row saves half of what it did."""
        asked = snapshot(max_batch=4, num_waiting=9)
        table = tuple((row[0], 2 * row[0]) for row in LARGE.decode_iteration_s)
        steep = replace(LARGE, batches=(1, 4), decode_iteration_s=table)
        switch = overhead_of_switch(steep, 0, EVALUATIONS[LARGE.name], replace(asked, history={}))
        alone = overhead_of_switch(steep, 0, None, snapshot(max_batch=1))
        assert alone.serving_s == pytest.approx(9.0)
        assert switch.serving_s == pytest.approx(9.0 / 2)
        load = overhead_of_load(steep, None, ExitMode.WAIT, asked)
        assert load.serving_s == pytest.approx(32.0 / 2)

    def test_loading_is_charged_what_exits_take_unless_none_is_asked(self) -> None:
        """A thousand tokens at 9, 16 and 25 ms by the histogram; in full all take 24 ms."""
        card = replace(SMALL, exiting_iteration_s=((0.009,), (0.016,), (0.025,)))
        load = overhead_of_load(card, EVALUATIONS[SMALL.name], ExitMode.SOLO, snapshot())
        slowed = slowdown(card, EVALUATIONS[SMALL.name])
        assert load.serving_s == pytest.approx(slowed * (9 * 0.730 + 16 * 0.047 + 25 * 0.223))
        full = overhead_of_load(card, EVALUATIONS[SMALL.name], ExitMode.FULL, snapshot())
        assert full.serving_s == pytest.approx(slowed * 24.0)

    def test_prompts_are_charged_at_the_layers_that_each_reaction_leaves_loaded(self) -> None:
        """Ten tokens a request: 48 ms of prefill at 24 layers, 18 ms at nine of the other."""
        small = replace(SMALL, typical_output_tokens=10)
        large = replace(LARGE, typical_output_tokens=10)
        load = overhead_of_load(small, EVALUATIONS[SMALL.name], ExitMode.WAIT, snapshot())
        assert load.serving_s == pytest.approx(10.296 + 4.8)
        switch = overhead_of_switch(large, 0, EVALUATIONS[LARGE.name], snapshot())
        assert switch.serving_s == pytest.approx(9.0 + 1.8)

    def test_a_batch_is_no_larger_than_the_memory_beside_the_weights(self) -> None:
        """Of ten requests four may run together, and two fit at nine layers."""
        asked = snapshot(max_batch=4, num_waiting=9)
        narrow = replace(LARGE, batch_limit=(2, 1, 1))
        cost = overhead_of_switch(narrow, 0, EVALUATIONS[LARGE.name], asked)
        assert cost.serving_s == pytest.approx(9.0 / 2)

    def test_what_was_measured_slower_than_its_card_is_slower_with_all_layers_too(self) -> None:
        """Twice the card's 10.296 ms a token."""
        slow = example_evaluation(SMALL, SMALL_EXITS, token_s=0.020592)
        cost = overhead_of_load(SMALL, slow, ExitMode.WAIT, snapshot())
        assert cost.serving_s == pytest.approx(20.592)

    @pytest.mark.parametrize(("times", "expected"), [(1, Switch), (2, LoadLayers)])
    def test_what_was_measured_slower_than_its_card_is_not_switched_to(
        self, times: int, expected: type[Decision]
    ) -> None:
        """Loading takes 2 + 10.296 s; switching 1 + 9 s by the card, and 1 + 18 s at half pace."""
        found = example_evaluation(LARGE, LARGE_EXITS, token_s=times * 0.014352)
        asked = snapshot(
            assignment=served(SMALL.name, 6),
            evaluations={**EVALUATIONS, LARGE.name: found},
            load_s=transfers((0, 1, 2), (1, 9, 9)),
        )
        assert isinstance(Helios().decide(asked), expected)

    def test_layers_that_leave_no_room_for_a_request_are_not_loaded(self) -> None:
        """The other model is brought in, though it takes a thousand times as long."""
        shallow_only = replace(SMALL, batch_limit=(9, 9, 0))
        asked = snapshot(
            assignment=served(SMALL.name, 6),
            candidates=(shallow_only, LARGE),
            load_s=transfers((0, 1, 2), (2000, 9, 9)),
        )
        assert isinstance(Helios().decide(asked), Switch)

    def test_an_unmeasured_model_is_taken_to_need_full_depth(self) -> None:
        """Without a histogram loading costs 24 ms a token."""
        cost = overhead_of_load(SMALL, None, ExitMode.WAIT, snapshot())
        assert cost.serving_s == pytest.approx(24.0)


class TestObjective:
    """Scores of OPT-1.3B at 1 ms a layer."""

    def test_throughput_is_the_batch_over_the_predicted_tpot(self) -> None:
        """At 6 ms a token and batch 3: 500 tokens a second; the card's limit may be lower."""
        assert score("throughput", SMALL, 0, None, 3) == pytest.approx(500.0)
        narrow = replace(SMALL, batch_limit=(2, 1, 1))
        assert score("throughput", narrow, 0, None, 3) == pytest.approx(2 / 0.006)

    def test_throughput_is_predicted_at_the_batch_that_it_takes_for_granted(self) -> None:
        """Ten ms for one row and 40 for 16: 16 rows give 400 tokens a second, not 1,600."""
        flat = replace(SMALL, batches=(1, 16), decode_iteration_s=((0.01, 0.04),) * 3)
        assert score("throughput", flat, 0, None, 16) == pytest.approx(400.0)
        assert score("throughput", flat, 0, None, 6) == pytest.approx(6 / 0.02)

    def test_tokens_bear_the_prefill_of_their_request(self) -> None:
        """Six ms shared by two rows and 12 ms of prefill over four tokens: six ms a token."""
        card = replace(SMALL, typical_output_tokens=4)
        assert card.prefill_s[0] == 0.012
        assert score("throughput", card, 0, None, 2) == pytest.approx(1 / 0.006)

    def test_the_model_whose_iterations_grow_with_rows_loses_in_a_full_batch(self) -> None:
        """Alone the large one is faster; with 16 rows its iterations take four times as long."""
        steep = replace(
            LARGE,
            batches=(1, 4, 16),
            decode_iteration_s=((0.005, 0.006, 0.020), (0.01,) * 3, (0.02,) * 3),
        )
        for max_batch, winner in ((1, LARGE.name), (16, SMALL.name)):
            found = make_shortlist((SMALL, steep), Slo(), "throughput", max_batch, 1)
            assert [c.name for c in found.candidates] == [winner]

    def test_a_measurement_is_compared_with_the_card_at_the_rows_that_ran(self) -> None:
        """Forty ms a token is what the card says of 16 rows: nothing is slower than told."""
        card = replace(SMALL, batches=(1, 16), decode_iteration_s=((0.01, 0.04),) * 3)
        found = example_evaluation(SMALL, SMALL_EXITS)
        assert slowdown(card, replace(found, pace=Pace(0.04, 10.0, 16.0))) == pytest.approx(1.0)
        assert slowdown(card, replace(found, pace=Pace(0.04, 10.0, 1.0))) == pytest.approx(4.0)

    def test_responses_that_waited_make_nobody_slow(self) -> None:
        """A second a token, nearly all of it for prompts of others or in the queue."""
        waited = replace(EVALUATIONS[SMALL.name], mean_tpot_s=1.0)
        assert slowdown(SMALL, waited) == pytest.approx(1.0)
        assert slowdown(SMALL, replace(waited, pace=None)) == 1.0

    def test_what_exits_take_while_evaluated_slows_nothing_that_asks_none(self) -> None:
        """At 9 ms with exits asked the card is met to the letter: 6 ms where they are not."""
        card = replace(SMALL, exiting_iteration_s=((0.009,), (0.016,), (0.025,)))
        shallow = example_evaluation(SMALL, (100, 0, 0), token_s=0.009)
        assert slowdown(card, shallow) == pytest.approx(1.0)
        assert slowdown(SMALL, shallow) == pytest.approx(1.5)
        assert score("throughput", card, 0, shallow, 1) == pytest.approx(1 / 0.006)
        assert meets_slo(card, 0, shallow, Slo(tpot_s=0.0065))

    def test_a_measurement_without_exits_is_compared_with_the_card_without(self) -> None:
        card = replace(SMALL, exiting_iteration_s=((0.009,), (0.016,), (0.025,)))
        found = example_evaluation(SMALL, (100, 0, 0), token_s=0.012)
        ended = replace(found, assignment=Assignment(SMALL.name, 6, ExitMode.LOADED_DEPTH))
        assert slowdown(card, ended) == pytest.approx(2.0)

    def test_joules_that_exits_took_are_no_price_where_none_is_asked(self) -> None:
        """At 1.8 J with exits asked nothing is dearer than told: 1.2 J where they are not."""
        card = replace(SMALL, exiting_iteration_j=((1.8,), (3.2,), (5.0,)))
        found = example_evaluation(SMALL, (100, 0, 0), energy_j=100 * 1.8)
        assert predicted_token_j(card, 0, found) == pytest.approx(1.2)
        assert predicted_token_j(SMALL, 0, found) == pytest.approx(1.8)

    def test_joules_drawn_without_exits_are_compared_with_the_card_without(self) -> None:
        """At 2.4 J the card's 1.2 J are drawn twice over."""
        card = replace(SMALL, exiting_iteration_j=((1.8,), (3.2,), (5.0,)))
        found = example_evaluation(SMALL, (100, 0, 0), energy_j=100 * 2.4)
        ended = replace(found, assignment=Assignment(SMALL.name, 6, ExitMode.LOADED_DEPTH))
        assert predicted_token_j(card, 0, ended) == pytest.approx(2.4)

    def test_joules_are_compared_at_the_rows_that_ran_and_told_at_the_reference(self) -> None:
        """Sixteen rows at 8 J an iteration are as dear as told, so a token alone takes 2 J."""
        card = replace(SMALL, batches=(1, 16), decode_iteration_j=((2.0, 8.0),) * 3)
        crowded = replace(
            example_evaluation(SMALL, SMALL_EXITS, energy_j=1000 * 0.5), mean_batch=16.0
        )
        assert score("energy", card, 0, crowded, 16) == pytest.approx(-2.0)

    def test_waiting_for_requests_makes_nobody_dear(self) -> None:
        """Ninety per cent of the joules were drawn while no request was there."""
        busy = example_evaluation(SMALL, SMALL_EXITS, energy_j=1000.0)
        rare = replace(busy, energy_j=10_000.0, idle_energy_j=9000.0)
        told = [score("energy", SMALL, 0, evaluation, 1) for evaluation in (busy, rare)]
        assert told[0] == told[1]
        assert replace(rare, energy_j=None, idle_energy_j=None).working_energy_j is None

    def test_a_meter_that_counted_nothing_yet_makes_nobody_free(self) -> None:
        """The card speaks until it has: 200 W for 6 ms."""
        for drawn in ({"energy_j": 0.0}, {"energy_j": 5.0, "idle_energy_j": 5.0}):
            unread = replace(EVALUATIONS[SMALL.name], **drawn)
            assert score("energy", SMALL, 0, unread, 1) == pytest.approx(-1.2)

    def test_a_slower_measurement_slows_every_depth_alike(self) -> None:
        """20.592 ms measured where the card says 10.296: twice the time at any depth."""
        slow = example_evaluation(SMALL, SMALL_EXITS, token_s=0.020592)
        assert slowdown(SMALL, slow) == pytest.approx(2.0)
        assert score("throughput", SMALL, 0, slow, 1) == pytest.approx(1 / 0.012)
        assert score("response-time", SMALL, 0, slow, 1) == pytest.approx(-0.024)

    def test_the_card_is_read_between_exits(self) -> None:
        """Halfway from 6 to 12 layers is halfway between their values; outside they are held."""
        assert interpolate((6, 12, 24), (1.0, 3.0, 4.0), 9) == 2.0
        assert interpolate((6, 12, 24), (1.0, 3.0, 4.0), 3) == 1.0
        assert interpolate((6, 12, 24), (1.0, 3.0, 4.0), 99) == 4.0

    def test_energy_is_joules_a_token_scaled_to_the_depth(self) -> None:
        """200 W for 6 ms are 1.2 J; twice the measured joules are twice that."""
        assert score("energy", SMALL, 0, None, 1) == pytest.approx(-1.2)
        double = example_evaluation(SMALL, SMALL_EXITS, energy_j=2 * 1000 * 10.296 * 0.2)
        assert score("energy", SMALL, 0, double, 1) == pytest.approx(-2.4)
        assert score("energy", replace(SMALL, reference_batch=4), 0, None, 1) == -0.3

    def test_quality_is_measured_or_unknown(self) -> None:
        """2,000 nats over 1,000 tokens; nothing measured is never preferred."""
        assert score("quality", SMALL, 0, EVALUATIONS[SMALL.name], 1) == -2.0
        assert score("quality", SMALL, 0, None, 1) == -math.inf

    def test_memory_is_weights_and_a_typical_kv_cache(self) -> None:
        """Ten layers' worth of 100 MB and 1,000 tokens of 6 x 8,192 bytes."""
        assert score("memory", SMALL, 0, None, 1) == -(1_000_000_000 + 49_152_000)

    def test_memory_holds_the_typical_kv_cache_of_every_row_of_the_reference_batch(self) -> None:
        """100 bytes of weights, and four rows of ten tokens at two bytes."""
        card = replace(
            SMALL,
            weight_bytes=(100,) * 3,
            kv_bytes_per_token=(2,) * 3,
            typical_tokens=10,
            reference_batch=4,
        )
        assert score("memory", card, 0, None, 1) == -180

    def test_gaps_between_tokens_are_predicted_at_the_reference_batch(self) -> None:
        """Ten ms for one row, and 30 for the four of a replica with little to do."""
        card = replace(
            SMALL, batches=(1, 4), decode_iteration_s=((0.01, 0.03),) * 3, reference_batch=4
        )
        assert predicted_tpot_s(card, 0, None) == 0.03
        assert meets_slo(card, 0, None, Slo(tpot_s=0.03))
        assert not meets_slo(card, 0, None, Slo(tpot_s=0.02))

    def test_the_objective_chooses_the_model(self) -> None:
        """The small model is faster, the large one better: each wins its own objective."""
        for objective, winner in (
            ("throughput", Serve(SMALL.name, 6, ExitMode.LOADED_DEPTH, "")),
            ("memory", Serve(SMALL.name, 6, ExitMode.LOADED_DEPTH, "")),
            ("quality", Serve(LARGE.name, 9, ExitMode.LOADED_DEPTH, "")),
        ):
            policy = Helios(HeliosSettings(objective=objective))  # type: ignore[arg-type]
            asked = snapshot(
                Event.EVALUATED,
                assignment=served(LARGE.name, 32, ExitMode.WAIT),
                round_evaluated=(SMALL.name, LARGE.name),
            )
            assert replace(policy.decide(asked), reason="") == winner

    def test_a_candidate_that_was_measured_slower_loses_to_another(self) -> None:
        """At twice its card's time the small model takes 12 ms a token, the large one 9."""
        slow = example_evaluation(SMALL, SMALL_EXITS, token_s=0.020592)
        asked = snapshot(
            Event.EVALUATED,
            assignment=served(LARGE.name, 32, ExitMode.WAIT),
            evaluations={**EVALUATIONS, SMALL.name: slow},
            round_evaluated=(SMALL.name, LARGE.name),
        )
        decision = Helios().decide(asked)
        assert decision == Serve(LARGE.name, 9, ExitMode.LOADED_DEPTH, decision.reason)

    def test_of_equal_candidates_the_one_that_ranks_first_serves(self) -> None:
        """Two names of one model score alike, in whichever order they are given."""
        twin = replace(SMALL, name="opt-1.3b-again")
        evaluation = example_evaluation(twin, SMALL_EXITS, nll_nats=2000.0)
        for candidates in ((twin, SMALL), (SMALL, twin)):
            asked = snapshot(
                Event.EVALUATED,
                assignment=served(SMALL.name, 24, ExitMode.WAIT),
                candidates=candidates,
                evaluations={**EVALUATIONS, twin.name: evaluation},
                round_evaluated=(SMALL.name, twin.name),
            )
            decision = Helios().decide(asked)
            assert decision == Serve(SMALL.name, 6, ExitMode.LOADED_DEPTH, decision.reason)

    def test_a_candidate_that_keeps_the_slo_beats_a_better_one_that_does_not(self) -> None:
        """Measured at twice its card, the large model misses 15 ms a token; quality gives way."""
        slow = example_evaluation(LARGE, LARGE_EXITS, token_s=2 * 0.014352, nll_nats=1000.0)
        asked = snapshot(
            Event.EVALUATED,
            assignment=served(LARGE.name, 32, ExitMode.WAIT),
            evaluations={**EVALUATIONS, LARGE.name: slow},
            round_evaluated=(SMALL.name, LARGE.name),
            slo=Slo(tpot_s=0.015),
        )
        decision = Helios(HeliosSettings(objective="quality")).decide(asked)
        assert decision == Serve(SMALL.name, 6, ExitMode.LOADED_DEPTH, decision.reason)

    def test_the_slo_is_to_be_kept_at_the_depth_that_would_be_loaded(self) -> None:
        """Most tokens of the better model take 24 ms, and 6 at its first exit; 20 are allowed."""
        deep = example_evaluation(SMALL, (10, 10, 80), nll_nats=1.0)
        asked = snapshot(
            Event.EVALUATED,
            assignment=served(LARGE.name, 32, ExitMode.WAIT),
            evaluations={**EVALUATIONS, SMALL.name: deep},
            round_evaluated=(SMALL.name, LARGE.name),
            slo=Slo(tpot_s=0.020),
        )
        decision = Helios(HeliosSettings(objective="quality")).decide(asked)
        assert decision == Serve(LARGE.name, 9, ExitMode.LOADED_DEPTH, decision.reason)


class TestShortlist:
    """TopK under SLO and hardware."""

    def test_ranks_by_the_objective_at_the_shallowest_exit(self) -> None:
        """6, 8 and 9 ms a token at batch 1; the lone model of another tokenizer is left out."""
        found = make_shortlist(example_candidates(), Slo(), "throughput", 1, 3)
        assert [c.name for c in found.candidates] == [SMALL.name, MIDDLE.name, LARGE.name]

    def test_an_slo_bounds_ttft_and_tpot_at_the_shallowest_exit(self) -> None:
        """9 ms a token miss 8 ms; 18 ms to the first token miss 17 ms."""
        for slo in (Slo(tpot_s=0.008), Slo(ttft_s=0.017)):
            found = make_shortlist((SMALL, MIDDLE, LARGE), slo, "throughput", 1, 3)
            assert [c.name for c in found.candidates] == [SMALL.name, MIDDLE.name]
        assert meets_slo(LARGE, 0, None, Slo(ttft_s=0.0181, tpot_s=0.0091))

    def test_a_limit_that_is_reached_to_the_bit_is_kept(self) -> None:
        card = Slo(ttft_s=LARGE.prefill_s[0], tpot_s=LARGE.decode_iteration_s[0][0])
        assert meets_slo(LARGE, 0, None, card)

    def test_a_limit_on_gaps_between_tokens_bounds_as_one_on_tpot_does(self) -> None:
        """9 ms a token miss gaps of 8 ms."""
        found = make_shortlist((SMALL, MIDDLE, LARGE), Slo(itl_s=0.008), "throughput", 1, 3)
        assert [c.name for c in found.candidates] == [SMALL.name, MIDDLE.name]

    def test_a_limit_on_the_whole_response_counts_its_typical_output(self) -> None:
        """18 ms to the first token and ten more of 9 ms miss 100 ms; 12 ms and ten of 6 do not."""
        cards = [replace(c, typical_output_tokens=11) for c in (SMALL, MIDDLE, LARGE)]
        assert meets_slo(cards[2], 0, None, Slo(e2e_s=0.1081))
        found = make_shortlist(cards, Slo(e2e_s=0.1), "throughput", 1, 3)
        assert [c.name for c in found.candidates] == [SMALL.name, MIDDLE.name]

    def test_an_slo_that_nobody_meets_takes_the_best_and_says_so(self) -> None:
        """One candidate goes on, and the reason names the broken promise."""
        found = make_shortlist(PAIR, Slo(tpot_s=1e-6), "throughput", 1, 3)
        assert [c.name for c in found.candidates] == [SMALL.name]
        assert "no candidate meets the SLO" in found.reason

    def test_a_model_that_does_not_fit_is_left_out_and_none_is_an_error(self) -> None:
        """Full depth must fit too, since candidates are evaluated there."""
        too_big = replace(LARGE, batch_limit=(9, 1, 0))
        found = make_shortlist((SMALL, too_big), Slo(), "throughput", 1, 3)
        assert [c.name for c in found.candidates] == [SMALL.name]
        with pytest.raises(InputError, match=r"None of the models 'opt-6.7b' fits in memory"):
            make_shortlist((too_big,), Slo(), "throughput", 1, 3)

    def test_equal_groups_of_tokenizers_go_by_name(self) -> None:
        """One model each: "opt" comes before "other"."""
        found = make_shortlist((OTHER, SMALL), Slo(), "throughput", 1, 3)
        assert [c.name for c in found.candidates] == [SMALL.name]

    def test_quality_ranks_the_larger_model_first(self) -> None:
        """No card knows quality, so size stands in for the order of evaluation."""
        found = make_shortlist(example_candidates(), Slo(), "quality", 1, 3)
        assert [c.name for c in found.candidates] == [LARGE.name, MIDDLE.name, SMALL.name]

    def test_the_larger_model_is_the_one_of_more_weights_in_all(self) -> None:
        """9 of 10 GB by the first exit are more than 5.2 of 14.4."""
        front = replace(SMALL, weight_bytes=(9 * 10**9, 9 * 10**9, 10**10))
        found = make_shortlist((front, LARGE), Slo(), "quality", 1, 3)
        assert [c.name for c in found.candidates] == [LARGE.name, SMALL.name]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top_k": 0}, "'top_k' was given 0; it must be a whole number of at least 1"),
        ({"top_k": True}, "'top_k' was given True"),
        ({"top_k": 2.5}, "'top_k' was given 2.5"),
        ({"evaluation_requests": 0}, "'evaluation_requests' was given 0"),
        ({"reassess_requests": 0}, r'at least 1, or "off" \(never\)'),
        ({"breach_window_tokens": -1}, "'breach_window_tokens' was given -1"),
        ({"breach_limit": 100}, "below the 100 tokens of breach_window_tokens"),
        ({"window_kind": "slide"}, "Did you mean 'sliding'"),
        ({"confidence_threshold": 1.5}, "0 to 1, or left out .the profile's own threshold."),
        ({"confidence_threshold": math.nan}, "a number from 0 to 1"),
        ({"objective": "speed"}, "it must be one of 'throughput', 'response-time'"),
        ({"depth_rule": "deepest"}, "it must be one of 'dominant', 'quantile', 'fixed'"),
        ({"depth_rule": "fixed"}, "'fixed_depth' was left out"),
        ({"fixed_depth": 6}, "it belongs to depth_rule 'fixed'"),
        ({"depth_quantile": 0}, "above 0 and at most 1"),
        ({"overhead_rule": []}, "it must be one of 'expected', 'transfer'"),
        ({"evaluation_exit_mode": "full"}, "one of 'solo', 'wait', 'rebatch'"),
        ({"after_load_exit_mode": "loaded-depth"}, "one of 'solo', 'wait', 'rebatch', 'full'"),
        ({"evaluate_at_start": "yes"}, "true or false"),
        ({"actions": ["load", "load"]}, "distinct names out of 'load', 'switch'"),
        ({"actions": "load"}, "a list of distinct names"),
    ],
)
def test_a_setting_out_of_range_is_refused_in_a_sentence(
    options: dict[str, object], sentence: str
) -> None:
    """What was given and what is allowed, for every setting."""
    with pytest.raises(InputError, match=sentence):
        HeliosSettings(**options)  # type: ignore[arg-type]
