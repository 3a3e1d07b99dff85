"""Integer frequency tables: what real files are coded with, on every machine the same.

Made once from a model's priors in float64 and stored with its weights; never recomputed where files are read.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import numpy as np
import torch

from .dependent import STEPS, coded
from .prior import SCALE_LEVELS, FactorizedPrior, scale_table

PRECISION = 24  # bits; every table sums to 2^24
GAUSSIAN_TAIL, PRIOR_TAIL = 1e-8, 1e-5  # what the escape symbol takes over, on both sides together
PRIOR_SHIFT = 8  # the prior's many rows are multiples of 2^8, and stored as 16-bit numbers
MAX_HALF_WIDTH, PRIOR_REACH = 1600, 512  # symbols on each side of zero that a row has at most
ESCAPE_BITS = 16  # about what an escape's bytes add to its symbol
SMOOTHING = 10  # symbols that a Gaussian adds to the counted ones, for each symbol of its row


@dataclasses.dataclass(frozen=True, eq=False)
class TableSet:
    """Rows of frequencies. Row r covers the symbols first[r] .. first[r] + sizes[r] - 2, then one escape.

    `frequencies` holds all rows one after another; each row sums to 2^24 and has no zero.
    """

    frequencies: np.ndarray  # (sum of sizes,) int32
    sizes: np.ndarray  # (rows,) int32
    first: np.ndarray  # (rows,) int32

    def __post_init__(self) -> None:
        arrays = (self.frequencies, self.sizes, self.first)
        if any(a.ndim != 1 or a.dtype != np.int32 or len(a) == 0 for a in arrays):
            raise ValueError("coding tables are damaged: not lists of int32; get the weights file again")
        fit = len(self.first) == len(self.sizes) and self.sizes.sum(dtype=np.int64) == len(self.frequencies)
        if not fit or self.sizes.min() < 2:
            raise ValueError("coding tables are damaged: their sizes do not fit; get the weights file again")
        if self.frequencies.min() < 1:
            raise ValueError("coding tables are damaged: a frequency below 1; get the weights file again")
        if (np.add.reduceat(self.frequencies, self.starts, dtype=np.int64) != 1 << PRECISION).any():
            raise ValueError("coding tables are damaged: every row must sum to 2^24; get the weights file again")

    @functools.cached_property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.sizes, dtype=np.int64) - self.sizes

    def row(self, index: int) -> np.ndarray:
        return self.frequencies[self.starts[index] :][: self.sizes[index]]

    def least_bits(self, first: int, count: int) -> float:
        """Bits of one symbol in each of `count` rows, were all of them the likeliest."""
        likeliest = np.maximum.reduceat(self.frequencies, self.starts)[first : first + count]
        return float((PRECISION - np.log2(likeliest)).sum())

    @classmethod
    def from_rows(cls, rows: list[np.ndarray], first: list[int]) -> TableSet:
        sizes = np.array([len(row) for row in rows], np.int32)
        return cls(np.concatenate(rows).astype(np.int32), sizes, np.array(first, np.int32))


PRIOR_FREQUENCIES = "tables.prior.frequencies"


@dataclasses.dataclass(frozen=True)
class CodingTables:
    """All tables of a model: one for each of the 64 scales, and the prior's channels, once per quality level."""

    gaussian: TableSet  # with dependent quantisation, as many again for each lattice
    prior: TableSet  # row = level * channels + channel

    @property
    def dependent(self) -> bool:
        """Whether y is coded by dependent quantisation."""
        return len(self.gaussian.sizes) > SCALE_LEVELS

    def to_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {
            f"tables.{name}.{field.name}": torch.from_numpy(getattr(getattr(self, name), field.name))
            for name in ("gaussian", "prior")
            for field in dataclasses.fields(TableSet)
        }
        tensors[PRIOR_FREQUENCIES] = torch.from_numpy((self.prior.frequencies >> PRIOR_SHIFT).astype(np.uint16))
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> CodingTables:
        """Raises KeyError when a table is missing, ValueError when one is damaged."""
        narrow = tensors[PRIOR_FREQUENCIES]
        if narrow.dtype != torch.uint16 or any(t.is_floating_point() for t in tensors.values()):
            raise ValueError("coding tables are damaged: a table of another type; get the weights file again")
        tensors = {**tensors, PRIOR_FREQUENCIES: torch.from_numpy(narrow.numpy().astype(np.int32) << PRIOR_SHIFT)}

        def read(name: str) -> TableSet:
            return TableSet(*(tensors[f"tables.{name}.{f.name}"].numpy() for f in dataclasses.fields(TableSet)))

        tables = cls(read("gaussian"), read("prior"))
        if len(tables.gaussian.sizes) not in (SCALE_LEVELS, 3 * SCALE_LEVELS):
            raise ValueError(f"coding tables are damaged: not {SCALE_LEVELS} Gaussians; get the weights file again")
        if tables.to_tensors().keys() != tensors.keys():
            raise ValueError("coding tables are damaged: there is one too many; get the weights file again")
        return tables


def integer_frequencies(masses: np.ndarray, shift: int = 0) -> np.ndarray:
    """Probabilities -> positive multiples of 2^shift that sum to 2^24; what rounding leaves goes to the likeliest."""
    masses, total = np.maximum(masses, 0), 1 << (PRECISION - shift)
    frequencies = 1 + np.floor(masses / masses.sum() * (total - len(masses))).astype(np.int64)
    frequencies[np.argmax(masses)] += total - frequencies.sum()
    return frequencies << shift


class SymbolCounter:
    """Takes what a SymbolEncoder takes, and counts how often each symbol comes in each of the Gaussians' rows."""

    def __init__(self, *, dependent: bool = False) -> None:
        self.dependent = dependent
        sets = 3 if dependent else 1
        self.counts = np.zeros((sets * SCALE_LEVELS, 2 * MAX_HALF_WIDTH + 1), np.int64)  # of symbols from -MAX_HALF_WIDTH on

    def put_hyper(self, symbols: np.ndarray, channels: np.ndarray) -> None:
        pass

    def put_plain(self, symbols: np.ndarray, rows: np.ndarray) -> None:
        places = rows * self.counts.shape[1] + symbols.clip(-MAX_HALF_WIDTH, MAX_HALF_WIDTH) + MAX_HALF_WIDTH
        self.counts += np.bincount(places, minlength=self.counts.size).reshape(self.counts.shape)

    def put_latent(self, levels: np.ndarray, rows: np.ndarray) -> None:
        for symbols, own in coded(levels, rows, dependent=self.dependent):
            self.put_plain(symbols, own)


def gaussian_tables(counts: np.ndarray | None = None, *, dependent: bool = False) -> TableSet:
    """One row per scale: integrated Gaussians. With `counts` of a SymbolCounter, a row holds how often its symbols came,
    those of both signs together, mixed with the Gaussian: symbols near a scale are not quite normal, and a net's scale
    is not quite theirs. With `dependent`, as many rows follow for each of the two lattices of dependent.py.
    """
    rows, first = [], []
    quantile = -math.sqrt(2) * torch.erfinv(torch.tensor(GAUSSIAN_TAIL - 1, dtype=torch.float64)).item()
    plain, wide = [1.0] * SCALE_LEVELS, (2 * STEPS).tolist()
    kinds = [(plain, 0), (wide, 0), (wide, 0.5)][: 3 if dependent else 1]  # symbol k is at width * (k - back), or at zero
    scales = [(sigma, width, back) for widths, back in kinds for sigma, width in zip(scale_table().tolist(), widths)]
    for row, (sigma, width, back) in enumerate(scales):
        half = min(MAX_HALF_WIDTH, max(1, math.ceil(sigma * quantile / width)))
        values = [width * max(0, k - back) for k in range(-1, half + 2)]
        edges = [(low + high) / 2 / sigma / math.sqrt(2) for low, high in zip(values, values[1:])]
        cumulative = np.array([0.5 * math.erfc(e) for e in edges])  # mass above each edge
        right = cumulative[:-1] - cumulative[1:]  # symbols 0..half
        right[0] = 1 - 2 * cumulative[1]
        masses = np.concatenate([right[:0:-1], right, [2 * cumulative[-1]]])
        if counts is not None:
            both = counts[row] + counts[row, ::-1]
            seen = both[MAX_HALF_WIDTH - half : MAX_HALF_WIDTH + half + 1]
            masses = SMOOTHING * len(masses) * masses + np.append(seen, both.sum() - seen.sum())
        rows.append(integer_frequencies(masses))
        first.append(-half)
    return TableSet.from_rows(rows, first)


@torch.no_grad()
def prior_tables(prior: FactorizedPrior) -> TableSet:
    """One row per level and channel; symbols are z - median, rounded."""
    levels, channels, reach = max(1, prior.levels), prior.channels, PRIOR_REACH
    prior = copy.deepcopy(prior).cpu()  # the model itself stays where it is
    edges = torch.arange(-reach, reach + 2, dtype=torch.float64) - 0.5  # of symbols -reach..reach
    at = prior.median.double()[:, None] + edges
    rows, first = [], []
    if prior.levels:
        scale, shift = (table.rows.double() for table in (prior.level_scale, prior.level_shift))
    for level in range(levels):
        x = at
        if prior.levels:
            x = at * scale[level].exp()[:, None] + shift[level][:, None]
        logits = prior.logits(x[:, None]).squeeze(1)
        below, above = torch.sigmoid(logits).numpy(), torch.sigmoid(-logits).numpy()
        masses = np.where(below[:, 1:] < 0.5, np.diff(below), -np.diff(above))
        for c in range(channels):
            low = int(np.searchsorted(below[c], PRIOR_TAIL / 2, side="right")) - 1
            high = int(np.searchsorted(-above[c], -PRIOR_TAIL / 2))
            low, high = min(max(low, 0), reach), max(min(high, 2 * reach + 1), reach + 1)
            escape = below[c, low] + above[c, high]
            rows.append(integer_frequencies(np.append(masses[c, low:high], escape), PRIOR_SHIFT))
            first.append(low - reach)
    return TableSet.from_rows(rows, first)


def make_tables(prior: FactorizedPrior, counts: np.ndarray | None = None, *, dependent: bool = False) -> CodingTables:
    return CodingTables(gaussian_tables(counts, dependent=dependent), prior_tables(prior))


def lattice_bits(tables: TableSet) -> torch.Tensor:
    """Bits of the symbols 0, 1, 2, ... of either sign on each of the two lattices: (2, 64, symbols), float32."""
    bits = np.empty((2 * SCALE_LEVELS, MAX_HALF_WIDTH + 1), np.float32)
    for row, out in enumerate(bits, SCALE_LEVELS):
        costs, half = PRECISION - np.log2(tables.row(row)), -int(tables.first[row])
        own = costs[max(half, 0) : -1][: len(out)]
        out[: len(own)], out[len(own) :] = own, costs[-1] + ESCAPE_BITS
    return torch.from_numpy(bits).view(2, SCALE_LEVELS, -1)
