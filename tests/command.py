"""What the tests of the command share: `from command import *` brings the fixtures too.

All runs use the small `fast` of conftest.py, through MLIC_WEIGHTS.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from mlic import weights
from mlic.cli import main
from mlic.model import build_model
from mlic.weights import save_weights

SIZE = (40, 30)  # of every picture here


@pytest.fixture(scope="module")
def weights_folder(small_models, tmp_path_factory) -> Path:
    """fast.safetensors, found by name; and beside it in more/: another fast, and mlic, a model of one rate."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "more").mkdir()
    save_weights(folder / "fast.safetensors", small_models["fast"])
    save_weights(folder / "more" / "mlic.safetensors", small_models["mlic"])
    torch.manual_seed(9)
    save_weights(folder / "more" / "fast.safetensors", build_model(small_models["fast"].config))
    return folder


@pytest.fixture(autouse=True, scope="module")
def use_small_weights(weights_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLIC_WEIGHTS", str(weights_folder))
        weights._load_cached.cache_clear()
        yield
    weights._load_cached.cache_clear()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, photo) -> Path:
    """The working directory, with a.png in it."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo[: SIZE[1], : SIZE[0]]).save("a.png")
    return tmp_path


@pytest.fixture
def coded(folder) -> bytes:
    """The bytes of a.mlic, which is now there too."""
    succeed("encode", "a.png")
    return Path("a.mlic").read_bytes()


def run(*args, input: bytes | None = None) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args], input=input)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert not any(unwanted in result.stderr for unwanted in ("Traceback", "\r", "\x1b"))  # no progress, no colour
    return result


def succeed(*args, input: bytes | None = None) -> Result:
    result = run(*args, input=input)
    assert (result.exit_code, result.stderr) == (0, "")
    return result


def refused(*args, input: bytes | None = None, stdout: str = "") -> str:
    """The one line that a failing input gives; exit code 1."""
    result = run(*args, input=input)
    assert (result.exit_code, result.stdout) == (1, stdout)
    assert result.stderr.startswith("mlic: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def misused(*args) -> str:
    """What wrong usage gives; exit code 2."""
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    usage, *_, error = result.stderr.splitlines()
    assert usage.startswith("Usage: ") and error.startswith("Error: ")
    return error


def command_line(*args) -> list[str]:
    return [sys.executable, "-m", "mlic", *map(str, args)]


def subprocess_run(*args, input: bytes | None = None, code: int = 0) -> tuple[bytes, str]:
    """`python -m mlic` in a process of its own -> stdout and stderr."""
    process = subprocess.run(command_line(*args), input=input or b"", capture_output=True, timeout=120)
    assert process.returncode == code, process.stderr.decode()
    return process.stdout, process.stderr.decode()


def files() -> list[str]:
    """All files below the working directory."""
    return sorted(str(path.relative_to(Path.cwd())) for path in Path.cwd().rglob("*") if path.is_file())


def size_of(path: str | Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size
