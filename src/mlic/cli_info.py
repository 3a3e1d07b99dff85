"""The `mlic info` command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from .cli import INPUT, _fail, _say, main
from .errors import MlicError


@main.command()
@click.argument("files", nargs=-1, required=True, type=INPUT, metavar="FILE...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, an object for each file.")
def info(files: tuple[Path, ...], as_json: bool) -> None:
    """What .mlic files say of themselves. Needs no weights.

    \b
    mlic info photo.mlic
    mlic info --json *.mlic | jq .bpp

    Of a truncated file, `tiles_whole` and `bytes` are what is there.
    """
    failed = False
    for number, file in enumerate(files):
        try:
            facts = _facts(file)
        except (MlicError, OSError) as error:
            _fail(file, error)
            failed = True
            continue
        if facts["truncated"]:
            _say(file, "note: the file is truncated")
        if as_json:
            click.echo(json.dumps(facts, indent=2))
        else:
            crcs = facts["symbols_crc32"]
            facts["symbols_crc32"] = " ".join(crcs[:4]) + (" ..." if len(crcs) > 4 else "")
            text = "\n".join(f"{key:14} {value}" for key, value in facts.items())
            click.echo(f"\n{text}" if number else text)
    sys.exit(1 if failed else 0)


def _facts(file: Path) -> dict[str, Any]:
    """By name, in the order to print them. Raises DamagedFile, UnsupportedFile and OSError."""
    from .config import quality_of
    from .container import NO_QUALITY, MlicFile

    data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    content = MlicFile.from_bytes(data, allow_partial=True)
    return {
        "file": str(file),
        "width": content.width,
        "height": content.height,
        "colour": "grey" if content.grey else "rgb",
        "depth": content.depth,
        "alpha": len(content.alpha or b""),
        "arithmetic": "exact" if content.exact else "float",
        "model": content.model,
        "weights": content.digest.hex(),
        "quality": quality_of(content.model, content.quality),
        "quality_level": None if content.quality == NO_QUALITY else content.quality / 256,
        "bytes": len(data),
        "bpp": round(8 * len(data) / (content.width * content.height), 4),
        "tile_size": content.tile,
        "tiles": len(content.tiles),
        "tiles_whole": sum(not tile.cut for tile in content.tiles),
        "truncated": content.truncated,
        "icc_profile": len(content.icc or b""),
        "exif": len(content.exif or b""),
        "xmp": len(content.xmp or b""),
        "symbols_crc32": [f"{tile.checksum:08x}" for tile in content.tiles],
    }
