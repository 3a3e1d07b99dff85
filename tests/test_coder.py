"""The coded stream, by constriction and by rans.py, against another coder written from docs/format.md."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
import pytest
import torch

from mlic import codec, coder, decoding, rans
from mlic.checkerboard import QUARTERS, WHOLE
from mlic.coder import SymbolDecoder, SymbolEncoder
from mlic.config import FAST, AttentionConfig
from mlic.container import MlicFile
from mlic.errors import DamagedFile, MlicError, WeightsError
from mlic.model import build_model
from mlic.strategies import Read, Write
from mlic.tables import CodingTables, TableSet, gaussian_tables, integer_frequencies
from mlic.weights import seal


@pytest.fixture(params=["constriction", "rans"], autouse=True)
def library(request, monkeypatch):
    """All tests of this file run with either."""
    if request.param == "rans":
        monkeypatch.setattr(coder, "AnsCoder", rans.AnsCoder)
        monkeypatch.setattr(coder, "row_model", rans.Row)
    else:
        pytest.importorskip("constriction")


class SlowTables:
    """One TableSet as plain lists: per row the frequencies, their running sum and the first symbol."""

    def __init__(self, tables: TableSet) -> None:
        self.rows, at = [], 0
        for size, first in zip(tables.sizes.tolist(), tables.first.tolist()):
            frequencies = tables.frequencies[at : at + size].tolist()
            cumulative = [0]
            for frequency in frequencies:
                cumulative.append(cumulative[-1] + frequency)
            self.rows.append((frequencies, cumulative, first))
            at += size


def slow_encode(batches) -> tuple[bytes, bytes, int]:
    """[(SlowTables, symbols, rows)] -> (stream, escapes, checksum)."""
    intervals, escapes, raw = [], b"", b""
    for tables, symbols, rows in batches:
        places = []
        for symbol, row in zip(symbols, rows):
            frequencies, cumulative, first = tables.rows[row]
            escape = len(frequencies) - 1
            index = symbol - first
            if not 0 <= index < escape:
                value = 2 * (index - escape) if index >= 0 else -2 * index - 1
                while value > 127:
                    escapes += bytes([value % 128 + 128])
                    value //= 128
                escapes += bytes([value])
                index = escape
            places.append((frequencies[index], cumulative[index]))
            raw += int(symbol).to_bytes(4, "little", signed=True)
        intervals += [places[i] for i in sorted(range(len(rows)), key=lambda i: rows[i])]
    state, words = 0, []
    for frequency, start in reversed(intervals):
        if state // 2**40 >= frequency:
            words.append(state % 2**32)
            state //= 2**32
        state = state // frequency * 2**24 + start + state % frequency
    while state:
        words.append(state % 2**32)
        state //= 2**32
    return b"".join(word.to_bytes(4, "little") for word in reversed(words)), escapes, zlib.crc32(raw)


class SlowDecoder:
    """Same methods as SymbolDecoder, so that it can stand in for it."""

    def __init__(
        self, tables: CodingTables, stream: bytes, escapes: bytes, checksum: int, prior_row: int = 0, *, partial: bool = False
    ):
        assert not partial
        self.gaussian, self.prior, self.prior_row = SlowTables(tables.gaussian), SlowTables(tables.prior), prior_row
        self.exhausted = False
        self.words = [int.from_bytes(stream[i : i + 4], "little") for i in range(0, len(stream), 4)]
        self.escapes, self.checksum, self.raw = list(escapes), checksum, b""
        self.state = 0
        self.refill()
        self.refill()

    def refill(self) -> None:
        if self.state < 2**32 and self.words:
            self.state = self.state * 2**32 + self.words.pop(0)

    def get_hyper(self, channels: np.ndarray) -> np.ndarray:
        return self.get(self.prior, (channels + self.prior_row).tolist())

    def get_plain(self, rows: np.ndarray) -> np.ndarray:
        return self.get(self.gaussian, rows.tolist())

    def get_latent(self, rows: np.ndarray) -> np.ndarray:
        """Plain symbols, then 256 turns of the dependent ones, as docs/format.md has it."""
        if len(self.gaussian.rows) == 64:
            return self.get_plain(rows)
        levels = np.zeros(len(rows), np.int32)
        plain = [i for i, row in enumerate(rows) if row < 7]
        levels[plain] = self.get_plain(rows[plain])
        others = sorted((i for i, row in enumerate(rows) if row >= 7), key=lambda i: rows[i])
        chains = (len(others) + 255) // 256
        states = [0] * chains
        while others:
            turn, others = others[:chains], others[chains:]
            odd = [(state & 155).bit_count() % 2 for state in states]
            symbols = self.get(self.gaussian, [rows[i] + 64 + 64 * lattice for i, lattice in zip(turn, odd)])
            for chain, (i, symbol) in enumerate(zip(turn, symbols.tolist())):
                levels[i] = 2 * symbol - odd[chain] * ((symbol > 0) - (symbol < 0))
                path_bit = (symbol + (states[chain] & 460).bit_count()) % 2
                states[chain] = (2 * states[chain] + path_bit) % 512
        return levels

    def get(self, tables: SlowTables, rows: list[int]) -> np.ndarray:
        indices = [0] * len(rows)
        for i in sorted(range(len(rows)), key=lambda i: rows[i]):
            frequencies, cumulative, _ = tables.rows[rows[i]]
            slot = self.state % 2**24
            index = int(np.searchsorted(cumulative, slot, side="right")) - 1
            self.state = frequencies[index] * (self.state // 2**24) + slot - cumulative[index]
            self.refill()
            indices[i] = index
        symbols = []
        for index, row in zip(indices, rows):
            frequencies, _, first = tables.rows[row]
            if index == len(frequencies) - 1:
                value = shift = 0
                while True:
                    byte = self.escapes.pop(0)
                    value += byte % 128 << shift
                    shift += 7
                    if byte < 128:
                        break
                index = index + value // 2 if value % 2 == 0 else -(value + 1) // 2
            symbols.append(first + index)
            self.raw += symbols[-1].to_bytes(4, "little", signed=True)
        return np.array(symbols, np.int32)

    def finish(self) -> None:
        assert (self.state, self.words, self.escapes, zlib.crc32(self.raw)) == (0, [], [], self.checksum)


def random_set(rng: np.random.Generator, rows: int) -> TableSet:
    """Tables of all shapes: even ones, some with one symbol taking nearly all, some of two entries only."""
    made = []
    for _ in range(rows):
        size = int(rng.choice([2, 3, 17, 300]))
        made.append(integer_frequencies(rng.dirichlet(np.full(size, rng.choice([0.02, 1.0, 100.0])))))
    made[0] = np.array([2**24 - 1, 1])
    made[-1] = np.array([1, 2**24 - 1])  # nearly always escapes
    return TableSet.from_rows(made, rng.integers(-300, 300, rows).tolist())


@pytest.fixture(scope="module")
def tables() -> CodingTables:
    return CodingTables(gaussian_tables(), random_set(np.random.default_rng(1), 12))


def random_batch(rng: np.random.Generator, tables: TableSet, rows: np.ndarray) -> np.ndarray:
    """Mostly symbols inside their rows' range, some a little outside, a few far outside, on both sides."""
    inside = tables.first[rows] + rng.integers(0, tables.sizes[rows] - 1, len(rows))
    edge = np.where(rng.random(len(rows)) < 0.5, tables.first[rows] - 1, tables.first[rows] + tables.sizes[rows] - 1)
    far = rng.integers(-(2**26), 2**26, len(rows))
    kind = rng.random(len(rows))
    return np.where(kind < 0.9, inside, np.where(kind < 0.97, edge, far)).astype(np.int32)


def encode_all(tables: CodingTables, hyper, latents, prior_row: int = 0) -> tuple[bytes, bytes, int]:
    encoder = SymbolEncoder(tables, prior_row)
    encoder.put_hyper(*hyper)
    for symbols, rows in latents:
        encoder.put_latent(symbols, rows)
    return encoder.finish()


def slow_encode_all(tables: CodingTables, hyper, latents, prior_row: int = 0) -> tuple[bytes, bytes, int]:
    gaussian, prior = SlowTables(tables.gaussian), SlowTables(tables.prior)
    batches = [(prior, hyper[0].tolist(), (hyper[1] + prior_row).tolist())]
    return slow_encode(batches + [(gaussian, symbols.tolist(), rows.tolist()) for symbols, rows in latents])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("prior_row", [0, 8])
def test_both_coders_agree(tables, seed, prior_row):
    rng = np.random.default_rng(seed)
    channels = np.repeat(np.arange(4), rng.integers(0, 20))
    hyper = random_batch(rng, tables.prior, channels + prior_row), channels
    latents = []
    for size in rng.integers(0, 200, 5):
        rows = rng.integers(0, 64, size, dtype=np.int32)
        latents.append((random_batch(rng, tables.gaussian, rows), rows))
    stream, escapes, checksum = coded = encode_all(tables, hyper, latents, prior_row)
    assert coded == slow_encode_all(tables, hyper, latents, prior_row)
    for decoder_class in (SymbolDecoder, SlowDecoder):
        decoder = decoder_class(tables, stream, escapes, checksum, prior_row)
        np.testing.assert_array_equal(decoder.get_hyper(hyper[1]), hyper[0])
        for symbols, rows in latents:
            np.testing.assert_array_equal(decoder.get_latent(rows), symbols)
        decoder.finish()


def test_every_entry_of_every_row(tables):
    """Every symbol a table knows, and both neighbours outside it, in one batch per kind of table."""

    def everything(tables: TableSet):
        first, last = tables.first - 1, tables.first + tables.sizes - 1
        symbols = np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last)]).astype(np.int32)
        return symbols, np.repeat(np.arange(len(first)), tables.sizes + 1)

    hyper, latent = everything(tables.prior), everything(tables.gaussian)
    coded = encode_all(tables, hyper, [latent])
    assert coded == slow_encode_all(tables, hyper, [latent])
    decoder = SymbolDecoder(tables, *coded)
    np.testing.assert_array_equal(decoder.get_hyper(hyper[1]), hyper[0])
    np.testing.assert_array_equal(decoder.get_latent(latent[1]), latent[0])
    decoder.finish()


def test_first_word_and_second_word_of_a_known_stream():
    """By hand: three symbols of frequency 2^22 and start 2^22, then more until a word is put out."""
    quarter = TableSet.from_rows([np.full(4, 2**22)], [0])
    tables = CodingTables(quarter, quarter)
    nothing = np.zeros(0, np.int32)
    for count, words in [(0, []), (1, [2**22]), (2, [1 << 24 | 2**22])]:
        batch = np.ones(count, np.int32), np.zeros(count, np.int32)
        stream, _, _ = encode_all(tables, (nothing, nothing), [batch])
        assert stream == b"".join(word.to_bytes(4, "little") for word in words)


def test_nothing_costs_nothing(tables):
    nothing = np.zeros(0, np.int32)
    assert encode_all(tables, (nothing, nothing), []) == (b"", b"", 0)
    SymbolDecoder(tables, b"", b"", 0).finish()
    with pytest.raises(DamagedFile):
        SymbolDecoder(tables, b"", b"", 1).finish()


@pytest.mark.parametrize("symbol", [0, 1, -1, 5, -300, 10**6, -(10**6)])
@pytest.mark.parametrize("row", [0, 31, 63])
def test_single_symbol(tables, symbol, row):
    nothing, one = np.zeros(0, np.int32), (np.array([symbol], np.int32), np.array([row], np.int32))
    coded = encode_all(tables, (nothing, nothing), [one])
    assert coded == slow_encode_all(tables, (nothing, nothing), [one])
    decoder = SymbolDecoder(tables, *coded)
    assert decoder.get_latent(one[1]).tolist() == [symbol]
    decoder.finish()


def test_escape_limits(tables):
    """28 bits of varint: 2^27 values on either side of a table, and none beyond."""
    row = np.zeros(1, np.int32)
    below, above = int(tables.gaussian.first[0]), int(tables.gaussian.first[0] + tables.gaussian.sizes[0] - 1)
    nothing = np.zeros(0, np.int32)
    for symbol, varint in [
        (above, b"\x00"),
        (below - 1, b"\x01"),
        (above + 1, b"\x02"),
        (above + 64, b"\x80\x01"),
        (above + 2**27 - 1, b"\xfe\xff\xff\x7f"),
        (below - 2**27, b"\xff\xff\xff\x7f"),
    ]:
        coded = encode_all(tables, (nothing, nothing), [(np.array([symbol], np.int32), row)])
        assert coded[1] == varint
        assert SymbolDecoder(tables, *coded).get_latent(row).tolist() == [symbol]
    for symbol in (above + 2**27, below - 2**27 - 1, 2**31 - 1, -(2**31)):
        with pytest.raises(WeightsError, match="too large"):
            SymbolEncoder(tables).put_latent(np.array([symbol], np.int32), row)


@pytest.mark.parametrize(
    "escapes",
    [b"", b"\x80", b"\x80\x80\x80", b"\x80\x80\x80\x80\x01", b"\xff\xff\xff\xff"],
    ids=["none", "cut-after-1", "cut-after-3", "fifth-byte", "no-end"],
)
def test_bad_escapes(tables, escapes):
    row = np.zeros(1, np.int32)
    nothing = np.zeros(0, np.int32)
    stream, _, checksum = encode_all(tables, (nothing, nothing), [(np.array([10**5], np.int32), row)])
    with pytest.raises(DamagedFile, match="escape"):
        SymbolDecoder(tables, stream, escapes, checksum).get_latent(row)


@pytest.mark.parametrize("stream", [b"\1", b"\1\0\0", b"\1\0\0\0\1", bytes(4), bytes(8), bytes(4) + b"\1\2\3\4"])
def test_stream_that_no_encoder_writes(tables, stream):
    with pytest.raises(DamagedFile):
        SymbolDecoder(tables, stream, b"", 0)


def decode_all(tables: CodingTables, coded, hyper_rows, latent_rows, prior_row: int = 0) -> None:
    decoder = SymbolDecoder(tables, *coded, prior_row)
    decoder.get_hyper(hyper_rows)
    for rows in latent_rows:
        decoder.get_latent(rows)
    decoder.finish()


@pytest.fixture(scope="module")
def coded_once(tables):
    rng = np.random.default_rng(7)
    channels = np.repeat(np.arange(4), 6)
    rows = [rng.integers(0, 64, size, dtype=np.int32) for size in (90, 50)]
    hyper = random_batch(rng, tables.prior, channels + 4), channels
    coded = encode_all(tables, hyper, [(random_batch(rng, tables.gaussian, r), r) for r in rows], 4)
    decode_all(tables, coded, channels, rows, 4)
    return coded, channels, rows


def test_what_is_left_over_or_missing(tables, coded_once):
    (stream, escapes, checksum), channels, rows = coded_once
    for wrong in [
        (stream + b"\1\0\0\0", escapes, checksum),
        (stream[:-4], escapes, checksum),
        (stream[4:], escapes, checksum),
        (b"", escapes, checksum),
        (stream, escapes + b"\0", checksum),
        (stream, escapes[:-1], checksum),
        (stream, b"", checksum),
        (stream, escapes, checksum ^ 1),
    ]:
        with pytest.raises(DamagedFile):
            decode_all(tables, wrong, channels, rows, 4)
    for fewer in (rows[:1], rows[:1] + [rows[1][:-1]], []):
        with pytest.raises(DamagedFile):
            decode_all(tables, coded_once[0], channels, fewer, 4)


def test_wrong_rows_are_noticed(tables, coded_once):
    """What happens on a machine whose network computes another scale somewhere."""
    coded, channels, rows = coded_once
    for at in range(0, len(rows[0]), 9):
        other = rows[0].copy()
        other[at] = (other[at] + 1) % 64
        with pytest.raises(DamagedFile):
            decode_all(tables, coded, channels, [other, rows[1]], 4)
    with pytest.raises(DamagedFile):
        decode_all(tables, coded, channels, rows, 8)


def test_bit_flips_in_the_stream_are_noticed(tables, coded_once):
    (stream, escapes, checksum), channels, rows = coded_once
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(stream + escapes)
        for at in rng.integers(0, len(damaged), rng.integers(1, 4)):
            damaged[at] ^= 1 << rng.integers(0, 8)
        if damaged == stream + escapes:
            continue
        wrong = bytes(damaged[: len(stream)]), bytes(damaged[len(stream) :]), checksum
        with pytest.raises(DamagedFile):
            decode_all(tables, wrong, channels, rows, 4)


def test_random_bytes_never_do_worse_than_damaged(tables):
    rng = np.random.default_rng(0)
    for _ in range(500):
        stream = rng.bytes(4 * int(rng.integers(0, 40)) if rng.random() < 0.8 else int(rng.integers(0, 160)))
        coded = stream, rng.bytes(int(rng.integers(0, 60))), int(rng.integers(0, 2**32))
        rows = [rng.integers(0, 64, size) for size in rng.integers(0, 80, 3)]
        with pytest.raises(DamagedFile) as caught:
            decode_all(tables, coded, rng.integers(0, 12, 20), rows)
        assert "\n" not in str(caught.value) and isinstance(caught.value, MlicError)


def test_order_of_symbols():
    """z by channel, row, column; a half-slice by channel, row, column of the positions it has."""

    class Recorder:
        def put_hyper(self, symbols, channels):
            self.hyper = symbols.tolist(), channels.tolist()

        def put_plain(self, symbols, rows):
            self.plain = symbols.tolist()

        def get_plain(self, rows):
            return np.array(self.plain, np.int32)

        def put_latent(self, symbols, rows):
            self.latent = symbols.tolist()

        def get_latent(self, rows):
            return np.array(self.latent, np.int32)

    tiny = tiny_model()
    channels, height, width = tiny.config.z_channels, 2, 3
    z = torch.arange(channels * height * width, dtype=torch.float32).view(1, channels, height, width)
    y = torch.arange(4 * 4 * 6, dtype=torch.float32).view(1, 4, 4, 6)
    out = Recorder()
    gaussian = tiny.gaussian.plain()
    write = Write(y, z, (4,), gaussian, [out])
    tiny.prior.median.zero_()
    write.hyper(tiny.prior, None, WHOLE)
    assert out.hyper[0] == list(range(channels * height * width))
    assert out.hyper[1] == [c for c in range(channels) for _ in range(height * width)]
    mean = torch.full((1, 4, 4, 3), 0.25)
    for anchor in (True, False):
        write.latent(0, anchor, mean, mean)
        wanted = [(c, r, k) for c in range(4) for r in range(4) for k in range(6) if ((r + k) % 2 == 1) == anchor]
        assert out.latent == [int(y[0, c, r, k]) for c, r, k in wanted]
        back = Read((height, width), gaussian, [out]).latent(0, anchor, mean, mean)
        assert (back - mean).flatten().tolist() == out.latent
    for places, rows, columns in zip(QUARTERS, ([0], [1], [0], [1]), ([0, 2], [1], [1], [0, 2])):
        mean = torch.full((1, channels, len(rows), len(columns)), 0.25)
        write.hyper_given(places, mean, mean)
        assert out.plain == [int(z[0, c, r, k]) for c in range(channels) for r in rows for k in columns]
        back = Read((height, width), gaussian, [out]).hyper_given(places, mean, mean)
        assert (back - mean).flatten().tolist() == out.plain


def tiny_model():
    torch.manual_seed(0)
    config = dataclasses.replace(
        FAST,
        name="tiny",
        width=16,
        coarse_width=16,
        depth=(1, 1),
        slices=(4, 8),
        z_channels=8,
        phi_h_channels=16,
        channel_hidden=(8, 8),
        parameters_hidden=(16, 8),
        lrp_hidden=(8, 8),
        intra=AttentionConfig(kind="linear", width=8, heads=2, reprojection_kernel=3, expansion=2),
        inter=AttentionConfig(kind="linear", width=8, heads=2, reprojection_kernel=1, expansion=2),
        quality_levels=4,
    )
    return seal(build_model(config))


def test_whole_file_with_the_other_decoder(monkeypatch):
    """A picture's file, read with the decoder above in the place of mlic's: a quality between levels, and escapes."""
    model = tiny_model()
    with torch.no_grad():
        model.prior.level_shift.rows += torch.linspace(-1, 1, 4)[:, None]  # so that the levels have different tables
        model.prior.matrices[0] += 2  # narrow: z needs escapes
        model.gains.encoder_latent.rows += 3
    seal(model)
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    data = codec.encode(picture, 80, model)
    assert MlicFile.from_bytes(data).quality % 256 and MlicFile.from_bytes(data).tiles[0].escapes
    wanted = np.asarray(codec.decode(data, model))
    monkeypatch.setattr(decoding, "SymbolDecoder", SlowDecoder)
    np.testing.assert_array_equal(np.asarray(codec.decode(data, model)), wanted)
