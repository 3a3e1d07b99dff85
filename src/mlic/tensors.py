"""Torch tensors and numpy arrays in and out of files; a batch goes through the network together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .codec import FileSource, check_finite, encode_picture, file_bytes, model_for, quality_code, to_tensor
from .coder import SymbolDecoder, SymbolEncoder
from .container import DIGEST_BYTES, MAX_SIDE, CodedTile, MlicFile
from .decoding import arithmetic, check_plausible, check_quality, decode_file, level_tensor, prior_row
from .errors import MlicError, PictureError
from .feedback import search_with_feedback
from .model import STRIDE
from .pictures import Picture
from .refine import Search
from .saving import array_of
from .strategies import Read, Write
from .tiles import Box, default_side
from .weights import Model, load_model


def encode_tensor(
    x: Tensor,
    quality: float | None = None,
    model: Model = "fast",
    *,
    exact: bool = True,
    effort: int | None = None,
) -> bytes:
    """Encode a picture (3, H, W) or, grey, (1, H, W): uint8, or float in 0..1, which is taken at 16 bits.

    The file is marked as one of 8 bits. `effort`: as for `mlic.encode`. Raises PictureError with the remedy for other tensors.

    >>> data = encode_tensor(torch.rand(3, 20, 30), quality=30)
    >>> decode_batch([data]).shape
    torch.Size([1, 3, 20, 30])
    >>> encode_tensor(torch.rand(20, 30, 3))
    Traceback (most recent call last):
    mlic.errors.PictureError: a tensor of shape (20, 30, 3) is not (3, H, W): give x.permute(2, 0, 1)
    """
    _check_tensor(x, "3 H W")
    network = load_model(model, device=x.device)
    picture = Picture(_pixels(x), x.shape[0] == 1)
    data = encode_picture(network, picture, quality, exact=exact, effort=effort).data
    return dataclasses.replace(MlicFile.from_bytes(data), depth=8).to_bytes()


@torch.inference_mode()
def encode_batch(
    x: Tensor,
    quality: float | None = None,
    model: Model = "fast",
    *,
    exact: bool = True,
    effort: int | None = None,
) -> list[bytes]:
    """Encode pictures of one size, (B, 3, H, W) or, grey, (B, 1, H, W): uint8, or float in 0..1, taken at 16 bits.

    They go through the entropy model together, where the model is or, for a name, where `x` is; each file is that of the
    picture coded alone. The files are marked as ones of 8 bits. Pictures so large that they are tiled are coded one by
    one, and so are all without `exact`, which could not be decoded alone. Raises PictureError with the remedy for other
    tensors.

    >>> files = encode_batch(torch.rand(4, 3, 20, 30), quality=30)
    >>> decode_batch(files).shape
    torch.Size([4, 3, 20, 30])
    >>> encode_batch(torch.rand(3, 20, 30))
    Traceback (most recent call last):
    mlic.errors.PictureError: a tensor of shape (3, 20, 30) is not (B, 3, H, W): give x[None]
    """
    _check_tensor(x, "B 3 H W")
    network = load_model(model, device=x.device)
    height, width = x.shape[2:]
    if default_side(height, width) or not exact or max(height, width) > MAX_SIDE:
        return [encode_tensor(one, quality, network, exact=exact, effort=effort) for one in x]
    code = quality_code(network, quality)
    level, coding = level_tensor(network, code), arithmetic(network, True)
    whole, search = Box(0, 0, height, width), Search(network, effort, level)
    box = whole.aligned(STRIDE)
    # one by one and in one layout: floating point may differ in others, and with it a symbol
    pictures = [to_tensor(network, _pixels(one), box) for one in x]
    *latents, feedback = zip(*(search_with_feedback(search, one, part=box, seen=box, whole=whole) for one in pictures))
    y, z = map(torch.cat, latents)
    check_finite(y, z)
    encoders = [SymbolEncoder(network.tables, prior_row(network, code)) for _ in x]
    coding.code(Write(y, z, network.config.slices, search.gaussian, encoders, sum(feedback, [])), level)
    files = []
    for encoder in encoders:
        stream, escapes, checksum = encoder.finish()
        file = MlicFile(
            width=width,
            height=height,
            grey=x.shape[1] == 1,
            exact=True,
            quality=code,
            model=network.config.name,
            digest=network.digest[:DIGEST_BYTES],
            tiles=(CodedTile(checksum=checksum, escapes=escapes, stream=stream),),
        )
        files.append(file.to_bytes())
    return files


@torch.no_grad()
def decode_batch(files: Sequence[bytes], model: Model | None = None, device: str | torch.device | None = None) -> Tensor:
    """Decode files of pictures of one size and one model -> (B, 3, H, W) float32 in 0..1, in steps of 1/255 (1/65535).

    Grey pictures come as three equal channels; alpha and metadata are left out. The network runs once for all files,
    where a loaded `model` is, otherwise on `device` (default: the CPU), which may give another last bit here and there
    than `mlic.decode`; where some are tiled or of floating point, they are decoded one by one. Raises PictureError for
    pictures of several sizes, and what `mlic.decode` does.
    """
    if not files:
        raise PictureError("no files: a batch has at least one")
    parsed = [_parse(data, i) for i, data in enumerate(files)]
    sizes = sorted({(file.width, file.height) for file in parsed})
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for width, height in sizes[:4])
        raise PictureError(f"pictures of {len(sizes)} sizes ({listed}) in one batch: decode each size by itself")
    networks = [model_for(file, model, device or "cpu") for file in parsed]
    network, first = networks[0], parsed[0]
    if any(file.tile or not file.exact or file.digest != first.digest for file in parsed):
        out = [_tensor(decode_file(one, file)) for one, file in zip(networks, parsed)]
        return torch.stack(out).to(device or network.prior.median.device)
    sources = []
    for file in parsed:
        check_quality(network, file)
        check_plausible(network, file, file.tiles[0], Box(0, 0, first.height, first.width).aligned(STRIDE))
        tile, row = file.tiles[0], prior_row(network, file.quality)
        sources.append(SymbolDecoder(network.tables, tile.stream, tile.escapes, tile.checksum, row))
    level = torch.cat([level_tensor(network, file.quality) for file in parsed]) if network.config.variable_rate else None
    z_size = (-(-first.height // STRIDE), -(-first.width // STRIDE))
    y_hat = arithmetic(network, True).code(Read(z_size, network.gaussian, sources), level)
    for source in sources:
        source.finish()
    x = network.synthesise(y_hat.float(), level)[:, :, : first.height, : first.width].clamp(0, 1)
    peaks = x.new_tensor([2.0**file.depth - 1 for file in parsed])[:, None, None, None]
    x = (x * peaks).round()
    grey = torch.tensor([file.grey for file in parsed], device=x.device)[:, None, None, None]
    return (torch.where(grey, x.mean(1, keepdim=True).round(), x) / peaks).to(device or x.device)


def decode_array(data: FileSource, model: Model | None = None) -> np.ndarray:
    """Decode a file as `mlic.decode` does -> (H, W, C) uint8 or uint16; C is 1 for grey, 3 for RGB, and one more with alpha.

    >>> decode_array(encode_tensor(torch.rand(1, 20, 30), quality=30)).shape
    (20, 30, 1)
    """
    file = MlicFile.from_bytes(file_bytes(data))
    return array_of(decode_file(model_for(file, model), file))


def _tensor(picture: Picture) -> Tensor:
    array = array_of(dataclasses.replace(picture, alpha=None))
    values = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1).expand(3, -1, -1)
    return values / np.iinfo(array.dtype).max


def _parse(data: bytes, index: int) -> MlicFile:
    try:
        return MlicFile.from_bytes(data)
    except MlicError as error:
        raise type(error)(f"file {index} of the batch: {error}") from None


def _pixels(x: Tensor) -> np.ndarray:
    """(3, H, W) or (1, H, W) -> (H, W, 3): uint8 as it is; float in 0..1 to 0..65535, uint16."""
    kind = np.uint8 if x.dtype == torch.uint8 else np.uint16
    values = x if kind == np.uint8 else (x.detach().float() * 65535).round().to(torch.int32)
    return np.ascontiguousarray(values.permute(1, 2, 0).expand(-1, -1, 3).cpu().numpy(), kind)


def _check_tensor(x: Tensor, form: str) -> None:
    """`form` is "3 H W" or "B 3 H W"; one channel will do as well."""
    if not isinstance(x, Tensor):
        remedy = {list: "torch.stack(x)", tuple: "torch.stack(x)", np.ndarray: "torch.from_numpy(x)"}.get(type(x), "a tensor")
        raise PictureError(f"a {type(x).__name__} is no tensor: give {remedy}")
    names, shape = form.split(), tuple(x.shape)
    if len(shape) != len(names) or shape[-3] not in (1, 3):
        batch = names[0] == "B"
        remedy = {
            (False, 2): "x[None] for a grey picture",
            (False, 3): "x.permute(2, 0, 1)" if shape[-1] in (1, 3) else "x[:3]" if shape[0] == 4 else "",
            (False, 4): "x[0]" if shape[0] == 1 else "a batch to encode_batch",
            (True, 3): "x[None]" if shape[0] in (1, 3) else "x[:, None] for grey pictures",
            (True, 4): "x.permute(0, 3, 1, 2)" if shape[-1] in (1, 3) else "x[:, :3]" if shape[1] == 4 else "",
        }.get((batch, len(shape)), "")
        wrong = f"a tensor of shape {shape} is not ({', '.join(names)})"
        raise PictureError(f"{wrong}: give {remedy}" if remedy else wrong)
    if x.numel() == 0:
        raise PictureError(f"a tensor of shape {shape} has no pixels")
    if x.dtype != torch.uint8 and not x.dtype.is_floating_point:
        raise PictureError(f"a tensor of {x.dtype} and shape {shape}: give torch.uint8, or float in 0..1")
    if x.dtype != torch.uint8 and not (x.min() >= 0 and x.max() <= 1):
        remedy = "finite values" if not x.isfinite().all() else "x / 255" if x.max() > 2 else "x.clamp(0, 1)"
        wrong = f"a tensor of shape {shape} with values from {x.min():g} to {x.max():g}, not 0..1"
        raise PictureError(f"{wrong}: give {remedy}")
