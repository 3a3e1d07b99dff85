from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, features

import mlic
from mlic import demo
from mlic.cli import main
from mlic.demo import Row, comparison_picture, format_table, run_demo
from mlic.metrics import psnr
from mlic.peers import PEERS, nearest_in_size

CODECS = ["mlic", "JPEG"] + [codec for codec in ("WebP", "AVIF") if features.check(codec.lower())]


def smooth_picture(width: int = 192, height: int = 176) -> np.ndarray:
    y, x, c = np.ogrid[:height, :width, :3]
    waves = np.sin(x / (7 + 2 * c) + y / 23) + np.cos(y / (9 + c)) + ((x - 110) ** 2 + (y - 80) ** 2 < 40**2)
    return (waves * 40 + 110).clip(0, 255).astype(np.uint8)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """JPEG in place of the learned codec, at a fixed subsampling."""

    def encode(pixels, quality=50, model="fast"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:4:4")
        return file.getvalue()

    monkeypatch.setattr(mlic, "encode", encode, raising=False)
    monkeypatch.setattr(mlic, "decode", lambda data, model=None: Image.open(io.BytesIO(data)), raising=False)


def jpeg_size(pixels: np.ndarray, quality: int, subsampling: str) -> int:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=subsampling, optimize=True, progressive=True)
    return len(file.getvalue())


def test_rows():
    image, said = smooth_picture(), []
    rows = run_demo(image, qualities=(20, 80), progress=said.append)
    assert [row.codec for row in rows] == CODECS * 2
    assert rows[0].setting == "q20 fast"
    assert rows[0].bytes == len(mlic.encode(image, quality=20))
    assert rows[0].psnr == psnr(image, np.asarray(mlic.decode(mlic.encode(image, quality=20))))
    assert rows[len(CODECS)].bytes > rows[0].bytes
    for row in rows:
        assert row.bpp == pytest.approx(8 * row.bytes / (192 * 176))
        assert 15 < row.psnr < 60 and 0.5 < row.ms_ssim < 1
        assert row.encode_s > 0 and row.decode_s > 0
    assert sum("quality" in line for line in said) == 2


def test_jpeg_row_is_nearest_in_size_and_best_in_psnr():
    image = smooth_picture()
    ours, jpeg = run_demo(image, qualities=[35])[:2]
    quality, subsampling = jpeg.setting[1:].split()
    assert jpeg.bytes == jpeg_size(image, int(quality), subsampling)
    nearest = min(abs(jpeg_size(image, q, subsampling) - ours.bytes) for q in range(1, 96))
    assert abs(jpeg.bytes - ours.bytes) == nearest
    reached = []
    for name in ("jpeg", "jpeg-420"):
        _, data = nearest_in_size(PEERS[name], image, ours.bytes)
        assert abs(len(data) / ours.bytes - 1) < 0.05, "neither is out for its size"
        reached.append(psnr(image, PEERS[name].decode(data)))
    assert jpeg.psnr == max(reached) > min(reached)


@pytest.mark.parametrize(("peer", "subsampling"), [("jpeg", "4:4:4"), ("jpeg-420", "4:2:0")])
def test_search_against_brute_force(peer, subsampling):
    image = smooth_picture()
    sizes = [jpeg_size(image, quality, subsampling) for quality in range(1, 96)]
    for target in (1, sizes[0], sizes[30], sizes[60] + 7, (sizes[70] + sizes[71]) // 2, sizes[-1], 10**6):
        quality, data = nearest_in_size(PEERS[peer], image, target)
        assert len(data) == sizes[quality - 1]
        assert abs(len(data) - target) == min(abs(size - target) for size in sizes)


def test_an_option_far_from_the_target_does_not_win():
    image = smooth_picture()
    coded = demo._code_nearest(image, "JPEG", 1)
    assert coded.bytes == min(jpeg_size(image, 1, subsampling) for subsampling in ("4:4:4", "4:2:0"))


def test_small_picture_has_no_ms_ssim():
    rows = run_demo(smooth_picture(200, 100), qualities=[50])
    assert all(row.ms_ssim is None for row in rows)
    assert " - " in format_table(rows)


def test_table():
    table = format_table(
        [
            Row("mlic", "q10 fast", 1000, 0.25, 30.0, 0.95, 0.1, 0.2),
            Row("JPEG", "q5 4:2:0", 1100, 0.275, 25.125, 0.9, 0.001, 0.001),
            Row("mlic", "q90 fast", 123456, 5.0, 45.0, 0.999, 0.1, 0.2),
        ]
    ).splitlines()
    assert table[0].split()[:3] == ["codec", "setting", "bytes"]
    assert table[2].split() == ["JPEG", "q5", "4:2:0", "1,100", "+10.0%", "0.275", "25.12", "0.90000", "10.00"] + ["0.001"] * 2
    assert table[3] == "" and table[4].startswith("mlic") and "123,456" in table[4]
    assert len({len(line) for line in (table[0], table[1], table[2], table[4])}) == 1
    assert len(format_table([]).splitlines()[0]) > 20


def test_the_command(tmp_path):
    """Any picture, upright and without its alpha; the extension decides what is written."""
    image = Image.fromarray(smooth_picture(60, 40)).convert("RGBA")
    image.getexif()[0x0112] = 6  # shown turned by a quarter
    image.save(tmp_path / "a.png", exif=image.getexif())
    asked = ["demo", str(tmp_path / "a.png"), "-q", "50", "-q", "50", "-o"]
    run = CliRunner().invoke(main, [*asked, str(tmp_path / "b.jpg")])
    assert run.exit_code == 0 and "a.png, 40x60" in run.stdout and run.stdout.count("q50 fast") == 1
    assert Image.open(tmp_path / "b.jpg").format == "JPEG"
    run = CliRunner().invoke(main, [*asked, str(tmp_path / "b.xyz")])
    assert run.exit_code == 1 and "xyz" in run.stderr and not (tmp_path / "b.xyz").exists()


def test_missing_codec_is_noted(monkeypatch):
    monkeypatch.setattr(demo, "_missing", lambda: {"AVIF": "avif needs something"})
    said = []
    rows = run_demo(smooth_picture(64, 64), qualities=[50], progress=said.append)
    assert "AVIF" not in [row.codec for row in rows]
    assert said[0] == "skipped: avif needs something" and said[0] in format_table(rows)


def test_comparison_picture():
    image = smooth_picture()
    rows = [row for row in run_demo(image, qualities=(20, 40), keep=40) if row.pixels is not None]
    assert [row.codec for row in rows] == CODECS and rows[0].setting.startswith("q40")
    picture = comparison_picture(image, rows, crop=96, scale=3)
    assert picture.mode == "RGB"
    assert picture.width > 96 * 3 * len(CODECS)
    assert picture.height > 96 * 3
    left, top, right, bottom = demo.detailed_box(image, 96)
    assert (right - left, bottom - top) == (96, 96)
    # The first panel is the original crop with every pixel repeated.
    pixels, crop = np.asarray(picture), image[top:bottom, left:right].repeat(3, 0).repeat(3, 1)
    found = np.argwhere((pixels[:40, :40] != 255).any(2))[0]
    assert np.array_equal(pixels[found[0] : found[0] + 288, found[1] : found[1] + 288], crop)
    assert np.array_equal(pixels, np.asarray(comparison_picture(image, rows, crop=96, scale=3)))


@pytest.mark.parametrize("size", [(1, 1), (17, 5), (300, 40)])
def test_comparison_of_pictures_smaller_than_the_crop(size):
    image = smooth_picture(*size)
    picture = comparison_picture(image, run_demo(image, qualities=[50], keep=50))
    assert picture.height > 2 * size[1]
    assert demo.detailed_box(image, 512) == (0, 0, *size)


def test_comparison_errors():
    with pytest.raises(ValueError, match="crop=0"):
        comparison_picture(smooth_picture(), [], crop=0)


def test_crop_is_where_the_texture_is():
    pixels = np.full((256, 320, 3), 128, np.uint8)
    y, x = np.ogrid[:64, :64]
    pixels[160:224, 208:272] = ((x * x * 31 + y * y * 17 + x * y) % 200)[..., None]
    left, top, right, bottom = demo.detailed_box(pixels, 64)
    assert (left, top, right, bottom) == (208, 160, 272, 224)


def test_torch_is_not_imported_by_the_module():
    program = "import sys, mlic.demo, mlic.pillow; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
