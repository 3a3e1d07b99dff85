"""Weights files: what is saved comes back as the same codec, and everything else is refused in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mlic import codec, weights
from mlic.config import CONFIGS, FAST, AttentionConfig, ModelConfig
from mlic.errors import WeightsError
from mlic.model import CompressionModel, build_model
from mlic.weights import FORMAT, find_weights, load_model, load_weights, rewrite_weights, save_weights, seal

TINY = dataclasses.replace(
    FAST,
    name="tiny",
    width=16,
    coarse_width=16,
    depth=(1, 1),
    slices=(4, 8),
    z_channels=8,
    phi_h_channels=16,
    channel_hidden=(8, 8),
    parameters_hidden=(16, 8),
    lrp_hidden=(8, 8),
    intra=AttentionConfig(kind="linear", width=8, heads=2, reprojection_kernel=3, expansion=2),
    inter=AttentionConfig(kind="linear", width=8, heads=2, reprojection_kernel=1, expansion=2),
    quality_levels=3,
)
ONE_RATE = dataclasses.replace(TINY, name="tiny-one-rate", transform="residual", quality_levels=0)
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)


def tiny_model(seed: int = 0, config: ModelConfig = TINY) -> CompressionModel:
    torch.manual_seed(seed)
    return build_model(config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(path, sealed model) of a small model's file in full precision."""
    path, model = tmp_path_factory.mktemp("weights") / "tiny.safetensors", tiny_model()
    save_weights(path, model, notes={"training": "none"})
    return path, model


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """No weights from the environment, none remembered."""
    monkeypatch.delenv("MLIC_WEIGHTS", raising=False)
    weights._load_cached.cache_clear()
    yield
    weights._load_cached.cache_clear()


def content(path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


@pytest.mark.parametrize("half", [False, True], ids=["full", "half"])
@pytest.mark.parametrize("one_rate", [False, True], ids=["rates", "one-rate"])
def test_round_trip(tmp_path, half, one_rate):
    path = tmp_path / "model.safetensors"
    model = tiny_model(config=ONE_RATE if one_rate else TINY)
    model.gaussian.silent = (3, 11) if half else ()
    save_weights(path, model, half=half, notes={"training": "none"})
    back = load_weights(path)
    assert back.digest == model.digest and len(back.digest) == 32
    assert back.config == model.config
    assert not back.training and not any(p.requires_grad for p in back.parameters())
    state = back.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    quality = None if one_rate else 60
    data = codec.encode(PICTURE, quality, model)
    assert codec.encode(PICTURE, quality, back) == data
    np.testing.assert_array_equal(np.asarray(codec.decode(data, back)), np.asarray(codec.decode(data, model)))
    assert back.gaussian.silent == model.gaussian.silent
    save_weights(tmp_path / "again.safetensors", back, half=half, notes={"training": "none"})
    (tensors, metadata), (tensors_again, metadata_again) = content(path), content(tmp_path / "again.safetensors")
    assert metadata_again == metadata and tensors_again.keys() == tensors.keys()
    assert all(torch.equal(tensors_again[name], tensor) for name, tensor in tensors.items())


def test_rewritten(tmp_path):
    """What is given takes its place, as it is stored there; the rest stays, coding tables and the config's text too."""
    earlier, later = tmp_path / "earlier.safetensors", tmp_path / "later.safetensors"
    model = tiny_model()
    save_weights(earlier, model, half=True, notes={"training": "none"})
    weight = torch.full_like(model.g_s.tail.weight, 0.1)
    rewrite_weights(earlier, later, tensors={"g_s.tail.weight": weight}, notes={"silent": "3 11"})
    (before, said_before), (after, said) = content(earlier), content(later)
    assert said == {**said_before, "silent": "3 11"} and after.keys() == before.keys()
    assert torch.equal(after["g_s.tail.weight"], weight.half())
    assert all(torch.equal(after[name], before[name]) for name in before if name != "g_s.tail.weight")
    back = load_weights(later)
    assert back.gaussian.silent == (3, 11) and back.digest != model.digest


def test_layout_of_the_file(tmp_path):
    """Names, types and metadata as docs/format.md has them."""
    model = tiny_model()
    save_weights(tmp_path / "half.safetensors", model, half=True, notes={"training": "none"})
    tensors, metadata = content(tmp_path / "half.safetensors")
    assert metadata == {"format": "mlic-weights-1", "config": TINY.to_json(), "training": "none"}
    assert set(tensors) == set(model.state_dict()) | set(model.tables.to_tensors())
    for name, tensor in tensors.items():
        if name.startswith("tables."):
            continue
        large = tensor.ndim >= 2 and not name.startswith(("prior.", "gains.", "gaussian."))
        assert tensor.dtype == (torch.float16 if large else torch.float32), name


@pytest.mark.parametrize("half", [False, True], ids=["full", "half"])
def test_digest_from_the_file_alone(tmp_path, half):
    """Recomputed with struct, json and numpy, the way docs/format.md says."""
    path = tmp_path / "model.safetensors"
    model = tiny_model()
    save_weights(path, model, half=half)
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    sha = hashlib.sha256(header.pop("__metadata__")["config"].encode())
    types = {"F32": "float32", "F16": "float32", "I32": "int32", "U16": "uint16"}
    for name in sorted(header):
        entry = header[name]
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        values = raw[start:end]
        if entry["dtype"] == "F16":
            values = np.frombuffer(values, "<f2").astype("<f4").tobytes()
        shape = "(" + ", ".join(map(str, entry["shape"])) + ("," if len(entry["shape"]) == 1 else "") + ")"
        sha.update(f"{name} torch.{types[entry['dtype']]} {shape}".encode() + values)
    assert sha.digest() == model.digest


def test_digest_covers_all_kinds_of_tensors(saved, tmp_path):
    path, model = saved
    tensors, metadata = content(path)
    digests = {model.digest}
    changed = 0
    own = [name for name in tensors if not name.startswith("tables.")]
    for name in [*own[::12], "prior.median", "gaussian.thresholds", "tables.gaussian.first", "tables.prior.first"]:
        tensor = tensors[name]
        other = tensor.clone().flatten()
        other[-1] += 1
        save_file({**tensors, name: other.view_as(tensor)}, tmp_path / "changed.safetensors", metadata)
        digests.add(load_weights(tmp_path / "changed.safetensors").digest)
        changed += 1
    frequencies = tensors["tables.prior.frequencies"].numpy().copy()
    top = frequencies[: tensors["tables.prior.sizes"][0]].argmax()
    frequencies[[top, top - 1]] += np.array([-1, 1]).astype(np.uint16)
    tensors["tables.prior.frequencies"] = torch.from_numpy(frequencies)
    save_file(tensors, tmp_path / "changed.safetensors", metadata)
    digests.add(load_weights(tmp_path / "changed.safetensors").digest)
    assert len(digests) == changed + 2 and changed > 15


def test_digest_covers_the_config(saved):
    other = tiny_model(config=dataclasses.replace(TINY, padding="zero"))
    other.load_state_dict(saved[1].state_dict())
    assert seal(other).digest != saved[1].digest


def test_digest_does_not_depend_on_notes_or_kind_of_file(saved, tmp_path):
    save_weights(tmp_path / "noted.safetensors", load_weights(saved[0]), notes={"training": "long", "data": "much"})
    assert load_weights(tmp_path / "noted.safetensors").digest == saved[1].digest


def test_digest_does_not_depend_on_silent_channels(saved, tmp_path):
    """So that files of weights in which some have been found since can still be read."""
    model = load_weights(saved[0])
    model.gaussian.silent = (2,)
    save_weights(tmp_path / "silent.safetensors", model)
    assert content(tmp_path / "silent.safetensors")[1]["silent"] == "2"
    assert load_weights(tmp_path / "silent.safetensors").digest == saved[1].digest


def test_another_models_file_is_refused(saved):
    data = codec.encode(PICTURE, 50, saved[1])
    other = seal(tiny_model(seed=1))
    with pytest.raises(WeightsError, match=saved[1].digest[:8].hex()) as caught:
        codec.decode(data, other)
    assert other.digest[:8].hex() in str(caught.value)


def edit(key: str, value):
    """A change of one field of the config; None removes it."""

    def change(tensors, metadata):
        config = json.loads(metadata["config"])
        config[key] = value
        if value is None:
            del config[key]
        metadata["config"] = json.dumps(config, sort_keys=True)

    return change


def put(name: str, tensor: torch.Tensor):
    return lambda tensors, metadata: tensors.update({name: tensor})


def remove(name: str):
    return lambda tensors, metadata: tensors.pop(name)


DAMAGES = {
    "no-metadata": lambda tensors, metadata: metadata.clear(),
    "other-format": lambda tensors, metadata: metadata.update(format="mlic-weights-9"),
    "no-format": lambda tensors, metadata: metadata.pop("format"),
    "no-config": lambda tensors, metadata: metadata.pop("config"),
    "config-not-json": lambda tensors, metadata: metadata.update(config="{"),
    "config-a-list": lambda tensors, metadata: metadata.update(config="[1]"),
    "config-null": lambda tensors, metadata: metadata.update(config="null"),
    "config-unknown-field": edit("colour", "blue"),
    "config-missing-field": edit("width", None),
    "config-unknown-attention-field": edit("intra", {"kind": "linear", "extra": 1}),
    "config-other-width": edit("width", 32),
    "config-other-slices": edit("slices", [8, 4]),
    "config-other-levels": edit("quality_levels", 7),
    "silent-channel-beyond": lambda tensors, metadata: metadata.update(silent=f"0 {TINY.latent_channels}"),
    "silent-channel-below": lambda tensors, metadata: metadata.update(silent="-1"),
    "silent-channel-a-word": lambda tensors, metadata: metadata.update(silent="third"),
    "missing-tensor": remove("prior.median"),
    "extra-tensor": put("extra", torch.zeros(3)),
    "other-shape": put("prior.median", torch.zeros(9)),
    "all-tables-missing": lambda tensors, metadata: [tensors.pop(n) for n in list(tensors) if n.startswith("tables.")],
    "missing-table": remove("tables.prior.frequencies"),
    "extra-table": put("tables.third.sizes", torch.ones(3, dtype=torch.int32)),
    "table-sums-wrong": lambda tensors, metadata: tensors["tables.gaussian.frequencies"].add_(1),
    "table-cut": put("tables.gaussian.frequencies", torch.ones(5, dtype=torch.int32)),
    "table-empty": put("tables.gaussian.sizes", torch.zeros(0, dtype=torch.int32)),
    "table-sizes-giant": put("tables.prior.sizes", torch.full((24,), 2**31 - 1, dtype=torch.int32)),
    "table-real": put("tables.prior.frequencies", torch.ones(5)),
    "table-bfloat16": put("tables.prior.first", torch.ones(24, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_content_is_refused(saved, tmp_path, damage):
    tensors, metadata = content(saved[0])
    damage(tensors, metadata)
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path, metadata or None)
    with pytest.raises(WeightsError, match="damaged.safetensors") as caught:
        load_weights(path)
    assert str(caught.value).isprintable()


BAD_FILES = {
    "empty": lambda raw: b"",
    "random": lambda raw: np.random.default_rng(0).bytes(1000),
    "text": lambda raw: b"hello\n" * 50,
    "cut-in-the-header": lambda raw: raw[:100],
    "cut-in-the-data": lambda raw: raw[:-1],
    "one-byte-more": lambda raw: raw + b"\0",
    "giant-header": lambda raw: b"\xff" * 8 + raw[8:],
    "pickle": lambda raw: b"\x80\2}.",
}


@pytest.mark.parametrize("damage", BAD_FILES.values(), ids=BAD_FILES)
def test_other_files_are_refused(saved, tmp_path, damage):
    path = tmp_path / "file.safetensors"
    path.write_bytes(damage(saved[0].read_bytes()))
    with pytest.raises(WeightsError, match="file.safetensors") as caught:
        load_weights(path)
    assert str(caught.value).isprintable()


def test_published_checksum(saved):
    digest = hashlib.sha256(saved[0].read_bytes()).hexdigest()
    assert load_weights(saved[0], sha256=digest).digest == saved[1].digest
    with pytest.raises(WeightsError, match="SHA-256"):
        load_weights(saved[0], sha256="0" * 64)


def test_packaged_weights_are_the_published_ones(saved, tmp_path, monkeypatch):
    (tmp_path / "fast.safetensors").write_bytes(saved[0].read_bytes())
    monkeypatch.setattr(weights, "PACKAGED", tmp_path)
    with pytest.raises(WeightsError, match="SHA-256"):
        load_model("fast")


@pytest.mark.parametrize("name", ["absent.safetensors", "folder.safetensors"])
def test_no_such_file(tmp_path, name):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(WeightsError, match=name) as caught:
        load_model(tmp_path / name)
    assert str(caught.value).isprintable()


def test_load_model_by_path(saved):
    model = load_model(saved[0])
    assert model.digest == saved[1].digest
    assert load_model(str(saved[0])) is model  # remembered
    assert load_model(model) is model


def test_a_file_that_changed_is_loaded_anew(saved, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(saved[0].read_bytes())
    digest = load_model(path).digest
    save_weights(path, tiny_model(seed=1))
    assert load_model(path).digest != digest == saved[1].digest


def test_a_model_that_is_not_sealed():
    with pytest.raises(WeightsError, match="seal"):
        load_model(build_model(TINY))


@pytest.mark.parametrize("name", ["slow", "fast2", "", "FAST"])
def test_unknown_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError) as caught:
        load_model(name)
    assert str(caught.value).isprintable()


def test_unknown_model_names_those_there_are():
    with pytest.raises(WeightsError, match=", ".join(CONFIGS).replace("+", r"\+")):
        load_model("slow")


def test_folders_named_by_the_environment(saved, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    monkeypatch.setattr(weights, "PACKAGED", tmp_path / "package")
    (second / "mlic++.safetensors").write_bytes(saved[0].read_bytes())
    assert find_weights("mlic++") is None
    with pytest.raises(WeightsError, match="MLIC_WEIGHTS"):
        load_model("mlic++")
    monkeypatch.setenv("MLIC_WEIGHTS", os.pathsep.join([str(tmp_path / "absent"), str(first), "", str(second)]))
    assert find_weights("mlic++") == second / "mlic++.safetensors"
    assert load_model("mlic++").digest == saved[1].digest
    (first / "mlic++.safetensors").write_bytes(b"")
    assert find_weights("mlic++") == first / "mlic++.safetensors"


def test_environment_comes_before_the_package(saved, tmp_path, monkeypatch):
    (tmp_path / "fast.safetensors").write_bytes(saved[0].read_bytes())
    monkeypatch.setenv("MLIC_WEIGHTS", str(tmp_path))
    assert load_model("fast").config.name == "tiny"


def test_names_do_not_reach_other_folders(tmp_path, monkeypatch):
    """A model's name is looked up whole; only what is given as a file is opened as one."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "fast.safetensors").write_bytes(b"")
    monkeypatch.setenv("MLIC_WEIGHTS", str(tmp_path / "inner"))
    with pytest.raises(WeightsError):
        load_model("../fast")


def test_format_is_what_the_specification_says():
    assert FORMAT == "mlic-weights-1"
