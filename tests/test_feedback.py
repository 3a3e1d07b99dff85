"""What is written moves what is not yet written, so that the picture becomes better, and moves nothing that it should not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import SAMPLE
from PIL import Image
from test_refine import as_tensor, cost

from mlic import feedback, refine
from mlic.checkerboard import keep
from mlic.codec import decode_file, encode_picture
from mlic.config import ANCHOR, NON_ANCHOR
from mlic.container import MlicFile
from mlic.feedback import NoiseFeedback, search_with_feedback
from mlic.pictures import Picture
from mlic.refine import Search
from mlic.tensors import encode_batch, encode_tensor
from mlic.tiles import Box
from mlic.weights import load_model

LEVEL = torch.tensor([40.0])


@pytest.fixture(scope="module")
def model():
    return load_model("fast")


def scene(height: int, width: int, top: int = 100, left: int = 150) -> np.ndarray:
    with Image.open(SAMPLE) as image:
        return np.array(image.convert("RGB").crop((left, top, left + width, top + height)))


def of_whole(model, pixels: np.ndarray, *, passes: int = 0) -> NoiseFeedback:
    """With the latents that so many passes of search have moved."""
    x, box = as_tensor(pixels), Box(0, 0, *pixels.shape[:2])
    with torch.no_grad():
        y, z = Search(model, passes, LEVEL).latents(x, part=box, seen=box, whole=box)
        return NoiseFeedback(Search(model, 4, LEVEL), x, model.analyse(x, LEVEL), y, z, part=box, seen=box, whole=box)


def written(found: NoiseFeedback, errors: torch.Tensor) -> list[torch.Tensor]:
    """The slices of y_hat with some errors of what was asked for."""
    return list((found.y_hat + errors).split(found.search.model.config.slices, 1))


def test_it_lowers_what_files_cost(model, monkeypatch):
    """On average, while it raises that of some a little."""
    ratios = []
    for top, left in ((0, 300), (150, 100), (300, 150), (320, 512)):
        pixels = scene(192, 192, top, left)
        for quality in (30, 50, 70, 90):
            costs = []
            for long in (1, 99):
                monkeypatch.setattr(refine, "LONG", long)
                coded = encode_picture(model, Picture(pixels), quality, effort=1, reconstruct=True)
                costs.append(cost(model, coded, pixels, quality))
            ratios.append(costs[0] / costs[1])
    assert np.mean(ratios) < 0.9995 and 1 not in ratios


def test_tiles_and_batches(model):
    """Tiles decode to what was meant, and each picture of a batch has its own feedback."""
    encoded = encode_picture(model, Picture(scene(128, 192)), 60, effort=4, tile=128, reconstruct=True)
    assert np.array_equal(decode_file(model, MlicFile.from_bytes(encoded.data)).pixels, encoded.reconstruction)
    batch = torch.stack([torch.from_numpy(scene(64, 96, top)).permute(2, 0, 1) for top in (100, 300)])
    assert encode_batch(batch, 60, model, effort=4) == [encode_tensor(one, 60, model, effort=4) for one in batch]


def test_with_many_passes_only(model):
    x, box = as_tensor(scene(64, 64)), Box(0, 0, 64, 64)
    with torch.no_grad():
        found = [search_with_feedback(Search(model, passes, LEVEL), x, part=box, seen=box, whole=box) for passes in (0, 3, 4)]
    assert [len(feedback) for _, _, feedback in found] == [0, 0, 1]


def test_what_is_written_as_asked_for_moves_nothing(model):
    found = of_whole(model, scene(64, 128))
    slices = written(found, torch.zeros_like(found.y))
    assert torch.equal(found(0, ANCHOR, keep(slices[0], ANCHOR)), found.y)
    assert all(torch.equal(found(i, NON_ANCHOR, slices[i]), found.y) for i in range(3))


def test_what_moves_makes_the_picture_better(model):
    """Values of later slices make up for errors of earlier ones, as far as they can."""
    found, pixels = of_whole(model, scene(128, 128), passes=4), as_tensor(scene(128, 128))
    torch.manual_seed(0)
    errors = torch.zeros_like(found.y)
    errors[:, :48] = torch.rand(1, 48, 8, 8) - 0.5  # of slices 1 and 2
    slices = written(found, errors)
    assert found(0, NON_ANCHOR, slices[0]) is not None
    moved = found(1, NON_ANCHOR, slices[1])
    ways = moved - found.y
    assert 0.05 < ways.abs().amax() <= feedback.LONGEST
    ways[:, :48] = 0

    def error(y_hat: torch.Tensor) -> float:
        with torch.no_grad():
            return (model.synthesise(y_hat, LEVEL) - pixels).square().mean().item()

    assert torch.equal(found.y_hat[:, :48], torch.cat(slices[:2], 1))
    asked, harmed, mended = (error(found.y_hat + more) for more in (-errors, 0, ways))
    assert asked < harmed and mended < harmed - 0.05 * (harmed - asked)


@pytest.mark.parametrize("part", [Box(0, 0, 128, 128), Box(0, 64, 128, 192)])
def test_what_is_beside_a_tile_and_beyond_the_picture(model, part):
    """Pixels beyond the picture move nothing, those beside a tile do, and are taken as they are."""
    pixels, seen, whole = as_tensor(scene(128, 192)), Box(0, 0, 128, 192), Box(0, 0, 128, 160)
    place = (..., *part.within(seen, 16))

    def moved(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = model.analyse(pixels, LEVEL)
            own = y[place], model.h_a(y[place])
            found = NoiseFeedback(Search(model, 4, LEVEL), x, y, *own, part=part, seen=seen, whole=whole)
        return found(0, NON_ANCHOR, written(found, torch.full_like(found.y_hat, 0.5))[0][place])

    plain, beyond, near = moved(pixels), pixels.clone(), pixels.clone()
    beyond[..., 160:] = 0
    assert plain.shape == (1, 448, 8, 8) and torch.equal(plain, moved(beyond))
    near[..., slice(64) if part.left else slice(128, None)] *= 0.5
    assert not torch.equal(plain, moved(near))


def test_blocks_move_nearly_what_the_whole_does(model, monkeypatch):
    pixels, ways = scene(128, 256), []
    for block in (768, 128):
        monkeypatch.setattr(refine, "BLOCK", block)
        found = of_whole(model, pixels)
        torch.manual_seed(1)
        slices = written(found, torch.rand_like(found.y) - 0.5)
        ways.append(found(0, NON_ANCHOR, slices[0]) - found.y)
    assert 0 < (ways[0] - ways[1]).norm() < 0.1 * ways[0].norm()


def test_only_the_parts_that_have_a_say(model):
    """Anchors of the first slice, and the first three slices; the anchors do not undo what is unknown beside them."""
    found = of_whole(model, scene(64, 64))
    slices = written(found, torch.full_like(found.y, 0.3))
    before = found.y_hat.clone()
    assert found(0, ANCHOR, keep(slices[0], ANCHOR)) is not None
    changed = found.y_hat - before
    assert torch.equal(keep(changed, NON_ANCHOR), torch.zeros_like(changed))
    assert (keep(changed, ANCHOR)[:, :16] - keep(torch.full_like(changed, 0.3), ANCHOR)[:, :16]).abs().max() < 1e-6
    said = [
        found(i, half, slices[i]) is not None for i in range(6) for half in (ANCHOR, NON_ANCHOR) if (i, half) != (0, ANCHOR)
    ]
    assert said == [True, False, True, False, True] + [False] * 6
