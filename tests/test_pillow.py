"""The Pillow plugin: what users of Image.open and Image.save expect."""

import io
import mimetypes
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import SAMPLE
from PIL import ExifTags, Image, ImageCms, ImageFile, PngImagePlugin, UnidentifiedImageError

import mlic
import mlic.pillow  # noqa: F401 (registers the format)
from mlic.codec import encode_picture
from mlic.container import CodedTile, MlicFile
from mlic.metrics import psnr
from mlic.pictures import Picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif_with(**tags) -> Image.Exif:
    exif = Image.Exif()
    for name, value in tags.items():
        exif[getattr(ExifTags.Base, name)] = value
    return exif


@pytest.fixture
def path(tmp_path, photo):
    path = tmp_path / "photo.mlic"
    Image.fromarray(photo).save(path, quality=80)
    return path


def test_save_and_open(path, photo):
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("MLIC", "RGB", (96, 80))
        assert image.get_format_mimetype() == "image/x-mlic"
        assert image.info == {"model": "fast", "quality": 80}
        assert np.array_equal(np.asarray(image), np.asarray(mlic.decode(path.read_bytes())))
    assert path.read_bytes() == mlic.encode(photo, quality=80)
    assert mimetypes.guess_type("a.mlic")[0] == "image/x-mlic"


def test_opening_decodes_nothing_and_needs_no_torch(path):
    script = (
        "import sys, mlic.pillow; from PIL import Image\n"
        f"image = Image.open({str(path)!r}); print(image.size, image.mode, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "(96, 80) RGB False"


def test_only_what_stands_before_the_pixels_is_read_to_open(path):
    class Counting(io.BytesIO):
        most = 0

        def read(self, size=-1):
            data = super().read(size)
            self.most = max(self.most, self.tell())
            return data

    file = Counting(path.read_bytes())
    image = Image.open(file)
    assert file.most < 80 < len(file.getvalue())
    image.load()
    assert file.most == len(file.getvalue())


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_modes(photo, mode, tmp_path):
    if mode == "I;16":
        original = Image.fromarray(photo[..., 0].astype(np.uint16) * 250)
    else:
        original = Image.fromarray(photo).convert(mode.rstrip("A"))
    if mode.endswith("A"):
        original.putalpha(Image.fromarray(photo[..., 1]))
    original.save(tmp_path / "a.mlic", quality=90)
    with Image.open(tmp_path / "a.mlic") as image:
        assert image.mode == mode and image._im is None
        image.load()
        assert image.mode == mode and image.size == original.size
        peak = 65535 if mode == "I;16" else 255
        difference = np.asarray(image, float) - np.asarray(original)
        shows = np.asarray(original)[..., -1] > 0 if mode.endswith("A") else ...
        assert np.abs(difference[shows]).mean() < 0.03 * peak
        if mode.endswith("A"):
            assert image.getchannel("A").tobytes() == original.getchannel("A").tobytes()


def test_16_bit_colour_comes_as_8(photo, tmp_path):
    data = encode_picture(mlic.load_model(), Picture(photo * np.uint16(257)), 70).data
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image, float) - photo).mean() < 8


def test_metadata_comes_back_when_opened(photo, tmp_path):
    exif = exif_with(Artist="Ansel", Orientation=6)
    image = Image.fromarray(photo)
    image.save(tmp_path / "a.mlic", icc_profile=SRGB, exif=exif, xmp=b"<x:xmpmeta/>")
    with Image.open(tmp_path / "a.mlic") as back:
        assert back._im is None
        assert back.info["icc_profile"] == SRGB and back.info["xmp"] == b"<x:xmpmeta/>"
        tags = back.getexif()
        assert tags[0x013B] == "Ansel" and tags[0x0112] == 1
        assert back.size == (80, 96)  # turned upright
        back.save(tmp_path / "b.mlic")  # an image's own metadata is kept
        back.save(tmp_path / "c.mlic", exif=None, icc_profile=None, xmp=None)
        back.save(tmp_path / "d.png", icc_profile=back.info["icc_profile"])
    with Image.open(tmp_path / "b.mlic") as back:
        assert back.getexif()[0x013B] == "Ansel" and back.info["icc_profile"] == SRGB
        assert back.info["xmp"] == b"<x:xmpmeta/>"
    with Image.open(tmp_path / "c.mlic") as back:
        assert set(back.info) == {"model", "quality"}


def test_the_tags_of_a_tiff_file_are_kept_beside_other_metadata(photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "a.tif", exif=exif_with(Make="Maker", Orientation=6))  # turned when opened
    with Image.open(tmp_path / "a.tif") as image:
        assert "exif" not in image.info
        image.save(tmp_path / "plain.mlic")
        image.save(tmp_path / "profile.mlic", icc_profile=SRGB)
        image.save(tmp_path / "other.mlic", exif=exif_with(Artist="Ansel", Orientation=1))
    for name in ("plain", "profile"):
        with Image.open(tmp_path / f"{name}.mlic") as image:
            assert image.size == (80, 96)
            assert image.getexif()[ExifTags.Base.Make] == "Maker"
            assert image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    with Image.open(tmp_path / "other.mlic") as image:
        assert image.size == (80, 96) and dict(image.getexif()) == {0x013B: "Ansel", 0x0112: 1}


def test_an_orientation_in_a_png_s_text_is_kept_beside_other_metadata(photo, tmp_path):
    """As ImageMagick writes it."""
    raw = exif_with(Orientation=6).tobytes().removeprefix(b"Exif\0\0")
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n", zip=True)
    Image.fromarray(photo).save(tmp_path / "a.png", pnginfo=info)
    for options in ({}, {"icc_profile": SRGB}):
        with Image.open(tmp_path / "a.png") as image:
            image.save(tmp_path / "a.mlic", **options)
        with Image.open(tmp_path / "a.mlic") as image:
            assert image.size == (80, 96)


def test_leaving_out_exif_keeps_the_picture_upright(photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "a.jpg", exif=exif_with(Orientation=8))
    with Image.open(tmp_path / "a.jpg") as image:
        image.save(tmp_path / "a.mlic", exif=None)
    with Image.open(tmp_path / "a.mlic") as image:
        assert image.size == (80, 96) and "exif" not in image.info


def test_options_of_save_reach_the_encoder(photo, small_models):
    def saved(pixels=photo, **options) -> MlicFile:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "MLIC", **options)
        return MlicFile.from_bytes(buffer.getvalue())

    assert saved(quality=30, optimize=True).quality == round(29 / 99 * 63 * 256)
    assert saved(quality=30, effort=0).to_bytes() == mlic.encode(photo, 30, effort=0)
    tiled = saved(exact=False, tile=64)
    assert (tiled.exact, tiled.tile, len(tiled.tiles)) == (False, 64, 4)
    assert saved(model=small_models["mlic"]).model == small_models["mlic"].config.name
    assert 0.98 * 700 <= len(saved(target_size=700, effort=0).to_bytes()) <= 700
    assert 0.49 <= 8 * len(saved(target_bpp=0.5, effort=0).to_bytes()) / (96 * 80) <= 0.5
    large = np.asarray(Image.open(SAMPLE).convert("RGB").crop((130, 60, 386, 316)))  # 0.1 dB are less than a level of `photo`
    assert psnr(np.asarray(mlic.decode(saved(large, target_psnr=33, effort=0).to_bytes())), large) == pytest.approx(33, abs=0.1)
    with pytest.raises(ValueError, match="not both"):
        saved(target_size=700, quality=50)
    with pytest.raises(ValueError, match="1 to 100"):
        saved(quality=0)
    with pytest.raises(ValueError, match="one rate"):
        saved(model=small_models["mlic"], quality=50)
    with pytest.raises(OSError, match="no model called"):
        saved(model="slow")
    with pytest.warns(UserWarning, match="cannot be reached"):
        saved(target_size=50, effort=0)


@pytest.mark.parametrize("model, quality", [("mlic", 512), ("mlic", 65535), ("fast", 65535), ("fast", 65000), ("own", 0)])
def test_a_quality_that_cannot_be_told_is_left_out(model, quality):
    tile = CodedTile(checksum=0, escapes=b"", stream=b"")
    common = {"width": 5, "height": 5, "grey": False, "exact": True, "digest": bytes(8), "tiles": (tile,)}
    with Image.open(io.BytesIO(MlicFile(**common, model=model, quality=quality).to_bytes())) as image:
        assert image.info == {"model": model}


def test_scaled_loading(path):
    with Image.open(path) as image:
        image.draft(None, (24, 20))
        assert image.size == (24, 20)
        small = np.asarray(image, float)
        assert small.shape == (20, 24, 3)
    full = np.asarray(mlic.decode(path.read_bytes()), float)
    assert np.abs(small - full.reshape(20, 4, 24, 4, 3).mean((1, 3))).mean() < 4
    with Image.open(path) as image:
        image.thumbnail((30, 30))
        assert image.size == (30, 25)
    with Image.open(path) as image:
        assert image.draft("L", (90, 70)) and image.size == (96, 80) and image.mode == "RGB"


def test_other_and_damaged_files(path, tmp_path):
    data = path.read_bytes()
    (tmp_path / "text.mlic").write_bytes(b"no picture at all")
    (tmp_path / "header.mlic").write_bytes(data[:30])
    (tmp_path / "flipped.mlic").write_bytes(data[:16] + bytes([data[16] ^ 1]) + data[17:])
    for name in ("text", "header", "flipped"):
        with pytest.raises(UnidentifiedImageError):
            Image.open(tmp_path / f"{name}.mlic")
    newer = io.BytesIO(data[:5] + b"\x63" + data[6:])
    with pytest.raises(OSError, match="version 99") as error:
        Image.open(newer)
    assert not isinstance(error.value, UnidentifiedImageError)
    image = Image.open(io.BytesIO(data[:-1] + bytes([data[-1] ^ 1])))
    with pytest.raises(OSError, match="damaged"):
        image.load()


def test_truncated_files(path, monkeypatch):
    data = path.read_bytes()
    with Image.open(io.BytesIO(data[: len(data) * 3 // 4])) as image:
        assert image.size == (96, 80)
        with pytest.raises(OSError, match="truncated"):
            image.load()
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        with pytest.warns(UserWarning, match="truncated"):
            image.load()
        assert np.asarray(image).shape == (80, 96, 3)


def test_verify_after_load(path):
    with Image.open(path) as image:
        image.load()
        with pytest.raises(RuntimeError, match="directly after open"):
            image.verify()


def test_verify(path):
    data = path.read_bytes()
    Image.open(io.BytesIO(data)).verify()
    for damaged in (data[:-1], data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]):
        with pytest.raises(OSError):
            Image.open(io.BytesIO(damaged)).verify()


def test_file_pointers_are_closed(path, recwarn):
    image = Image.open(path)
    file = image.fp
    image.load()
    assert file.closed and image.fp is None
    with Image.open(path) as image:
        file = image.fp
    assert file.closed
    stream = io.BytesIO(path.read_bytes())
    Image.open(stream).load()
    assert not stream.closed


def test_several_threads(path):
    expected, results = np.asarray(mlic.decode(path.read_bytes())), []

    def work():
        with Image.open(path) as image:
            results.append(np.asarray(image))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(np.array_equal(result, expected) for result in results)


def test_a_failed_save_leaves_no_file(photo, tmp_path):
    with pytest.raises(ValueError):
        Image.fromarray(photo).save(tmp_path / "a.mlic", quality=1000)
    assert not list(tmp_path.iterdir())


def test_imageio(path, photo, tmp_path):
    imageio = pytest.importorskip("imageio.v3")
    assert np.array_equal(imageio.imread(path), np.asarray(mlic.decode(path.read_bytes())))
    imageio.imwrite(tmp_path / "a.mlic", photo, quality=80)
    assert (tmp_path / "a.mlic").read_bytes() == path.read_bytes()
