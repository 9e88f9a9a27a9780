"""Policies by name, a user's own class from a file, and the sentences for what is wrong."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

from helios_sim.errors import InputError
from helios_sim.policy import (
    hot_rules_of,
    make_policy,
    option_grades,
    policy_names,
    policy_options,
    rules,
)
from helios_sim.policy.contract import (
    MAX_WINDOW_TOKENS,
    Event,
    ExitMode,
    Keep,
    Policy,
    Serve,
)
from helios_sim.policy.contract_suite import PolicyContract, ScriptedHost, example_candidates
from helios_sim.policy.helios import Helios, HeliosSettings
from helios_sim.policy.registry import SHIPPED, policy_source, settled_options

PAGE = Path(__file__).parents[2] / "docs" / "policy.md"

MINE = """
from dataclasses import dataclass
from helios_sim.policy.contract import Keep, Watching

@dataclass(frozen=True)
class Mine:
    patience: int = 3
    name = "mine"
    sees_future = False
    watching = Watching()
    confidence_threshold = None

    def decide(self, snapshot):
        return Keep("Mine.")

class Needy(Mine):
    def __init__(self, model):
        if model != "opt":
            raise RuntimeError("not my model")

class HalfDone:
    name = "half"
    sees_future = 0
    def decide(self, snapshot):
        return None

def may_join(num_running, max_batch, needed_blocks, free_blocks, watermark_blocks):
    return num_running < 1

class Hot(Mine):
    hot_rules = {"may_join": may_join}

def compiled(*numbers):
    return False

compiled.py_func = may_join

class HotCompiled(Mine):
    hot_rules = {"may_join": compiled}

class Misspelt(Mine):
    hot_rules = {"may_jion": may_join}

class Short(Mine):
    hot_rules = {"is_breach": may_join}

class Uncallable(Mine):
    hot_rules = {"is_breach": 3}

class Listed(Mine):
    hot_rules = ["is_breach"]

class Moody(Mine):
    @property
    def watching(self):
        return Watching(reassess_requests=self.patience)

class Torn(Mine):
    @property
    def watching(self):
        return Watching(reassess_requests=self.patience / self.missing())

    def missing(self):
        return {}["no"]

class Nameless(Mine):
    @property
    def name(self):
        return {}["no"]

class Ruled(Mine):
    @property
    def hot_rules(self):
        return {}["no"]

class Masked(Mine):
    def rule(a, b): ...
    rule.py_func = 3
    hot_rules = {"leaves_here": rule}

class Table(dict, Mine):
    pass

class Trusting(Mine):
    def __init__(self, trust):
        object.__setattr__(self, "confidence_threshold", trust)

class Typed(Mine):
    def __init__(self, share: float = 0.5, strict: bool = False, word: str = "a"):
        pass

class Watched(Mine):
    def __init__(self, **watching):
        object.__setattr__(self, "watching", Watching(**watching))

class Unnamed(Mine):
    name = ""

class Breached(Mine):
    def __init__(self, window, limit):
        watching = Watching(breach_window_tokens=window or None, breach_limit=limit)
        object.__setattr__(self, "watching", watching)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("import no_such_module_of_anybody\n")
    (tmp_path / "needy_too.py").write_text("import needy\n")
    (tmp_path / "garbled.py").write_text("class :\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit('usage: script FILE')\n")
    return tmp_path


def test_the_shipped_names_are_the_documented_ones() -> None:
    """Each name makes a policy that calls itself so."""
    assert set(policy_names()) == {
        "helios",
        "vanilla",
        "ee-single",
        "static-depth",
        "switch-only",
        "load-only",
        "clairvoyant",
        "never",
        "always",
    }
    for name in policy_names():
        assert make_policy(name).name == name


def test_options_reach_the_settings() -> None:
    """Words become exit modes, lists become tuples, "off" becomes None where that is allowed."""
    policy = make_policy(
        "helios",
        {
            "top_k": 2,
            "reassess_requests": "off",
            "after_load_exit_mode": "rebatch",
            "actions": ["switch"],
        },
    )
    assert isinstance(policy, Helios)
    wanted = HeliosSettings(
        top_k=2, reassess_requests=None, after_load_exit_mode=ExitMode.REBATCH, actions=("switch",)
    )
    assert policy.settings == wanted
    with pytest.raises(InputError, match="'confidence_threshold' was given 'off'"):
        make_policy("helios", {"confidence_threshold": "off"})


@pytest.mark.parametrize(
    ("use", "options", "sentence"),
    [
        ("helois", {}, "Policy 'helois' is not known; .* Did you mean 'helios'"),
        ("helios", {"topk": 3}, "unknown option 'topk'; its options are .* Did you mean 'top_k'"),
        ("switch-only", {"actions": ["load"]}, "unknown option 'actions'"),
        ("never", {"reassess_requests": 10}, "unknown option 'reassess_requests'"),
        ("never", {"breach_limit": 10}, "unknown option 'breach_limit'"),
        ("helios", {"top_k": "three"}, "^policy helios: Option 'top_k' was given 'three'"),
        ("vanilla", {"model": 3}, "'model' was given 3; it must be the name of a candidate"),
        ("ee-single", {"exit_mode": "full"}, "one of 'solo', 'wait', 'rebatch'"),
        ("static-depth", {"depth": 0}, r"at least 1, or left out \(the shallowest exit\)"),
        ("always", {"reassess_requests": 0}, "'reassess_requests' was given 0"),
        ("clairvoyant", {"depth_rule": "fixed"}, "'fixed_depth' was left out"),
        (
            "mine:Other",
            {},
            "names the class 'Other', which module 'mine' does not have; its classes "
            "are 'Mine', 'Needy', 'HalfDone', ",
        ),
        ("mine:mine", {}, "Did you mean 'Mine'"),
        ("nowhere:Mine", {}, "'nowhere', but there is no such module .* and no file nowhere.py in"),
        ("needy_too:Mine", {}, "importing 'needy_too' failed with ModuleNotFoundError"),
        ("no.where:Mine", {}, "names the module 'no.where', but there is no such module"),
        ("broken:Mine", {}, "importing 'broken' failed with ModuleNotFoundError: No module named"),
        ("garbled:Mine", {}, "importing 'garbled' failed with SyntaxError"),
        ("script:Mine", {}, "importing 'script' failed with SystemExit: usage: script FILE"),
        ("builtins:int", {}, "not a policy: it lacks, .* decide"),
        ("mine:Table", {"patience": 3}, "unknown option 'patience'; it has no options"),
        ("mine:", {}, "or a class of your own as 'module:Class'"),
        ("mine:HalfDone", {}, "sees_future .*, watching .*, confidence_threshold"),
        ("mine:Mine", {"patients": 1}, "unknown option 'patients'; .* Did you mean 'patience'"),
        ("mine:Needy", {}, "needs the option 'model'"),
        ("mine:Needy", {"model": "x"}, "could not be built .* RuntimeError: not my model"),
        ("mine:Mine", {"patience": "x"}, "patience = 'x'; it must be a whole number"),
        ("mine:Mine", {"patience": True}, "patience = True; it must be a whole number"),
        ("mine:Mine", {"patience": 2.5}, "patience = 2.5; it must be a whole number"),
        ("mine:Typed", {"share": "x"}, "share = 'x'; it must be a number"),
        ("mine:Typed", {"strict": 1}, "strict = 1; it must be true or false"),
        ("mine:Typed", {"word": 1}, "word = 1; it must be a text"),
        ("mine:Unnamed", {}, r"or has of another kind, name \(a word\)"),
        ("mine:Trusting", {"trust": True}, "or has of another kind, confidence_threshold"),
        ("mine:Moody", {"patience": 0}, "reassess_requests = 0; .* at least 1 or None"),
        ("mine:Torn", {}, r"failed in .*: KeyError: 'no', mine.py line \d\d\. HELIOS_TRACEBACK=1"),
        ("mine:Nameless", {}, r"failed in what it says of itself: KeyError: 'no', mine.py line"),
        ("mine:Ruled", {}, r"failed in what it says of itself: KeyError: 'no', mine.py line"),
        ("mine:Masked", {}, "a function of unknown arguments for 'leaves_here'; it must take 2"),
        ("mine:Trusting", {"trust": 50}, "confidence_threshold = 50; .* from 0 to 1, or None"),
        ("mine:Trusting", {"trust": -1}, "confidence_threshold = -1; it must be a number from 0"),
        ("mine:Trusting", {"trust": float("nan")}, "confidence_threshold = nan"),
        ("mine:Breached", {"window": 9, "limit": 9}, "breach_limit = 9; it must be below the 9"),
        ("mine:Breached", {"window": 10**15, "limit": 9}, "at most 10,000,000 are allowed"),
        ("helios", {"breach_window_tokens": 10**20}, "at most 10,000,000 are allowed"),
        ("mine:Misspelt", {}, "hot_rules names 'may_jion'; .* Did you mean 'may_join'"),
        ("mine:Short", {}, "a function of 5 arguments for 'is_breach'; it must take 3"),
        ("mine:Uncallable", {}, "gives 3 for 'is_breach'; it must be a function"),
        ("mine:Listed", {}, "it must be a mapping from rule names to functions"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(
    folder: Path, use: str, options: dict[str, Any], sentence: str
) -> None:
    """Unknown names name the nearest; wrong values name what is allowed."""
    with pytest.raises(InputError, match=sentence):
        make_policy(use, options, search_path=folder)


def test_what_a_policy_may_trust_and_watch_ends_where_a_shipped_ones_does(folder: Path) -> None:
    """A threshold may be 0 or 1, and a limit one breach below its window or without a window."""
    for options in ({"trust": 0}, {"trust": 1.0}, {"trust": None}):
        assert make_policy("mine:Trusting", options, search_path=folder)
    longest = {"window": MAX_WINDOW_TOKENS, "limit": 8}
    for options in ({"window": 9, "limit": 8}, {"window": 0, "limit": 50}, longest):
        assert make_policy("mine:Breached", options, search_path=folder)


@pytest.mark.parametrize(("use", "options"), [("helios", {"top_k": 0}), ("mine:Torn", {})])
def test_an_error_names_the_place_it_was_given(
    folder: Path, use: str, options: dict[str, Any]
) -> None:
    """A scenario passes its file and key on, whoever raised."""
    with pytest.raises(InputError) as error:
        make_policy(use, options, search_path=folder, where="a.toml, policies[0]")
    assert error.value.where == "a.toml, policies[0]"


@pytest.mark.parametrize(
    ("watching", "said"),
    [
        ({"breach_window_tokens": 0}, "breach_window_tokens = 0; .* of at least 1 or None"),
        ({"breach_limit": None}, r"breach_limit = None; .* of at least 0\.$"),
        ({"breach_limit": -1}, "breach_limit = -1; .* of at least 0"),
        ({"reassess_requests": True}, "reassess_requests = True; it must be a whole number"),
        ({"reassess_requests": 2.0}, "reassess_requests = 2.0; it must be a whole number"),
        ({"window_kind": "hopping"}, "window_kind = 'hopping'; .* 'tumbling', 'sliding'"),
    ],
)
def test_what_a_policy_watches_is_a_count_and_a_rule_that_there_is(
    folder: Path, watching: dict[str, Any], said: str
) -> None:
    (folder / "watched.py").write_text(MINE.replace("**watching):", f"watching={watching!r}):"))
    with pytest.raises(InputError, match=said):
        make_policy("watched:Watched", search_path=folder)


def test_options_of_their_declared_types_are_taken(folder: Path) -> None:
    """A whole number is a number, and only a truth value is one."""
    for options in ({"share": 1}, {"share": 0.25}, {"strict": True}, {"word": "b"}):
        assert make_policy("mine:Typed", options, search_path=folder).name == "mine"


@pytest.mark.parametrize("use", ["mine:Mine", "mine.py:Mine"])
def test_a_class_in_a_file_beside_the_scenario_is_a_policy(folder: Path, use: str) -> None:
    """Its options are the parameters of its constructor."""
    policy = make_policy(use, {"patience": 5}, search_path=folder)
    assert (policy.name, getattr(policy, "patience", None)) == ("mine", 5)
    assert policy_options(use, search_path=folder) == {"patience": (3, "")}


def test_a_dotted_module_lies_in_a_folder_of_the_search_path(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "deep.py").write_text(MINE)
    assert make_policy("sub.deep:Mine", search_path=folder).name == "mine"


def test_a_policy_comes_from_the_file_of_its_class_unless_python_has_none(folder: Path) -> None:
    assert policy_source("mine:Mine", search_path=folder) == folder / "mine.py"
    assert policy_source("builtins:int") is None


def test_a_policy_is_made_of_one_reading_of_its_file(folder: Path) -> None:
    """A file that is read anew makes another class, which nobody could look up by its name."""
    policy = make_policy("mine:Mine", search_path=folder)
    assert sys.modules[type(policy).__module__].Mine is type(policy)


def test_a_file_that_fails_leaves_no_module_behind(folder: Path) -> None:
    with pytest.raises(InputError, match="garbled"):
        make_policy("garbled:Mine", search_path=folder)
    assert not [name for name in sys.modules if name.startswith("_policy_garbled_")]


def test_an_importable_module_needs_no_search_path() -> None:
    """A class in an installed package is named by its dotted module."""
    policy = make_policy("helios_sim.policy.baselines:Vanilla", {"model": "opt"})
    assert policy.name == "vanilla"


def test_a_class_that_does_not_say_what_it_takes_is_a_policy_without_options(folder: Path) -> None:
    """Python knows no arguments of what a dict makes of itself."""
    assert make_policy("mine:Table", search_path=folder).name == "mine"
    assert policy_options("mine:Table", search_path=folder) == {}
    assert settled_options("mine:Table", {}, search_path=folder) == {}


def test_files_of_one_name_in_two_folders_do_not_meet(folder: Path) -> None:
    """The second file is read, not the first one again."""
    other = folder / "other"
    other.mkdir()
    (other / "mine.py").write_text(MINE.replace("patience: int = 3", "patience: int = 4"))
    assert policy_options("mine:Mine", search_path=folder)["patience"][0] == 3
    assert policy_options("mine:Mine", search_path=other)["patience"][0] == 4
    mine = type(make_policy("mine:Mine", search_path=folder))
    theirs = type(make_policy("mine:Mine", search_path=other))
    assert sys.modules[mine.__module__].Mine is mine
    assert sys.modules[theirs.__module__].Mine is theirs


@pytest.mark.parametrize("use", policy_names())
def test_the_settled_options_of_a_shipped_policy_make_the_policy_that_its_defaults_make(
    use: str,
) -> None:
    settled = settled_options(use, {})
    fixed = getattr(SHIPPED[use], "fixed_settings", {})
    assert set(settled) == set(policy_options(use)) - set(fixed) - {
        name for name, (default, _) in policy_options(use).items() if default is None
    }
    own, made = make_policy(use), make_policy(use, settled)
    assert getattr(made, "settings", made) == getattr(own, "settings", own)


def test_settled_options_keep_what_was_given_in_the_order_of_the_class() -> None:
    given = {"breach_limit": 9, "reassess_requests": "off", "confidence_threshold": 0.5}
    settled = settled_options("helios", given)
    assert settled == settled_options("helios", dict(reversed(given.items())))
    assert list(settled)[:3] == ["top_k", "evaluation_requests", "reassess_requests"]
    assert {name: settled[name] for name in given} == given
    assert settled["actions"] == ["load", "switch"]
    assert "fixed_depth" not in settled
    assert settled_options("helios", {"topk": 3})["topk"] == 3


OPTIONAL = """
from dataclasses import field
from helios_sim.policy.contract import ExitMode
from helios_sim.policy.options import about

@dataclass(frozen=True)
class Optional(Mine):
    share: float = 1
    most: int = 2.0
    limit: float = float("inf")
    mode: str = ExitMode.FULL
    pair: tuple = (1, 2)
    names: list = field(default_factory=list)
    model: str | None = None
    window: int | None = field(default=None, metadata=about("A window.", "ours", can_be_off=True))
"""


def test_defaults_of_an_own_class_are_settled_where_a_file_gives_them_back(folder: Path) -> None:
    """Of another type than declared, endless, a word of ours, a tuple, a list: these stay out."""
    (folder / "mine.py").write_text(MINE + OPTIONAL)
    settled = settled_options("mine:Optional", {"model": "opt"}, search_path=folder)
    assert settled == {"patience": 3, "share": 1, "model": "opt", "window": "off"}
    policy = make_policy("mine:Optional", settled, search_path=folder)
    assert repr(policy) == repr(make_policy("mine:Optional", {"model": "opt"}, search_path=folder))


def test_hot_rules_are_passed_through(folder: Path) -> None:
    """A policy that replaces none has none; the names are those of the rules module."""
    assert hot_rules_of(make_policy("helios")) == {}
    replaced = hot_rules_of(make_policy("mine:Hot", search_path=folder))
    assert list(replaced) == ["may_join"]
    assert replaced["may_join"](1, 8, 1, 9, 0) is False
    assert rules.may_join(1, 8, 1, 9, 0) is True


def test_a_compiled_rule_is_passed_through_as_the_function_it_was_made_of(folder: Path) -> None:
    (rule,) = hot_rules_of(make_policy("mine:HotCompiled", search_path=folder)).values()
    assert rule.__name__ == "may_join"


def test_the_example_of_the_documentation_is_a_working_policy(tmp_path: Path) -> None:
    """The file on the page keeps the contract, and gives layers up when the queue grows."""
    blocks = PAGE.read_text(encoding="utf-8").split("```python\n")[1:]
    source = next(block.split("```")[0] for block in blocks if "class Patient" in block)
    (tmp_path / "my_policy.py").write_text(source)

    class Suite(PolicyContract):
        def make_policy(self) -> Policy:
            return make_policy("my_policy:Patient", {"patience": 20}, search_path=tmp_path)

    for name in dir(Suite):
        if name.startswith("test_"):
            getattr(Suite(), name)()
    small = example_candidates()[0]
    host = ScriptedHost(Suite().make_policy(), (small,))
    kinds = []
    for event, num_waiting in ((Event.START, 0), (Event.REASSESS, 20), (Event.REASSESS, 21)):
        host.num_waiting = num_waiting
        decision, _ = host.ask(event)
        kinds.append((type(decision), host.assignment and host.assignment.depth))
    assert kinds == [(Serve, 24), (Keep, 24), (Serve, 6)]


def test_every_option_of_a_shipped_policy_has_a_default_a_meaning_and_a_grade() -> None:
    """The documentation and the schema are made of these."""
    for name in policy_names():
        options = policy_options(name)
        assert set(option_grades(name)) == set(options)
        assert set(option_grades(name).values()) <= {"paper", "open", "ours"}
        for default, meaning in options.values():
            assert default is not inspect.Parameter.empty
            assert meaning.strip()


def test_the_documentation_lists_every_option_with_its_default_and_grade() -> None:
    """docs/policy.md has one table row for each, so that neither falls behind."""
    page = PAGE.read_text(encoding="utf-8")
    grades = {"paper": "paper default", "open": "left open by the paper", "ours": "ours"}
    for name in policy_names():
        section = page.split(f"### `{name}`\n")[1].split("\n### ")[0].split("\n## ")[0]
        for option, (default, _) in policy_options(name).items():
            if name in ("switch-only", "load-only", "never"):
                continue
            row = next(row for row in section.splitlines() if row.startswith(f"| `{option}` |"))
            assert f"| {written(default)} |" in row
            assert grades[option_grades(name)[option]] in row


def written(default: object) -> str:
    """A default as the documentation writes it: in TOML's way."""
    if default is None:
        return "unset"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return "`[" + ", ".join(f'"{item}"' for item in default) + "]`"
    return f'`"{default}"`' if isinstance(default, str) else f"`{default}`"
