"""The MLIC++ authors' checkpoints: every name finds its place, and nothing else in a file is trusted."""

from __future__ import annotations

import collections
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mlic.config import MLIC_PLUS_PLUS
from mlic.convert import IGNORED, import_mlicpp, our_name, read_checkpoint
from mlic.errors import WeightsError
from mlic.model import build_model

SHAPES = json.loads((Path(__file__).parent / "data/mlicpp_state_dict.json").read_text())  # of a published checkpoint


def newer_spelling(name: str) -> str:
    """Newer releases of CompressAI keep the prior's parameters in lists."""
    for old, new in (("_matrix", "matrices"), ("_bias", "biases"), ("_factor", "factors")):
        name = re.sub(rf"^entropy_bottleneck\.{old}(\d)$", rf"entropy_bottleneck.{new}.\1", name)
    return name


def checkpoint(*, newer: bool = False) -> dict[str, torch.Tensor]:
    """All tensors at their sizes, each one number in memory."""
    names = {newer_spelling(name) if newer else name: shape for name, shape in SHAPES.items()}
    return {name: torch.zeros(1).expand(shape) if shape else torch.zeros(()) for name, shape in names.items()}


@pytest.fixture(scope="module")
def our_shapes() -> dict[str, list[int]]:
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in build_model(MLIC_PLUS_PLUS).state_dict().items()}


@pytest.mark.parametrize("newer", [False, True], ids=["matrix0", "matrices.0"])
def test_every_name_finds_its_place(our_shapes, newer):
    found = {}
    for name, shape in SHAPES.items():
        name = newer_spelling(name) if newer else name
        if not IGNORED.search(name):
            assert our_name(name) not in found
            found[our_name(name)] = shape
    assert found.pop("entropy_bottleneck.quantiles") == [192, 1, 3]
    found["prior.median"], found["gaussian.thresholds"] = [192], [63]
    assert found == our_shapes


def test_newer_spelling_is_another_one():
    names = {newer_spelling(name) for name in SHAPES}
    assert {"entropy_bottleneck.matrices.0", "entropy_bottleneck.biases.4", "entropy_bottleneck.factors.3"} <= names
    assert len(names - set(SHAPES)) == 14


@pytest.mark.parametrize("newer", [False, True], ids=["matrix0", "matrices.0"])
def test_import(newer, our_shapes):
    tensors = checkpoint(newer=newer)
    median = torch.arange(192.0)
    tensors["entropy_bottleneck.quantiles"] = torch.stack([median - 9, median, median + 9], 1)[:, None]
    name = "entropy_bottleneck.matrices.2" if newer else "entropy_bottleneck._matrix2"
    tensors[name] = torch.full((192, 3, 3), 0.5, dtype=torch.float16)
    model = import_mlicpp(tensors)
    assert model.config == MLIC_PLUS_PLUS and not model.training
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == our_shapes
    assert not any(tensor.is_meta or tensor.dtype != torch.float32 for tensor in model.state_dict().values())
    assert torch.equal(model.prior.median, median)
    assert torch.equal(model.prior.matrices[2], torch.full((192, 3, 3), 0.5))
    assert model.gaussian.thresholds.diff().min() > 0


def test_reading_a_file(tmp_path):
    """As training scripts leave it: wrapped, with an optimiser beside it, from several GPUs."""
    tensors = {f"module.{name}": tensor for name, tensor in checkpoint().items()}
    path = tmp_path / "best.pth.tar"
    for content in (tensors, {"epoch": 3, "state_dict": collections.OrderedDict(tensors), "optimizer": {"lr": 1e-4}}):
        torch.save(content, path)
        read = read_checkpoint(path)
        assert {name: list(tensor.shape) for name, tensor in read.items()} == SHAPES


MISFITS = {
    "missing": (lambda t: t.pop("g_a.analysis_transform.0.skip.bias"), "1 tensors differ; g_a.0.skip.bias is missing"),
    "shape": (lambda t: t.update({"h_a.reduction.0.bias": torch.zeros(7)}), r"h_a.0.bias is \(7,\), needed \(192,\)"),
    "extra": (lambda t: t.update({"extra.weight": torch.zeros(7)}), "extra.weight is .*needed nothing"),
    "old-synthesis": (lambda t: t.pop(next(n for n in t if n.startswith("g_s."))), "older than 2024-04"),
    "no-quantiles": (lambda t: t.pop("entropy_bottleneck.quantiles"), "no entropy_bottleneck.quantiles"),
    "flat-quantiles": (
        lambda t: t.update({"entropy_bottleneck.quantiles": torch.zeros(192)}),
        r"quantiles is \(192,\)",
    ),
    "not-finite": (
        lambda t: t.update({"entropy_bottleneck._bias0": torch.full((192, 3, 1), torch.nan)}),
        "prior.biases.0 holds numbers that are not finite",
    ),
    "empty": (lambda t: t.clear(), "no entropy_bottleneck.quantiles"),
}


@pytest.mark.parametrize("change, message", MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_named(change, message):
    tensors = checkpoint()
    change(tensors)
    with pytest.raises(WeightsError, match=message) as caught:
        import_mlicpp(tensors)
    assert "\n" not in str(caught.value)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    path, trace = tmp_path / "evil.pth", tmp_path / "was-here"
    for content in ({"state_dict": Malicious(trace)}, {"state_dict": {"a": torch.zeros(1), "b": Malicious(trace)}}):
        for zipped in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(WeightsError, match="refused"):
                read_checkpoint(path)
            assert not trace.exists()
    torch.load(path, weights_only=False)  # the attack is a real one
    assert trace.exists()


NO_CHECKPOINTS = {
    "empty": b"",
    "text": b"hello\nworld\n",
    "zeros": bytes(1000),
    "zip": b"PK\3\4" + bytes(100),
    "empty-zip": b"PK\5\6" + bytes(18),
    "pickle-of-nothing": b"\x80\2N.",
    "pickle-cut": b"\x80\2}q\0(X\5",
    "pickle-of-unhashable-key": b"\x80\2}]K\1s.",
    "random": np.random.default_rng(0).bytes(5000),
}


@pytest.mark.parametrize("content", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_files_that_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="no checkpoint|tensors") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(1)], torch.zeros(1), {"state_dict": [1]}, {"state_dict": {"a": 1}}, {"a": "b"}, {1: torch.zeros(1)}],
    ids=["list", "tensor", "list-inside", "number-inside", "string", "number-as-name"],
)
def test_checkpoints_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(WeightsError, match="no dict of tensors"):
        read_checkpoint(tmp_path / "file.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_checkpoints(tmp_path):
    """Bit flips either go unnoticed or are refused in words: the format has few checks of its own."""
    path = tmp_path / "file.pth"
    for zipped in (True, False):
        torch.save({"state_dict": {"a": torch.zeros(3)}}, path, _use_new_zipfile_serialization=zipped)
        good, rng = path.read_bytes(), np.random.default_rng(0)
        for _ in range(150):
            wrong = bytearray(good[: int(rng.integers(1, len(good) + 1))] if rng.random() < 0.2 else good)
            for at in rng.integers(0, len(wrong), 3):
                wrong[at] ^= 1 << rng.integers(0, 8)
            path.write_bytes(wrong)
            try:
                read_checkpoint(path)
            except WeightsError as error:
                assert "\n" not in str(error)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        read_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(WeightsError):
        read_checkpoint(tmp_path)
