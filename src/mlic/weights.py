"""Weights files: safetensors with a model's config, parameters and integer coding tables.

Loading runs no code from the file. The digest a .mlic file carries covers everything that decoding depends on.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .config import CONFIGS, ModelConfig
from .errors import WeightsError
from .model import CompressionModel, build_model
from .prior import LevelTable
from .saving import write_whole
from .tables import CodingTables, lattice_bits, make_tables

Model = Union[str, Path, CompressionModel]  # a name, a weights file, or a model
FORMAT = "mlic-weights-1"
PACKAGED = Path(__file__).parent / "weights"
SHA256 = {  # of the packaged files
    "fast.safetensors": "11feff584be2282c40a26b0759d5df78a9e72728f06b1b298882489ca17500bb",
}


def seal(model: CompressionModel, *, half: bool = False) -> CompressionModel:
    """Make a model ready for real files, in place: evaluation mode, coding tables, digest.

    `half` first rounds the large tensors to float16, as they will be stored. Priors and gains keep float32.
    """
    model.eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LevelTable):
            module.fold()
    if half:
        for name, parameter in model.named_parameters():
            if _stored_half(name, parameter):
                parameter.copy_(parameter.half().float())
    _set_tables(model, make_tables(model.prior, model.gaussian.counts, dependent=model.config.dependent))
    model.__dict__.pop("_exact_twin", None)  # made of the weights as they were
    model.digest = _digest(model.config.to_json(), _tensors(model))
    return model


def save_weights(path: str | Path, model: CompressionModel, *, half: bool = False, notes: dict[str, str] | None = None) -> None:
    """Seal a model and write it. `notes` go into the metadata: training command, data, results."""
    seal(model, half=half)
    tensors = {
        name: (tensor.half() if half and _stored_half(name, tensor) else tensor).contiguous()
        for name, tensor in _tensors(model).items()
    }
    metadata = {**(notes or {}), "format": FORMAT, "config": model.config.to_json()}
    if model.gaussian.silent:  # beside the config: decoding does not depend on it
        metadata["silent"] = " ".join(map(str, model.gaussian.silent))
    write_whole(Path(path), save(tensors, metadata))


def rewrite_weights(
    earlier: str | Path, later: str | Path, *, tensors: dict[str, Tensor] | None = None, notes: dict[str, str] | None = None
) -> None:
    """A weights file with some tensors, by name and of any floating-point type, and some metadata in place of its own, or
    beside them. All else is kept as stored, the coding tables too.
    """
    with safe_open(earlier, "pt") as file:
        metadata, kept = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    for name, tensor in (tensors or {}).items():
        kept[name] = tensor.detach().to(kept[name].dtype if name in kept else tensor.dtype).contiguous()
    write_whole(Path(later), save(kept, {**metadata, **(notes or {})}))


def load_weights(path: str | Path, *, sha256: str | None = None) -> CompressionModel:
    """Read a file `save_weights` wrote. Raises WeightsError when it is missing, damaged or of another kind."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no weights file {path}")
    try:
        if sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise WeightsError(f"{path} is damaged: its SHA-256 is not the published one; install mlic again")
        path.open("rb").close()  # for the system's own words, where it cannot be read
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a safetensors file"
        raise WeightsError(f"weights {path} cannot be read: {reason}") from None
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"{path} holds no weights of mlic (format {metadata.get('format')!r}, needed {FORMAT!r})")
    try:
        config = ModelConfig.from_json(metadata["config"])
        with torch.device("meta"):
            model = build_model(config)
        tables = CodingTables.from_tensors({k: v for k, v in tensors.items() if k.startswith("tables.")})
        state = {k: v.float() if v.dtype == torch.float16 else v for k, v in tensors.items() if not k.startswith("tables.")}
        if any(tensor.dtype != torch.float32 for tensor in state.values()):
            raise ValueError("a parameter is neither float16 nor float32")
        if len(tables.prior.sizes) != max(1, config.quality_levels) * config.z_channels:
            raise ValueError("the prior's tables are not one per level and channel")
        if tables.dependent != bool(config.dependent):
            raise ValueError("the Gaussians' tables are those of another quantisation")
        model.load_state_dict(state, assign=True)
        model.gaussian.silent = tuple(map(int, metadata.get("silent", "").split()))
        if not all(0 <= channel < config.latent_channels for channel in model.gaussian.silent):
            raise ValueError("a silent channel is none of y's")
    except (KeyError, ValueError, RuntimeError, TypeError, IndexError, AttributeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"weights {path} do not fit their config: {reason}") from None
    model.eval().requires_grad_(False)
    _set_tables(model, tables)
    model.digest = _digest(metadata["config"], _tensors(model))
    return model


def _set_tables(model: CompressionModel, tables: CodingTables) -> None:
    model.tables = tables
    model.gaussian.lattice_bits = lattice_bits(tables.gaussian) if tables.dependent else None


def load_model(model: Model = "fast", *, device: str | torch.device = "cpu") -> CompressionModel:
    """A model ready to encode and decode, by name ("fast") or from a weights file, on `device`. A loaded one is given back as
    it is.

    Raises WeightsError with the remedy when there are no weights.

    >>> load_model("fast").config.name
    'fast'
    """
    if isinstance(model, CompressionModel):
        if model.tables is None:
            raise WeightsError(f"model {model.config.name!r} has no coding tables yet: mlic.weights.seal makes them")
        return model
    name = str(model)
    path = find_weights(name) if name in CONFIGS else Path(name)
    if path is None:
        raise WeightsError(
            f"no weights for {name!r} on this machine; give a weights file, or put "
            f"{name}.safetensors in a folder named by MLIC_WEIGHTS (`mlic train` and `mlic weights import` make such files)"
        )
    if not path.exists() and path.suffix != ".safetensors":
        raise WeightsError(f"no model called {name!r}; there are {', '.join(CONFIGS)}, or give a weights file")
    changed = path.stat().st_mtime_ns if path.exists() else 0
    return _load_cached(path, str(device), changed)


@functools.lru_cache(maxsize=4)  # of a few weights of one name, of which a file asks for one
def _load_cached(path: Path, device: str, changed: int) -> CompressionModel:
    packaged = path.parent == PACKAGED
    with torch.inference_mode(False):  # the encoder differentiates
        return load_weights(path, sha256=SHA256.get(path.name) if packaged else None).to(device)


def find_weights(name: str) -> Path | None:
    """Where the weights of a model lie: the first of `all_weights`."""
    return next(iter(all_weights(name)), None)


def all_weights(name: str) -> list[Path]:
    """All weights of a model's name: in folders of the environment variable MLIC_WEIGHTS, then in the package."""
    folders = [Path(f) for f in os.environ.get("MLIC_WEIGHTS", "").split(os.pathsep) if f] + [PACKAGED]
    return [path for folder in folders if (path := folder / f"{name}.safetensors").exists()]


def _stored_half(name: str, tensor: Tensor) -> bool:
    return tensor.ndim >= 2 and tensor.is_floating_point() and not name.startswith(("prior.", "gains.", "gaussian."))


def _tensors(model: CompressionModel) -> dict[str, Tensor]:
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return tensors | model.tables.to_tensors()


def _digest(config: str, tensors: dict[str, Tensor]) -> bytes:
    """Of the config's text as stored, so that fields which later versions add change no digest."""
    sha = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.numpy().data)
    return sha.digest()
