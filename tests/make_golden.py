"""Write files of tests/golden anew: `python tests/make_golden.py fast-packaged` when the packaged weights change, the others
only when the format does: they were made by earlier versions, which is what they are for.
"""

import dataclasses
import hashlib
import json
import sys

import numpy as np
import torch
from conftest import SAMPLE, _small_attention, small_config
from PIL import Image
from test_exact import GOLDEN, symbols_of

from mlic.codec import encode_picture
from mlic.config import CONFIGS
from mlic.container import MlicFile
from mlic.model import build_model
from mlic.pictures import read_picture
from mlic.weights import load_model, save_weights


def tiny_model(name: str):
    config = small_config(CONFIGS[name])
    tiny = dataclasses.replace(
        config,
        slices=config.slices[:3],
        phi_h_channels=48,
        channel_hidden=(8, 8),
        parameters_hidden=(16,) * len(config.parameters_hidden),
        lrp_hidden=(8, 8),
        z_channels=8,
        width=8,
        intra=config.intra and _small_attention(config.intra, width=8, heads=2),
        inter=config.inter and _small_attention(config.inter, width=8, heads=1),
        **({"coarse_width": 8} if config.transform == "patch" else {}),
    )
    torch.manual_seed(7)
    model = build_model(tiny)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
        for parameter in model.entropy_model.parameters():
            parameter.mul_(1.6)  # so that all contexts matter
        (model.g_a[-1] if tiny.transform == "residual" else model.g_a.linear).weight.mul_(20)
    return model


def main(names: list[str]) -> None:
    picture = read_picture(np.array(Image.open(SAMPLE).convert("RGB").crop((150, 100, 246, 180))))
    record = json.loads((GOLDEN / "golden.json").read_text())
    for name in names:
        if name == "fast-packaged":
            model = load_model("fast")
        else:
            save_weights(GOLDEN / f"{name}.safetensors", model := tiny_model(name), half=True)
        data = encode_picture(model, picture, 70 if model.config.variable_rate else None).data
        (GOLDEN / f"{name}.mlic").write_bytes(data)
        symbols, pixels = symbols_of(model, MlicFile.from_bytes(data))
        digest = hashlib.sha256(symbols.astype("<i4").tobytes()).hexdigest()
        record[name] = {"bytes": len(data), "symbols": digest, "mean": round(float(pixels.mean()), 4)}
    (GOLDEN / "golden.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
