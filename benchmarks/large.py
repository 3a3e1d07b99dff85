"""Large pictures: what tiling costs, what seams show, and the memory and time of 100 megapixels.

    python benchmarks/large.py PICTURE... [--tile 1024] [--megapixels 100] [--effort 0] [-o results/large.json]

For each picture: files in tiles against files in one piece at four qualities (BD-rate, cubic), and PSNR within 8 pixels of
the tiles' edges against elsewhere, both ways. Then, in processes of their own, `mlic encode` and `mlic decode` of a picture
of so many megapixels, a mosaic of the given ones: seconds and peak memory.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from PIL import Image

from mlic.bdrate import bd_rate
from mlic.codec import encode_picture
from mlic.metrics import psnr
from mlic.pictures import read_pixels
from mlic.weights import load_model

QUALITIES = (20, 40, 60, 80)


def seam_gap(error: np.ndarray, tile: int) -> float:
    """dB by which PSNR beside the edges of tiles lies below PSNR elsewhere."""
    near = np.zeros(error.shape, bool)
    for edge in range(tile, error.shape[0], tile):
        near[edge - 8 : edge + 8] = True
    for edge in range(tile, error.shape[1], tile):
        near[:, edge - 8 : edge + 8] = True
    return float(10 * np.log10(error[near].mean() / error[~near].mean()))


def cost_of_tiles(path: Path, tile: int, effort: int | None) -> dict:
    model, picture = load_model("fast"), read_pixels(path)
    curves: dict[str, list] = {"one": [], "tiles": []}
    gaps: dict[str, list] = {"one": [], "tiles": []}
    for quality in QUALITIES:
        for name, side in (("one", 0), ("tiles", tile)):
            coded = encode_picture(model, picture, quality, tile=side, effort=effort, reconstruct=True)
            error = np.square(coded.reconstruction.astype(np.float32) - picture.pixels).mean(2)
            bpp = 8 * len(coded.data) / error.size
            curves[name].append((bpp, psnr(coded.reconstruction, picture.pixels)))
            gaps[name].append(seam_gap(error, tile))
    cost = bd_rate(curves["one"], curves["tiles"])
    row = {"picture": path.name, "size": picture.pixels.shape[1::-1], "tile": tile, "bd_rate_percent": cost, "curves": curves}
    row["seam_gap_db"] = {name: [round(gap, 3) for gap in values] for name, values in gaps.items()}
    print(f"{path.name}: tiles of {tile} cost {cost:+.2f}% BD-rate; PSNR at edges below elsewhere by", row["seam_gap_db"])
    return row


def command(*arguments: str | Path | int) -> dict:
    """Seconds and peak MiB of a command."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "mlic", *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"mlic {arguments[0]} failed")
    return {"seconds": round(time.perf_counter() - started, 1), "peak_mib": usage.ru_maxrss // 1024}


def giant(paths: list[Path], megapixels: float, effort: int | None, folder: Path) -> dict:
    side = int((megapixels * 1e6 / 12) ** 0.5)
    width, height = 4 * side, 3 * side
    mosaic, x, y, row = Image.new("RGB", (width, height)), 0, 0, 0
    pictures = [Image.open(path).convert("RGB") for path in paths]
    for part in itertools.cycle(pictures):
        if y >= height:
            break
        mosaic.paste(part, (x, y))
        x, row = x + part.width, max(row, part.height)
        if x >= width:
            x, y, row = 0, y + row, 0
    mosaic.save(folder / "giant.png", compress_level=1)
    rows = {"megapixels": width * height / 1e6}
    search = [] if effort is None else ["--effort", effort]
    rows["encode"] = command("encode", folder / "giant.png", "-o", folder / "giant.mlic", *search)
    rows["bytes"] = (folder / "giant.mlic").stat().st_size
    rows["decode"] = command("decode", folder / "giant.mlic", "-o", folder / "back.png")
    rows["decode 1/8"] = command("decode", folder / "giant.mlic", "-o", folder / "small.png", "--scale", "1/8")
    region = f"{width // 2},{height // 2},800,600"
    rows["decode 800x600"] = command("decode", folder / "giant.mlic", "-o", folder / "part.png", "--region", region)
    print(json.dumps(rows, indent=1))
    return rows


@click.command()
@click.argument("pictures", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--tile", default=1024, show_default=True, help="Side in pixels; 0: leave the cost of tiles out.")
@click.option("--megapixels", default=100.0, show_default=True, help="0: leave the giant out.")
@click.option("--effort", type=int, help="Passes of search; the encoder's default if nothing is said.")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(pictures: tuple[Path, ...], tile: int, megapixels: float, effort: int | None, output: Path | None) -> None:
    results: dict = {"effort": effort}
    if megapixels:  # first: a process's peak memory begins with its parent's
        with tempfile.TemporaryDirectory() as folder:
            results["giant"] = giant(list(pictures), megapixels, effort, Path(folder))
    if tile:
        results["tiles"] = [cost_of_tiles(path, tile, effort) for path in pictures]
    if output:
        results["weights"] = load_model("fast").digest.hex()
        output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
