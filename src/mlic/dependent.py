"""Dependent quantisation: what a symbol of y stands for depends on the symbols before it.

There are two lattices, both of twice the step: the even multiples of STEP; and the odd ones, with zero. A state, which the
parity of each symbol moves, says which of them the next symbol counts on. Together they are as fine as STEP, while a symbol
costs what it does on one of them; an encoder looks for the best path through the states (trellis-coded quantisation,
Marcellin & Fischer 1990; Schwarz et al., DCC 2019, for the form it has in VVC, here with eight states).

Where a scale is small, nearly all symbols are zeros and plain integers do better: symbols in the rows before FIRST_ROW are
plain. The others of a batch, sorted by row, form chains of at most CHAIN symbols side by side, so that a decoder needs no more
than CHAIN turns. A *level* is a value as a whole number: of steps on a lattice, or of ones where the symbol is plain.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 9 / 16  # a binary fraction: values stay on the grid of exact arithmetic
FIRST_ROW = 11  # scales from 0.40 on
CHAIN = 64
LARGEST = 1e7  # residual that is looked at; the coder takes no larger symbols
NEXT = np.array([[0, 2], [5, 7], [1, 3], [6, 4], [2, 0], [4, 6], [3, 1], [7, 5]])  # of a state, by the parity of its symbol


def parts(rows: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Places in a batch of the plain symbols, and of the dependent ones turn by turn, each in the order of the chains.

    >>> plain, turns = parts(np.array([0, 20, 12, 3, 20]))
    >>> plain.tolist(), [turn.tolist() for turn in turns]
    ([0, 3], [[2], [1], [4]])
    """
    order = np.argsort(rows, kind="stable")
    order = order[np.searchsorted(rows[order], FIRST_ROW) :]
    chains = max(1, -(-len(order) // CHAIN))
    return np.flatnonzero(rows < FIRST_ROW), [order[at : at + chains] for at in range(0, len(order), chains)]


class States:
    """Of the chains of a batch, from turn to turn. A turn may have fewer symbols than there are chains: then it is the last."""

    def __init__(self, turns: list[np.ndarray]) -> None:
        self.state = np.zeros(len(turns[0]) if turns else 0, np.int64)

    def lattices(self, turn: np.ndarray) -> np.ndarray:
        """0, the even multiples, or 1, the odd ones, for each symbol of a turn."""
        return self.state[: len(turn)] & 1

    def move(self, symbols: np.ndarray) -> None:
        self.state[: len(symbols)] = NEXT[self.state[: len(symbols)], symbols & 1]


def table_rows(rows: np.ndarray, lattices: np.ndarray, sets: int) -> np.ndarray:
    """Where dependent symbols have their tables: those of the even lattice begin `sets` rows after the plain ones, those of the
    odd lattice as many after these.
    """
    return rows + sets * (1 + lattices)


def levels_of(symbols: np.ndarray, lattices: np.ndarray) -> np.ndarray:
    """Dependent symbols -> levels."""
    return 2 * symbols - np.sign(symbols) * lattices


def symbols_of(levels: np.ndarray) -> np.ndarray:
    """Levels -> symbols, on whichever lattice: an odd level is on the odd one.

    >>> symbols_of(np.array([-3, -2, -1, 0, 1, 2, 3]))
    array([-2, -1, -1,  0,  1,  1,  2])
    """
    return np.sign(levels) * (np.abs(levels) + 1 >> 1)


def steps(rows: Tensor, like: Tensor) -> Tensor:
    """What a level counts, by the row of its scale; a tensor like `like`."""
    return torch.full_like(like, STEP).masked_fill_(rows < FIRST_ROW, 1)


def coded(levels: np.ndarray, rows: np.ndarray, sets: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A batch as it is coded: symbols and the rows of their tables, of the plain ones and then turn by turn."""
    plain, turns = parts(rows)
    if len(plain):
        yield levels[plain], rows[plain]
    states, symbols = States(turns), symbols_of(levels)
    for turn in turns:
        yield symbols[turn], table_rows(rows[turn], states.lattices(turn), sets)
        states.move(symbols[turn])


_INTO = [[(s, p) for s in range(len(NEXT)) for p in (0, 1) if NEXT[s, p] == state] for state in range(len(NEXT))]
_FROM = torch.tensor([[s for s, _ in two] for two in _INTO])  # (8, 2): the two states before each
_BRANCH = torch.tensor([[s % 2 * 2 + p for s, p in two] for two in _INTO])  # on the way: 2 * lattice + parity


def choose(residual: Tensor, rows: Tensor, bits: Tensor, error_bits: float) -> tuple[Tensor, Tensor]:
    """The levels of a batch's dependent residuals (N,), which are finite, scales in `rows` (N,), FIRST_ROW or beyond: those
    of the least `error_bits` times squared error plus bits, found by Viterbi's algorithm; and the bits of each. int64, float32.
    `bits` (2, rows, symbols) are those of the symbols 0, 1, 2, ... of either sign in the tables of each lattice.

    Symbols are whole numbers from the start: what floating point is like where a file is written decides how good its path
    is, not whether there is such a path.
    """
    if not len(residual):
        return rows, residual.float()
    order = torch.argsort(rows, stable=True)
    size, count = residual[order].abs().float().clamp(max=LARGEST), len(residual)
    chains = -(-count // CHAIN)
    turns = -(-count // chains)
    # on each lattice (even, even, odd, odd) the nearest symbol of each parity (0, 1, 0, 1), and the one before it
    lattice = torch.tensor([0, 0, 1, 1], device=size.device)[:, None]
    parity = torch.tensor([0, 1, 0, 1], device=size.device)[:, None]
    symbol = (2 * ((size / (2 * STEP) + (lattice * 0.5 - parity)) / 2).round().long() + parity).abs()
    symbol = torch.stack([symbol, (symbol - 2).abs()], 1)  # (4, 2, N)
    level = 2 * symbol - symbol.sign() * lattice[:, None]
    spent = bits.flatten()[
        symbol.clamp(max=bits.shape[2] - 1) + (lattice[:, None] * bits.shape[1] + rows[order]) * bits.shape[2]
    ]
    costs, taken = (error_bits * (STEP * level - size).square() + spent).min(1)
    level, spent = (x.gather(1, taken[:, None])[:, 0] for x in (level, spent))  # (4, N), of the better one
    costs = F.pad(costs, (0, chains * turns - count)).view(4, turns, chains)

    came, branch = _FROM.to(size.device), _BRANCH.to(size.device)
    total = torch.full((len(NEXT), chains), torch.inf, dtype=torch.float32, device=size.device)
    total[0] = 0
    second = []  # which of the two ways was better, (8, chains) each
    for turn in range(turns):
        both = total[came] + costs[:, turn][branch]  # (8, 2, chains)
        second.append(both[:, 1] < both[:, 0])
        total = both.amin(1)
    state = total.argmin(0)
    ways = torch.empty(turns, chains, dtype=torch.int64, device=size.device)
    for turn in range(turns - 1, -1, -1):
        way = second[turn].gather(0, state[None])[0].long()
        ways[turn], state = branch[state, way], came[state, way]
    ways = ways.flatten()[None, :count]
    level, spent = (torch.empty_like(x[0]).index_copy_(0, order, x.gather(0, ways)[0]) for x in (level, spent))
    return torch.where(residual < 0, -level, level), spent
