"""Rate-distortion points as published by others: the layout in published.json is ours, each curve names its source.

A curve is of a data set; PSNR is the mean over pictures of the per-picture RGB PSNR, bpp the mean over pictures.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from .errors import ResultsError
from .metrics import ms_ssim_db

_FILE = Path(__file__).with_name("published.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A codec's curve, published or measured. `points` are (bpp, PSNR in dB) by rising rate, what else there is of each is None
    where nobody knows it; seconds are per megapixel, measured.
    """

    name: str
    label: str
    kind: str  # "model", "peer" or "published"
    source: str
    points: tuple[tuple[float, float], ...]
    ms_ssim_db: tuple[float | None, ...]
    qualities: tuple[float | None, ...] = ()
    encode_s: float | None = None
    decode_s: float | None = None
    peak_mib: tuple[float | None, float | None] = (None, None)  # encoding, decoding
    disturbed: bool = False
    settings: str = ""
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    name: str
    title: str
    pictures: int
    pixels_sha256: str | None  # of the sorted digests of its pictures' pixels, where we know it


@functools.cache
def published_curves(dataset: str) -> dict[str, Curve]:
    """The curves of a data set ("kodak", "tecnick" or "clic-pro-val") by name. Raises ResultsError for another one.

    >>> published_curves("kodak")["vtm-17.0"].points[0]
    (0.131, 29.04)
    """
    content = _content()
    if dataset not in content["datasets"]:
        raise ResultsError(f"no published curves of {dataset!r}; there are {', '.join(content['datasets'])}")
    return {
        curve["name"]: Curve(
            name=curve["name"],
            label=curve["label"],
            kind="published",
            source=content["sources"][curve["source"]],
            points=tuple((point[0], point[1]) for point in curve["points"]),
            ms_ssim_db=tuple(ms_ssim_db(point[2]) if len(point) > 2 else None for point in curve["points"]),
            notes=(curve["note"],) if "note" in curve else (),
        )
        for curve in content["curves"]
        if curve["dataset"] == dataset
    }


def dataset_of(pixel_digests: Iterable[str]) -> Dataset | None:
    """The data set made up of exactly these pictures (`evaluate.pixels_digest` of each), if we know one."""
    digest = hashlib.sha256("".join(sorted(pixel_digests)).encode()).hexdigest()
    return next((d for d in datasets() if d.pixels_sha256 == digest), None)


def datasets() -> list[Dataset]:
    """The data sets with published curves."""
    return [Dataset(name=name, **facts) for name, facts in _content()["datasets"].items()]


@functools.cache
def _content() -> dict:
    return json.loads(_FILE.read_text())
