"""The command as its users meet it: what it writes where, what it says, how it exits. Many files: test_cli_jobs.py."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import (  # noqa: F401  (fixtures among them)
    SIZE,
    coded,
    command_line,
    files,
    folder,
    misused,
    refused,
    run,
    size_of,
    subprocess_run,
    succeed,
    use_small_weights,
    weights_folder,
)
from PIL import Image

import mlic
import mlic.model
from mlic import codec, weights
from mlic.container import MlicFile
from mlic.cores import cores

# What works


def test_encode_and_decode_beside_the_inputs():
    assert succeed("encode", "a.png").stdout == ""
    assert files() == ["a.mlic", "a.png"]
    os.remove("a.png")
    assert succeed("decode", "a.mlic").stdout == ""
    assert files() == ["a.mlic", "a.png"] and size_of("a.png") == SIZE


def test_the_command_and_the_library_agree(coded):
    assert mlic.encode("a.png") == coded
    succeed("encode", "a.png", "-q", "80.5", "-o", "b.mlic")
    assert Path("b.mlic").read_bytes() == mlic.encode("a.png", quality=80.5) != coded
    succeed("decode", "b.mlic")
    with Image.open("b.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(mlic.decode(Path("b.mlic").read_bytes())))


def test_quality_is_in_the_file():
    for quality, level in ((1, 0), (50, 127 / 256 * 3), (100, 3)):
        succeed("encode", "a.png", "-q", quality, "-f")
        facts = json.loads(succeed("info", "--json", "a.mlic").stdout)
        assert facts["quality_level"] == pytest.approx(level, abs=0.01)


def test_several_inputs_into_a_folder_that_is_made(photo):
    for name in ("b.jpg", "c d.tiff", "ü.webp"):
        Image.fromarray(photo[:20, :20]).save(name)
    succeed("encode", "--quiet", "a.png", "b.jpg", "c d.tiff", "ü.webp", "-o", "new/deep")
    assert [f for f in files() if "new" in f] == [f"new/deep/{n}.mlic" for n in ("a", "b", "c d", "ü")]
    succeed("decode", "--quiet", *sorted(Path("new/deep").iterdir()), "-o", "back")
    assert sorted(os.listdir("back")) == ["a.png", "b.png", "c d.png", "ü.png"]


@pytest.mark.parametrize("name", ["new/", "new.d/", "deep/new/"])
def test_a_slash_makes_a_folder_of_a_single_output(name):
    succeed("encode", "a.png", "-o", name)
    assert files() == ["a.png", f"{name}a.mlic"]


def test_an_existing_folder_is_used():
    os.mkdir("there.mlic")
    succeed("encode", "a.png", "-o", "there.mlic")
    assert files() == ["a.png", "there.mlic/a.mlic"]


def test_names_with_a_leading_dash():
    os.rename("a.png", "-q.png")
    succeed("encode", "--", "-q.png")
    assert files() == ["-q.mlic", "-q.png"]


def test_stdin_and_stdout(coded):
    picture = Path("a.png").read_bytes()
    assert succeed("encode", "-", input=picture).stdout_bytes == coded
    assert succeed("encode", "a.png", "-o", "-").stdout_bytes == coded
    succeed("encode", "-", "-o", "b.mlic", input=picture)
    assert Path("b.mlic").read_bytes() == coded
    with Image.open(io.BytesIO(succeed("decode", "-", input=coded).stdout_bytes)) as image:
        assert (image.format, image.size) == ("PNG", SIZE)
    succeed("decode", "-", "-o", "b.bmp", input=coded)
    assert size_of("b.bmp") == SIZE
    succeed("encode", "-", "-o", "out/", input=picture)
    assert Path("out/stdin.mlic").read_bytes() == coded
    assert json.loads(succeed("info", "--json", "-", input=coded).stdout)["bytes"] == len(coded)


def test_pipes_of_processes():
    picture = Path("a.png").read_bytes()
    piped, said = subprocess_run("encode", "-j", 1, "--effort", 0, "-", input=picture)  # a search there may use bfloat16
    assert said == ""
    succeed("encode", "-j", 1, "--effort", 0, "a.png")
    assert Path("a.mlic").read_bytes() == piped
    png, said = subprocess_run("decode", "-j", 1, "-", "-o", "-", input=piped)
    assert said == ""
    with Image.open(io.BytesIO(png)) as image:
        assert (image.format, image.size) == ("PNG", SIZE)


def test_a_process_that_fails_on_one_of_many_prints_one_line_and_no_progress():
    out, said = subprocess_run("encode", "-j", 1, "--quiet", "a.png", "none.png", "-o", "out", code=1)
    assert (out, said) == (b"", "mlic: none.png: No such file or directory\n")
    assert files() == ["a.png", "out/a.mlic"]


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP tells its settings")
@pytest.mark.parametrize(("asked", "spins"), [({}, "1000"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")])
def test_threads_soon_sleep_while_they_wait(asked, spins):
    """On cores with other work, threads that spin took a decoder ten times as long."""
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-m", "mlic", "encode", "-j", "1", "a.png"]
    out = subprocess.run(command, capture_output=True, text=True, env=own | asked | {"OMP_DISPLAY_ENV": "verbose"})
    assert out.returncode == 0 and f"GOMP_SPINCOUNT = '{spins}'" in out.stderr


def test_help_and_version_do_not_wait_for_torch():
    program = "import sys, mlic.cli\ntry: mlic.cli.main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    for args in (["--version"], ["encode", "--help"]):
        out = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True)
        assert out.returncode == 0 and out.stderr == ""
        assert mlic.__version__ in out.stdout or "--quality" in out.stdout


@pytest.mark.parametrize(
    "name, kind", [("b.jpg", "JPEG"), ("b.JPEG", "JPEG"), ("b.webp", "WEBP"), ("b.tiff", "TIFF"), ("b.ppm", "PPM")]
)
def test_decode_to_what_the_extension_says(coded, name, kind):
    succeed("decode", "a.mlic", "-o", name)
    with Image.open(name) as image:
        assert (image.format, image.size) == (kind, SIZE)


def test_a_grey_picture_stays_grey():
    Image.open("a.png").convert("L").save("g.png")
    succeed("encode", "g.png")
    assert json.loads(succeed("info", "--json", "g.mlic").stdout)["colour"] == "grey"
    succeed("decode", "-f", "g.mlic")
    with Image.open("g.png") as image:
        assert image.mode == "L"


def test_what_is_lost_is_said_of_the_picture():
    Image.new("RGBA", (20, 10), (1, 2, 3, 4)).save("clear.png")
    Image.new("CMYK", (20, 10)).save("ink.tif")
    result = run("encode", "a.png", "ink.tif", "clear.png", "-o", "out")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[0] == "mlic: ink.tif: note: converted from CMYK to RGB"
    assert succeed("encode", "--quiet", "-f", "ink.tif").stderr == ""
    result = run("decode", "out/clear.mlic", "-o", "clear.jpg")
    assert (result.exit_code, result.stderr.count("\n")) == (0, 1)
    assert result.stderr.startswith("mlic: out/clear.mlic: note: JPEG: transparency is laid on white")
    succeed("decode", "out/clear.mlic", "-o", "clear2.png")
    with Image.open("clear2.png") as image:
        assert image.mode == "RGBA" and image.getpixel((0, 0))[3] == 4


def test_info(coded, small_models):
    text = succeed("info", "a.mlic").stdout
    facts = json.loads(succeed("info", "--json", "a.mlic").stdout)
    assert (facts["width"], facts["height"]) == SIZE
    assert facts["colour"] == "rgb" and facts["depth"] == 8 and facts["model"] == "fast" and facts["tiles"] == 1
    assert [facts[key] for key in ("alpha", "icc_profile", "exif", "xmp", "tile_size", "truncated")] == [0] * 6
    assert facts["weights"] == small_models["fast"].digest[:8].hex()
    assert facts["bytes"] == len(coded)
    assert facts["bpp"] == pytest.approx(8 * len(coded) / (SIZE[0] * SIZE[1]), abs=1e-4)
    assert [line.split()[0] for line in text.splitlines()] == list(facts)


def test_info_of_several_files(coded):
    Path("b.mlic").write_bytes(coded)
    Path("c.mlic").write_bytes(b"none")
    assert succeed("info", "a.mlic", "b.mlic").stdout.count("\n\nfile ") == 1
    result = run("info", "--json", "a.mlic", "c.mlic", "b.mlic")
    assert result.exit_code == 1 and result.stderr.startswith("mlic: c.mlic: ")
    first, second = (json.loads("{" + part) for part in result.stdout.split("{")[1:])
    assert (first.pop("file"), second.pop("file")) == ("a.mlic", "b.mlic") and first == second


def test_float_is_marked_and_decodes_with_a_word(coded):
    succeed("encode", "--float", "a.png", "-o", "float.mlic")
    kinds = {name: json.loads(succeed("info", "--json", name).stdout)["arithmetic"] for name in ("a.mlic", "float.mlic")}
    assert kinds == {"a.mlic": "exact", "float.mlic": "float"}
    result = run("decode", "float.mlic", "-o", "float.png")
    assert result.exit_code == 0 and Path("float.png").exists()
    assert "float.mlic: note: coded with --float" in result.stderr
    assert succeed("decode", "a.mlic", "-o", "exact.png").stderr == ""


def test_info_needs_no_weights(coded, monkeypatch):
    monkeypatch.setattr(weights, "load_model", None)
    monkeypatch.setattr(codec, "load_model", None)
    assert "weights" in succeed("info", "a.mlic").stdout


def test_models(weights_folder, monkeypatch):
    monkeypatch.setattr(mlic.model, "kmac_per_pixel", lambda config: mlic.model.Kmac(1.2, 1.2, 3.0))  # slow to count
    monkeypatch.setattr(mlic.model, "count_parameters", lambda config: 15_900_000)
    rows = {row["model"]: row for row in json.loads(succeed("models", "--json").stdout)}
    assert list(rows) == ["fast", "mlic", "mlic+", "mlic++"]
    assert rows["fast"]["weights"] == str(weights_folder / "fast.safetensors")
    assert rows["fast"]["rates"] > 1 == rows["mlic++"]["rates"]
    assert all(row["parameters_millions"] == 15.9 for row in rows.values())
    assert all((row["kmac_per_pixel_encode"], row["kmac_per_pixel_decode"]) == (2, 4) for row in rows.values())
    table = succeed("models").stdout.splitlines()
    assert [line.split()[0] for line in table] == ["model", *rows]
    assert table[1].endswith("fast.safetensors")


def test_a_weights_file_as_the_model(weights_folder):
    file = weights_folder / "more" / "mlic.safetensors"
    succeed("encode", "a.png", "--model", file)
    assert json.loads(succeed("info", "--json", "a.mlic").stdout)["quality_level"] is None
    assert "needs model 'mlic'" in refused("decode", "a.mlic", "-o", "b.png")
    succeed("decode", "a.mlic", "-o", "b.png", "--model", file)
    assert size_of("b.png") == SIZE


def test_demo():
    with Image.open("a.png") as image:
        image.resize((64, 48)).save("b.png")
    result = run("demo", "b.png", "-q", 30, "-o", "sheet.png")
    assert result.exit_code == 0
    assert "b.png, 64x48" in result.stdout and "mlic   q30" in result.stdout and "JPEG" in result.stdout
    assert files() == ["a.png", "b.png", "sheet.png"]
    assert size_of("sheet.png")[0] > 4 * 64


@pytest.mark.parametrize("threads", ["1", "100000", "99999999999999"])
def test_threads(threads, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    succeed("encode", "a.png", "-j", threads)
    assert asked == [min(int(threads), cores())]


# Overwriting


def test_existing_outputs_are_kept_without_force(coded):
    for command in (["encode", "a.png"], ["encode", "a.png", "-o", "a.mlic"], ["decode", "a.mlic"]):
        before = {name: Path(name).read_bytes() for name in files()}
        assert "exists; give another -o, or -f" in refused(*command)
        assert {name: Path(name).read_bytes() for name in files()} == before


def test_nor_are_they_replaced_by_what_comes_through_a_pipe(coded):
    Path("old.mlic").write_bytes(b"old")
    assert "exists; give another -o, or -f" in refused("encode", "-", "-o", "old.mlic", input=Path("a.png").read_bytes())
    assert Path("old.mlic").read_bytes() == b"old"
    succeed("encode", "-", "-f", "-o", "old.mlic", input=Path("a.png").read_bytes())
    assert Path("old.mlic").read_bytes() == coded


def test_force_overwrites(coded):
    Path("a.mlic").write_bytes(b"old")
    succeed("encode", "-f", "a.png")
    assert Path("a.mlic").read_bytes() == coded
    succeed("decode", "--force", "a.mlic")
    assert files() == ["a.mlic", "a.png"]


def test_a_failure_with_force_keeps_the_old_output(coded):
    Path("b.png").write_bytes(b"no picture")
    Path("b.mlic").write_bytes(b"old")
    refused("encode", "-f", "b.png")
    assert Path("b.mlic").read_bytes() == b"old"


@pytest.mark.parametrize("other", ["a.jpg", "./a.jpg", "sub/../a.jpg"])
def test_two_inputs_with_one_output(other):
    os.mkdir("sub")
    with Image.open("a.png") as image:
        image.save("a.jpg")
        image.save("sub/a.png")
    assert run("encode", "a.png", other).exit_code == 0
    assert files() == ["a.jpg", "a.jpg.mlic", "a.png", "a.png.mlic", "sub/a.png"]
    assert "would both become " in misused("encode", "-f", "a.png", "sub/a.png", "-o", "coded")


def test_nothing_is_no_name():
    """What a shell's unset variable becomes; the current folder is written with a dot."""
    for args in (["encode", ""], ["encode", "a.png", ""], ["encode", "a.png", "-o", ""], ["decode", ""], ["info", ""]):
        assert "an empty file name" in misused(*args)
    assert files() == ["a.png"]


@pytest.mark.parametrize("force", [[], ["-f"]])
def test_nothing_is_replaced_by_its_own_output(coded, force):
    os.link("a.mlic", "same.png")
    before = Path("a.mlic").read_bytes()
    assert "its own output" in refused("encode", "a.mlic", *force)
    assert "its own output" in refused("encode", "a.png", "-o", "./a.png", *force)
    assert "b.JPG would be a .mlic file in disguise" in misused("encode", "a.png", "-o", "b.JPG", *force)
    assert "its own output" in refused("decode", "a.mlic", "-o", "same.png", *force)
    assert "the picture itself" in misused("demo", "a.png", "-o", "../" + Path.cwd().name + "/a.png")
    assert Path("a.mlic").read_bytes() == before and size_of("a.png") == SIZE


@pytest.mark.parametrize("name", ["b.xyz", "b", "b.mlic.gz"])
def test_a_kind_that_cannot_be_written_is_noticed_before_the_work(coded, monkeypatch, name):
    monkeypatch.setattr(mlic.tasks.Decode, "__call__", lambda *_: pytest.fail("decoded"))
    assert "cannot write pictures" in refused("decode", "a.mlic", "-o", name)


def test_a_missing_input_is_said_to_be_missing():
    assert refused("encode", "none/a.png") == "mlic: none/a.png: No such file or directory\n"


# Inputs that fail


def test_one_of_three_fails(photo):
    Path("b.png").write_bytes(b"no picture")
    Image.fromarray(photo[:10, :10]).save("c.png")
    assert refused("encode", "--quiet", "a.png", "b.png", "c.png", "-o", "out").startswith("mlic: b.png: not a picture")
    assert files() == ["a.png", "b.png", "c.png", "out/a.mlic", "out/c.mlic"]
    Path("out/b.mlic").write_bytes(Path("out/a.mlic").read_bytes()[:-9])
    said = refused("decode", "--quiet", *sorted(Path("out").iterdir()))
    assert said.startswith("mlic: out/b.mlic: the file is truncated")
    assert sorted(os.listdir("out")) == ["a.mlic", "a.png", "b.mlic", "c.mlic", "c.png"]


def broken_pictures() -> dict[str, bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    png, jpeg = io.BytesIO(), io.BytesIO()
    Image.fromarray(noise).save(png, "PNG")
    Image.fromarray(noise).save(jpeg, "JPEG")
    return {
        "empty.png": b"",
        "text.png": b"Lorem ipsum dolor sit amet, consectetur adipiscing elit.\n" * 9,
        "truncated.png": png.getvalue()[:1000],
        "truncated.jpg": jpeg.getvalue()[:700],
        "head-only.png": png.getvalue()[:20],
    }


@pytest.mark.parametrize("name", broken_pictures())
def test_encode_broken_pictures(name):
    content = broken_pictures()[name]
    Path(name).write_bytes(content)
    assert refused("encode", name).startswith(f"mlic: {name}: ")
    assert refused("encode", "-", input=content).startswith("mlic: stdin: ")
    assert files() == sorted(["a.png", name])


@pytest.mark.parametrize("command", ["encode", "decode", "info"])
def test_no_such_input(command):
    assert refused(command, "none.x") == "mlic: none.x: No such file or directory\n"
    assert files() == ["a.png"]


@pytest.mark.parametrize("command", ["encode", "decode", "info"])
def test_a_folder_as_input(command):
    os.mkdir("sub")
    assert refused(command, "sub").startswith("mlic: sub: ")
    assert files() == ["a.png"]


@pytest.fixture
def without_plugin(monkeypatch):
    """As in a process that has not imported mlic.pillow."""
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "MLIC"])
    for registry, key in ((Image.SAVE, "MLIC"), (Image.EXTENSION, ".mlic")):
        monkeypatch.delitem(registry, key, raising=False)


def test_an_mlic_file_is_no_picture_and_a_picture_no_mlic_file(coded, without_plugin):
    assert "not a picture" in refused("encode", "a.mlic", "-o", "b.mlic")
    for command in (["decode", "a.png", "-o", "b.png"], ["info", "a.png"]):
        assert refused(*command) == "mlic: a.png: not an .mlic file (wrong signature)\n"


def test_every_damaged_byte_is_found(coded):
    for at in range(0, len(coded), 7):
        damaged = bytearray(coded)
        damaged[at] ^= 0x10
        Path("b.mlic").write_bytes(damaged)
        said = refused("decode", "b.mlic")
        assert said.startswith("mlic: b.mlic: ")
        assert run("info", "b.mlic").stderr in (said, "mlic: b.mlic: note: the file is truncated\n")
    assert files() == ["a.mlic", "a.png", "b.mlic"]


def test_truncated_and_empty_files(coded):
    for length in (0, 3, 6, 7, 20, len(coded) // 2, len(coded) - 1):
        Path("b.mlic").write_bytes(coded[:length])
        assert ("empty" if length == 0 else "truncated" if length > 5 else "signature") in refused("decode", "b.mlic")
        refused("decode", "-", input=coded[:length])
    assert "1 bytes follow" in refused("decode", "-", input=coded + b"x")
    assert files() == ["a.mlic", "a.png", "b.mlic"]


@pytest.mark.parametrize("name, why", [("b.txt", "of type .txt"), ("b", "without an extension"), ("b.mlic", ".mlic")])
def test_decode_to_what_is_no_picture_type(coded, without_plugin, name, why):
    assert why in refused("decode", "a.mlic", "-o", name)
    assert files() == ["a.mlic", "a.png"]


def test_not_enough_memory(monkeypatch):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(codec, "encode_picture", fail)
        assert refused("encode", "a.png") == "mlic: a.png: not enough memory for this picture\n"
    monkeypatch.setattr(codec, "encode_picture", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug is not dressed up as bad input
        run("encode", "a.png")


@pytest.mark.parametrize("where", ["encode_picture", "replace"])
def test_ctrl_c_leaves_nothing(monkeypatch, where):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(codec if where == "encode_picture" else os, where, interrupt)
    result = run("encode", "a.png")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "mlic: interrupted\n")
    assert files() == ["a.png"]


# Outputs that fail


def test_a_full_disk(monkeypatch, coded):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    for command in (["encode", "a.png", "-o", "b.mlic"], ["decode", "a.mlic", "-o", "b.png"]):
        assert refused(*command).endswith(f": cannot write {command[-1]}: No space left on device\n")
    assert files() == ["a.mlic", "a.png"]


@pytest.mark.parametrize("output", ["none/b.mlic", "a.png/b.mlic"])
def test_no_folder_for_the_output(output):
    assert f"a.png: cannot write {output}: no folder {Path(output).parent}" in refused("encode", "a.png", "-o", output)
    assert files() == ["a.png"]


def test_a_folder_that_cannot_be_made():
    assert "cannot make folder a.png" in misused("encode", "a.png", "-o", "a.png/")
    assert "cannot make folder a.png/sub" in misused("encode", "a.png", "a.png", "-o", "a.png/sub/")
    assert files() == ["a.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission():
    os.mkdir("locked", 0o500)
    assert "cannot write locked/a.mlic: Permission denied" in refused("encode", "a.png", "-o", "locked")


def test_a_folder_in_the_output_s_place():
    os.mkdir("a.mlic")
    assert "a.mlic exists" in refused("encode", "a.png")
    assert "cannot write a.mlic: Is a directory" in refused("encode", "-f", "a.png")
    assert files() == ["a.png"]


# Weights


def test_decoding_with_other_weights_is_refused(coded, weights_folder, monkeypatch):
    needed = MlicFile.from_bytes(coded).digest.hex()
    other = weights_folder / "more" / "fast.safetensors"
    said = refused("decode", "a.mlic", "-o", "b.png", "--model", other)
    assert f"needs model 'fast' with weights {needed}, but" in said
    monkeypatch.setenv("MLIC_WEIGHTS", str(other.parent))
    assert refused("decode", "a.mlic", "-o", "b.png").startswith(said.strip())  # and the packaged ones, which do not fit either
    succeed("decode", "a.mlic", "-o", "c.png", "--model", weights_folder / "fast.safetensors")
    assert files() == ["a.mlic", "a.png", "c.png"]


def test_files_of_several_weights_of_one_name_decode_side_by_side(coded, weights_folder, monkeypatch):
    """Those that the file's digest asks for are found, wherever they stand."""
    monkeypatch.setenv("MLIC_WEIGHTS", os.pathsep.join([str(weights_folder / "more"), str(weights_folder)]))
    succeed("encode", "a.png", "-o", "other.mlic")
    Path("packaged.mlic").write_bytes((Path(__file__).parent / "golden" / "fast-packaged.mlic").read_bytes())
    for name in ("a", "other", "packaged"):
        succeed("decode", f"{name}.mlic", "-o", f"{name}-back.png")
    assert Path("a.mlic").read_bytes()[:60] != Path("other.mlic").read_bytes()[:60]
    os.mkdir("broken")
    Path("broken/fast.safetensors").write_bytes(b"no weights")
    monkeypatch.setenv("MLIC_WEIGHTS", os.path.abspath("broken"))
    succeed("decode", "-f", "packaged.mlic", "-o", "packaged-back.png")
    assert "not a safetensors file" in refused("decode", "-f", "a.mlic", "-o", "a-back.png")


def test_no_weights_for_a_model():
    said = refused("encode", "a.png", "--model", "mlic++")
    assert "no weights for 'mlic++'" in said and "MLIC_WEIGHTS" in said and "mlic weights import" in said
    assert files() == ["a.png"]


@pytest.mark.parametrize(
    "model, why",
    [
        ("slow", "no model called 'slow'; there are fast, mlic, mlic+, mlic++"),
        ("none.safetensors", "no weights file none.safetensors"),
        ("a.png", "cannot be read: not a safetensors file"),
        (".", "no weights file ."),
    ],
)
def test_a_model_that_is_none(coded, model, why):
    assert why in refused("encode", "a.png", "-o", "b.mlic", "--model", model)
    assert why in refused("decode", "a.mlic", "-o", "b.png", "--model", model)
    assert files() == ["a.mlic", "a.png"]


@pytest.mark.parametrize("name", ["none.pth", "a.png", "empty.pth", "."])
def test_import_of_what_is_no_checkpoint(name):
    Path("empty.pth").touch()
    assert refused("weights", "import", name, "-o", "x.safetensors").startswith(f"mlic: {name}: ")
    assert files() == ["a.png", "empty.pth"]


def test_import_of_another_model_s_checkpoint():
    torch.save({"state_dict": {"g_a.0.weight": torch.zeros(3)}}, "x.pth")
    assert "not a checkpoint of MLIC++" in refused("weights", "import", "x.pth", "-o", "x.safetensors")
    assert "a.png exists" in refused("weights", "import", "x.pth", "-o", "a.png")
    assert "no folder none" in refused("weights", "import", "x.pth", "-o", "none/x.safetensors")
    assert files() == ["a.png", "x.pth"]


# Wrong usage


@pytest.mark.parametrize("quality", ["0", "0.99", "101", "-5", "nan", "inf", "high", ""])
def test_quality_out_of_range(quality):
    assert "-q" in misused("encode", "a.png", "-q", quality)
    assert files() == ["a.png"]


def test_quality_for_a_model_of_one_rate(weights_folder):
    file = weights_folder / "more" / "mlic.safetensors"
    assert "model 'mlic' has one rate: leave -q out" in misused("encode", "a.png", "-q", 50, "--model", file)
    assert "for all rates" in misused("demo", "a.png", "--model", file, "-o", "d.png")
    assert files() == ["a.png"]


def test_several_inputs_need_a_folder(coded):
    for output in ("b.mlic", "a.png", "-"):
        assert "2 inputs need a folder" in misused("encode", "a.png", "a.png", "-o", output)
    assert "2 inputs need a folder" in misused("decode", "a.mlic", "a.mlic", "-o", "b.png")
    assert files() == ["a.mlic", "a.png"]


def test_cuda_where_there_is_none(coded, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in misused("encode", "a.png", "--device", "cuda", "-o", "b.mlic")
    assert "no CUDA device" in misused("decode", "a.mlic", "--device", "cuda", "-o", "b.png")
    assert files() == ["a.mlic", "a.png"]


@pytest.mark.parametrize(
    "args",
    [
        ("encode",),
        ("decode",),
        ("info",),
        ("encode", "a.png", "--nonsense"),
        ("encode", "a.png", "-j", "0"),
        ("encode", "a.png", "--device", "tpu"),
        ("weights", "import", "a.png"),
        ("demo", "a.png", "-q", "0"),
        ("transcode", "a.png"),
        ("completion", "tcsh"),
        ("encode", "a.png", "-v", "--quiet"),
        ("encode", "a.png", "--tile", "100"),
        ("encode", "a.png", "--tile", "-64"),
        ("encode", "a.png", "--tile", "65600"),
        ("encode", "a.png", "-q", "50", "--target-bpp", "1"),
        ("encode", "a.png", "--target-size", "9k", "--target-psnr", "30"),
        ("encode", "a.png", "--target-size", "big"),
        ("encode", "a.png", "--target-size", "0"),
        ("encode", "a.png", "--target-size", "-5k"),
        ("encode", "a.png", "--target-size", "9" * 400),
        ("encode", "a.png", "--target-bpp", "0"),
        ("encode", "a.png", "--target-bpp", "nan"),
        ("encode", "a.png", "--target-psnr", "inf"),
        ("encode", "a.png", "--region", "0,0,9,9"),
        ("encode", "a.png", "--engine", "spark"),
        ("encode", "a.png", "--ray-address", "auto"),
        ("decode", "a.mlic", "--strip"),
        ("decode", "a.mlic", "--region", "0,0,9"),
        ("decode", "a.mlic", "--region", "0,0,9,0"),
        ("decode", "a.mlic", "--region", "0,0,9," + "9" * 5000),
        ("decode", "a.mlic", "--region", "-1,0,9,9"),
        ("decode", "a.mlic", "--region", "1,0,9,9", "--scale", "1/2"),
        ("decode", "a.mlic", "--scale", "1/3"),
        ("train", "--data", "none"),
        ("train", "--data", ".", "--crop", "100"),
    ],
)
def test_other_wrong_usage(args):
    misused(*args)
    assert files() == ["a.png"]


@pytest.mark.parametrize("image, output", [("none.png", "d.png"), (".", "d.png"), ("a.png", "none/d.png")])
def test_demo_failures(image, output):
    assert refused("demo", image, "-q", 50, "-o", output).startswith(f"mlic: {image}: ")
    assert files() == ["a.png"]


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_binary_data_does_not_go_to_a_terminal():
    terminal, device = os.openpty()
    try:
        command = command_line("encode", "a.png", "-o", "-")
        process = subprocess.run(command, stdout=device, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(terminal), os.close(device)
    assert process.returncode == 2
    assert "Error: will not write binary data to a terminal" in process.stderr
