"""The commands that look at models and bring weights: `mlic models`, `mlic weights import`, `mlic demo`."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import click

from .cli import _set_threads, force_option, main, reported, threads_option
from .folders import check_target

FILE = click.Path(dir_okay=False, path_type=Path)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def models(as_json: bool) -> None:
    """The models: parameters, thousands of multiply-accumulates per pixel, weights here or not.

    \b
    mlic models
    mlic models --json
    """
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
@click.option("-o", "--output", type=FILE, required=True, metavar="FILE")
@force_option
def import_(checkpoint: Path, output: Path, force: bool) -> None:
    """Bring the MLIC++ authors' checkpoint into this package's format. Runs no code from it.

    \b
    mlic weights import mlicpp_mse_q5.pth.tar -o mlic++.safetensors
    mlic encode photo.png --model mlic++.safetensors
    """
    from .convert import import_mlicpp, read_checkpoint
    from .weights import save_weights

    with reported(checkpoint):
        check_target(output, force=force)
        model = import_mlicpp(read_checkpoint(checkpoint))
        save_weights(output, model, notes={"source": f"imported from {checkpoint.name}"})
    click.echo(f"{output}: {model.config.name}, weights {model.digest[:8].hex()}")


@main.command()
@click.argument("image", type=click.Path(readable=False, path_type=Path), required=False)
@click.option("-q", "--quality", "qualities", multiple=True, type=click.IntRange(1, 100), help="May be repeated.")
@click.option("--model", default="fast", show_default=True, metavar="NAME|FILE")
@click.option("-o", "--output", type=FILE, default="mlic-demo.png", show_default=True)
@threads_option
def demo(image: Path | None, qualities: tuple[int, ...], model: str, output: Path, threads: int | None) -> None:
    """Show the codec beside JPEG, WebP and AVIF on IMAGE (default: a sample), as a table and a picture.

    \b
    mlic demo
    mlic demo photo.png -q 20 -q 60 -o beside.png
    """
    import numpy as np

    from .demo import comparison_picture, format_table, run_demo
    from .pictures import Picture, read_picture
    from .saving import format_of, picture_bytes, to_pillow, write_whole
    from .weights import load_model

    image = image or Path(__file__).parent / "samples" / "kodim23.png"
    if output.exists() and image.exists() and output.samefile(image):
        raise click.UsageError(f"{output} is the picture itself: give another -o")
    with reported(image):
        pixels = np.asarray(to_pillow(dataclasses.replace(read_picture(image), grey=False, alpha=None)))
        check_target(output, force=True)
        format_of(output.suffix)
        _set_threads(threads)
        with reported():  # not of the picture
            config = load_model(model).config
        if not config.variable_rate:
            raise click.UsageError(f"the demo needs a model for all rates, not {model!r}")
        qualities = tuple(dict.fromkeys(qualities)) or (10, 30, 50, 70, 90)
        shown = sorted(qualities)[len(qualities) // 3]
        say = functools.partial(click.echo, err=True)
        rows = run_demo(pixels, qualities=qualities, model=model, keep=shown, progress=say)
        click.echo(f"{image.name}, {pixels.shape[1]}x{pixels.shape[0]}\n\n{format_table(rows)}")
        sheet = comparison_picture(pixels, [row for row in rows if row.pixels is not None])
        write_whole(output, picture_bytes(Picture(np.asarray(sheet)), output.suffix))
    click.echo(f"\nCrops side by side: {output}")
