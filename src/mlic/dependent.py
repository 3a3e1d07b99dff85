"""Dependent quantisation: what a symbol of y stands for depends on the symbols before it.

There are two lattices, both of twice a step: the even multiples of the step; and the odd ones, with zero. A state, which the
parity of each symbol moves, says which of them the next symbol counts on. Together they are as fine as the step, while a
symbol costs what it does on one of them; an encoder looks for the best path through the states (trellis-coded quantisation,
Marcellin & Fischer 1990; Schwarz et al., DCC 2019, for VVC's form of it, with eight states; here there are 512, which only the
encoder feels).

Where a scale is very small, nearly all symbols are zeros and plain integers do better: symbols in the rows before FIRST_ROW
are plain. The others of a batch, sorted by row, form chains of at most CHAIN symbols side by side, so that a decoder needs no
more than CHAIN turns. A *level* is a value as a whole number: of steps on a lattice, or of ones where the symbol is plain.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

FIRST_ROW, SECOND_ROW = 7, 16  # scales from 0.24 and from 0.74 on
# By row; multiples of 1/16, so that values stay on the grid of exact arithmetic
STEPS = torch.tensor([1] * FIRST_ROW + [11 / 16] * (SECOND_ROW - FIRST_ROW) + [5 / 8] * (64 - SECOND_ROW), dtype=torch.float32)
# By row and size of the level, 0, 1, 2, and 3 or more: how much further from the mean a value is than its lattice has it. An
# encoder that weighs bits as well takes the smaller level more often than the larger, so what gets a level lies beyond it.
SHIFTS = (
    torch.tensor(
        [(0, 8, 0, 0)] * FIRST_ROW
        + [(0, 6, -24, 0), (0, 7, -15, 0), (0, 7, -6, 6)]
        + [(0, 6, 3, 6)] * 3
        + [(0, 5, 0, 3)] * 3
        + [(0, 5, 1, 2)] * 4
        + [(0, 4, 0, 0)] * 44
    )
    / 64
)
CHAIN = 256
LARGEST = 1e7  # residual that is looked at; the coder takes no larger symbols
TOGETHER = 1 << 16  # states, of all chains whose paths are looked for at a time, so that memory stays bounded


class Trellis:
    """States and what moves them: each is its chain's last `bits` path bits, the newest lowest. A symbol's path bit is its
    parity plus (modulo 2) those of the state's bits that `feedback` has. The symbol is on lattice 0, the even one, or 1, as is
    the sum of the bits that `lattice` has: a systematic convolutional code with feedback (Ungerboeck 1982).

    An encoder looks along chains of `length` symbols. They begin in state 0, or, if they are `free`, in any.

    >>> Trellis(2, 0b10, 0b01).next.tolist()  # by state, and parity
    [[0, 1], [2, 3], [1, 0], [3, 2]]
    """

    def __init__(self, bits: int, feedback: int, lattice: int, *, length: int = CHAIN, free: bool = False) -> None:
        self.length, self.free, states = length, free, range(1 << bits)
        fed, self.lattice = (np.array([(state & mask).bit_count() & 1 for state in states]) for mask in (feedback, lattice))
        path_bits = fed[:, None] ^ [0, 1]  # (states, 2), by the parity of the symbol; or parities, by the path bit
        self.next = (2 * np.arange(len(states))[:, None] + path_bits) % len(states)
        self.branch = 2 * self.lattice[:, None] + path_bits  # 2 * lattice + parity, by state and path bit


FILES = Trellis(9, 0o714, 0o233)  # what a decoder follows
QUICK = Trellis(7, 0o124, 0o46, length=32, free=True)  # for an encoder's passes: sooner, and somewhat too good


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
        return FILES.lattice[self.state[: len(turn)]]

    def move(self, symbols: np.ndarray) -> None:
        self.state[: len(symbols)] = FILES.next[self.state[: len(symbols)], symbols & 1]


def table_rows(rows: np.ndarray, lattices: np.ndarray) -> np.ndarray:
    """Where dependent symbols have their tables: those of the even lattice come after the plain ones, row by row, and those of
    the odd lattice after these.
    """
    return rows + len(STEPS) * (1 + lattices)


def levels_of(symbols: np.ndarray, lattices: np.ndarray) -> np.ndarray:
    """Dependent symbols -> levels."""
    return 2 * symbols - np.sign(symbols) * lattices


def symbols_of(levels: np.ndarray) -> np.ndarray:
    """Levels -> symbols, on whichever lattice: an odd level is on the odd one.

    >>> symbols_of(np.array([-3, -2, -1, 0, 1, 2, 3]))
    array([-2, -1, -1,  0,  1,  1,  2])
    """
    return np.sign(levels) * (np.abs(levels) + 1 >> 1)


def values_of(levels: Tensor, rows: Tensor, shifts: Tensor | None) -> Tensor:
    """What levels, plain ones or dependent, stand for beside the mean, by the rows of their scales; levels are floating-point
    numbers, `shifts` is like SHIFTS, or None where there are none.

    >>> values_of(torch.tensor([0.0, 1, -2, -5]), torch.tensor([3, 7, 8, 40]), SHIFTS)
    tensor([ 0.0000,  0.7812, -1.1406, -3.1250])
    """
    values = levels * STEPS.to(levels)[rows]
    if shifts is None:
        return values
    sizes = levels.abs().clamp(max=shifts.shape[1] - 1).long().clamp(min=0)  # what is no number has none
    return values + levels.sign() * shifts.to(levels)[rows, sizes]


def coded(levels: np.ndarray, rows: np.ndarray, *, dependent: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A batch as it is coded: symbols and the rows of their tables, of the plain ones and then turn by turn; all at once where
    there is no dependent quantisation.
    """
    if not dependent:
        yield levels, rows
        return
    plain, turns = parts(rows)
    if len(plain):
        yield levels[plain], rows[plain]
    states, symbols = States(turns), symbols_of(levels)
    for turn in turns:
        yield symbols[turn], table_rows(rows[turn], states.lattices(turn))
        states.move(symbols[turn])


def choose(
    residual: Tensor,
    rows: Tensor,
    batch: Tensor,
    bits: Tensor,
    error_bits: float,
    trellis: Trellis = FILES,
    shifts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The levels of the dependent residuals (N,) of one or more batches, which are finite: those of the least `error_bits`
    times squared error plus bits, found by Viterbi's algorithm; and the bits of each. int64, float32.

    `rows` (N,) are those of the scales, FIRST_ROW or beyond; `batch` (N,) says whose each residual is, 0, 1, ... in order;
    `bits` (2, rows, symbols) are those of the symbols 0, 1, 2, ... of either sign in the tables of each lattice, `shifts` is
    like SHIFTS.

    Symbols are whole numbers from the start: what floating point is like where a file is written decides how good its path
    is, not whether there is such a path.
    """
    if not len(residual):
        return rows, residual.float()
    order = torch.argsort(batch * len(STEPS) + rows, stable=True)
    size, own_rows = residual[order].abs().float().clamp(max=LARGEST), rows[order]
    step = STEPS.to(size)[own_rows]
    # on each lattice (even, even, odd, odd) the nearest symbol of each parity (0, 1, 0, 1), and the one before it
    lattice = torch.tensor([0, 0, 1, 1], device=size.device)[:, None]
    parity = torch.tensor([0, 1, 0, 1], device=size.device)[:, None]
    symbol = (2 * ((size / (2 * step) + (lattice * 0.5 - parity)) / 2).round().long() + parity).abs()
    symbol = torch.stack([symbol, (symbol - 2).abs()], 1)  # (4, 2, N)
    level = 2 * symbol - symbol.sign() * lattice[:, None]
    spent = bits.flatten()[symbol.clamp(max=bits.shape[2] - 1) + (lattice[:, None] * bits.shape[1] + own_rows) * bits.shape[2]]
    costs, taken = (error_bits * (values_of(level.to(size), own_rows, shifts) - size).square() + spent).min(1)
    level, spent = (x.gather(1, taken[:, None])[:, 0] for x in (level, spent))  # (4, N), of the better one

    # chains side by side, those of all batches
    own, counts = batch[order], torch.bincount(batch)
    chains = -(-counts // trellis.length)
    number = torch.arange(len(own), device=own.device) - (counts.cumsum(0) - counts)[own]
    turn, chain = number // chains[own], number % chains[own] + (chains.cumsum(0) - chains)[own]
    table = costs.new_zeros(int(turn.max()) + 1, 4, int(chains.sum()))  # nothing where a chain has ended
    table[turn, :, chain] = costs.T
    branches = np.concatenate([_best_path(part, trellis) for part in table.split(TOGETHER // len(trellis.next), 2)], 1)
    branches = torch.from_numpy(branches).to(size.device)[turn, chain]
    level, spent = (torch.empty_like(x[0]).index_copy_(0, order, x.gather(0, branches[None])[0]) for x in (level, spent))
    return torch.where(residual < 0, -level, level), spent


def _best_path(costs: Tensor, trellis: Trellis) -> np.ndarray:
    """Of the costs of the four branches in each turn, (turns, 4, chains) -> the branches taken, (turns, chains) int64."""
    (turns, _, chains), states = costs.shape, len(trellis.next)
    branch = torch.from_numpy(trellis.branch.flatten()).to(costs.device)
    total = costs.new_full((states, chains), 0 if trellis.free else torch.inf)
    total[0] = 0
    ways = costs.new_empty(2, states, chains)  # into each state, by the path bit that it loses
    second = torch.empty(turns, states, chains, dtype=torch.bool, device=costs.device)
    for turn in range(turns):
        torch.index_select(costs[turn], 0, branch, out=ways.view(2 * states, chains))
        ways.view(2, states // 2, 2, chains).add_(total.view(2, states // 2, 1, chains))
        torch.lt(ways[1], ways[0], out=second[turn])
        torch.minimum(ways[0], ways[1], out=total)
    state, lost, all_chains = total.argmin(0).cpu().numpy(), second.cpu().numpy(), np.arange(chains)
    branches = np.empty((turns, chains), np.int64)
    for turn in range(turns - 1, -1, -1):
        before = state // 2 + states // 2 * lost[turn, state, all_chains]
        branches[turn] = trellis.branch[before, state & 1]
        state = before
    return branches
