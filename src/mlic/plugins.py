"""Pillow's plugins for HEIC and JPEG XL, where they are installed."""

from __future__ import annotations

import contextlib
import functools
from importlib import import_module

PLUGINS = ("pillow_heif", "pillow_jxl")
PACKAGES = {"HEIC": "pillow-heif", "JPEG XL": "pillow-jxl-plugin"}


@functools.cache
def load_plugins() -> None:
    """Let Pillow read and write what these can; the second registers itself."""
    for name in PLUGINS:
        with contextlib.suppress(ImportError):
            module = import_module(name)
            if hasattr(module, "register_heif_opener"):
                module.register_heif_opener()


def package_for(head: bytes) -> str:
    """What to say of a file that Pillow cannot read and that begins so, at least 12 bytes: which package helps, or "".

    >>> package_for(b"\\0\\0\\0\\x18ftypheic")
    '; HEIC needs the package pillow-heif'
    """
    heic = head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"msf")
    kind = "HEIC" if heic else "JPEG XL" if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")) else ""
    return kind and f"; {kind} needs the package {PACKAGES[kind]}"
