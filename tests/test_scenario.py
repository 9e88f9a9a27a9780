"""Scenario files: what is read, and what each mistake is told, with its file, place and remedy."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from helios_sim.cards import policy_slo
from helios_sim.errors import InputError
from helios_sim.experiment import choose_policies, prepare, run_policy
from helios_sim.policy.contract import Slo
from helios_sim.policy.registry import policy_names, settled_options
from helios_sim.runs.records import RUN_FILES, write_run
from helios_sim.scenario import (
    PolicySettings,
    Scenario,
    apply_change,
    load_scenario,
    of_one_policy,
    parse_scenario,
    resolved,
    scenario_schema,
    settled,
)
from helios_sim.settings.slo import parse_slo
from helios_sim.settings.toml_writer import toml_text

SHIPPED = sorted((Path(__file__).resolve().parent.parent / "scenarios").glob("*.toml"))
BASE = """\
name = "base"

[workload]
num_requests = 20
arrivals = { kind = "poisson", rate_per_s = 4.0 }
prompt = { kind = "constant", tokens = 100 }
output = { kind = "constant", tokens = 10 }

[fleet]
profile = "opt-a100-40gb"

[slo]
text = "ttft:200 tpot:50"

[[policy]]
use = "helios"
"""


OWN = """\
from helios_sim.policy.contract import Keep, Watching

class Own:
    name = "own"
    sees_future = False
    watching = Watching()
    confidence_threshold = None

    def __init__(self):
        pass

    def decide(self, snapshot):
        return Keep("Own.")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A scenario file without a flaw."""
    path = tmp_path / "base.toml"
    path.write_text(BASE, encoding="utf-8")
    return path


def told(path: Path, *changes: str) -> tuple[str, str]:
    """What somebody is told whose scenario has these changes: the place, and the message."""
    with pytest.raises(InputError) as caught:
        experiment = prepare(load_scenario(path, changes), path.parent, str(path))
        experiment.requests(1)
    return str(caught.value.where), caught.value.message


def told_of(path: Path, text: str) -> tuple[str, str]:
    """What somebody is told whose scenario is this text."""
    path.write_text(text, encoding="utf-8")
    return told(path)


def test_a_scenario_without_a_flaw_is_read_with_every_default(file: Path) -> None:
    scenario = load_scenario(file)
    assert scenario.name == "base"
    assert scenario.seed == 1
    assert scenario.fleet.num_replicas == 1
    assert scenario.serving.batching == "continuous"
    assert scenario.policy[0].name == "helios"
    requests, _ = prepare(scenario, file.parent).requests(1)
    assert len(requests) == 20
    assert requests.num_users is None


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_scenario_is_good_and_asks_a_question(path: Path) -> None:
    scenario = load_scenario(path)
    assert scenario.question.endswith("?")
    experiment = prepare(scenario, path.parent, str(path))
    requests, _ = experiment.requests(scenario.seed)
    assert len(requests) > 0


@pytest.mark.parametrize(
    ("change", "place", "nearest"),
    [
        ("fleet.num_replica=2", "fleet.num_replica", "num_replicas"),
        ("serving.max_batsh=2", "serving.max_batsh", "max_batch"),
        ("measure.warmups=2", "measure.warmups", "warmup_s"),
        ("workload.arival={}", "workload.arival", "arrivals"),
        ("workload.arrivals.rate_per_sec=1", "workload.arrivals.rate_per_sec", "rate_per_s"),
        ("workload.prompt.token=1", "workload.prompt.token", "tokens"),
        ("sed=3", "sed", "seed"),
    ],
)
def test_an_unknown_key_is_told_the_nearest_known_one(
    file: Path, change: str, place: str, nearest: str
) -> None:
    where, message = told(file, change)
    assert where == f"{file}, {place}"
    assert message.startswith(f"Unknown key {place.split('.')[-1]!r}. Did you mean {nearest!r}?")
    assert "Allowed are " in message


def test_the_keys_allowed_are_those_of_the_kind_that_was_chosen(file: Path) -> None:
    _, message = told(file, "workload.arrivals.num_users=3")
    assert message.endswith("Allowed are kind, rate_per_s.")
    _, message = told(file, 'workload.arrivals={kind="gamma", rate_per_s=1.0, cvv=2.0}')
    assert message.endswith("Did you mean 'cv'? Allowed are cv, kind, rate_per_s.")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ("fleet.num_replicas='two'", "was given 'two'; input should be a valid integer"),
        ("fleet.num_replicas='2'", "was given '2'; input should be a valid integer"),
        ("fleet.num_replicas=2.5", "was given 2.5; input should be a valid integer"),
        ("fleet.num_replicas=true", "was given True; input should be a valid integer"),
        ("fleet.num_replicas=0", "was given 0; input should be greater than or equal to 1"),
        (
            "fleet.num_replicas=10001",
            "was given 10001; input should be less than or equal to 10000",
        ),
        ("fleet.memory_utilisation=1.5", "was given 1.5; input should be less than or equal to 1"),
        ("fleet.memory_utilisation=0", "was given 0; input should be greater than 0"),
        ("fleet.memory_utilisation=90", "was given 90; input should be less than or equal to 1"),
        ("fleet.memory_bytes='40GB'", "a whole number of bytes, such as 40000000000"),
        (
            "fleet.memory_bytes=40GiB",
            "was given '40GiB'; it must be a whole number of bytes, such as 42949672960",
        ),
        ("fleet.reserve_bytes=1.5 GiB", "a whole number of bytes, such as 1610612736"),
        ("fleet.memory_bytes=much", "was given 'much'; input should be a valid integer"),
        ("fleet.reserve_bytes=-1", "was given -1; input should be greater than or equal to 0"),
        (
            "fleet.candidates='opt-1.3b'",
            "was given 'opt-1.3b'; it must be an array, such as [\"opt-1.3b\"]; in a shell --set "
            "'fleet.candidates=[\"opt-1.3b\"]'",
        ),
        ("fleet.candidates=[a, b]", 'in a shell --set \'fleet.candidates=["a", "b"]\''),
        ("fleet.candidates=3", "was given 3; it must be an array"),
        ("serving.max_batch=5000", "was given 5000; input should be less than or equal to 4096"),
        ("serving.block_tokens=0", "was given 0; input should be greater than or equal to 1"),
        ("serving.watermark=1", "was given 1; input should be less than 1"),
        ("serving.overlap_loads='yes'", "was given 'yes'; input should be a valid boolean"),
        ("measure.warmup_s=-1", "was given -1; input should be greater than or equal to 0"),
        ("measure.warmup_s='10 s'", "was given '10 s'; input should be a valid number"),
        ("measure.timeline_interval_s=0", "was given 0; input should be greater than 0"),
        ("workload.num_requests=0", "was given 0; input should be greater than or equal to 1"),
        ("workload.num_requests=1e3", "was given 1000.0; input should be a valid integer"),
        (
            "workload.arrivals.rate_per_s=-1.0",
            "was given -1.0; input should be greater than or equal to 0.000001",
        ),
        ("workload.arrivals.rate_per_s='4/s'", "was given '4/s'; input should be a valid number"),
        ("workload.arrivals.rate_per_s=inf", "was given inf; input should be a finite number"),
        ("workload.arrivals.rate_per_s=nan", "was given nan; input should be a finite number"),
        ("workload.arrivals.rate_per_s=1e9", "input should be less than or equal to 1000000"),
        ("workload.prompt.tokens=0", "was given 0; input should be greater than or equal to 1"),
        ("workload.prompt.tokens=-5", "was given -5; input should be greater than or equal to 1"),
        ("seed=-1", "was given -1; input should be greater than or equal to 0"),
        ("seed=1.5", "was given 1.5; input should be a valid integer"),
        ("schema_version=2", "was given 2; input should be 1"),
        ("question=3", "was given 3; input should be a valid string"),
        ("name=''", "was given ''; string should have at least 1 character"),
        ("fleet=3", "was given 3; it must be a table"),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_told_what_is_allowed(
    file: Path, change: str, rule: str
) -> None:
    place = change.split("=")[0]
    where, message = told(file, change)
    assert where == f"{file}, {place}"
    assert message.startswith(place)
    assert message.endswith(f"{rule}.")


def test_a_number_too_long_or_brackets_too_deep_to_read_are_text_and_told_in_short(
    file: Path,
) -> None:
    for given in ("9" * 5000, "0x" + "f" * 5000, "[" * 3000):
        where, message = told(file, f"seed={given}")
        assert where == f"{file}, seed"
        assert message == f"seed was given '{given[:56]}...; input should be a valid integer."
    where, message = told(file, f"policy.{'9' * 5000}.use='x'")
    assert where == "--set"
    assert "needs an index from 0 to 0 in place of '999" in message


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ("serving.batching='chunkd'", "'static', 'continuous' or 'chunked'"),
        ("serving.skipped_kv='filed'", "'filled' or 'recomputed'"),
        ("serving.on_change='kill'", "'drain' or 'recompute'"),
        ("fleet.weights_start='tape'", "'disk' or 'host'"),
        (
            "fleet.router='fastest'",
            "'round-robin', 'random', 'least-outstanding' or 'least-kv'",
        ),
        ("workload.over_context='cut'", "'refuse', 'truncate' or 'error'"),
    ],
)
def test_an_unknown_choice_is_told_the_choices(file: Path, change: str, allowed: str) -> None:
    where, message = told(file, change)
    assert where == f"{file}, {change.split('=')[0]}"
    assert message.endswith(f"input should be {allowed}.")


def test_an_unknown_kind_is_told_the_nearest_and_all(file: Path) -> None:
    where, message = told(file, "workload.arrivals.kind='poison'")
    assert where == f"{file}, workload.arrivals"
    assert message.startswith("The kind 'poison' is unknown. Did you mean 'poisson'? Allowed are")
    where, message = told(file, "workload.prompt={tokens=3}")
    assert (where, message) == (f"{file}, workload.prompt", "The key 'kind' is required.")


def test_a_router_is_refused_where_users_stay_on_their_replicas(file: Path) -> None:
    closed = ["workload.arrivals={kind='closed', num_users=8, think_s=1}", "fleet.num_replicas=2"]
    assert load_scenario(file, [*closed, "fleet.router=round-robin"]).fleet.num_replicas == 2
    for router in ("random", "least-outstanding", "least-kv"):
        with pytest.raises(InputError, match=f"fleet.router is '{router}' with closed arrivals"):
            load_scenario(file, [*closed, f"fleet.router={router}"])


@pytest.mark.parametrize(
    ("without", "place", "key"),
    [
        ('name = "base"\n', "name", "name"),
        ('profile = "opt-a100-40gb"\n', "fleet.profile", "profile"),
        ('[fleet]\nprofile = "opt-a100-40gb"\n', "fleet", "fleet"),
        ('[[policy]]\nuse = "helios"\n', "policy", "policy"),
        ('use = "helios"\n', "policy.0.use", "use"),
    ],
)
def test_a_missing_key_is_named(file: Path, without: str, place: str, key: str) -> None:
    where, message = told_of(file, BASE.replace(without, ""))
    assert where == f"{file}, {place}"
    assert message == f"The key {key!r} is required."


def test_a_workload_needs_arrivals_and_lengths(file: Path) -> None:
    where, message = told_of(
        file, BASE.replace('output = { kind = "constant", tokens = 10 }\n', "")
    )
    assert where == f"{file}, workload"
    assert message.startswith("The workload has no output lengths; give output,")


def test_a_size_is_either_a_number_of_requests_or_a_duration(file: Path) -> None:
    where, message = told(file, "workload.duration_s=10.0")
    assert where == f"{file}, workload"
    assert message == "Both of num_requests and duration_s were given; exactly one is needed."
    _, message = told_of(file, BASE.replace("num_requests = 20\n", ""))
    assert message == "Neither of num_requests and duration_s was given; exactly one is needed."


def test_a_token_budget_below_the_batch_is_refused_for_chunked_batching(file: Path) -> None:
    changes = ("serving.batching='chunked'", "serving.chunk_tokens=64", "serving.max_batch=65")
    where, message = told(file, *changes)
    assert where == f"{file}, serving"
    assert message.startswith("chunk_tokens is 64 but max_batch is 65;")
    assert "at least max_batch" in message
    assert load_scenario(file, [*changes, "serving.max_batch=64"]).serving.max_batch == 64
    assert load_scenario(file, [*changes, "serving.batching='static'"]).serving.max_batch == 65


@pytest.mark.parametrize("batching", ["static", "chunked"])
def test_places_of_held_rows_are_given_away_in_continuous_batches_alone(
    file: Path, batching: str
) -> None:
    where, message = told(file, "serving.max_held=4", f"serving.batching='{batching}'")
    assert where == f"{file}, serving"
    assert message.startswith(f"max_held is 4 with {batching} batching;")
    assert "otherwise max_held must be 0" in message
    assert load_scenario(file, ["serving.max_held=4"]).serving.max_held == 4


def test_two_policies_of_one_name_need_labels(file: Path) -> None:
    twice = BASE + '\n[[policy]]\nuse = "helios"\ntop_k = 2\n'
    where, message = told_of(file, twice)
    assert where == f"{file}, the file"
    assert message == "Two policies are called 'helios'; give each a label of its own."
    file.write_text(twice + 'label = "two"\n', encoding="utf-8")
    assert [policy.name for policy in load_scenario(file).policy] == ["helios", "two"]


def test_a_scenario_without_any_policy_is_refused(file: Path) -> None:
    where, message = told(file, "policy=[]")
    assert where == f"{file}, policy"
    assert "at least 1 item" in message


def test_an_unknown_policy_is_told_the_nearest_and_all(file: Path) -> None:
    where, message = told(file, "policy.0.use='heliso'")
    assert where == f"{file}, policy.0 (heliso)"
    assert message.startswith("Policy 'heliso' is not known; it must be one of 'helios', 'vanilla'")
    assert message.endswith("or a class of your own as 'module:Class'. Did you mean 'helios'?")
    where, message = told(file, "policy.0.use='nowhere:Thing'")
    assert where == f"{file}, policy.0 (nowhere:Thing)"
    assert message.endswith(
        f"no such module on the Python path and no file nowhere.py in {file.parent}."
    )


def test_an_unknown_or_impossible_option_of_a_policy_is_refused(file: Path) -> None:
    where, message = told(file, "policy.0.reases_requests=3")
    assert where == f"{file}, policy.0 (helios)"
    assert "unknown option 'reases_requests'; its options are 'top_k'," in message
    assert message.endswith("Did you mean 'reassess_requests'?")
    _, message = told(file, "policy.0.reassess_requests=-1")
    assert message.startswith("Option 'reassess_requests' was given -1; it must be a whole number")
    _, message = told(file, "policy.0.objective='speed'")
    assert message.startswith(
        "Option 'objective' was given 'speed'; it must be one of 'throughput'"
    )


@pytest.mark.parametrize(
    "policy",
    [
        'use = "ee-single"\nexit_mode = "rebatch"',
        'use = "helios"\nlabel = "mine"\nevaluation_exit_mode = "rebatch"',
        'use = "helios"\nlabel = "mine"\nafter_load_exit_mode = "rebatch"',
    ],
)
def test_rebatching_and_recomputed_kv_exclude_each_other(file: Path, policy: str) -> None:
    both = BASE + f'\n[serving]\nskipped_kv = "recomputed"\n[[policy]]\n{policy}\n'
    where, message = told_of(file, both)
    assert where == f"{file}, serving.skipped_kv"
    assert 'exit_mode "rebatch"' in message
    assert message.endswith('use skipped_kv = "filled".')


def test_an_unknown_profile_is_told_the_nearest_and_all(file: Path) -> None:
    where, message = told(file, "fleet.profile='opt-a100'")
    assert where.startswith(f"{file}, fleet.profile, ")
    assert message.startswith("Profile 'opt-a100' was not found. Did you mean 'opt-a100-40gb'?")
    assert "'layerskip-h100-80gb'" in message


def test_an_unknown_profile_is_told_the_folder_beside_the_scenario_that_it_may_mean(
    file: Path,
) -> None:
    (file.parent / "mine" / "l40s").mkdir(parents=True)
    (file.parent / "mine" / "l40").mkdir()
    (file.parent / "mine" / "l40s" / "profile.json").write_text("{}")
    _, message = told(file, "fleet.profile=mine/l40q")
    assert "Did you mean 'mine/l40s'?" in message
    for given in ("..", "nowhere/l40s", "\0"):
        with pytest.raises(InputError):
            prepare(load_scenario(file, [f"fleet.profile='{given}'"]), file.parent)


def test_an_unknown_or_doubled_candidate_is_refused(file: Path) -> None:
    where, message = told(file, "fleet.candidates=['opt-6.7b', 'opt-1.3c']")
    assert where == f"{file}, fleet.candidates.1"
    assert "has no model 'opt-1.3c'. Did you mean 'opt-1.3b'? It has opt-1.3b, opt-6.7b." in message
    where, message = told(file, "fleet.candidates=['opt-6.7b', 'opt-6.7b']")
    assert (where, message) == (f"{file}, fleet.candidates", "A candidate is named twice.")


def test_an_unknown_domain_is_told_the_nearest_and_all(file: Path) -> None:
    where, message = told(file, "workload.domains=[{name='chatt', share=1.0}]")
    assert where == f"{file}, workload.domains"
    assert message == (
        "The domain 'chatt' is unknown. Did you mean 'chat'? The profile has chat, code."
    )


@pytest.mark.parametrize(
    ("slo", "place", "said"),
    [
        (
            "text='ttfx:200'",
            "slo.text",
            "'ttfx' in 'ttfx:200' is no SLO metric. Did you mean",
        ),
        ("text='ttft:-5'", "slo.text", "is not positive and finite"),
        ("text='ttft:200 parsec'", "slo.text", "'parsec' is no SLO limit; allowed are"),
        ("text=''", "slo.text", "The SLO text is empty; it is written as"),
        (
            "txt='a'",
            "slo",
            "'txt' is no key of an SLO. Did you mean 'text'? Allowed are text, preset",
        ),
        ("ttft_ms=100", "slo", "The SLO was given text, ttft_ms together; allowed is either"),
    ],
)
def test_a_flawed_slo_is_told_what_is_allowed(file: Path, slo: str, place: str, said: str) -> None:
    where, message = told(file, f"slo.{slo}")
    assert where == f"{file}, {place}"
    assert said in message


def test_an_slo_table_without_a_key_is_refused_but_none_is_needed(file: Path) -> None:
    where, message = told(file, "slo={}")
    assert where == f"{file}, slo"
    assert message.startswith("The SLO names no limit; allowed are text, preset, ttft_ms,")
    file.write_text(BASE.replace('[slo]\ntext = "ttft:200 tpot:50"\n', ""), encoding="utf-8")
    scenario = load_scenario(file)
    assert scenario.slo_spec is None
    assert "slo" not in resolved(scenario)
    assert parse_scenario(resolved(scenario), "again", file.parent) == scenario


def test_a_run_on_record_with_an_empty_slo_table_is_run_again_without_one(file: Path) -> None:
    """What somebody writes is refused, there too."""
    text = file.read_text(encoding="utf-8").replace('text = "ttft:200 tpot:50"\n', "")
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="names no limit"):
        load_scenario(file)
    (file.parent / "totals.json").write_text("{}", encoding="utf-8")
    assert load_scenario(file).slo_spec is None
    with pytest.raises(InputError, match="names no limit"):
        load_scenario(file, ["slo={}"])


def test_a_run_on_record_keeps_figures_of_other_policies_and_is_run_again_without_them(
    file: Path,
) -> None:
    """In a question they are refused."""
    figure = '[[published]]\nfigure = "output_throughput"\npolicy = "helios"\nsource = "S"\n'
    figures = (f"{figure}published = 9.0\n", f'{figure}published = 1.1\nagainst = "wait"\n')
    text = file.read_text(encoding="utf-8") + "".join(figures)
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="names the policy 'wait'"):
        load_scenario(file)
    (file.parent / "totals.json").write_text("{}", encoding="utf-8")
    assert [entry.published for entry in load_scenario(file).published] == [9.0]
    file.write_text(text.replace("[[policy]]", "[policy]"), encoding="utf-8")
    with pytest.raises(InputError, match="policy"):
        load_scenario(file)


def test_a_request_longer_than_the_context_is_an_error_where_asked(file: Path) -> None:
    where, message = told(file, "workload.prompt.tokens=3000", "workload.over_context='error'")
    assert where == f"{file}, workload"
    assert message.startswith("Request 0 has 3000 prompt and 10 output tokens, together more than")
    experiment = prepare(
        load_scenario(file, ["workload.prompt.tokens=3000", "workload.over_context='truncate'"]),
        file.parent,
    )
    requests, num_shortened = experiment.requests(1)
    assert num_shortened == 20
    assert set(requests.prompt_tokens.tolist()) == {experiment.setup.context_tokens - 10}


def test_a_missing_trace_names_the_file_that_is_missing(file: Path) -> None:
    trace = '[workload.trace]\nfile = "nothing.csv"\n'
    where, message = told_of(file, BASE.replace(BASE[15 : BASE.index("[fleet]")], trace))
    assert str(file.parent / "nothing.csv") in where
    assert message


def test_a_model_that_cannot_fit_is_refused_before_anything_is_served(file: Path) -> None:
    scenario = load_scenario(file, ["fleet.memory_bytes=2500000000"])
    told = r"'opt-1\.3b', 'opt-6\.7b' fits in memory .* there are 2,250,000,000"
    with pytest.raises(InputError, match=told):
        run_policy(prepare(scenario, file.parent), scenario.policy[0])


def test_a_missing_file_is_told_the_nearest_one(file: Path) -> None:
    with pytest.raises(
        InputError, match=r"bse\.toml: There is no scenario file; did you mean 'bas"
    ):
        load_scenario(file.with_name("bse.toml"))
    with pytest.raises(InputError, match="This is a folder"):
        load_scenario(file.parent)
    with pytest.raises(InputError, match="There is no scenario file"):
        load_scenario(file.parent / "nowhere" / "base.toml")
    for long in (file.parent / ("x" * 300), file.parent / ("x" * 300) / "base.toml"):
        with pytest.raises(InputError, match=r"The file cannot be accessed: File name too long"):
            load_scenario(long)


def test_invalid_toml_is_told_where_it_breaks(file: Path) -> None:
    where, message = told_of(file, BASE.replace('"opt-a100-40gb"', "opt-a100-40gb"))
    assert where == str(file)
    assert message.startswith("This is not valid TOML:")
    assert "line 10" in message
    file.write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load_scenario(file).name
    file.write_bytes(b"\xff\xfe\x00")
    assert told(file) == (str(file), "This is not UTF-8 text.")
    assert told_of(file, "x = " + "[" * 3000) == (str(file), "The values are nested too deeply.")
    for long in ("9" * 5000, "0x" + "f" * 5000):
        where, message = told_of(file, f"seed = {long}")
        assert where == str(file)
        assert message.startswith("The file cannot be read (Exceeds the limit (4300 digits)")


def test_a_place_in_an_empty_list_is_refused_as_such(file: Path) -> None:
    where, message = told(file, "policy=[]", "policy.0.use='x'")
    assert where == "--set"
    assert message == "'policy.0.use' goes into 'policy', which is an empty list."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("noequals", "'noequals' cannot be read; write dotted.key=value"),
        ("=3", "'=3' cannot be read; write dotted.key=value"),
        ("fleet..x=3", "'fleet..x=3' cannot be read; write dotted.key=value"),
        ("policy.1.use='x'", "'policy.1.use' needs an index from 0 to 0 in place of '1'"),
        ("policy.x.use='x'", "'policy.x.use' needs an index from 0 to 0 in place of 'x'"),
        ("policy.².use='x'", "'policy.².use' needs an index from 0 to 0 in place of '²'"),
        ("name.x=1", "'name.x' goes into 'name', which is a plain value"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused(file: Path, change: str, said: str) -> None:
    where, message = told(file, change)
    assert where == "--set"
    assert message.startswith(said)


def test_changes_take_toml_values_or_bare_words(file: Path) -> None:
    scenario = load_scenario(
        file,
        [
            "fleet.num_replicas=3",
            "fleet.router=least-kv",
            'fleet.candidates=["opt-1.3b"]',
            "serving.overlap_loads=false",
            "workload.arrivals.rate_per_s = 2.5",
            "policy.0.objective=energy",
            "measure.warmup_s=5",
            'slo.text="ttft:100"',
        ],
    )
    assert scenario.fleet.num_replicas == 3
    assert scenario.fleet.router == "least-kv"
    assert scenario.fleet.candidates == ("opt-1.3b",)
    assert not scenario.serving.overlap_loads
    assert scenario.policy[0].options == {"objective": "energy"}
    assert scenario.measure.warmup_s == 5.0
    assert scenario.workload.arrivals.rate_per_s == 2.5
    assert str(scenario.slo_spec) == "ttft<=100ms"


def test_a_later_change_wins_and_reaches_into_lists() -> None:
    data: dict[str, Any] = {"policy": [{"use": "a"}, {"use": "b"}]}
    for change in ("policy.1.use=c", "policy.1.use=d", "new.table.key=[1, 2]"):
        apply_change(data, change)
    assert data == {"policy": [{"use": "a"}, {"use": "d"}], "new": {"table": {"key": [1, 2]}}}


def test_a_change_without_a_value_removes_the_setting() -> None:
    data: dict[str, Any] = {"policy": [{"use": "a"}, {"use": "b"}], "slo": {"e2e_s": 9.0}}
    for change in ("policy.0=", "policy.0.use = ", "slo="):
        apply_change(data, change)
    assert data == {"policy": [{}]}


@pytest.mark.parametrize("change", ["slo=", "policy.1=", "policy.0.label=", "policy.0.use.x="])
def test_what_is_not_set_cannot_be_removed(change: str) -> None:
    data: dict[str, Any] = {"policy": [{"use": "a"}]}
    with pytest.raises(InputError, match=re.escape(f"{change[:-1]!r} is not set")):
        apply_change(data, change)
    assert data == {"policy": [{"use": "a"}]}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_resolved_scenario_written_as_toml_is_the_same_scenario(path: Path) -> None:
    scenario = load_scenario(path)
    again = tomllib.loads(toml_text(resolved(scenario)))
    assert parse_scenario(again, "again", path.parent) == scenario


@pytest.mark.parametrize("use", policy_names())
def test_a_run_says_every_option_of_its_policy_and_is_itself_when_run_again(
    use: str, tmp_path: Path
) -> None:
    path = tmp_path / "base.toml"
    path.write_text(BASE.replace("helios", use), encoding="utf-8")
    scenario = load_scenario(path)
    first = run_policy(prepare(scenario, tmp_path), scenario.policy[0])
    write_run(first.run, first.summary, tmp_path / "first")
    again = load_scenario(tmp_path / "first" / "scenario.toml")
    assert set(again.policy[0].options) == set(settled_options(use, {}))
    assert parse_scenario(of_one_policy(again, again.policy[0], tmp_path), "", tmp_path) == again
    second = run_policy(prepare(again, tmp_path), again.policy[0])
    write_run(second.run, second.summary, tmp_path / "second")
    for name in RUN_FILES:
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_a_run_of_helios_says_which_settings_it_used(file: Path) -> None:
    """Defaults, what is given, and off; settings that are unset stay out."""
    file.write_text(BASE + 'breach_window_tokens = "off"\ntop_k = 2\n', encoding="utf-8")
    scenario = load_scenario(file)
    data = of_one_policy(scenario, scenario.policy[0], file.parent)
    (entry,) = tomllib.loads(toml_text(data))["policy"]
    assert entry == {
        "use": "helios",
        "top_k": 2,
        "evaluation_requests": 5,
        "reassess_requests": 150,
        "breach_window_tokens": "off",
        "breach_limit": 50,
        "window_kind": "tumbling",
        "objective": "throughput",
        "depth_rule": "dominant",
        "depth_quantile": 0.9,
        "overhead_rule": "expected",
        "evaluation_exit_mode": "wait",
        "after_load_exit_mode": "wait",
        "evaluate_at_start": True,
        "actions": ["load", "switch"],
    }


def test_an_option_of_an_own_class_that_is_called_like_a_key_of_all_stays_out(file: Path) -> None:
    source = OWN.replace("def __init__(self)", 'def __init__(self, label="here", patience=3)')
    (file.parent / "own.py").write_text(source, encoding="utf-8")
    file.write_text(BASE.replace("helios", "own:Own"), encoding="utf-8")
    policy = load_scenario(file).policy[0]
    assert settled(policy, file.parent) == PolicySettings(use="own:Own", patience=3)


def test_a_scenario_cannot_be_changed_once_read(file: Path) -> None:
    scenario = load_scenario(file)
    with pytest.raises(ValueError, match="frozen"):
        scenario.fleet.num_replicas = 2
    assert isinstance(scenario.policy, tuple)


def test_the_schema_for_editors_names_every_key_and_every_option() -> None:
    schema = scenario_schema()
    text = json.dumps(schema)
    assert set(schema["properties"]) == set(Scenario.model_fields)
    for name in (*policy_names(), "reassess_requests", "num_replicas", "rate_per_s"):
        assert json.dumps(name) in text


def test_policies_are_chosen_by_label_or_name_and_unlisted_ones_get_defaults(file: Path) -> None:
    file.write_text(
        BASE + '\n[[policy]]\nuse = "ee-single"\nlabel = "one"\nexit_mode = "solo"\n',
        encoding="utf-8",
    )
    scenario = load_scenario(file)
    chosen = choose_policies(scenario, ["one", "vanilla", "ee-single"])
    assert [(policy.name, policy.options) for policy in chosen] == [
        ("one", {"exit_mode": "solo"}),
        ("vanilla", {}),
    ]
    assert [one.name for one in scenario.policies_called("ee-single")] == ["one"]
    assert scenario.policies_called("clairvoyant") == ()
    assert choose_policies(scenario, []) == scenario.policy
    with pytest.raises(InputError, match="--policy vanila: Policy 'vanila' is not known"):
        choose_policies(scenario, ["vanila"])


def test_a_policy_is_held_to_the_tightest_limit_of_each_metric() -> None:
    spec = parse_slo("ttft:p50<100ms ttft:p99<400ms tpot:50 itl:60 e2e:2s")
    assert policy_slo(spec) == Slo(ttft_s=0.1, tpot_s=0.05, e2e_s=2.0, itl_s=0.06)
    assert policy_slo(None) == Slo()


def test_lengths_that_nobody_expects_are_the_workload_s_means_and_stand_in_its_run(
    file: Path,
) -> None:
    """The mean of what is really sent, to whole tokens; a given one stays as it is."""
    changes = (
        'workload.prompt={kind="uniform", min_tokens=1900, max_tokens=2500}',
        'workload.over_context="truncate"',
        "serving.expected_output_tokens=77",
    )
    for given, scenario in ((10, load_scenario(file)), (77, load_scenario(file, changes))):
        experiment = prepare(scenario, file.parent)
        requests, _ = experiment.requests(scenario.seed)
        setup = experiment.setup
        assert setup.expected_prompt_tokens == round(requests.mean_prompt_tokens) <= 2038
        assert setup.expected_output_tokens == given
        written = run_policy(experiment, scenario.policy[0]).run.scenario["serving"]
        assert written["expected_prompt_tokens"] == setup.expected_prompt_tokens
        again = prepare(experiment.scenario, file.parent)
        assert again.setup.serving == setup.serving


def test_requests_beyond_the_context_are_expected_by_nobody(file: Path) -> None:
    """A third of the prompts fit; were all too long, their mean would be as good as any."""
    values = ('workload.prompt={kind="values", values=[1000, 3000, 4000]}', "seed=3")
    for given, expected in ((values, 1000), ((values[0].replace("1000", "3000"),), None)):
        experiment = prepare(load_scenario(file, given), file.parent)
        prompts = experiment.requests(experiment.scenario.seed)[0].prompt_tokens
        wanted = round(float(prompts.mean())) if expected is None else expected
        assert experiment.setup.expected_prompt_tokens == wanted
