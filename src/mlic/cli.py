"""The `mlic` command. It parses, prints and writes files; everything else is the library's."""

from __future__ import annotations

import ctypes
import io
import json
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

from . import __version__
from .errors import MlicError

INPUT = click.Path(readable=False, allow_dash=True, path_type=Path)  # unusable inputs are reported one by one
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to compute. auto: cuda if there is one."
)
threads_option = click.option("-j", "--threads", type=click.IntRange(1), help="CPU threads. Default: all cores.")
force_option = click.option("-f", "--force", is_flag=True, help="Overwrite existing outputs.")
output_option = click.option("-o", "--output", type=click.Path(readable=False, allow_dash=True), metavar="FILE|DIR")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mlic")
def main() -> None:
    """A learned image codec.

    \b
    mlic encode photo.png              -> photo.mlic
    mlic encode -q 70 -o out/ *.png    -> out/*.mlic
    mlic decode photo.mlic             -> photo.png
    mlic decode - -o - < a.mlic > a.png

    An input or output called - is stdin or stdout. Exit code: 0 all done, 1 an input failed, 2 wrong usage.
    """
    _tune_malloc()
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs comes as an exception too


@main.command()
@click.argument("inputs", nargs=-1, required=True, type=INPUT, metavar="IN...")
@output_option
@click.option("-q", "--quality", type=click.FloatRange(1, 100), help="1 (smallest) to 100 (best). Default: 50.")
@click.option("--model", default="fast", show_default=True, metavar="NAME|FILE", help="Model name or weights file.")
@device_option
@threads_option
@click.option("--float", "floating", is_flag=True, help="Faster; the file decodes only on the same kind of machine.")
@force_option
def encode(inputs, output, quality, model, device, threads, floating, force) -> None:
    """Encode pictures to .mlic files, beside the inputs unless -o says otherwise."""

    def run(data: bytes, source: Path, _target: Path) -> bytes:
        from .codec import encode_picture
        from .pictures import read_picture

        picture = read_picture(io.BytesIO(data))
        for note in picture.notes:
            _say(source, f"note: {note}")
        return encode_picture(network, picture, quality, exact=not floating).data

    if quality is not None and math.isnan(quality):  # FloatRange lets it through
        raise click.UsageError("-q must be a number from 1 to 100")
    jobs = _plan(inputs, output, ".mlic", force)
    network = _load(model, device, threads)
    if quality is not None and not network.config.variable_rate:
        raise click.UsageError(f"model {network.config.name!r} has one rate: leave -q out")
    _run_all(jobs, run, verb="encode")


@main.command()
@click.argument("inputs", nargs=-1, required=True, type=INPUT, metavar="IN...")
@output_option
@click.option("--model", metavar="NAME|FILE", help="Weights, where they are not found by the file's model name.")
@device_option
@threads_option
@force_option
def decode(inputs, output, model, device, threads, force) -> None:
    """Decode .mlic files to pictures: PNG, or what the extension of -o says."""
    _set_threads(threads)
    device = _device(device)

    def run(data: bytes, source: Path, target: Path) -> bytes:
        from .codec import decode_picture, model_for
        from .container import FLOAT, GREY, MlicFile
        from .pictures import picture_bytes, to_pillow

        file = MlicFile.from_bytes(data)
        if file.arithmetic == FLOAT:
            _say(source, "note: coded with --float, which decodes only on the kind of machine that wrote it")
        pixels = decode_picture(model_for(file, model, device), file)
        extension = ".png" if str(target) == "-" else target.suffix
        return picture_bytes(to_pillow(pixels, grey=file.colour == GREY, icc=file.icc), extension)

    _run_all(_plan(inputs, output, ".png", force), run, verb="decode")


@main.command()
@click.argument("file", type=INPUT)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(file: Path, as_json: bool) -> None:
    """What a .mlic file says of itself. Needs no weights."""
    from .container import EXACT, GREY, NO_QUALITY, MlicFile

    try:
        data = _read(file)
        content = MlicFile.from_bytes(data)
    except (MlicError, OSError) as error:
        _fail(file, error)
        sys.exit(1)
    facts = {
        "width": content.width,
        "height": content.height,
        "colour": "grey" if content.colour == GREY else "rgb",
        "arithmetic": "exact" if content.arithmetic == EXACT else "float",
        "model": content.model,
        "weights": content.digest.hex(),
        "quality_level": None if content.quality == NO_QUALITY else content.quality / 256,
        "bytes": len(data),
        "bpp": round(8 * len(data) / (content.width * content.height), 4),
        "icc_profile": len(content.icc or b""),
        "symbols_crc32": f"{content.checksum:08x}",
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        click.echo("\n".join(f"{key:14} {value}" for key, value in facts.items()))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def models(as_json: bool) -> None:
    """The models: parameters, thousands of multiply-accumulates per pixel, weights here or not."""
    from .config import CONFIGS
    from .model import count_parameters, kmac_per_pixel
    from .weights import find_weights

    rows = []
    for name, config in CONFIGS.items():
        kmac = kmac_per_pixel(config)
        path = find_weights(name)
        rows.append(
            {
                "model": name,
                "parameters_millions": round(count_parameters(config) / 1e6, 1),
                "kmac_per_pixel_encode": round(kmac.encode),
                "kmac_per_pixel_decode": round(kmac.decode),
                "rates": config.quality_levels or 1,
                "weights": str(path) if path else None,
            }
        )
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    click.echo(f"{'model':8} {'M params':>8} {'kMAC/px enc':>12} {'dec':>5} {'rates':>6}  weights")
    for row in rows:
        name, parameters, encode_kmac, decode_kmac, rates, path = row.values()
        click.echo(f"{name:8} {parameters:8.1f} {encode_kmac:12} {decode_kmac:5} {rates:6}  {path or 'not here'}")


@main.group()
def weights() -> None:
    """Work with weights files."""


@weights.command("import")
@click.argument("checkpoint", type=click.Path(readable=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, metavar="FILE")
@force_option
def import_(checkpoint: Path, output: Path, force: bool) -> None:
    """Bring the MLIC++ authors' checkpoint into this package's format. Runs no code from it."""
    from .convert import import_mlicpp, read_checkpoint
    from .weights import save_weights

    try:
        _check_target(output, force)
        model = import_mlicpp(read_checkpoint(checkpoint))
        save_weights(output, model, notes={"source": f"imported from {checkpoint.name}"})
    except (MlicError, OSError) as error:
        _fail(checkpoint, error)
        sys.exit(1)
    click.echo(f"{output}: {model.config.name}, weights {model.digest[:8].hex()}")


@main.command()
@click.argument("image", type=click.Path(readable=False, path_type=Path), required=False)
@click.option("-q", "--quality", "qualities", multiple=True, type=click.IntRange(1, 100), help="May be repeated.")
@click.option("--model", default="fast", show_default=True, metavar="NAME|FILE")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default="mlic-demo.png", show_default=True)
@threads_option
def demo(image: Path | None, qualities: tuple[int, ...], model: str, output: Path, threads: int | None) -> None:
    """Show the codec beside JPEG, WebP and AVIF on IMAGE (default: a sample), as a table and a picture."""
    from PIL import Image

    from .demo import comparison_picture, format_table, run_demo
    from .pictures import read_picture, to_pillow, write_whole

    image = image or Path(__file__).parent / "samples" / "kodim23.png"
    try:
        picture: Image.Image = to_pillow(read_picture(image).pixels)
        _check_target(output, force=True)
        if not _load(model, "cpu", threads).config.variable_rate:
            raise click.UsageError(f"the demo needs a model for all rates, not {model!r}")
        qualities = qualities or (10, 30, 50, 70, 90)
        rows = run_demo(picture, qualities=qualities, model=model, progress=lambda line: click.echo(line, err=True))
        click.echo(f"{image.name}, {picture.width}x{picture.height}\n\n{format_table(rows)}")
        sheet = comparison_picture(picture, quality=sorted(qualities)[len(qualities) // 3], model=model)
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        write_whole(output, buffer.getvalue())
    except (MlicError, OSError) as error:
        _fail(image, error)
        sys.exit(1)
    click.echo(f"\nCrops side by side: {output}")


def _load(model: str, device: str, threads: int | None):
    """The network, or one clear line and exit code 1."""
    _set_threads(threads)
    from .weights import load_model

    try:
        return load_model(model, device=_device(device))
    except MlicError as error:
        _fail(None, error)
        sys.exit(1)


def _set_threads(threads: int | None) -> None:
    if threads:
        import torch

        torch.set_num_threads(min(threads, os.cpu_count() or 1))


def _device(name: str) -> str:
    if name == "cpu":
        return name
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch finds no CUDA device here")
    return "cuda" if torch.cuda.is_available() else "cpu"


def _plan(inputs: tuple[Path, ...], to: str | None, extension: str, force: bool) -> list[tuple[Path, Path, str]]:
    """(input, output, reason why not or "") for each input."""
    output = None if to is None else Path(to)
    into_folder = output is not None and to != "-" and (output.is_dir() or to.endswith(("/", os.sep)))
    if output is not None and len(inputs) > 1 and not into_folder:
        if output.exists() or output.suffix or to == "-":
            raise click.UsageError(f"{len(inputs)} inputs need a folder behind -o, not {output}")
        into_folder = True
    if into_folder:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise click.UsageError(f"cannot make folder {output}: {error.strerror}") from None
    jobs, taken = [], set()
    for source in inputs:
        if output is not None and not into_folder:
            target = output
        elif str(source) == "-":
            target = output / f"stdin{extension}" if into_folder else Path("-")
        else:
            target = (output if into_folder else source.parent) / (source.stem + extension)
        reason = ""
        if os.path.realpath(target) in taken:
            reason = f"its output {target} is already that of another input"
        elif str(target) != "-":
            try:
                _check_target(target, force)
            except OSError as error:
                reason = str(error)
        taken.add(os.path.realpath(target))
        jobs.append((source, target, reason))
    if any(str(target) == "-" for _, target, _ in jobs) and sys.stdout.isatty():
        raise click.UsageError("will not write binary data to a terminal; use -o FILE")
    return jobs


def _check_target(target: Path, force: bool) -> None:
    if (target.is_file() or target.is_dir()) and not force:  # a device or pipe is there to be written to
        raise FileExistsError(f"{target} exists; -f overwrites")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: no folder {target.parent}")


def _run_all(jobs: list[tuple[Path, Path, str]], run: Callable[[bytes, Path, Path], bytes], *, verb: str) -> None:
    """Do every job; report failures and go on. Exits with 1 when one failed."""
    from tqdm import tqdm

    from .pictures import write_whole

    failed = False
    bar = tqdm(jobs, desc=verb, unit="file", disable=None if len(jobs) > 1 else True, file=sys.stderr)
    for source, target, reason in bar:
        try:
            if reason:
                raise FileExistsError(reason)
            out = run(_read(source), source, target)
            if str(target) == "-":
                sys.stdout.buffer.write(out)
                sys.stdout.buffer.flush()
            else:
                write_whole(target, out)
        except (MlicError, OSError) as error:
            failed = True
            _fail(source, error)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):  # torch's way to say it
                raise
            failed = True
            _fail(source, MlicError("not enough memory for this picture"))
    sys.exit(1 if failed else 0)


def _read(source: Path) -> bytes:
    return sys.stdin.buffer.read() if str(source) == "-" else source.read_bytes()


def _fail(source: Path | None, error: Exception) -> None:
    """One line on stderr."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    _say(source, text)


def _say(source: Path | None, text: str) -> None:
    from tqdm import tqdm

    where = "" if source is None else f"{'stdin' if str(source) == '-' else source}: "
    with tqdm.external_write_mode(file=sys.stderr):  # not into the middle of a progress bar
        click.echo(f"mlic: {where}{text}", err=True)


def _tune_malloc() -> None:
    """Tell glibc to keep freed memory: page faults otherwise take a sixth or more of the time. No effect elsewhere."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD
            libc.mallopt(parameter, value)
    except (OSError, AttributeError):
        pass


from . import cli_measure, cli_train  # noqa: E402, F401  (they add their commands to `main`)
