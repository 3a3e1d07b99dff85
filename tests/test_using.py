"""The Python of docs/using.md runs, from top to bottom, in a folder with a photograph."""

import re
from pathlib import Path

from PIL import Image

import mlic
from mlic import refine

DOCS = Path(__file__).parents[1] / "docs"


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    with Image.open(Path(mlic.__file__).parent / "samples" / "kodim23.png") as image:
        image.crop((100, 50, 484, 306)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(refine, "EFFORT", 0)  # the examples spend most of their time on it
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "using.md").read_text(), re.S):
        exec(block, names)
    assert names["result"].note is None and 9_800 <= len(names["result"].data) <= 10_000
    assert names["part"].pixels.shape == (48, 64, 3) and names["small"].pixels.shape == (64, 96, 3)
    assert 7_840 <= (tmp_path / "small.mlic").stat().st_size <= 8_000
    assert names["image"].size == (200, 133)
    assert names["back"].shape == names["x"].shape and names["data"] == names["files"][0]
    assert names["array"].shape == (64, 96, 3)
