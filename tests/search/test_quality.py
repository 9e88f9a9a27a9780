"""Perplexities beside one another: which compare, and what is said of the others."""

from __future__ import annotations

from helios_sim.profiles.files import load_profile
from helios_sim.search.quality import perplexities, uncompared

OPT, LAYERSKIP = load_profile("opt-a100-40gb"), load_profile("layerskip-a100-40gb")


def test_of_two_tokenizers_only_the_first_one_s_models_are_compared_and_it_is_said() -> None:
    small, large = list(OPT.models)[:2]
    stranger = next(iter(LAYERSKIP.models))
    sides = [((name,), {"perplexity": 10.0}) for name in (small, stranger, large)]
    known = perplexities(sides, (small, stranger, large), (OPT, LAYERSKIP))
    assert known == [10.0, None, 10.0]
    said = " Perplexity is given for models of one tokenizer; that of others does not compare."
    assert uncompared(known, [means for _, means in sides]) == said


def test_nothing_is_said_where_all_or_none_are_shown_or_a_fleet_has_no_figures() -> None:
    ten, nothing = {"perplexity": 10.0}, {"perplexity": None}
    assert uncompared([10.0, 10.0], [ten, ten]) == ""
    assert uncompared([None, None], [ten, ten]) == ""
    assert uncompared([10.0, None], [ten, nothing]) == ""
    assert uncompared([10.0, None], [ten, {}]) == ""
