"""Symbols to bytes and back: rANS with 24-bit integer tables, by the `constriction` library, or by `rans.py` without it.

The arithmetic is fixed by docs/format.md and does not depend on the library: a state of 64 bits, words of 32 bits.
constriction turns n weights into frequencies as 1 + floor(weight * (2^24 - n) / sum of weights); handing it our
frequencies less one makes that ratio exactly one, so the coder uses our integers and no float decides anything.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from . import rans
from .dependent import States, coded, levels_of, parts, table_rows
from .errors import DamagedFile, WeightsError
from .tables import CodingTables, TableSet

try:
    import constriction
except ImportError:  # it has no wheels for ARM but those of macOS
    AnsCoder, row_model = rans.AnsCoder, rans.Row
else:
    AnsCoder = constriction.stream.stack.AnsCoder

    def row_model(frequencies: np.ndarray) -> constriction.stream.model.Categorical:
        return constriction.stream.model.Categorical((frequencies - 1).astype(np.float64), perfect=False)


def _models() -> Callable[[TableSet, int], Any]:
    """The coder's model of a TableSet's row, made when first used."""
    return functools.cache(lambda tables, row: row_model(tables.row(row)))


def _groups(rows: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Order that sorts positions by row (stable), and (row, start, end) of each row's run in that order."""
    order = np.argsort(rows, kind="stable")
    grouped = rows[order]
    cuts = [0, *(np.flatnonzero(grouped[1:] != grouped[:-1]) + 1).tolist(), len(rows)]
    return order, [(int(grouped[start]), start, end) for start, end in zip(cuts, cuts[1:]) if end]


class SymbolEncoder:
    """Collects symbols with the table rows that code them; `finish` gives the coded streams.

    `prior_row` is the first of the prior's rows at the file's quality level.
    """

    def __init__(self, tables: CodingTables, prior_row: int = 0) -> None:
        self.tables, self.prior_row = tables, prior_row
        self.batches: list[tuple[TableSet, np.ndarray, np.ndarray]] = []
        self.escapes = bytearray()
        self.checksum = 0

    def put_hyper(self, symbols: np.ndarray, channels: np.ndarray) -> None:
        self._put(self.tables.prior, symbols, channels + self.prior_row)

    def put_plain(self, symbols: np.ndarray, rows: np.ndarray) -> None:
        self._put(self.tables.gaussian, symbols, rows)

    def put_latent(self, levels: np.ndarray, rows: np.ndarray) -> None:
        """Levels as of dependent.py; without dependent quantisation they are the symbols."""
        for symbols, own in coded(levels, rows, dependent=self.tables.dependent):
            self.put_plain(symbols, own)

    def _put(self, tables: TableSet, symbols: np.ndarray, rows: np.ndarray) -> None:
        self.checksum = zlib.crc32(symbols.astype("<i4").tobytes(), self.checksum)
        escape = tables.sizes[rows] - 1
        position = symbols - tables.first[rows]
        outside = (position < 0) | (position >= escape)
        for at in np.flatnonzero(outside):
            past = position[at] - escape[at] if position[at] >= 0 else position[at]  # >= 0 above, < 0 below
            self.escapes += _varint(2 * int(past) if past >= 0 else -2 * int(past) - 1)
        self.batches.append((tables, np.where(outside, escape, position).astype(np.int32), rows))

    def finish(self) -> tuple[bytes, bytes, int]:
        """-> (rANS words in the order a decoder takes them, escape bytes, CRC-32 of all symbols)."""
        coder = AnsCoder()
        model = _models()
        for tables, positions, rows in reversed(self.batches):
            order, groups = _groups(rows)
            positions = positions[order]
            for row, start, end in reversed(groups):
                coder.encode_reverse(positions[start:end], model(tables, row))
        return coder.get_compressed()[::-1].astype("<u4").tobytes(), bytes(self.escapes), self.checksum


class SymbolDecoder:
    """Gives back, batch by batch, what a SymbolEncoder was given. Raises DamagedFile where that cannot be.

    With `partial`, the stream may end early: from the batch in which it does, all symbols are given as zeros.
    `batches` counts the whole ones.
    """

    def __init__(
        self, tables: CodingTables, stream: bytes, escapes: bytes, checksum: int, prior_row: int = 0, *, partial: bool = False
    ) -> None:
        if len(stream) % 4:
            raise DamagedFile(f"coded stream of {len(stream)} bytes is not made of 32-bit words")
        words = np.frombuffer(stream, "<u4")[::-1].astype(np.uint32)
        if len(words) and words[-1] == 0:
            raise DamagedFile("coded stream starts with a zero word")
        self.coder, self.tables, self.prior_row = AnsCoder(words), tables, prior_row
        self.escapes, self.next_escape = escapes, 0
        self.expected, self.checksum = checksum, 0
        self.model = _models()
        self.partial, self.exhausted, self.batches = partial, False, 0

    def get_hyper(self, channels: np.ndarray) -> np.ndarray:
        return self._counted(self._get(self.tables.prior, channels + self.prior_row))

    def get_plain(self, rows: np.ndarray) -> np.ndarray:
        return self._counted(self._get(self.tables.gaussian, rows))

    def get_latent(self, rows: np.ndarray) -> np.ndarray:
        """Levels as of dependent.py; without dependent quantisation they are the symbols."""
        if not self.tables.dependent:
            return self.get_plain(rows)
        plain, turns = parts(rows)
        levels, states = np.zeros(len(rows), np.int32), States(turns)
        if len(plain):
            levels[plain] = self._get(self.tables.gaussian, rows[plain])
        for turn in turns:
            lattices = states.lattices(turn)
            symbols = self._get(self.tables.gaussian, table_rows(rows[turn], lattices))
            levels[turn] = levels_of(symbols, lattices)
            states.move(symbols)
        return self._counted(levels)

    def _counted(self, batch: np.ndarray) -> np.ndarray:
        self.batches += not self.exhausted
        return np.zeros_like(batch) if self.exhausted else batch

    def _get(self, tables: TableSet, rows: np.ndarray) -> np.ndarray:
        if self.exhausted:
            return np.zeros(len(rows), np.int32)
        order, groups = _groups(rows)
        sorted_positions = np.empty(len(rows), np.int32)
        for row, start, end in groups:
            sorted_positions[start:end] = self.coder.decode(self.model(tables, row), end - start)
        if self.partial and self.coder.num_words() <= 2:  # all words are in the state: one may have been missing
            self.exhausted = True
            return np.zeros(len(rows), np.int32)
        positions = np.empty(len(rows), np.int32)
        positions[order] = sorted_positions
        escape = tables.sizes[rows] - 1
        for at in np.flatnonzero(positions == escape):
            code = self._varint()
            positions[at] = escape[at] + code // 2 if code % 2 == 0 else -(code + 1) // 2
        symbols = positions + tables.first[rows]
        self.checksum = zlib.crc32(symbols.astype("<i4").tobytes(), self.checksum)
        return symbols

    def finish(self) -> None:
        """Check that all was read and that it was what the encoder wrote."""
        if self.checksum != self.expected or self.next_escape != len(self.escapes) or not self.coder.is_empty():
            raise DamagedFile(
                "decoding went astray: the symbols do not match the file's checksum. Where the file is intact, this "
                "machine computed other probabilities than the one that wrote it"
            )

    def _varint(self) -> int:
        value, shift = 0, 0
        while self.next_escape < len(self.escapes) and shift < 28:
            byte = self.escapes[self.next_escape]
            self.next_escape += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
        raise DamagedFile("decoding went astray: an escape value is missing or too large")


def _varint(value: int) -> bytes:
    """Unsigned LEB128, at most 28 bits."""
    if value >= 1 << 28:
        raise WeightsError(f"a latent value is too large to code ({value}): are the weights damaged?")
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
