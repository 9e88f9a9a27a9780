"""Text from what the interpreter ships: the same anywhere, and no text in two splits."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from calibration.training import text as source
from calibration.training.text import (
    DOMAINS,
    START,
    ByteTokenizer,
    Split,
    corpus,
    separate,
    split_of,
)
from helios_sim.errors import InputError

SPLITS = get_args(Split)
SOURCE = '''"""A module that says at some length what it is for, and so it reads as prose to all."""

LIMIT = 3  # a short comment stays with the code


def double(x):
    """Twice x."""
    # A longer comment goes over several lines and explains
    # why the thing is done the way it is done here, and what
    # a reader should keep in mind when the code is changed.
    return x + x
'''


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_corpus_is_the_same_each_time_and_its_hash_says_so(domain: str) -> None:
    first = corpus(domain, "calibration", max_bytes=20_000)
    corpus.cache_clear()
    again = corpus(domain, "calibration", max_bytes=20_000)
    assert first == again
    assert first.sha256 == again.sha256
    assert len(first.data) == 20_000
    assert first.truncated
    assert first.data.startswith(START)
    assert corpus(domain, "trace", max_bytes=20_000).sha256 != first.sha256


def test_no_document_is_in_two_splits_and_every_split_has_every_domain() -> None:
    for domain in DOMAINS:
        documents = {
            split: set(corpus(domain, split, max_bytes=60_000).data.split(START)[1:-1])
            for split in SPLITS
        }
        for split in SPLITS:
            assert documents[split]
            others = set().union(*(documents[other] for other in SPLITS if other != split))
            assert not documents[split] & others


def test_held_out_prose_shares_no_topic_of_the_language_reference_with_training_text() -> None:
    """Some topics hold others whole, so that their names' splits do not keep texts apart."""
    topics = pytest.importorskip("pydoc_data.topics").topics
    splits = {name: split_of(f"pydoc_data/topics/{name}") for name in topics}
    known = {
        line for name in topics if splits[name] == "train" for line in long_lines(topics[name])
    }
    assert len(known) > 1000
    num_held_out = 0
    for split in SPLITS[1:]:
        documents = corpus("prose", split).data.decode().split(START.decode())
        there = [name for name in topics if topics[name] in documents]
        assert {splits[name] for name in there} == {split}
        assert not any(known & long_lines(topics[name]) for name in there)
        num_held_out += len(there)
    assert num_held_out > 5


def long_lines(text: str) -> set[str]:
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= 40}


def test_the_split_of_a_file_follows_from_its_name_alone() -> None:
    names = [f"package/module{number}.py" for number in range(2000)]
    shares = {split: sum(split_of(name) == split for name in names) / 2000 for split in SPLITS}
    assert shares["train"] == pytest.approx(0.76, abs=0.04)
    assert all(share > 0.03 for share in shares.values())
    known = {"argparse.py": "train", "json/decoder.py": "validation"}
    known |= {names[16]: "trace", names[26]: "calibration"}
    assert {name: split_of(name) for name in known} == known


def test_prose_leaves_the_code_so_that_domains_share_no_text() -> None:
    code, prose = separate(SOURCE)
    assert "reads as prose" in prose
    assert "several lines" in prose
    assert "reads as prose" not in code
    assert "several lines" not in code
    assert "def double(x):" in code
    assert "a short comment" in code
    assert '"""Twice x."""' in code
    assert "Twice x" not in prose


def test_source_that_does_not_parse_is_code() -> None:
    assert separate("def (:\n") == ("def (:\n", "")


def test_bytes_come_back_from_the_tokenizer() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("naïve")
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == "naïve"


def test_packages_add_to_training_text_and_never_to_held_out_text() -> None:
    plain = corpus("code", "trace", max_bytes=30_000)
    assert corpus("code", "trace", max_bytes=30_000, packages=("typer",)) == plain
    name, path = source._sources_of("typer")[0]
    assert name.startswith("packages/typer/")
    assert path.is_file()
    with pytest.raises(InputError, match="no_such_package"):
        corpus("code", "train", max_bytes=1000, packages=("no_such_package",))


def test_text_is_the_same_whoever_parses_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed one by one here, and in two processes of their own."""
    found = []
    for processes in (1, 2):
        monkeypatch.setattr(source, "_SEPARATED", {})
        monkeypatch.setattr(source, "_FILES_AT_ONCE", 20)
        monkeypatch.setattr(source, "processes_for", lambda *_, processes=processes: processes)
        corpus.cache_clear()
        found.append(corpus("prose", "train", max_bytes=100_000, packages=("typer",)))
    corpus.cache_clear()
    assert found[0] == found[1]


def test_too_little_text_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tiny.py").write_text("x = 1\n")
    monkeypatch.setattr(source, "_library", lambda: tmp_path)
    monkeypatch.setattr(source, "_library_files", lambda: (("tiny.py", tmp_path / "tiny.py"),))
    corpus.cache_clear()
    with pytest.raises(InputError, match=r"0 bytes of code text .* installed with its sources"):
        corpus("code", "train")


def test_an_unknown_domain_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match="'poems' was given; there are 'code', 'prose', 'tables'"):
        corpus("poems", "train")
