"""mlic: the MLIC family of learned image codecs, as software to use.

    import mlic
    data = mlic.encode("photo.png", quality=50)
    mlic.decode(data).save("back.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .codec import decode, encode
    from .errors import DamagedFile, MlicError, PictureError, UnsupportedFile, WeightsError
    from .weights import load_model

_HOME = {  # imported when first used: `mlic --help` need not wait for torch
    "decode": ".codec",
    "encode": ".codec",
    "load_model": ".weights",
    "DamagedFile": ".errors",
    "MlicError": ".errors",
    "PictureError": ".errors",
    "UnsupportedFile": ".errors",
    "WeightsError": ".errors",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'mlic' has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
