"""Pillow's plugins for HEIC and JPEG XL, where they are installed."""

from __future__ import annotations

import contextlib
import functools
from importlib import import_module
from importlib.util import find_spec

PLUGINS = {"HEIC": ("pillow_heif", "pillow-heif"), "JPEG XL": ("pillow_jxl", "pillow-jxl-plugin")}  # modules, packages


@functools.cache
def load_plugins() -> None:
    """Let Pillow read and write what these can; the second registers itself."""
    for name, _ in PLUGINS.values():
        with contextlib.suppress(ImportError):
            module = import_module(name)
            if hasattr(module, "register_heif_opener"):
                module.register_heif_opener()


def package_for(head: bytes) -> str:
    """What to say of a file that Pillow cannot read and that begins so, with 12 bytes: which package is missing, or ""."""
    heic = head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"msf")
    kind = "HEIC" if heic else "JPEG XL" if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")) else ""
    if not kind or find_spec(PLUGINS[kind][0]):
        return ""
    return f"; {kind} needs the package {PLUGINS[kind][1]}"
