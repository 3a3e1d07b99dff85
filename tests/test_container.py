"""The .mlic file: what was written comes back, and nothing else is ever accepted."""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
import zlib

import numpy as np
import pytest

from mlic.container import MAX_ANCILLARY, NO_QUALITY, SIGNATURE, CodedTile, MlicFile
from mlic.errors import DamagedFile, PictureError, UnsupportedFile, WeightsError

FILE = MlicFile(
    width=300,
    height=200,
    grey=False,
    exact=True,
    quality=8064,
    model="fast",
    digest=bytes(range(8)),
    tiles=(CodedTile(checksum=0x12345678, escapes=b"\x05\x80\x01", stream=b"eight by"),),
)
TILED = dataclasses.replace(
    FILE,
    tile=128,  # 3 x 2 tiles
    tiles=tuple(CodedTile(checksum=i, escapes=bytes(i % 2), stream=bytes([i]) * 4 * i) for i in range(6)),
)
PROFILE = b"a colour profile " * 30


def chunk(kind: bytes, payload: bytes) -> bytes:
    crc = zlib.crc32(kind + payload).to_bytes(4, "little")
    return kind + len(payload).to_bytes(4, "little") + payload + crc


def head(
    width=300, height=200, colour=1, arithmetic=1, quality=8064, name=b"fast", digest=bytes(range(8)), length=None
) -> bytes:
    length = len(name) if length is None else length
    return chunk(b"HEAD", struct.pack("<IIBBHB", width, height, colour, arithmetic, quality, length) + name + digest)


def data(escapes=b"\x05\x80\x01", stream=b"eight by", length=None) -> bytes:
    length = len(escapes) if length is None else length
    return chunk(b"DATA", struct.pack("<II", 0x12345678, length) + escapes + stream)


def index(side=128, count=6, escapes=0, stream=0) -> bytes:
    entries = b"".join(struct.pack("<III", i, i % 2 + escapes, 4 * i + stream) for i in range(count))
    return chunk(b"TILE", struct.pack("<I", side) + entries)


TILED_DATA = chunk(b"DATA", b"".join(bytes(i % 2) + bytes([i]) * 4 * i for i in range(6)))
START = b"\x93MLIC\x01"
ICCP = chunk(b"iccp", zlib.compress(PROFILE))


def test_bytes_of_a_file():
    """The layout of docs/format.md, spelled out."""
    content = FILE.to_bytes()
    assert content == START + head() + data()
    assert content[:14] == b"\x93MLIC\x01HEAD\x19\0\0\0"
    assert content[14:39] == b"\x2c\1\0\0\xc8\0\0\0\1\1\x80\x1f\4fast\0\1\2\3\4\5\6\7"
    assert content[43:62] == b"DATA\x13\0\0\0\x78\x56\x34\x12\3\0\0\0\x05\x80\x01"
    assert content[62:70] == b"eight by"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"icc": PROFILE},
        {"icc": np.random.default_rng(0).bytes(3000)},
        {"grey": True, "quality": NO_QUALITY, "model": "mlic++"},
        {"width": 1, "height": 1, "tiles": (CodedTile(checksum=1, escapes=b"", stream=b""),)},
        {"tile": 128, "tiles": TILED.tiles},
        {"depth": 16, "alpha": b"a PNG", "exif": b"II*\0" + bytes(50), "xmp": b"<x/>" * 9},
        {"depth": 16, "grey": True, "icc": PROFILE, "xmp": b"<x/>", "tile": 256, "tiles": TILED.tiles[:2]},
        {"width": 65536, "height": 2048},
        {"model": "é" * 127 + "x"},
        {"model": ""},
        {"quality": 0, "digest": bytes(8)},
    ],
    ids=["plain", "profile", "noise-profile", "grey-one-rate", "smallest", "tiles", "everything", "grey-tiles"]
    + ["largest", "long-name", "no-name", "zeros"],
)
def test_round_trip(change):
    file = dataclasses.replace(FILE, **change)
    content = file.to_bytes()
    back = MlicFile.from_bytes(content)
    assert back == file
    assert back.to_bytes() == content


@pytest.mark.parametrize("file", [FILE, dataclasses.replace(TILED, icc=b"p", exif=b"e", alpha=b"a")], ids=["plain", "all"])
def test_no_changed_byte_is_accepted(file):
    content = bytearray(file.to_bytes())
    for at, byte in enumerate(bytes(content)):
        for value in range(256):
            if value != byte:
                content[at] = value
                with pytest.raises((DamagedFile, UnsupportedFile)) as caught:
                    MlicFile.from_bytes(bytes(content))
                assert isinstance(caught.value, UnsupportedFile) == (at == len(SIGNATURE))
        content[at] = byte


def test_no_swapped_or_missing_bytes_are_accepted():
    content = dataclasses.replace(TILED, icc=PROFILE).to_bytes()
    rng = np.random.default_rng(0)
    for _ in range(500):
        a, b = sorted(rng.integers(len(SIGNATURE) + 1, len(content), 2).tolist())
        cut, doubled = content[:a] + content[b:], content[:b] + content[a:]
        for wrong in (cut, doubled, content[:a] + content[a:b][::-1] + content[b:]):
            if wrong != content:
                with pytest.raises((DamagedFile, UnsupportedFile)):
                    MlicFile.from_bytes(wrong)


@pytest.mark.parametrize("file", [FILE, dataclasses.replace(TILED, icc=PROFILE)], ids=["plain", "tiles"])
def test_no_truncated_file_is_accepted(file):
    content = file.to_bytes()
    for length in range(len(content)):
        with pytest.raises(DamagedFile) as caught:
            MlicFile.from_bytes(content[:length])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", [FILE, dataclasses.replace(TILED, icc=PROFILE)], ids=["plain", "tiles"])
def test_truncated_files_where_allowed(file):
    """What is there comes back, in whole words, and nothing else; before the coded data it is damage as ever."""
    content = file.to_bytes()
    start = content.index(b"DATA") + 8
    seen = set()
    for length in range(len(content)):
        try:
            part = MlicFile.from_bytes(content[:length], allow_partial=True)
        except DamagedFile:
            assert length < start + 8
            continue
        assert part.truncated and length >= start
        assert dataclasses.replace(part, truncated=False, tiles=file.tiles) == file
        for tile, whole in zip(part.tiles, file.tiles):
            assert tile.checksum == whole.checksum and (tile.cut or tile == whole)
            assert whole.stream.startswith(tile.stream) and len(tile.stream) % 4 == 0
            assert whole.escapes.startswith(tile.escapes)
            assert not tile.stream or tile.escapes == whole.escapes
        seen.add(sum(tile.cut for tile in part.tiles))
    assert seen == ({0, 1} if not file.tile else {0, 1, 2, 3, 4, 5})
    assert MlicFile.from_bytes(content, allow_partial=True) == file
    with pytest.raises(DamagedFile, match="checksum"):
        MlicFile.from_bytes(content[:-1] + b"!", allow_partial=True)


@pytest.mark.parametrize("extra", [b"\0", b"\n", data(), chunk(b"more", b""), FILE.to_bytes()])
def test_nothing_may_follow(extra):
    with pytest.raises(DamagedFile, match="follow the end"):
        MlicFile.from_bytes(FILE.to_bytes() + extra)


def test_random_bytes():
    rng = np.random.default_rng(0)
    for start in (b"", SIGNATURE, START, START + b"HEAD", START + head(), START + head() + b"DATA"):
        for _ in range(200):
            with pytest.raises((DamagedFile, UnsupportedFile)):
                MlicFile.from_bytes(start + rng.bytes(int(rng.integers(0, 200))))


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_version(version):
    with pytest.raises(UnsupportedFile, match=f"version {version}"):
        MlicFile.from_bytes(SIGNATURE + bytes([version]))
    with pytest.raises(UnsupportedFile, match="newer mlic"):
        MlicFile.from_bytes(SIGNATURE + bytes([version]) + FILE.to_bytes()[6:])


def test_unknown_chunks():
    """Lower-case ones are skipped wherever they stand, upper-case ones are needed to understand the picture."""
    extra = chunk(b"gpsd", b"anything") + chunk(b"xYZW", b"")
    assert MlicFile.from_bytes(START + head() + extra + data()) == FILE
    assert MlicFile.from_bytes(START + head() + chunk(b"note", b"") + ICCP + extra + data()).icc == PROFILE
    for kind in (b"DEEP", b"Exif"):
        with pytest.raises(UnsupportedFile, match=kind.decode()):
            MlicFile.from_bytes(START + head() + chunk(kind, b"anything") + data())
    with pytest.raises(DamagedFile, match="checksum of chunk gpsd"):
        MlicFile.from_bytes(START + head() + extra.replace(b"anything", b"Anything") + data())


# Files whose checksums are right and whose content is not, so that no transmission error explains them.
DAMAGED = {
    "header-twice": head() + head() + data(),
    "header-after-profile": ICCP + head() + data(),
    "header-after-unknown": chunk(b"note", b"") + head() + data(),
    "no-header": data(),
    "no-data": head() + ICCP,
    "data-before-header": data() + head(),
    "profile-after-data": head() + data() + ICCP,
    "profile-twice": head() + ICCP + ICCP + data(),
    "unknown-twice": head() + chunk(b"note", b"1") + chunk(b"note", b"2") + data(),
    "type-with-digit": head() + chunk(b"not3", b"") + data(),
    "type-not-ascii": head() + chunk("né7".encode(), b"") + data(),
    "header-empty": chunk(b"HEAD", b"") + data(),
    "header-of-11-bytes": chunk(b"HEAD", bytes(11)) + data(),
    "header-without-digest": head(digest=b"") + data(),
    "header-with-more": head(digest=bytes(9)) + data(),
    "name-longer-than-header": head(length=255) + data(),
    "name-shorter-than-header": head(length=3) + data(),
    "name-not-utf8": head(name=b"fas\xff") + data(),
    "name-cut-in-a-character": head(name=b"fas\xc3") + data(),
    "name-with-overlong-slash": head(name=b"\xc0\xaf") + data(),
    "name-with-surrogate": head(name=b"\xed\xa0\x80") + data(),
    "name-with-zero": head(name=b"fa\0t") + data(),
    "name-with-newline": head(name=b"fast\n") + data(),
    "name-with-escape-sequence": head(name=b"\x1b[31mfast") + data(),
    "name-with-right-to-left-mark": head(name="\u202efast".encode()) + data(),
    "zero-width": head(width=0) + data(),
    "zero-height": head(height=0) + data(),
    "data-empty": head() + chunk(b"DATA", b""),
    "data-of-7-bytes": head() + chunk(b"DATA", bytes(7)),
    "escapes-one-too-long": head() + data(stream=b"", length=4),
    "escapes-of-4-gib": head() + data(length=2**32 - 1),
    "profile-empty": head() + chunk(b"iccp", b"") + data(),
    "profile-not-zlib": head() + chunk(b"iccp", PROFILE) + data(),
    "profile-cut": head() + chunk(b"iccp", zlib.compress(PROFILE)[:-1]) + data(),
    "profile-with-more": head() + chunk(b"iccp", zlib.compress(PROFILE) + b"\0") + data(),
    "profile-wrong-adler": head() + chunk(b"iccp", zlib.compress(PROFILE)[:-4] + bytes(4)) + data(),
    "profile-needs-dictionary": head() + chunk(b"iccp", b"\x78\xbb\0\0\0\1") + data(),
    "exif-not-zlib": head() + chunk(b"exif", b"II*") + data(),
    "xmp-cut": head() + chunk(b"xmpd", zlib.compress(PROFILE)[:-1]) + data(),
    "tiles-without-index": head() + TILED_DATA,
    "index-empty": head() + chunk(b"TILE", b"") + TILED_DATA,
    "index-of-one-tile-less": head() + index(count=5) + TILED_DATA,
    "index-of-one-tile-more": head() + index(count=7) + TILED_DATA,
    "index-of-other-tiles": head() + index(side=64) + TILED_DATA,
    "index-too-short-streams": head() + index() + chunk(b"DATA", TILED_DATA[8:-4] + b"more"),
    "index-too-long-streams": head() + index(stream=4) + TILED_DATA,
    "index-too-long-escapes": head() + index(escapes=1) + TILED_DATA,
    "index-of-4-gib": head() + index(escapes=2**32 - 2) + TILED_DATA,
    "tiles-of-0": head() + index(side=0) + TILED_DATA,
    "tiles-of-100": head() + index(side=100) + TILED_DATA,
    "tiles-of-4-gib": head() + index(side=2**32 - 64, count=1) + data(),
    "length-of-4-gib": b"HEAD\xff\xff\xff\xff" + bytes(50),
    "length-of-4-gib-unknown": head() + b"note\xff\xff\xff\xff" + bytes(50),
    "length-one-too-long": head() + b"DATA\x09\0\0\0" + bytes(12),
}
UNSUPPORTED = {
    "width-65537": head(width=65537, height=1) + data(),
    "height-65537": head(width=1, height=65537) + data(),
    "one-row-too-many": head(width=65536, height=2049) + data(),
    "largest-sides": head(width=2**32 - 1, height=2**32 - 1) + data(),
    "product-wraps-32-bits": head(width=65536, height=65536) + data(),
    "colour-4": head(colour=4) + data(),
    "colour-255": head(colour=255) + data(),
    "arithmetic-2": head(arithmetic=2) + data(),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_refused_as_damaged(content):
    with pytest.raises(DamagedFile) as caught:
        MlicFile.from_bytes(START + content)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_refused_as_unsupported(content):
    with pytest.raises(UnsupportedFile) as caught:
        MlicFile.from_bytes(START + content)
    assert str(caught.value).isprintable()


def test_the_attacks_differ_from_a_good_file_in_one_thing():
    assert MlicFile.from_bytes(START + head() + data()) == FILE
    assert MlicFile.from_bytes(START + head() + ICCP + data()).icc == PROFILE
    assert MlicFile.from_bytes(START + head() + index() + TILED_DATA) == TILED
    assert MlicFile.from_bytes(START + head(colour=2) + data()).depth == 16
    assert MlicFile.from_bytes(START + head(width=65536, height=2048) + data()).width == 65536


def test_lengths_allocate_nothing():
    for name in ("length-of-4-gib", "length-of-4-gib-unknown", "escapes-of-4-gib", "index-of-4-gib"):
        tracemalloc.start()
        with pytest.raises(DamagedFile):
            MlicFile.from_bytes(START + DAMAGED[name])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1 << 20


def test_profile_bomb():
    """A few kilobytes that inflate to far more than any profile: refused, and never held in memory whole."""
    squeeze = zlib.compressobj(9)
    bomb = b"".join(squeeze.compress(bytes(1 << 24)) for _ in range(16)) + squeeze.flush()  # 256 MiB
    assert len(bomb) < 1 << 20
    tracemalloc.start()
    with pytest.raises(DamagedFile, match="too large"):
        MlicFile.from_bytes(START + head() + chunk(b"iccp", bomb) + data())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * MAX_ANCILLARY


def test_largest_profile():
    content = dataclasses.replace(FILE, icc=bytes(MAX_ANCILLARY)).to_bytes()
    assert len(MlicFile.from_bytes(content).icc) == MAX_ANCILLARY
    with pytest.raises(PictureError, match="profile"):
        dataclasses.replace(FILE, icc=bytes(MAX_ANCILLARY + 1)).to_bytes()


@pytest.mark.parametrize(
    "name", ["x" * 256, "é" * 128, "two\nlines", "\ud800"], ids=["256", "256-utf8", "newline", "surrogate"]
)
def test_names_no_file_can_hold(name):
    with pytest.raises(WeightsError, match="name"):
        dataclasses.replace(FILE, model=name).to_bytes()
