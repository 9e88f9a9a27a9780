"""What a user gets wrong is one clear line and exit code 2, whatever it is and wherever it lies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import calibration.cli
import helios_sim.cli
from helios_sim.profiles.files import load_profile

SCENARIO = """
name = "short"

[workload]
num_requests = 40
arrivals = { kind = "poisson", rate_per_s = 3.0 }
prompt = { kind = "constant", tokens = 100 }
output = { kind = "constant", tokens = 20 }

[fleet]
profile = "small-family-cpu"

[[policy]]
use = "vanilla"
model = "general-12l"
"""

NOISE = bytes(range(256)) * 8


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "s.toml").write_text(SCENARIO, encoding="utf-8")
    with pytest.raises(SystemExit):
        helios_sim.cli.main(["simulate", str(folder / "s.toml"), "--out", str(folder / "out")])
    return folder / "out" / "vanilla"


def refusal(capsys: pytest.CaptureFixture[str], command: str, *words: object) -> str:
    """The one line with which a command refuses."""
    capsys.readouterr()
    main = {"helios": helios_sim.cli, "helios-calibrate": calibration.cli}[command].main
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    said = capsys.readouterr()
    assert end.value.code == 2
    assert said.out == ""
    assert said.err.startswith(f"{command}: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "'name' is required"),
        (b'name = "short\n', "not valid TOML"),
        (NOISE, "not UTF-8"),
        (SCENARIO.replace("[workload]", "[workloda]"), "Did you mean 'workload'?"),
        (SCENARIO.replace("rate_per_s", "rate_per_sec"), "Did you mean 'rate_per_s'?"),
        (SCENARIO.replace("3.0", "-3.0"), "was given -3.0"),
        (SCENARIO.replace("3.0", "nan"), "finite"),
        (SCENARIO.replace("3.0", '"many"'), "valid number"),
        (SCENARIO.replace("40", "0"), "greater than or equal to 1"),
        (SCENARIO.replace("poisson", "poison"), "Did you mean 'poisson'?"),
        (SCENARIO.replace('"vanilla"', '"vanila"'), "Did you mean 'vanilla'?"),
        (SCENARIO.replace("general-12l", "general-12"), "Did you mean 'general-12l'?"),
        (SCENARIO.replace("small-family-cpu", "small-family"), "'small-family-cpu'"),
        (SCENARIO.replace("small-family-cpu", "."), "holds no profile.json"),
        (SCENARIO + '[slo]\ntext = "tftt:500"\n', "Did you mean 'ttft'"),
        (SCENARIO + "[fleet.memory]\n", "Did you mean 'memory_bytes'?"),
        (SCENARIO + '[workload.trace]\nfile = "away.csv"\n', "neither arrivals nor lengths use it"),
        (
            SCENARIO.replace('"poisson", rate_per_s = 3.0', '"trace"')
            + '[workload.trace]\nfile = "away.csv"\n',
            "does not exist",
        ),
    ],
)
def test_a_scenario_that_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes, told: str
) -> None:
    path = tmp_path / "s.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in (("simulate", path, "--out", tmp_path / "out"), ("scenario", "check", path)):
        said = refusal(capsys, "helios", *command)
        assert told in said
        assert "s.toml" in said or "away.csv" in said
    assert [file.name for file in tmp_path.iterdir()] == ["s.toml"]


def test_a_scenario_that_is_not_there_or_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chat.toml").write_text(SCENARIO, encoding="utf-8")
    for command in ("simulate", "plan", "tune"):
        assert "did you mean 'chat.toml'?" in refusal(
            capsys, "helios", command, tmp_path / "chta.toml"
        )
        assert "This is a folder" in refusal(capsys, "helios", command, tmp_path)


def test_a_name_too_long_for_the_system(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run_folder: Path
) -> None:
    path = tmp_path / "s.toml"
    path.write_text(SCENARIO, encoding="utf-8")
    long = "x" * 300
    for words in (
        ("scenario", "check", long),
        ("scenario", "check", path, "--set", f"fleet.profile={long}"),
        ("scenario", "check", path, "--set", f'workload={{trace={{file="{long}"}}}}'),
        ("whatif", path, "--vary", "seed=1,2", "--out", long),
        ("report", long),
        ("report", run_folder, "--out", f"{long}.html"),
        ("compare", run_folder, long),
    ):
        said = refusal(capsys, "helios", *words)
        assert long in said
        assert "File name too long" in said


def test_a_file_that_is_no_scenario_is_not_suggested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest name may be another program's; scenarios may have a folder of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'mine'\n", encoding="utf-8")
    (tmp_path / "projekt.toml").write_text("half = [", encoding="utf-8")
    said = refusal(capsys, "helios", "simulate", "project.toml")
    assert said == "helios: project.toml: There is no scenario file.\n"
    (tmp_path / "scenarios").mkdir()
    (tmp_path / "scenarios" / "projects.toml").write_text(SCENARIO, encoding="utf-8")
    for given in ("project.toml", "scenario/project.toml"):
        said = refusal(capsys, "helios", "simulate", given)
        assert f"did you mean {str(Path('scenarios', 'projects.toml'))!r}?" in said
    assert "mean" not in refusal(capsys, "helios", "simulate", "nope.toml")


Spoil = Callable[[Path], object]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "profile.json").write_bytes(b""), "not valid JSON"),
        (lambda folder: (folder / "profile.json").write_bytes(b"[]"), "profile.json"),
        (lambda folder: (folder / "profile.json").unlink(), "holds no profile.json"),
        (lambda folder: (folder / "exits.parquet").write_bytes(NOISE), "exits.parquet"),
        (lambda folder: (folder / "exits.parquet").unlink(), "no file 'exits.parquet'"),
        (shutil.rmtree, "was not found"),
    ],
)
def test_a_profile_that_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Spoil, told: str
) -> None:
    shutil.copytree(load_profile("small-family-cpu").folder, tmp_path / "mine")
    spoil(tmp_path / "mine")
    path = tmp_path / "s.toml"
    path.write_text(SCENARIO.replace("small-family-cpu", "./mine"), encoding="utf-8")
    assert told in refusal(capsys, "helios", "scenario", "check", path)
    if "exits" not in told:
        assert told in refusal(capsys, "helios-calibrate", "check", tmp_path / "mine")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "requests.parquet").write_bytes(NOISE), "requests.parquet"),
        (lambda folder: (folder / "decisions.parquet").write_bytes(b""), "decisions.parquet"),
        (lambda folder: (folder / "summary.json").unlink(), "summary.json is missing"),
        (lambda folder: (folder / "summary.json").write_text("[]"), "no JSON object"),
        (lambda folder: (folder / "totals.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "scenario.toml").write_text("x"), "not valid TOML"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_run_that_is_wrong(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    run_folder: Path,
    spoil: Spoil,
    told: str,
) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    spoil(tmp_path / "run")
    assert told in refusal(capsys, "helios", "report", tmp_path / "run")
    assert told in refusal(capsys, "helios", "compare", run_folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("simulate", "--set", "fleet.num_replicas"), "write dotted.key=value"),
        (("simulate", "--set", "policy.9.depth=3"), "index from 0 to 0"),
        (("simulate", "--set", "workload=3"), "must be a table"),
        (("simulate", "--seed", "-1"), "greater than or equal to 0"),
        (("simulate", "--seed", "abc"), "--seed: It was given 'abc'; "),
        (("simulate", "--seed=1", "--seed=1.5"), "--seed: It was given '1.5'; "),
        (("plan", "--processes", "x"), "--processes: It was given 'x'; "),
        (("whatif", "--vary", "x=1,2", "--replications", "0"), "It was given '0'; "),
        (("simulate", "--see", "7"), "Did you mean '--seed'? Allowed are --policy, --seed, "),
        (("simulate", "--seed"), "Option '--seed' requires an argument."),
        (("whatif",), "Missing option '--vary'; helios whatif --help says"),
        (("report", "more"), "(more); helios report --help says"),
        (("simulat",), "Did you mean 'simulate'? Allowed are simulate, plan, "),
        (("simulate", "--policy", "nomodule:Mine"), "no such module"),
        (("simulate", "--out", "/dev/null/x"), "/dev/null"),
        (("plan",), "give the scenario one"),
        (("plan", "--set", "slo.text=ttft:500", "--processes", "0"), "from 1 on"),
        (("plan", "--set", "slo.text=ttft:500", "--shard", "3/2"), "write i/n"),
        (("plan", "--set", "slo.text=ttft:500", "--set", "plan.prices=no.toml"), "no.toml"),
        (("tune",), "no [search] table"),
        (("tune", "--set", 'search.ranges={"serving.max_bat"=[1,2]}'), "Did you mean 'max_batch'?"),
        (("whatif", "--vary", "x"), "write key=a,b,c"),
        (("whatif", "--vary", "policy.nothing=1,2"), "has the option 'nothing'"),
        (("whatif", "--vary", "policy.².x=1,2"), "has the option '².x'"),
        (("whatif", "--vary", f"seed=1,{'[' * 3000}"), "was given '[[["),
        (("whatif", "--vary", "serving.max_batch=4,-2"), "was given -2"),
    ],
)
def test_an_option_that_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str
) -> None:
    path = tmp_path / "s.toml"
    path.write_text(SCENARIO, encoding="utf-8")
    given = (words[0], path, "--out", tmp_path / "out", *words[1:])
    assert told in refusal(capsys, "helios", *given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("measure", "--out", "x", "--max-batch", "0"), "--max-batch: It was given '0'; "),
        (("measure",), "Missing option '--out'; helios-calibrate measure --help says"),
        (("mesure",), "Did you mean 'measure'?"),
    ],
)
def test_an_option_of_the_calibration_that_is_wrong(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str
) -> None:
    assert told in refusal(capsys, "helios-calibrate", *words)


def test_a_foreign_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.toml"
    path.write_text(SCENARIO, encoding="utf-8")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("kept", encoding="utf-8")
    for words in (("simulate", path), ("whatif", path, "--vary", "serving.max_batch=4,8")):
        assert "dear.txt" in refusal(capsys, "helios", *words, "--out", tmp_path / "letters")
    assert [file.name for file in (tmp_path / "letters").iterdir()] == ["dear.txt"]
