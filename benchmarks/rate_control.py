"""How many passes `encode_to_target` takes and how close it comes: pictures of a folder, sizes, rates and PSNRs.

    python benchmarks/rate_control.py KODAK -o results/rate_control.json

Prints one line per target: passes, and errors in percent (size and bpp) or dB (PSNR).
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import click
from tqdm import tqdm

from mlic.pictures import read_picture
from mlic.rate_control import encode_to_target
from mlic.weights import load_model

TARGETS = {"size": (10_000, 25_000, 60_000), "bpp": (0.25, 0.6, 1.5), "psnr": (28, 32, 36)}


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", default="fast", show_default=True)
@click.option("--every", default=1, show_default=True, help="Take every n-th picture of the folder.")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(folder: Path, model: str, every: int, output: Path | None) -> None:
    network = load_model(model)
    rows = []
    for path in tqdm(sorted(folder.glob("*.png"))[::every], unit="picture"):
        picture = read_picture(path)
        for kind, targets in TARGETS.items():
            for target in targets:
                result = encode_to_target(network, picture, **{kind: target})
                error = result.reached - target if kind == "psnr" else 100 * (result.reached / target - 1)
                row = {"picture": path.name, "kind": kind, "target": target, "error": error, "note": result.note}
                rows.append(row | {"quality": result.quality, "passes": result.passes})
    for kind, targets in TARGETS.items():
        for target in targets:
            some = [row for row in rows if (row["kind"], row["target"]) == (kind, target)]
            met = [row for row in some if not row["note"]]
            passes, errors = [row["passes"] for row in met], [row["error"] for row in met]
            print(f"{kind} {target:g}: met {len(met)} of {len(some)}", end="")
            if met:
                print(f"; passes {statistics.mean(passes):.2f}, at most {max(passes)}", end="")
                print(f"; error {min(errors):+.3f} to {max(errors):+.3f} {'dB' if kind == 'psnr' else '%'}", end="")
            print()
    if output:
        record = {"model": model, "weights": network.digest.hex(), "results": rows}
        output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
