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

_FILE = Path(__file__).with_name("published.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedCurve:
    """`points` are (bits per pixel, dB) by rising rate; `ms_ssim` is per point, None where it was not published."""

    dataset: str
    name: str
    label: str
    source: str
    note: str
    points: tuple[tuple[float, float], ...]
    ms_ssim: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    name: str
    title: str
    pictures: int
    pixels_sha256: str | None  # of the sorted digests of its pictures' pixels, where we know it


@functools.cache
def published_curves(dataset: str) -> dict[str, PublishedCurve]:
    """The curves of a data set ("kodak", "tecnick" or "clic-pro-val") by name. Raises ResultsError for another one.

    >>> published_curves("kodak")["vtm-17.0"].points[0]
    (0.131, 29.04)
    """
    content = _content()
    if dataset not in content["datasets"]:
        raise ResultsError(f"no published curves of {dataset!r}; there are {', '.join(content['datasets'])}")
    return {
        curve["name"]: PublishedCurve(
            dataset=dataset,
            name=curve["name"],
            label=curve["label"],
            source=content["sources"][curve["source"]],
            note=curve.get("note", ""),
            points=tuple((point[0], point[1]) for point in curve["points"]),
            ms_ssim=tuple(point[2] if len(point) > 2 else None for point in curve["points"]),
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
