"""`mlic compare`: measured and published curves against an anchor, as one table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from .bdrate import Delta, compare_curves
from .errors import MlicError, ResultsError
from .published import Curve, dataset_of, datasets, published_curves
from .results import Results, notes_on

PUBLISHED = ("vtm-17.0", "mlic-published", "mlic+-published", "mlic++-published", "evc-ll", "hpcm-large")
ENVIRONMENT = "{processor}, {cores} cores, {memory_gib} GiB, {system}, Python {python}, torch {torch}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A curve with its deltas to the anchor, or the reason why there are none."""

    curve: Curve
    delta: Delta | None
    problem: str = ""

    @property
    def rate(self) -> float | None:
        """BD-rate in percent, of the cubic fit where there is one."""
        return self.delta and (self.delta.rate_pchip if self.delta.rate_cubic is None else self.delta.rate_cubic)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything a table or report shows. `notes` are about the whole, rows carry their own."""

    anchor: Curve
    dataset: str
    pictures: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    environments: tuple[str, ...]


def compare(
    results: Sequence[Results],
    *,
    anchor: str = "vtm-17.0",
    published: Sequence[str] = PUBLISHED,
    dataset: str | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Set the curves of `results`, and published ones, against the curve called `anchor`.

    Published curves are only used where the results are of the very pictures of their data set, or, for a data set
    whose pictures we do not know, of as many and `dataset` says so. A curve has deltas where its means are over the same
    pictures as the anchor's, none having failed. Measured curves come before published ones of the same name. Raises
    ResultsError for another `dataset`, results of different pictures, two of one name, or an anchor unknown or without points.
    """
    notes = list(notes)
    pictures = _pictures(results)
    dataset = _dataset(pictures, dataset, notes)
    curves = _measured_curves(results)
    if dataset:
        available = published_curves(dataset)
        wanted = dict.fromkeys([anchor, *published])
        curves = {name: available[name] for name in wanted if name in available} | curves
        if absent := [name for name in published if name not in available]:
            notes.append(f"not published for {dataset}: {', '.join(absent)}")
    if anchor not in curves:
        there = f"there are {', '.join(curves)}" if curves else "there are none"
        if not dataset:
            there += "; --anchor takes one of them, for the published curves are of other pictures than these results"
        elif more := [name for name in published_curves(dataset) if name not in curves]:
            there += f", and published {', '.join(more)}"
        raise ResultsError(f"no curve called {anchor!r}: {there}")
    if not curves[anchor].points:
        raise ResultsError(f"the curve called {anchor!r} has no points: no picture of its results was measured")
    means_over = {name: {frozenset(pictures)} for name in curves if curves[name].kind == "published"}
    for result in results:
        means_over.setdefault(result.codec["name"], set()).add(frozenset(p["picture"] for p in result.complete()))
    rows = tuple(
        _row(curves[anchor], curve, alike=len(means_over[anchor] | means_over[name]) == 1) for name, curve in curves.items()
    )
    return Comparison(
        anchor=curves[anchor],
        dataset=dataset or f"{len(pictures)} pictures",
        pictures=len(pictures),
        rows=tuple(sorted(rows, key=lambda row: (row.rate is None, row.rate or 0.0))),
        notes=tuple(notes),
        environments=_environments(results),
    )


def _environments(results: Sequence[Results]) -> tuple[str, ...]:
    """Where results were measured; with several places, which of them were measured in each."""
    labels: dict[str, dict[str, None]] = {}
    for result in results:
        labels.setdefault(ENVIRONMENT.format_map(result.environment), {})[result.codec["label"]] = None
    return tuple(f"{place} ({', '.join(names)})" if len(labels) > 1 else place for place, names in labels.items())


def as_json(comparison: Comparison) -> str:
    """The whole comparison as JSON."""
    return json.dumps(dataclasses.asdict(comparison), indent=1, allow_nan=False)


def table_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the table, as text."""
    titles = ["codec", "BD-rate cubic", "pchip", "BD-PSNR", "overlap dB", "of bpp", "points", "enc s/MP", "dec s/MP", "from"]
    lines = []
    for row in comparison.rows:
        curve, delta = row.curve, row.delta
        mark = "*" if curve.disturbed else ""
        lines.append(
            [
                curve.label + (" (anchor)" if curve.name == comparison.anchor.name else ""),
                _number(delta and delta.rate_cubic, "+.2f", "%"),
                _number(delta and delta.rate_pchip, "+.2f", "%"),
                _number(delta and delta.psnr_cubic, "+.2f"),
                _interval(delta and delta.overlap, ".1f"),
                _interval(delta and delta.rate_overlap, ".2f"),
                str(len(curve.points)),
                _number(curve.encode_s, ".2f", mark),
                _number(curve.decode_s, ".2f", mark),
                "published" if curve.kind == "published" else "measured",
            ]
        )
    return titles, lines


def remarks(comparison: Comparison) -> list[str]:
    """Every warning and note, a line each."""
    lines = list(comparison.notes)
    for row in comparison.rows:
        texts = row.delta.warnings if row.delta else (row.problem,)
        lines += [f"{row.curve.label}: {text}" for text in (*texts, *row.curve.notes)]
    if any(row.curve.disturbed for row in comparison.rows):
        lines.append("* taken beside other work on the machine: an upper bound, not for comparing speed")
    if len(comparison.environments) > 1:
        lines.append("measured on several machines: times compare within each")
    return lines


def as_text(comparison: Comparison) -> str:
    """The table and its remarks, for a terminal."""
    titles, lines = table_rows(comparison)
    widths = [max(len(line[i]) for line in [titles, *lines]) for i in range(len(titles))]
    rows = ["  ".join(f"{c:{'<' if i in (0, 9) else '>'}{w}}" for i, (c, w) in enumerate(zip(line, widths))).rstrip()
            for line in [titles, *lines]]  # fmt: skip
    return "\n".join([_headline(comparison), "", *rows, *([""] + [f"- {r}" for r in remarks(comparison)])])


def as_markdown(comparison: Comparison) -> str:
    """The table, its remarks, our models' points, and every codec's settings and source, as Markdown."""
    titles, lines = table_rows(comparison)
    marks = ["---" if i in (0, 9) else "---:" for i in range(len(titles))]
    table = ["| " + " | ".join(line) + " |" for line in [titles, marks, *lines]]
    title = f"# BD-rates on {comparison.dataset}"
    parts = [title, "", _headline(comparison), "", *table, "", *[f"- {line}" for line in remarks(comparison)], ""]
    for curve in (row.curve for row in comparison.rows if row.curve.kind == "model"):
        parts += [f"## {curve.label}", "", *_points_table(curve), ""]
    parts += ["## Settings and sources", ""]
    for row in comparison.rows:
        curve = row.curve
        parts.append(f"- **{curve.label}**: {curve.source}" + (f"; {curve.settings}" if curve.settings else "") + ".")
    if comparison.environments:
        parts += ["", "Measured on: " + "; ".join(comparison.environments) + "."]
    return "\n".join(parts) + "\n"


def _points_table(curve: Curve) -> list[str]:
    lines = ["| quality | bpp | PSNR dB | MS-SSIM dB |", "| ---: | ---: | ---: | ---: |"]
    for quality, (bpp, psnr), similarity in zip(curve.qualities, curve.points, curve.ms_ssim_db):
        lines.append(f"| {_number(quality, 'g')} | {bpp:.4f} | {psnr:.3f} | {_number(similarity, '.3f')} |")
    return lines


def _headline(comparison: Comparison) -> str:
    origin = "published" if comparison.anchor.kind == "published" else "measured"
    return (
        f"BD-rate of RGB PSNR against {comparison.anchor.label} ({origin}) on {comparison.dataset}; "
        "below 0 is better. BD-PSNR is of the cubic fit."
    )


def _row(anchor: Curve, curve: Curve, *, alike: bool) -> Row:
    if not alike:
        return Row(curve=curve, delta=None, problem="no BD-rate: the means are not all over the anchor's pictures")
    try:
        return Row(curve=curve, delta=compare_curves(anchor.points, curve.points))
    except MlicError as error:
        return Row(curve=curve, delta=None, problem=str(error))


def _pictures(results: Sequence[Results]) -> dict[str, str]:
    """Name and digest of the pictures that all results were asked to measure."""
    first: dict[str, str] = {}
    for result in results:
        own = {p["picture"]: p.get("pixels_sha256", "") for p in result.pictures}
        first = first or own
        if differing := sorted(name for name in first.keys() | own.keys() if first.get(name) != own.get(name)):
            raise ResultsError(
                f"results of {results[0].codec['name']} and {result.codec['name']} are of different pictures: {differing[0]}"
                + (f" and {len(differing) - 1} more" if len(differing) > 1 else "")
            )
    return first


def _dataset(pictures: dict[str, str], asked: str | None, notes: list[str]) -> str | None:
    """The data set the pictures are, checked as far as it goes; `asked`, or Kodak, where there are no pictures."""
    if not pictures:
        return asked or "kodak"
    known = dataset_of(pictures.values())
    claim = next((d for d in datasets() if d.name == asked), None)
    if claim is None or claim == known:
        return asked or (known.name if known else None)
    if claim.pixels_sha256 or claim.pictures != len(pictures):
        raise ResultsError(
            f"the results are of {len(pictures)} pictures that are not the {claim.pictures} of {asked}: its published "
            "curves do not compare; take a measured --anchor and leave --dataset out"
        )
    notes.append(f"that these {len(pictures)} pictures are {asked} was told, not checked")
    return asked


def _measured_curves(results: Sequence[Results]) -> dict[str, Curve]:
    """Curves by name. Results of one-rate models of one name are points of one curve."""
    groups: dict[str, list[Results]] = {}
    for result in results:
        groups.setdefault(result.codec["name"], []).append(result)
    curves = {}
    for name, group in groups.items():
        if len(group) > 1 and any(result.qualities != [None] for result in group):
            raise ResultsError(f"two results are called {name!r}: measure one of them with another --name")
        curves[name] = _measured_curve(name, group)
    return curves


def _measured_curve(name: str, group: Sequence[Results]) -> Curve:
    codec = group[0].codec
    means = [mean for result in group for mean in result.means() if mean["psnr"] is not None]
    pictures = [picture for result in group for picture in result.complete()]
    megapixels = sum(p["width"] * p["height"] for p in pictures) / 1e6 / len(pictures) if pictures else 1
    peaks = [[p[f"{task}_peak_mib"] for p in pictures if p[f"{task}_peak_mib"]] for task in ("encode", "decode")]
    settings = ", ".join(f"{key} {value}" for key, value in codec["settings"].items() if value != "quality")
    if digests := [result.codec["weights"][:16] for result in group if "weights" in result.codec]:
        settings += f", weights {' '.join(digests)}"
    memory = "".join(f", peak {max(own):.0f} MiB to {task}" for own, task in zip(peaks, ("encode", "decode")) if own)
    qualities = tuple(mean["quality"] for mean in means)
    if None not in qualities:
        settings += f", at quality {' '.join(f'{q:g}' for q in qualities)}"
    return Curve(
        name=name,
        label=codec["label"],
        kind=codec["kind"],
        source=f"measured, {codec['software']}, {group[0].threads} thread(s){memory}",
        points=tuple((mean["bpp"], mean["psnr"]) for mean in means),
        ms_ssim_db=tuple(mean["ms_ssim_db"] for mean in means),
        qualities=qualities,
        encode_s=sum(m["encode_s"] for m in means) / len(means) / megapixels if means else None,
        decode_s=sum(m["decode_s"] for m in means) / len(means) / megapixels if means else None,
        peak_mib=(max(peaks[0], default=None), max(peaks[1], default=None)),
        disturbed=any(result.disturbed for result in group),
        settings=settings,
        notes=tuple(dict.fromkeys(n for r in group for n in notes_on(r) if not n.startswith("times"))),
    )


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _interval(value: tuple[float, float] | None, form: str) -> str:
    return "-" if value is None else f"{value[0]:{form}}-{value[1]:{form}}"
