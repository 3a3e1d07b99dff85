"""mlic: the MLIC family of learned image codecs, as software to use.

import mlic
data = mlic.encode("photo.png", quality=50)
mlic.decode(data).save("back.png")
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from .errors import DamagedFile, MlicError, PictureError, UnsupportedFile, WeightsError

__version__ = "0.1.0"

# Threads soon sleep while they wait: spinning, they keep each other from cores with other work too. Read as torch is loaded.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # with none at all, idle cores took a fifth longer

if TYPE_CHECKING:
    from .codec import decode, encode
    from .pictures import Picture, read_picture
    from .rate_control import encode_to_target
    from .tensors import decode_array, decode_batch, encode_batch, encode_tensor
    from .weights import load_model

_HOME = {  # imported when first used: `mlic --help` need not wait for torch
    "decode": ".codec",
    "encode": ".codec",
    "decode_array": ".tensors",
    "decode_batch": ".tensors",
    "encode_batch": ".tensors",
    "encode_tensor": ".tensors",
    "encode_to_target": ".rate_control",
    "load_model": ".weights",
    "Picture": ".pictures",
    "read_picture": ".pictures",
}
__all__ = [*_HOME, "DamagedFile", "MlicError", "PictureError", "UnsupportedFile", "WeightsError", "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'mlic' has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
