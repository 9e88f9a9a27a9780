"""The documentation names what there is: columns, figures, keys, options, commands, tests, links.

The output in the `console` blocks of docs/cli.md is that of the commands above it; after a change
`python -m tests.test_docs` writes it anew.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import os
import re
import shlex
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import calibration.cli
import helios_sim.cli
from helios_sim.loop import compiled
from helios_sim.policy.registry import policy_names
from helios_sim.profiles.files import shipped_names
from helios_sim.runs.columns import (
    DECISION_COLUMNS,
    ITL_COLUMNS,
    REQUEST_COLUMNS,
    TIMELINE_COLUMNS,
    Column,
)
from helios_sim.runs.metrics import DEFINITIONS
from helios_sim.runs.records import RUN_FILES, RunTotals
from helios_sim.scenario import (
    FleetSettings,
    MeasureSettings,
    PolicySettings,
    PublishedFigure,
    Scenario,
    ServingSettings,
    parse_scenario,
)
from helios_sim.settings.questions import PlanSettings, SearchSettings
from helios_sim.settings.slo import PRESETS
from helios_sim.settings.toml_writer import toml_text
from helios_sim.workload.requests import WorkloadSettings
from helios_sim.workload.trace import TraceSettings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(
        part.startswith(".") or part == "runs" or part.endswith(".egg-info")
        for part in path.relative_to(ROOT).parts
    )
)
COMMANDS = {"helios": helios_sim.cli, "helios-calibrate": calibration.cli}
TYPES = {
    "Int64": "int64",
    "Int32": "int32",
    "Float64": "float64",
    "String": "text",
    "Boolean": "boolean",
}
BLOCK = re.compile(r"^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    """The text of a page."""
    return (DOCS / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """A page's part from a heading to the next one of that or a higher level."""
    level = len(heading) - len(heading.lstrip("#"))
    after = text.split(f"\n{heading}\n", 1)[1]
    return re.split(rf"^#{{1,{level}}} ", after, maxsplit=1, flags=re.MULTILINE)[0]


@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("requests.parquet", REQUEST_COLUMNS),
        ("decisions.parquet", DECISION_COLUMNS),
        ("timeline.parquet", TIMELINE_COLUMNS),
        ("itl.parquet", ITL_COLUMNS),
    ],
)
def test_every_column_of_a_run_is_described(file: str, columns: Mapping[str, Column]) -> None:
    """Name, type and meaning stand in files.md as in the code, in the order of the file."""
    rows = [
        f"| `{name}` | {TYPES[type(dtype).__name__]} | {meaning} |"
        for name, (dtype, meaning) in columns.items()
    ]
    written = section(page("files.md"), f"### `{file}`")
    assert [line for line in written.splitlines() if line.startswith("| `")] == rows


def test_every_file_of_a_run_and_every_key_of_its_totals_is_described() -> None:
    text = page("files.md")
    for name in RUN_FILES:
        assert f"### `{name}`" in text
    named = set(re.findall(r"`([a-z0-9_]+)`", section(text, "### `totals.json`")))
    kept_apart = {"itl_bins_s", "itl_counts"}
    missing = {field.name for field in dataclasses.fields(RunTotals)} - kept_apart - named
    assert not missing


def test_every_figure_of_a_summary_is_defined() -> None:
    """metrics.md gives each key the words of DEFINITIONS."""
    text = page("metrics.md")
    missing = [
        key for key, meaning in DEFINITIONS.items() if f"| `{key}` | {meaning} |" not in text
    ]
    assert not missing


def test_every_shipped_profile_and_policy_is_described() -> None:
    profiles, policies = page("profiles.md"), page("policy.md")
    assert not [name for name in shipped_names() if f"| `{name}` |" not in profiles]
    assert not [name for name in policy_names() if f"### `{name}`" not in policies]


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("## Top level", Scenario),
        ("## `[fleet]`", FleetSettings),
        ("## `[serving]`", ServingSettings),
        ("## `[measure]`", MeasureSettings),
        ("## `[plan]`", PlanSettings),
        ("## `[search]`", SearchSettings),
        ("## `[[policy]]`", PolicySettings),
        ("## `[[published]]`", PublishedFigure),
    ],
)
def test_every_key_of_a_scenario_stands_with_its_default(
    heading: str, model: type[BaseModel]
) -> None:
    """Plain keys have a row with their default; tables have a section of their own."""
    text = page("scenario.md")
    rows = section(text, heading)
    for name, field in model.model_fields.items():
        if model is Scenario and (f"`[{name}]`" in rows or f"`[[{name}]]`" in rows):
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        if default is PydanticUndefined:
            shown = "needed"
        elif default is None:
            shown = "unset"
        else:
            shown = f"`{toml_text({'_': default}).removeprefix('_ = ').strip()}`"
        assert f"\n| `{name}` | {shown} |" in rows


def test_every_table_of_a_scenario_has_a_section_or_a_page() -> None:
    text = page("scenario.md")
    for name, field in Scenario.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            assert f"## `[{name}]`" in text or f"({name}.md)" in text


@pytest.mark.parametrize("model", [WorkloadSettings, TraceSettings])
def test_every_key_of_a_workload_is_named(model: type[BaseModel]) -> None:
    text = page("workload.md")
    assert not [name for name in model.model_fields if f"`{name}`" not in text]


def test_every_slo_preset_stands_with_its_limits() -> None:
    rows = section(page("scenario.md"), "## `[slo]`")
    for name, spec in PRESETS.items():
        limits = " | ".join(f"{1e3 * limit.limit_s:g}" for limit in spec.limits)
        assert f"| `{name}` | {limits} |" in rows


def scenario_tables() -> Iterator[tuple[str, str]]:
    """The whole scenarios among the TOML blocks of the documentation."""
    for path in PAGES:
        for block in BLOCK.finditer(path.read_text(encoding="utf-8")):
            parts = ("name = ", "[workload]", "[fleet]", "[[policy]]")
            if block["kind"] == "toml" and all(
                f"\n{part}" in f"\n{block['body']}" for part in parts
            ):
                yield path.name, block["body"]


def test_scenarios_in_the_documentation_can_be_run() -> None:
    found = list(scenario_tables())
    assert found
    for name, text in found:
        parse_scenario(tomllib.loads(text), name, ROOT / "scenarios")


def anchors(path: Path) -> set[str]:
    """What a link into a page may point at: its headings, as a reader's address bar shows them."""
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_no_link_is_dead(path: Path) -> None:
    """Relative links of every page lead to a file or folder, and to a heading that is there."""
    text = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", path.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{target} in {path.name} leads nowhere"
        assert not anchor or anchor in anchors(found), f"{target} in {path.name}: no such heading"


def test_the_index_names_every_page() -> None:
    index = page("README.md")
    missing = [p.name for p in DOCS.glob("*.md") if f"({p.name})" not in index]
    records = [p.name for p in (DOCS / "decisions").glob("0*.md")]
    unlisted = [name for name in records if f"({name})" not in page("decisions/README.md")]
    assert missing == ["README.md"]
    assert records
    assert not unlisted


def commands_in(text: str) -> Iterator[str]:
    """The `helios` commands of a page's shell blocks."""
    for block in BLOCK.finditer(text):
        if block["kind"] in ("console", "sh", "bash", "shell"):
            for line in block["body"].replace("\\\n", " ").splitlines():
                words = line.removeprefix("$ ")
                if words.split(" ")[0].rsplit("/")[-1] in COMMANDS:
                    yield words


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_every_quoted_command_exists_with_its_options(path: Path) -> None:
    """The command line accepts it as written; nothing is run."""
    for line in commands_in(path.read_text(encoding="utf-8")):
        name, *words = shlex.split(line, comments=True)
        command: Any = typer.main.get_command(COMMANDS[name.rsplit("/")[-1]].app)
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        if words == ["--help"]:
            continue
        is_complete = not hasattr(command, "commands") or command.invoke_without_command
        assert is_complete, f"{line}: no such command"
        command.make_context(name, words)


def test_a_command_that_does_not_exist_would_be_found(tmp_path: Path) -> None:
    """The check above has teeth: an unknown command and an unknown option fail it."""
    for line in ("$ helios conquer x.toml", "$ helios profiles --loud"):
        wrong = tmp_path / "wrong.md"
        wrong.write_text(f"```console\n{line}\n```\n", encoding="utf-8")
        with pytest.raises(Exception, match=r"no such command|No such option"):
            test_every_quoted_command_exists_with_its_options(wrong)


def output_of(line: str) -> str:
    """What a command prints, standard output before standard error."""
    name, *words = shlex.split(line)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit):
        COMMANDS[name].main(words)
    text = out.getvalue() + err.getvalue()
    return "".join(f"{row.rstrip()}\n" for row in text.splitlines())


def with_fresh_output(text: str, folder: Path) -> str:
    """A page whose `console` blocks hold what their commands print now, run in order."""
    (folder / "scenarios").symlink_to(ROOT / "scenarios")
    os.environ["COLUMNS"] = "100"
    os.environ.pop("FORCE_COLOR", None)

    def fresh(block: re.Match[str]) -> str:
        if block["kind"] != "console":
            return block[0]
        lines = commands_in(block[0])
        return "```console\n" + "".join(f"$ {line}\n{output_of(line)}" for line in lines) + "```"

    with chdir(folder):
        return BLOCK.sub(fresh, text)


def test_commands_print_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    # Only the first run on a machine says that it compiles.
    monkeypatch.setattr(compiled, "_is_announced", True)
    shown = page("cli.md")
    printed = with_fresh_output(shown, tmp_path)
    changes = difflib.unified_diff(shown.splitlines(), printed.splitlines(), "page", "now", n=0)
    assert printed == shown, "\n".join(["Run `python -m tests.test_docs`.", *changes])


def test_the_laws_name_tests_that_exist() -> None:
    """Every test in laws.md is defined in the file that its item names; twelve laws have one."""
    text = page("laws.md")
    laws = re.split(r"^\*\*(\d+)\. ", text, flags=re.MULTILINE)[1:]
    assert laws[::2] == [str(number) for number in range(1, 13)]
    for number, law in zip(laws[::2], laws[1::2], strict=True):
        items = re.findall(r"^- `(tests/[\w/]+\.py)`:((?:.|\n  )+)", law, re.MULTILINE)
        assert items, f"Law {number} names no test."
        for file, names in items:
            source = (ROOT / file).read_text(encoding="utf-8")
            quoted = re.findall(r"`(test_\w+)`", names)
            assert quoted
            missing = [name for name in quoted if f"def {name}(" not in source]
            assert not missing, f"{file} has no {missing}"


def test_the_design_page_names_every_module() -> None:
    """Each module has a line below its package, unless the package's own line is all there is."""
    rooms = BLOCK.search(section(page("design.md"), "## The rooms"))
    assert rooms
    named: dict[str, set[str]] = {}
    folders: list[str] = []
    for line in rooms["body"].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        path = "".join([*folders[:depth], name])
        if name.endswith("/"):
            folders[depth:] = [name]
        named.setdefault("".join(folders[:depth]), set()).add(name)
        assert (ROOT / path).exists(), f"{path} is not there any more"
    for folder in [one for one in named if one.startswith(("helios_sim/", "calibration/"))]:
        there = {one.name for one in (ROOT / folder).glob("*.py")} - {"__init__.py"}
        there |= {f"{one.parent.name}/" for one in (ROOT / folder).glob("*/__init__.py")}
        assert not there - named[folder] - {"__main__.py"}, folder


def rewrite() -> None:
    """Write the output in docs/cli.md anew."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = with_fresh_output(page("cli.md"), Path(folder))
    (DOCS / "cli.md").write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    rewrite()
    sys.exit()
