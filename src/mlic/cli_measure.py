"""The commands that measure: `mlic eval`, `mlic compare`, `mlic report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .cli import Number, _device, _progress_bar, _say, _set_threads, device_option, force_option, main, reported, together

PATH = click.Path(path_type=Path)
OUTPUT = click.Path(dir_okay=False, path_type=Path)


@main.command("eval")
@click.argument("images", nargs=-1, required=True, type=PATH, metavar="IMAGES...")
@click.option("--model", metavar="NAME|FILE", help="Model to measure. Default: fast.")
@click.option("--codec", metavar="NAME", help="Or: jpeg, jpeg-420, webp, avif, jxl, jpeg2000, heic, x265, vvc.")
@click.option("-q", "--quality", "qualities", multiple=True, type=Number(0), help="May be repeated. Default: 6 to 8 values.")
@click.option("--effort", type=click.IntRange(0, 20), help="As for `mlic encode`, for a model. Default: 4.")
@click.option("--name", help="What to call the model in results. Default: its own name.")
@click.option("-o", "--output", type=OUTPUT, metavar="FILE", help="Results file (JSON). An existing one is continued.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Pictures at once. Disturbs times.")
@device_option
@click.option("-j", "--threads", default=1, show_default=True, type=click.IntRange(1), help="CPU threads of the codec.")
@force_option
def evaluate_(images, model, codec, qualities, effort, name, output, jobs, device, threads, force) -> None:
    """Measure a model or another codec on IMAGES (files or folders): size, PSNR, MS-SSIM, seconds, memory.

    \b
    mlic eval KODAK -o results/kodak/fast.json
    mlic eval KODAK --codec avif -o results/kodak/avif.json

    Every picture goes through real files, encoded and decoded by two processes. Failures are reported and kept in the
    results; the exit code is then 1.
    """
    from .evaluate import MODEL_QUALITIES, model_codec, peer_codec

    if codec and (model or effort is not None or name):
        other = "--model" if model else "--name" if name else "--effort"
        raise click.UsageError(f"{other} and --codec exclude each other")
    qualities = tuple(dict.fromkeys(qualities))
    with reported():
        if codec:
            from .peers import PEERS

            entry, run = peer_codec(codec)
            qualities = qualities or PEERS[codec].qualities
        else:
            try:
                entry, run = model_codec(model or "fast", device=_device(device), name=name, effort=effort)
            except ValueError as error:
                raise click.UsageError(str(error)) from None
            if not entry["settings"]["variable_rate"]:
                if qualities:
                    raise click.UsageError(f"model {entry['settings']['model']!r} has one rate: leave -q out")
                qualities = (None,)
            elif not all(1 <= quality <= 100 for quality in qualities):
                raise click.UsageError("-q must be from 1 to 100 for a model")
            else:
                qualities = qualities or MODEL_QUALITIES
        results = _measure(images, entry, run, qualities, output, threads=threads, jobs=jobs, force=force)
    _print_means(results)
    if results.failures():
        sys.exit(1)


_curve_options = together(  # what `mlic compare` and `mlic report` have in common
    click.argument("results", nargs=-1, type=OUTPUT, metavar="RESULTS..."),
    click.option("--anchor", default="vtm-17.0", show_default=True, metavar="NAME", help="Measured or published."),
    click.option("--codecs", default="", metavar="A,B,...", help="Others, measured on --images if not in RESULTS."),
    click.option("--images", multiple=True, type=PATH, metavar="FILE|DIR", help="May be repeated."),
    click.option("--folder", default="results", show_default=True, type=PATH, help="Where results of --codecs go."),
    click.option("--published", metavar="A,B,...", help="Published curves to show. Default: a few; 'all' or 'none'."),
    click.option("--dataset", metavar="NAME", help="kodak, tecnick or clic-pro-val, where not told by the pictures."),
)


@main.command("compare")
@_curve_options
@click.option("--json", "form", flag_value="json", help="Print JSON.")
@click.option("--markdown", "form", flag_value="markdown", help="Print Markdown.")
def compare_(form, **options) -> None:
    """BD-rates of results files, other codecs and published curves against an anchor, each with its overlap.

    \b
    mlic compare results/kodak/*.json
    mlic compare fast.json --codecs avif,jxl --images KODAK --markdown
    """
    from .compare import as_json, as_markdown, as_text

    with reported():
        comparison, failed = _compare(**options)
    click.echo({"json": as_json, "markdown": as_markdown, None: as_text}[form](comparison).rstrip())
    sys.exit(1 if failed else 0)


@main.command("report")
@_curve_options
@click.option("-o", "--output", type=OUTPUT, default="report.html", show_default=True, metavar="FILE")
@click.option("--png", type=OUTPUT, metavar="FILE", help="Draw the curves into a PNG too.")
@click.option("--model", default="fast", show_default=True, metavar="NAME|FILE", help="Model for the pictures.")
@click.option("-q", "--quality", type=Number(1, 100), help="Its quality for the pictures. Default: 20.")
@click.option("--pictures", default=3, show_default=True, type=click.IntRange(0), help="How many of --images to show.")
@click.option("--peers", default="avif,jpeg", show_default=True, metavar="A,B,...", help="To set beside them.")
def report_(output, png, model, quality, pictures, peers, **options) -> None:
    """One HTML page that works offline: curves, BD-rates, speed, and pictures at the same file size.

    \b
    mlic report results/kodak/*.json --images KODAK -o report.html --png rd.png
    """
    from .report import figure_png, html_report
    from .saving import write_whole

    with reported():
        comparison, failed = _compare(**options)
        shown = _shown(options["images"], model, quality, pictures, peers) if pictures and options["images"] else []
        write_whole(output, html_report(comparison, shown).encode())
        if png:
            figure_png(comparison, png)
    click.echo(f"{output}: {output.stat().st_size / 1e6:.1f} MB" + (f", {png}" if png else ""))
    sys.exit(1 if failed else 0)


def _compare(results, anchor, codecs, images, folder, published, dataset) -> tuple[Any, bool]:
    """(comparison, whether a picture failed), after measuring the codecs asked for."""
    from .compare import PUBLISHED, compare
    from .evaluate import peer_codec
    from .published import published_curves
    from .results import Results

    loaded = [Results.load(path) for path in results]
    here = {result.codec["name"] for result in loaded}
    notes, failed = [], False
    for name in _names(codecs):
        if name in here:
            continue
        from .peers import PEERS

        if name in PEERS and (reason := PEERS[name].missing()):
            notes.append(f"not measured: {reason}")
            continue
        entry, run = peer_codec(name)
        if not images:
            raise click.UsageError(f"{name} is in none of the results: to measure it, give --images")
        loaded.append(_measure(images, entry, run, PEERS[name].qualities, folder / f"{name}.json"))
        failed |= bool(loaded[-1].failures())
    if published == "all":
        wanted = list(published_curves(dataset or "kodak"))
    else:
        wanted = PUBLISHED if published is None else [] if published == "none" else _names(published)
    return compare(loaded, anchor=anchor, published=wanted, dataset=dataset, notes=notes), failed


def _shown(images, model, quality, number, peers) -> list[dict[str, Any]]:
    from .evaluate import find_pictures
    from .report_pictures import same_size_pictures
    from .weights import load_model

    network = load_model(model)
    if not network.config.variable_rate and quality is not None:
        raise click.UsageError(f"model {network.config.name!r} has one rate: leave -q out")
    paths, _ = find_pictures(images)
    spread = [paths[round(i * (len(paths) - 1) / max(number - 1, 1))] for i in range(min(number, len(paths)))]
    return same_size_pictures(
        spread,
        network,
        quality=(quality or 20) if network.config.variable_rate else None,
        peers=_names(peers),
        progress=lambda path: _say(path, "at the same file size with the other codecs"),
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _measure(images, entry, run, qualities, output, *, threads=1, jobs=1, force=False) -> Any:
    """Evaluate with a progress bar; failures and notes go to stderr."""
    from .evaluate import evaluate, find_pictures
    from .results import failures_of, notes_on

    _set_threads(1)  # of this process, which measures; the codec runs in others
    paths, notes = find_pictures(images)
    for note in notes:
        _say(None, f"note: {note}")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
    found = 0
    tqdm = _progress_bar()
    with tqdm(total=len(paths), desc=f"measure {entry['name']}", unit="picture", file=sys.stderr, disable=None) as bar:

        def progress(picture: dict[str, Any], known: bool) -> None:
            nonlocal found
            found += known
            bar.update()
            for text in failures_of(picture):
                _say(Path(picture["picture"]), text)

        results = evaluate(
            paths, entry, run, qualities=qualities, output=output, threads=threads, jobs=jobs, force=force, progress=progress
        )
    if found:
        _say(None, f"note: {found} of {len(paths)} pictures were in {output} already, and are not measured again")
    for note in notes_on(results):
        _say(None, f"note: {note}")
    return results


def _print_means(results: Any) -> None:
    click.echo(f"{results.codec['label']}, means over {len(results.complete())} pictures, {results.threads} thread(s)")
    click.echo(f"{'quality':>7} {'bpp':>7} {'PSNR':>6} {'MS-SSIM':>8} {'dB':>6} {'encode s':>9} {'decode s':>9}")
    for row in results.means():
        quality = "-" if row["quality"] is None else f"{row['quality']:g}"
        digits = {"psnr": 2, "ms_ssim": 5, "ms_ssim_db": 2}
        psnr, similarity, decibel = ("-" if row[key] is None else f"{row[key]:.{n}f}" for key, n in digits.items())
        times = f"{row['encode_s']:9.3f} {row['decode_s']:9.3f}"
        click.echo(f"{quality:>7} {row['bpp']:7.4f} {psnr:>6} {similarity:>8} {decibel:>6} {times}")
