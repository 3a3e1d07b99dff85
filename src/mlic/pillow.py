"""The .mlic format for Pillow: after `import mlic.pillow`, Image.open and Image.save know it.

>>> import io
>>> from PIL import Image
>>> file = io.BytesIO()
>>> Image.new("RGB", (40, 30), "teal").save(file, "MLIC", quality=70)
>>> with Image.open(file) as image:
...     image.format, image.mode, image.size, image.info["quality"]
('MLIC', 'RGB', (40, 30), 70.0)

Options of `save`: quality, model, exact, effort and tile as for `encode_picture`; icc_profile, exif and xmp replace those of
the image, None leaves them out; target_size (bytes), target_bpp or target_psnr (dB) in place of quality. Others are
ignored, as Pillow does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mimetypes
import struct
import warnings
from typing import IO, Any

from PIL import Image, ImageFile

from .config import quality_of
from .container import SIGNATURE, MlicFile
from .errors import DamagedFile, MlicError, UnsupportedFile

MIME = "image/x-mlic"


class MlicImageFile(ImageFile.ImageFile):
    """An opened file: the header is read at once, the picture decoded by `load`.

    `info` has icc_profile, exif and xmp where the file does, model, and quality (1..100) for models known by name. With
    ImageFile.LOAD_TRUNCATED_IMAGES, what is there of a truncated file is given.
    """

    format = "MLIC"
    format_description = "MLIC learned image compression"

    def _open(self) -> None:
        try:
            file = MlicFile.from_bytes(_beginning(self.fp), allow_partial=True)
        except DamagedFile as error:
            raise SyntaxError(str(error)) from None  # for Pillow: not this format after all
        except UnsupportedFile as error:
            raise OSError(str(error)) from None
        self._size = file.width, file.height
        self._mode = ("L" if file.grey else "RGB") + ("A" if file.alpha else "")
        if file.depth == 16 and self._mode == "L":
            self._mode = "I;16"
        exif = file.exif and b"Exif\0\0" + file.exif
        self.info |= {key: value for key, value in (("icc_profile", file.icc), ("exif", exif), ("xmp", file.xmp)) if value}
        self.info["model"] = file.model
        if (quality := quality_of(file.model, file.quality)) is not None:
            self.info["quality"] = quality
        self._set_scale(1)

    def _set_scale(self, scale: int) -> None:
        self.tile = [ImageFile._Tile("mlic", (0, 0, *self.size), 0, (scale,))]

    def draft(self, mode: str | None, size: tuple[int, int] | None):
        """Decode at 1/2, 1/4 or 1/8 of the size, the smallest that is not below `size`; `mode` stays."""
        if not self.tile or self.tile[0].args != (1,) or not size:
            return None
        ratio = min(self.width // max(1, size[0]), self.height // max(1, size[1]))
        scale = max(s for s in (1, 2, 4, 8) if s <= max(1, ratio))
        box = (0, 0, self.width / scale, self.height / scale)
        self._size = -(-self.width // scale), -(-self.height // scale)
        self._set_scale(scale)
        return self.mode, box

    def verify(self) -> None:
        """Check the file's checksums without decoding it. Raises OSError."""
        if self.fp is None:
            raise RuntimeError("verify must be called directly after open")  # as Pillow's own formats say
        try:
            self.fp.seek(0)
            MlicFile.from_bytes(self.fp.read())
        except MlicError as error:
            raise OSError(str(error)) from None
        finally:
            super().verify()


class MlicDecoder(ImageFile.PyDecoder):
    """What `load` calls: reads the whole file and fills the image."""

    _pulls_fd = True

    def decode(self, buffer: Any) -> tuple[int, int]:
        from .codec import model_for  # with torch, which opening a file does not need
        from .decoding import decode_file
        from .saving import to_pillow

        self.fd.seek(0)
        try:
            file = MlicFile.from_bytes(self.fd.read(), allow_partial=ImageFile.LOAD_TRUNCATED_IMAGES)
            picture = decode_file(model_for(file), file, scale=self.args[0])
        except MlicError as error:
            raise OSError(str(error)) from None
        for note in picture.notes:
            warnings.warn(note, stacklevel=2)
        self.set_as_raw(to_pillow(picture).tobytes())
        return -1, 0


def _beginning(fp: IO[bytes]) -> bytes:
    """A file up to its coded pixels, and a few bytes of these; nothing else than lengths of chunks is understood."""
    data = bytearray(fp.read(len(SIGNATURE) + 1))
    while True:
        start = fp.read(8)
        data += start
        if len(start) < 8 or start[:4] == b"DATA" or not start[:4].isalpha():
            return bytes(data + fp.read(8))
        data += fp.read(struct.unpack_from("<I", start, 4)[0] + 4)


def _accept(prefix: bytes) -> bool:
    return prefix.startswith(SIGNATURE)


def _relabelled(image: Image.Image, metadata: dict[str, bytes]) -> Image.Image:
    """A copy with other metadata; the tags of a TIFF file are not in `info`, and a mere copy would lose them."""
    from .metadata import descriptive_tags

    copy = image.copy()
    with contextlib.suppress(Exception):  # Pillow can raise anything on odd tags
        if image.format == "TIFF" and (tags := descriptive_tags(image)):
            copy.info["exif"] = tags.tobytes()
    copy.info |= metadata
    return copy


def _save(image: Image.Image, fp: IO[bytes], filename: str | bytes) -> None:
    from .codec import encode_picture
    from .pictures import read_picture
    from .rate_control import encode_to_target
    from .weights import load_model

    options = image.encoderinfo
    metadata = {key: options[key] for key in ("icc_profile", "exif", "xmp") if key in options}
    if isinstance(metadata.get("exif"), Image.Exif):
        metadata["exif"] = metadata["exif"].tobytes()
    if any(metadata.values()):
        image = _relabelled(image, {key: value for key, value in metadata.items() if value})
    targets = {key: options.get(f"target_{key}") for key in ("size", "bpp", "psnr")}
    targets = {key: value for key, value in targets.items() if value is not None}
    if targets and options.get("quality") is not None:
        raise ValueError(f"give quality or target_{next(iter(targets))}, not both")
    how = {"exact": options.get("exact", True), "effort": options.get("effort"), "tile": options.get("tile")}
    try:
        network = load_model(options.get("model", "fast"))
        picture = read_picture(image)
        left_out = {key.removesuffix("_profile"): None for key, value in metadata.items() if not value}
        picture = dataclasses.replace(picture, **left_out)
        if targets:
            coded = encode_to_target(network, picture, **targets, **how)
            notes = (*picture.notes, coded.note) if coded.note else picture.notes
        else:
            coded, notes = encode_picture(network, picture, options.get("quality"), **how), picture.notes
    except MlicError as error:
        raise OSError(str(error)) from None
    for note in notes:
        warnings.warn(note, stacklevel=3)
    fp.write(coded.data)


Image.register_open(MlicImageFile.format, MlicImageFile, _accept)
Image.register_decoder("mlic", MlicDecoder)
Image.register_save(MlicImageFile.format, _save)
Image.register_extension(MlicImageFile.format, ".mlic")
Image.register_mime(MlicImageFile.format, MIME)
mimetypes.add_type(MIME, ".mlic")
