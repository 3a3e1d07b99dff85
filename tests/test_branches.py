"""Branches of a training step: the gradients are those of one stream, and the streams wait for each other."""

import contextlib

import pytest
import torch
from PIL import Image
from torch import nn

from mlic.branches import Branches, branch_convolutions
from mlic.muon import Muon
from mlic.train_config import TrainConfig
from mlic.trainer import Trainer


def test_gradients_are_the_convolutions_own():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, 2, 1, groups=8),
        nn.GELU(),
        nn.Conv2d(8, 5, 1),
        nn.Conv2d(5, 2, 1),
    ).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)

    def gradients() -> list[torch.Tensor]:
        return torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])

    expected = gradients()
    branch_convolutions(model, {"0", "2", "4"}, Branches())
    assert "_conv_forward" not in vars(model[5])
    names = {type(model[i](torch.randn(1, c, 4, 4, dtype=torch.float64)).grad_fn).__name__ for i, c in ((0, 3), (2, 8), (4, 8))}
    assert names == {"_ConvolutionBackward"}
    for own, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(own, other)


class Streams:
    """In place of torch.cuda's streams: notes who waited for whom."""

    def __init__(self, monkeypatch) -> None:
        self.events: list[tuple[str, str]] = []
        self.current = self.stream("main")
        names = iter("abc")
        monkeypatch.setattr(torch.cuda, "Stream", lambda: self.stream(next(names)))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.within)
        self.used: list[tuple[str, tuple[int, ...]]] = []  # tensors that must not be freed before a stream has done with them
        record = lambda tensor, stream: self.used.append((stream.name, tuple(tensor.shape)))  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "record_stream", record)

    def stream(self, name: str):
        class Stream:
            def wait_stream(own, other) -> None:
                self.events.append((name, other.name))

        stream = Stream()
        stream.name = name
        return stream

    @contextlib.contextmanager
    def within(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


def test_streams_wait_for_each_other(monkeypatch):
    streams = Streams(monkeypatch)
    branches = Branches(2)
    for expected in ("b", "a", "b"):
        with branches.branch():
            assert streams.current.name == expected
        assert streams.events.pop() == (expected, "main") and streams.current.name == "main"
    branches.join()
    assert streams.events == [("main", "a"), ("main", "b")]


def test_gradients_of_weights_come_from_branches(monkeypatch):
    streams = Streams(monkeypatch)
    branches, model = Branches(2), nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    branch_convolutions(model, {"0", "1"}, branches)
    model(torch.randn(1, 3, 4, 4)).sum().backward()
    assert streams.events == [("b", "main"), ("a", "main")]
    inner = ("b", (1, 2, 4, 4)), ("b", (1, 4, 4, 4))  # gradient and input of each
    assert streams.used == [*inner, ("a", (1, 4, 4, 4)), ("a", (1, 3, 4, 4))]


def test_optimiser_joins_what_it_branches(monkeypatch):
    streams = Streams(monkeypatch)
    weights = [nn.Parameter(torch.randn(4, size)) for size in (4, 400, 2000)]  # buckets of their own
    optimiser = Muon(weights, branches=Branches(2))
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimiser.step()
    assert streams.events == [("b", "main"), ("a", "main"), ("b", "main"), ("main", "a"), ("main", "b")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graph", [False, True])
def test_steps_on_cuda_are_those_of_one_stream(tmp_path, small_models, photo, graph):
    Image.fromarray(photo).save(tmp_path / "a.png")

    def weights(branches: int) -> list[torch.Tensor]:
        config = TrainConfig(
            model=small_models["fast"].config,
            data=(str(tmp_path),),
            out="",
            steps=1,
            batch=4,
            crop=64,
            branches=branches,
            graph=graph,
        )
        trainer = Trainer(config, device="cuda")
        for _ in range(8):
            trainer.step(0.5)
        assert trainer.read_measures()["skipped"] == 0
        return [p.detach().clone() for p in trainer.model.parameters()]

    start, *others = weights(0), weights(0), weights(3)
    apart = [sum((p - q).square().sum() for p, q in zip(start, other)).sqrt().item() for other in others]
    assert apart[1] < 3 * apart[0] + 1e-3 * sum(p.square().sum() for p in start).sqrt().item()
