"""Time candidate building blocks for the CPU-friendly model; write the tables of docs/blocks.md.

    python benchmarks/blocks.py --threads 1 2 --out docs/blocks.md

takes about two minutes; `--threads 1 2` adds tables for two threads and needs two idle cores.
Each time is the lower of the medians of two passes over all blocks. In an existing file what
follows the marker line is replaced.

The GPU table is calculated, not measured: compute time is 2 FLOP per MAC at half of 990 TFLOP/s
(dense bf16); memory time is every op's activations read and written once, in bf16, at 3.0 TB/s.
"""

import argparse
import copy
import ctypes
import os
import platform
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

MARKER = "<!-- Below this line: written by benchmarks/blocks.py. -->"
NHWC = torch.channels_last
PICTURE, CROP, BATCH, PASSES = (512, 768), 256, 4, 2
GPU_FLOPS, GPU_BYTES = 0.5 * 990e12, 3.0e12  # per second
ACTS = (nn.GELU, nn.ReLU, nn.LeakyReLU, nn.SiLU)
CPU_HEAD = (
    "block; width; params (M); kMAC/px; fp32 (ms); bf16 (ms); int8 (ms); train fp32 (ms); "
    "train bf16 (ms); GMAC/s fp32; bf16; int8; kparams per ms fp32"
)
ACT_HEAD = "activation; fp32 (ms); bf16 (ms)"
GPU_HEAD = "block; width; compute; memory, eager; memory, fused; larger, eager; larger, fused"
Spec = list[list[nn.Module]]


def conv(cin: int, cout: int, k: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, k, padding=k // 2, groups=groups)


def plain(c: int, act: type[nn.Module] = nn.GELU) -> Spec:
    return [[conv(c, c, 3), act(), conv(c, c, 3)]]


def bottleneck(c: int, h: int) -> Spec:
    return [[conv(c, h, 1), nn.GELU(), conv(h, h, 3), nn.GELU(), conv(h, c, 1)]]


def depthwise(c: int, k: int, wrap: bool) -> Spec:
    mlp = [conv(c, 2 * c, 1), nn.GELU(), conv(2 * c, c, 1)]
    spatial = conv(c, c, k, c)
    return [[conv(c, c, 1), nn.GELU(), spatial, conv(c, c, 1)], mlp] if wrap else [[spatial, *mlp]]


BLOCKS: list[tuple[str, tuple[int, ...], Callable[[int], Spec]]] = [
    ("3x3, 3x3, GELU", (128, 192, 256), plain),
    ("3x3, 3x3, ReLU", (192,), lambda c: plain(c, nn.ReLU)),
    ("3x3, 3x3, LeakyReLU", (192,), lambda c: plain(c, nn.LeakyReLU)),
    ("3x3, 1x1", (192, 256), lambda c: [[conv(c, c, 3), nn.GELU(), conv(c, c, 1)]]),
    ("1x1, 3x3, 1x1 (half width)", (256, 384), lambda c: bottleneck(c, c // 2)),
    ("1x1, dw3x3, 1x1 + MLP x2", (192, 256, 320), lambda c: depthwise(c, 3, True)),
    ("dw5x5 + MLP x2", (256, 320), lambda c: depthwise(c, 5, False)),
]
ROWS = [(name, c, make) for name, widths, make in BLOCKS for c in widths]


class Block(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for branch in self:
            x = x + branch(x)
        return x


def median_ms(f: Callable[[], object]) -> float:
    timer = Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=0.15).median


def forward_times(m: nn.Module, shape: tuple[int, ...]) -> list[float]:
    """In fp32 and in bf16, each in the better memory format."""
    times = []
    for dtype in (torch.float32, torch.bfloat16):
        both = []
        for fmt in (torch.contiguous_format, NHWC):
            n, x = (t.to(dtype, memory_format=fmt) for t in (copy.deepcopy(m), torch.randn(shape)))
            with torch.inference_mode():
                both.append(median_ms(partial(n, x)))
        times.append(min(both))
    return times


def train_ms(m: nn.Module, shape: tuple[int, ...], bf16: bool) -> float:
    m, x = m.to(memory_format=NHWC), torch.randn(shape).to(memory_format=NHWC).requires_grad_()

    def step() -> None:
        m.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y: Tensor = m(x)
        y.backward(torch.ones_like(y))

    return median_ms(step)


def int8_ms(spec: Spec, h: int, w: int) -> float:
    """The block's convs alone, on oneDNN in int8 with ReLU fused; the sums are left out."""
    runs, ones, ops, grid = [], [1, 1], torch.ops.onednn, (0.05, 64)  # grid: scale, zero point
    for m in (m for layers in spec for m in layers if isinstance(m, nn.Conv2d)):
        shape, where = [1, m.in_channels, h, w], (ones, list(m.padding), ones, m.groups)
        q = torch.randint(-127, 128, m.weight.shape, dtype=torch.int8)
        scale, zero = torch.full((len(q),), 1e-3), torch.zeros(len(q), dtype=torch.int)
        packed = ops.qconv_prepack(q, scale, *grid, *where, shape)
        x = torch.randint(0, 128, shape, dtype=torch.uint8).to(memory_format=NHWC)
        rest = (torch.zeros(len(q)), *where, *grid, torch.uint8, "relu", [], "")
        runs.append(partial(ops.qconv_pointwise, x, *grid, packed, scale, zero, *rest))
    return median_ms(lambda: [run() for run in runs])


def block_times(spec: Spec, c: int, scale: int) -> list[float]:
    h, w, crop = PICTURE[0] // scale, PICTURE[1] // scale, CROP // scale
    m = Block(nn.Sequential(*layers) for layers in spec)
    train = [train_ms(m, (BATCH, c, crop, crop), bf16) for bf16 in (False, True)]
    return [*forward_times(m, (1, c, h, w)), int8_ms(spec, h, w), *train]


def cpu_row(name: str, spec: Spec, width: int, scale: int, times: list[float]) -> list[str]:
    sizes = [(p.numel(), p.dim() == 4) for b in spec for m in b for p in m.parameters()]
    params, per_px = sum(n for n, _ in sizes), sum(n for n, kernel in sizes if kernel) / scale**2
    macs = per_px * PICTURE[0] * PICTURE[1]
    cells = [f"{params / 1e6:.2f}", f"{per_px / 1e3:.2f}", *(f"{t:.1f}" for t in times)]
    cells += [*(f"{macs / t / 1e6:.0f}" for t in times[:3]), f"{params / times[0] / 1e3:.1f}"]
    return [name, str(width), *cells]


def gpu_row(name: str, spec: Spec, width: int) -> list[str]:
    """Microseconds per megapixel of picture at 1/8 resolution, from counts alone."""
    macs = eager = fused = last = 0
    for layer in (layer for layers in spec for layer in layers):
        if isinstance(layer, nn.Conv2d):
            macs, last = macs + layer.weight.numel(), layer.out_channels
            eager, fused = eager + layer.in_channels + last, fused + layer.in_channels + last
        else:
            eager += 2 * last
    eager += 3 * width * len(spec)  # each sum reads two maps and writes one;
    fused += width * len(spec)  # in a conv's epilogue it only reads one more
    twice = 2 * 1e6 * 1e6 / 8**2  # 2 FLOP or bytes, in microseconds, per megapixel
    compute, memory = twice * macs / GPU_FLOPS, [twice * n / GPU_BYTES for n in (eager, fused)]
    bound = [f"{max(compute, m):.1f} ({'memory' if m > compute else 'compute'})" for m in memory]
    return [name, str(width), f"{compute:.1f}", *(f"{m:.1f}" for m in memory), *bound]


def table(head: str, rows: list[list[str]]) -> str:
    lines = [head.split("; "), ["---", *["---:"] * head.count("; ")], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = re.findall(r"^(cpu family|model|model name)\s*: (.*)$", text, re.M)[:3]
    units = set(re.findall(r"\b(?:avx512_vnni|avx512_bf16|amx_int8|amx_bf16)\b", text))
    return ", ".join([*map(" ".join, names), *sorted(units)]) or platform.machine()


def cpu_tables(threads: int) -> str:
    torch.set_num_threads(threads)
    jobs = [partial(block_times, f(c), c, s) for s in (8, 16) for _, c, f in ROWS]
    jobs += [partial(forward_times, a(), (1, 192, 64, 96)) for a in ACTS]
    passes = [[job() for job in jobs] for _ in range(PASSES)]
    best = iter([min(t) for t in zip(*runs, strict=True)] for runs in zip(*passes, strict=True))
    text = ""
    for s in (8, 16):
        rows = [cpu_row(name, f(c), c, s, next(best)) for name, c, f in ROWS]
        text += f"## CPU, {threads} thread(s), 1/{s} resolution\n\n{table(CPU_HEAD, rows)}\n"
    rows = [[a.__name__, *(f"{t:.2f}" for t in next(best))] for a in ACTS]
    return f"{text}Activations alone, 192 x 64 x 96:\n\n{table(ACT_HEAD, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default="docs/blocks.md", help="file to fill in")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    if platform.libc_ver()[0] == "glibc":  # keep freed maps, or every one is paged in anew
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):  # mmap max, trim, top pad
            ctypes.CDLL(None).mallopt(option, value)
    kept = args.out.read_text().split(MARKER)[0] if args.out.exists() else ""
    text = f"Machine: {cpu_name()}; {os.cpu_count()} cores; torch {torch.__version__}.\n\n"
    text += "".join(cpu_tables(threads) for threads in args.threads)
    rows = [gpu_row(name, f(c), c) for name, c, f in ROWS if "ReLU" not in name]
    text += f"## GPU on paper, µs per megapixel (calculated)\n\n{table(GPU_HEAD, rows)}"
    args.out.write_text(f"{kept}{MARKER}\n\n{text}")


if __name__ == "__main__":
    main()
