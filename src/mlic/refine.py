"""The encoder's search: where the latent of one picture should lie, given what the decoder makes of it.

g_a gives latents that are good for pictures in general. For the picture at hand the decoder can be asked: how the error of
the decoded picture and the bits move with each value of y_hat and z_hat. A few steps along these gradients make files
smaller; the decoder knows nothing of them. After Campos et al. (CVPR Workshops 2019) and Yang et al. (NeurIPS 2020), who
optimise latents for hundreds of steps of an optimiser that knows no scale; here a step's length is known, see `CURVATURE`.
"""

from __future__ import annotations

import copy
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor

from .dependent import QUICK
from .layers import has_bfloat16
from .model import STRIDE, CompressionModel, level_lambda
from .strategies import Relaxed
from .tiles import LATENT, Box

EFFORT = 4  # passes, if nothing else is said
MAX_EFFORT = 20
# Of lambda times the squared error of the picture, in bits, by a value of y. The gains make a step of one right for the
# level, so it is the same at all of them: 12 / ln 2 = 17.3 by high-rate theory, 18 to 20 with earlier weights.
CURVATURE = 19.0
# The same by a value of z, of RATE_WEIGHT times the bits, times lambda^-1/4: found by trying, as are the numbers below.
HYPER_CURVATURE = 2.8
FIRST_STEP = 0.7  # of the way to the minimum of that parabola; the steps' lengths fall in equal parts, to nothing
ONLY_STEP = 0.5  # where there is no other to mend what it does
LONGEST = 2.0  # way to go: a slope that asks for more, and there are some for 50, has left its parabola
JUMP = 2.0  # times its error: what a block may not take in one step
RATE_WEIGHT = 0.4  # of the bits' gradient: the choice of symbols looks at each one's own bits once more
ERROR_BITS = 24.0, 14.0  # at the lowest and the highest level, and in between: in place of the config's `error_bits`
LONG = 4  # passes from which on there is feedback as well (feedback.py)
# Pixels: larger parts are searched block by block, each with 64 pixels of its neighbours, so that memory stays bounded
BLOCK = 768


def blocks(part: Box) -> list[Box]:
    """A part of a picture in equal blocks of at most `BLOCK` pixels a side.

    >>> blocks(Box(0, 1024, 512, 1792))
    [Box(top=0, left=1024, bottom=512, right=1792)]
    >>> [block.size for block in blocks(Box(0, 0, 704, 1024))]
    [(704, 512), (704, 512)]
    """

    def cuts(start: int, stop: int) -> list[int]:
        parts = -(-(stop - start) // BLOCK)
        units = (stop - start) // STRIDE
        return [start + i * units // parts * STRIDE for i in range(parts + 1)]

    rows, columns = cuts(part.top, part.bottom), cuts(part.left, part.right)
    return [Box(top, left, bottom, right) for top, bottom in zip(rows, rows[1:]) for left, right in zip(columns, columns[1:])]


def passes_of(model: CompressionModel, effort: int | None) -> int:
    """How many passes an effort is, 0 to 20; None: the default.

    Raises ValueError for other numbers, and for a model with one rate, whose lambda nobody knows, unless it is 0.
    """
    variable = model.config.variable_rate
    if effort is None:
        effort = EFFORT if variable else 0
    if not (isinstance(effort, numbers.Integral) and 0 <= effort <= MAX_EFFORT):
        raise ValueError(f"effort must be a whole number from 0 to {MAX_EFFORT}, not {effort!r}")
    if effort and not variable:
        raise ValueError(f"model {model.config.name!r} has one rate: effort cannot be chosen")
    return int(effort)


class Search:
    """The search with one model at one level, (1,), or None for a model with one rate; `effort` as for `passes_of`.
    `gaussian` is the prior that chooses y's symbols after it.
    """

    def __init__(self, model: CompressionModel, effort: int | None, level: Tensor | None) -> None:
        self.model, self.passes, self.gaussian = model, passes_of(model, effort), model.gaussian
        self.device = model.prior.median.device
        self.half = self.passes > 0 and has_bfloat16(self.device)  # nets in bfloat16, where the device is faster in it
        self.long = self.passes >= LONG
        with torch.inference_mode(False):  # what is made here can be differentiated later
            self.level = None if level is None else level.clone()
        if level is not None and model.gaussian.error_bits is not None:
            self.gaussian = copy.copy(model.gaussian)  # the same buffers
            lowest, highest = ERROR_BITS
            self.gaussian.error_bits = lowest + (highest - lowest) * level.item() / (model.config.quality_levels - 1)
        self.looking = copy.copy(self.gaussian)  # for the passes
        self.looking.trellis = QUICK

    def latents(self, x: Tensor, *, part: Box, seen: Box, whole: Box, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What a file should hold of one part of a picture: y (1, M, h/16, w/16) and z (1, N, h/64, w/64), before they
        are rounded, y by `gaussian`.

        `x` (1, 3, H, W) in 0..1 is what `seen` shows of the picture: `part` with its neighbours, in whole multiples of 64
        where there are passes. `whole` is the picture without padding; errors beyond it do not count. `y` is
        what `analyse` makes of x, where that is known.
        """
        y = self.analyse(x) if y is None else y
        place = (..., *part.within(seen, LATENT))
        own = self.model.h_a(y[place])
        if not self.passes:
            return y[place], own
        found_y, found_z = y[place].clone(), own.clone()
        for block in blocks(part):
            look = block.grown(STRIDE, seen)
            shown, before = x[(..., *look.within(seen))], y[(..., *look.within(seen, LATENT))]
            start = own if look == part else self.model.h_a(before)  # at a block's edges h_a sees other things
            with torch.inference_mode(False), torch.enable_grad():
                after, z = self._search(shown.clone(), before.clone(), start.clone(), self.weights(look, whole))
            found_y[(..., *block.within(part, LATENT))] = after[(..., *block.within(look, LATENT))]
            found_z[(..., *block.within(part, STRIDE))] += (z - start)[(..., *block.within(look, STRIDE))]
        return found_y, found_z

    def analyse(self, x: Tensor) -> Tensor:
        with self.in_half():
            return self.model.analyse(x, self.level)

    def weights(self, look: Box, whole: Box) -> Tensor:
        """The bits that squared errors in a part of a picture are worth, (1, 1, h, w): none beyond the picture."""
        weights = torch.zeros(1, 1, *look.size, device=self.device)
        weights[(..., *look.cut(whole).within(look))] = level_lambda(self.model.config, self.level) * 255**2 / 3
        return weights

    def errors(self, y_hat: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        """Squared errors of the decoded picture, clipped as the decoder does it, times `weights`: (1, 3, h, w)."""
        with self.in_half():
            x_hat = self.model.synthesise(y_hat, self.level).clamp(0, 1)
        return weights * (x_hat - x).square()

    def in_half(self) -> torch.autocast:
        """Nets in bfloat16, if they are to be."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half, cache_enabled=False)

    def _search(self, x: Tensor, y: Tensor, z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """A better y and z for x."""
        passes, lmbda = self.passes, level_lambda(self.model.config, self.level)
        curvatures = CURVATURE, HYPER_CURVATURE * lmbda**-0.25
        now = best = target = (y, z)
        errors, lowest, length = torch.full((), float("inf")), float("inf"), FIRST_STEP if passes > 1 else ONLY_STEP
        for left in range(passes, -1, -1):  # the last time only to see where the last step led
            with torch.set_grad_enabled(left > 0):
                relaxed, errors_now, bits = self._look(now, x, weights)
                if (broken := _broken(errors_now, errors)).any():
                    places = broken, F.max_pool2d(broken.float(), STRIDE // LATENT) > 0
                    now = tuple(torch.where(place, old, new) for place, old, new in zip(places, best, now))
                    del relaxed, errors_now, bits  # and what they hold for their gradients, before there is another
                    relaxed, errors_now, bits = self._look(now, x, weights)
            cost = (errors_now.sum() + bits).item()
            if cost < lowest:
                lowest, best, errors = cost, now, errors_now.detach()
                if left:
                    values, z_values = relaxed.values, relaxed.z_values
                    slopes = torch.autograd.grad(errors_now.sum() + RATE_WEIGHT * bits, [*values, *z_values])
                    at = relaxed.whole(values).detach(), relaxed.whole_z(z_values).detach()
                    slopes = relaxed.whole(slopes[: len(values)]), relaxed.whole_z(slopes[len(values) :])
                    downhill = zip(at, slopes, curvatures)
                    target = tuple(value - (slope / curvature).clamp(-LONGEST, LONGEST) for value, slope, curvature in downhill)
            else:  # the step was too long: half of it, from where it began
                length /= 2
            now = tuple(start + length * left / passes * (end - start) for start, end in zip(best, target))
            del relaxed, errors_now, bits  # here, too
        return best

    def _look(self, now: tuple[Tensor, Tensor], x: Tensor, weights: Tensor) -> tuple[Relaxed, Tensor, Tensor]:
        """What comes of a y and a z: how they are coded; the squared errors times `weights` in each 16x16 block,
        (1, 1, h/16, w/16); and the bits.
        """
        relaxed = Relaxed(*now, self.model.config.slices, self.looking)
        with self.in_half():
            y_hat = self.model.code(relaxed, self.level)
        errors = LATENT**2 * F.avg_pool2d(self.errors(y_hat, x, weights).sum(1, keepdim=True), LATENT)
        return relaxed, errors, relaxed.y_bits + relaxed.z_bits


def _broken(now: Tensor, before: Tensor) -> Tensor:
    """Blocks in and beside which a step multiplied the errors, (1, 1, h, w): small steps of y can make large ones of g_s, and
    that the whole has become better is no comfort there.
    """
    jumped = now > JUMP * before + before.mean()
    return F.max_pool2d(jumped.float(), 3, stride=1, padding=1) > 0
