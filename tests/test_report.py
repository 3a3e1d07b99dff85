from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from test_compare import better, results, save

from mlic.cli import main
from mlic.compare import compare
from mlic.errors import MlicError
from mlic.report import figure_png, html_report
from mlic.report_pictures import same_size_pictures
from mlic.weights import save_weights

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=4000 --enable-logging=stderr "
    "--window-size=1200,900 --dump-dom"
).split()
PROBE = """<script>
const slider = document.getElementById("slider"), over = document.querySelectorAll("#compare img")[1];
const before = over.style.clipPath;
slider.value = 20;
slider.dispatchEvent(new Event("input"));
const home = document.querySelector("[data-zoom='0']"), view = JSON.stringify(rd.view);
document.querySelector("[data-zoom='0.7']").click();
const zoomed = view !== JSON.stringify(rd.view);
home.click();
const theme = document.documentElement.dataset.theme;
document.getElementById("theme").click();
const circle = document.querySelector("#rd circle").getBoundingClientRect();
document.querySelector("#rd svg").dispatchEvent(new PointerEvent("pointermove", {clientX: circle.x + 2, clientY: circle.y + 2}));
document.body.dataset.found = JSON.stringify({
  slider: [before, over.style.clipPath], zoomed, home: view === JSON.stringify(rd.view),
  themes: [theme, document.documentElement.dataset.theme], tip: document.querySelector("#rd .tip").textContent,
  lines: document.querySelectorAll("#rd polyline").length, rows: document.querySelectorAll("#table tbody tr").length,
  dots: document.querySelectorAll("#scatter text[style]").length, crops: document.querySelectorAll(".crop").length,
  overflow: document.documentElement.scrollWidth - innerWidth, errors: window.errors,
});
</script>"""


@pytest.fixture(scope="module")
def comparison():
    nasty = results("c", better(1.2))
    nasty.codec["label"] = "</script><b>C"
    return compare([results("a"), results("b", better(), kind="model"), nasty], anchor="a", published=())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, photo, small_models):
    path = tmp_path_factory.mktemp("pictures") / "x.png"
    Image.fromarray(photo).save(path)
    return same_size_pictures([path], small_models["fast"], quality=50, peers=["jpeg", "webp"])


def test_pictures_at_the_same_size(pictures, photo):
    (entry,) = pictures
    original, ours, *others = entry["versions"]
    assert (entry["width"], entry["height"]) == (96, 80)
    assert original["bytes"] == photo.nbytes and original["psnr"] is None
    for version in others:
        assert abs(version["bytes"] / ours["bytes"] - 1) < 0.1 or "has no file nearer" in version["note"]
    from base64 import b64decode
    from io import BytesIO

    embedded = np.asarray(Image.open(BytesIO(b64decode(original["uri"].split(",")[1]))).convert("RGB"))
    assert np.array_equal(embedded, photo)


def test_the_page_is_whole(comparison, pictures):
    page = html_report(comparison, pictures)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
    assert [row["curve"]["name"] for row in data["rows"]] == ["b", "a", "c"]
    assert data["rows"][2]["curve"]["label"] == "</script><b>C"  # as data, and so not as markup
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\((?!\$\{v\.uri\}|#)""", page)
    assert page.count("data:image/webp") == 4


def test_the_page_works_in_a_browser(comparison, pictures, tmp_path):
    if BROWSER is None:
        pytest.skip("no Chromium here")
    page = html_report(comparison, pictures)
    page = page.replace("<head>", "<head><script>window.errors = []; onerror = text => errors.push(text);</script>")
    (tmp_path / "page.html").write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    address = (tmp_path / "page.html").as_uri()
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", address]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in run.stderr
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', run.stdout)[1]))
    assert found["errors"] == [] and found["overflow"] <= 0
    assert found["slider"] == ["inset(0px 50% 0px 0px)", "inset(0px 80% 0px 0px)"]
    assert found["zoomed"] and found["home"] and set(found["themes"]) == {"light", "dark"}
    assert found["tip"].startswith("B\n") and "dB" in found["tip"]
    assert (found["lines"], found["rows"], found["dots"], found["crops"]) == (3, 3, 3, 4)


def test_without_pictures_and_times(comparison):
    assert '"pictures_shown": []' in html_report(comparison)


def test_the_figure(comparison, tmp_path):
    pytest.importorskip("matplotlib")
    figure_png(comparison, tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as image:
        assert image.size == (1600, 896)
        orange = (np.asarray(image.convert("RGB")).astype(int) - (0xE8, 0x59, 0x0C)).__abs__().max(2) < 8
    assert orange.sum() > 1000  # our curve, drawn thick


def test_the_command(tmp_path, photo, small_models):
    pytest.importorskip("matplotlib")
    for name in ("x", "y", "z"):
        Image.fromarray(photo).save(tmp_path / f"{name}.png")
    save_weights(tmp_path / "small.safetensors", small_models["fast"])
    files = save(tmp_path, results("a"), results("b", better(), kind="model"))
    page, figure = tmp_path / "page.html", tmp_path / "rd.png"
    options = ["--anchor", "a", "--published", "none", "-o", page, "--png", figure, "--peers", "jpeg", "--pictures", 2]
    shown = ["--images", tmp_path / "x.png", "--images", tmp_path / "y.png", "--images", tmp_path / "z.png"]
    command = ["report", *files, *options, *shown, "--model", tmp_path / "small.safetensors", "-q", 30]
    said = CliRunner().invoke(main, [str(word) for word in command])
    assert said.exit_code == 0 and said.stdout.startswith(f"{page}: ") and str(figure) in said.stdout
    text = page.read_text()
    assert re.search(r'"rate_cubic": -(10\.0|9\.99)', text)
    assert re.findall(r'"name": "([xyz])"', text) == ["x", "z"], "spread over what there is"
    with Image.open(figure) as drawn:
        assert drawn.format == "PNG"
    said = CliRunner().invoke(main, ["report", *files, "--anchor", "none-of-them"])
    assert said.exit_code == 1 and "no curve called 'none-of-them'" in said.stderr
    said = CliRunner().invoke(main, ["report", *files, "-q", "nan"])
    assert said.exit_code == 2 and "finite" in said.stderr


def test_matplotlib_is_named_when_missing(comparison, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MlicError, match="the figure needs the package matplotlib"):
        figure_png(comparison, tmp_path / "f.png")
