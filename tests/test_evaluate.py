from __future__ import annotations

import io
import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mlic import evaluate as evaluation
from mlic import peers, refine, video
from mlic.cli import main
from mlic.codec import encode_picture
from mlic.errors import MlicError, ResultsError
from mlic.evaluate import evaluate, find_pictures, model_codec, peer_codec
from mlic.layers import has_bfloat16
from mlic.metrics import ms_ssim, ms_ssim_db, psnr
from mlic.peers import PEERS, find_peer
from mlic.pictures import Picture
from mlic.results import Results, notes_on
from mlic.weights import load_weights, save_weights


@pytest.fixture
def pictures(tmp_path, photo):
    """a.png, 96x80; b.png, 64x80; c.png, which is no picture."""
    Image.fromarray(photo).save(tmp_path / "a.png")
    Image.fromarray(photo[:, :64]).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no picture")
    return tmp_path


def measured(path, *, quality=30.0, psnr=30.0):
    """A stand-in for `measure_picture`'s entry."""
    point = {"quality": quality, "bytes": 100, "bpp": 0.5, "psnr": psnr, "ms_ssim": None, "ms_ssim_db": None}
    return {"picture": path.name, "width": 9, "height": 9, "pixels_sha256": "0", "notes": [], "encode_peak_mib": 1.0,
            "decode_peak_mib": 1.0, "points": [point | {"encode_s": 0.1, "decode_s": 0.1}]}  # fmt: skip


def test_a_model_is_measured_on_real_files(tmp_path, photo, small_models, monkeypatch):
    monkeypatch.setattr(refine, "has_bfloat16", has_bfloat16)  # as in the processes that measure
    pixels = np.tile(photo, (3, 2, 1))[:165, :170]
    Image.fromarray(pixels).save(tmp_path / "x.png")
    weights = tmp_path / "fast.safetensors"
    save_weights(weights, small_models["fast"])
    entry, run = model_codec(str(weights), name="small")
    output = tmp_path / "results.json"
    results = evaluate([tmp_path / "x.png"], entry, run, qualities=(20, 80), output=output)

    model = load_weights(weights)
    (picture,) = results.pictures
    for point, quality in zip(picture["points"], (20, 80), strict=True):
        expected = encode_picture(model, Picture(pixels), quality, reconstruct=True)
        assert point["bytes"] == len(expected.data)
        assert point["bpp"] == 8 * len(expected.data) / (165 * 170)
        assert point["psnr"] == pytest.approx(psnr(pixels, expected.reconstruction))
        assert point["ms_ssim"] == pytest.approx(ms_ssim(pixels, expected.reconstruction), abs=1e-6)
        assert point["ms_ssim_db"] == pytest.approx(ms_ssim_db(point["ms_ssim"]))
        assert point["encode_s"] > 0 and point["decode_s"] > 0
    assert picture["encode_peak_mib"] > 50 and picture["decode_peak_mib"] > 50  # torch alone is more
    assert results.codec["weights"] == model.digest.hex() and results.codec["label"] == "mlic small (measured)"
    assert results.means()[0] == {key: value for key, value in picture["points"][0].items() if key != "bytes"}
    assert Results.load(output) == results
    assert results.environment["processor"] and results.environment["torch"]


def test_another_codec_is_measured_the_same_way(pictures, photo):
    entry, run = peer_codec("jpeg")
    results = evaluate([pictures / "a.png"], entry, run, qualities=(50,))
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "JPEG", quality=50, optimize=True, progressive=True, subsampling="4:4:4")
    (point,) = results.pictures[0]["points"]
    assert point["bytes"] == len(buffer.getvalue())
    assert point["psnr"] == pytest.approx(psnr(photo, np.asarray(Image.open(buffer))))
    assert point["ms_ssim"] is None  # too small for it
    assert results.codec["settings"]["subsampling"] == "4:4:4"


def test_failures_are_reported_and_kept(pictures):
    inputs = [str(pictures / f"{name}.png") for name in "abcd"]
    settings = ["--codec", "jpeg", "-q", "40", "-q", "70", "-o", str(pictures / "r.json")]
    run = CliRunner().invoke(main, ["eval", *inputs, *settings])
    assert run.exit_code == 1
    assert "c.png: not a picture Pillow can read" in run.stderr
    assert "d.png: cannot be opened: No such file" in run.stderr
    assert "2 of 4 pictures failed; means are over the others" in run.stderr
    assert "pictures of different sizes, 64x80 to 96x80" in run.stderr
    assert "means over 2 pictures" in run.stdout
    content = json.loads((pictures / "r.json").read_text())
    assert content["failures"] == ["c.png: not a picture Pillow can read", "d.png: cannot be opened: No such file or directory"]
    assert content["means_over_pictures"] == 2
    bpp = [picture["points"][0]["bpp"] for picture in content["pictures"][:2]]
    assert content["means"][0]["bpp"] == pytest.approx(sum(bpp) / 2)
    assert "already" not in run.stderr
    again = CliRunner().invoke(main, ["eval", *inputs, *settings])
    assert f"note: 2 of 4 pictures were in {pictures / 'r.json'} already, and are not measured again" in again.stderr
    assert again.stdout == run.stdout


def test_a_codec_that_fails_at_one_quality(pictures):
    entry, run = peer_codec("jpeg")
    (picture,) = evaluate([pictures / "a.png"], entry, run, qualities=(50, 50.5)).pictures
    assert picture["points"][0]["bytes"] > 0
    assert picture["points"][1] == {"quality": 50.5, "error": "jpeg takes whole numbers for quality, not 50.5"}
    results = Results(codec=entry, qualities=[50, 50.5], threads=1, jobs=1, environment={}, pictures=[picture])
    assert results.means() == [] and results.failures() == [f"a.png: at quality 50.5: {picture['points'][1]['error']}"]


def test_a_process_that_dies_is_a_failure(pictures):
    entry = evaluation.measure_picture(pictures / "a.png", {"kind": "model", "name": "fast"}, qualities=(50,))  # no device
    assert entry["error"] == "the encode process ended with code 1: KeyError: 'device'"


def test_a_run_is_continued(tmp_path, monkeypatch):
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    entry, run = peer_codec("jpeg")
    calls = []

    def measure(path, run, *, done, **_):
        calls.append((path.name, done is not None))
        if path.name == "b.png" and len(calls) < 4:
            return {"picture": "b.png", "error": "out of luck"}
        return done or measured(path)

    monkeypatch.setattr(evaluation, "measure_picture", measure)
    output = tmp_path / "r.json"
    evaluate(paths[:2], entry, run, qualities=(30,), output=output)
    assert Results.load(output).failures() == ["b.png: out of luck"]
    results = evaluate(paths, entry, run, qualities=(30,), output=output)
    assert calls == [("a.png", False), ("b.png", False), ("a.png", True), ("b.png", False), ("c.png", False)]
    assert [p["picture"] for p in results.pictures] == ["a.png", "b.png", "c.png"] and not results.failures()

    with pytest.raises(ResultsError, match=r"other settings \(qualities \[30\], now \[40\]\); -f starts afresh"):
        evaluate(paths, entry, run, qualities=(40,), output=output)
    with pytest.raises(ResultsError, match=r"\(codec: software pillow .*, now pillow 1\); -f"):
        evaluate(paths, entry | {"software": "pillow 1"}, run, qualities=(30,), output=output)
    with pytest.raises(ResultsError, match="holds c.png, which is not among the inputs"):
        evaluate(paths[:2], entry, run, qualities=(30,), output=output)
    assert evaluate(paths[:2], entry, run, qualities=(30,), output=output, force=True).means()[0]["psnr"] == 30


def test_the_file_is_written_after_every_picture(tmp_path, monkeypatch):
    """Stopped in the middle, what was measured is in the file."""

    def measure(path, run, **_):
        if path.name == "b.png":
            raise KeyboardInterrupt
        return measured(path)

    monkeypatch.setattr(evaluation, "measure_picture", measure)
    output = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate([tmp_path / "a.png", tmp_path / "b.png"], *peer_codec("jpeg"), qualities=(30,), output=output)
    assert [p["picture"] for p in Results.load(output).pictures] == ["a.png"]
    assert list(tmp_path.iterdir()) == [output]


def test_changed_pixels_are_measured_again(pictures):
    entry, run = peer_codec("jpeg")
    stale = measured(pictures / "a.png")
    assert evaluation.measure_picture(pictures / "a.png", run, qualities=(30,), done=stale) != stale
    stale["pixels_sha256"] = evaluation.pixels_digest(np.asarray(Image.open(pictures / "a.png")))
    assert evaluation.measure_picture(pictures / "a.png", run, qualities=(30,), done=stale) is stale


def test_times_are_marked_as_disturbed(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "measure_picture", lambda path, run, **_: measured(path))
    monkeypatch.setattr(evaluation.os, "cpu_count", lambda: 2)

    def disturbed(load: float, jobs: int) -> bool:
        monkeypatch.setattr(evaluation, "_load", lambda: load)
        results = evaluate([tmp_path / "a.png"], *peer_codec("jpeg"), qualities=(30,), jobs=jobs)
        assert results.disturbed == any("times were taken beside other work" in note for note in notes_on(results))
        return results.disturbed

    assert [disturbed(0.1, 1), disturbed(0.1, 2), disturbed(1.9, 1)] == [False, True, True]


def test_missing_measures_are_told(tmp_path):
    entries = [measured(tmp_path / "a.png"), measured(tmp_path / "b.png", psnr=None)]
    results = Results(codec={}, qualities=[30], threads=1, jobs=1, environment={}, pictures=entries)
    assert results.means()[0]["psnr"] is None and results.means()[0]["bpp"] == 0.5
    assert [note[:12] for note in notes_on(results)] == ["no mean MS-S", "no mean PSNR"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is no results file: not JSON"),
        ("[]", "its format is None"),
        ('{"format": "mlic-results-0"}', "are of version mlic-results-0, this mlic reads mlic-results-1: measure again"),
        ('{"format": "mlic-results-1"}', "are damaged: no field 'codec'"),
        (None, "cannot be read: No such file"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    with pytest.raises(ResultsError, match=message):
        Results.load(tmp_path / "r.json")


def test_pictures_in_folders(pictures):
    (pictures / "note.txt").write_text("hello")
    paths, notes = find_pictures([pictures])
    assert [path.name for path in paths] == ["a.png", "b.png", "c.png"]
    assert notes == [f"1 files of {pictures} are no pictures by their names"]
    with pytest.raises(MlicError, match="two pictures are called a.png"):
        find_pictures([pictures, pictures / "a.png"])
    (pictures / "empty").mkdir()
    with pytest.raises(MlicError, match="no pictures in folder"):
        find_pictures([pictures / "empty"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--codec", "gif"], "no codec called 'gif'; there are jpeg"),
        (["--codec", "jpeg", "--model", "fast"], "--model and --codec exclude each other"),
        (["--codec", "jpeg", "--name", "x"], "--name and --codec exclude each other"),
        (["-q", "nan"], "is no finite number"),
        (["-q", "0"], "-q must be from 1 to 100 for a model"),
        (["--model", "nope"], "no model called 'nope'"),
        (["--codec", "jpeg", "-o", __file__ + "/r.json"], f"mlic: {__file__}: File exists"),
    ],
)
def test_wrong_usage(pictures, arguments, message):
    run = CliRunner().invoke(main, ["eval", str(pictures / "a.png"), *arguments])
    assert run.exit_code in (1, 2) and message in run.stderr and "Traceback" not in run.output


def test_the_command_with_a_model(pictures, small_models, monkeypatch):
    """What its processes are told; they themselves are left out."""
    jobs = []

    def ended(job):
        jobs.append(job)
        return {"error": "left out"}

    monkeypatch.setattr(evaluation, "_run_process", ended)
    for name in ("fast", "mlic"):
        save_weights(pictures / f"{name}.safetensors", small_models[name])

    def run(model, *options):
        jobs.clear()
        command = ["eval", pictures / "a.png", "--model", pictures / f"{model}.safetensors", *options]
        return CliRunner().invoke(main, [str(word) for word in command])

    said = run("fast", "-q", 20, "-q", 80, "--effort", 2, "--name", "small", "-j", 2, "-o", pictures / "r.json")
    assert said.exit_code == 1 and "a.png: left out" in said.stderr
    assert [(job["task"], job["qualities"], job["effort"], job["threads"]) for job in jobs] == [
        ("encode", [20.0, 80.0], 2, 2), ("decode", [20.0, 80.0], 2, 2),
    ]  # fmt: skip
    assert Results.load(pictures / "r.json").codec["name"] == "small"
    run("fast")
    assert jobs[0]["qualities"] == list(evaluation.MODEL_QUALITIES) and jobs[0]["effort"] == 1  # the default of these tests
    run("mlic")
    assert jobs[0]["qualities"] == [None] and jobs[0]["effort"] == 0
    for option in ("-q", "--effort"):
        said = run("mlic", option, 5)
        assert said.exit_code == 2 and "has one rate" in said.stderr and not jobs


@pytest.mark.parametrize("name", PEERS)
def test_peers(name, photo):
    peer = PEERS[name]
    if reason := peer.missing():
        pytest.skip(reason)
    low, high = (peer.encode(photo, peer.qualities[i]) for i in (1, -1))
    assert len(low) < len(high)
    assert 20 < psnr(photo, peer.decode(low)) < psnr(photo, peer.decode(high)) and psnr(photo, peer.decode(high)) > 34
    assert json.dumps(peer.settings()) and peer.version()
    assert list(peer.scale) == sorted(peer.scale, reverse=name in ("x265", "vvc"))
    assert set(peer.qualities) <= set(peer.scale) or name == "jpeg2000"


def test_a_missing_package_is_named(monkeypatch):
    for module in (peers, video):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(peers.features, "check", lambda name: name != "avif")
    for name, package in {"jxl": "pillow-jxl-plugin", "heic": "pillow-heif", "vvc": "imageio-ffmpeg"}.items():
        with pytest.raises(MlicError, match=f"{name} needs the package {package}: pip install {package}"):
            find_peer(name)
    with pytest.raises(MlicError, match="avif needs a Pillow built with avif"):
        find_peer("avif")


def test_colours_survive_the_video_codecs_planes():
    colours = np.random.default_rng(1).integers(0, 256, (32, 48, 3), np.uint8)
    back = video.planes_to_pixels(video.planes_bytes(colours, "4:4:4"), 32, 48, "4:4:4")
    assert np.abs(back.astype(int) - colours).max() <= 1
    white = video.planes_bytes(np.full((2, 2, 3), 255, np.uint8), "4:4:4")
    assert np.frombuffer(white, "<u2").tolist() == [1023] * 4 + [512] * 8
    if PEERS["vvc"].missing() is None:
        with pytest.raises(MlicError, match="needs even sides, not 47x32"):
            PEERS["vvc"].encode(colours[:, :47], 30)
