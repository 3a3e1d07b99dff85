"""A picture to the bytes of a file, and back."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .coder import SymbolDecoder, SymbolEncoder
from .config import CONFIGS
from .container import DIGEST_BYTES, EXACT, FLOAT, GREY, MAX_PIXELS, MAX_SIDE, NO_QUALITY, RGB, MlicFile
from .errors import DamagedFile, PictureError, UnsupportedFile, WeightsError
from .exact import exact_twin
from .model import STRIDE, CompressionModel
from .pictures import Picture, PictureSource, read_picture, to_pillow
from .strategies import Estimate, Read, Write
from .weights import load_model

DEFAULT_QUALITY = 50


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A file's bytes and what its decoder will give: (H, W, 3) uint8."""

    data: bytes
    reconstruction: np.ndarray


def quality_to_code(quality: float, levels: int) -> int:
    """Quality 1..100 -> level in 1/256, as stored in files.

    >>> quality_to_code(1, 64), quality_to_code(100, 64)
    (0, 16128)
    """
    if not (isinstance(quality, (int, float)) and 1 <= quality <= 100):
        raise ValueError(f"quality must be a number from 1 to 100, not {quality!r}")
    return round((quality - 1) / 99 * (levels - 1) * 256)


def encode(
    image: PictureSource,
    quality: float | None = None,
    model: str | CompressionModel = "fast",
    *,
    exact: bool = True,
) -> bytes:
    """Encode a picture: a PIL image, an (H, W, 3) or (H, W) uint8 array, a path or a binary file.

    With `exact` (default) the file decodes on every machine; without, a little faster and only where floating point
    comes out the same as here. `quality` 1..100 (default 50) is for models with a variable rate; giving it to another
    one is a ValueError.
    `model` is a name, a weights file or a loaded model. Raises PictureError or WeightsError.

    >>> data = encode(np.zeros((20, 30, 3), np.uint8), quality=30)
    >>> decode(data).size
    (30, 20)
    """
    network = load_model(model) if isinstance(model, str) else model
    picture = read_picture(image)
    for note in picture.notes:
        warnings.warn(note, stacklevel=2)
    return encode_picture(network, picture, quality, exact=exact).data


def decode(data: bytes, model: str | CompressionModel | None = None) -> Image.Image:
    """Decode the bytes of a .mlic file to a PIL image, mode RGB or L.

    `model` is only needed where the file's weights are not installed. Raises DamagedFile, UnsupportedFile or
    WeightsError.
    """
    file = MlicFile.from_bytes(data)
    network = model_for(file, model)
    return to_pillow(decode_picture(network, file), grey=file.colour == GREY, icc=file.icc)


def model_for(file: MlicFile, model: str | CompressionModel | None = None, device: str = "cpu") -> CompressionModel:
    """The weights a file was made with. Raises WeightsError naming the digest when they are not at hand."""
    wanted = f"model {file.model!r} with weights {file.digest.hex()}"
    if model is None and file.model not in CONFIGS:  # a name from a file is never taken for a path
        raise WeightsError(f"this file needs {wanted}; give its weights file")
    try:
        network = load_model(model or file.model, device=device) if not isinstance(model, CompressionModel) else model
    except WeightsError as error:
        raise WeightsError(f"this file needs {wanted}: {error}") from None
    if network.digest[:DIGEST_BYTES] != file.digest:
        have = network.digest[:DIGEST_BYTES].hex()
        raise WeightsError(f"this file needs {wanted}, but the weights at hand are {network.config.name!r} {have}")
    return network


@torch.inference_mode()
def encode_picture(
    model: CompressionModel, picture: Picture, quality: float | None = None, *, exact: bool = True
) -> Encoded:
    height, width = picture.pixels.shape[:2]
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise PictureError(f"{width}x{height} pixels are too many: at most {MAX_PIXELS >> 20} Mi, {MAX_SIDE} a side")
    code = _quality_code(model, quality)
    level = _level(model, code)
    x = _to_tensor(model, picture.pixels)
    y = model.analyse(x, level)
    z = model.h_a(y)
    if not (torch.isfinite(y).all() and torch.isfinite(z).all()):
        raise WeightsError("the network's output is not finite: are the weights damaged?")
    symbols = SymbolEncoder(model.tables, _prior_row(model, code))
    y_hat = _arithmetic(model, exact).code(Write(y, z, model.config.slices, model.gaussian, symbols), level)
    stream, escapes, checksum = symbols.finish()
    file = MlicFile(
        width=width,
        height=height,
        colour=GREY if picture.grey else RGB,
        arithmetic=EXACT if exact else FLOAT,
        quality=code,
        model=model.config.name,
        digest=model.digest[:DIGEST_BYTES],
        checksum=checksum,
        escapes=escapes,
        stream=stream,
        icc=picture.icc,
    )
    return Encoded(file.to_bytes(), _to_pixels(model.synthesise(y_hat, level), height, width))


@torch.inference_mode()
def decode_picture(model: CompressionModel, file: MlicFile) -> np.ndarray:
    """-> (height, width, 3) uint8. Raises DamagedFile when the symbols fail the file's checksum."""
    if (file.quality == NO_QUALITY) == model.config.variable_rate:
        raise DamagedFile(f"the file's quality does not fit model {model.config.name!r}")
    if model.config.variable_rate and file.quality > (model.config.quality_levels - 1) * 256:
        raise UnsupportedFile(f"quality level {file.quality / 256:g} is beyond model {model.config.name!r}")
    level = _level(model, file.quality)
    z_size = (math.ceil(file.height / STRIDE), math.ceil(file.width / STRIDE))
    prior_row = _prior_row(model, file.quality)
    # before anything as large as the picture is allocated: can so few bytes hold as much as z?
    if 8 * len(file.stream) + 64 < z_size[0] * z_size[1] * model.tables.prior.least_bits(prior_row, model.config.z_channels):
        raise DamagedFile(f"{len(file.stream)} bytes are too few for {file.width}x{file.height} pixels")
    source = SymbolDecoder(model.tables, file.stream, file.escapes, file.checksum, prior_row)
    y_hat = _arithmetic(model, file.arithmetic == EXACT).code(Read(z_size, model.gaussian, source), level)
    source.finish()
    return _to_pixels(model.synthesise(y_hat, level), file.height, file.width)


@torch.inference_mode()
def estimate_bytes(
    model: CompressionModel, picture: Picture, quality: float | None = None, *, exact: bool = True
) -> float:
    """The model's own estimate of a file's size, before tables, headers and rounding to bytes."""
    level = _level(model, _quality_code(model, quality))
    x = _to_tensor(model, picture.pixels)
    y = model.analyse(x, level)
    estimate = Estimate(y, model.h_a(y), model.config.slices, model.gaussian, noisy=False)
    _arithmetic(model, exact).code(estimate, level)
    return float(estimate.y_bits + estimate.z_bits) / 8


def _arithmetic(model: CompressionModel, exact: bool) -> CompressionModel:
    if not exact:
        return model
    try:
        return exact_twin(model)
    except ValueError as error:
        raise WeightsError(f"{error}; only float arithmetic is possible with them") from None


def _quality_code(model: CompressionModel, quality: float | None) -> int:
    if model.config.variable_rate:
        return quality_to_code(DEFAULT_QUALITY if quality is None else quality, model.config.quality_levels)
    if quality is not None:
        raise ValueError(f"model {model.config.name!r} has one rate: quality cannot be chosen")
    return NO_QUALITY


def _level(model: CompressionModel, code: int) -> Tensor | None:
    return None if code == NO_QUALITY else torch.tensor([code / 256], device=model.prior.median.device)


def _prior_row(model: CompressionModel, code: int) -> int:
    """First of the prior's table rows at a level, which is rounded to a whole one."""
    return 0 if code == NO_QUALITY else (code + 128) // 256 * model.config.z_channels


def _to_tensor(model: CompressionModel, pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H', W') float32 in 0..1, padded right and bottom to multiples of 64."""
    x = torch.from_numpy(pixels).to(model.prior.median.device).permute(2, 0, 1)[None].float() / 255
    pad = (0, -pixels.shape[1] % STRIDE, 0, -pixels.shape[0] % STRIDE)
    return F.pad(x, pad, mode="replicate") if model.config.padding == "edge" else F.pad(x, pad)


def _to_pixels(x: Tensor, height: int, width: int) -> np.ndarray:
    x = x[0, :, :height, :width].clamp(0, 1) * 255
    return x.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
