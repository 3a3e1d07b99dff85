"""What is done with each file: `Encode` and `Decode` hold the settings and turn one file's bytes into another's."""

from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Callable

from . import codec, weights
from .container import MlicFile
from .errors import DamagedFile, PictureError
from .pictures import read_picture
from .saving import picture_bytes
from .tiles import Progress

UNITS = {"size": "bytes", "bpp": "bits per pixel", "psnr": "dB"}
FLOATING = "coded with --float, which decodes only on the kind of machine, and with as many threads, as wrote it"
_loading = threading.Lock()  # threads that begin together load the weights once


@dataclasses.dataclass(frozen=True)
class Coded:
    """A file to write, the pixels in the coded picture, notes for the user, and a detail for those who want more."""

    data: bytes
    pixels: int
    notes: tuple[str, ...] = ()
    detail: str = ""


Task = Callable[..., Coded]  # of a file's bytes, the output's extension, and progress; pickled for other machines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encode:
    """Picture -> .mlic file. `target`: ("size", bytes), ("bpp", bits per pixel) or ("psnr", dB), not with a quality."""

    model: str = "fast"
    device: str = "cpu"
    quality: float | None = None
    target: tuple[str, float] | None = None
    exact: bool = True
    effort: int | None = None
    strip: bool = False
    tile: int | None = None

    def __call__(self, data: bytes, extension: str, progress: Progress | None = None) -> Coded:
        with _loading:
            network = weights.load_model(self.model, device=self.device)
        picture = read_picture(io.BytesIO(data), strip=self.strip)
        settings = {"exact": self.exact, "effort": self.effort, "tile": self.tile, "progress": progress}
        pixels = picture.pixels.shape[0] * picture.pixels.shape[1]
        notes, detail = picture.notes, ""
        if self.target is None:
            coded = codec.encode_picture(network, picture, self.quality, **settings).data
        else:
            from .rate_control import encode_to_target

            kind, value = self.target
            found = encode_to_target(network, picture, **{kind: value}, **settings)
            times = f"{found.passes} pass" + "es" * (found.passes > 1)
            detail = f"quality {found.quality:.2f} gives {found.reached:.6g} {UNITS[kind]}, found in {times}"
            coded, notes = found.data, notes + ((found.note,) if found.note else ())
        if len(coded) > len(data):
            notes += (f"larger than it was: {len(data)} bytes before, {len(coded)} now",)
        return Coded(coded, pixels, notes, detail)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """.mlic file -> picture of the kind that the extension says. `region`: x, y, width, height; `scale`: 1 to 8."""

    model: str | None = None
    device: str = "cpu"
    region: tuple[int, int, int, int] | None = None
    scale: int = 1
    allow_partial: bool = False

    def __call__(self, data: bytes, extension: str, progress: Progress | None = None) -> Coded:
        file = MlicFile.from_bytes(data, allow_partial=self.allow_partial)
        floating = not file.exact
        with _loading:
            network = codec.model_for(file, self.model, self.device)
        try:
            picture = codec.decode_file(network, file, region=self.region, scale=self.scale, progress=progress)
        except ValueError as error:  # the region is not inside this picture
            raise PictureError(str(error)) from None
        except DamagedFile as error:
            if not floating:
                raise
            raise DamagedFile(f"{error}; {FLOATING}") from None
        notes = ((FLOATING,) if floating else ()) + picture.notes
        return Coded(picture_bytes(picture, extension), file.width * file.height, notes)
