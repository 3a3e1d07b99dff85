"""Video codecs coding one picture, through the ffmpeg that the package imageio-ffmpeg brings.

Colours are converted here and not by ffmpeg: RGB to 10-bit full-range Y'CbCr with the BT.709 matrix in float, rounded
once, and back. What counts as the file is the raw bitstream, without a container.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import MlicError, PictureError

_PEAK = 1023  # 10 bits
_KR, _KB = 0.2126, 0.0722  # ITU-R BT.709-6, 3.2
_TO_YCBCR = np.array(
    [
        [_KR, 1 - _KR - _KB, _KB],
        [-_KR / 2 / (1 - _KB), -(1 - _KR - _KB) / 2 / (1 - _KB), 0.5],
        [0.5, -(1 - _KR - _KB) / 2 / (1 - _KR), -_KB / 2 / (1 - _KR)],
    ]
)
_TO_RGB = np.linalg.inv(_TO_YCBCR)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoPeer:
    """An encoder of ffmpeg's on one frame. Fields as `PillowPeer`'s; `options` may contain {quality} and {threads}."""

    name: str
    label: str
    encoder: str
    stream: str  # ffmpeg's name of the raw bitstream format
    subsampling: str  # of chroma: 4:4:4 or 4:2:0
    qualities: tuple[float, ...]  # QP
    scale: tuple[float, ...]
    preset: str
    options: tuple[str, ...]
    package: str = "imageio-ffmpeg"

    def missing(self) -> str | None:
        """Why this codec cannot run here, naming the package that helps; None when it can."""
        if find_spec("imageio_ffmpeg") is None:
            return f"{self.name} needs the package {self.package}: pip install {self.package}"
        if self.encoder not in _encoders():
            return f"{self.name} needs an ffmpeg with {self.encoder}; that of this {self.package} has none: try a newer one"
        return None

    def version(self) -> str:
        """Name and version of the software that does the work."""
        import imageio_ffmpeg

        return f"ffmpeg {imageio_ffmpeg.get_ffmpeg_version()} with {self.encoder}"

    def settings(self) -> dict[str, object]:
        """Everything that determines the files but picture and quality, for the record."""
        return {
            "encoder": self.encoder,
            "preset": self.preset,
            "options": " ".join(self.options),
            "samples": f"10-bit {self.subsampling} full-range BT.709",
            "file": f"raw {self.stream} bitstream",
        }

    def encode(self, pixels: np.ndarray, quality: float, *, threads: int = 1) -> bytes:
        """(H, W, 3) uint8 -> the bitstream. 4:2:0 needs even sides; other pictures raise PictureError."""
        height, width = pixels.shape[:2]
        if self.subsampling == "4:2:0" and (height % 2 or width % 2):
            raise PictureError(f"{self.name} codes 4:2:0 and needs even sides, not {width}x{height}")
        options = [text.format(quality=whole_number(self.name, quality), threads=threads) for text in self.options]
        samples = f"yuv{self.subsampling.replace(':', '')}p10le"
        source = ["-f", "rawvideo", "-pixel_format", samples, "-video_size", f"{width}x{height}", "-i", "-"]
        target = ["-c:v", self.encoder, "-preset", self.preset, *options, "-f", self.stream]
        with tempfile.TemporaryDirectory() as folder:
            coded = Path(folder, "coded")
            _ffmpeg([*source, "-frames:v", "1", *target, str(coded)], planes_bytes(pixels, self.subsampling))
            return coded.read_bytes()

    def decode(self, data: bytes, *, threads: int = 1) -> np.ndarray:
        """The bitstream -> (H, W, 3) uint8."""
        with tempfile.TemporaryDirectory() as folder:
            coded = Path(folder, "coded")
            coded.write_bytes(data)
            source = ["-threads", str(threads), "-f", self.stream, "-i", str(coded)]
            frame = _ffmpeg([*source, "-frames:v", "1", "-strict", "-1", "-f", "yuv4mpegpipe", "-"], b"")
        head, _, samples = frame.partition(b"FRAME\n")
        match = re.match(rb"YUV4MPEG2 W(\d+) H(\d+) ", head)
        if not match:
            raise MlicError(f"ffmpeg decoded no picture from the {self.stream} bitstream")
        return planes_to_pixels(samples, int(match[2]), int(match[1]), self.subsampling)


def whole_number(codec: str, quality: float) -> int:
    """A quality as the integer it must be. Raises MlicError when it is none."""
    if quality != int(quality):
        raise MlicError(f"{codec} takes whole numbers for quality, not {quality:g}")
    return int(quality)


def planes_bytes(pixels: np.ndarray, subsampling: str) -> bytes:
    """(H, W, 3) uint8 RGB -> the three 10-bit planes, little-endian 16-bit words; 4:2:0 chroma is filtered bicubically."""
    height, width = pixels.shape[:2]
    planes = np.tensordot(_TO_YCBCR, pixels / 255, (1, 2)) * _PEAK + np.array([0, 512, 512]).reshape(3, 1, 1)
    if subsampling == "4:2:0":
        chroma = [_resize(plane, width // 2, height // 2) for plane in planes[1:]]
    else:
        chroma = list(planes[1:])
    return b"".join(np.rint(plane).clip(0, _PEAK).astype("<u2").tobytes() for plane in (planes[0], *chroma))


def planes_to_pixels(samples: bytes, height: int, width: int, subsampling: str) -> np.ndarray:
    """The inverse of `planes_bytes`: (H, W, 3) uint8, rounded.

    >>> grey = np.full((4, 6, 3), 77, np.uint8)
    >>> bool((planes_to_pixels(planes_bytes(grey, "4:2:0"), 4, 6, "4:2:0") == grey).all())
    True
    """
    words = np.frombuffer(samples, "<u2").astype(np.float64)
    rows, columns = (height // 2, width // 2) if subsampling == "4:2:0" else (height, width)
    luma, chroma = words[: height * width].reshape(height, width), words[height * width :].reshape(2, rows, columns)
    if subsampling == "4:2:0":
        chroma = np.stack([_resize(plane, width, height) for plane in chroma])
    planes = np.stack([luma, *(chroma - 512)]) / _PEAK
    rgb = np.tensordot(planes, _TO_RGB, (0, 1)) * 255
    return np.rint(rgb).clip(0, 255).astype(np.uint8)


def _resize(plane: np.ndarray, width: int, height: int) -> np.ndarray:
    image = Image.fromarray(plane.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float64)


def _ffmpeg(arguments: list[str], data: bytes) -> bytes:
    """Run ffmpeg with `data` on stdin -> its stdout. Raises MlicError with the first line of its complaint."""
    import imageio_ffmpeg

    common = ["-hide_banner", "-loglevel", "error", "-y", *([] if data else ["-nostdin"])]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *common, *arguments]
    done = subprocess.run(command, input=data, capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise MlicError(f"ffmpeg failed: {lines[0]}")
    return done.stdout


@functools.cache
def _encoders() -> str:
    return _ffmpeg(["-encoders"], b"").decode()
