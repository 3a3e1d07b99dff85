"""The quality whose real file meets a size, a rate or a PSNR: a few encodings, each at a better guess."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable

import numpy as np

from .alpha import alpha_bytes
from .codec import encode_picture
from .container import deflated
from .pictures import Picture, PictureSource, read_picture
from .saving import grey_of
from .tiles import Progress
from .weights import Model, load_model

SIZE_TOLERANCE = 0.02  # files from 2% below the target to the target, if need be to 2% above it
PSNR_TOLERANCE = 0.1  # dB
MAX_PASSES = 8
PATIENCE = 5  # passes after which a file may also be a little above its size

# What is typical of a picture: the means of Kodak's in results/kodak/fast.json. They decide how many passes it takes,
# not what comes out.
_QUALITY = (1, 15, 30, 45, 60, 75, 90, 100)
_TYPICAL_LOG_BPP = (-3.77, -3.09, -2.34, -1.62, -0.95, -0.39, 0.08, 0.35)
_TYPICAL_PSNR = (24.5, 26.2, 28.2, 30.5, 33.2, 36.0, 38.7, 40.5)


@dataclasses.dataclass(frozen=True)
class Controlled:
    """A file, its quality 1..100 and what it `reached`: bytes, bits per pixel or dB, whichever was asked for.

    `passes` is the number of encodings it took. `note` says why the target was missed; None where it was not.
    """

    data: bytes = dataclasses.field(repr=False)
    quality: float
    reached: float
    passes: int
    note: str | None = None


def encode_to_target(
    model: Model,
    picture: PictureSource | Picture,
    *,
    size: float | None = None,
    bpp: float | None = None,
    psnr: float | None = None,
    exact: bool = True,
    effort: int | None = None,
    tile: int | None = None,
    progress: Progress | None = None,
) -> Controlled:
    """Encode a picture to `size` bytes, to `bpp` bits per pixel (both of the whole file) or to `psnr` dB. `model` and `picture`
    are what `mlic.encode` takes, but no tensor.

    A size or rate comes out at most 2% below the target and not above it, or, where that takes too many passes, at most
    2% above; a PSNR (RGB, of what the decoder gives; with alpha, of the pixels that show) within 0.1 dB. A target out
    of reach gives the closest file, and a note. `effort` is spent at each pass, and `progress` starts anew with each pass.
    ValueError for a model with one rate, and unless exactly one target is given.
    """
    given = {name: value for name, value in (("size", size), ("bpp", bpp), ("psnr", psnr)) if value is not None}
    if len(given) != 1:
        raise ValueError(f"give one of size, bpp and psnr, not {' and '.join(given) or 'none'}")
    [(kind, target)] = given.items()
    if not 0 < target < math.inf:
        raise ValueError(f"{kind} must be a positive number, not {target!r}")
    model = load_model(model)
    if not model.config.variable_rate:
        raise ValueError(f"model {model.config.name!r} has one rate: {kind} cannot be chosen")
    if not isinstance(picture, Picture):
        picture = read_picture(picture)
        for note in picture.notes:
            warnings.warn(note, stacklevel=2)
    pixels = picture.pixels.shape[0] * picture.pixels.shape[1]
    unit = 1 if kind == "size" else 8 / pixels
    kept = 0 if kind == "psnr" else unit * _kept_bytes(picture)
    room = max(target - kept, 1e-9 * target)  # for what depends on the quality
    top = (model.config.quality_levels - 1) * 256
    results: dict[int, Controlled] = {}

    def measure(code: int) -> float:
        quality = 1 + 99 * code / top
        how = {"exact": exact, "effort": effort, "tile": tile, "progress": progress}
        coded = encode_picture(model, picture, quality, reconstruct=kind == "psnr", **how)
        reached = _psnr(picture, coded.reconstruction) if kind == "psnr" else len(coded.data) * unit
        results[code] = Controlled(coded.data, quality, reached, len(results) + 1)
        return reached - target if kind == "psnr" else math.log((reached - kept) / room)

    qualities = np.linspace(1, 100, 100)  # a guess of the error at each
    if kind == "psnr":
        typical = np.interp(qualities, _QUALITY, _TYPICAL_PSNR) - target
        window = (-PSNR_TOLERANCE, PSNR_TOLERANCE, PSNR_TOLERANCE)
    else:
        typical = np.interp(qualities, _QUALITY, _TYPICAL_LOG_BPP) - math.log(room * 8 / pixels / unit)
        tolerance = min(SIZE_TOLERANCE * target / room, 5 * SIZE_TOLERANCE)
        window = (math.log(1 - tolerance), 0.0, math.log(1 + tolerance))
    code, error = search(measure, (qualities - 1) / 99 * top, typical, window)
    best, note = results[code], None
    if not window[0] <= error <= window[2]:
        which = {0: "lowest", top: "highest"}.get(code, "nearest")
        of_what, digits = {"size": ("bytes", ".0f"), "bpp": ("bits per pixel", ".4g"), "psnr": ("dB", ".4g")}[kind]
        note = f"{target:{digits}} {of_what} cannot be reached: the {which} quality gives {best.reached:{digits}}"
    return dataclasses.replace(best, passes=len(results), note=note)


def _kept_bytes(picture: Picture) -> int:
    """What a file has of a picture at any quality, nearly: metadata and alpha."""
    metadata = [deflated(data) for data in (picture.icc, picture.exif, picture.xmp) if data]
    return sum(map(len, metadata)) + (0 if picture.alpha is None else len(alpha_bytes(picture.alpha)))


def search(
    measure: Callable[[int], float], codes: np.ndarray, typical: np.ndarray, window: tuple[float, float, float]
) -> tuple[int, float]:
    """Find the whole number, within codes[0]..codes[-1], at which a growing function falls into a window around zero.

    `typical` guesses the function at `codes`; both grow. `window` = (low, high, highest): values in low..high are
    wanted; after PATIENCE calls those up to `highest` do. -> (the best number found, the function there).

    >>> search(lambda n: n / 7 - 100, np.array([0, 1000]), np.array([-90.0, 20.0]), (-0.2, 0.2, 0.2))
    (700, 0.0)
    """
    low, high, highest = window
    aim = (low + high) / 2
    tried: dict[int, float] = {}
    ends: dict[bool, tuple[int, float, float]] = {}  # nearest below the aim, above it: number, typical value, error
    slope, moved = 1.0, None  # of the function against the typical one; which end was replaced last
    code = round(np.interp(aim, typical, codes))
    while True:
        value = tried[code] = measure(code)
        if low <= value <= (high if len(tried) < PATIENCE else highest) or len(tried) == MAX_PASSES:
            break
        at, off = np.interp(code, codes, typical), min(max(value - aim, -99.0), 99.0)  # a PSNR can be infinite
        above = off > 0
        if above in ends:
            _, old_at, old_off = ends[above]
            slope = min(max((off - old_off) / (at - old_at), 0.3), 3.0)
            if moved == above and len(ends) == 2:  # Illinois: an end that stays counts for less
                ends[not above] = (*ends[not above][:2], ends[not above][2] / 2)
        ends[above], moved = (code, at, off), above
        if len(ends) == 2:
            (first, first_at, first_off), (last, last_at, last_off) = ends[False], ends[True]
            between = first_at - first_off * (last_at - first_at) / (last_off - first_off)
            code = min(max(round(np.interp(between, typical, codes)), first + 1), last - 1)
        else:
            code = round(np.interp(at - off / slope, typical, codes))
        if code in tried:  # no number is left between the ends, or the next one is beyond codes
            break
    return min(tried.items(), key=lambda item: (not low <= item[1] <= high, abs(item[1]), item[0]))


def _psnr(picture: Picture, reconstruction: np.ndarray) -> float:
    """RGB PSNR in dB, of the pixels that show if any do; the peak is that of the picture's type."""
    original = picture.pixels
    if picture.grey:
        original, reconstruction = original[..., 0], grey_of(reconstruction)
    if picture.alpha is not None and picture.alpha.any():
        original, reconstruction = original[picture.alpha > 0], reconstruction[picture.alpha > 0]
    error = float(np.mean(np.square(original.astype(np.float32) - reconstruction), dtype=np.float64))
    return 10 * math.log10(np.iinfo(original.dtype).max ** 2 / error) if error else math.inf
