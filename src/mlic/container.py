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
SIXTEEN = 2  # added to the colour, 0 grey or 1 RGB, of a picture with 16 bits per channel
MAX_SIDE = 1 << 16
MAX_PIXELS = 1 << 27
MAX_ANCILLARY = 1 << 26
TILE_UNIT = 64  # pixels; sides of tiles are multiples of it
ANCILLARY = {"iccp": "colour profile", "exif": "EXIF block", "xmpd": "XMP block"}  # zlib streams that may be skipped
KNOWN = {"HEAD", "TILE", "ALPH", "DATA", *ANCILLARY}
MAX_NAME = 255  # bytes

_HEAD = struct.Struct("<IIBBHB")  # width, height, colour, arithmetic, quality, length of the model's name
_DATA = struct.Struct("<II")  # CRC-32 of the symbols, bytes of escapes
_ENTRY = struct.Struct("<III")  # of a tile: CRC-32 of its symbols, bytes of its escapes, bytes of its stream
DIGEST_BYTES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodedTile:
    """The symbols of one tile. `cut`: the file ended within it; what is there of the stream comes from its beginning."""

    checksum: int  # CRC-32 of all its symbols
    escapes: bytes = dataclasses.field(repr=False)
    stream: bytes = dataclasses.field(repr=False)
    cut: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlicFile:
    """What a file says. `quality` is the level in 1/256 (0..65534), or NO_QUALITY for a model with one rate."""

    width: int
    height: int
    grey: bool  # or RGB
    depth: int = 8  # bits per channel, 8 or 16
    exact: bool  # arithmetic of everything that decides a table row; otherwise float
    quality: int
    model: str
    digest: bytes  # first 8 bytes of the SHA-256 of the model's weights
    tile: int = 0  # side of the tiles in pixels; 0: the picture is one tile
    tiles: tuple[CodedTile, ...]  # row by row
    alpha: bytes | None = dataclasses.field(default=None, repr=False)  # a PNG file
    icc: bytes | None = dataclasses.field(default=None, repr=False)
    exif: bytes | None = dataclasses.field(default=None, repr=False)
    xmp: bytes | None = dataclasses.field(default=None, repr=False)
    truncated: bool = False

    def to_bytes(self) -> bytes:
        """Raises WeightsError for a model's name no file can hold, PictureError for giant metadata."""
        if not self.model.isprintable() or len(name := self.model.encode()) > MAX_NAME:
            raise WeightsError(f"the model's name must be printable, at most {MAX_NAME} bytes: {self.model[:40]!r}")
        colour = (not self.grey) + (SIXTEEN if self.depth == 16 else 0)
        head = _HEAD.pack(self.width, self.height, colour, self.exact, self.quality, len(name)) + name + self.digest
        parts = [SIGNATURE, bytes([VERSION]), _chunk("HEAD", head)]
        for (kind, what), content in zip(ANCILLARY.items(), (self.icc, self.exif, self.xmp)):
            if content and len(content) > MAX_ANCILLARY:
                raise PictureError(f"the {what} is larger than {MAX_ANCILLARY >> 20} MiB: strip it")
            if content:
                parts.append(_chunk(kind, deflated(content)))
        if self.tile:
            entries = [_ENTRY.pack(t.checksum, len(t.escapes), len(t.stream)) for t in self.tiles]
            parts.append(_chunk("TILE", struct.pack("<I", self.tile) + b"".join(entries)))
        if self.alpha:
            parts.append(_chunk("ALPH", self.alpha))
        first = b"" if self.tile else _DATA.pack(self.tiles[0].checksum, len(self.tiles[0].escapes))
        parts.append(_chunk("DATA", first + b"".join(part for t in self.tiles for part in (t.escapes, t.stream))))
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes, *, allow_partial: bool = False) -> MlicFile:
        """Parse. Raises DamagedFile, or UnsupportedFile for an intact file of another version or with unknown needs.

        With `allow_partial` a file that ends within its coded data is taken too, as `truncated`.
        """
        if len(data) == 0:
            raise DamagedFile("the file is empty")
        if data[: len(SIGNATURE)] != SIGNATURE:
            raise DamagedFile("not an .mlic file (wrong signature)")
        if len(data) <= len(SIGNATURE):
            raise DamagedFile("the file is truncated after the signature")
        version = data[len(SIGNATURE)]
        if version != VERSION:
            raise UnsupportedFile(f"format version {version}; this mlic reads version {VERSION}: try a newer mlic")
        chunks, data_bytes, truncated = _read_chunks(data, len(SIGNATURE) + 1, allow_partial)
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
        if colour > 1 + SIXTEEN:
            raise UnsupportedFile(f"colour type {colour}; this mlic reads grey and RGB of 8 and 16 bits (0 to 3)")
        if arithmetic > 1:
            raise UnsupportedFile(f"arithmetic {arithmetic}, which this mlic does not know: try a newer one")
        try:
            model = head[_HEAD.size : _HEAD.size + name_bytes].decode()
        except UnicodeDecodeError:
            raise DamagedFile("the model's name is not UTF-8") from None
        if not model.isprintable():
            raise DamagedFile("the model's name is not printable")
        tile, tiles = 0, None
        if "TILE" in chunks:
            tile, tiles = _read_tiles(chunks["TILE"], payload, data_bytes, width, height)
        return cls(
            width=width,
            height=height,
            grey=colour % SIXTEEN == 0,
            depth=16 if colour >= SIXTEEN else 8,
            exact=arithmetic == 1,
            quality=quality,
            model=model,
            digest=head[_HEAD.size + name_bytes :],
            tile=tile,
            tiles=tiles or (_read_single(payload, data_bytes),),
            alpha=chunks.get("ALPH"),
            icc=_inflate(chunks, "iccp"),
            exif=_inflate(chunks, "exif"),
            xmp=_inflate(chunks, "xmpd"),
            truncated=truncated,
        )


def _read_single(payload: bytes, data_bytes: int) -> CodedTile:
    """What is there of the `data_bytes` of DATA's payload, in a file of one tile."""
    if len(payload) < _DATA.size:
        cut = len(payload) < data_bytes
        raise DamagedFile("the file is truncated before the picture" if cut else "the coded data is too short")
    checksum, escape_bytes = _DATA.unpack_from(payload)
    if _DATA.size + escape_bytes > data_bytes:
        raise DamagedFile("the escapes are longer than the coded data")
    return _tile(checksum, payload, _DATA.size, _DATA.size + escape_bytes, data_bytes)


def _read_tiles(index: bytes, payload: bytes, data_bytes: int, width: int, height: int) -> tuple[int, tuple[CodedTile, ...]]:
    """The payload of TILE, and what is there of DATA's -> side of the tiles, tiles."""
    if len(index) < 4:
        raise DamagedFile("the index of tiles is too short")
    (side,) = struct.unpack_from("<I", index)
    if side % TILE_UNIT or not TILE_UNIT <= side <= MAX_SIDE:
        raise DamagedFile(f"tiles of {side} pixels; sides are multiples of {TILE_UNIT}")
    if len(index) != 4 + -(-width // side) * -(-height // side) * _ENTRY.size:
        raise DamagedFile("the index of tiles does not fit the picture's size")
    tiles, at = [], 0
    for checksum, escape_bytes, stream_bytes in _ENTRY.iter_unpack(index[4:]):
        tiles.append(_tile(checksum, payload, at, at + escape_bytes, at + escape_bytes + stream_bytes))
        at += escape_bytes + stream_bytes
    if at != data_bytes:
        raise DamagedFile("the index of tiles does not fit the coded data")
    return side, tuple(tiles)


def _tile(checksum: int, payload: bytes, at: int, stream_at: int, end: int) -> CodedTile:
    stream, cut = payload[stream_at:end], end > len(payload)
    if cut:
        stream = stream[: len(stream) // 4 * 4]
    return CodedTile(checksum=checksum, escapes=payload[at:stream_at], stream=stream, cut=cut)


def deflated(content: bytes) -> bytes:
    """Metadata as a file holds it."""
    return zlib.compress(content, 9)


def _chunk(kind: str, payload: bytes) -> bytes:
    crc = zlib.crc32(payload, zlib.crc32(kind.encode()))
    return kind.encode() + struct.pack("<I", len(payload)) + payload + struct.pack("<I", crc)


def _read_chunks(data: bytes, at: int, allow_partial: bool) -> tuple[dict[str, bytes], int, bool]:
    """-> payloads, how long DATA's should be, and whether the file ends within DATA. HEAD comes first, DATA last; unknown
    chunks with a lower-case first letter are skipped, others refused.
    """
    chunks: dict[str, bytes] = {}
    while "DATA" not in chunks:
        if len(data) - at < 12:
            raise DamagedFile("the file is truncated")
        kind, (length,) = data[at : at + 4], struct.unpack_from("<I", data, at + 4)
        if not kind.isalpha():
            raise DamagedFile(f"damaged at byte {at}: no chunk starts here")
        if length > len(data) - at - 12:
            if allow_partial and kind == b"DATA" and chunks:
                return {**chunks, "DATA": data[at + 8 : at + 8 + length]}, length, True
            raise DamagedFile(f"the file is truncated, or the length of chunk {kind.decode()} is damaged")
        payload = data[at + 8 : at + 8 + length]
        (crc,) = struct.unpack_from("<I", data, at + 8 + length)
        if crc != zlib.crc32(payload, zlib.crc32(kind)):
            raise DamagedFile(f"checksum of chunk {kind.decode()} is wrong: the file is damaged")
        name = kind.decode()
        if (name == "HEAD") != (not chunks):
            raise DamagedFile("the header is not the first chunk" if not chunks else "a second header")
        if name in chunks:
            raise DamagedFile(f"a second chunk {name}")
        if name not in KNOWN and name[0].isupper():
            raise UnsupportedFile(f"the file needs feature {name}, which this mlic does not know: try a newer one")
        chunks[name] = payload
        at += 12 + length
    if at != len(data):
        raise DamagedFile(f"{len(data) - at} bytes follow the end of the picture")
    return chunks, length, False


def _inflate(chunks: dict[str, bytes], kind: str) -> bytes | None:
    if kind not in chunks:
        return None
    inflater = zlib.decompressobj()
    try:
        out = inflater.decompress(chunks[kind], MAX_ANCILLARY + 1)
    except zlib.error as error:
        raise DamagedFile(f"the {ANCILLARY[kind]} cannot be read: {error}") from None
    if not inflater.eof or inflater.unused_data or len(out) > MAX_ANCILLARY:
        raise DamagedFile(f"the {ANCILLARY[kind]} is incomplete or too large")
    return out
