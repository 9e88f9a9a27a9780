"""A column of a trace says of each request which text it is of, however the trace is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from helios_sim.errors import InputError
from helios_sim.scenario import parse_scenario, resolved
from helios_sim.search.traffic import Traffic
from helios_sim.settings.toml import read_toml
from helios_sim.settings.toml_writer import toml_text
from helios_sim.workload.requests import Requests, WorkloadSettings, generate

COLUMNS = {"arrival": "sent", "prompt": "in", "output": "out", "domain": "use"}
ROWS = [(0, 10, 1, "sql"), (1, 11, 1, "code"), (3, 12, 1, "talk"), (4, 13, 1, "sql")]
MEANT = {"sql": "code", "talk": "prose"}
PROFILE = ("prose", "code", "tables")


def log(folder: Path, rows: list[tuple[Any, ...]]) -> Path:
    """A log of one's own, with the domain last."""
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    path = folder / "log.csv"
    path.write_text(f"sent,in,out,use\n{text}", encoding="utf-8")
    return path


def requests(folder: Path, trace: dict[str, Any] | None = None, **more: Any) -> Requests:
    """The requests of a workload whose trace is the log."""
    table = {"file": "log.csv", "columns": COLUMNS, "domains": MEANT} | (trace or {})
    settings = WorkloadSettings.model_validate({"trace": table, **more})
    return generate(settings, 1, folder, PROFILE)


def told(found: Requests) -> list[tuple[int, str]]:
    """Each request's prompt, which tells its row of the log, and its domain."""
    names = [found.domains[place] for place in found.domain.tolist()]
    return list(zip(found.prompt_tokens.tolist(), names, strict=True))


BY_PROMPT = {10: "code", 11: "code", 12: "prose", 13: "code"}


@pytest.mark.parametrize(
    ("trace", "more", "prompts"),
    [
        ({}, {}, [10, 11, 12, 13]),
        ({"rate_scale": 2.0, "repeat": 2}, {}, [10, 11, 12, 13] * 2),
        ({"start_s": 1.0, "max_requests": 2}, {}, [11, 12]),
        ({}, {"num_requests": 3}, [10, 11, 12]),
        (
            {},
            {"num_requests": 6, "arrivals": {"kind": "poisson", "rate_per_s": 1.0}},
            [10, 11, 12, 13, 10, 11],
        ),
        (
            {},
            {
                "num_requests": 3,
                "arrivals": {"kind": "closed", "num_users": 2, "think_s": 1.0},
                "first_trace_row": 2,
            },
            [12, 13, 10],
        ),
    ],
)
def test_a_request_keeps_the_domain_of_its_row(
    tmp_path: Path, trace: dict[str, Any], more: dict[str, Any], prompts: list[int]
) -> None:
    """Replayed, stretched, repeated or cut, and where other arrivals take its lengths."""
    log(tmp_path, ROWS)
    assert told(requests(tmp_path, trace, **more)) == [(one, BY_PROMPT[one]) for one in prompts]


def test_rows_drawn_at_random_keep_their_domains(tmp_path: Path) -> None:
    log(tmp_path, ROWS)
    arrivals = {"kind": "constant", "rate_per_s": 1.0}
    found = told(requests(tmp_path, num_requests=100, arrivals=arrivals, trace_rows="random"))
    assert {prompt for prompt, _ in found} == {10, 11, 12, 13}
    assert all(BY_PROMPT[prompt] == name for prompt, name in found)


def test_rows_sorted_or_left_out_take_their_domains_along(tmp_path: Path) -> None:
    """Failures are left out, and rows without a domain cannot be used."""
    log(tmp_path, [(5, 10, 1, "sql"), (1, 11, 0, "what"), (2, 12, 1, " talk "), (3, 9, 1, "")])
    with pytest.raises(InputError, match=r"line 5: use is an empty cell; the column must hold na"):
        requests(tmp_path, {"sort": True})
    found = requests(tmp_path, {"sort": True, "skip_bad_rows": True})
    assert told(found) == [(12, "prose"), (10, "code")]
    assert found.left_out == {"num_dropped": 1, "skipped_rows": {"empty domain": 1}}


def test_a_parquet_file_tells_domains_like_a_csv(tmp_path: Path) -> None:
    frame = pl.DataFrame(ROWS, schema=["sent", "in", "out", "use"], orient="row")
    frame.with_columns(pl.col("use").cast(pl.Categorical)).write_parquet(tmp_path / "log.parquet")
    found = told(requests(tmp_path, {"file": "log.parquet"}))
    assert found == [(prompt, BY_PROMPT[prompt]) for _, prompt, _, _ in ROWS]


def test_names_that_the_profile_has_need_no_mapping(tmp_path: Path) -> None:
    log(tmp_path, [(0, 10, 1, "tables"), (1, 11, 1, "prose")])
    assert told(requests(tmp_path, {"domains": None})) == [(10, "tables"), (11, "prose")]


def test_names_that_the_profile_does_not_know_are_refused_with_those_it_has(
    tmp_path: Path,
) -> None:
    log(tmp_path, ROWS)
    with pytest.raises(
        InputError,
        match=r"not all known: 'sql', 'talk'; the profile has 'prose', 'code', 'tables'\. Say which"
        r' of them each is, such as workload\.trace\.domains = \{ "sql" = "prose" \}\.$',
    ) as caught:
        requests(tmp_path, {"domains": None})
    assert caught.value.where == "workload.trace.columns.domain"
    with pytest.raises(
        InputError, match=r"domains says 'talk' = 'pros'\. Did you mean 'prose'\? There is no such"
    ) as caught:
        requests(tmp_path, {"domains": {**MEANT, "talk": "pros"}})
    assert caught.value.where == "workload.trace.domains"


def test_a_column_of_something_else_is_no_column_of_domains(tmp_path: Path) -> None:
    log(tmp_path, [(n, 10, 1, f"user {n}") for n in range(1001)])
    with pytest.raises(InputError, match="use holds 1,001 names, such as 'user 0' and 'user 1'"):
        requests(tmp_path)


def test_one_setting_alone_says_which_request_is_of_which_text(tmp_path: Path) -> None:
    """Shares beside a column are refused, and so is a mapping of names that no column has."""
    log(tmp_path, ROWS)
    with pytest.raises(ValidationError, match="domains gives shares of 'code', and a column of"):
        requests(tmp_path, domains=[{"name": "code", "share": 1.0}])
    plain = {name: COLUMNS[name] for name in ("arrival", "prompt", "output")}
    with pytest.raises(ValidationError, match=r"give columns\.domain, or leave domains out"):
        requests(tmp_path, {"columns": plain})
    with pytest.raises(ValidationError, match="must be three columns, and domain another"):
        requests(tmp_path, {"columns": {**COLUMNS, "domain": "in"}})


def scenario_data(**workload: Any) -> dict[str, Any]:
    """A scenario on a profile with the domains code, prose and tables."""
    trace = {"file": "log.csv", "columns": COLUMNS, "domains": {"support chat": "prose"}}
    return {
        "name": "own",
        "workload": {"trace": trace, **workload},
        "fleet": {"profile": "small-family-cpu"},
        "policy": [{"use": "vanilla"}],
    }


def test_the_resolved_scenario_brings_the_same_requests(tmp_path: Path) -> None:
    log(tmp_path, [(0, 10, 1, "support chat"), (1, 11, 1, "code")])
    first = parse_scenario(scenario_data(), "s.toml", tmp_path)
    (tmp_path / "again.toml").write_text(toml_text(resolved(first)), encoding="utf-8")
    again = parse_scenario(read_toml(tmp_path / "again.toml"), "again.toml", tmp_path)
    assert again == first
    found = generate(again.workload, 1, tmp_path, PROFILE)
    assert told(found) == [(10, "prose"), (11, "code")]


@pytest.mark.parametrize("drawn", [False, True])
def test_samples_of_a_search_keep_the_domains_of_the_rows_that_they_take(
    tmp_path: Path, drawn: bool
) -> None:
    """Windows of a replayed trace, and rows that drawn arrivals take from other places on."""
    uses = ["code" if n % 3 else "support chat" for n in range(400)]
    log(tmp_path, [(n / 10, n + 1, 5, use) for n, use in enumerate(uses)])
    poisson = {"arrivals": {"kind": "poisson", "rate_per_s": 5.0}, "num_requests": 400}
    base = parse_scenario(scenario_data(**(poisson if drawn else {})), "s.toml", tmp_path)
    traffic = Traffic(base, tmp_path, "s.toml", 100, 4, 0.1, most_samples=4)
    seen = set()
    for index in range(4):
        sample = traffic.sample(base, index, 20.0, 2)
        found = told(generate(sample.workload, sample.seed, tmp_path, PROFILE))
        assert len(found) == 200
        seen |= {prompt for prompt, _ in found}
        meant = {"support chat": "prose", "code": "code"}
        assert all(meant[uses[prompt - 1]] == name for prompt, name in found)
    assert seen == set(range(1, 401))
