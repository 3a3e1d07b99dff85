"""The one driver: walks a latent slice by slice, anchors first, and asks a strategy for each half's values.

Estimating a rate, encoding and decoding are strategies (strategies.py) handed to `walk`; the loop exists once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkerboard import FIRST, QUARTERS, SECOND, THIRD, WHOLE, Step, pack, place, unpack
from .config import ANCHOR, NON_ANCHOR, ModelConfig
from .context import AnchorSteps, ConvStack, HalfTanh, HyperContext, InterSliceContext, IntraSliceContext, local_context
from .prior import FactorizedPrior
from .strategies import Strategy


class Settle(nn.Module):
    """Where values join the latent; exact arithmetic puts them back on its grid here."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class SliceNets(nn.Module):
    """All nets of one slice: its contexts, and per pass (anchor, non-anchor) entropy parameters and LRP."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        act, channels, before = config.activation, config.slices[index], sum(config.slices[:index])
        self.local = local_context(config.local, channels, act)
        self.steps = None if before or not config.step_hidden else AnchorSteps(channels, config.step_hidden, act)
        self.channel = self.inter = self.intra = None
        shared = config.phi_h_channels
        if before:
            channel_out = config.channel_out or 2 * channels
            self.channel = ConvStack(before, *config.channel_hidden, channel_out, kernels=(3, 3, 3), act=act)
            shared += channel_out
            if config.inter:
                self.inter = InterSliceContext(before, channels, config.inter, act)
                shared += 2 * channels
            if config.intra:
                self.intra = IntraSliceContext(config.slices[index - 1], channels, config.intra, act)
        own = 2 * channels * (1 if self.intra is None else 2)  # local, and intra

        def parameters(inputs: int) -> ConvStack:
            hidden = config.parameters_hidden
            return ConvStack(inputs, *hidden, 2 * channels, kernels=(1,) * (len(hidden) + 1), act=act)

        def lrp() -> ConvStack:
            inputs = config.phi_h_channels // 2 + before + channels
            net = ConvStack(inputs, *config.lrp_hidden, channels, kernels=config.lrp_kernels, act=act)
            return net.silenced()  # training starts from plain rounding

        self.parameters_anchor, self.parameters_non_anchor = parameters(shared), parameters(shared + own)
        self.lrp_anchor, self.lrp_non_anchor = lrp(), lrp()


class MultiReferenceEntropyModel(nn.Module):
    """MEM, MEM+ and MEM++ (Jiang et al. 2023, section 3.2), whichever parts the config names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.channels = config.latent_channels
        self.hyper = None
        if config.hyper_hidden:
            self.hyper = HyperContext(config.z_channels, config.hyper_hidden, config.quality_levels, config.activation)
        self.slices = nn.ModuleList(SliceNets(config, i) for i in range(len(config.slices)))
        self.lrp_activation, self.settle = HalfTanh(), Settle()

    def walk_hyper(self, prior: FactorizedPrior, level: Tensor | None, strategy: Strategy) -> Tensor:
        """-> z_hat (B, N, h, w), from `strategy.hyper` and, where z is coded in quarters, `strategy.hyper_given`."""
        if self.hyper is None:
            return self.settle(strategy.hyper(prior, level, WHOLE))
        median, size = prior.median[None, :, None, None], strategy.z_size
        offset = 0 if self.hyper.offset is None else self.hyper.offset(level)[:, :, None, None]
        z_hat = self.settle(strategy.hyper(prior, level, QUARTERS[0]))
        known = place(z_hat - median, QUARTERS[0], size)  # zeros where nothing is decoded yet
        for places, net in zip(QUARTERS[1:], self.hyper.nets):
            scale, mean = net(self.settle(known + offset))[(..., *places)].chunk(2, 1)
            z_hat = self.settle(strategy.hyper_given(places, mean + median, scale))
            known = known + place(z_hat - median, places, size)
        return known + median

    def walk(self, phi_h: Tensor, strategy: Strategy) -> Tensor:
        """Phi_h = h_s(z_hat) (B, phi_h_channels, H, W) -> y_hat (B, M, H, W).

        `strategy.latent(i, part, mean, scale)` is called once per slice and pass, or step of the anchors, in coding
        order, with packed tensors, (B, C_i, H, W/2) for a half, and returns the quantised values there;
        `strategy.settled` is told what has become of each half. With `strategy.keep`, only so many slices are walked and
        the others are zeros.
        """
        kind = phi_h.dtype  # of what nets are given: in training bfloat16, which the latent itself must not be
        known = phi_h.chunk(2, 1)[1]  # what LRPs see: hyper means and finished slices
        previous = last = None  # finished slices, and the last of them
        done: list[Tensor] = []
        for i, nets in enumerate(list(self.slices)[: strategy.keep]):
            shared = [phi_h]
            if previous is not None:
                shared.insert(0, nets.channel(previous))
                if nets.inter is not None:
                    shared.insert(0, nets.inter(previous))
            current: Tensor | int = 0  # this slice so far, zeros where nothing is decoded yet
            for anchor in (ANCHOR, NON_ANCHOR):
                contexts = shared
                if not anchor:
                    anchors = current.to(kind)
                    own = [nets.local(anchors)] + ([] if nets.intra is None else [nets.intra(last, anchors)])
                    contexts = own + shared
                parameters = nets.parameters_anchor if anchor else nets.parameters_non_anchor
                said = parameters(pack(torch.cat(contexts, 1), anchor))
                if anchor and nets.steps is not None:
                    quantised = self._walk_anchors(i, said, strategy)
                else:
                    quantised = current + self._values(i, anchor, said, strategy)
                lrp = nets.lrp_anchor if anchor else nets.lrp_non_anchor
                residual = pack(lrp(torch.cat([known, quantised.to(kind)], 1)), anchor)
                current = quantised + unpack(self.lrp_activation(residual), anchor)
                strategy.settled(i, anchor, current)
            done.append(current)
            last = current.to(kind)
            known = torch.cat([known, last], 1)
            previous = last if previous is None else torch.cat([previous, last], 1)
        y_hat = torch.cat(done, 1)
        return F.pad(y_hat, (0, 0) * 2 + (0, self.channels - y_hat.shape[1])) if strategy.keep else y_hat

    def _values(self, i: int, part: bool | Step, parameters: Tensor, strategy: Strategy) -> Tensor:
        """Packed entropy parameters of a part -> its values, and zeros elsewhere (B, C_i, H, W)."""
        scale, mean = parameters.chunk(2, 1)
        return unpack(self.settle(strategy.latent(i, part, mean, scale)), part)

    def _walk_anchors(self, i: int, parameters: Tensor, strategy: Strategy) -> Tensor:
        """The anchors of a slice in steps: their entropy parameters before the first (B, 2C_i, H, W/2) -> values."""
        parameters, values = unpack(parameters, ANCHOR), 0
        for step in (FIRST, SECOND, THIRD):  # not `in Step`: torch 2.11 compiles no loop over an Enum
            said = pack(parameters, step)
            if step is not FIRST:
                said = self.settle(said + self.slices[i].steps(step, parameters, values.to(parameters.dtype)))
            values = values + self._values(i, step, said, strategy)
        return values
