"""What a training run leaves to look at: log.csv, validation.csv, pictures, TensorBoard events, and run.png of them."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import MlicError, ResultsError
from .saving import write_whole

LOG, VALIDATION, PLOT = "log.csv", "validation.csv", "run.png"


class RunLog:
    """Appends to the files in `out`, from which it first leaves out what they say of steps after `step`, which will be written
    again, and what was not written to its end. `tensorboard`: also write events there; raises MlicError without the package.
    """

    def __init__(self, out: Path, *, tensorboard: bool = False, step: int = 0) -> None:
        self.out, self.events = out, None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise MlicError("--tensorboard needs the package tensorboard: pip install 'mlic[train]'") from None
            self.events = SummaryWriter(str(out), purge_step=step or None)
        for path in (out / LOG, out / VALIDATION):
            if path.exists():
                before = path.read_bytes()
                lines = before.splitlines(keepends=True)
                kept = [line for i, line in enumerate(lines) if line.endswith(b"\n") and (i == 0 or _step(line) <= step)]
                after = b"".join(kept) if len(kept) > 1 else b""
                if after != before:
                    write_whole(path, after)

    def line(self, values: dict[str, float | str]) -> None:
        """One line of log.csv: step, seconds, and measures by name, as numbers or as they are to be written."""
        _append(self.out / LOG, [values])
        self._scalars("train", values)

    def validation(self, rows: list[dict[str, float]], picture: np.ndarray, *, step: int, seconds: float) -> None:
        """Rows of level, bpp and psnr to validation.csv, and a picture (H, W, 3) uint8 to validation-STEP.png."""
        short = [{name: f"{value:.5g}" for name, value in row.items()} for row in rows]
        _append(self.out / VALIDATION, [{"step": step, "seconds": f"{seconds:.1f}", **row} for row in short])
        Image.fromarray(picture).save(self.out / f"validation-{step:07d}.png")
        if self.events:
            self.events.add_image("validation", picture, step, dataformats="HWC")
        for row in rows:
            for name in ("bpp", "psnr"):
                self._scalars(f"validation level {row['level']:g}", {"step": step, name: row[name]})

    def _scalars(self, group: str, values: dict[str, float | str]) -> None:
        if self.events:
            for name, value in values.items():
                if name != "step":
                    self.events.add_scalar(f"{group}/{name}", float(value), values["step"])
            self.events.flush()


def _step(line: bytes) -> float:
    number = line.partition(b",")[0]
    return int(number) if number.isdigit() else math.inf


def _append(path: Path, rows: list[dict]) -> None:
    """Whole or not at all. Raises OSError."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            if not size:
                writer.writeheader()
            writer.writerows(rows)
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Columns of a log by name, float64. Raises ResultsError when it is missing or no log."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}") from None
    except (IndexError, TypeError, ValueError, csv.Error):
        raise ResultsError(f"{path} is not a log of a training run") from None


def plot(run: Path) -> Path:
    """Draw a run's logs against minutes into run.png. Raises MlicError when there is no log or no matplotlib."""
    log = read_log(run / LOG)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MlicError("a plot needs the package matplotlib: pip install 'mlic[train]'") from None
    try:
        minutes = log["seconds"] / 60
        curves = {
            "loss": log["loss"],
            "bits per pixel": log["bpp"],
            "PSNR of the mean error, dB": -10 * np.log10(np.maximum(log["mse"], 1e-10)),
            "learning rate": log["learning_rate"],
        }
    except KeyError as error:
        raise ResultsError(f"{run / LOG} has no column {error}") from None
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = dict(zip(curves, figure.subplots(2, 2, sharex=True).flat))
    for name, values in curves.items():
        axes[name].plot(minutes, values, linewidth=0.8, color="tab:blue")
        axes[name].set(title=name, xlabel="minutes")
        axes[name].grid(alpha=0.3)
    if (run / VALIDATION).exists() and (run / VALIDATION).stat().st_size:
        validation = read_log(run / VALIDATION)
        for name, column in (("bits per pixel", "bpp"), ("PSNR of the mean error, dB", "psnr")):
            for level in np.unique(validation["level"]):
                at = validation["level"] == level
                axes[name].plot(validation["seconds"][at] / 60, validation[column][at], ".-", label=f"level {level:g}")
            axes[name].legend(title="validation", fontsize="x-small")
    figure.savefig(run / PLOT, dpi=100)
    return run / PLOT
