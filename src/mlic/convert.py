"""The MLIC++ authors' checkpoints into our weights.

Their file is a pickled dict with the weights under "state_dict"; it is read with torch's weights-only unpickler, which
runs no code. Names below are theirs (left) and ours (right).
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from .config import MLIC_PLUS_PLUS
from .errors import WeightsError
from .model import CompressionModel, build_model
from .prior import GaussianPrior

RENAMES = [
    (r"^g_a\.analysis_transform\.", "g_a."),
    (r"^g_s\.synthesis_transform\.", "g_s."),
    (r"^h_a\.reduction\.", "h_a."),
    (r"^h_s\.increase\.", "h_s."),
    (r"^(g_s\.\d+)\.subpel_conv\.", r"\1.subpel."),
    (r"^(g_s\.\d+)\.upsample\.", r"\1.skip."),
    (r"^local_context\.(\d+)\.", r"entropy_model.slices.\1.local."),
    (r"\.local\.relative_position_table$", ".local.relative_position"),
    (r"\.local\.qkv_proj\.", ".local.qkv."),
    (r"\.local\.mlp\.fc1\.", ".local.mlp.0."),
    (r"\.local\.mlp\.fc2\.", ".local.mlp.2."),
    (r"^channel_context\.(\d+)\.fushion\.", r"entropy_model.slices.\1.channel."),
    (r"^global_(inter|intra)_context\.(\d+)\.", r"entropy_model.slices.\2.\1."),
    (r"^entropy_parameters_anchor\.(\d+)\.fusion\.", r"entropy_model.slices.\1.parameters_anchor."),
    (r"^entropy_parameters_nonanchor\.(\d+)\.fusion\.", r"entropy_model.slices.\1.parameters_non_anchor."),
    (r"^lrp_anchor\.(\d+)\.lrp_transform\.", r"entropy_model.slices.\1.lrp_anchor."),
    (r"^lrp_nonanchor\.(\d+)\.lrp_transform\.", r"entropy_model.slices.\1.lrp_non_anchor."),
    (r"^entropy_bottleneck\._?matri(?:x|ces\.)(\d)$", r"prior.matrices.\1"),
    (r"^entropy_bottleneck\._?bias(?:es\.)?(\d)$", r"prior.biases.\1"),
    (r"^entropy_bottleneck\._?factors?\.?(\d)$", r"prior.factors.\1"),
]
IGNORED = re.compile(r"_reparam\.pedestal$|\.relative_position_index$|^gaussian_conditional\.|\._offset$|_cdf|\.target$")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file. Raises WeightsError; never runs code from the file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError("no such file") from None
    except pickle.UnpicklingError:
        raise WeightsError("no checkpoint, or one that holds more than tensors and could run code; refused") from None
    except Exception as error:  # torch's reader raises nearly everything on damaged files
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise WeightsError(f"no checkpoint: {reason}") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise WeightsError("holds no dict of tensors under 'state_dict'")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def our_name(name: str) -> str:
    """One of the authors' tensor names in our spelling.

    >>> our_name("channel_context.1.fushion.2.bias")
    'entropy_model.slices.1.channel.2.bias'
    """
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def import_mlicpp(tensors: dict[str, Tensor]) -> CompressionModel:
    """Build MLIC++ from the authors' tensors. Raises WeightsError naming what does not fit."""
    with torch.device("meta"):
        model = build_model(MLIC_PLUS_PLUS)
    state = {our_name(k): v.float() for k, v in tensors.items() if not IGNORED.search(k)}
    quantiles = state.pop("entropy_bottleneck.quantiles", None)
    if quantiles is None:
        raise WeightsError("not a checkpoint of MLIC++: it has no entropy_bottleneck.quantiles")
    if quantiles.shape != (MLIC_PLUS_PLUS.z_channels, 1, 3):
        raise WeightsError(f"not a checkpoint of MLIC++: entropy_bottleneck.quantiles is {tuple(quantiles.shape)}")
    state["prior.median"] = quantiles[:, 0, 1].contiguous()
    state["gaussian.thresholds"] = GaussianPrior(MLIC_PLUS_PLUS.scale_form).thresholds
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        first = f"{wrong[0]} is {found.get(wrong[0], 'missing')}, needed {expected.get(wrong[0], 'nothing')}"
        old = " (weights older than 2024-04 have another synthesis and are not supported)" if "g_s." in first else ""
        raise WeightsError(f"not a checkpoint of MLIC++ as published: {len(wrong)} tensors differ; {first}{old}")
    if bad := next((name for name, tensor in state.items() if not tensor.isfinite().all()), None):
        raise WeightsError(f"{bad} holds numbers that are not finite")
    model.load_state_dict(state, assign=True)
    return model.eval()
