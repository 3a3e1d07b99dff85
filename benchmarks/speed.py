"""Seconds and peak memory to encode and decode a 768x512 picture, for each model and arithmetic, and where time goes.

    python benchmarks/speed.py -j 2 -o results/speed.json
    python benchmarks/speed.py -j 2 --turns 20        # exact and float decoding of `fast` by turns, in one process

Models without weights here run with random ones, whose latents are spread so that symbol coding has work to do. Every
model is measured in a process of its own; the median of the repetitions counts, after one warm-up. Loading is not
counted. Threads and malloc are tuned as by the `mlic` command.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

from mlic.cli import _keep_freed_memory  # and threads that soon sleep: before torch is loaded

_keep_freed_memory()

import torch

from mlic import codec
from mlic.coder import SymbolDecoder, SymbolEncoder
from mlic.coding_process import peak_memory_mib
from mlic.config import CONFIGS
from mlic.container import MlicFile
from mlic.evaluate import environment
from mlic.model import CompressionModel, build_model
from mlic.pictures import read_picture
from mlic.weights import find_weights, load_model, seal

SAMPLE = Path(codec.__file__).parent / "samples" / "kodim23.png"
PARTS = {
    "transforms": [(CompressionModel, "analyse"), (CompressionModel, "synthesise")],
    "entropy model": [(CompressionModel, "code")],
    "symbol coding": [(SymbolEncoder, "_put"), (SymbolEncoder, "finish"), (SymbolDecoder, "_get")],
}


def random_model(name: str) -> CompressionModel:
    torch.manual_seed(0)
    model = build_model(name)
    with torch.no_grad():
        model.g_a[-1].weight.mul_(150)
    return seal(model)


def timed(seconds: dict[str, float]) -> None:
    """Wrap the methods of PARTS so that they add their wall time to `seconds`."""
    for part, methods in PARTS.items():
        for owner, name in methods:
            inner = getattr(owner, name)

            def outer(*args, _inner=inner, _part=part, _name=name, **kwargs):
                started = time.perf_counter()
                try:
                    return _inner(*args, **kwargs)
                finally:
                    seconds[_part] += time.perf_counter() - started
                    if _name == "finish":
                        seconds["finish"] += time.perf_counter() - started  # not inside the entropy model's time

            setattr(owner, name, outer)


def measure(name: str, threads: int, repeat: int, exact: bool) -> dict:
    torch.set_num_threads(threads)
    model = load_model(name) if find_weights(name) else random_model(name)
    picture = read_picture(SAMPLE)
    seconds = dict.fromkeys([*PARTS, "finish"], 0.0)
    timed(seconds)
    runs: dict[str, list[dict[str, float]]] = {"encode": [], "decode": []}
    for _ in range(repeat + 1):
        for verb in runs:
            seconds.update(dict.fromkeys(seconds, 0.0))
            started = time.perf_counter()
            if verb == "encode":
                data = codec.encode_picture(model, picture, exact=exact).data
            else:
                codec.decode_file(model, MlicFile.from_bytes(data))
            total = time.perf_counter() - started
            split = {**seconds, "total": total}
            split["entropy model"] -= seconds["symbol coding"] - seconds["finish"]
            runs[verb].append(split)
    result = {
        "model": name,
        "arithmetic": "exact" if exact else "float",
        "weights": model.digest.hex() if find_weights(name) else "random",
        "bytes": len(data),
    }
    for verb, all_splits in runs.items():
        result[verb] = {part: statistics.median(split[part] for split in all_splits[1:]) for part in all_splits[0]}
    result["peak_mib"] = peak_memory_mib()
    return result


def by_turns(name: str, threads: int, turns: int) -> None:
    """Decode exact and float files in turn, so that a machine that slows down slows both; print medians and their ratio."""
    torch.set_num_threads(threads)
    model, picture = load_model(name), read_picture(SAMPLE)
    files = {exact: MlicFile.from_bytes(codec.encode_picture(model, picture, exact=exact).data) for exact in (True, False)}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(turns + 1):
        for exact, file in files.items():
            started = time.perf_counter()
            codec.decode_file(model, file)
            seconds[exact].append(time.perf_counter() - started)
    exact, floating = (statistics.median(seconds[kind][1:]) for kind in (True, False))
    ratios = sorted(a / b for a, b in zip(seconds[True][1:], seconds[False][1:]))
    print(
        f"{name}, {threads} threads, {turns} turns: exact {exact:.3f} s, float {floating:.3f} s, ratio {exact / floating:.2f}"
    )
    print(f"ratio of single turns: quartiles {ratios[turns // 4]:.2f} and {ratios[3 * turns // 4]:.2f}")


@click.command()
@click.option("-j", "--threads", default=2, show_default=True)
@click.option("--repeat", default=5, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
@click.option("--only", type=click.Choice(list(CONFIGS)), help="Measure this model in this process and print JSON.")
@click.option("--turns", type=click.IntRange(4), help="Compare exact and float decoding of --only (fast) by turns.")
@click.option("--float", "floating", is_flag=True, help="With --only: float arithmetic.")
def main(threads: int, repeat: int, output: Path | None, only: str | None, turns: int | None, floating: bool) -> None:
    if turns:
        by_turns(only or "fast", threads, turns)
        return
    if only:
        print(json.dumps(measure(only, threads, repeat, not floating)))
        return
    rows = []
    print(
        f"{'model':8} {'':6} {'verb':7} {'total s':>8} {'transforms':>11} {'entropy model':>14} {'symbols':>8} {'peak MiB':>9}"
    )
    for name, kind in [(name, kind) for name in CONFIGS for kind in ("exact", "float")]:
        command = [sys.executable, __file__, "--only", name, "-j", str(threads), "--repeat", str(repeat)]
        command += ["--float"] if kind == "float" else []
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        rows.append(row)
        for verb in ("encode", "decode"):
            t = row[verb]
            print(
                f"{name:8} {kind:6} {verb:7} {t['total']:8.2f} {t['transforms']:11.2f} {t['entropy model']:14.2f} "
                f"{t['symbol coding']:8.3f} {row['peak_mib']:9.0f}"
            )
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        record = {"threads": threads, "environment": environment(), "rows": rows}
        output.write_text(json.dumps({**record, "torch": torch.__version__}, indent=1))


if __name__ == "__main__":
    main()
