"""The command with many files, and the options of single ones: targets, tiles, regions, scales, parts of files."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from command import (  # noqa: F401  (fixtures among them)
    command_line,
    files,
    folder,
    misused,
    refused,
    run,
    size_of,
    succeed,
    use_small_weights,
    weights_folder,
)
from PIL import Image

import mlic
from mlic import cli_code, codec
from mlic.cli import main

SUMMARY = re.compile(r"mlic: (\d+) done, (\d+) skipped, (\d+) failed; .+ in, .+ out, \d+\.\d s")


@pytest.fixture
def photos(photo) -> None:
    """photos/: four pictures in two folders."""
    os.makedirs("photos/sub")
    for i, name in enumerate(["1.png", "2.jpg", "sub/3.png", "sub/4.webp"]):
        Image.fromarray(photo[i : i + 30, : 40 + i]).save(Path("photos", name))
    Path("photos/readme.txt").write_text("no picture")


@pytest.fixture
def large(photo) -> Path:
    """large.mlic of 96x80 pixels in four tiles, and the picture large.png."""
    Image.fromarray(photo).save("large.png")
    succeed("encode", "large.png", "--tile", 64)
    return Path("large.mlic")


def counts(*args, code: int = 0) -> tuple[int, ...]:
    """(done, skipped, failed), as the last line says."""
    result = run(*args)
    assert result.exit_code == code, result.stderr
    return tuple(map(int, SUMMARY.fullmatch(result.stderr.splitlines()[-1]).groups()))


def info(name) -> dict:
    return json.loads(succeed("info", "--json", name).stdout)


def pixels(name) -> np.ndarray:
    with Image.open(name) as image:
        return np.asarray(image).astype(int)


# Many files


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_folder_there_and_back(photos, jobs):
    assert counts("encode", "photos", "-o", "coded", "-j", jobs) == (4, 0, 0)
    names = ["coded/1.mlic", "coded/2.mlic", "coded/sub/3.mlic", "coded/sub/4.mlic"]
    assert [name for name in files() if name.startswith("coded")] == names
    assert Path("coded/sub/3.mlic").read_bytes() == mlic.encode("photos/sub/3.png")
    assert counts("decode", "coded", "-o", "back", "-j", jobs) == (4, 0, 0)
    assert size_of("back/sub/4.png") == (43, 30)
    assert np.array_equal(pixels("back/1.png"), np.asarray(mlic.decode(Path(names[0]).read_bytes())))


def test_another_format_for_a_folder_and_for_stdout(photos):
    counts("encode", "photos", "-o", "coded")
    assert counts("decode", "--format", "WebP", "coded", "-o", "back") == (4, 0, 0)
    with Image.open("back/sub/4.webp") as image:
        assert image.format == "WEBP" and image.size == (43, 30)
    for options, kind in (([], "PNG"), (["--format", "jpg"], "JPEG")):
        with Image.open(io.BytesIO(run("decode", "coded/1.mlic", "-o", "-", *options).stdout_bytes)) as image:
            assert image.format == kind
    succeed("decode", "--format", "webp", "coded/1.mlic", "-o", "one.tif")
    with Image.open("one.tif") as image:
        assert image.format == "TIFF"
    succeed("decode", "--format", ".JPG", "coded/1.mlic")
    assert Path("coded/1.jpg").exists() and "no kind of picture" in misused("decode", "--format", "x/y", "coded/1.mlic")
    assert (
        refused("decode", "--format", "doc", "coded/1.mlic")
        == "mlic: coded/1.mlic: cannot write pictures of type .doc; .png always works\n"
    )


def test_a_job_given_again_does_what_is_left(photos):
    counts("encode", "photos", "-o", "coded")
    os.remove("coded/sub/3.mlic")
    stamps = {path: path.stat().st_mtime_ns for path in Path("coded").rglob("*.mlic")}
    assert counts("encode", "photos", "-o", "coded") == (1, 3, 0)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert counts("encode", "photos/**/*.png", "-o", "coded", "-f") == (2, 0, 0)
    os.utime("photos/2.jpg")
    result = run("encode", "photos", "-o", "coded")
    assert result.exit_code == 1 and "photos/2.jpg: coded/2.mlic exists and is older than it" in result.stderr


def test_decoding_never_replaces_the_originals(photos):
    before = {name: Path(name).read_bytes() for name in files()}
    counts("encode", "photos")
    os.remove("photos/sub/4.webp")
    done, skipped, failed = counts("decode", "photos", code=1)
    assert (done, skipped + failed) == (2, 2)  # 2.png and 4.png are new; 1.png and 3.png stay
    assert all(Path(name).read_bytes() == data for name, data in before.items() if os.path.exists(name))


def test_one_that_fails_does_not_stop_the_others(photos):
    Path("photos/broken.png").write_bytes(b"no picture")
    result = run("encode", "photos", "-o", "coded", "-j", 2)
    assert result.exit_code == 1
    assert "mlic: photos/broken.png: not a picture Pillow can read\n" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("mlic: 4 done, 0 skipped, 1 failed; ")


def test_quiet_and_verbose(photos):
    assert succeed("encode", "--quiet", "photos", "-o", "one").stdout == ""
    said = run("encode", "-v", "photos", "-o", "two", "-j", 1).stderr.splitlines()
    sizes = re.compile(r"mlic: photos/1\.png: [\d.]+k?B -> [\d.]+k?B, [\d.]+ bpp, \d+\.\d\d s")
    assert said.pop(0) == "mlic: photos: note: left out, by their names no pictures: 1 .txt"
    assert re.search(r"note: larger than it was: \d+ bytes before, \d+ now$", said.pop(3))
    assert len(said) == 5 and sizes.fullmatch(said[0]) and SUMMARY.fullmatch(said[-1])
    bpp = float(said[0].split(" bpp")[0].split()[-1])
    assert bpp == pytest.approx(info("two/1.mlic")["bpp"], rel=1e-3)
    said = run("decode", "-v", "two/1.mlic").stderr
    assert said.count("\n") == 1 and float(said.split(" bpp")[0].split()[-1]) == bpp
    assert "photos/1.png: skipped, two/1.mlic is there" in run("encode", "-v", "photos", "-o", "two").stderr


def test_threads_are_shared_among_files(photos, monkeypatch):
    asked, side_by_side = [], []
    run_jobs = mlic.jobs.run_jobs
    monkeypatch.setattr(mlic.jobs, "run_jobs", lambda *a, **k: side_by_side.append(k["parallel"]) or run_jobs(*a, **k))
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(cli_code, "cores", lambda: 3)
    counts("encode", "photos", "-o", "coded", "-j", 8)
    assert set(asked) == {1} and len(asked) > 2  # this thread and those of the pool
    assert side_by_side == [3]


@pytest.mark.parametrize("engine", [[], ["--engine", "ray"]])
def test_folders_need_a_folder(photos, engine):
    if engine:
        pytest.importorskip("ray")
    assert "needs a folder behind -o" in misused("encode", "photos", "-o", "coded.mlic", *engine)
    assert refused("encode", "photos/*.gif", *engine) == "mlic: photos/*.gif: no pictures match\n"


def test_without_ray(photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "--engine ray needs Ray" in (said := misused("encode", "photos", "--engine", "ray"))
    assert "pip install 'mlic[ray]'" in said


def interrupt(process: subprocess.Popen, started: Path) -> tuple[str, float]:
    """Send SIGINT once a file is there -> what is said, seconds until the end."""
    deadline = time.monotonic() + 100
    while not any(started.rglob("*.mlic")):
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, said = process.communicate(timeout=60)
    return said, time.monotonic() - sent


SCRIPT = """
import multiprocessing
from mlic.cli import main

multiprocessing.set_start_method("{}")  # the usual one of Python up to 3.13 on Linux, and of 3.14
main()
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
@pytest.mark.parametrize("jobs, start", [(1, "fork"), (2, "fork"), (2, "forkserver")])
def test_ctrl_c_stops_a_job_of_many(photo, jobs, start):
    os.mkdir("many")
    for i in range(60):
        Image.fromarray(photo).save(f"many/{i}.png")
    os.mkdir("coded")
    command = command_line("encode", "many", "-o", "coded", "-j", jobs)
    process = subprocess.Popen(
        [*command[:1], "-c", SCRIPT.format(start), *command[3:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # what runs in the background of a script is born without ears for SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    said, seconds = interrupt(process, Path("coded"))
    assert process.returncode == 130 and "Traceback" not in said and seconds < 20
    done, _, failed = map(int, SUMMARY.fullmatch(said.splitlines()[-2]).groups())
    assert said.splitlines()[-1] == "mlic: interrupted" and failed == 0
    coded = os.listdir("coded")
    assert 1 <= len(coded) < 60 and all(name.endswith(".mlic") for name in coded)  # no .part
    assert len(coded) - 1 <= done <= len(coded)  # one may be written, and the interrupt come before it is told
    for name in coded:
        info(f"coded/{name}")
    if jobs == 1:
        left = [path for path in Path("many").iterdir() if f"{path.stem}.mlic" not in coded]
        for path in left[3:]:
            path.unlink()
        assert counts("encode", "many", "-o", "coded") == (len(left[:3]), len(coded), 0)


# Options


@pytest.mark.parametrize("option, low, high", [("--target-size 0.4k", 392, 400), ("--target-bpp 2.6", 2.548, 2.6)])
def test_a_target_size_is_reached(option, low, high):
    result = run("encode", "a.png", "-v", *option.split())
    assert result.exit_code == 0
    facts = info("a.mlic")
    assert low <= facts["bytes" if high > 100 else "bpp"] <= high * 1.02
    assert re.search(r"quality \d+\.\d\d gives [\d.]+ b.*, found in \d passes", result.stderr)


def test_a_target_psnr_is_asked_for_and_a_miss_is_said(monkeypatch):
    result = run("encode", "a.png", "--target-psnr", 80)
    assert result.exit_code == 0
    assert result.stderr.startswith("mlic: a.png: note: 80 dB cannot be reached: the ")
    assert run("encode", "a.png", "--quiet", "-f", "--target-psnr", 80).stderr == ""


def test_targets_need_a_model_for_all_rates(weights_folder):  # noqa: F811
    file = weights_folder / "more" / "mlic.safetensors"
    assert "has one rate: leave --target-bpp out" in misused("encode", "a.png", "--model", file, "--target-bpp", 1)


@pytest.mark.parametrize(
    "text, size", [("1500", 1500), ("200k", 200_000), ("1.5M", 1_500_000), ("2kB", 2000), ("64Ki", 65536), (".5k", 500)]
)
def test_sizes(text, size):
    from mlic.cli_code import _bytes

    assert _bytes(text) == size


def test_strip():
    image = Image.open("a.png")
    exif = image.getexif()
    exif[0x010F] = "maker"
    image.save("b.jpg", exif=exif, xmp=b"<x/>")
    succeed("encode", "b.jpg", "-o", "kept.mlic")
    succeed("encode", "b.jpg", "-o", "bare.mlic", "--strip")
    assert info("kept.mlic")["exif"] > 0 and info("kept.mlic")["xmp"] == 4
    assert info("bare.mlic")["exif"] == info("bare.mlic")["xmp"] == 0


def test_tiles(large):
    assert (info(large)["tiles"], info(large)["tile_size"], info(large)["tiles_whole"]) == (4, 64, 4)
    succeed("encode", "large.png", "--tile", 0, "-o", "one.mlic")
    assert (info("one.mlic")["tiles"], info("one.mlic")["tile_size"]) == (1, 0)


def test_16_bits_and_alpha_are_in_info():
    values = np.arange(40 * 30, dtype=np.uint16).reshape(30, 40) * 50
    Image.fromarray(values).save("deep.png")
    Image.new("RGBA", (20, 10), (1, 2, 3, 4)).save("clear.png")
    succeed("encode", "--quiet", "deep.png", "clear.png", "-o", "out")
    assert (info("out/deep.mlic")["depth"], info("out/deep.mlic")["alpha"]) == (16, 0)
    assert info("out/clear.mlic")["depth"] == 8 and info("out/clear.mlic")["alpha"] > 0


def test_regions_and_scales(large):
    succeed("decode", large, "-o", "whole.png")
    succeed("decode", large, "-o", "part.png", "--region", "50,40,30,25")
    assert np.array_equal(pixels("part.png"), pixels("whole.png")[40:65, 50:80])
    for scale, size in (("1/1", (96, 80)), ("1/2", (48, 40)), ("1/8", (12, 10))):
        succeed("decode", large, "-f", "-o", "small.png", "--scale", scale)
        assert size_of("small.png") == size
    succeed("decode", large, "-f", "-o", "small.png", "--scale", "1/4", "--region", "16,8,40,20")
    assert size_of("small.png") == (10, 5)
    said = refused("decode", large, "-o", "no.png", "--region", "90,0,30,25")
    assert said == "mlic: large.mlic: region 90,0,30,25 is not inside the picture of 96x80\n"
    assert "no.png" not in files()


def test_a_truncated_file(large):
    data = large.read_bytes()
    Path("cut.mlic").write_bytes(data[: len(data) - len(data) // 3])
    assert "truncated" in refused("decode", "cut.mlic")
    result = run("decode", "--allow-partial", "cut.mlic")
    assert result.exit_code == 0 and result.stderr.startswith("mlic: cut.mlic: note: the file is truncated")
    assert size_of("cut.png") == (96, 80)
    result = run("info", "--json", "cut.mlic")
    facts = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "mlic: cut.mlic: note: the file is truncated\n")
    assert facts["truncated"] and facts["tiles"] == 4 and 1 <= facts["tiles_whole"] < 4
    for length in (0, 5, 30):
        Path("cut.mlic").write_bytes(data[:length])
        refused("decode", "-f", "--allow-partial", "cut.mlic")
        refused("info", "cut.mlic")
    assert succeed("decode", "--allow-partial", large, "-o", "whole.png").stderr == ""


# Shells and terminals


def in_terminal(*args, **environment) -> str:
    """What a command says to a terminal."""
    import fcntl
    import termios

    terminal, device = os.openpty()
    fcntl.ioctl(device, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    settings = {**os.environ, "TERM": "xterm", **environment}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": device}
    process = subprocess.Popen(command_line(*args), env=settings, **streams)
    os.close(device)
    said = b""
    try:
        while piece := os.read(terminal, 1 << 16):
            said += piece
    except OSError:  # the other end is closed
        pass
    process.wait(timeout=60)
    os.close(terminal)
    return said.decode()


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_progress_and_colour_are_for_terminals(photos, large, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    Path("photos/broken.png").write_bytes(b"no picture")
    said = in_terminal("encode", "photos", "-o", "coded", "-j", 1)
    assert re.search(r"\d/5 \[", said)
    assert "\x1b[31mmlic: photos/broken.png: not a picture Pillow can read\x1b[0m" in said
    assert in_terminal("info", "none.mlic", NO_COLOR="1") == "mlic: none.mlic: No such file or directory\r\n"
    assert "4/4 [" in in_terminal("decode", large, "-o", "whole.png")  # tiles


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell):
    script = succeed("completion", shell).stdout
    assert "_MLIC_COMPLETE" in script and f"{shell}_complete" in script


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_commands_and_options():
    Path("script").write_text(succeed("completion", "bash").stdout)
    Path("mlic").write_text(f"#!{sys.executable}\nfrom mlic.cli import main\nmain(prog_name='mlic')\n")
    os.chmod("mlic", 0o700)
    environment = {**os.environ, "PATH": f"{os.getcwd()}{os.pathsep}{os.environ['PATH']}"}

    def complete(words: str) -> str:
        program = f". ./script 2>/dev/null; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
        program += '_mlic_completion mlic; echo "${COMPREPLY[@]}"'
        return subprocess.run(["bash", "-c", program], env=environment, capture_output=True, text=True).stdout.strip()

    assert complete("mlic enc") == "encode"
    assert complete("mlic encode --target-s") == "--target-size"
    assert complete("mlic completion f") == "fish"


@pytest.mark.parametrize(
    "command",
    ["encode", "decode", "info", "models", "demo", "completion", "weights import", "eval", "compare", "report", "train"],
)
def test_help_has_examples(command):
    text = succeed(*command.split(), "--help").stdout
    assert re.search(rf"^  (cat .*)?(bash .*)?mlic {command}|\bmlic {command} ", text, re.MULTILINE)


def test_a_bug_shows_itself(monkeypatch):
    monkeypatch.setattr(codec, "encode_picture", lambda *_, **__: 1 / 0)
    assert isinstance(CliRunner().invoke(main, ["encode", "a.png"]).exception, ZeroDivisionError)
