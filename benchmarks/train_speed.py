"""Pixels per second of a training step, and what share of the device's matrix-product peak that is.

    python benchmarks/train_speed.py --data PHOTOS --batch 32 --crop 256 --device cuda

The peak is measured here, on a large matrix product. A step is counted as three times the forward pass's
multiply-accumulates (forward, and backward to activations and to weights).
"""

from __future__ import annotations

import itertools
import time

import click
import torch

from mlic.data import PictureBank
from mlic.model import kmac_per_pixel
from mlic.train_config import TrainConfig
from mlic.trainer import Trainer


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_peak(device: str, size: int) -> float:
    """FLOP/s of a size x size x size product, best of six runs of ten: bfloat16 on CUDA, float32 on CPUs, many of which
    have no bfloat16 units.
    """
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    best = 0.0
    for _ in range(6):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        synchronise(device)
        best = max(best, 10 * 2 * size**3 / (time.perf_counter() - started))
    return best


@click.command()
@click.option("--data", multiple=True, required=True, type=click.Path(exists=True))
@click.option("--model", default="fast", show_default=True)
@click.option("--batch", "batches", multiple=True, default=(4,), show_default=True, help="May be repeated.")
@click.option("--crop", default=256, show_default=True)
@click.option("--optimiser", default="muon", show_default=True, type=click.Choice(["adam", "muon"]))
@click.option("--steps", default=20, show_default=True, help="Timed steps, after six others.")
@click.option("--compile", "compiled", type=click.Choice(["formulas", "all"]))
@click.option("--graph/--no-graph", default=True, show_default=True, help="Capture the step as a CUDA graph.")
@click.option("--branches", multiple=True, type=int, default=(0,), show_default=True, help="May be repeated, too.")
@click.option("--profile", is_flag=True, help="Also print the kernels that took longest, in steps without a graph.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--threads", type=int)
def main(data, model, batches, crop, optimiser, steps, compiled, graph, branches, profile, device, threads) -> None:
    if threads:
        torch.set_num_threads(threads)
    peak = matmul_peak(device, 8192 if device == "cuda" else 2048)
    forward = 2 * 1000 * sum(kmac_per_pixel(model, (crop, crop)))  # FLOPs a pixel
    print(f"matmul peak {peak / 1e12:.2f} TFLOP/s")
    bank = PictureBank(data, smallest=crop, device=device)
    settings = {"model": model, "data": data, "out": "", "steps": 1, "lmbda": None if model == "fast" else 0.013}
    settings |= {"crop": crop, "optimiser": optimiser, "compiled": compiled, "graph": graph}
    for batch, count in itertools.product(batches, branches):
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer = Trainer(TrainConfig(batch=batch, branches=count, **settings), device=device, bank=bank)
        for _ in range(6):
            trainer.step(0.5)
        synchronise(device)
        started = time.perf_counter()
        for _ in range(steps):
            trainer.step(0.5)
        synchronise(device)
        seconds = (time.perf_counter() - started) / steps
        pixels = batch * crop**2 / seconds
        memory = f", {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB" if device == "cuda" else ""
        print(f"{model} batch {batch} crop {crop} {optimiser} branches {count}: {pixels / 1e6:.3f} Mpx/s, ", end="")
        print(f"{1000 * seconds:.1f} ms a step, ", end="")
        print(f"{100 * 3 * forward * pixels / peak:.1f}% of the peak{memory}; {trainer.read_measures()}")
        if profile:
            trainer.capture = False
            kinds = [torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=kinds) as profiler:
                for _ in range(3):
                    trainer.step(0.5)
                synchronise(device)
            spent = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
            totals = profiler.key_averages()
            seconds = sum(getattr(row, spent) for row in totals) / 3e6
            print(f"{sum(row.count for row in totals) / 3:.0f} kernels a step, {1000 * seconds:.1f} ms in them")
            for row in sorted(totals, key=lambda row: -getattr(row, spent))[:40]:
                print(f"{getattr(row, spent) / 3000:8.3f} ms {row.count / 3:6.0f} x  {row.key[:100]}")
        del trainer


if __name__ == "__main__":
    main()
