"""Feedback while a file is written: what the symbols of some slices got wrong, the values that come after them mend.

A value of y was right for a picture whose other values are what they should be. By the time that it is quantised, those of
earlier slices have become symbols, and their errors are known. The slope of the picture's error by the value, less what it
was when there were no symbols, says what these errors ask of it: one step of Newton's, and the value is moved before it is
quantised. As noise feedback in predictive quantisers (Makhoul & Berouti 1979), with g_s in place of a filter; the decoder
knows nothing of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checkerboard import keep
from .config import ANCHOR, NON_ANCHOR
from .model import STRIDE
from .refine import Search, blocks
from .strategies import Estimate
from .tiles import LATENT, Box

SLICES = 3  # that have a say when they are whole, and the first when its anchors are there: more bring next to nothing
# Of lambda times the squared error, and of the bits where the standard deviation is 1: found by trying, as are these
CURVATURE, BITS_CURVATURE = 25.0, 4.0
LONGEST = 0.5  # way to go
CERTAIN = 0.25  # standard deviation: below it nearly all symbols are zeros, and what they leave out is known beforehand


class NoiseFeedback:
    """The `Feedback` (strategies.py) of one part of a picture, from what `Search.latents` was given, what g_a makes of it, and
    what was found.
    """

    def __init__(
        self, search: Search, x: Tensor, analysed: Tensor, y: Tensor, z: Tensor, *, part: Box, seen: Box, whole: Box
    ) -> None:
        self.search, self.part, self.seen, self.whole = search, part, seen, whole
        self.place = (..., *part.within(seen, LATENT))
        with torch.inference_mode(False), torch.no_grad():  # what is made here can be differentiated later
            self.x, self.y, z = x.clone(), y.clone(), z.clone()
            expected = Estimate(self.y, z, search.model.config.slices, search.looking, noisy=False)
            with search.in_half():
                y_hat = search.model.code(expected, search.level)
            sigma = expected.whole(search.looking.sigma(scale) for _, (_, scale, _) in expected.said)
            self.curvature = CURVATURE + BITS_CURVATURE / sigma.square()
            # y_hat of the part and what is beside it: what is known, and until then what is asked for
            self.y_hat = analysed.clone()
            self.y_hat[self.place] = torch.where(sigma > CERTAIN, self.y, y_hat)
        self.slopes_before = self._slopes()

    def __call__(self, i: int, half: bool, y_hat: Tensor) -> Tensor | None:
        if i >= SLICES or (half == ANCHOR and i > 0):
            return None
        slice_now = self.y_hat[self.place].split(self.search.model.config.slices, 1)[i]
        slice_now.copy_(y_hat + keep(slice_now, NON_ANCHOR) if half == ANCHOR else y_hat)
        way = (self._slopes() - self.slopes_before) / self.curvature
        return self.y - way.clamp(-LONGEST, LONGEST)

    def _slopes(self) -> Tensor:
        """Of lambda times the squared error by y_hat of the part: (1, M, h/16, w/16)."""
        slopes = torch.empty_like(self.y)
        for block in blocks(self.part):
            look = block.grown(STRIDE, self.seen)
            with torch.inference_mode(False), torch.enable_grad():
                y_hat = self.y_hat[(..., *look.within(self.seen, LATENT))].clone().requires_grad_()
                x, weights = self.x[(..., *look.within(self.seen))], self.search.weights(look, self.whole)
                errors = self.search.errors(y_hat, x, weights)
                [slope] = torch.autograd.grad(errors.sum(), y_hat)
            slopes[(..., *block.within(self.part, LATENT))] = slope[(..., *block.within(look, LATENT))]
        return slopes


def search_with_feedback(search: Search, x: Tensor, **boxes: Box) -> tuple[Tensor, Tensor, list[NoiseFeedback]]:
    """What `Search.latents` finds, and the feedback for it; none with few passes: one more brings more for its time."""
    analysed = search.analyse(x)
    y, z = search.latents(x, **boxes, y=analysed)
    return y, z, [NoiseFeedback(search, x, analysed, y, z, **boxes)] if search.long else []
