"""`mlic demo`: this codec beside JPEG, WebP and AVIF on one picture, at file sizes as near as those codecs allow."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .cores import cores
from .metrics import MS_SSIM_MIN_SIDE, ms_ssim, ms_ssim_db, psnr
from .peers import PEERS, nearest_in_size

_RIVALS = {"JPEG": ("jpeg", "jpeg-420"), "WebP": ("webp",), "AVIF": ("avif",)}  # the best by PSNR of these peers counts


@dataclass(frozen=True)
class Row:
    """One codec at one setting: `bytes` is the real file size, `bpp` bits per pixel, times are wall-clock seconds.

    `psnr` is in dB; `ms_ssim` is None for a picture too small for it. `pixels`, where they are kept, are what the file
    decodes to, (H, W, 3) uint8.
    """

    codec: str
    setting: str
    bytes: int
    bpp: float
    psnr: float
    ms_ssim: float | None
    encode_s: float
    decode_s: float
    pixels: np.ndarray | None = field(default=None, repr=False, compare=False)


def run_demo(
    original: np.ndarray,
    *,
    qualities: Sequence[int] = (10, 30, 50, 70, 90),
    model: str = "fast",
    keep: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Compress a picture, (H, W, 3) uint8, with mlic and, at the nearest size each can reach, with JPEG, WebP and AVIF.

    For every quality the rows are mlic's and then one per other codec. Compare the bytes before the dB, for at the ends of
    its range a codec may have nothing near. The others' settings are those of `mlic eval`, for JPEG the better of 4:4:4
    and 4:2:0. One untimed run comes first, so that mlic's times do not include loading the model. Rows of the quality
    `keep` keep their pixels. `progress` is told a line before each quality, and one for each codec that cannot run here.
    """
    say, missing = progress or (lambda line: None), _missing()
    for reason in missing.values():
        say(f"skipped: {reason}")
    _code_mlic(original[:64, :64], 50, model)
    rows = []
    for quality in qualities:
        say(f"quality {quality}: mlic, then the other codecs at its file size")
        ours = _code_mlic(original, quality, model)
        others = [_code_nearest(original, codec, ours.bytes) for codec in _RIVALS if codec not in missing]
        rows += [row if quality == keep else replace(row, pixels=None) for row in (ours, *others)]
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """Lay `run_demo`'s rows out as plain text, with a blank line before each mlic row but the first.

    The column "vs mlic" is the file size relative to the mlic row above.

    >>> print(format_table([Row("mlic", "q50 fast", 2000, 0.5, 31.25, 0.99, 0.12, 0.25),
    ...                     Row("JPEG", "q41 4:2:0", 2100, 0.525, 29.5, None, 0.004, 0.002),
    ...                     Row("WebP", "q30", 1990, 0.4975, 30.5, None, 0.004, 0.002),
    ...                     Row("AVIF", "q44 4:4:4", 2000, 0.5, 31.0, None, 0.4, 0.02)]))
    codec  setting    bytes  vs mlic    bpp  PSNR dB  MS-SSIM  MS-SSIM dB  encode s  decode s
    mlic   q50 fast   2,000           0.500    31.25  0.99000       20.00     0.120     0.250
    JPEG   q41 4:2:0  2,100    +5.0%  0.525    29.50        -           -     0.004     0.002
    WebP   q30        1,990    -0.5%  0.497    30.50        -           -     0.004     0.002
    AVIF   q44 4:4:4  2,000    +0.0%  0.500    31.00        -           -     0.400     0.020
    """
    titles = "codec,setting,bytes,vs mlic,bpp,PSNR dB,MS-SSIM,MS-SSIM dB,encode s,decode s".split(",")
    table: list[list[str]] = [titles]
    ours: Row | None = None
    for row in rows:
        if row.codec == "mlic":
            if ours:
                table.append([])
            ours = row
        relative = f"{row.bytes / ours.bytes - 1:+.1%}" if ours and ours is not row else ""
        similarity = "-" if row.ms_ssim is None else f"{row.ms_ssim:.5f}"
        similarity_db = "-" if row.ms_ssim is None else f"{ms_ssim_db(row.ms_ssim):.2f}"
        numbers = [f"{row.bpp:.3f}", f"{row.psnr:.2f}", similarity, similarity_db]
        times = [f"{row.encode_s:.3f}", f"{row.decode_s:.3f}"]
        table.append([row.codec, row.setting, f"{row.bytes:,}", relative, *numbers, *times])
    widths = [max(len(line[i]) for line in table if line) for i in range(len(titles))]
    alignments = "<<" + ">" * (len(titles) - 2)
    lines = ["  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(line, alignments, widths)) for line in table]
    absent = [reason for codec, reason in _missing().items() if codec not in {row.codec for row in rows}]
    return "\n".join(lines + [""] * bool(absent) + [f"skipped: {reason}" for reason in absent])


def comparison_picture(original: np.ndarray, rows: Sequence[Row], *, crop: int = 256, scale: int = 2) -> Image.Image:
    """The same crop side by side, an RGB image: the original, then JPEG, WebP, AVIF and mlic at nearly one file size.

    `rows` are `run_demo`'s of one quality, with their pixels. Bytes and PSNR on the labels are the whole picture's. The
    crop, at most `crop` pixels a side and shown `scale` times as large, is where the picture has the most texture.
    Raises ValueError where one of the two is below 1.
    """
    if crop < 1 or scale < 1:
        raise ValueError(f"crop and scale must be at least 1, got crop={crop}, scale={scale}")
    ours, *others = rows
    panels = [("original", f"{original.nbytes:,} bytes raw", original)]
    panels += [(c.codec, f"{c.bytes:,} bytes   {c.psnr:.2f} dB", c.pixels) for c in (*others, ours)]

    left, top, right, bottom = detailed_box(original, crop)
    width, height = (right - left) * scale, (bottom - top) * scale
    size = max(11, min(36, width // 14))  # of the codec's name, in pixels; the line below is smaller
    name_font, line_font = ImageFont.load_default(size), ImageFont.load_default(max(10, round(size * 0.8)))
    # A panel is as wide as its crop or its longest label, so that a tiny picture keeps its labels.
    column = max([width] + [int(line_font.getlength(text)) + 1 for _, text, _ in panels])
    margin, gap = size // 2, size // 3
    strip = gap + 5 * size // 2
    canvas = Image.new("RGB", (margin + len(panels) * (column + margin), margin + height + strip + margin), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (name, text, pixels) in enumerate(panels):
        x = margin + i * (column + margin)
        tile = Image.fromarray(pixels[top:bottom, left:right])
        canvas.paste(tile.resize((width, height), Image.Resampling.NEAREST), (x + (column - width) // 2, margin))
        middle, y = x + column // 2, margin + height + gap
        draw.text((middle, y), name, "#0b57a4" if name == "mlic" else "#111111", name_font, anchor="ma")
        draw.text((middle, y + 4 * size // 3), text, "#555555", line_font, anchor="ma")
    return canvas


def _missing() -> dict[str, str]:
    """The codecs that cannot run here, each with the reason."""
    return {codec: reason for codec, peers in _RIVALS.items() for name in peers if (reason := PEERS[name].missing())}


def _row(codec: str, setting: str, original: np.ndarray, encode: Callable, decode: Callable) -> Row:
    """`encode()` gives a file's bytes, `decode(data)` their pixels."""
    start = time.perf_counter()
    data = encode()
    encoded = time.perf_counter()
    pixels = decode(data)
    decoded = time.perf_counter()
    height, width = original.shape[:2]
    similarity = ms_ssim(original, pixels) if min(height, width) >= MS_SSIM_MIN_SIDE else None
    bpp, error = 8 * len(data) / (height * width), psnr(original, pixels)
    return Row(codec, setting, len(data), bpp, error, similarity, encoded - start, decoded - encoded, pixels)


def _code_mlic(original: np.ndarray, quality: int, model: str) -> Row:
    import mlic

    encode = functools.partial(mlic.encode, original, quality=quality, model=model)
    setting = f"q{quality} {model}"
    return _row("mlic", setting, original, encode, lambda data: np.asarray(mlic.decode(data, model).convert("RGB")))


def _code_nearest(original: np.ndarray, codec: str, target: int) -> Row:
    """Compress to the size nearest to `target` bytes, with the best by PSNR of the codec's peers that get there."""
    threads, candidates = cores(), []
    for peer in (PEERS[name] for name in _RIVALS[codec]):
        quality, _ = nearest_in_size(peer, original, target, threads=threads)
        setting = f"q{quality:g} {peer.settings().get('subsampling', '')}".strip()
        encode = functools.partial(peer.encode, original, quality, threads=threads)
        candidates.append(_row(codec, setting, original, encode, functools.partial(peer.decode, threads=threads)))
    # At the ends of the quality range one of the peers may be far from the target; it must not win by being larger.
    slack = max(target // 20, min(abs(c.bytes - target) for c in candidates))
    return max((c for c in candidates if abs(c.bytes - target) <= slack), key=lambda c: c.psnr)


def detailed_box(pixels: np.ndarray, crop: int) -> tuple[int, int, int, int]:
    """The (left, top, right, bottom) of the crop with the most texture, on a grid of 16 pixels.

    Texture is the mean, over blocks of 16 x 16, of the square root of the standard deviation of luma: the root keeps a
    few hard edges from outweighing detail everywhere in the crop.
    """
    block = 16
    height, width = (min(crop, side) for side in pixels.shape[:2])
    luma = np.asarray(Image.fromarray(pixels).convert("L"), np.float32)
    luma = np.pad(luma, [(0, -side % block) for side in luma.shape], mode="edge")
    blocks = luma.reshape(luma.shape[0] // block, block, luma.shape[1] // block, block).std(axis=(1, 3))
    windows = np.lib.stride_tricks.sliding_window_view(np.sqrt(blocks), (-(-height // block), -(-width // block)))
    row, column = np.unravel_index(np.argmax(windows.mean(axis=(2, 3))), windows.shape[:2])
    left, top = min(int(column) * block, pixels.shape[1] - width), min(int(row) * block, pixels.shape[0] - height)
    return left, top, left + width, top + height
