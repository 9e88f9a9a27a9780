"""The shipped profiles: rebuilt from code, true to their sources, honest in their grades."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helios_sim import exits
from helios_sim.cost import COEFFICIENTS, LAUNCH, MEMORY, OPTIONAL_COEFFICIENTS, layer_seconds
from helios_sim.model import PUBLIC_SHAPES
from helios_sim.profile import PROFILE_FILE, MarkovExits, Profile
from helios_sim.profiles import published
from helios_sim.profiles.files import load_profile, shipped_names
from helios_sim.profiles.roofline import decode
from tests.factories import total_params

ROOT = Path(__file__).parents[2]
NAMES = ("layerskip-a100-40gb", "layerskip-h100-80gb", "opt-a100-40gb")


@pytest.fixture(scope="module", params=NAMES)
def profile(request: pytest.FixtureRequest) -> Profile:
    """Each shipped profile."""
    return load_profile(str(request.param))


def markov(profile: Profile) -> MarkovExits:
    """The exit statistics of a shipped profile."""
    assert isinstance(profile.exits, MarkovExits)
    return profile.exits


def test_the_shipped_profiles_are_those_the_code_builds() -> None:
    assert set(NAMES) <= set(shipped_names())
    assert sorted(recipe.name for recipe in published.recipes()) == list(NAMES)


def test_building_the_profiles_again_gives_the_shipped_folders_byte_for_byte(
    tmp_path: Path,
) -> None:
    shipped = ROOT / "helios_sim" / "profiles"
    for path in published.write_profiles(tmp_path):
        kept = shipped / path.relative_to(tmp_path)
        assert path.read_bytes() == kept.read_bytes(), path.parent.name
    files = {path.name for name in NAMES for path in (shipped / name).iterdir()}
    assert files == {PROFILE_FILE}


def test_the_command_refuses_arguments_it_does_not_know(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert published.main(["--wrong"]) == 2
    assert "--compare, --help or nothing" in capsys.readouterr().err


def test_the_command_says_what_it_does_and_writes_nothing_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "write_profiles", None)
    for words in (["--help"], ["-h"]):
        assert published.main(words) == 0
        assert "`--compare` prints what the profiles predict" in capsys.readouterr().out


def test_the_documented_comparison_is_the_one_the_profiles_give(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert published.main(["--compare"]) == 0
    page = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in page


def test_what_a_request_costs_an_engine_is_read_off_its_published_loads() -> None:
    """The slope from 128 to 512 requests that the profile lacks, and the times with it."""
    model = load_profile("layerskip-h100-80gb").models["llama3-8b"]
    real = {one.batch: one.batch / one.tokens_per_s for one in published.ENERGY_ANCHORS}
    ours = {batch: decode(model, 32, batch, launch_free=True)[0] for batch in real}
    slope = ((real[512] - ours[512]) - (real[128] - ours[128])) / (512 - 128)
    assert slope == pytest.approx(58e-6, abs=0.5e-6)
    page = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    for batch, seconds in real.items():
        with_it = ours[batch] + 58e-6 * batch
        cells = [1e3 * one for one in (seconds, ours[batch], with_it)]
        told = " | ".join(f"{cell:.1f} ms" for cell in cells)
        assert f"| {batch} | {told} | {with_it / seconds:.2f} |" in page


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("opt-1.3b", 1.316),
        ("opt-6.7b", 6.658),
        ("llama2-7b", 6.738),
        ("llama2-13b", 13.016),
        ("llama3-8b", 8.030),
    ],
)
def test_each_shape_has_the_parameters_its_name_promises(name: str, billions: float) -> None:
    assert total_params(PUBLIC_SHAPES[name]) / 1e9 == pytest.approx(billions, abs=0.001)


def test_no_shipped_number_claims_to_be_measured(profile: Profile) -> None:
    counts = profile.grade_counts()
    assert counts["measured"] == 0
    assert all(counts[grade] > 0 for grade in ("published", "derived", "assumed"))
    assert profile.provenance.origin == "published"


def test_every_source_that_leans_on_an_assumption_says_so(profile: Profile) -> None:
    for place, number in profile.quantities.items():
        leans = "roofline" in number.source or "greatest entropy" in number.source
        if number.grade == "derived" and leans:
            assert "assumed" in number.source, place


def test_the_opt_exits_are_those_of_the_paper() -> None:
    opt = load_profile("opt-a100-40gb")
    chat = {name: one.exit_shares["chat"] for name, one in markov(opt).candidates.items()}
    assert chat == {"opt-1.3b": (0.730, 0.047, 0.223), "opt-6.7b": (0.736, 0.048, 0.216)}
    layers = {
        name: np.dot(share, opt.models[name].model.exit_layers) for name, share in chat.items()
    }
    assert layers == pytest.approx({"opt-1.3b": 10.30, "opt-6.7b": 14.35}, abs=0.005)


def test_the_invented_domain_is_graded_as_assumed() -> None:
    opt = load_profile("opt-a100-40gb")
    invented = [
        number.grade for place, number in opt.quantities.items() if ".exit_shares.code" in place
    ]
    assert invented == ["assumed"] * 6


@pytest.mark.parametrize("shipped", ["layerskip-a100-40gb", "layerskip-h100-80gb"])
def test_llama_exits_keep_the_published_mean_layer(shipped: str) -> None:
    profile = load_profile(shipped)
    for domain, means in published.FLEXEE_MEAN_LAYER.items():
        for name, mean in means.items():
            shares = markov(profile).candidates[name].exit_shares[domain]
            exit_layers = profile.models[name].model.exit_layers
            assert np.dot(shares, exit_layers) == pytest.approx(mean, abs=1e-3)


def test_generated_llama_traces_keep_the_published_mean_layer() -> None:
    h100 = load_profile("layerskip-h100-80gb")
    traces = exits.load_traces(h100)
    for domain, means in published.FLEXEE_MEAN_LAYER.items():
        for name, mean in means.items():
            shares = traces.share_by_exit(name, markov(h100).nominal_threshold, domain)
            assert np.dot(shares, traces.exit_layers[name]) == pytest.approx(mean, abs=0.01)


def test_a_histogram_of_greatest_entropy_is_a_geometric_series() -> None:
    shares = np.array(published.tilted_shares((8, 12, 16, 20), 15.0))
    assert shares.sum() == pytest.approx(1.0)
    assert shares @ [8, 12, 16, 20] == pytest.approx(15.0)
    ratios = shares[1:] / shares[:-1]
    assert ratios == pytest.approx([ratios[0]] * 3)
    assert published.tilted_shares((8, 12, 16, 20), 14.0) == pytest.approx([0.25] * 4)


def test_stickiness_gives_back_the_published_autocorrelation() -> None:
    rho = published.solve_stickiness(0.80, 0.32)
    assert rho == pytest.approx(0.768, abs=0.001)
    h = 1.0 - 0.68**0.2
    rng = np.random.Generator(np.random.PCG64(1))
    anew = rng.random(200_000) >= rho
    anew[0] = True
    # A state is a class of exits near each other; 1/h of them makes chance h.
    states = rng.random(200_000)[np.flatnonzero(anew)][np.cumsum(anew) - 1] // h
    near = np.zeros(200_000 - 5, dtype=bool)
    for back in range(1, 6):
        near |= states[5:] == states[5 - back : -back]
    assert near.mean() == pytest.approx(0.80, abs=0.01)


def test_without_any_memory_the_stickiness_is_zero() -> None:
    assert published.solve_stickiness(0.32, 0.32) == pytest.approx(0.0, abs=1e-9)


def test_correlation_gives_back_the_published_complementarity() -> None:
    r = published.solve_correlation(0.736, 0.223, 0.57)
    assert published.early_given_deep(r, 0.736, 0.223) == pytest.approx(0.57, abs=1e-9)
    assert published.early_given_deep(0.0, 0.736, 0.223) == pytest.approx(0.736, abs=1e-6)


def test_agreement_under_the_step_gives_back_the_published_total() -> None:
    below = published.solve_agreement_below(0.736)
    assert below == pytest.approx(0.25, abs=0.01)
    confident = exits.share_leaving_by(0.736, 0.2, 0.5)
    assert 0.921 * confident + below * (1.0 - confident) == pytest.approx(0.85)


def test_decode_at_batch_one_is_bound_by_launches_as_the_paper_shows(profile: Profile) -> None:
    for model in profile.models.values():
        seconds, regime = layer_seconds(model.coefficient_array(), 1.0, 512.0, 512.0, 0.0, 0.0, 0.0)
        assert regime == LAUNCH
        assert seconds == model.coefficients["decode.launch_s"]


def test_a_large_batch_of_long_contexts_is_bound_by_memory(profile: Profile) -> None:
    for model in profile.models.values():
        array = model.coefficient_array()
        context = 64 * 8192.0
        assert layer_seconds(array, 64.0, context, context, 0.0, 0.0, 0.0)[1] == MEMORY


def test_a_device_at_its_memory_roof_draws_its_limit() -> None:
    model = load_profile("layerskip-h100-80gb").models["llama2-7b"]
    c = model.coefficients
    watts = c["decode.j_per_layer"] / c["decode.memory_s_per_layer"] + c["power.active_w"]
    assert watts == pytest.approx(700.0, rel=1e-4)
    work = c["prefill.j_per_pair_layer"] / c["prefill.compute_s_per_pair"] + c["power.active_w"]
    assert work == pytest.approx(700.0, rel=1e-4)


def test_active_power_is_the_device_s(profile: Profile) -> None:
    for model in profile.models.values():
        assert model.coefficients["power.active_w"] == profile.device.active_w


@pytest.mark.parametrize("anchor", published.ENERGY_ANCHORS[:3])
def test_energy_power_and_pace_are_within_a_factor_of_two_of_the_published_anchor(
    anchor: published.EnergyAnchor,
) -> None:
    """Llama3-8B at full depth, context 512, no launch floor, beside ML.ENERGY's Llama-3.1-8B."""
    rows = published.anchored(anchor, load_profile("layerskip-h100-80gb"))
    assert [one.unit for one in rows] == ["J", "tok/s", *(["W"] if anchor.watts else [])]
    for one in rows:
        assert 0.5 < one.predicted / one.published < 2.0, one.what
    joules, tokens_per_s = (one.predicted for one in rows[:2])
    if anchor.watts:
        assert rows[2].predicted == pytest.approx(joules * tokens_per_s)


def test_predictions_of_decode_stay_within_two_fifths_of_the_published() -> None:
    decode = [
        one
        for one in published.comparisons()
        if (one.unit == "tok/s" and "a second" not in one.what) or "TPOT" in one.what
    ]
    assert len(decode) == 6
    for one in decode:
        assert one.predicted / one.published == pytest.approx(1.0, abs=0.4), one.what


def test_each_model_leaves_room_for_requests_on_its_device(profile: Profile) -> None:
    for model in profile.models.values():
        needed = model.model.weight_bytes(model.model.shape.layers) + model.workspace_bytes
        assert needed < 0.9 * profile.device.memory_bytes


def test_every_coefficient_that_cannot_be_zero_is_positive(profile: Profile) -> None:
    for model in profile.models.values():
        for name in COEFFICIENTS:
            may_be_zero = name.endswith("compute_s_per_layer") or name in OPTIONAL_COEFFICIENTS
            assert (model.coefficients[name] > 0.0) != may_be_zero, name
