"""Every picture of a folder through the real command line, encode and decode in separate processes.

    python benchmarks/roundtrip.py KODAK -q 10 -q 30 -q 50 -q 70 -q 90 -o results/roundtrip.json

Checks for each file that the decoded picture is exactly the encoder's reconstruction and that its size is at most
1% + 64 bytes above the model's estimate; exits with 1 otherwise. What the files are worth is measured by `mlic eval`.

--decoder names another command that decodes, such as an mlic on another machine that sees the same folders, or one in an
emulator of another processor (docs/evaluation.md). Then last bits of pixels may differ; the symbols are what the file's
checksum vouches for.
"""

from __future__ import annotations

import concurrent.futures
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mlic.codec import encode_picture, estimate_bytes
from mlic.evaluate import environment
from mlic.pictures import read_picture
from mlic.weights import load_model

OWN = (sys.executable, "-m", "mlic")


def measure(path: Path, quality: float, model: str, threads: int, decoder: list[str]) -> dict:
    picture = read_picture(path)
    network = load_model(model)
    with tempfile.TemporaryDirectory() as folder:
        coded, back = Path(folder, "x.mlic"), Path(folder, "x.png")
        options = ["-j", str(threads), "-q", str(quality), "--model", model]
        subprocess.run([*OWN, "encode", *options, str(path), "-o", str(coded)], check=True)
        subprocess.run([*(decoder or OWN), "decode", "-j", str(threads), str(coded), "-o", str(back)], check=True)
        data = coded.read_bytes()
        decoded = np.asarray(Image.open(back).convert("RGB"))
    expected = encode_picture(network, picture, quality, reconstruct=True)
    estimate = estimate_bytes(network, picture, quality)
    apart = np.abs(decoded.astype(int) - expected.reconstruction)
    return {
        "picture": path.name,
        "quality": quality,
        "bytes": len(data),
        "estimate_bytes": estimate,
        "within_estimate": len(data) <= 1.01 * estimate + 64,
        "exact": data == expected.data and int(apart.max()) <= bool(decoder),
        "values": apart.size,
        "values_apart": int(np.count_nonzero(apart)),
    }


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-q", "--quality", "qualities", multiple=True, type=float, default=(10, 30, 50, 70, 90), show_default=True)
@click.option("--model", default="fast", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--decoder", default="", help="Command in place of mlic for decoding.")
@click.option("--jobs", default=2, show_default=True, help="Pictures at once, one thread each.")
def main(folder: Path, qualities: tuple[float, ...], model: str, output: Path, decoder: str, jobs: int) -> None:
    torch.set_num_threads(1)
    work = [(path, quality) for quality in sorted(qualities) for path in sorted(folder.glob("*.png"))]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(measure, path, quality, model, 1, shlex.split(decoder)) for path, quality in work]
        rows = [future.result() for future in tqdm(futures, unit="file")]
    record = {"model": model, "weights": load_model(model).digest.hex(), "environment": environment(), "files": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1))
    wrong = [f"{r['picture']} at {r['quality']:g}" for r in rows if not (r["exact"] and r["within_estimate"])]
    above = max(row["bytes"] / row["estimate_bytes"] - 1 for row in rows)
    extra = max(row["bytes"] - row["estimate_bytes"] for row in rows)
    print(f"{len(rows)} files; at most {100 * above:.2f}% and {extra:.0f} bytes above the estimate; wrong: {wrong or 'none'}")
    print(f"{sum(r['values_apart'] for r in rows)} of {sum(r['values'] for r in rows)} values of pixels apart, by one")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
