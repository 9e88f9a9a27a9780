"""Figures in sentences: what answers the question, and what has to be said beside it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from helios_sim.profiles.files import ASSUMED
from helios_sim.runs.comparison import carry_alike, counts_alike, ratios_over_seeds
from helios_sim.runs.metrics import figure_at
from helios_sim.wording import between, counted, limits, listed, number, times

Summary = Mapping[str, Any]

_TELLING: Final = (
    ("median_tpot_ms", "median TPOT", " ms", 1.0),
    ("median_ttft_ms", "median TTFT", " ms", 1.0),
    ("p99_ttft_ms", "p99 TTFT", " ms", 1.0),
    ("energy_per_output_token", "energy per output token", " J", 1e-3),
    ("agreement", "agreement with full depth", " %", 100.0),
    ("perplexity", "perplexity", "", 1.0),
)
"""What tells runs apart that serve the same load: key, title, unit, factor to the unit."""

_SOME_SEEDS: Final = 8
"""Seeds that tell roughly how far runs lie apart."""

_ENOUGH_SEEDS: Final = 3
"""Seeds of which a median tells more than the least and the most."""

_FAR_APART: Final = 1.1
"""Ends of which the larger is so many times the smaller leave open what is usual."""

_MOST_NAMED: Final = 3
"""Of more things than this their number is said."""

LARGE_BATCH: Final = 64.0
"""Requests of a decode, on average, from which it is said how far off published profiles are."""

REQUEST_COST: Final = "coefficients.decode.fixed_s_per_row"
"""Where a profile says what each request of a decode costs the host."""

_MANY_BEFORE_START: Final = 0.005
"""Share of the requests from which on those that found nothing serving yet are told."""

ENOUGH_ACTIVE: Final = 0.95
"""Share of a closed loop's users that are active on average, below which a run is not theirs."""


def device_of(environment: Mapping[str, Any]) -> str:
    """What a run's device is: GPU, or processor where its records say so."""
    kind = environment.get("device_kind") or environment.get("device") or ""
    return "processor" if str(kind).split(" ")[0] in ("processor", "cpu") else "GPU"


def device_of_all(are_processors: Iterable[bool]) -> str:
    """What several devices are called: GPU, processor, or device where they are of both kinds."""
    kinds = set(are_processors)
    return "device" if len(kinds) > 1 else "processor" if True in kinds else "GPU"


def serving(environments: Sequence[Mapping[str, Any]], summaries: Sequence[Summary]) -> list[str]:
    """What a column of figures is of: the device and how many, the models that served.

    Also what was assumed of the profile, where anything was. A policy that keeps to one model may
    do so silently, and its figures are that model's.
    """
    assumed = [listed(list(one.get(ASSUMED) or ())) for one in environments]
    fleets, models = [], []
    for environment, summary in zip(environments, summaries, strict=True):
        device = environment.get("device")
        held = (
            f"{counted(summary['num_replicas'], 'replica')} "
            f"({counted(summary['num_gpus'], device_of(environment))})"
        )
        profile = environment.get("profile")
        of_profile = f", profile {profile}" if profile else ""
        fleets.append(f"{f'{device}, ' if device else ''}{held}{of_profile}")
        models.append(_models(summary))
    said = [f"Device: {_by_label(fleets, summaries)}."]
    if all(models):
        said.append(f"Serving: {_by_label(models, summaries)}.")
    if any(assumed):
        said.append(f"Assumed: {_by_label(assumed, summaries)}.")
    return said


def judged_by(summaries: Sequence[Summary]) -> str | None:
    """The limits that goodput and attainment judge by; None where no run has any."""
    told = limits_of(summaries)
    return f"SLO: {told}." if told else None


def limits_of(summaries: Sequence[Summary]) -> str:
    """The limits of runs, with the runs that each are of where they differ; empty without any."""
    told = [limits(one["slo"]) if one.get("slo") else "" for one in summaries]
    return _by_label(told, summaries)


def judged_alike(summaries: Sequence[Summary]) -> bool:
    """Whether runs are judged by the same limits or none, so that what meets them compares."""
    first = summaries[0].get("slo")
    return all(one.get("slo") == first for one in summaries)


def worth(grades: Mapping[str, Mapping[str, int]], compared: str) -> str:
    """What the numbers of profiles are, and where none is measured what their figures tell.

    `grades` are how many numbers of each stand at each grade, `compared` what the figures are of.
    """
    each, unmeasured = [], []
    for name, counts in grades.items():
        held = [f"{number(count)} {grade}" for grade, count in counts.items() if count]
        each.append(f"{name} has {listed(held)} numbers")
        if not counts.get("measured"):
            unmeasured.append(name)
    said = f"{'Profile' if len(each) == 1 else 'Profiles:'} {'; '.join(each)}."
    if not unmeasured:
        return said
    whose = "" if len(unmeasured) == len(each) else f" of {listed(unmeasured)}"
    return f"{said} None{whose} is measured: read ratios between {compared}, not absolute figures."


def grades_of(environments: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, int]]:
    """How many numbers of each profile that runs stand on are of each grade."""
    return {str(one.get("profile")): one.get("profile_grades") or {} for one in environments}


def launch_bound(
    grades: Mapping[str, Mapping[str, int]],
    summaries: Sequence[Summary],
    compared: str = "policies",
    when: str = "",
) -> list[str]:
    """That another engine's launch floor would change ratios, where no profile is measured.

    The floor of a published profile is that of the engine that was published. `summaries` have
    labels; `compared` are what they are of, and `when` says at which load, where there are several.
    """
    if any(counts.get("measured") or not counts for counts in grades.values()):
        return []
    shares = [figure_at(one, "regime.launch") or 0.0 for one in summaries]
    bound = [str(one["label"]) for one, share in zip(summaries, shares, strict=True) if share > 0.5]
    if not bound:
        return []
    whose = f" of {listed(bound)}"
    if len(bound) > _MOST_NAMED:
        whose = f" of {len(bound)} of the {len(summaries)} {compared}"
    if len(bound) == len(summaries):
        whose = ""
    begun = f"{when}, launching" if when else "Launching"
    return [
        f"{begun} kernels bounds most of the busy time{whose}. An engine that replays CUDA "
        f"graphs launches faster, and ratios between {compared} change with it: give the profile "
        "its launch floor with helios profiles derive --launch."
    ]


def large_batches(
    grades: Mapping[str, Mapping[str, int]],
    batches: Mapping[str, float],
    assumed: Iterable[str],
    when: str = "",
) -> list[str]:
    """That profiles which nobody measured are too optimistic about large batches.

    `batches` are mean batches of a decode by what has them, `assumed` the numbers that a scenario
    assumes (nothing is said where a request's cost is among them), `when` says at which load.
    """
    if any(REQUEST_COST in one for one in assumed):
        return []
    if any(counts.get("measured") or not counts for counts in grades.values()):
        return []
    large = [name for name, batch in batches.items() if batch >= LARGE_BATCH]
    if not large:
        return []
    most = number(max(batches[name] for name in large))
    whose = f" ({listed(large)})" if len(large) <= _MOST_NAMED else ""
    return [
        f"{f'{when}, up' if when else 'Up'} to {most} requests decode together on average{whose}. "
        "Profiles built from data sheets and published tables are too fast there: beside the one "
        "engine of which figures are published, 1.4 times at 32 requests and about twice from 128 "
        "on. Leave a reserve, assume what a request costs the host, or measure (docs/published.md)."
    ]


def taken_otherwise(environments: Sequence[Mapping[str, Any]]) -> list[str]:
    """The numbers of profiles that runs assume."""
    return [said for one in environments for said in one.get(ASSUMED) or ()]


def mean_batches(summaries: Sequence[Summary]) -> dict[str, float]:
    """Requests that decode together on average, by run."""
    return {str(one["label"]): one.get("mean_batch_size") or 0.0 for one in summaries}


def standing_in(likes: Mapping[str, str]) -> str:
    """What is assumed of models that leave as another one does; `likes` names it for each."""
    said = listed([f"{name} leaves as {like} does" for name, like in likes.items()])
    sources = listed(list(dict.fromkeys(likes.values())))
    return (
        f"Exits, perplexity and agreement are assumed: {said}, exit by exit, and nobody observed "
        f"it; the other numbers of "
        f"{listed(list(likes))} are scaled from those of {sources}."
    )


def _models(summary: Summary) -> str:
    """The models that served, and of how many candidates where those are more; empty if unknown."""
    served = set(_served(summary))
    candidates = list(summary.get("exit_histogram") or sorted(served))
    of_all = f" of {len(candidates)} candidates" if len(served) < len(candidates) else ""
    return f"{listed([name for name in candidates if name in served])}{of_all}" if served else ""


def _served(summary: Summary) -> list[str]:
    """The models that served, if that is known."""
    return list(
        dict.fromkeys(place.rpartition("@")[0] for place in summary.get("depth_share") or {})
    )


def _by_label(texts: Sequence[str], summaries: Sequence[Summary]) -> str:
    """A text that holds for all runs, or each but the empty one with the runs it holds for."""
    held: dict[str, list[str]] = {}
    for text, summary in zip(texts, summaries, strict=True):
        held.setdefault(text, []).append(str(summary["label"]))
    if len(held) == 1:
        return texts[0]
    held.pop("", None)
    return "; ".join(f"{text} ({', '.join(labels)})" for text, labels in held.items())


def headline(
    summaries: Sequence[Summary],
    offered_tokens_per_s: float | None = None,
    num_refused_by_all: int = 0,
) -> str:
    """The answer in one sentence: who carries the load, by how much, at what figure.

    `offered_tokens_per_s` is what the requests ask for, where one figure holds for all runs;
    `num_refused_by_all` is how many of them no run takes, which tells no run from another.
    """
    if len(summaries) == 1:
        return _single(summaries[0], offered_tokens_per_s)
    answer = _compared(summaries, offered_tokens_per_s, num_refused_by_all)
    missed = _miss_the_slo(summaries)
    return f"{answer.removesuffix('.')}; {missed}." if missed else answer


def _miss_the_slo(summaries: Sequence[Summary]) -> str:
    """Which of the runs that carry the load miss a percentile of their SLO all the same."""
    missing = [one for one in summaries if one.get("slo_passed") is False and _carries(one)]
    if not missing:
        return ""
    if len(missing) < len(summaries):
        return f"{_labels(missing)} miss{'es' if len(missing) == 1 else ''} the SLO"
    return f"{'both' if len(missing) == 2 else f'all {len(missing)}'} miss the SLO"


def _compared(
    summaries: Sequence[Summary], offered_tokens_per_s: float | None, num_refused_by_all: int
) -> str:
    """The answer of several runs, whatever percentiles an SLO asks for."""
    key, noun, unit = _load_figure(summaries)
    values = [summary[key] or 0.0 for summary in summaries]
    if all(carry_alike(key, summaries[0], other) for other in summaries[1:]):
        load = _same_load(summaries, key, offered_tokens_per_s)
        return f"{_equal_load(summaries, load, num_refused_by_all)}."
    differ = max(values) > 1.02 * min(values)
    if not any(_carries(summary) for summary in summaries):
        none = _none_carries(len(summaries), noun_of(summaries), offered_tokens_per_s)
        if differ:
            return f"{_unequal_load(summaries, key, noun, unit)}; {none}."
        served = [summary["output_throughput"] or 0.0 for summary in summaries]
        ends = list(dict.fromkeys((number(min(served)), number(max(served)))))
        return (
            f"{none[0].upper()}{none[1:]}: {_shortfalls(summaries)}; they serve "
            f"{' to '.join(ends)} tokens/s."
        )
    if differ:
        return f"{_unequal_load(summaries, key, noun, unit)}."
    carrier = next(place for place, one in enumerate(summaries) if _carries(one))
    load = f"{number(values[carrier])} {unit}"
    load = f" of {load}" if key == "output_throughput" else f", with {load}"
    return f"{_equal_load(summaries, load, num_refused_by_all)}."


def _same_load(summaries: Sequence[Summary], key: str, offered_tokens_per_s: float | None) -> str:
    """The load that all runs carry: what is offered, not what is served until the last answer."""
    load = ""
    if offered_tokens_per_s is not None:
        load = f" of {number(offered_tokens_per_s)} tokens/s offered"
    if key == "request_goodput":
        met = [100.0 * summary["slo_attainment"] for summary in summaries]
        ends = dict.fromkeys((number(min(met)), number(max(met))))
        load += f", with {' to '.join(ends)} % of the requests within the SLO"
    return load


def _carries(summary: Summary) -> bool:
    """Whether a run served what it could take without a backlog that grew.

    A refused request is one that can never fit, so that no rate is low enough for it: it says
    nothing of the load unless it is all of it.
    """
    return summary["saturation"] != "overloaded" and _refused(summary) != "every request"


def noun_of(summaries: Sequence[Summary]) -> str:
    """What is compared: policies, or runs of one policy on other devices or with other settings."""
    policies = {one.get("policy") for one in summaries}
    return "run" if len(policies) == 1 and None not in policies else "policy"


def _plural(noun: str) -> str:
    return f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"


def labels_apart(
    labels: Sequence[str], environments: Sequence[Mapping[str, Any]], folders: Sequence[str]
) -> list[str]:
    """Labels that tell runs apart: their own, else with the profile or device, else the folder."""
    told = list(labels)
    for key in ("profile", "device"):
        if len(set(told)) < len(told) and all(one.get(key) for one in environments):
            told = [
                f"{label} on {environment[key]}"
                for label, environment in zip(labels, environments, strict=True)
            ]
    return told if len(set(told)) == len(told) else list(folders)


def _none_carries(num: int, noun: str, offered_tokens_per_s: float | None) -> str:
    of_load = ""
    if offered_tokens_per_s is not None:
        of_load = f" of {number(offered_tokens_per_s)} tokens/s offered"
    nobody = f"neither {noun}" if num == 2 else f"none of the {num} {_plural(noun)}"
    return f"{nobody} carries the whole load{of_load}"


def _shortfalls(summaries: Sequence[Summary]) -> str:
    """Which runs do not carry the load, and why."""
    named: dict[tuple[bool, str], list[str]] = {}
    for summary in summaries:
        if not _carries(summary):
            reason = (summary["saturation"] == "overloaded", _refused(summary))
            named.setdefault(reason, []).append(summary["label"])
    clauses = []
    for (is_overloaded, refused), labels in named.items():
        several = len(labels) > 1
        parts = [f"{'are' if several else 'is'} overloaded"] if is_overloaded else []
        if refused:
            parts.append(f"refuse{'' if several else 's'} {refused}")
        clauses.append(f"{listed(labels)} {listed(parts)}")
    return listed(clauses)


def _refused(summary: Summary) -> str:
    """How many requests a run refused; empty where it refused none."""
    refused, num = summary["num_refused"], summary["num_requests"]
    if not refused:
        return ""
    return "every request" if refused == num else f"{number(refused)} of {number(num)} requests"


def _unequal_load(summaries: Sequence[Summary], key: str, noun: str, unit: str) -> str:
    """Who serves most, or who share the lead, and by how much."""
    values = [summary[key] or 0.0 for summary in summaries]
    first, base, most = summaries[0], values[0], max(values)
    leaders = _leaders(summaries, key)
    of_first = ""
    if 0 not in leaders:
        of_first = (
            f"{times(most / base)} the {noun} of {first['label']}"
            if most <= 20 * base
            else f"{first['label']} only {number(base)}"
        )
    if len(leaders) > 1:
        level = [summaries[i] for i in leaders]
        what = "carry the load alike, at up to"
        foremost = summaries[values.index(most)]
        behind = [one for one in level if not _is_level(one[key] or 0.0, most)]
        if not behind:
            what = "are level at"
        elif not all(carry_alike(key, one, foremost) for one in behind):
            what = "are level at up to"
        said = f"{_labels(level)} {what} {number(most)} {unit}"
        if of_first:
            said += f" ({of_first})"
        apart = _most_apart(level)
        return f"{said} and differ most in {apart}" if apart else said
    best = leaders[0]
    if best > 0:
        name = summaries[best]["label"]
        if most > 20 * base:
            return f"{name} serves {number(most)} {unit}; {of_first}"
        return f"{name} serves {of_first}: {number(most)} against {number(base)} {unit}"
    second = max(range(1, len(values)), key=lambda i: values[i])
    return (
        f"{first['label']} serves the most {noun}, {number(most)} {unit}; "
        f"{summaries[second]['label']} comes next with {number(values[second])} "
        f"({times(values[second] / most)})"
    )


def _equal_load(
    summaries: Sequence[Summary],
    load: str,
    num_refused_by_all: int,
) -> str:
    """Who carries a load that all serve alike, and who of them answers fastest."""
    first = summaries[0]
    carriers = [summary for summary in summaries if _carries(summary)]
    but = _exceptions(carriers, num_refused_by_all)
    if len(carriers) < len(summaries):
        verb = "carries" if len(carriers) == 1 else "carry"
        return f"{_labels(carriers)} {verb} the load{load}{but}; {_shortfalls(summaries)}"
    everyone = "Both" if len(summaries) == 2 else f"All {len(summaries)}"
    carried = f"{everyone} {_plural(noun_of(summaries))} carry the load{load}{but}"
    figure = "median_tpot_ms"
    timed = [summary for summary in summaries if summary.get(figure) is not None]
    if not timed or first.get(figure) is None:
        return carried
    base, tpot = first[figure], min(summary[figure] for summary in timed)
    if max(summary[figure] for summary in timed) <= 1.02 * tpot:
        apart = _most_apart(summaries)
        return f"{carried} and differ most in {apart}" if apart else carried
    if tpot > 0.98 * base:
        return f"{carried}, and none is faster than {first['label']}: median TPOT {number(base)} ms"
    quick = [summary for summary in timed if _is_level(summary[figure], tpot)]
    return (
        f"{carried}; {_labels(quick)} answer{'s' if len(quick) == 1 else ''} fastest, with a "
        f"median TPOT of {number(tpot)} ms, {times(tpot / base)} that of {first['label']} "
        f"({number(base)} ms)"
    )


def _exceptions(carriers: Sequence[Summary], num_refused_by_all: int) -> str:
    """What is to be said of those who carry the load, in brackets: backlogs, and refusals."""
    late = [summary for summary in carriers if summary["saturation"] == "backlogged"]
    refusing = [one for one in carriers if one["num_refused"] > num_refused_by_all]
    said = []
    if len(carriers) == 1:
        # The sentence has just named the only one.
        said += ["with a backlog" for _ in late]
        said += [f"but for {_refused(one)}" for one in refusing]
    else:
        who = "all" if len(late) == len(carriers) else _labels(late)
        said += [f"{who} with a backlog"] if late else []
        said += [f"{one['label']} but for {_refused(one)}" for one in refusing]
    return f" ({listed(said)})" if said else ""


def _labels(summaries: Sequence[Summary]) -> str:
    return listed([summary["label"] for summary in summaries])


def _is_level(value: float, best: float) -> bool:
    """Whether two figures read the same, or are within 0.5 % of each other."""
    return abs(value - best) <= 0.005 * abs(best) or number(value) == number(best)


def _leaders(summaries: Sequence[Summary], key: str) -> list[int]:
    """The places of who serves most, and of who is level with it or serves more than who is."""
    best = max(summaries, key=lambda one: one[key] or 0.0)
    values = [one[key] or 0.0 for one in summaries]
    least = min(
        value
        for value, one in zip(values, summaries, strict=True)
        if _is_level(value, max(values)) or carry_alike(key, one, best)
    )
    return [place for place, value in enumerate(values) if value >= least]


def _most_apart(summaries: Sequence[Summary]) -> str:
    """The figure in which runs differ most, with its ends; empty where none differs by 2 %."""
    found, most = "", 1.02
    for key, title, unit, scale in _TELLING:
        values = [summary.get(key) for summary in summaries]
        known = [value * scale for value in values if value is not None]
        if len(known) < len(summaries) or min(known) <= 0.0 or max(known) <= most * min(known):
            continue
        low, high = min(known), max(known)
        most = high / low
        found = (
            f"{title}: {number(low)}{unit} of {summaries[known.index(low)]['label']} against "
            f"{number(high)}{unit} of {summaries[known.index(high)]['label']}"
        )
    return found


def remarks(summaries: Sequence[Summary], num_refused_by_all: int = 0) -> list[str]:
    """What has to be said beside the headline: latency, energy, quality, saturation, refusals."""
    pair = _Pair(_star(summaries), summaries[0])
    said = (
        _latencies(pair),
        _slo_met(pair),
        *slo_verdicts(summaries),
        *waited_for_start(summaries),
        _energy(pair),
        _quality(pair),
        *beyond_measured([str(one["label"]) for one in summaries], summaries),
        _overloaded(summaries),
        _refused_by_all(summaries, num_refused_by_all),
        _refused_by_some(summaries, num_refused_by_all),
        *changed_requests(summaries),
        *idle_users(summaries),
        *none_alone(summaries),
        *one_seed(summaries),
        _one_of_the_seeds(summaries),
    )
    return [remark for remark in said if remark is not None]


@dataclass(frozen=True)
class _Pair:
    """The policy that a page is about, beside the first of its policies, maybe the same."""

    star: Summary
    first: Summary

    @property
    def is_comparison(self) -> bool:
        """Whether there are two."""
        return self.star is not self.first

    def figure(self, key: str, scale: float = 1.0, digits: int = 3) -> str:
        """A figure of the one, against that of the other where there is one."""
        own, other = self.star[key], self.first.get(key)
        said = number(own * scale, digits)
        if not self.is_comparison or other is None or not counts_alike(key, self.star, self.first):
            return said
        return f"{said} against {number(other * scale, digits)}"


def _latencies(pair: _Pair) -> str | None:
    titles = {
        "median_ttft_ms": "median TTFT",
        "p99_ttft_ms": "p99 TTFT",
        "median_tpot_ms": "median TPOT",
    }
    told = [
        f"{title} {pair.figure(key)} ms"
        for key, title in titles.items()
        if pair.star.get(key) is not None and pair.first.get(key) is not None
    ]
    if not pair.is_comparison or not told:
        return None
    labels = f"{pair.star['label']} against {pair.first['label']}"
    return f"Latency of {labels}: {', '.join(told)}."


def _slo_met(pair: _Pair) -> str | None:
    star = pair.star
    if not pair.is_comparison or not star.get("slo") or star.get("slo_attainment") is None:
        return judged_by([star])
    if judged_alike([star, pair.first]):
        whose, met = "", pair.figure("slo_attainment", 100.0)
    else:
        whose, met = f" of {star['label']}", number(100.0 * star["slo_attainment"])
    return f"SLO{whose} ({limits(star['slo'])}): met by {met} % of the requests sent."


def _energy(pair: _Pair) -> str | None:
    if pair.star.get("energy_per_output_token") is None:
        return None
    cost = pair.figure("energy_per_output_token", 1e-3)
    return f"Energy: an output token of {pair.star['label']} costs {cost} J, idling included."


def _quality(pair: _Pair) -> str | None:
    agreement = pair.star.get("agreement")
    if agreement is None or agreement >= 0.9995:
        return None
    said = (
        f"Quality: {number(100 * agreement)} % of the tokens of {pair.star['label']} equal those "
        "of the same model at full depth"
    )
    if pair.star.get("perplexity") is not None:
        said += f"; perplexity {pair.figure('perplexity', digits=4)}"
    return f"{said}."


def _overloaded(summaries: Sequence[Summary]) -> str | None:
    labels = [one["label"] for one in summaries if one.get("saturation") == "overloaded"]
    if not labels:
        return None
    return (
        f"Overloaded: {listed(labels)}. The backlog grew while requests arrived, so latencies "
        "there depend on the length of the run."
    )


def _refused_by_all(summaries: Sequence[Summary], num_refused: int) -> str | None:
    if not num_refused:
        return None
    return (
        f"Every {noun_of(summaries)} refuses the same {counted(num_refused, 'request')} of "
        f"{number(summaries[0]['num_requests'])}, longer than the context or than memory holds; "
        "no SLO forgives a refusal."
    )


def _refused_by_some(summaries: Sequence[Summary], num_refused_by_all: int) -> str | None:
    told = [
        f"{one['label']} {number(one['num_refused'])}"
        for one in summaries
        if one["num_refused"] > num_refused_by_all
    ]
    return f"Refused requests, which no SLO forgives: {listed(told)}." if told else None


def changed_requests(summaries: Sequence[Summary]) -> list[str]:
    """Which requests were not sent as the workload has them: shortened, or left out."""
    shortened, dropped = [], []
    for one in summaries:
        cut, left_out = one.get("num_shortened"), one.get("num_dropped")
        num = number(one["num_requests"])
        shortened.append(f"{number(cut)} of {num} requests" if isinstance(cut, int) and cut else "")
        rows = counted(left_out, "row") if isinstance(left_out, int) and left_out else ""
        dropped.append(f"{rows} beside {num} requests" if rows else "")
    said = []
    if any(shortened):
        said.append(
            f"Shortened: {_by_label(shortened, summaries)}, longer than the context "
            '(workload.over_context = "truncate"); figures are of what is left of them.'
        )
    if any(dropped):
        said.append(
            f"Left out of the trace: {_by_label(dropped, summaries)}, since a row without output "
            "tokens or without an arrival is no request (num_dropped)."
        )
    skipped = [_skipped(one.get("skipped_rows")) for one in summaries]
    if any(skipped):
        said.append(
            f"Skipped rows of the trace: {_by_label(skipped, summaries)}, which cannot be used "
            "(workload.trace.skip_bad_rows)."
        )
    return said


def slo_verdicts(summaries: Sequence[Summary]) -> list[str]:
    """Which runs miss or pass an SLO that asks for percentiles, with the limits they miss."""
    judged = [one for one in summaries if one.get("slo_passed") is not None]
    missed = [f"{one['label']} ({_missed_limits(one)})" for one in judged if not one["slo_passed"]]
    passed = [str(one["label"]) for one in judged if one["slo_passed"]]
    said = [f"missed by {listed(missed)}"] if missed else []
    said += [f"passed by {listed(passed)}"] if passed else []
    return [f"SLO {'; '.join(said)}."] if said else []


def _missed_limits(summary: Summary) -> str:
    missed = [one for one in summary["slo_limits"] if one["passed"] is False]
    return listed([_missed_limit(one) for one in missed])


def _missed_limit(limit: Mapping[str, Any]) -> str:
    # A percentile of gaps is of all gaps together, while the attainment counts requests.
    if limit["metric"] == "itl":
        return limits(limit["limit"])
    return f"{limits(limit['limit'])}: met by {number(100.0 * limit['attainment'], 4)} %"


def waited_for_start(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """That many requests came before anything served, and so tell of the start, not of the load.

    Where most of them came at once there is nothing else to measure.
    """
    told, until_s, ends_s = [], 0.0, math.inf
    for one in summaries:
        num, measured = one.get("num_before_start"), one.get("num_measured")
        is_told = (
            num is not None
            and measured
            and max(2, _MANY_BEFORE_START * measured) <= num <= 0.5 * measured
        )
        told.append(f"{number(num)} of {number(measured)} requests" if is_told else "")
        if is_told:
            until_s, ends_s = max(until_s, one["start_s"]), min(ends_s, one["duration"])
    if not any(told):
        return []
    warmup_s = math.ceil(2.0 * until_s)
    remedy = f"measure.warmup_s = {warmup_s} leaves the start out"
    if warmup_s > 0.5 * ends_s:
        remedy = "a longer run makes less of it, and measure.warmup_s leaves the start out"
    return [
        f"Start: {_by_label(told, summaries)} came in the first {number(until_s)} s while "
        f"weights were on their way; their wait counts in every latency, and {remedy}."
    ]


def _skipped(counts: Any) -> str:
    """Rows of a trace that cannot be used: '2 rows (empty output: 2)'; empty without any."""
    if not isinstance(counts, Mapping) or not counts:
        return ""
    if not all(isinstance(num, int) for num in counts.values()):
        return ""
    reasons = ", ".join(f"{reason}: {number(num)}" for reason, num in counts.items())
    return f"{counted(sum(counts.values()), 'row')} ({reasons})"


def idle_users(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """That users of a closed loop rest for a part of the run, so that it is driven by fewer."""
    told = []
    for one in summaries:
        num, active = one.get("num_users"), one.get("mean_active_users")
        rest = num is not None and active is not None and active < ENOUGH_ACTIVE * num
        told.append(f"{number(active)} of {number(num)} users" if rest else "")
    if not any(told):
        return []
    return [
        f"Active on average: {_by_label(told, summaries)}. Users rest before their first request "
        "and once none is left to be sent, so throughput and load are those of fewer users; give "
        "more requests (workload.num_requests)."
    ]


def none_alone(summaries: Sequence[Summary]) -> list[str]:
    """Which models a policy chose that no other policy serves: its gain may be theirs alone."""
    choosing = [one for one in summaries if (one.get("num_evaluations") or 0) > 0]
    others = [one for one in summaries if not one.get("num_evaluations")]
    if not choosing or not others:
        return []
    alone = {name for one in others for name in _served(one)}
    chosen = dict.fromkeys(name for one in choosing for name in _served(one) if name not in alone)
    if not chosen:
        return []
    labels = listed([str(one["label"]) for one in choosing if not alone.issuperset(_served(one))])
    return [
        f"No other policy here serves {listed(list(chosen))}, as {labels} may: what is gained may "
        f'be these models\' own. vanilla with model = "{next(iter(chosen))}" shows one alone.'
    ]


def one_seed(summaries: Sequence[Summary]) -> list[str]:
    """That a simulation of one seed is one of many where a policy decided by what it evaluated."""
    deciding = [
        str(one["label"])
        for one in summaries
        if (one.get("num_evaluations") or 0) > 0
        and one.get("origin") == "simulated"
        and not one.get("replays_text")
        and not one.get("replications")
    ]
    if not deciding:
        return []
    verb = "decides" if len(deciding) == 1 else "decide"
    return [
        f"One seed: {listed(deciding)} {verb} on few evaluated requests, and other seeds may lead "
        f"elsewhere. --set measure.replications={_SOME_SEEDS} shows how far."
    ]


def range_over_seeds(summaries: Sequence[Summary]) -> list[str]:
    """How far throughput and response time lie apart between seeds, for each policy.

    Of several policies, also their ratios to the first one seed by seed.
    """
    seeds = seeds_of(summaries)
    if seeds is None:
        return []
    told = []
    for key, title, unit in (
        ("output_throughput", "Tokens/s", ""),
        ("median_e2el_ms", "Median E2E", " ms"),
    ):
        ranges = [_range(one["replications"]["figures"].get(key), unit) for one in summaries]
        if not any(ranges):
            continue
        told.append(f"{title} over {seeds_said(seeds)}: {_by_label(ranges, summaries)}.")
        first, *others = summaries
        ratios = [ratios_said(key, one, first) for one in others]
        if any(ratios):
            compared = _by_label(ratios, others)
            told[-1] += f" Ratios to {first['label']}, seed by seed: {compared}."
    return told


def ratios_said(key: str, own: Summary, base: Summary) -> str:
    """From the least ratio to a run of the same seed to the largest; nothing without any.

    With the median where the two lie far apart.
    """
    ratios = ratios_over_seeds(key, own, base)
    if ratios is None:
        return ""
    least, middle, most = ratios
    ends = list(dict.fromkeys(map(times, (least, most))))
    if len(ends) > 1 and _needs_median(least, most, len(own["replications"]["seeds"])):
        ends[-1] += f", median {times(middle)}"
    return " to ".join(ends)


def _needs_median(least: float, most: float, num_seeds: int) -> bool:
    return num_seeds >= _ENOUGH_SEEDS and most > _FAR_APART * least


def _range(figure: Mapping[str, Any] | None, unit: str) -> str:
    """From the least run to the most, with the median where they lie far apart; "" without any."""
    if figure is None:
        return ""
    least, most = figure["least"], figure["most"]
    said = f"{between(least, most)}{unit}"
    values = [value for value in figure.get("values", ()) if value is not None]
    if _needs_median(least, most, len(values)):
        said += f", median {number(statistics.median(values))}"
    return said


def _one_of_the_seeds(summaries: Sequence[Summary]) -> str | None:
    seeds = seeds_of(summaries)
    if seeds is None:
        return None
    return f"These are runs of one seed; means over {seeds_said(seeds)} stand below."


def _star(summaries: Sequence[Summary]) -> Summary:
    """The run that is worth setting beside the first: the best of them, else the next best.

    Best is who serves most; of those level with it, who is not overloaded, then who is fastest.
    """
    key, _, _ = _load_figure(summaries)

    def best_of(runs: Sequence[Summary]) -> Summary:
        return min((runs[place] for place in _leaders(runs, key)), key=_rank)

    best = best_of(summaries)
    return best if best is not summaries[0] or len(summaries) == 1 else best_of(summaries[1:])


def _rank(summary: Summary) -> tuple[bool, float]:
    tpot_ms = summary.get("median_tpot_ms")
    return summary["saturation"] == "overloaded", math.inf if tpot_ms is None else tpot_ms


def seeds_of(summaries: Sequence[Summary]) -> list[int] | None:
    """The seeds over which all of the runs were replicated; None unless they are the same ones."""
    replicated = [summary.get("replications") or {} for summary in summaries]
    seeds = [one.get("seeds") for one in replicated if one.get("figures")]
    if len(seeds) < len(summaries) or any(one != seeds[0] for one in seeds):
        return None
    return seeds[0]


def seeds_said(seeds: Sequence[int]) -> str:
    """Consecutive seeds in words: "the 5 seeds 1 to 5"."""
    return f"the {len(seeds)} seeds {seeds[0]} to {seeds[-1]}"


def beyond_measured(names: Sequence[str], summaries: Sequence[Summary]) -> list[str]:
    """Which runs leave the range that was measured and by what; nothing where none does."""
    return extrapolated(
        [
            (name, summary.get("beyond_measured") or ())
            for name, summary in zip(names, summaries, strict=True)
        ]
    )


def extrapolated(named: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """The same of anything that has a name and clauses; beyond three only how many there are."""
    found = [f"{name} ({'; '.join(clauses)})" for name, clauses in named if clauses]
    if len(found) > 4:
        found = [*found[:3], f"{len(found) - 3} more"]
    return [f"Extrapolated beyond what was measured: {listed(found)}."] if found else []


def _load_figure(summaries: Sequence[Summary]) -> tuple[str, str, str]:
    """What 'carrying the load' is measured by: goodput under one SLO, tokens otherwise."""
    goodputs = [summary.get("request_goodput") for summary in summaries]
    if judged_alike(summaries) and None not in goodputs and any(goodputs):
        return "request_goodput", "goodput", "requests/s within the SLO"
    return "output_throughput", "tokens", "tokens/s"


def _single(summary: Summary, offered_tokens_per_s: float | None) -> str:
    if _refused(summary) == "every request":
        return (
            f"{summary['label']} refuses every one of {number(summary['num_requests'])} requests."
        )
    sentence = (
        f"{summary['label']} serves {number(summary['output_throughput'])} tokens/s "
        f"({number(summary['request_throughput'])} requests/s)"
    )
    latencies = [
        f"{title} of {number(summary[figure])} ms"
        for title, figure in (("TTFT", "median_ttft_ms"), ("TPOT", "median_tpot_ms"))
        if summary[figure] is not None
    ]
    if latencies:
        sentence += f" at a median {listed(latencies)}"
    if summary.get("slo_attainment") is not None:
        met = number(100 * summary["slo_attainment"])
        missed = ", which is missed" if summary.get("slo_passed") is False else ""
        sentence += f"; {met} % of the requests sent meet the SLO{missed}"
    sentence += f"; the system is {summary['saturation']}"
    if summary["saturation"] == "overloaded" and offered_tokens_per_s is not None:
        sentence += f" by the {number(offered_tokens_per_s)} tokens/s offered"
    return f"{sentence}."
