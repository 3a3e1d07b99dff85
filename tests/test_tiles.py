"""Tiles, parts and reduced sizes of pictures, truncated files, 16 bits and alpha, all through real files."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from conftest import SAMPLE
from PIL import Image

import mlic
from mlic import codec, decoding, exact, tiles
from mlic.alpha import alpha_bytes, alpha_from_bytes, reduce_alpha
from mlic.codec import decode_file, encode_picture, level_tensor
from mlic.config import CONFIGS
from mlic.container import MlicFile
from mlic.errors import DamagedFile, PictureError, UnsupportedFile
from mlic.metrics import psnr
from mlic.pictures import Picture
from mlic.tiles import Box, boxes, gather, margin
from mlic.weights import load_model


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """(240, 330, 3) uint8: no side is a multiple of 16."""
    with Image.open(SAMPLE) as image:
        return np.array(image.convert("RGB").crop((100, 100, 430, 340)))


@pytest.fixture(scope="module")
def tiled(scene) -> bytes:
    return encode_picture(load_model("fast"), Picture(scene), 60, tile=128, effort=1).data  # 2 x 3 tiles


@pytest.fixture(scope="module")
def decoded(scene, tiled) -> dict[int, tuple[bytes, np.ndarray]]:
    """By the side of its tiles, 0 for one: a file and its pixels."""
    one = encode_picture(load_model("fast"), Picture(scene), 60, tile=0, effort=0).data
    return {
        side: (data, decode_file(load_model("fast"), MlicFile.from_bytes(data)).pixels)
        for side, data in ((0, one), (128, tiled))
    }


def test_boxes_cover_a_picture_once():
    seen = np.zeros((200, 333), int)
    for box in boxes(200, 333, 64):
        seen[box.within(Box(0, 0, 200, 333))] += 1
    assert (seen == 1).all()
    assert boxes(200, 333, 0) == boxes(200, 333, 512) == [Box(0, 0, 200, 333)]


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_transforms_see_no_further_than_the_margin(small_models, name):
    """Latent and pixels of a part, computed with `margin` around it, are those of the whole: no seam can show.
    With half of it they are not, so the margin is no larger than twice what is needed.
    """
    model = small_models[name]
    level = torch.tensor([2.0]) if model.config.variable_rate else None
    torch.manual_seed(0)
    x = torch.rand(1, 3, 512, 512)
    y, y_hat = model.analyse(x, level), 4 * torch.randn(1, model.config.latent_channels, 32, 32)
    pixels = model.synthesise(y_hat, level)
    whole, part = Box(0, 0, 512, 512), Box(192, 192, 320, 320)
    far = []
    for by in (margin(model.config), margin(model.config) // 2 // 16 * 16):
        around = part.grown(by, whole)
        rows, columns = around.within(whole)
        some_y = model.analyse(x[:, :, rows, columns], level)
        some = model.synthesise(gather({whole: y_hat}, around), level)
        latent, inner = (slice(None), slice(None), *part.within(around, 16)), (slice(None), slice(None), *part.within(around))
        errors = (
            (some_y[latent] - y[:, :, 12:20, 12:20]).abs().max(),
            (some[inner] - pixels[:, :, 192:320, 192:320]).abs().max(),
        )
        far.append(max(error / values.abs().max() for error, values in zip(errors, (y, pixels))))
    assert far[0] < 1e-5 < far[1]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "float"])
def test_decoder_gives_the_encoders_reconstruction_of_tiles(small_models, scene, name, exact):
    model = small_models[name]
    quality = 70 if model.config.variable_rate else None
    part = Picture(np.ascontiguousarray(scene[:136, :300]))  # the last tiles are smaller
    encoded = encode_picture(model, part, quality, tile=128, exact=exact, reconstruct=True)
    file = MlicFile.from_bytes(encoded.data)
    assert file.tile == 128 and len(file.tiles) == 6
    assert np.array_equal(decode_file(model, file).pixels, encoded.reconstruction)


def test_no_seams(scene):
    """Beside the tiles' edges, PSNR against elsewhere is what it is in the picture in one piece, up to other roundings in so
    small a picture: in the mean of some qualities. (With g_s seeing nothing beyond the tiles, the fall would be several times
    as large.)
    """
    whole = Box(0, 0, 240, 330)
    near = np.zeros(scene.shape[:2], bool)
    for edge in range(128, 330, 128):
        near[:, edge - 2 : edge + 2] = True
        near[edge - 2 : edge + 2] = True

    def fall(pixels: np.ndarray) -> float:
        error = ((pixels.astype(float) - scene) ** 2).mean(2)
        return float(10 * np.log10(error[near].mean() / error[~near].mean()))

    def coded(pixels: np.ndarray, quality: int, tile: int = 0) -> np.ndarray:
        picture = Picture(np.ascontiguousarray(pixels))
        return encode_picture(load_model("fast"), picture, quality, tile=tile, effort=0, reconstruct=True).reconstruction

    falls = []
    for quality in (50, 60, 70):
        alone = np.empty_like(scene)
        for box in boxes(240, 330, 128):
            alone[box.within(whole)] = coded(scene[box.within(whole)], quality)
        one = fall(coded(scene, quality))
        falls.append((fall(coded(scene, quality, tile=128)) - one, fall(alone) - one))
    tiled, alone = np.mean(falls, 0)
    assert tiled < 0.25 < 0.5 < alone


def test_threads_change_nothing(scene, tiled):
    calls = []
    torch.set_num_threads(3)
    data = encode_picture(load_model("fast"), Picture(scene), 60, tile=128, progress=lambda *c: calls.append(c)).data
    assert torch.get_num_threads() == 3
    several = decode_file(load_model("fast"), MlicFile.from_bytes(tiled)).pixels
    torch.set_num_threads(1)
    one = decode_file(load_model("fast"), MlicFile.from_bytes(tiled)).pixels
    assert data == tiled and calls == [(i + 1, 6) for i in range(6)]
    assert np.abs(several.astype(int) - one).max() <= 1  # g_s is floating point


@pytest.mark.parametrize("region", [(0, 0, 330, 240), (65, 70, 100, 90), (329, 239, 1, 1), (10, 200, 300, 8)], ids=str)
@pytest.mark.parametrize("tile", [0, 128])
def test_region(decoded, region, tile):
    data, whole = decoded[tile]
    x, y, width, height = region
    part = decode_file(load_model("fast"), MlicFile.from_bytes(data), region=region).pixels
    assert part.shape == (height, width, 3)
    assert np.abs(part.astype(int) - whole[y : y + height, x : x + width]).max() <= 1


def test_region_reads_only_what_it_needs(scene, tiled, monkeypatch):
    """A corner of 40 pixels needs what g_s sees around it: four tiles of six; at 1/8, three slices of six."""
    seen = []
    monkeypatch.setattr(decoding, "SymbolDecoder", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    real = mlic.coder.SymbolDecoder
    model, file = load_model("fast"), MlicFile.from_bytes(tiled)
    calls = []
    decode_file(model, file, region=(0, 0, 40, 8), progress=lambda *c: calls.append(c))
    assert len(seen) == 4 and calls[-1] == (4, 4)
    assert {decoder.batches for decoder in seen} == {model.config.symbol_batches}
    seen.clear()
    decode_file(model, file, region=(0, 0, 40, 8), scale=8)
    assert {decoder.batches for decoder in seen} == {model.config.symbol_batches - 6}


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("tile", [0, 128])
def test_scale(decoded, scale, tile):
    """Close to the whole picture made smaller: what is left out lies above what the smaller picture can show."""
    model, (data, whole) = load_model("fast"), decoded[tile]
    file = MlicFile.from_bytes(data)
    small = decode_file(model, file, scale=scale).pixels
    height, width = -(-240 // scale), -(-330 // scale)
    assert small.shape == (height, width, 3)
    wanted = torch.from_numpy(whole).permute(2, 0, 1).float()
    wanted = torch.nn.functional.avg_pool2d(wanted, scale, ceil_mode=True, count_include_pad=False)
    assert psnr(small, wanted.permute(1, 2, 0).round().to(torch.uint8).numpy()) > 32
    corner = decode_file(model, file, scale=scale, region=(64, 128, 33, 40)).pixels
    shape = (-(-40 // scale), -(-33 // scale))
    assert corner.shape[:2] == shape
    inner = small[128 // scale : 160 // scale, 64 // scale : 96 // scale].astype(int)
    assert np.abs(corner[: inner.shape[0], : inner.shape[1]] - inner).max() <= 1


def test_scale_of_the_papers_models(small_models, scene):
    model = small_models["mlic++"]
    file = MlicFile.from_bytes(encode_picture(model, Picture(scene)).data)
    whole = torch.from_numpy(decode_file(model, file).pixels).permute(2, 0, 1).float()
    wanted = torch.nn.functional.avg_pool2d(whole, 2).permute(1, 2, 0).numpy()
    assert np.abs(decode_file(model, file, scale=2).pixels - wanted).max() <= 1


@pytest.mark.parametrize(
    ("region", "scale", "message"),
    [
        ((0, 0, 331, 10), 1, "not inside the picture of 330x240"),
        ((-1, 0, 10, 10), 1, "not inside"),
        ((0, 0, 0, 10), 1, "not inside"),
        ((4, 8, 10, 10), 8, "multiples of 8"),
        (None, 3, "scale is 1, 2, 4 or 8"),
    ],
)
def test_impossible_parts(tiled, region, scale, message):
    with pytest.raises(ValueError, match=message):
        decode_file(load_model("fast"), MlicFile.from_bytes(tiled), region=region, scale=scale)


@pytest.mark.parametrize("side", [1, 100, -64, 1 << 17])
def test_impossible_tiles(scene, side):
    with pytest.raises(ValueError, match="multiple of 64"):
        encode_picture(load_model("fast"), Picture(scene), tile=side)


def test_large_pictures_are_tiled(photo, small_models, monkeypatch):
    assert tiles.default_side(3000, 4000) == 1024 and tiles.default_side(512, 768) == 0
    monkeypatch.setattr(tiles, "LARGE", 1 << 12)
    monkeypatch.setattr(tiles, "SIDE", 64)
    assert MlicFile.from_bytes(mlic.encode(photo, model=small_models["fast"])).tile == 64


def test_preview_of_a_truncated_file(scene, decoded):
    """One tile: the more of the file is there, the better the preview; before anything is there, an error."""
    model, (data, _) = load_model("fast"), decoded[0]
    found = []
    for share in (0.3, 0.5, 0.7, 0.9, 0.99):
        with pytest.raises(DamagedFile, match="truncated"):
            MlicFile.from_bytes(data[: int(share * len(data))])
        file = MlicFile.from_bytes(data[: int(share * len(data))], allow_partial=True)
        try:
            preview = decode_file(model, file)
        except DamagedFile as error:
            assert "truncated before anything" in str(error)
            continue
        assert "preview" in preview.notes[0]
        found.append(psnr(preview.pixels, scene))
    assert len(found) >= 3 and found == sorted(found) and found[-1] > 25


@pytest.mark.parametrize("side", [0, 128])
def test_a_file_without_its_last_checksum_is_a_whole_picture(decoded, side):
    model, (data, whole) = load_model("fast"), decoded[side]
    for missing in (1, 4):
        part = decode_file(model, MlicFile.from_bytes(data[:-missing], allow_partial=True))
        assert np.array_equal(part.pixels, whole) and part.notes == ()
    part = decode_file(model, MlicFile.from_bytes(data[:-5], allow_partial=True))
    assert not np.array_equal(part.pixels, whole) and "truncated" in part.notes[0]


def test_a_cut_file_whose_symbols_are_wrong_is_refused(decoded):
    """It has more words than all symbols need."""
    data, _ = decoded[0]
    at = data.index(b"DATA")
    wrong = data[: at + 300] + np.random.default_rng(0).bytes(2 * len(data) // 4 * 4)
    wrong = wrong[: at + 4] + (len(wrong) - at + 100).to_bytes(4, "little") + wrong[at + 8 :]
    with pytest.raises(DamagedFile):
        decode_file(load_model("fast"), MlicFile.from_bytes(wrong, allow_partial=True))


def test_a_reduced_preview_says_what_it_lacks(decoded):
    """The slices that a reduced picture needs may all be there."""
    model, (data, _) = load_model("fast"), decoded[0]
    whole = decode_file(model, MlicFile.from_bytes(data), scale=4)
    most, half = (MlicFile.from_bytes(data[: len(data) * share // 100], allow_partial=True) for share in (97, 40))
    part = decode_file(model, most, scale=4)
    assert np.array_equal(part.pixels, whole.pixels) and part.notes == ()
    assert "truncated" in decode_file(model, most).notes[0]
    assert "truncated" in decode_file(model, half, scale=4).notes[0]


def test_networks_are_not_run_for_tiles_that_are_missing(tiled, monkeypatch):
    """And the exact twin is made once for all threads."""
    model = load_model("fast")
    model.__dict__.pop("_exact_twin", None)
    walks, twins = [], []
    walk, twin = type(model.entropy_model).walk, exact.make_exact
    monkeypatch.setattr(type(model.entropy_model), "walk", lambda *given: walks.append(1) or walk(*given))
    monkeypatch.setattr(exact, "make_exact", lambda module: twins.append(module is model.h_s) or twin(module))
    torch.set_num_threads(2)
    decode_file(model, MlicFile.from_bytes(tiled[: len(tiled) // 2], allow_partial=True))
    assert 2 <= len(walks) <= 4 and sum(twins) == 1
    decode_file(model, MlicFile.from_bytes(tiled))
    assert 8 <= len(walks) <= 10 and sum(twins) == 1


def test_a_long_picture_is_decoded_with_few_latents_in_memory(photo, small_models, monkeypatch):
    model, held = small_models["fast"], []
    data = encode_picture(model, Picture(np.tile(photo[:64, :64], (12, 1, 1))), 60, tile=64, effort=0).data
    inner = decoding.synthesise
    monkeypatch.setattr(decoding, "synthesise", lambda *given, **how: held.append(len(given[1])) or inner(*given, **how))
    assert decode_file(model, MlicFile.from_bytes(data)).pixels.shape == (768, 64, 3)
    assert len(held) == 12 and max(held) <= 2 * -(-margin(model.config) // 64) + 1 < 12


def test_tiles_too_large_for_exact_arithmetic(scene, monkeypatch):
    model, data = load_model("fast"), mlic.encode(scene, effort=0)
    for module in (codec, decoding):
        monkeypatch.setattr(module, "MAX_EXACT_TILE", 256 * 320)  # the picture has 256 * 384 with its padding
    with pytest.raises(PictureError, match="take smaller ones"):
        encode_picture(model, Picture(scene), tile=0)
    with pytest.raises(UnsupportedFile, match="exactly"):
        mlic.decode(data)
    with pytest.raises(UnsupportedFile, match="exactly"):
        mlic.decode_batch([data])
    file = MlicFile.from_bytes(encode_picture(model, Picture(scene), exact=False, effort=0).data)
    assert decode_file(model, file).pixels.shape == scene.shape
    assert encode_picture(model, Picture(scene), tile=256, effort=0).data


def test_missing_tiles_are_hatched(decoded):
    model, (tiled, whole) = load_model("fast"), decoded[128]
    file = MlicFile.from_bytes(tiled)
    start, first = tiled.index(b"DATA") + 8, len(file.tiles[0].stream) + len(file.tiles[0].escapes)
    file = MlicFile.from_bytes(tiled[: start + first + 40], allow_partial=True)
    part = decode_file(model, file)
    assert part.notes == ("the file is truncated: 5 of 6 tiles are missing and hatched",)
    assert np.abs(part.pixels[:32, :32].astype(int) - whole[:32, :32]).max() <= 1  # what g_s sees of the others is beyond
    assert set(np.unique(part.pixels[128:])) == set(np.unique(part.pixels[:, 128:])) == {112, 144}
    for region in ((320, 230, 10, 10), (130, 0, 10, 10)):  # the latter's neighbour is there
        with pytest.raises(DamagedFile, match="this part"):
            decode_file(model, file, region=region)


def test_a_single_tile_of_floating_point_has_one_thread_as_when_it_was_coded(scene, monkeypatch):
    model, before, inner, seen = load_model("fast"), torch.get_num_threads(), decoding._decode_tile, []
    monkeypatch.setattr(decoding, "_decode_tile", lambda *given: seen.append(torch.get_num_threads()) or inner(*given))
    torch.set_num_threads(2)
    try:
        for exact in (False, True):
            data = encode_picture(model, Picture(scene), 60, tile=256, exact=exact, effort=0).data
            decode_file(model, MlicFile.from_bytes(data), region=(0, 0, 64, 64))
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2]


def test_sixteen_bits():
    """A slow ramp keeps more than 256 values, and comes closer than 8 bits could."""
    ramp = np.linspace(20000, 24000, 256)[None, :, None] + np.zeros((128, 1, 3))
    pixels = ramp.astype(np.uint16)
    data = mlic.encode(pixels, quality=100)
    file = MlicFile.from_bytes(data)
    assert file.depth == 16
    encoded = encode_picture(load_model("fast"), Picture(pixels), 100, reconstruct=True)
    assert encoded.data == data
    back = decode_file(load_model("fast"), file).pixels
    assert back.dtype == np.uint16 and np.array_equal(back, encoded.reconstruction)
    assert len(np.unique(back)) > 3 * len(np.unique(back // 257))
    assert np.abs(back.astype(int) - pixels).mean() < 257


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_is_lossless(scene, small_models, dtype):
    alpha = np.tri(240, 330, dtype=dtype) * np.arange(330, dtype=dtype) * (1 if dtype == np.uint8 else 77)
    picture, model = Picture(scene.astype(dtype), alpha=alpha), small_models["fast"]
    file = MlicFile.from_bytes(encode_picture(model, picture, 40).data)
    back = decode_file(model, file)
    assert np.array_equal(back.alpha, alpha) and back.alpha.dtype == dtype
    part = decode_file(model, file, region=(8, 16, 50, 30), scale=2)
    assert np.array_equal(part.alpha, reduce_alpha(alpha[16:46, 8:58], 2))
    assert part.alpha.shape == part.pixels.shape[:2]


@pytest.mark.parametrize("tile", [0, 64])
def test_hidden_colours_do_not_show_in_a_reduced_picture(small_models, tile):
    """A means of colours, weighed by their alpha, as Pillow's reduce has it."""
    columns = np.arange(96)[None, :, None]
    pixels = np.where(columns % 4 < 2, [250, 200, 0], [0, 0, 90]).repeat(80, 0).astype(np.uint8)
    alpha = np.where(columns[..., 0] % 4 < 2, 255, 5).repeat(80, 0).astype(np.uint8)
    model = small_models["mlic"]  # decodes all slices for a reduced picture
    file = MlicFile.from_bytes(encode_picture(model, Picture(pixels, alpha=alpha), tile=tile).data)
    whole, small = decode_file(model, file), decode_file(model, file, scale=4)
    wanted = Image.fromarray(np.dstack([whole.pixels, alpha])).reduce(4)
    assert np.abs(np.dstack([small.pixels, small.alpha]).astype(int) - np.asarray(wanted)).max() <= 2
    part = decode_file(model, file, scale=4, region=(8, 16, 40, 48))
    assert np.abs(part.pixels.astype(int) - small.pixels[4:16, 2:12]).max() <= 1


def test_reduce_alpha():
    assert reduce_alpha(np.array([[0, 100, 7], [100, 200, 9], [50, 60, 70]], np.uint8), 2).tolist() == [[100, 8], [55, 70]]


def test_damaged_alpha():
    good = alpha_bytes(np.full((9, 8), 7, np.uint8))
    assert alpha_from_bytes(good, 8, 9, 8).tolist() == [[7] * 8] * 9
    few = io.BytesIO()
    Image.new("L", (8, 9)).save(few, "PNG", bits=2)
    for data, width, depth in (
        (good, 9, 8), (good, 8, 16), (good[:-20], 8, 8), (few.getvalue(), 8, 8), (b"no PNG", 8, 8), (b"", 8, 8),
    ):  # fmt: skip
        with pytest.raises(DamagedFile, match="alpha"):
            alpha_from_bytes(data, width, 9, depth)
    colours = io.BytesIO()
    Image.new("RGB", (8, 9)).save(colours, "PNG")
    twice = good[:33] + colours.getvalue()[8:]  # Pillow obeys the second header
    with pytest.raises(DamagedFile, match="alpha"):
        alpha_from_bytes(twice, 8, 9, 8)


def test_large_alpha_is_no_decompression_bomb(recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    assert alpha_from_bytes(alpha_bytes(np.zeros((9, 8), np.uint8)), 8, 9, 8).shape == (9, 8)
    assert not recwarn.list


def test_metadata_comes_back(scene, small_models):
    picture = Picture(scene, icc=b"profile", exif=b"II*\0data", xmp=b"<x/>", grey=False)
    model = small_models["fast"]
    back = decode_file(model, MlicFile.from_bytes(encode_picture(model, picture, 5).data))
    assert (back.icc, back.exif, back.xmp, back.alpha, back.notes) == (b"profile", b"II*\0data", b"<x/>", None, ())


def test_levels_of_files_are_256ths():
    assert level_tensor(load_model("fast"), 256).item() == 1.0
