"""The commands as a user runs them: what they print, where they write, how they refuse."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import typer

from helios_sim import __version__
from helios_sim.cli import main
from helios_sim.console.command import run_app
from helios_sim.errors import InputError

ROOT = Path(__file__).parents[1]
SCENARIO = """
name = "short"
question = "Which of two carries forty requests?"

[workload]
num_requests = {num_requests}
arrivals = {{ kind = "poisson", rate_per_s = 3.0 }}
prompt = {{ kind = "constant", tokens = 100 }}
output = {{ kind = "constant", tokens = 20 }}

[fleet]
profile = "opt-a100-40gb"

[[policy]]
use = "vanilla"

[[policy]]
use = "helios"
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    """A scenario of forty requests under two policies."""
    path = tmp_path / "short.toml"
    path.write_text(SCENARIO.format(num_requests=40), encoding="utf-8")
    return path


def run(*arguments: object) -> int:
    """Run the command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_simulate_writes_a_folder_a_policy_and_one_page(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("simulate", scenario, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["helios", "report.html", "vanilla"]
    for policy in ("helios", "vanilla"):
        names = {path.name for path in (out / policy).iterdir()}
        assert {"scenario.toml", "summary.json", "requests.parquet", "report.html"} <= names
    printed = capsys.readouterr().out
    assert str(out / "report.html") in printed
    assert printed.startswith(
        "Device: NVIDIA A100-SXM4-40GB, 1 replica (1 GPU), profile opt-a100-40gb.\n"
        "Serving: opt-6.7b of 2 candidates (vanilla); "
    )
    assert "Profile opt-a100-40gb has 35 published, 68 derived and 34 assumed numbers. " in printed


def test_figures_are_told_with_the_limits_that_they_are_judged_by(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    one = ("--policy", "vanilla", "--set", 'slo.text="ttft:2s tpot:p95<60ms"', "--out", out)
    assert run("simulate", scenario, *one) == 0
    told = "SLO: TTFT ≤ 2 s, TPOT p95 ≤ 60 ms."
    assert f"\n{told}\n" in capsys.readouterr().out
    assert f"<li>{told}</li>" in (out / "report.html").read_text(encoding="utf-8")
    assert run("compare", out / "vanilla", out / "vanilla") == 0
    assert f"\n{told}\n" in capsys.readouterr().out
    assert run("simulate", scenario, "--policy", "vanilla", "--out", out) == 0
    assert "SLO" not in capsys.readouterr().out


def test_json_of_two_policies_is_a_list_and_nothing_else(
    scenario: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("simulate", scenario, "--json") == 0
    summaries = json.loads(capsys.readouterr().out)
    assert [summary["label"] for summary in summaries] == ["vanilla", "helios"]
    assert all(summary["completed"] == 40 for summary in summaries)


def test_json_of_one_policy_is_its_summary(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("simulate", scenario, "--json", "--policy", "helios", "--seed", 7) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["policy"], summary["seed"]) == ("helios", 7)
    assert [path.name for path in tmp_path.iterdir()] == ["short.toml"]


def test_set_changes_a_setting(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change = ("--set", "workload.num_requests=12", "--set", "policy.1.top_k=1")
    assert run("simulate", scenario, "--json", "--policy", "helios", *change) == 0
    assert json.loads(capsys.readouterr().out)["completed"] == 12


def test_replications_come_with_intervals(
    scenario: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = ("--set", "measure.replications=3")
    assert run("simulate", scenario, "--json", "--policy", "vanilla", *change) == 0
    replications = json.loads(capsys.readouterr().out)["replications"]
    assert replications["seeds"] == [1, 2, 3]
    ttft = replications["figures"]["mean_ttft_ms"]
    assert ttft["low"] <= ttft["mean"] <= ttft["high"]
    assert ttft["least"] <= ttft["mean"] <= ttft["most"]


def test_a_table_of_the_first_replication_says_where_the_others_are(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = ("--set", "measure.replications=3")
    assert run("simulate", scenario, "--out", tmp_path / "out", "--seed", 5, *change) == 0
    assert "runs of seed 5; means and 95 % intervals over the seeds 5 to 7" in (
        capsys.readouterr().out
    )
    summary = json.loads((tmp_path / "out" / "helios" / "summary.json").read_text())
    assert summary["seed"] == 5
    assert summary["replications"]["seeds"] == [5, 6, 7]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "means over the 3 seeds 5 to 7 stand below" in page


def test_runs_can_be_compared_and_reported_again(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("simulate", scenario, "--out", out) == 0
    page = (out / "helios" / "report.html").read_bytes()
    assert run("report", out / "helios") == 0
    assert (out / "helios" / "report.html").read_bytes() == page
    capsys.readouterr()
    assert run("compare", out / "vanilla", out / "helios", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"output_throughput", "mean_ttft_ms"} <= {row["key"] for row in rows}


def test_a_comparison_of_one_policy_on_two_devices_names_the_devices_and_no_scenario(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for name in ("opt-a100-40gb", "fast"):
        if name == "fast":
            command = ("profiles", "derive", "--from", "opt-a100-40gb", "--launch", "0.1ms")
            assert run(*command, "--out", tmp_path / name) == 0
        changes = ("--set", f"fleet.profile={name}", "--set", "question=Does it carry?")
        one = ("--policy", "vanilla", *changes, "--out", tmp_path / f"on-{name}")
        assert run("simulate", scenario, *one) == 0
        runs.append(tmp_path / f"on-{name}" / "vanilla")
    capsys.readouterr()
    assert run("compare", *runs, "--out", tmp_path / "page.html") == 0
    said = capsys.readouterr().out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Serving: opt-6.7b of 2 candidates.\n" in said
    assert "vanilla on opt-a100-40gb" in said
    assert "<h1>vanilla on opt-a100-40gb and vanilla on fast compared</h1>" in page
    assert "Both runs carry the load" in page
    assert "vanilla on fast answers fastest" in page
    assert 'class="question"' not in page


def test_runs_of_different_workloads_are_refused_by_the_names_of_their_folders(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, change in (("a", "seed=1"), ("b", "workload.num_requests=30"), ("c", "seed=2")):
        words = ("--policy", "vanilla", "--set", change)
        assert run("simulate", scenario, "--out", tmp_path / name, *words) == 0
    first, shorter, other = (tmp_path / name / "vanilla" for name in "abc")
    capsys.readouterr()
    assert run("compare", first, shorter) == 2
    assert f"{shorter} holds 30 requests and {first} holds 40 requests" in capsys.readouterr().err
    assert run("compare", first, other) == 2
    assert f"of {other} differs from that of {first}" in capsys.readouterr().err


def test_results_are_replaced_but_a_strangers_folder_is_not(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("simulate", scenario, "--out", out, "--policy", "vanilla") == 0
    assert "folder was replaced" not in capsys.readouterr().out
    for told in ("replaced; gone are the earlier runs vanilla)", "(the folder was replaced)"):
        assert run("simulate", scenario, "--out", out, "--policy", "helios") == 0
        assert told in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["helios", "report.html"]
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("kept", encoding="utf-8")
    assert run("simulate", scenario, "--out", tmp_path / "letters") == 2
    assert "dear.txt" in capsys.readouterr().err
    assert (tmp_path / "letters" / "dear.txt").read_text(encoding="utf-8") == "kept"
    # A scenario kept in a folder bears the name of one of a run's files.
    (tmp_path / "mine" / "first").mkdir(parents=True)
    (tmp_path / "mine" / "first" / "scenario.toml").write_text("kept", encoding="utf-8")
    assert run("simulate", scenario, "--out", tmp_path / "mine") == 2
    assert "'first', which is no run of ours" in capsys.readouterr().err
    assert (tmp_path / "mine" / "first" / "scenario.toml").read_text(encoding="utf-8") == "kept"


def test_a_run_that_was_served_for_real_is_never_simulated_over(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Among the runs of a folder or as the folder itself: it cannot be computed again."""
    out = tmp_path / "out"
    command = ("simulate", scenario, "--policy", "vanilla", "--out")
    assert run(*command, out) == 0
    totals = out / "vanilla" / "totals.json"
    totals.write_text(totals.read_text().replace('"origin": "simulated"', '"origin": "measured"'))
    served = totals.read_bytes()
    for target in (out, out / "vanilla"):
        capsys.readouterr()
        assert run(*command, target) == 2
        assert (
            f"It would replace what was served for real and cannot be computed again: "
            f"{out / 'vanilla'}; give another --out, or remove it by hand."
        ) in capsys.readouterr().err
        assert totals.read_bytes() == served


def test_a_page_takes_the_place_only_of_a_page_of_this_program(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever command writes it and whatever the file is called; an empty one is nobody's."""
    out, own = tmp_path / "out", tmp_path / "own.html"
    assert run("simulate", scenario, "--out", out) == 0
    runs = (out / "vanilla", out / "helios")
    own.touch()
    for _ in range(2):
        assert run("compare", *runs, "--out", own) == 0
    folder = tmp_path / "folder"
    folder.mkdir()
    commands: dict[Path, list[tuple[object, ...]]] = {
        tmp_path / "mine.html": [("compare", *runs), ("report", runs[0])],
        folder / "report.html": [("compare", *runs), ("simulate", scenario)],
    }
    for page, several in commands.items():
        page.write_text("<!doctype html><html><body>ten years of work</body></html>")
        before = page.read_bytes()
        for command in several:
            capsys.readouterr()
            assert run(*command, "--out", folder if page.parent == folder else page) == 2
            assert f"{page}: It is no page of this program, so it is not" in capsys.readouterr().err
            assert page.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "serving.max_batc=4"], "Did you mean 'max_batch'?"),
        (["--set", "fleet.profile=opt-a100"], "opt-a100-40gb"),
        (["--policy", "helois"], "Did you mean 'helios'?"),
        (
            ["--set", "fleet.memory_bytes=8000000000", "--set", "policy.0.model=opt-6.7b"],
            "need 14,457,831,424 bytes, and there are 7,200,000,000 (fleet.memory_bytes",
        ),
        (["--set", "fleet.memory_bytes=2500000000"], "there are 2,250,000,000 (fleet.memory_bytes"),
    ],
)
def test_bad_input_is_one_sentence_exit_code_2_and_no_folder(
    scenario: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    assert run("simulate", scenario, "--out", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("helios: ")
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["short.toml"]


def test_a_mistake_found_while_playing_names_its_place_once(
    scenario: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = ("--set", "fleet.memory_bytes=8000000000", "--set", "policy.0.model=opt-6.7b")
    assert run("simulate", scenario, "--json", *change) == 2
    assert capsys.readouterr().err.count("policy vanilla") == 1


OWN_POLICY = """
from dataclasses import dataclass
from helios_sim.policy.contract import ExitMode, Serve, Watching

@dataclass(frozen=True)
class Mine:
    name = "mine"
    sees_future = False
    watching = Watching()
    confidence_threshold = None

    def decide(self, snapshot):
        return self.deepest(snapshot, snapshot.num_wating)

    def deepest(self, snapshot, num):
        return Serve(snapshot.candidates[0].name, 24, ExitMode.FULL, f"{num} wait.")
"""


def test_a_mistake_in_a_policy_of_ones_own_is_a_sentence_with_its_line(
    scenario: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (scenario.parent / "mine.py").write_text(OWN_POLICY, encoding="utf-8")
    monkeypatch.delenv("HELIOS_TRACEBACK", raising=False)
    words = ("simulate", scenario, "--json", "--set", "policy.0.use=mine:Mine")
    assert run(*words, "--policy", "mine:Mine") == 2
    said = (
        f"helios: {scenario}, policy mine: Policy 'mine' failed in decide: AttributeError: "
        "'Snapshot' object has no attribute 'num_wating', mine.py line 13. Did you mean "
        "'num_waiting'? HELIOS_TRACEBACK=1 shows the way there.\n"
    )
    assert capfd.readouterr().err == said
    monkeypatch.setenv("HELIOS_TRACEBACK", "1")
    assert run(*words, "--policy", "mine:Mine") == 2
    told = capfd.readouterr().err
    assert "return self.deepest(snapshot, snapshot.num_wating)" in told
    assert told.endswith(said)


def test_an_error_made_anew_is_the_same() -> None:
    for error in (InputError("No.", "a.toml, x"), InputError("No.")):
        for again in (type(error)(*error.args), pickle.loads(pickle.dumps(error))):
            assert (again.message, again.where) == (error.message, error.where)
            assert str(again) == str(error)


def test_an_unknown_command_or_option_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("simulat") == 2
    assert run("profiles", "--jason") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_without_a_command_there_is_help_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run() == 2
    said = capsys.readouterr()
    assert "whatif" in said.out + said.err


def test_the_command_is_there_where_nothing_is_installed() -> None:
    command = [sys.executable, "-m", "helios_sim", "conquer"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("helios: No such command 'conquer'. Allowed are simulate, ")


def test_a_label_chooses_its_policy_alone(
    scenario: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A label wins over the name of the policy that others use too."""
    change = ("--set", "policy.0.use=helios", "--set", "policy.0.label=mine")
    assert run("simulate", scenario, "--json", "--policy", "helios", *change) == 0
    assert json.loads(capsys.readouterr().out)["label"] == "helios"


def test_labels_that_look_alike_get_folders_of_their_own(scenario: Path, tmp_path: Path) -> None:
    labels = ("--set", 'policy.0.label="a b"', "--set", 'policy.1.label="a-b"')
    assert run("simulate", scenario, "--out", tmp_path / "out", *labels) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a-b", "a-b-2", "report.html"]


def test_a_label_is_text_and_not_markup(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ("--set", 'policy.0.label="[bold]x[/nope]"', "--set", 'policy.1.label="report.html"')
    assert run("simulate", scenario, "--out", tmp_path / "out", *labels) == 0
    assert "[bold]x" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html-run").is_dir()


def test_a_place_nobody_can_write_to_is_refused_before_the_simulation(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "afile").write_text("kept", encoding="utf-8")
    for out in (tmp_path / "afile" / "x", tmp_path / ("x" * 300), tmp_path / "afile"):
        assert run("simulate", scenario, "--out", out, "--set", "workload.num_requests=9") == 2
        assert "Traceback" not in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["afile", "short.toml"]


def test_a_comparison_is_written_as_a_page_or_as_a_folder_with_its_rows(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("simulate", scenario, "--out", tmp_path / "out") == 0
    runs = (tmp_path / "out" / "vanilla", tmp_path / "out" / "helios")
    assert run("compare", *runs, "--out", tmp_path / "one.html") == 0
    folder = tmp_path / "new" / "both"
    for _ in range(2):
        assert run("compare", *runs, "--out", folder) == 0
        assert f"Page: {folder / 'report.html'}" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.json", "report.html"]
    assert (folder / "report.html").read_bytes() == (tmp_path / "one.html").read_bytes()
    assert run("compare", *runs, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(
        (folder / "comparison.json").read_text(encoding="utf-8")
    )
    (folder / "letter.txt").write_text("kept", encoding="utf-8")
    for place, said in (
        (folder, "The folder holds 'letter.txt', which is no comparison of ours"),
        (scenario, "It is a file; allowed is a folder or a name in .html."),
        (scenario / "x", "No results can be written there"),
    ):
        assert run("compare", *runs, "--out", place) == 2
        assert said in capsys.readouterr().err
    assert (folder / "letter.txt").exists()


def test_simulated_runs_are_taken_for_real_ones_only_beside_a_named_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("compare", "a", "b", "--allow-simulated") == 2
    assert "name it with --simulated, or leave --allow-simulated out" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--files", "."), ("--no-attribution",)])
def test_options_of_the_two_sides_are_refused_where_policies_are_compared(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, ...]
) -> None:
    assert run("simulate", scenario, "--out", tmp_path / "out", "--policy", "vanilla") == 0
    simulated = tmp_path / "out" / "vanilla"
    capsys.readouterr()
    assert run("compare", simulated, simulated, *option) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert f"leave {option[0]} out to compare policies" in told.err


def test_a_page_replaces_no_other_file(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("simulate", scenario, "--out", tmp_path / "out", "--policy", "vanilla") == 0
    assert run("report", tmp_path / "out" / "vanilla", "--out", scenario) == 2
    assert "ends in .html" in capsys.readouterr().err
    assert scenario.read_text(encoding="utf-8").startswith("\nname")
    assert run("report", tmp_path / "out" / "vanilla", "--out", tmp_path / "out") == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("fleet.memory_bytes=1", "memory_bytes of at least"),
        ("policy.0.model=opt-13b", "opt-13b"),
        ("measure.warmup_requests=40", "warm-up"),
        (
            'published=[{figure="zz",policy="vanilla",published=1.0,source="x"}]',
            "no number of a summary",
        ),
        (
            'published=[{figure="mean_agreement",policy="vanilla",published=1.0,source="x"}]',
            "'mean_agreement' is no number of a summary. Did you mean",
        ),
        (
            'published=[{figure="exit_histogram",policy="vanilla",published=1.0,source="x"}]',
            "'exit_histogram' is no number of a summary",
        ),
    ],
)
def test_what_cannot_start_is_found_before_anything_runs(
    scenario: Path, capsys: pytest.CaptureFixture[str], change: str, said: str
) -> None:
    command = "simulate" if "warmup" in change else "check"
    words = (
        ("simulate", scenario, "--json")
        if command == "simulate"
        else ("scenario", "check", scenario)
    )
    assert run(*words, "--set", change) == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(scenario) in error


@pytest.mark.parametrize(
    ("key", "given", "enough"),
    [
        ("memory_bytes", "40", r"memory_bytes 40 .* fleet\.memory_bytes of at least ([0-9,]+)"),
        ("reserve_bytes", "40000000000", r"reserve_bytes 40,000,.* of at most ([0-9,]+)"),
    ],
)
def test_memory_for_no_candidate_names_the_key_what_was_given_and_what_suffices(
    scenario: Path, capsys: pytest.CaptureFixture[str], key: str, given: str, enough: str
) -> None:
    command = ("simulate", scenario, "--json", "--policy", "vanilla")
    assert run(*command, "--set", f"fleet.{key}={given}") == 2
    error = capsys.readouterr().err
    assert f"{scenario}, fleet.{key}: No candidate fits" in error
    found = re.search(enough, error)
    assert found is not None
    least = int(found[1].replace(",", ""))
    past = least - 1 if key == "memory_bytes" else least + 1
    # What suffices for a shallow exit is no room for a full one, but then the policy is asked.
    for value, refused in ((past, True), (least, False)):
        run("scenario", "check", scenario, "--set", f"fleet.{key}={value}")
        assert ("No candidate fits" in capsys.readouterr().err) == refused


def test_a_device_too_small_for_every_candidate_is_reported_under_its_profile(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scenario sets no memory, so that key is not where the mistake is."""
    command = ("profiles", "derive", "--from", "opt-a100-40gb", "--memory", "0.5GB")
    assert run(*command, "--out", tmp_path / "tiny") == 0
    capsys.readouterr()
    assert run("scenario", "check", scenario, "--set", "fleet.profile=tiny") == 2
    error = capsys.readouterr().err
    assert f"{scenario}, fleet.profile: No candidate fits at any exit" in error
    assert re.search(
        r"device's memory, 500,000,000 .*; name a smaller candidate or a device of at least "
        r"[0-9,]+ bytes\.",
        error,
    )


# A context of 2,048 tokens, and a pool that holds 1,217 beside the whole OPT-6.7B.
@pytest.mark.parametrize(
    ("memory_bytes", "said"),
    [
        (
            42_949_672_960,
            "{} of 40 requests will be refused: they are longer than the 2,048 tokens",
        ),
        (16_700_000_000, "Up to {} more will be refused where .* the least holds 1,217 tokens"),
    ],
)
def test_check_says_how_many_requests_will_be_refused(
    scenario: Path, capsys: pytest.CaptureFixture[str], memory_bytes: int, said: str
) -> None:
    """As many as a run refuses then: of those that may be refused, where the least is served."""
    changes = (
        "--set",
        'workload.prompt={kind = "uniform", min_tokens = 500, max_tokens = 4000}',
        "--set",
        f"fleet.memory_bytes={memory_bytes}",
        "--set",
        "policy.0.model=opt-6.7b",
        "--set",
        "serving.expected_prompt_tokens=512",
    )
    assert run("scenario", "check", scenario, *changes) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [int(found[0]) for line in lines if (found := re.search(r"\d+ (?=of 40|more)", line))]
    assert run("simulate", scenario, "--json", "--policy", "vanilla", *changes) == 0
    assert json.loads(capsys.readouterr().out)["num_refused"] == sum(told) > 0
    assert re.search(said.format(told[-1]), lines[-1])


def test_check_says_what_policies_reckon_with_beside_what_is_sent(
    scenario: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("scenario", "check", scenario) == 0
    told = re.search(
        r"prompts of (\d+) and outputs of (\d+) .* ([\d.]+) and ([\d.]+)\.", _out(capsys)
    )
    assert told
    expected, sent = [float(one) for one in told.groups()[:2]], told.groups()[2:]
    assert expected == [round(float(one)) for one in sent]
    change = ("--set", "serving.expected_output_tokens=77")
    assert run("scenario", "check", scenario, *change) == 0
    assert f"outputs of 77 tokens; the workload's means are {sent[0]} and {sent[1]}." in _out(
        capsys
    )


@pytest.mark.parametrize(
    ("arrivals", "said"),
    [
        (
            '{kind="constant", rate_per_s=0.5}',
            "They arrive within 78 s, 0.513 requests/s on average.",
        ),
        (
            '{kind="closed", num_users=4, think_s=1}',
            "Users send them in a closed loop, as they are",
        ),
    ],
)
def test_check_says_within_what_time_and_how_often_requests_arrive(
    scenario: Path, capsys: pytest.CaptureFixture[str], arrivals: str, said: str
) -> None:
    changes = ("--set", "workload.num_requests=40", "--set", f"workload.arrivals={arrivals}")
    assert run("scenario", "check", scenario, *changes) == 0
    assert said in _out(capsys)


def test_check_says_the_limits_as_they_were_read(
    scenario: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit in the wrong unit stands out; without an SLO there is no line of it."""
    assert run("scenario", "check", scenario) == 0
    assert "SLO" not in _out(capsys)
    changes = ("--set", "workload.num_requests=1", "--set", "slo.text=ttft:p90<1s;tpot:0.04")
    assert run("scenario", "check", scenario, *changes) == 0
    out = _out(capsys)
    at_most = "\N{LESS-THAN OR EQUAL TO}"
    assert f"SLO: TTFT p90 {at_most} 1 s, TPOT {at_most} 0.04 ms." in out
    assert "is good: 1 request, " in out


def test_a_closed_loop_tells_how_many_users_are_active_and_says_where_they_are_few(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forty users with a request each, who start one after the other and rest once answered."""
    closed = '{kind="closed", num_users=40, think_s=1, ramp_s=60}'
    changes = ("--set", "workload.num_requests=40", "--set", f"workload.arrivals={closed}")
    out = tmp_path / "out"
    assert run("simulate", scenario, *changes, "--policy", "vanilla", "--out", out) == 0
    figures = json.loads((out / "vanilla" / "summary.json").read_text())
    # Nobody thinks after the only answer: users are active as long as requests are in the system.
    active = figures["mean_e2el_ms"] / 1e3 * 40 / figures["duration"]
    assert figures["num_users"] == 40
    assert figures["mean_active_users"] == pytest.approx(active)
    assert active < 38.0
    assert "of 40 users. Users rest before their first request" in _out(capsys)
    assert "of 40 users. Users rest" in (out / "report.html").read_text()
    assert run("simulate", scenario, "--policy", "vanilla", "--out", out) == 0
    assert "num_users" not in json.loads((out / "vanilla" / "summary.json").read_text())
    assert "Active on average" not in _out(capsys)


@pytest.mark.parametrize(
    ("now", "rate_scale", "said"),
    [
        (1_740_000_000_000, 1, "look like milliseconds since 1970 .* last is 1,740,000,000,005"),
        (
            1_740_000_000_000_000,
            1,
            "microseconds since 1970 .* 1,000,000, or set rate_scale = 1000",
        ),
        (1.74e18, 1, "nanoseconds since 1970 .* and write the file anew"),
        (1_740_000_000_000, 1000, ""),
        (1_740_000_000, 1, ""),
    ],
)
def test_check_warns_of_times_that_are_no_seconds(
    scenario: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    now: float,
    rate_scale: int,
    said: str,
) -> None:
    text = f"ts,in,out\n{now:.0f},2,3\n{now + 5:.0f},2,3\n"
    (tmp_path / "epoch.csv").write_text(text, encoding="utf-8")
    columns = 'columns={arrival="ts", prompt="in", output="out"}'
    trace = f'workload={{trace={{file="epoch.csv", {columns}, rate_scale={rate_scale}}}}}'
    assert run("scenario", "check", scenario, "--set", trace) == 0
    out = _out(capsys)
    assert re.search(said, out) if said else "1970" not in out


def _out(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_models_of_other_tokenizers_stand_side_by_side_without_a_ratio_of_perplexities(
    scenario: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ("llama2-7b", "llama2-13b", "llama3-8b")
    policies = ", ".join(
        f'{{use = "vanilla", label = "{name}", model = "{name}"}}' for name in models
    )
    changes = ("fleet={profile = 'layerskip-h100-80gb'}", f"policy=[{policies}]")
    asked = [part for change in changes for part in ("--set", change)]
    assert run("simulate", scenario, *asked) == 0
    (row,) = [line for line in _out(capsys).splitlines() if line.startswith("  Perplexity")]
    assert row.count("\N{MULTIPLICATION SIGN}") == 1
    assert run("simulate", scenario, *asked, "--json") == 0
    told = [one["tokenizers"] for one in json.loads(_out(capsys))]
    assert told == [["llama2"], ["llama2"], ["llama3"]]


@pytest.mark.parametrize("policies", [["vanilla"], ["vanilla", "helios"]])
def test_runs_whose_pages_cannot_be_written_are_kept_and_drawn_later(
    policies: list[str],
    scenario: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The tables are there, standard output has what it always has, and the commands named work."""
    asked = [word for policy in policies for word in ("--policy", policy)]
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run("simulate", scenario, "--out", whole, *asked) == 0
    shown = capsys.readouterr().out.partition("Page: ")[0]

    def too_large(target: Path, content: bytes) -> None:
        raise OSError(errno.EFBIG, "File too large")

    with monkeypatch.context() as patched:
        patched.setattr("helios_sim.report.page_files.write_whole", too_large)
        assert run("simulate", scenario, "--out", out, *asked) == 2
    told = capsys.readouterr()
    assert told.out == shown
    assert f"{out}: The page cannot be written: File too large. The tables of" in told.err
    pages = {path.relative_to(whole) for path in whole.rglob("report.html")}
    files = {path.relative_to(whole) for path in whole.rglob("*")}
    assert {path.relative_to(out) for path in out.rglob("*")} == files - pages
    commands = re.findall(r"helios (report|compare) (.*?) (?:draws|the one)", told.err)
    assert [name for name, _ in commands] == ["report", "compare"][: len(policies)]
    for name, words in commands:
        assert run(name, *words.split()) == 0
    assert (out / "vanilla" / "report.html").is_file()
    assert (out / "report.html").is_file() == (len(policies) == 2)


def test_rows_of_a_trace_that_are_no_requests_are_told_and_counted(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
    rows = ["5,ChatGPT,472,18,490,c", "45,ChatGPT,1087,0,1087,c", "118,GPT-4,417,276,693,c"]
    (tmp_path / "b.csv").write_text("\n".join([head, *rows]), encoding="utf-8")
    change = ("--set", 'workload={trace={file="b.csv"}}')
    assert run("scenario", "check", scenario, *change) == 0
    assert "left out because they hold no request: 1.\n" in capsys.readouterr().out
    assert run("simulate", scenario, "--json", "--policy", "vanilla", *change) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["num_dropped"], summary["completed"]) == (1, 2)
    out = tmp_path / "dropped"
    assert run("simulate", scenario, "--policy", "vanilla", *change, "--out", out) == 0
    told = "Left out of the trace: 1 row beside 2 requests"
    assert told in capsys.readouterr().out
    assert told in (out / "report.html").read_text(encoding="utf-8")
    assert run("scenario", "check", scenario) == 0
    assert "left out" not in capsys.readouterr().out


def test_rows_of_a_trace_that_cannot_be_used_are_skipped_where_asked_for_and_told(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.csv").write_text("at,in,out\n1,20,10\n2,-5,10\n3,20,10\n", encoding="utf-8")
    columns = 'columns={arrival="at", prompt="in", output="out"}'
    change = ("--set", f'workload={{trace={{file="b.csv", {columns}}}}}')
    skipping = (*change, "--set", "workload.trace.skip_bad_rows=true")
    assert run("scenario", "check", scenario, *change) == 2
    assert "workload.trace.skip_bad_rows = true leaves it out" in capsys.readouterr().err
    assert run("scenario", "check", scenario, *skipping) == 0
    assert "left out by skip_bad_rows: prompt below 1 token: 1.\n" in capsys.readouterr().out
    out = tmp_path / "skipped"
    assert run("simulate", scenario, "--policy", "vanilla", *skipping, "--out", out) == 0
    told = "Skipped rows of the trace: 1 row (prompt below 1 token: 1), which cannot be used"
    assert told in capsys.readouterr().out
    assert told in (out / "report.html").read_text(encoding="utf-8")
    summary = json.loads((out / "vanilla" / "summary.json").read_text(encoding="utf-8"))
    assert summary["skipped_rows"] == {"prompt below 1 token": 1}


def test_profiles_lists_what_is_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profiles", "--json") == 0
    names = {profile["name"] for profile in json.loads(capsys.readouterr().out)}
    assert names == {
        "opt-a100-40gb",
        "layerskip-a100-40gb",
        "layerskip-h100-80gb",
        "small-family-cpu",
    }


def test_schema_is_a_json_schema_with_every_policys_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("scenario", "schema") == 0
    schema = json.loads(capsys.readouterr().out)
    text = json.dumps(schema)
    assert "reassess_requests" in text
    assert "rate_per_s" in text


def test_help_answers_without_the_heavy_modules() -> None:
    code = (
        "import sys\n"
        "from helios_sim.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'numpy', 'numba', 'polars', 'scipy', 'simpy', 'plotly', 'pydantic'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_both_commands_say_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    from calibration.cli import main as calibrate

    assert run("--version") == 0
    with pytest.raises(SystemExit) as end:
        calibrate(["--version"])
    assert not end.value.code
    assert capsys.readouterr().out == f"helios-sim {__version__}\n" * 2


def test_a_clone_that_is_not_installed_simulates(scenario: Path, tmp_path: Path) -> None:
    """A machine without a package index runs the clone as it is, with the packages it carries."""
    code = (
        "import importlib.metadata as metadata, sys\n"
        "version = metadata.version\n"
        "def without_ours(name):\n"
        "    if name == 'helios-sim':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "metadata.version = without_ours\n"
        "from helios_sim.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    command = ["simulate", str(scenario), "--policy", "vanilla", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (run_file,) = (tmp_path / "out").rglob("totals.json")
    recorded = json.loads(run_file.read_text(encoding="utf-8"))
    assert recorded["environment"]["versions"]["helios-sim"] == __version__


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a run of a million requests, which says when it begins.

    A slow machine takes any time to get there, and nothing of ours runs before; on a quick one
    the run begins again until it is interrupted.
    """
    path = tmp_path / "long.toml"
    path.write_text(SCENARIO.format(num_requests=1_000_000), encoding="utf-8")
    code = (
        "import helios_sim.experiment as experiment\n"
        "run_policy = experiment.run_policy\n"
        "def told(*given):\n"
        "    print('begins', flush=True)\n"
        "    while True:\n"
        "        run_policy(*given)\n"
        "experiment.run_policy = told\n"
        "from helios_sim.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "simulate", str(path), "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        try:
            # Python drops an interrupt that falls into a destructor; a user then presses again.
            for _ in range(20):
                time.sleep(0.5)
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=30)
                    break
        finally:
            process.kill()
        error = process.stderr.read() if process.stderr is not None else ""
    assert process.returncode == 130, error
    assert "interrupted" in error
    assert "Traceback" not in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["long.toml"]


@pytest.mark.parametrize("module", ["helios_sim", "calibration"])
@pytest.mark.parametrize(
    "interrupts", ["raise KeyboardInterrupt", "import os\nos.kill(os.getpid(), 15)"]
)
def test_an_interrupt_while_a_command_is_imported_ends_it_without_a_traceback(
    tmp_path: Path, module: str, interrupts: str
) -> None:
    """What is imported first is interrupted, by Ctrl-C at once or by a job scheduler."""
    (tmp_path / "typer.py").write_text(interrupts, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )
    assert done.returncode == 130
    assert done.stderr.endswith(": interrupted; nothing was written.\n")
    assert done.stderr.count("\n") == 1


def test_an_interrupt_of_which_an_import_makes_another_error_is_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As transformers does, which says of every error that something is not installed."""
    app = typer.Typer()

    @app.command()
    def imports() -> None:
        try:
            raise KeyboardInterrupt
        except BaseException as error:
            raise RuntimeError("Are the requirements defined correctly?") from error

    with pytest.raises(SystemExit) as end:
        run_app(app, "helios", [])
    assert end.value.code == 130
    assert capsys.readouterr().err == "helios: interrupted; nothing was written.\n"
