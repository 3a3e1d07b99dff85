"""The .mlic file: a signature, then chunks with lengths and checksums. docs/format.md is the specification.

Knows nothing of models: it turns a `MlicFile` into bytes and bytes into a `MlicFile`, or says what is wrong.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib

from .errors import DamagedFile, PictureError, UnsupportedFile, WeightsError

SIGNATURE = b"\x93MLIC"
VERSION = 1
NO_QUALITY = 0xFFFF
GREY, RGB = 0, 1
FLOAT, EXACT = 0, 1  # arithmetic of everything that decides a table row
MAX_SIDE = 1 << 16
MAX_PIXELS = 1 << 27
MAX_ANCILLARY = 1 << 26
MAX_NAME = 255  # bytes

_HEAD = struct.Struct("<IIBBHB")  # width, height, colour, arithmetic, quality, length of the model's name
_DATA = struct.Struct("<II")  # CRC-32 of the symbols, bytes of escapes
DIGEST_BYTES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlicFile:
    """What a file says. `quality` is the level in 1/256 (0..65534), or NO_QUALITY for a model with one rate."""

    width: int
    height: int
    colour: int  # GREY or RGB, 8 bits each
    arithmetic: int  # FLOAT or EXACT
    quality: int
    model: str
    digest: bytes  # first 8 bytes of the SHA-256 of the model's weights
    checksum: int  # CRC-32 of all symbols
    escapes: bytes = dataclasses.field(repr=False)
    stream: bytes = dataclasses.field(repr=False)
    icc: bytes | None = dataclasses.field(default=None, repr=False)

    def to_bytes(self) -> bytes:
        """Raises WeightsError for a model's name no file can hold, PictureError for a giant colour profile."""
        if not self.model.isprintable() or len(name := self.model.encode()) > MAX_NAME:
            raise WeightsError(f"the model's name must be printable, at most {MAX_NAME} bytes: {self.model[:40]!r}")
        if self.icc and len(self.icc) > MAX_ANCILLARY:
            raise PictureError(f"the colour profile is larger than {MAX_ANCILLARY >> 20} MiB")
        head = _HEAD.pack(self.width, self.height, self.colour, self.arithmetic, self.quality, len(name)) + name + self.digest
        parts = [SIGNATURE, bytes([VERSION]), _chunk(b"HEAD", head)]
        if self.icc:
            parts.append(_chunk(b"iccp", zlib.compress(self.icc, 9)))
        parts.append(_chunk(b"DATA", _DATA.pack(self.checksum, len(self.escapes)) + self.escapes + self.stream))
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> MlicFile:
        """Parse. Raises DamagedFile, or UnsupportedFile for an intact file of another version or with unknown needs."""
        if len(data) == 0:
            raise DamagedFile("the file is empty")
        if data[: len(SIGNATURE)] != SIGNATURE:
            raise DamagedFile("not an .mlic file (wrong signature)")
        if len(data) <= len(SIGNATURE):
            raise DamagedFile("the file is truncated after the signature")
        version = data[len(SIGNATURE)]
        if version != VERSION:
            raise UnsupportedFile(f"format version {version}; this mlic reads version {VERSION}: try a newer mlic")
        chunks = _read_chunks(data, len(SIGNATURE) + 1)
        head, payload = chunks["HEAD"], chunks["DATA"]
        if len(head) < _HEAD.size:
            raise DamagedFile("the header is too short")
        width, height, colour, arithmetic, quality, name_bytes = _HEAD.unpack_from(head)
        if len(head) != _HEAD.size + name_bytes + DIGEST_BYTES:
            raise DamagedFile("the header's length does not fit its content")
        if not (width and height):
            raise DamagedFile(f"the picture has no pixels ({width}x{height})")
        if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
            raise UnsupportedFile(f"{width}x{height} pixels; this mlic reads up to {MAX_PIXELS >> 20} Mi, {MAX_SIDE} a side")
        if colour not in (GREY, RGB):
            raise UnsupportedFile(f"colour type {colour}; this mlic reads {GREY} (grey) and {RGB} (RGB)")
        if arithmetic not in (FLOAT, EXACT):
            raise UnsupportedFile(f"arithmetic {arithmetic}, which this mlic does not know: try a newer one")
        try:
            model = head[_HEAD.size : _HEAD.size + name_bytes].decode()
        except UnicodeDecodeError:
            raise DamagedFile("the model's name is not UTF-8") from None
        if not model.isprintable():
            raise DamagedFile("the model's name is not printable")
        if len(payload) < _DATA.size:
            raise DamagedFile("the coded data is too short")
        checksum, escape_bytes = _DATA.unpack_from(payload)
        if escape_bytes > len(payload) - _DATA.size:
            raise DamagedFile("the escapes are longer than the coded data")
        stream_at = _DATA.size + escape_bytes
        return cls(
            width=width,
            height=height,
            colour=colour,
            arithmetic=arithmetic,
            quality=quality,
            model=model,
            digest=head[_HEAD.size + name_bytes :],
            checksum=checksum,
            escapes=payload[_DATA.size : stream_at],
            stream=payload[stream_at:],
            icc=_inflate(chunks["iccp"]) if "iccp" in chunks else None,
        )


def _chunk(kind: bytes, payload: bytes) -> bytes:
    return kind + struct.pack("<I", len(payload)) + payload + struct.pack("<I", zlib.crc32(kind + payload))


def _read_chunks(data: bytes, at: int) -> dict[str, bytes]:
    """HEAD first, DATA last; unknown chunks with a lower-case first letter are skipped, others refused."""
    chunks: dict[str, bytes] = {}
    while "DATA" not in chunks:
        if len(data) - at < 12:
            raise DamagedFile("the file is truncated")
        kind, (length,) = data[at : at + 4], struct.unpack_from("<I", data, at + 4)
        if not kind.isalpha():
            raise DamagedFile(f"damaged at byte {at}: no chunk starts here")
        if length > len(data) - at - 12:
            raise DamagedFile(f"the file is truncated, or the length of chunk {kind.decode()} is damaged")
        payload = data[at + 8 : at + 8 + length]
        (crc,) = struct.unpack_from("<I", data, at + 8 + length)
        if crc != zlib.crc32(kind + payload):
            raise DamagedFile(f"checksum of chunk {kind.decode()} is wrong: the file is damaged")
        name = kind.decode()
        if (name == "HEAD") != (not chunks):
            raise DamagedFile("the header is not the first chunk" if not chunks else "a second header")
        if name in chunks:
            raise DamagedFile(f"a second chunk {name}")
        if name not in ("HEAD", "DATA", "iccp") and name[0].isupper():
            raise UnsupportedFile(f"the file needs feature {name}, which this mlic does not know: try a newer one")
        chunks[name] = payload
        at += 12 + length
    if at != len(data):
        raise DamagedFile(f"{len(data) - at} bytes follow the end of the picture")
    return chunks


def _inflate(payload: bytes) -> bytes:
    inflater = zlib.decompressobj()
    try:
        out = inflater.decompress(payload, MAX_ANCILLARY + 1)
    except zlib.error as error:
        raise DamagedFile(f"the colour profile cannot be read: {error}") from None
    if not inflater.eof or inflater.unused_data or len(out) > MAX_ANCILLARY:
        raise DamagedFile("the colour profile is incomplete or too large")
    return out
