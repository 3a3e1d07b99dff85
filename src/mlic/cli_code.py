"""The commands that code: `mlic encode`, `mlic decode`."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .cli import (
    INPUT,
    INTERRUPTED,
    POSITIVE,
    FileName,
    Number,
    _device,
    _fail,
    _progress_bar,
    _say,
    _set_threads,
    device_option,
    force_option,
    main,
    reported,
    together,
)
from .cores import cores
from .errors import MlicError
from .folders import Job, picture_extensions, plan_jobs

if TYPE_CHECKING:  # they wait for torch
    from .jobs import Outcome
    from .tasks import Decode, Encode

output_option = click.option("-o", "--output", type=FileName(readable=False, allow_dash=True), metavar="FILE|DIR")
THREADS = "Files at a time; for a single file, threads. Default: all cores."
UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def _bytes(text: str) -> int:
    """A number of bytes such as 1500, 200k, 1.5M or 64Ki."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d*)?|\.\d+)(|[kmg]i?)b?", text.lower(), re.ASCII)
    if not match or (size := int(float(match[1]) * UNITS[match[2]])) < 1:
        raise click.BadParameter(f"{text!r} is no size; give bytes, or such as 200k, 1.5M or 64Ki")
    return size


def _region(text: str) -> tuple[int, ...]:
    """X,Y,W,H -> (x, y, width, height) in pixels."""
    match = re.fullmatch(r"(\d{1,9}),(\d{1,9}),(\d{1,9}),(\d{1,9})", text, re.ASCII)
    if not match or not int(match[3]) * int(match[4]):
        raise click.BadParameter(f"{text!r} is no region; give X,Y,WIDTH,HEIGHT in pixels, such as 0,0,640,480")
    return tuple(map(int, match.groups()))


def _tile(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text, re.ASCII) or int(text) % 64 or int(text) > 1 << 16:
        raise click.BadParameter(f"{text} is no multiple of 64 up to 65536, nor 0 for one tile")
    return int(text)


def _kind(text: str) -> str:
    """-> a file name extension."""
    if not re.fullmatch(r"\.?\w+", text):
        raise click.BadParameter(f"{text!r} is no kind of picture such as jpg")
    return f".{text.lower().removeprefix('.')}"


_job_options = together(  # what `mlic encode` and `mlic decode` have in common
    click.argument("inputs", nargs=-1, required=True, type=INPUT, metavar="IN..."),
    output_option,
    force_option,
    click.option("-u", "--update", is_flag=True, help="Overwrite outputs older than their inputs, skip the others."),
    device_option,
    click.option("-j", "--threads", type=click.IntRange(1), help=THREADS),
    click.option("--engine", type=click.Choice(["local", "ray"]), default="local", help="ray: a Ray cluster."),
    click.option("--ray-address", metavar="ADDRESS", help="Default: the cluster Ray finds, or a new one."),
    click.option("-v", "--verbose", is_flag=True, help="A line on each file: sizes, bits per pixel, seconds."),
    click.option("--quiet", is_flag=True, help="Say nothing but errors."),
)


@main.command()
@_job_options
@click.option("-q", "--quality", type=Number(1, 100), help="1 (smallest) to 100 (best). Default: 50.")
@click.option("--target-size", type=_bytes, metavar="BYTES", help="Instead of -q: the size, such as 200k (k: 1000).")
@click.option("--target-bpp", type=POSITIVE, metavar="B", help="Instead of -q: the file's bits per pixel.")
@click.option("--target-psnr", type=POSITIVE, metavar="DB", help="Instead of -q: PSNR of the decoded picture.")
@click.option("--model", default="fast", show_default=True, metavar="NAME|FILE", help="Model name or weights file.")
@click.option("--effort", type=click.IntRange(0, 20), help="Passes spent on a smaller file; 0: fastest. Default: 4.")
@click.option("--strip", is_flag=True, help="Leave out colour profile, EXIF and XMP.")
@click.option("--tile", type=_tile, metavar="N", help="Pixels a side of tiles, a multiple of 64; 0: one.")
@click.option("--float", "floating", is_flag=True, help="Faster; decodes only on such a machine, with as many threads.")
def encode(
    inputs, output, device, quality, target_size, target_bpp, target_psnr, model, effort, strip, tile, floating, **how
) -> None:
    """Encode pictures to .mlic files, beside the inputs unless -o says otherwise.

    \b
    mlic encode photo.png                         -> photo.mlic
    mlic encode -q 70 a.jpg b.png -o coded        -> coded/a.mlic, coded/b.mlic
    mlic encode photos -o coded -j 8              every picture in photos/, the same folders in coded/
    mlic encode "photos/**/*.png" -o coded        those of a pattern
    mlic encode --target-size 200k photo.png      the best quality that fits
    cat photo.png | mlic encode - > photo.mlic

    Of files found in folders and by patterns, those whose output is there and not older are skipped, so a job that was
    interrupted can be given again. Pictures that would have one output keep their extensions: a.jpg.mlic and a.png.mlic.
    """
    targets = {"size": target_size, "bpp": target_bpp, "psnr": target_psnr}
    target = [(kind, value) for kind, value in targets.items() if value is not None]
    if len(target) + (quality is not None) > 1:
        raise click.UsageError("-q, --target-size, --target-bpp and --target-psnr exclude each other")
    pictures, others = picture_extensions(), {}
    jobs = _plan(inputs, output, pictures, ".mlic", others, **how)
    for job in jobs:
        if job.target.suffix.lower() in pictures and job.target != job.source:
            raise click.UsageError(f"{job.target} would be a .mlic file in disguise: end its name in .mlic")
    _check_running(jobs, **how)
    from .tasks import Encode
    from .weights import load_model

    task = Encode(
        model=model,
        device=_where(device, how["engine"]),
        quality=quality,
        target=target[0] if target else None,
        exact=not floating,
        effort=effort,
        strip=strip,
        tile=tile,
    )
    with reported():
        config = load_model(model, device="cpu" if how["engine"] == "ray" else task.device).config
    if not config.variable_rate and (target or quality is not None or effort):
        option = f"--target-{target[0][0]}" if target else "-q" if quality is not None else "--effort"
        raise click.UsageError(f"model {config.name!r} has one rate: leave {option} out")
    for folder, counts in others.items():
        kinds = [f"{number} {kind or 'without extension'}" for kind, number in sorted(counts.items()) if kind != ".mlic"]
        if kinds and not how["quiet"]:
            _say(folder, f"note: left out, by their names no pictures: {', '.join(kinds)}")
    _run(task, jobs, verb="encode", **how)


@main.command()
@_job_options
@click.option("--model", metavar="NAME|FILE", help="Weights, where they are not found by the file's model name.")
@click.option(
    "--format", "kind", type=_kind, default="png", metavar="KIND", help="Such as jpg, unless -o names a file. Default: png."
)
@click.option("--region", type=_region, metavar="X,Y,W,H", help="Only this part, in pixels of the whole picture.")
@click.option("--scale", type=click.Choice(["1/1", "1/2", "1/4", "1/8"]), default="1/1", help="A smaller picture.")
@click.option("--allow-partial", is_flag=True, help="Decode what is there of a truncated file, hatch the rest.")
def decode(inputs, output, model, device, kind, region, scale, allow_partial, **how) -> None:
    """Decode .mlic files to pictures: PNG, or what --format or the extension of -o says.

    \b
    mlic decode photo.mlic                        -> photo.png
    mlic decode photo.mlic -o photo.jpg           the extension decides
    mlic decode coded -o pictures -j 8            every .mlic file in coded/, the same folders in pictures/
    mlic decode --format webp coded -o pictures   as WebP
    mlic decode --region 0,0,640,480 big.mlic -o corner.png
    mlic decode --scale 1/8 big.mlic -o small.png
    mlic decode --allow-partial cut.mlic -o preview.png

    Of files found in folders and by patterns, those whose output is there and not older are skipped, so a job that was
    interrupted can be given again.
    """
    factor = int(scale[2:])
    if region and (region[0] % factor or region[1] % factor):
        raise click.UsageError(f"with --scale {scale}, X and Y of --region must be multiples of {factor}")
    jobs = [_writable(job) for job in _plan(inputs, output, {".mlic"}, kind, **how)]
    _check_running(jobs, **how)
    from .tasks import Decode

    device = _where(device, how["engine"])
    task = Decode(model=model, device=device, region=region, scale=factor, allow_partial=allow_partial)
    _run(task, jobs, verb="decode", **how)


def _plan(
    inputs: tuple[Path, ...], output: str | None, takes: set[str], gives: str, others=None, *, force: bool, update: bool, **_
) -> list[Job]:
    try:
        jobs = plan_jobs(inputs, output, takes=takes, gives=gives, force=force, update=update, others=others)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if any(str(job.target) == "-" for job in jobs) and sys.stdout.isatty():
        raise click.UsageError("will not write binary data to a terminal; use -o FILE")
    return jobs


def _writable(job: Job) -> Job:
    """With a problem, if its output is of a kind that pictures cannot be written in."""
    from .saving import format_of

    try:
        if not (job.done or job.problem):
            format_of(job.extension)
    except MlicError as error:
        return dataclasses.replace(job, problem=str(error))
    return job


def _check_running(jobs: list[Job], *, engine: str, ray_address: str | None, verbose: bool, quiet: bool, **_) -> None:
    if verbose and quiet:
        raise click.UsageError("-v and --quiet exclude each other")
    if ray_address is not None and engine != "ray":
        raise click.UsageError("--ray-address is for --engine ray")
    if engine == "ray":
        from .ray_engine import import_ray

        if any("-" in (str(job.source), str(job.target)) for job in jobs):
            raise click.UsageError("--engine ray works on files: stdin and stdout are not for it")
        try:
            import_ray()
        except MlicError as error:
            raise click.UsageError(str(error)) from None


def _where(device: str, engine: str) -> str:
    """The device to compute on; on a cluster, only its own machines can tell."""
    return _device(device) if engine == "local" else "cpu" if device == "auto" else device


def _run(task: Encode | Decode, jobs: list[Job], *, verb, threads, engine, ray_address, verbose, quiet, **_) -> None:
    """Do the jobs, print what becomes of them and exit."""
    from .jobs import report_idle, run_jobs

    log = _Log(len(jobs), verb=verb, verbose=verbose, quiet=quiet)
    parallel = 1
    try:
        todo = report_idle(jobs, log.outcome)
        if engine == "ray" and todo:
            from .ray_engine import run_on_ray

            run_on_ray(task, todo, log.outcome, parallel=threads, address=ray_address)
        else:
            parallel = _share_threads(threads, len(todo), task.device)
            run_jobs(task, todo, log.outcome, parallel=parallel, progress=log.tile)
    except KeyboardInterrupt:
        log.close()
        if parallel > 1:  # do not wait for threads that still compute; they write nothing any more
            _say(None, "interrupted")
            os._exit(INTERRUPTED)
        raise
    except MlicError as error:  # of the engine, not of a file
        log.failed += 1
        _fail(None, error)
    log.close()
    sys.exit(1 if log.failed else 0)


def _share_threads(threads: int | None, files: int, device: str) -> int:
    """How many files to do at a time, after giving torch its threads: all for one file, one for each of several."""
    if files < 2:
        _set_threads(threads)
        return 1
    import torch

    most = min(threads or (torch.get_num_threads() if device == "cpu" else 1), cores())
    torch.set_num_threads(1)
    return min(most, files)


class _Log:
    """Prints and counts what becomes of jobs, and shows progress on a terminal."""

    def __init__(self, number: int, *, verb: str, verbose: bool, quiet: bool) -> None:
        tqdm = _progress_bar()
        self.size = tqdm.format_sizeof  # 1234567 -> "1.23M"
        self.many, self.verb, self.verbose, self.quiet = number > 1, verb, verbose, quiet
        self.done = self.skipped = self.failed = self.bytes_in = self.bytes_out = 0
        self.started = time.perf_counter()
        bar = {"desc": verb, "file": sys.stderr, "leave": False}
        self.files = tqdm(total=number, unit="file", disable=None if self.many and not quiet else True, **bar)
        self.tiles = tqdm(unit="tile", disable=True if self.many or quiet else None, delay=1, **bar)

    def outcome(self, outcome: Outcome) -> None:
        job = outcome.job
        self.done += not (outcome.error or job.done)
        self.skipped += job.done
        self.failed += bool(outcome.error)
        self.bytes_in += outcome.bytes_in
        self.bytes_out += outcome.bytes_out
        if not self.quiet:
            for note in outcome.notes:
                _say(job.source, f"note: {note}")
        if outcome.error:
            _fail(job.source, outcome.error)
        elif self.verbose:
            _say(job.source, self.line(outcome))
        self.files.update()

    def tile(self, done: int, total: int) -> None:
        if total > 1:
            self.tiles.total, self.tiles.n = total, done
            self.tiles.refresh()

    def close(self) -> None:
        self.files.close()
        self.tiles.close()
        if self.many and not self.quiet:
            counts = f"{self.done} done, {self.skipped} skipped, {self.failed} failed"
            seconds = time.perf_counter() - self.started
            _say(None, f"{counts}; {self.size(self.bytes_in)}B in, {self.size(self.bytes_out)}B out, {seconds:.1f} s")

    def line(self, outcome: Outcome) -> str:
        if outcome.job.done:
            return f"skipped, {outcome.job.target} is there"
        text = f"{self.size(outcome.bytes_in)}B -> {self.size(outcome.bytes_out)}B"
        if outcome.pixels:
            coded = outcome.bytes_out if self.verb == "encode" else outcome.bytes_in
            text += f", {8 * coded / outcome.pixels:.4g} bpp, {outcome.seconds:.2f} s"
        return text + (f", {outcome.detail}" if outcome.detail else "")
