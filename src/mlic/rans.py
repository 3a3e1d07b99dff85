"""rANS in Python's integers, for machines that the `constriction` library has no wheels for, such as Linux on ARM.

It does what docs/format.md, section 5, says; its streams are those of the library, word for word, and take longer.
`coder.py` takes whichever there is.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from .tables import PRECISION

WORD = 32  # bits


class Row:
    """One row of a table: `frequencies` (n,), positive integers whose sum is 2^24."""

    def __init__(self, frequencies: np.ndarray) -> None:
        self.frequencies: list[int] = frequencies.tolist()
        self.starts: list[int] = (np.cumsum(frequencies) - frequencies).tolist()


class AnsCoder:
    """A stack of words, the last on top, with the methods that `coder.py` calls of constriction's class of this name.

    >>> coder, row = AnsCoder(), Row(np.full(4, 1 << 22))
    >>> coder.encode_reverse(np.array([1, 3, 2]), row)
    >>> AnsCoder(coder.get_compressed()).decode(row, 3)
    array([1, 3, 2], dtype=int32)
    """

    def __init__(self, compressed: np.ndarray | None = None) -> None:
        self.words: list[int] = [] if compressed is None else compressed.tolist()
        self.state = 0
        for _ in range(2):
            if self.words:
                self.state = self.state << WORD | self.words.pop()

    def encode_reverse(self, indices: np.ndarray, row: Row) -> None:
        """Code `indices` (count,) from the last to the first, so that `decode` gives them in order."""
        frequencies, starts, words, state = row.frequencies, row.starts, self.words, self.state
        for index in reversed(indices.tolist()):
            frequency = frequencies[index]
            if state >> 2 * WORD - PRECISION >= frequency:
                words.append(state & (1 << WORD) - 1)
                state >>= WORD
            turns, rest = divmod(state, frequency)
            state = (turns << PRECISION) + starts[index] + rest
        self.state = state

    def decode(self, row: Row, count: int) -> np.ndarray:
        """-> the next indices, (count,) int32. Where the words have run out, the state that is left goes on."""
        frequencies, starts, words, state = row.frequencies, row.starts, self.words, self.state
        indices = []
        for _ in range(count):
            slot = state & (1 << PRECISION) - 1
            index = bisect_right(starts, slot) - 1
            state = frequencies[index] * (state >> PRECISION) + slot - starts[index]
            if state < 1 << WORD and words:
                state = state << WORD | words.pop()
            indices.append(index)
        self.state = state
        return np.array(indices, np.int32)

    def get_compressed(self) -> np.ndarray:
        """-> all words, (num_words(),) uint32, the state's on top, its highest last."""
        state = [self.state & (1 << WORD) - 1, self.state >> WORD]
        while state and state[-1] == 0:
            state.pop()
        return np.array(self.words + state, np.uint32)

    def num_words(self) -> int:
        return len(self.words) + -(-self.state.bit_length() // WORD)

    def is_empty(self) -> bool:
        return self.state == 0 and not self.words
