"""The calibration's page stands alone and shows what was measured."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calibration.cli import main
from calibration.fitting.drawings import depth_figure
from calibration.fitting.fit import fit_profile
from calibration.fitting.page import page_path, render, write_page
from calibration.fitting.points import gather, sound
from calibration.fitting.predict import Predictor
from calibration.measuring.readings import read_points
from helios_sim.errors import InputError
from helios_sim.profile import Profile
from helios_sim.profiles.files import load_profile
from tests.calibration import planted
from tests.calibration.planted import Plan
from tests.report.test_report import text_of


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A profile of graph and eager readings with energy and traces."""
    root = tmp_path_factory.mktemp("page")
    plan = Plan(noise=0.01, trials=3, modes=("graph", "eager"), eager_slowdown_s=6e-5)
    return fit_profile(planted.folder(root / "points", plan), root / "profile")


@pytest.fixture(scope="module")
def page(profile: Profile) -> str:
    """Its page."""
    return render(profile)


def figures(page: str) -> dict[str, Any]:
    """The figures of a page."""
    found = re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return dict(json.loads(found.group(1)))


def test_every_part_of_a_calibration_has_its_section(page: str) -> None:
    for title in (
        "Predicted against measured",
        "Decode time per layer",
        "Energy",
        "Memory",
        "Loading",
        "Exits",
        "Provenance",
    ):
        assert f"<h2>{title}</h2>" in page


def test_every_figure_has_a_place_and_every_place_a_figure(page: str) -> None:
    places = set(re.findall(r'<div class="plot" id="(\w+)"', page))
    assert (
        places
        == set(figures(page))
        == {
            "errors",
            "layers0",
            "depths",
            "energy0",
            "loading",
            "reliability",
        }
    )


def test_the_layer_figure_shows_points_curve_and_floors(page: str) -> None:
    names = {trace["name"] for trace in figures(page)["layers0"]["data"]}
    assert any(name.startswith("memory floor") for name in names)
    assert "16 tokens a row" in names


def test_the_line_of_the_depths_is_the_factor_by_depth_alone(profile: Profile) -> None:
    """Where one row has a factor of its own too, the deepest loaded depth stays at 1."""
    fitted = profile.models["planted"]
    knots = tuple((float(depth), 0.5 + depth / 24) for depth in (3, 6, 12))
    both = replace(fitted, batch_residual=((1.0, 0.6), (8.0, 1.0)), depth_residual=knots)
    points = gather(sound(read_points(profile.folder)))
    figure = depth_figure([("planted", points, Predictor(both), "graph")])
    line = next(trace for trace in figure["data"] if trace["mode"] == "lines")
    assert dict(zip(line["x"], line["y"], strict=True))[12] == pytest.approx(1.0)
    assert line["y"] == sorted(line["y"])


def test_the_page_reads_nothing_from_the_network(page: str) -> None:
    assert "default-src 'none'" in page
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="http', page)


def test_loading_stands_beside_the_rate_of_the_link(page: str) -> None:
    loading = page.split("<h2>Loading</h2>")[1].split("<h2>")[0]
    # Half of it was planted, with a hundredth of noise.
    assert re.search(r">(49|50|51)(\.\d)? %<", loading)


def test_launching_is_said_to_be_what_graphs_save(page: str) -> None:
    assert "launching takes" in page


def test_without_energy_the_page_says_unavailable_and_why(tmp_path: Path) -> None:
    plan = Plan(energy=False)
    folder = planted.folder(
        tmp_path / "points", plan, meter={"source": "none", "explanation": "no meter was found"}
    )
    page = render(fit_profile(folder, tmp_path / "profile"))
    assert "Unavailable, which is not zero: no meter was found" in page


def test_a_redrawn_page_changes_no_hash(profile: Profile) -> None:
    path = write_page(profile, page_path(profile.folder))
    assert path.parent == profile.folder.parent
    assert load_profile(profile.folder).hash == profile.hash


def test_a_profile_without_readings_has_no_page() -> None:
    with pytest.raises(InputError, match="holds no readings"):
        render(load_profile("opt-a100-40gb"))


def test_the_check_draws_the_page_where_asked(profile: Profile, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main(["check", str(profile.folder), "--page", str(tmp_path / "page.html")])
    assert not end.value.code
    assert (tmp_path / "page.html").stat().st_size > 100_000


def test_neither_the_check_nor_the_fit_draws_over_what_is_no_page_of_ours(
    profile: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "notes.html"
    taken.write_text("<p>My notes.</p>")
    with pytest.raises(SystemExit) as end:
        main(["check", str(profile.folder), "--page", str(taken)])
    assert end.value.code == 2
    assert "no page of this program" in capsys.readouterr().err
    taken = page_path(tmp_path / "profile")
    taken.write_text("<p>My notes.</p>")
    with pytest.raises(SystemExit) as end:
        main(["fit", str(profile.folder), "--out", str(tmp_path / "profile")])
    assert end.value.code == 2
    assert "no page of this program" in capsys.readouterr().err
    assert taken.read_text() == "<p>My notes.</p>"
    assert not (tmp_path / "profile").exists()


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium on the PATH")
def test_a_browser_draws_every_figure_without_an_error(profile: Profile, tmp_path: Path) -> None:
    path = write_page(profile, tmp_path / "page.html")
    found = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=8000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    ).stdout
    opening = found[: found.index("<head>")]
    assert "data-errors" not in opening
    assert 'data-ready="6"' in opening


def test_qualities_come_from_the_tracing_where_it_left_its_report(tmp_path: Path) -> None:
    folder = planted.folder(tmp_path / "points", Plan(energy=False))
    quality = {
        "perplexity": [9.5, 7.25, 5.125],
        "right": [0.2, 0.3, 0.4],
        "agrees": [0.7, 0.8, 1.0],
        "share": [0.5, 0.2, 0.3],
        "calibration_error_raw": [0.11, 0.1, 0.09],
        "calibration_error_calibrated": [0.03, 0.02, 0.01],
    }
    report = {
        "candidates": {
            "planted": {
                "exit_layers": [3, 6, 12],
                "own_domains": ["code"],
                "domains": {"code": quality},
            }
        }
    }
    (folder / "trace.json").write_text(json.dumps(report))
    page = render(fit_profile(folder, tmp_path / "profile"))
    assert "code (own)" in page
    assert "Off, calibrated" in page
    assert "5.125" in page


def test_complementarity_is_what_the_tracing_reported(tmp_path: Path) -> None:
    """At each kind's threshold; the traces themselves do not say which token is right."""
    folder = planted.folder(tmp_path / "points", Plan(energy=False))
    pair = {"deep_in": "planted", "early_in": "other", "domain": "code", "deep_share": 0.4}
    report = {
        "complementarity": {
            "raw": {
                "threshold": 0.48,
                "pairs": [pair | {"early_of_deep": 0.25, "right_of_early": None}],
            },
            "calibrated": {
                "threshold": 0.57,
                "pairs": [pair | {"early_of_deep": 0.125, "right_of_early": 0.75}],
            },
        }
    }
    (folder / "trace.json").write_text(json.dumps(report))
    text = text_of(render(fit_profile(folder, tmp_path / "profile")))
    assert "The threshold is 0.48 (raw) and 0.57 (calibrated)." in text
    assert "planted other code 40 % 25 % - 40 % 12.5 % 75 %" in text


def test_complementarity_is_counted_alike_where_nothing_was_reported(tmp_path: Path) -> None:
    """In the shipped profile the tracing chose the default threshold for raw confidence."""
    shipped = load_profile("small-family-cpu")
    folder = shutil.copytree(shipped.folder, tmp_path / "profile")
    document = json.loads((folder / "profile.json").read_text())
    reported = document["measurement"].pop("exit_traces")["complementarity"]["raw"]
    (folder / "profile.json").write_text(json.dumps(document))
    text = text_of(render(load_profile(folder)))
    assert "Complementarity at the default thresholds" in text
    for pair in reported["pairs"]:
        names = " ".join(pair[key] for key in ("deep_in", "early_in", "domain"))
        found = re.search(rf"{names} ([\d.]+) % ([\d.]+) %", text)
        assert found is not None
        shares = [100.0 * pair[key] for key in ("deep_share", "early_of_deep")]
        assert [float(word) for word in found.groups()] == pytest.approx(shares, abs=0.06)
