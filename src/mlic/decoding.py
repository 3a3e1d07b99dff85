"""A .mlic file to pixels: tiles are decoded where they are needed, then synthesised together with their neighbours."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .alpha import alpha_from_bytes, reduce_alpha
from .coder import SymbolDecoder
from .container import NO_QUALITY, CodedTile, MlicFile
from .errors import DamagedFile, UnsupportedFile, WeightsError
from .exact import LONGEST, exact_twin
from .model import STRIDE, CompressionModel
from .pictures import Picture
from .strategies import Read
from .tiles import LATENT, Box, Progress, Workers, around, boxes, gather

MAX_EXACT_TILE = LONGEST * LATENT**2  # pixels
FEWEST = 8  # bytes of a stream that ends early, with which not one batch of symbols can be decoded


@torch.inference_mode()
def decode_file(
    model: CompressionModel,
    file: MlicFile,
    *,
    region: tuple[int, int, int, int] | None = None,
    scale: int = 1,
    progress: Progress | None = None,
) -> Picture:
    """A file to a picture, or to the part `region` = (x, y, width, height) of it, in pixels of the whole picture, or to
    one reduced to 1/`scale` (2, 4 or 8) each way. Only tiles, and for `scale` only slices, that are needed are decoded.

    `progress(done, total)` is called after each tile. What is missing of a truncated file is hatched, and said in `notes`.
    Raises DamagedFile when the symbols fail the file's checksum, ValueError for a region that is not in the picture.
    """
    check_quality(model, file)
    level = level_tensor(model, file.quality)
    whole = Box(0, 0, file.height, file.width)
    wanted = _region(file, region, scale)
    tiles = {box.aligned(STRIDE): tile for box, tile in zip(boxes(file.height, file.width, file.tile), file.tiles)}
    needed = [box for box in tiles if box.meets(around(model.config, wanted, whole))]
    keep = _slices_for_scale(model, scale)

    for box in needed:
        check_plausible(model, file, tiles[box], box)
    pixels = np.empty((*(-(-side // scale) for side in wanted.size), 3), np.uint16 if file.depth == 16 else np.uint8)
    y_hats: dict[Box, Tensor] = {}
    lacking: dict[Box, int] = {}  # tiles of which some is missing: how many batches were decoded
    coding = arithmetic(model, file.exact)
    alpha = None
    if file.alpha is not None:
        alpha = alpha_from_bytes(file.alpha, file.width, file.height, file.depth)[wanted.within(whole)]
    one_of = 0 if file.exact else len(tiles)  # another number of threads may give other symbols
    with Workers(len(needed), model.prior.median.device, progress, one_of=one_of) as workers:
        for top in sorted({box.top for box in needed if box.meets(wanted)}):
            row = [box.cut(wanted) for box in needed if box.top == top and box.meets(wanted)]  # what to give of each tile
            band, rest = (wanted._replace(top=row[0].top, bottom=row[0].bottom), wanted._replace(top=row[0].bottom))
            seen = around(model.config, band, whole)
            sees = [box for box in needed if box not in y_hats and box.meets(seen)]
            latents = workers.map(lambda box: _decode_tile(coding, file, tiles[box], box, level, keep), sees)
            for box, (y_hat, there) in zip(sees, latents):
                y_hats[box] = y_hat
                if there is not None:
                    lacking[box] = there
                workers.tick()
            list(workers.map(lambda part: synthesise(model, y_hats, part, wanted, level, pixels, whole, scale, alpha), row))
            seen = around(model.config, rest, whole)
            y_hats = {box: y_hat for box, y_hat in y_hats.items() if box.meets(seen)}
    lost = [box for box, there in lacking.items() if not there]
    if all(box in lost for box in needed if box.meets(wanted)):
        raise DamagedFile("the file is truncated before anything of this part of the picture")
    _mark(pixels, [box.cut(wanted) for box in lost if box.meets(wanted)], wanted, scale)
    alpha = None if alpha is None else reduce_alpha(alpha, scale)
    notes = _missing(list(lacking.values()), len(needed), model.config.symbol_batches) if file.truncated else ()
    return Picture(pixels, file.grey, alpha, file.icc, file.exif, file.xmp, notes)


def _decode_tile(
    coding: CompressionModel, file: MlicFile, tile: CodedTile, box: Box, level: Tensor | None, keep: int | None
) -> tuple[Tensor, int | None]:
    """-> y_hat (1, M, h/16, w/16) float32, zeros where nothing is there; batches decoded, where some are missing."""
    height, width = box.size
    zero = torch.zeros((), dtype=torch.float32, device=coding.prior.median.device)
    nothing = zero.expand(1, coding.config.latent_channels, height // LATENT, width // LATENT)  # takes no memory
    if tile.cut and len(tile.stream) <= FEWEST:
        return nothing, 0
    row = prior_row(coding, file.quality)
    source = SymbolDecoder(coding.tables, tile.stream, tile.escapes, tile.checksum, row, partial=tile.cut)
    read = Read((height // STRIDE, width // STRIDE), coding.gaussian, [source], keep=keep)
    y_hat = coding.code(read, level).float()
    if keep is None and not source.exhausted:
        source.finish()
    if source.exhausted and source.batches <= coding.config.hyper_batches:  # not even half a slice
        return nothing, 0
    return y_hat, source.batches if source.exhausted else None


def synthesise(
    model: CompressionModel,
    y_hats: dict[Box, Tensor],
    part: Box,
    wanted: Box,
    level: Tensor | None,
    pixels: np.ndarray,
    whole: Box,
    scale: int = 1,
    alpha: np.ndarray | None = None,
) -> None:
    """Write a part of the picture to where it belongs in `pixels`, which hold `wanted` at 1/scale. `alpha` of `wanted`
    weighs the colours that a reduced picture's are means of.
    """
    seen = around(model.config, part, whole)
    rows, columns = part.within(seen)
    x = model.synthesise(gather(y_hats, seen), level)[:, :, rows, columns].clamp(0, 1)
    if scale > 1:
        means = functools.partial(F.avg_pool2d, kernel_size=scale, ceil_mode=True, count_include_pad=False)
        if alpha is None:
            x = means(x)
        else:
            weight = torch.from_numpy(alpha[part.within(wanted)].astype(np.float32)).to(x.device)[None, None] + 1e-3
            x = means(x * weight) / means(weight)
    rows, columns = part.within(wanted, scale)
    peak = np.iinfo(pixels.dtype).max
    pixels[rows, columns] = (x[0] * peak).round().to(torch.int32).permute(1, 2, 0).cpu().numpy()


def _slices_for_scale(model: CompressionModel, scale: int) -> int | None:
    """The slices of `fast` go from low to high frequencies, like the block DCT they begin as: each halving of the picture
    does without one more. The papers' models need all.
    """
    if scale == 1 or model.config.transform != "patch":
        return None
    return max(1, len(model.config.slices) - int(math.log2(scale)))


def _region(file: MlicFile, region: tuple[int, int, int, int] | None, scale: int) -> Box:
    if scale not in (1, 2, 4, 8):
        raise ValueError(f"scale is 1, 2, 4 or 8 (for 1/1 to 1/8), not {scale!r}")
    if region is None:
        return Box(0, 0, file.height, file.width)
    x, y, width, height = region
    if not (0 <= x < x + width <= file.width and 0 <= y < y + height <= file.height):
        raise ValueError(f"region {x},{y},{width},{height} is not inside the picture of {file.width}x{file.height}")
    if x % scale or y % scale:
        raise ValueError(f"at scale 1/{scale}, x and y of a region must be multiples of {scale}, not {x} and {y}")
    return Box(y, x, y + height, x + width)


def _mark(pixels: np.ndarray, parts: list[Box], wanted: Box, scale: int) -> None:
    """Hatch what is missing in grey stripes."""
    for part in parts:
        rows, columns = part.within(wanted, scale)
        i, j = np.ogrid[rows, columns]
        light = (i + j) // 16 % 2 == 0
        unit = np.iinfo(pixels.dtype).max // 255
        pixels[rows, columns] = np.where(light, 144 * unit, 112 * unit)[:, :, None]


def _missing(batches: list[int], tiles: int, all_batches: int) -> tuple[str, ...]:
    notes = []
    if lost := batches.count(0):
        notes.append(f"the file is truncated: {lost} of {tiles} tiles are missing and hatched")
    what = "a tile" if tiles > 1 else "a preview"
    notes += [f"the file is truncated: {what} from {there} of {all_batches} parts of its code" for there in batches if there]
    return tuple(notes)


def check_quality(model: CompressionModel, file: MlicFile) -> None:
    if (file.quality == NO_QUALITY) == model.config.variable_rate:
        raise DamagedFile(f"the file's quality does not fit model {model.config.name!r}")
    if model.config.variable_rate and file.quality > (model.config.quality_levels - 1) * 256:
        raise UnsupportedFile(f"quality level {file.quality / 256:g} is beyond model {model.config.name!r}")


def check_plausible(model: CompressionModel, file: MlicFile, tile: CodedTile, box: Box) -> None:
    """Before anything as large as the picture is allocated: can so few bytes hold as much as z, and can they be decoded?"""
    rows, columns = (side // STRIDE for side in box.size)
    first = rows * columns if model.config.hyper_batches == 1 else -(-rows // 2) * -(-columns // 2)
    least = model.tables.prior.least_bits(prior_row(model, file.quality), model.config.z_channels)
    if not tile.cut and 8 * len(tile.stream) + 64 < first * least:
        raise DamagedFile(f"{len(tile.stream)} bytes are too few for {file.width}x{file.height} pixels")
    if file.exact and math.prod(box.size) > MAX_EXACT_TILE:
        raise UnsupportedFile(f"a tile of more than {MAX_EXACT_TILE >> 20} Mi pixels cannot be decoded exactly")


def arithmetic(model: CompressionModel, exact: bool) -> CompressionModel:
    if not exact:
        return model
    try:
        return exact_twin(model)
    except ValueError as error:
        raise WeightsError(f"{error}; only float arithmetic is possible with them") from None


def level_tensor(model: CompressionModel, code: int) -> Tensor | None:
    return None if code == NO_QUALITY else torch.tensor([code / 256], dtype=torch.float32, device=model.prior.median.device)


def prior_row(model: CompressionModel, code: int) -> int:
    """First of the prior's table rows at a level, which is rounded to a whole one."""
    return 0 if code == NO_QUALITY else (code + 128) // 256 * model.config.z_channels
