from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlic import compare as comparing
from mlic import peers
from mlic.bdrate import bd_rate
from mlic.cli import main
from mlic.compare import as_json, as_markdown, as_text, compare
from mlic.errors import ResultsError
from mlic.published import dataset_of, datasets, published_curves
from mlic.results import Results

KODAK_RESULTS = Path(__file__).parents[1] / "results" / "kodak"
POINTS = [(0.2, 30.0), (0.4, 33.0), (0.7, 35.5), (1.0, 37.5)]


def results(name: str, points=POINTS, *, kind="peer", pictures=2, failed=0, one_rate=False, **fields) -> Results:
    """Synthetic results: every picture at the given (bpp, PSNR) points."""
    entries = []
    for i in range(pictures):
        own = [{"quality": None if one_rate else q, "bytes": 1, "bpp": bpp, "psnr": psnr, "ms_ssim": 0.9, "ms_ssim_db": 10.0,
                "encode_s": 0.1, "decode_s": 0.02} for q, (bpp, psnr) in enumerate(points)]  # fmt: skip
        if i < failed:
            own[0] = {"quality": 0, "error": "no luck"}
        entries.append({"picture": f"{i}.png", "width": 500, "height": 400, "pixels_sha256": str(i), "notes": [],
                        "encode_peak_mib": 90.0 + i, "decode_peak_mib": 50.0, "points": own})  # fmt: skip
    codec = {"name": name, "label": name.upper(), "kind": kind, "settings": {"effort": 9}, "software": "tool 1"}
    environment = {"processor": "abacus", "cores": 2, "memory_gib": 1, "system": "any", "python": "3", "torch": "2"}
    qualities = [None] if one_rate else list(range(len(points)))
    settings = {"qualities": qualities, "threads": 1, "jobs": 1, "environment": environment, "pictures": entries}
    return Results(codec=codec, **(settings | fields))


def better(factor: float = 0.9):
    return [(factor * bpp, psnr) for bpp, psnr in POINTS]


def save(folder: Path, *all_results: Results) -> list[str]:
    for result in all_results:
        result.save(folder / f"{result.codec['name']}.json")
    return [str(folder / f"{result.codec['name']}.json") for result in all_results]


def test_measured_against_measured():
    comparison = compare([results("a"), results("b", better())], anchor="a", published=())
    assert [row.curve.name for row in comparison.rows] == ["b", "a"]  # the best first
    first, anchor = comparison.rows
    assert first.delta.rate_cubic == pytest.approx(-10) and first.delta.rate_pchip == pytest.approx(-10)
    assert first.delta.rate_cubic == pytest.approx(bd_rate(POINTS, better()))
    assert anchor.delta.rate_cubic == pytest.approx(0, abs=1e-9)
    assert first.curve.encode_s == pytest.approx(0.1 / 0.2) and first.curve.decode_s == pytest.approx(0.02 / 0.2)
    assert first.curve.peak_mib == (91.0, 50.0)
    text = as_text(comparison)
    assert "-10.00%" in text and "30.0-37.5" in text and "0.20-0.90" in text and "2 pictures" in text
    assert "| B | -10.00% | -10.00% |" in as_markdown(comparison)
    assert "measured, tool 1, 1 thread(s), peak 91 MiB to encode, peak 50 MiB to decode; effort 9" in as_markdown(comparison)
    assert json.loads(as_json(comparison))["rows"][0]["delta"]["rate_cubic"] == pytest.approx(-10)


def test_measured_on_several_machines():
    """Which codec was measured where, as times compare within a machine; nothing of it where there is one."""
    a, b, c = results("a"), results("b", better()), results("c")
    b.environment = a.environment | {"processor": "slide rule"}
    comparison = compare([a, b, c], anchor="a", published=())
    place = "2 cores, 1 GiB, any, Python 3, torch 2"
    assert f"Measured on: abacus, {place} (A, C); slide rule, {place} (B).\n" in as_markdown(comparison)
    assert "- measured on several machines: times compare within each" in as_text(comparison)
    alike = compare([a, c], anchor="a", published=())
    assert f"Measured on: abacus, {place}.\n" in as_markdown(alike) and "several machines" not in as_text(alike)


def test_published_curves_are_only_for_their_pictures(monkeypatch):
    ours = results("a")
    with pytest.raises(ResultsError, match="no curve called 'vtm-17.0'.*published curves are of other pictures than these"):
        compare([ours])
    with pytest.raises(ResultsError, match="results are of 2 pictures that are not the 24 of kodak"):
        compare([ours], dataset="kodak")
    with pytest.raises(ResultsError, match="not the 100 of tecnick"):
        compare([ours], dataset="tecnick")
    told = compare([results("a", pictures=100)], dataset="tecnick")
    assert "that these 100 pictures are tecnick was told, not checked" in told.notes
    monkeypatch.setattr(comparing, "dataset_of", lambda digests: next(d for d in datasets() if d.name == "kodak"))
    comparison = compare([ours])
    assert comparison.dataset == "kodak" and comparison.anchor.kind == "published"
    row = next(row for row in comparison.rows if row.curve.name == "a")
    assert row.delta.rate_cubic == pytest.approx(bd_rate(published_curves("kodak")["vtm-17.0"].points, POINTS))


def test_the_kodak_results_are_of_kodak():
    files = [path for path in KODAK_RESULTS.glob("*.json") if "format" in json.loads(path.read_text())]  # others are no results
    loaded = [Results.load(path) for path in sorted(files)]
    assert loaded
    for result in loaded:
        assert dataset_of(p["pixels_sha256"] for p in result.pictures).name == "kodak" and not result.failures()


def test_one_point_and_failures_are_told_not_dropped():
    comparison = compare([results("a"), results("b", POINTS[:1]), results("c", better(), failed=1)], anchor="a", published=())
    names = [row.curve.name for row in comparison.rows]
    assert names[0] == "a" and sorted(names[1:]) == ["b", "c"]
    lines = comparing.remarks(comparison)
    assert any(line.startswith("B: a BD-rate needs a curve, and this one has one quality point only") for line in lines)
    assert "C: 1 of 2 pictures failed; means are over the others" in lines
    assert "C: no BD-rate: the means are not all over the anchor's pictures" in lines
    assert "| B | - | - | - | - | - | 1 |" in as_markdown(comparison)


@pytest.mark.parametrize(("failed", "others", "deltas"), [(1, 1, True), (1, 0, False), (0, 1, False)])
def test_means_over_different_pictures_have_no_deltas(failed, others, deltas):
    comparison = compare([results("a", failed=others), results("b", better(), failed=failed)], anchor="a", published=())
    (row,) = (row for row in comparison.rows if row.curve.name == "b")
    assert (row.delta is not None) == deltas == (not row.problem)


def test_nothing_measured_is_told():
    comparison = compare([results("a"), results("b", failed=2)], anchor="a", published=())
    assert [row.curve.name for row in comparison.rows] == ["a", "b"]
    assert "B: 2 of 2 pictures failed; means are over the others" in comparing.remarks(comparison)
    assert "| B | - |" in as_markdown(comparison)


def test_an_anchor_without_points_is_an_error():
    with pytest.raises(ResultsError, match="curve called 'a' has no points: no picture of its results was measured"):
        compare([results("a", failed=2), results("b")], anchor="a", published=())


def test_the_measured_come_before_the_published(monkeypatch):
    monkeypatch.setattr(comparing, "dataset_of", lambda digests: next(d for d in datasets() if d.name == "kodak"))
    for anchor in ("vtm-17.0", "evc-ll"):
        (row,) = (row for row in compare([results("evc-ll")], anchor=anchor).rows if row.curve.name == "evc-ll")
        assert row.curve.kind == "peer" and row.curve.points == tuple(POINTS)


def test_models_of_one_rate_make_one_curve():
    single = [results("m", [point], kind="model", one_rate=True) for point in better()]
    comparison = compare([results("a"), *single], anchor="a", published=())
    assert comparison.rows[0].curve.name == "m" and len(comparison.rows[0].curve.points) == 4
    assert comparison.rows[0].delta.rate_cubic == pytest.approx(-10)
    assert "| - | 0.1800 | 30.000 | 10.000 |" in as_markdown(comparison)


def test_results_that_do_not_go_together():
    with pytest.raises(ResultsError, match="results of a and b are of different pictures: 2.png"):
        compare([results("a"), results("b", pictures=3)], anchor="a")
    with pytest.raises(ResultsError, match="two results are called 'a': measure one of them with another --name"):
        compare([results("a"), results("a")], anchor="a")


def test_the_command(tmp_path):
    files = save(tmp_path, results("a", disturbed=True), results("b", better()))
    run = CliRunner().invoke(main, ["compare", *files, "--anchor", "a", "--published", "none"])
    assert run.exit_code == 0 and "B " in run.stdout and "-10.00%" in run.stdout
    assert "0.50*" in run.stdout and "* taken beside other work" in run.stdout
    run = CliRunner().invoke(main, ["compare", *files, "--anchor", "a", "--published", "none", "--json"])
    assert [row["curve"]["name"] for row in json.loads(run.stdout)["rows"]] == ["b", "a"]


def test_the_command_alone_shows_the_published():
    run = CliRunner().invoke(main, ["compare", "--markdown", "--dataset", "clic-pro-val"])
    assert run.exit_code == 0
    assert "| MLIC++ | -13." in run.stdout
    assert "- not published for clic-pro-val: evc-ll, hpcm-large" in run.stdout


def test_a_codec_that_cannot_be_measured_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    files = save(tmp_path, results("a"))
    run = CliRunner().invoke(main, ["compare", *files, "--anchor", "a", "--published", "none", "--codecs", "a,jxl"])
    assert run.exit_code == 0
    assert "- not measured: jxl needs the package pillow-jxl-plugin: pip install pillow-jxl-plugin" in run.stdout


def test_codecs_are_measured_on_the_images(tmp_path, photo):
    from PIL import Image

    (tmp_path / "in").mkdir()
    Image.fromarray(photo[:64, :64]).save(tmp_path / "in" / "a.png")
    arguments = ["--anchor", "jpeg", "--codecs", "jpeg", "--images", str(tmp_path / "in"), "--folder", str(tmp_path / "out")]
    run = CliRunner().invoke(main, ["compare", "--published", "none", *arguments])
    assert run.exit_code == 0 and "JPEG (anchor)" in run.stdout
    assert len(Results.load(tmp_path / "out" / "jpeg.json").means()) == len(peers.PEERS["jpeg"].qualities)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--anchor", "nope"], "no curve called 'nope': there are a"),
        (["--anchor", "a", "--codecs", "gif"], "no codec called 'gif'"),
        (["--anchor", "a", "--codecs", "jpeg"], "jpeg is in none of the results: to measure it, give --images"),
        (["--dataset", "lena"], "no published curves of 'lena'"),
        (["missing.json"], "results missing.json cannot be read"),
    ],
)
def test_wrong_usage(tmp_path, arguments, message):
    run = CliRunner().invoke(main, ["compare", *save(tmp_path, results("a")), *arguments])
    assert run.exit_code in (1, 2) and message in run.stderr and "Traceback" not in run.output
