"""A picture to the bytes of a file, and back."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import warnings
from pathlib import Path
from typing import BinaryIO, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .alpha import alpha_bytes
from .coder import SymbolEncoder
from .config import CONFIGS
from .container import DIGEST_BYTES, MAX_PIXELS, MAX_SIDE, NO_QUALITY, TILE_UNIT, CodedTile, MlicFile
from .decoding import MAX_EXACT_TILE, arithmetic, decode_file, level_tensor, prior_row, synthesise
from .errors import PictureError, WeightsError
from .feedback import search_with_feedback
from .model import STRIDE, CompressionModel
from .pictures import Picture, PictureSource, read_picture
from .refine import Search
from .saving import to_pillow
from .strategies import Estimate, Write
from .tiles import Box, Progress, Workers, around, boxes, default_side
from .weights import Model, all_weights, load_model

DEFAULT_QUALITY = 50
FileSource = Union[bytes, str, os.PathLike, BinaryIO]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A file's bytes and, if asked for, the pixels its decoder will give: (H, W, 3) uint8 or uint16."""

    data: bytes
    reconstruction: np.ndarray | None = None


def encode(
    image: PictureSource | Picture | Tensor,
    quality: float | None = None,
    model: Model = "fast",
    *,
    exact: bool = True,
    effort: int | None = None,
) -> bytes:
    """Encode a picture: a PIL image, an array as for `mlic.read_picture`, (H, W, 3) uint8 for instance, a (3, H, W)
    tensor, a path, a binary file or its bytes, or what `mlic.read_picture` gave.

    With `exact` (default) the file decodes on every machine; without, a little faster and only where floating point
    comes out the same as here. `quality` 1..100 (default 50) is for models with a variable rate; giving it to another
    one is a ValueError. So with `effort`, the passes spent on a smaller file, from 0 to 20 (default 4; docs/using.md).
    `model` is a name, a weights file or a loaded model. Raises PictureError or WeightsError.

    >>> data = encode(np.zeros((20, 30, 3), np.uint8), quality=30)
    >>> decode(data).size
    (30, 20)
    """
    if isinstance(image, Tensor):
        from .tensors import encode_tensor  # which imports this module

        return encode_tensor(image, quality, model, exact=exact, effort=effort)
    network = load_model(model)
    picture = image if isinstance(image, Picture) else read_picture(image)
    for note in picture.notes:
        warnings.warn(note, stacklevel=2)
    return encode_picture(network, picture, quality, exact=exact, effort=effort).data


def decode(data: FileSource, model: Model | None = None) -> Image.Image:
    """Decode a .mlic file, its bytes, a path or a binary file, to a PIL image, mode RGB, RGBA, L, LA or I;16.

    `model` is only needed where the file's weights are not installed. Raises DamagedFile, UnsupportedFile or
    WeightsError.
    """
    file = MlicFile.from_bytes(file_bytes(data))
    network = model_for(file, model)
    return to_pillow(decode_file(network, file))


def file_bytes(source: FileSource) -> bytes:
    """What a file holds. Raises OSError where a path cannot be read."""
    if isinstance(source, (str, os.PathLike)):
        return Path(source).read_bytes()
    return bytes(memoryview(source.read() if hasattr(source, "read") else source))


def model_for(file: MlicFile, model: Model | None = None, device: str = "cpu") -> CompressionModel:
    """The weights a file was made with. Raises WeightsError naming the digest when they are not at hand."""
    wanted = f"model {file.model!r} with weights {file.digest.hex()}"
    if model is None and file.model not in CONFIGS:  # a name from a file is never taken for a path
        raise WeightsError(f"this file needs {wanted}; give its weights file")
    have, reason = [], ""
    for choice in [model] if model is not None else all_weights(file.model) or [file.model]:
        try:
            network = load_model(choice, device=device)
        except WeightsError as error:
            reason = f": {error}"
            continue
        if network.digest[:DIGEST_BYTES] == file.digest:
            return network
        have.append(f"{network.config.name!r} {network.digest[:DIGEST_BYTES].hex()}")
    at_hand = f", but the weights at hand are {' and '.join(have)}" if have else ""
    if have and model is None:
        at_hand += "; a folder named by MLIC_WEIGHTS may hold others"
    raise WeightsError(f"this file needs {wanted}{at_hand}{reason}")


@torch.inference_mode()
def encode_picture(
    model: CompressionModel,
    picture: Picture,
    quality: float | None = None,
    *,
    exact: bool = True,
    effort: int | None = None,
    tile: int | None = None,
    reconstruct: bool = False,
    progress: Progress | None = None,
) -> Encoded:
    """A picture to a file. `tile` is the side of the tiles in pixels, a multiple of 64, or 0 for one tile; None tiles
    large pictures. `effort`: as for `encode`. `progress(done, total)` is called after each tile. Raises PictureError,
    WeightsError, ValueError.
    """
    height, width = picture.pixels.shape[:2]
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise PictureError(f"{width}x{height} pixels are too many: at most {MAX_PIXELS >> 20} Mi, {MAX_SIDE} a side")
    if tile and (tile % TILE_UNIT or not TILE_UNIT <= tile <= MAX_SIDE):
        raise ValueError(f"tiles have sides of a multiple of {TILE_UNIT} pixels, up to {MAX_SIDE}, not {tile}")
    side = default_side(height, width) if tile is None else tile
    code = quality_code(model, quality)
    level, coding = level_tensor(model, code), arithmetic(model, exact)
    search = Search(model, effort, level)
    whole = Box(0, 0, height, width)
    tiles = [box.aligned(STRIDE) for box in boxes(height, width, side)]
    if exact and max(math.prod(box.size) for box in tiles) > MAX_EXACT_TILE:
        raise PictureError(f"tiles of more than {MAX_EXACT_TILE >> 20} Mi pixels cannot be coded exactly: take smaller ones")

    def code_tile(box: Box) -> tuple[CodedTile, Tensor | None]:
        seen = around(model.config, box, whole)
        seen = seen.aligned(STRIDE) if search.passes else seen
        x = to_tensor(model, picture.pixels, seen)
        y, z, feedback = search_with_feedback(search, x, part=box, seen=seen, whole=whole)
        check_finite(y, z)
        symbols = SymbolEncoder(model.tables, prior_row(model, code))
        y_hat = coding.code(Write(y, z, model.config.slices, search.gaussian, [symbols], feedback), level)
        stream, escapes, checksum = symbols.finish()
        return CodedTile(checksum=checksum, escapes=escapes, stream=stream), y_hat.float() if reconstruct else None

    coded, y_hats = [], {}
    pixels = np.empty((height, width, 3), picture.pixels.dtype) if reconstruct else None
    with Workers(len(tiles), model.prior.median.device, progress) as workers:
        for box, (one, y_hat) in zip(tiles, workers.map(code_tile, tiles)):
            coded.append(one)
            y_hats[box] = y_hat
            workers.tick()
        if reconstruct:  # side by side, as the decoder does: other thread counts may change a pixel's last bit
            list(workers.map(lambda box: synthesise(model, y_hats, box.cut(whole), whole, level, pixels, whole), tiles))
    file = MlicFile(
        width=width,
        height=height,
        grey=picture.grey,
        depth=16 if picture.pixels.dtype == np.uint16 else 8,
        exact=exact,
        quality=code,
        model=model.config.name,
        digest=model.digest[:DIGEST_BYTES],
        tile=side if len(tiles) > 1 else 0,
        tiles=tuple(coded),
        alpha=None if picture.alpha is None else alpha_bytes(picture.alpha),
        icc=picture.icc,
        exif=picture.exif,
        xmp=picture.xmp,
    )
    return Encoded(file.to_bytes(), pixels)


@torch.inference_mode()
def estimate_bytes(
    model: CompressionModel,
    picture: Picture,
    quality: float | None = None,
    *,
    exact: bool = True,
    effort: int | None = None,
) -> float:
    """The model's own estimate of a file's size, before tables, headers and rounding to bytes."""
    level = level_tensor(model, quality_code(model, quality))
    search = Search(model, effort, level)
    whole = Box(0, 0, *picture.pixels.shape[:2])
    box = whole.aligned(STRIDE)
    x = to_tensor(model, picture.pixels, box)
    y, z, feedback = search_with_feedback(search, x, part=box, seen=box, whole=whole)
    estimate = Estimate(y, z, model.config.slices, search.gaussian, feedback, noisy=False)
    arithmetic(model, exact).code(estimate, level)
    return float(estimate.y_bits + estimate.z_bits) / 8


def quality_code(model: CompressionModel, quality: float | None) -> int:
    """Quality 1..100 -> level in 1/256, as stored in files; NO_QUALITY for a model with one rate."""
    if not model.config.variable_rate:
        if quality is not None:
            raise ValueError(f"model {model.config.name!r} has one rate: quality cannot be chosen")
        return NO_QUALITY
    quality = DEFAULT_QUALITY if quality is None else quality
    if not (isinstance(quality, numbers.Real) and 1 <= quality <= 100):
        raise ValueError(f"quality must be a number from 1 to 100, not {quality!r}")
    return round((float(quality) - 1) / 99 * (model.config.quality_levels - 1) * 256)


def to_tensor(model: CompressionModel, pixels: np.ndarray, part: Box) -> Tensor:
    """A part of (H, W, 3) uint8 or uint16 -> (1, 3, h, w) float32 in 0..1; beyond the picture, which is padded right and
    bottom to multiples of 64, as the model's config says.
    """
    whole = Box(0, 0, *pixels.shape[:2])
    rows, columns = part.cut(whole).within(whole)
    values = np.ascontiguousarray(pixels[rows, columns], np.float32).transpose(2, 0, 1)[None]
    x = torch.from_numpy(values).to(model.prior.median.device).contiguous() / np.iinfo(pixels.dtype).max
    pad = (0, part.size[1] - x.shape[3], 0, part.size[0] - x.shape[2])
    return F.pad(x, pad, mode="replicate" if model.config.padding == "edge" else "constant")


def check_finite(*latents: Tensor) -> None:
    if not all(torch.isfinite(latent).all() for latent in latents):
        raise WeightsError("the network's output is not finite: are the weights damaged?")
