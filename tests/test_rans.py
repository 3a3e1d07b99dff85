"""rANS in Python's integers, in place of constriction. test_coder.py runs with both, too."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from mlic import codec, rans
from mlic.tables import integer_frequencies


def test_what_is_left_is_the_same_at_every_point():
    """`num_words` says whether a cut file's words have run out."""
    constriction = pytest.importorskip("constriction")
    rng = np.random.default_rng(3)
    frequencies = integer_frequencies(rng.dirichlet(np.full(40, 0.3)))
    rows = rans.Row(frequencies), constriction.stream.model.Categorical((frequencies - 1).astype(np.float64), perfect=False)
    classes = rans.AnsCoder, constriction.stream.stack.AnsCoder
    for length in (0, 1, 2, 3, 20):
        words = rng.integers(1, 2**32, length, dtype=np.uint32)
        coders = [each(words) for each in classes]
        for count in (0, 1, 1, 1, 7, 20, 40):
            own, other = (each.decode(row, count) for each, row in zip(coders, rows))
            np.testing.assert_array_equal(own, other)
            own, other = ((each.num_words(), each.is_empty(), each.get_compressed().tolist()) for each in coders)
            assert own == other


def test_a_machine_that_has_no_wheel_of_constriction():
    """It installs without, and reads and writes the same files."""
    marker = next(need.marker for need in map(Requirement, metadata.requires("mlic")) if need.name == "constriction")
    for system, machine, wanted in [("linux", "x86_64", True), ("linux", "aarch64", False), ("darwin", "arm64", True),
                                    ("win32", "AMD64", True), ("win32", "ARM64", False)]:  # fmt: skip
        assert marker.evaluate({"sys_platform": system, "platform_machine": machine}) == wanted
    program = """
import sys
sys.modules["constriction"] = None  # importing it fails
import mlic, mlic.coder, mlic.rans
assert mlic.coder.AnsCoder is mlic.rans.AnsCoder
file = open(sys.argv[1], "rb").read()
sys.stdout.buffer.write(mlic.encode(mlic.decode(file), quality=40, effort=0))
"""
    path = Path(__file__).parent / "golden" / "fast-packaged.mlic"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, check=True)
    assert done.stdout == codec.encode(codec.decode(path), quality=40, effort=0)
