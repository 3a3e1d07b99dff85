"""Results files: what one codec did on some pictures, as JSON. docs/evaluation.md defines the measures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import ResultsError
from .saving import write_whole

FORMAT = "mlic-results-1"
MEASURES = ("bpp", "psnr", "ms_ssim", "ms_ssim_db", "encode_s", "decode_s")


@dataclasses.dataclass(kw_only=True)
class Results:
    """One codec at some qualities. Plain data: what is here is what the file holds.

    `codec` says what made the files: name, label, kind ("model" or "peer"), settings, software and, for a model, the
    digest of its weights. `pictures` holds, per picture, name, size, digest of its pixels, peak memory and one point
    for each quality; a picture that failed, or a point, has "error" instead.
    """

    codec: dict[str, Any]
    qualities: list[float | None]
    threads: int
    jobs: int
    environment: dict[str, Any]
    disturbed: bool = False
    pictures: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def complete(self) -> list[dict[str, Any]]:
        """The pictures measured at every quality: those the means are over."""
        return [p for p in self.pictures if not failures_of(p)]

    def means(self) -> list[dict[str, Any]]:
        """Per quality, the plain mean over the complete pictures of each measure.

        A mean is None where a picture lacks the measure: MS-SSIM of small pictures, PSNR of an exact reconstruction.
        """
        pictures = self.complete()
        rows = []
        for index, quality in enumerate(self.qualities if pictures else []):
            points = [picture["points"][index] for picture in pictures]
            rows.append({"quality": quality, **{key: _mean([point[key] for point in points]) for key in MEASURES}})
        return rows

    def failures(self) -> list[str]:
        """One line for each failure."""
        return [f"{p['picture']}: {text}" for p in self.pictures for text in failures_of(p)]

    def save(self, path: Path) -> None:
        """Write the file whole, means and failures with it."""
        content = {
            "format": FORMAT,
            **dataclasses.asdict(self),
            "means": self.means(),
            "means_over_pictures": len(self.complete()),
            "failures": self.failures(),
        }
        write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file. Raises ResultsError when it is missing, no results file, or one of another version."""
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise ResultsError(f"results {path} cannot be read: {error.strerror}") from None
        except ValueError:
            raise ResultsError(f"{path} is no results file: not JSON") from None
        kind = content.get("format") if isinstance(content, dict) else None
        if kind != FORMAT:
            if isinstance(kind, str) and kind.startswith("mlic-results-"):
                raise ResultsError(f"results {path} are of version {kind}, this mlic reads {FORMAT}: measure again")
            raise ResultsError(f"{path} is no results file: its format is {kind!r}, not {FORMAT!r}")
        try:
            return cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)})
        except KeyError as error:
            raise ResultsError(f"results {path} are damaged: no field {error}") from None


def failures_of(picture: dict[str, Any]) -> list[str]:
    """What went wrong with one picture of a results file, a line each.

    >>> failures_of({"picture": "a.png", "points": [{"quality": 50, "error": "too large"}]})
    ['at quality 50: too large']
    """
    if "error" in picture:
        return [picture["error"]]
    return [f"at quality {p['quality']:g}: {p['error']}" if p["quality"] is not None else p["error"]
            for p in picture["points"] if "error" in p]  # fmt: skip


def notes_on(results: Results) -> list[str]:
    """What a reader of the means must know: failures, mixed sizes, missing measures, disturbed timings."""
    notes = []
    done, failed = results.complete(), results.failures()
    if failed:
        notes.append(
            f"{len(results.pictures) - len(done)} of {len(results.pictures)} pictures failed; means are over the others"
        )
    sizes = sorted({(p["width"] * p["height"], f"{p['width']}x{p['height']}") for p in done})
    if sizes and sizes[0][0] != sizes[-1][0]:
        notes.append(f"pictures of different sizes, {sizes[0][1]} to {sizes[-1][1]}: each counts the same in the means")
    points = [point for picture in done for point in picture["points"]]
    if any(point["ms_ssim"] is None for point in points):
        notes.append("no mean MS-SSIM: pictures below 161 pixels a side have none")
    if any(point["psnr"] is None for point in points):
        notes.append("no mean PSNR where a picture came back exactly")
    if results.disturbed:
        notes.append("times were taken beside other work: not for comparing speed")
    return notes


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else math.fsum(values) / len(values)
