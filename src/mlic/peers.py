"""Other codecs, to be measured as ours is: through Pillow, its plugins and ffmpeg (video.py), at still-picture settings
chosen for PSNR.

A peer turns (H, W, 3) uint8 pixels into the bytes of a file and those bytes back into pixels. Its fields are its exact
settings, and results files record them; docs/evaluation.md says why each is what it is.
"""

from __future__ import annotations

import bisect
import dataclasses
import io
from importlib import metadata
from importlib.util import find_spec

import numpy as np
from PIL import Image, features

from .errors import MlicError
from .plugins import load_plugins
from .video import VideoPeer, whole_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class PillowPeer:
    """A codec behind Pillow's `Image.save`.

    `qualities` are measured when nobody says otherwise; `scale` is a fine ladder from the worst to the best, to search
    for a file size. Both are values of the option `quality_option`; every other option is in `options`.
    """

    name: str
    label: str
    file_format: str
    qualities: tuple[float, ...]
    scale: tuple[float, ...]
    options: dict[str, object]
    quality_option: str = "quality"
    threads_option: str | None = None
    plugin: str | None = None  # module of Pillow's plugin (plugins.py)
    package: str = "pillow"  # on PyPI
    feature: str | None = None  # what Pillow itself must have been built with

    def missing(self) -> str | None:
        """Why this codec cannot run here, naming the package that helps; None when it can."""
        if self.plugin and find_spec(self.plugin) is None:
            return f"{self.name} needs the package {self.package}: pip install {self.package}"
        if self.feature and not features.check(self.feature):
            return f"{self.name} needs a Pillow built with {self.feature}: the wheels of Pillow 11.3 and later are"
        return None

    def version(self) -> str:
        """Name and version of the software that does the work."""
        library = f" with {self.feature} {features.version(self.feature)}" if self.feature else ""
        return f"{self.package} {metadata.version(self.package)}{library}"

    def settings(self) -> dict[str, object]:
        """Everything that determines the files but picture and quality, for the record."""
        return {"format": self.file_format, "quality option": self.quality_option, **self.options}

    def encode(self, pixels: np.ndarray, quality: float, *, threads: int = 1) -> bytes:
        """(H, W, 3) uint8 -> the file's bytes."""
        self._prepare()
        # JPEG 2000 takes compression ratios: ours is bits per pixel
        value = [24 / quality] if self.quality_option == "quality_layers" else whole_number(self.name, quality)
        options: dict[str, object] = {**self.options, self.quality_option: value}
        if self.threads_option:
            options[self.threads_option] = threads
        buffer = io.BytesIO()
        try:
            Image.fromarray(pixels).save(buffer, self.file_format, **options)
        except ValueError as error:  # such as WebP's of sides beyond 16383
            raise MlicError(f"{self.label}: {error}") from None
        return buffer.getvalue()

    def decode(self, data: bytes, *, threads: int = 1) -> np.ndarray:
        """The file's bytes -> (H, W, 3) uint8."""
        self._prepare()
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))

    def _prepare(self) -> None:
        if self.plugin:
            load_plugins()


_PERCENT = tuple(range(1, 101))

PEERS: dict[str, PillowPeer | VideoPeer] = {
    peer.name: peer
    for peer in (
        PillowPeer(
            name="jpeg",
            label="JPEG",
            file_format="JPEG",
            qualities=(5, 10, 20, 35, 55, 75, 88),
            scale=_PERCENT[:95],
            options={"optimize": True, "progressive": True, "subsampling": "4:4:4"},
        ),
        PillowPeer(
            name="jpeg-420",
            label="JPEG 4:2:0",
            file_format="JPEG",
            qualities=(5, 10, 20, 35, 55, 75, 88),
            scale=_PERCENT[:95],
            options={"optimize": True, "progressive": True, "subsampling": "4:2:0"},
        ),
        PillowPeer(
            name="webp",
            label="WebP",
            file_format="WEBP",
            qualities=(1, 12, 30, 50, 68, 80, 90),
            scale=_PERCENT,
            options={"method": 6},
            feature="webp",
        ),
        PillowPeer(
            name="avif",
            label="AVIF",
            file_format="AVIF",
            qualities=(15, 25, 36, 47, 58, 68, 78),
            scale=_PERCENT,
            options={"codec": "aom", "speed": 4, "subsampling": "4:4:4", "range": "full", "advanced": {"tune": "psnr"}},
            threads_option="max_threads",
            feature="avif",
        ),
        PillowPeer(
            name="jxl",
            label="JPEG XL",
            file_format="JXL",
            qualities=(8, 20, 30, 42, 56, 70, 82, 90),
            scale=_PERCENT[:99],
            options={"effort": 9},
            threads_option="num_threads",
            plugin="pillow_jxl",
            package="pillow-jxl-plugin",
        ),
        PillowPeer(
            name="jpeg2000",
            label="JPEG 2000",
            file_format="JPEG2000",
            qualities=(0.1, 0.18, 0.32, 0.55, 0.9, 1.4, 2),
            scale=tuple(np.geomspace(0.03, 6, 600).round(4).tolist()),
            options={"irreversible": True, "mct": 1, "quality_mode": "rates", "no_jp2": True},
            quality_option="quality_layers",
            feature="jpg_2000",
        ),
        PillowPeer(
            name="heic",
            label="HEIC",
            file_format="HEIF",
            qualities=(8, 16, 24, 32, 40, 48, 56),
            scale=_PERCENT,
            options={"chroma": 444, "enc_params": {"preset": "slower", "tune": "psnr"}},
            plugin="pillow_heif",
            package="pillow-heif",
        ),
        VideoPeer(
            name="x265",
            label="HEVC (x265)",
            encoder="libx265",
            stream="hevc",
            subsampling="4:4:4",
            qualities=(44, 40, 36, 33, 30, 27, 23),
            scale=tuple(range(51, 3, -1)),
            preset="veryslow",
            options=("-tune", "psnr", "-x265-params", "qp={quality}:info=0:pools={threads}:log-level=error"),
        ),
        VideoPeer(
            name="vvc",
            label="VVC (VVenC)",
            encoder="libvvenc",
            stream="vvc",
            subsampling="4:2:0",
            qualities=(44, 40, 36, 33, 30, 26),
            scale=tuple(range(60, 3, -1)),
            preset="medium",
            options=("-qp", "{quality}", "-qpa", "0", "-vvenc-params", "threads={threads}:verbosity=1"),
        ),
    )
}


def find_peer(name: str) -> PillowPeer | VideoPeer:
    """The peer of that name, ready to run. Raises MlicError when there is none, or naming the package it lacks.

    >>> find_peer("jpeg").label
    'JPEG'
    """
    if name not in PEERS:
        raise MlicError(f"no codec called {name!r}; there are {', '.join(PEERS)}")
    if reason := PEERS[name].missing():
        raise MlicError(reason)
    return PEERS[name]


def nearest_in_size(peer: PillowPeer | VideoPeer, pixels: np.ndarray, size: int, *, threads: int = 1) -> tuple[float, bytes]:
    """The quality on the peer's scale whose file is nearest to `size` bytes, and that file, by bisection.

    >>> noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    >>> quality, data = nearest_in_size(PEERS["jpeg"], noise, 1500)
    >>> 1400 < len(data) < 1600
    True
    """
    tried: dict[float, bytes] = {}

    def coded_size(quality: float) -> int:
        tried[quality] = peer.encode(pixels, quality, threads=threads)
        return len(tried[quality])

    bisect.bisect_left(peer.scale, size, key=coded_size)
    quality = min(tried, key=lambda q: abs(len(tried[q]) - size))
    return quality, tried[quality]
