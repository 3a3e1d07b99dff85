"""The Python of docs/using.md and docs/research.md runs, from top to bottom, in a folder with a photograph."""

import re
from pathlib import Path

import pytest
from PIL import Image

import mlic
from mlic import refine

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(page) -> the names that its examples leave."""
    (tmp_path / "photos").mkdir()
    with Image.open(Path(mlic.__file__).parent / "samples" / "kodim23.png") as image:
        for path in (tmp_path / "photo.png", tmp_path / "photos" / "photo.png"):
            image.crop((100, 50, 484, 306)).save(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(refine, "EFFORT", 0)  # the examples spend most of their time on it

    def run(page: str) -> dict:
        names: dict = {}
        for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S):
            exec(block, names)
        return names

    return run


def test_research(run, capsys):
    names = run("research.md")
    assert Image.open("back.png").size == (384, 256)
    parts = [(i, part) for i, part, _ in names["seen"]]
    assert len(parts) == 2 * 6 + 2 and len(names["strategy"].slice_bits) == 6
    said = capsys.readouterr().out
    assert re.search(r"\d\.\d M parameters, \d+ kMAC/px", said) and float(re.search(r"PSNR ([\d.]+)", said)[1]) > 28


def test_using(run, tmp_path):
    names = run("using.md")
    assert names["result"].note is None and 9_800 <= len(names["result"].data) <= 10_000
    assert names["part"].pixels.shape == (48, 64, 3) and names["small"].pixels.shape == (64, 96, 3)
    assert 7_840 <= (tmp_path / "small.mlic").stat().st_size <= 8_000
    assert names["image"].size == (200, 133)
    assert names["back"].shape == names["x"].shape and names["data"] == names["files"][0]
    assert names["array"].shape == (64, 96, 3)
