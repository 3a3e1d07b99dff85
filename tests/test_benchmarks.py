"""The scripts in benchmarks/ take hours together; here they only have to begin."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from click.testing import CliRunner

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_it_begins(path):
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    said = CliRunner().invoke(script.main, ["--help"])
    assert said.exit_code == 0 and "Usage:" in said.stdout
