"""Files and colour profiles of kinds that Pillow does not write, for the tests of pictures."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# red and green change places: no picture looks the same when this is lost
SWAPPED = SRGB.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")


def stored(image: Image.Image, kind: str = "PNG", **options) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


def deep_values(pixels: np.ndarray, channels: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W, 1..4) uint16 that need all their bits; no alpha is 0."""
    extra = np.random.default_rng(0).integers(1, 256, (*pixels.shape[:2], 4))
    high = np.concatenate([pixels, pixels[..., ::-1]], 2)[..., :channels]
    return (high.astype(int) * 256 + extra[..., :channels]).astype(np.uint16)


def deep_png(values: np.ndarray, *chunks: tuple[bytes, bytes]) -> io.BytesIO:
    """(H, W, 1..4) uint16 -> a 16-bit PNG file without row filters."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


def deep_tiff(values: np.ndarray, *, order="<", deflate=False, predictor=False, planar=False, turned=1, start=0) -> io.BytesIO:
    """(H, W, 1, 3 or 4) uint16 -> a 16-bit TIFF file in strips of 16 rows, with the orientation `turned`.

    All places in it count from `start` bytes before it.
    """
    height, width, channels = values.shape
    strips = []
    for plane in values.transpose(2, 0, 1)[..., None] if planar else [values]:
        for top in range(0, height, 16):
            strip = plane[top : top + 16]
            if predictor:
                strip = np.diff(strip, axis=1, prepend=np.zeros_like(strip[:, :1]))
            data = strip.astype(f"{order}u2").tobytes()
            strips.append(zlib.compress(data) if deflate else data)
    tags = {
        256: [width], 257: [height], 258: [16] * channels, 259: [8 if deflate else 1], 262: [2 if channels > 1 else 1],
        273: [0] * len(strips), 274: [turned], 277: [channels], 278: [16], 279: [len(strip) for strip in strips],
        284: [2 if planar else 1], 317: [2 if predictor else 1],
    }  # fmt: skip
    if channels == 4:
        tags[338] = [2]
    tables = start + 8 + 2 + 12 * len(tags) + 4
    place = tables + sum(4 * len(v) for v in tags.values() if len(v) > 1)
    for i, strip in enumerate(strips):
        tags[273][i] = place
        place += len(strip)
    entries, extra = b"", b""
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers))
        entries += packed if len(numbers) == 1 else struct.pack(f"{order}I", tables + len(extra))
        extra += packed if len(numbers) > 1 else b""
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    head = start + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + extra
    return io.BytesIO(head + b"".join(strips))


def cmyk_profile() -> bytes:
    """An ICC profile with inks of its own: cyan prints green."""
    inks = {0: (60, -70, 60), 1: (60, 98, -60), 2: (97, -21, 94), 3: (20, 40, 30)}
    table = b""
    for i in range(16):  # all corners, cyan slowest
        used = [inks[ink] for ink in range(4) if i >> (3 - ink) & 1]
        lightness, a, b = np.mean(used, 0) if used else (100, 0, 0)
        table += bytes([round(lightness * 255 / 100), round(a) + 128, round(b) + 128])
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    tag = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + table + ramp * 3
    return _profile(b"CMYK", b"prtr", b"Lab ", {b"A2B0": tag})


def grey_profile(gamma: float) -> bytes:
    tag = b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(gamma * 256))
    return _profile(b"GRAY", b"mntr", b"XYZ ", {b"kTRC": tag})


def _profile(space: bytes, kind: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    white = struct.pack(">3i", 63190, 65536, 54061)  # D50
    tags = tags | {b"wtpt": b"XYZ " + bytes(4) + white}
    table, data, place = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", place + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    size = struct.pack(">I", 128 + len(table + data))
    head = size + bytes(4) + b"\x02\x40\0\0" + kind + space + connection + bytes(12) + b"acsp"
    return head + bytes(28) + white + bytes(48) + table + data
