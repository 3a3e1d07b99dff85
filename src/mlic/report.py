"""`mlic report`: a comparison as one self-contained HTML page, or as a figure.

The page is report.html with the data put in as JSON; everything that moves is plain JavaScript in that file.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .compare import Comparison, remarks, table_rows
from .errors import MlicError

TEMPLATE = Path(__file__).with_name("report.html")
COLOURS = (
    "#1c7ed6", "#2f9e44", "#9c36b5", "#0c8599", "#f0b000", "#c2255c", "#7a5c3e", "#5f3dc4", "#94b818", "#38bdf8", "#e599f7", "#868e96",
)  # fmt: skip
PLACE = "@DATA@"  # once in the template, inside a script element of type application/json


def html_report(comparison: Comparison, pictures: Sequence[dict[str, Any]] = ()) -> str:
    """The page: needs no network and no other file. `pictures` are `report_pictures.same_size_pictures`'s."""
    titles, cells = table_rows(comparison)
    data = {
        **dataclasses.asdict(comparison),
        "titles": titles,
        "cells": cells,
        "remarks": remarks(comparison),
        "pictures_shown": list(pictures),
    }
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # so that no text in it can end the script element
    before, after = TEMPLATE.read_text(encoding="utf-8").split(PLACE)
    return before + text + after


def figure_png(comparison: Comparison, path: Path) -> None:
    """RD curves as a PNG file, 1600 pixels wide. Raises MlicError naming the package when matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MlicError("the figure needs the package matplotlib: pip install 'mlic[eval]'") from None
    figure = Figure(figsize=(10, 5.6), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    right = max(rate for rate, _ in comparison.anchor.points) * 1.15
    shown = []
    colours = itertools.cycle(COLOURS)
    for row in comparison.rows:
        curve, rate = row.curve, row.rate
        points = sorted(curve.points)
        if not points:
            continue
        ours, anchor = curve.kind == "model", curve.name == comparison.anchor.name
        axes.plot(
            *zip(*points),
            "--" if curve.kind == "published" else "-",
            marker="o",
            markersize=5 if ours else 3.5,
            linewidth=2.8 if ours else 1.4,
            color="#e8590c" if ours else "#343a40" if anchor else next(colours),
            label=curve.label + (" (anchor)" if anchor else "" if rate is None else f"  {rate:+.1f}%"),
            zorder=3 if ours else 2,
        )
        shown += [noise for rate_of_point, noise in points if rate_of_point <= right]
    axes.set(xlim=(0, right), xlabel="bits per pixel", ylabel="RGB PSNR, dB")
    if shown:
        axes.set_ylim(min(shown) - 0.5, max(shown) + 0.5)
    axes.set_title(f"{comparison.dataset}: BD-rate against {comparison.anchor.label} (dashed: published)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    figure.savefig(path, format="png", metadata={"Software": None})
