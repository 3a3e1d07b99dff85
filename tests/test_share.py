"""What tells other software of .mlic files: file(1) and the desktop's MIME database."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mlic.container import SIGNATURE, CodedTile, MlicFile

SHARE = Path(__file__).parents[1] / "share"
TILE = CodedTile(checksum=0, escapes=b"", stream=b"")


def described(path: Path, *options: str) -> str:
    command = ["file", "--brief", *options, "-m", SHARE / "mlic.magic", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(not shutil.which("file"), reason="no file(1) here")
def test_file_describes_a_file(tmp_path):
    path = tmp_path / "picture"  # without the extension
    common = {"width": 70000 - 6000, "height": 7, "quality": 512, "digest": bytes(8), "tiles": (TILE,)}
    path.write_bytes(MlicFile(**common, grey=False, exact=True, model="fast").to_bytes())
    assert described(path) == "MLIC image data, version 1, 64000x7, 8-bit RGB, model fast"
    assert described(path, "--mime-type") == "image/x-mlic"
    path.write_bytes(MlicFile(**common, grey=True, depth=16, exact=False, model="mlic++").to_bytes())
    assert described(path) == "MLIC image data, version 1, 64000x7, 16-bit grey, float arithmetic, model mlic++"
    path.write_bytes(SIGNATURE + b"\x02anything")
    assert described(path) == "MLIC image data, version 2"
    path.write_bytes(b"\x93NUMPY" + np.zeros(9).tobytes())
    assert "MLIC" not in described(path)


@pytest.mark.skipif(not shutil.which("update-mime-database"), reason="no shared-mime-info here")
def test_the_desktop_knows_the_type(tmp_path):
    shutil.copytree(SHARE / "mime", tmp_path / "mime")
    subprocess.run(["update-mime-database", tmp_path / "mime"], check=True, capture_output=True)
    assert "50:image/x-mlic:*.mlic" in (tmp_path / "mime/globs2").read_text().splitlines()
    magic = (tmp_path / "mime/magic").read_bytes()
    assert re.search(rb"\[60:image/x-mlic\]\n>0=\x00\x05" + re.escape(SIGNATURE), magic)
