"""A tuning in sentences."""

from __future__ import annotations

from typing import Any

from helios_sim.profile import MarkovExits
from helios_sim.report.words import (
    extrapolated,
    large_batches,
    launch_bound,
    mean_batches,
    worth,
)
from helios_sim.search.goals import in_samples, in_words
from helios_sim.search.quality import winner_pays
from helios_sim.search.traffic import FEW_ROUNDS
from helios_sim.search.tune import Finalist, HeldOut, Tuned, TuneQuestion, few_rounds, nearest_miss
from helios_sim.search.words import (
    CANDIDATES,
    assumed_everywhere,
    assumed_words,
    candidates_of,
    grades_by_name,
    shared_words,
    signed,
)
from helios_sim.wording import counted, listed, number


def _generated(question: TuneQuestion) -> list[str]:
    """What tuning a threshold cannot tell where nobody observed a token."""
    tunes = any(one.key.endswith(".confidence_threshold") for one in question.space.ranges)
    steps = {
        one.exits.agreement.step_confidence
        for one in question.profiles
        if isinstance(one.exits, MarkovExits)
    }
    if not tunes or not steps:
        return []
    return [
        f"Exits are generated: from confidence {max(steps):g} on no token is likelier to agree "
        "than another, so what a higher threshold gains here in quality says little of real text."
    ]


def tune_headline(tuned: Tuned) -> str:
    """The answer in one sentence."""
    judge = tuned.question.judge
    if tuned.winner is None:
        tried = counted(len(tuned.trials), "trial")
        if all(trial.state == "impossible" for trial in tuned.trials):
            return f"None of {tried} can be run; the first says: {tuned.trials[0].why}"
        return f"None of {tried} keeps the constraints: {nearest_miss(tuned)}."
    held = tuned.own_rate
    assert held is not None
    goal = judge.goals[0]
    was, now = (
        "no value" if one is None else number(one, 4) for one in (held.base[0], held.tuned[0])
    )
    change = f"{was} to {now} {goal.unit}".strip()
    own = listed([in_words(one) for one in held.base_broken])
    apart = in_samples(held.tuned_breaking)
    if tuned.verdict == "no better":
        stays = "The scenario stays as it is."
        if own:
            stays = f"The scenario stays as it is and breaks {own} there."
        if tuned.lost is not None:
            return (
                f"None of the best {len(tuned.finalists)} of {len(tuned.trials):,} trials keeps "
                "the constraints on traffic it was not tuned on: trial "
                f"{tuned.winner.number} comes nearest and {_failing(tuned.lost)} there. {stays}"
            )
        why = (
            f"breaks {listed([in_words(one) for one in held.tuned_broken])}"
            if held.tuned_broken
            else f"gives no value of {goal.name}"
            if held.tuned[0] is None
            else f"takes {goal.name} from {change}"
        )
        return (
            f"No setting found is better on traffic it was not tuned on: trial "
            f"{tuned.winner.number}, the best of {len(tuned.trials):,}, {why} there. {stays}"
            f"{_nearer(tuned.winner.number, held)}"
        )
    if own:
        keeps, but = "keeps the constraints", ""
        if apart:
            keeps, but = "keeps the constraints on average", f" (it breaks them {apart})"
        return (
            f"Trial {tuned.winner.number} {keeps} on traffic not tuned on{but}, where the "
            f"scenario as it stands breaks {own}; {goal.name} goes from {change}."
        )
    said = f"Trial {tuned.winner.number} takes {goal.name} from {change}, on traffic not tuned on"
    if apart:
        said += f" (it breaks the constraints {apart})"
    return f"{said}{_unshown(tuned) if tuned.verdict == 'unsure' else '.'}"


def _unshown(tuned: Tuned) -> str:
    """Why a gain is not shown to be one, and what becomes of the settings; ends a sentence."""
    judge, settings = tuned.question.judge, tuned.question.settings
    if settings.held_out == 1:
        why = "one sample tells no interval (give search.held_out 2 or more)"
    elif len(judge.goals) == 1:
        why = "the 95 % interval of the gain holds 0"
    else:
        why = "the 95 % interval of its gains together holds 0"
    return f", but is not shown to be better: {why}. Its settings are written all the same."


def _few_rounds(tuned: Tuned) -> list[str]:
    """That samples end before reassessing has shown what it is worth, where they do."""
    few = few_rounds(tuned)
    if not few:
        return []
    each = listed([f"{number(rounds)} with {name}" for name, rounds in few])
    return [
        f"A sample holds few rounds of reassessment for each replica, {each}: what reassessing "
        f"costs or buys is measured on fewer than {FEW_ROUNDS}."
    ]


def _rows_met_again(tuned: Tuned) -> list[str]:
    """That held-out samples meet lengths which were tuned on, where the trace is too short."""
    traffic, settings = tuned.question.traffic, tuned.question.settings
    met = [one.means for one in (tuned.base, tuned.winner) if one is not None]
    num = max((means.get("num_requests") or 0.0 for means in met), default=0.0)
    if traffic.is_shaped:
        num *= max(settings.held_out_rates)
    if not traffic.share_rows(num, traffic.most_samples):
        return []
    return [shared_words(traffic, num, "what is held out is not all new")]


def _together(tuned: Tuned) -> list[str]:
    """What several objectives gain together, by which the winner is judged."""
    held = tuned.own_rate
    if held is None or held.worth is None or len(held.gains) == 1:
        return []
    gain, low, high = (signed(100 * one) for one in held.worth)
    return [
        "Together its gains, as shares of what the scenario as it stands has, add up to "
        f"{gain} % [{low}, {high}]."
    ]


def _nearer(number_of: int, held: HeldOut) -> str:
    """Which of two that break the constraints comes nearer to keeping them."""
    ours, own = (
        sum(one.violation for one in broken) for broken in (held.tuned_broken, held.base_broken)
    )
    return f" Trial {number_of} comes nearer to keeping the constraints." if 0 < ours < own else ""


def _failing(finalist: Finalist) -> str:
    """What is wrong with a finalist, as a verb and its object."""
    if finalist.broken:
        return f"breaks {listed([in_words(one) for one in finalist.broken])}"
    return "leaves an objective undefined"


def _finals(tuned: Tuned) -> list[str]:
    """How the winner was chosen among the finalists."""
    if not tuned.finalists or tuned.winner is None:
        return []
    said = (
        f"The best {len(tuned.finalists)} trials met "
        f"{counted(tuned.question.settings.finals, 'further sample')}"
    )
    kept = sum(one.keeps for one in tuned.finalists)
    if not kept:
        return [f"{said}, where none keeps the constraints."]
    if not str(tuned.question.judge.constraints):
        return [f"{said}; trial {tuned.winner.number} is the best of them there."]
    keep = f"{kept} of them keep{'s' if kept == 1 else ''}"
    if kept == len(tuned.finalists):
        keep = "all keep"
    means = " on average" * any(one.keeps and one.breaking[0] for one in tuned.finalists)
    return [
        f"{said}, where {keep} the constraints{means}; trial {tuned.winner.number} is the best "
        "there."
    ]


def _samples_apart(tuned: Tuned) -> list[str]:
    """In how many samples the winner breaks constraints, which are judged on the mean of all."""
    if tuned.winner is None:
        return []
    met = [(tuned.winner.breaking, "tuned on")]
    met += [(one.breaking, "chosen on") for one in tuned.finalists if one.trial is tuned.winner]
    met += [(one.tuned_breaking, "held out") for one in tuned.held_out if one is tuned.own_rate]
    for held in tuned.held_out:
        if held is not tuned.own_rate and held.tuned_breaking[0]:
            met.append((held.tuned_breaking, f"held out at {held.rate_scale:g} times the rate"))
    if not any(num for (num, _), _ in met):
        return []
    each = [f"{num} of {of} {what}" for (num, of), what in met]
    return [
        f"Constraints are judged on the mean over samples: of these, trial {tuned.winner.number} "
        f"breaks them in {listed(each)}."
    ]


def tune_remarks(tuned: Tuned) -> list[str]:
    """What has to be said beside the headline."""
    states = [trial.state for trial in tuned.trials]
    judge = tuned.question.judge
    found = [
        f"{counted(len(tuned.trials), 'trial')} by {tuned.question.settings.sampler}: "
        f"{states.count('full'):,} on all samples of the tuning traffic, "
        f"{states.count('stopped'):,} stopped after the first, "
        f"{counted(states.count('impossible'), 'combination')} that cannot be."
    ]
    if str(judge.constraints):
        kept = sum(one.is_feasible for one in tuned.trials)
        keep = f"{counted(kept, 'trial')} keep{'s' * (kept == 1)}"
        found.append(f"Constraints: {judge.constraints}; {keep} them.")
        found += _samples_apart(tuned)
    if tuned.base.broken:
        broken = listed([in_words(one) for one in tuned.base.broken])
        found.append(f"The scenario as it stands breaks {broken}.")
    tried = [("the scenario as it stands", tuned.base.beyond)]
    if tuned.winner is not None:
        tried.append((f"trial {tuned.winner.number}", tuned.winner.beyond))
    grades = grades_by_name(tuned.question.profiles)
    question = tuned.question
    stands: dict[str, Any] = {**tuned.base.means, "label": "the scenario as it stands"}
    played = [stands]
    if tuned.winner is not None:
        played.append({**tuned.winner.means, "label": f"trial {tuned.winner.number}"})
    taken = assumed_everywhere(question.profiles)
    found += [
        worth(grades, "settings"),
        *launch_bound(grades, [stands], "settings"),
        *large_batches(grades, mean_batches(played), taken),
    ]
    ranged = [one.choices for one in question.space.ranges if one.key == CANDIDATES]
    varied = [candidates for choices in ranged for candidates in choices]
    found += assumed_words(question.profiles, candidates_of(question.scenario, varied))
    found += _generated(question)
    found += extrapolated(tried) + _few_rounds(tuned) + _rows_met_again(tuned) + _finals(tuned)
    held = tuned.own_rate
    if tuned.winner is None or held is None:
        return found
    for place, goal in enumerate(judge.goals):
        known = held.gains[place]
        if known is None:
            lacking = [
                name
                for name, scores in (
                    ("the scenario as it stands", held.base),
                    (f"trial {tuned.winner.number}", held.tuned),
                )
                if scores[place] is None
            ]
            found.append(f"On held-out traffic {listed(lacking)} gave no value of {goal.name}.")
            continue
        gain, low, high = known
        sure = low > 0.0 or high < 0.0
        sign = 1.0 if goal.better == "higher" else -1.0
        ends = sorted((sign * low, sign * high))
        found.append(
            f"On held-out traffic {goal.name} changes by {signed(sign * gain)} {goal.unit} "
            f"[{signed(ends[0])}, {signed(ends[1])}] against the scenario as it stands"
            f"{'' if sure else ', which shows no difference'}; {_loss(tuned, place)}."
        )
    found += _together(tuned)
    found += winner_pays(tuned)
    if held.tuned_broken:
        found.append(
            "On held-out traffic the winner breaks "
            f"{listed([in_words(one) for one in held.tuned_broken])}."
        )
    return [*found, *_at_other_rates(tuned)]


def _at_other_rates(tuned: Tuned) -> list[str]:
    """Which held-out rates other than the scenario's own the winner does not bear."""
    found = []
    for held in tuned.held_out:
        if held.rate_scale == 1.0 or not held.tuned_broken:
            continue
        too = ", as the scenario as it stands does" * bool(held.base_broken)
        found.append(
            f"At {held.rate_scale:g} times the rate the winner breaks "
            f"{listed([in_words(one) for one in held.tuned_broken])} on held-out traffic{too}."
        )
    return found


def _loss(tuned: Tuned, place: int) -> str:
    """What is left of a gain off the tuning traffic."""
    assert tuned.winner is not None and tuned.own_rate is not None
    base, best, held = tuned.base.scores, tuned.winner.scores, tuned.own_rate
    was, now = held.base[place], held.tuned[place]
    if base is None or best is None or not base[place] or not was or now is None:
        return "nothing to compare it with on the tuning traffic"
    on, off = best[place] / base[place], now / was
    share = 100 * (off / on - 1)
    than = f"{abs(share):.0f} % {'more' if share > 0 else 'less'} than"
    return (
        f"it is {off:.3g} times that, {'as much as' if abs(share) < 0.5 else than} the {on:.3g} "
        "times that the tuning traffic promised"
    )
