"""A training run from beginning to end: steps, checkpoints, logs and validation.

Needs torch, numpy, Pillow, safetensors and tqdm only; knows nothing of .mlic files or coders.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .data import PictureBank
from .exact import make_exact
from .model import STRIDE, CompressionModel
from .train_config import TrainConfig, crops_at, learning_rate
from .train_log import RunLog
from .trainer import Trainer
from .validation import panel, symbol_counts, validate, validation_levels

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CHECKPOINT, STOP = "checkpoint.pt", "stop"


def train(
    config: TrainConfig, *, device: str = "cpu", resume: bool = False, take_over: bool = False
) -> CompressionModel | None:
    """Run, writing `checkpoint.pt` (to go on from) and the logs of train_log.py into `config.out`. Returns the averaged
    model, with the counts for its coding tables; None where Ctrl-C, SIGTERM or a file `stop` in `config.out` ended the run,
    which it does after the step at work.

    With `resume`, the run whose checkpoint is in `config.out` is continued, also into a longer one. With `take_over`, another
    process may be at work on it: it goes on while this one reads the pictures and compiles, and is then stopped. Raises
    ValueError on settings that do not fit, for a run that is there without `resume`, or not there with it, for a file that
    is no checkpoint, and when another process works in `config.out`.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and config.steps is None:
        raise ValueError("several processes must end together: give steps, not minutes")
    if take_over and (world > 1 or fcntl is None):
        raise ValueError("several processes, and Windows, cannot take over a run")
    if world > 1 and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    out = Path(config.out)
    begun = (out / CHECKPOINT).exists()
    if begun and not (resume or take_over):
        raise ValueError(f"there is a run in {out}: resume it (--resume), or begin another one elsewhere")
    if resume and not begun:
        raise ValueError(f"there is no run in {out} to go on with")
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        if world > 1:
            torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
            held.callback(torch.distributed.destroy_process_group)
        if rank == 0 and not take_over:
            _be_alone(out, held)
        state = _read_checkpoint(out / CHECKPOINT) if resume and not take_over else {}
        val = PictureBank(config.val, smallest=STRIDE, device=device) if config.val and rank == 0 else None
        trainer = Trainer(config, device=device, rank=rank, world=world)
        if rank == 0 and (inexact := _without_exact_form(trainer.model)):
            print(f"note: its files will need exact=False (--float): {inexact}", file=sys.stderr)
        trainer.prepare()
        if take_over:
            _be_alone(out, held, take_over=True)
            state = _read_checkpoint(out / CHECKPOINT)
        if rank == 0:
            (out / STOP).unlink(missing_ok=True)
        if state:
            trainer.load(state)
            if rank > 0:  # what was saved is the first process's
                torch.manual_seed(config.seed + rank + world * trainer.steps)
        log = RunLog(out, tensorboard=config.tensorboard, step=trainer.steps) if rank == 0 else None
        told = _told_to_stop(out, held) if world == 1 else lambda: False
        elapsed, finished = _run(config, trainer, state.get("elapsed", 0.0), log, val, told)
        if not finished:
            return None
        if val:
            for row in _validate(trainer, val, log, elapsed):
                print(f"level {row['level']:5.1f}  {row['bpp']:.4f} bpp  {row['psnr']:.2f} dB", file=sys.stderr)
        if log:
            crop = config.last_crop or config.crop
            trainer.average.gaussian.counts = symbol_counts(trainer.average.eval(), trainer.bank, crop=crop)
    return trainer.average


def _run(
    config: TrainConfig,
    trainer: Trainer,
    elapsed: float,
    log: RunLog | None,
    val: PictureBank | None,
    told_to_stop: Callable[[], bool],
) -> tuple[float, bool]:
    """Go on to the end, from `elapsed` seconds on, or until told to stop. Returns the seconds then, and whether it is the end.
    In all processes but the first, which alone writes, `log` and `val` are None.
    """
    total, unit = (config.steps, "step") if config.steps else (config.minutes * 60, "s")

    def done() -> float:
        return trainer.steps if config.steps else elapsed

    started, saved = time.monotonic() - elapsed, time.monotonic()
    validated = logged = saved
    steps_logged = trainer.steps
    bar = tqdm(total=int(total), initial=int(done()), unit=unit, disable=None if log else True)
    while done() / total < 1 and not told_to_stop():
        progress = done() / total
        trainer.step(progress)
        elapsed = time.monotonic() - started
        bar.update(int(done()) - bar.n)
        if log and (trainer.steps % config.log_every == 0 or done() / total >= 1):
            seen = trainer.read_measures()
            now, (batch, crop) = time.monotonic(), crops_at(config, progress)
            speed = (trainer.steps - steps_logged) * trainer.world * batch * crop**2 / (now - logged)
            logged, steps_logged = now, trainer.steps
            rates = {"learning_rate": f"{learning_rate(config, progress):.3g}", "pixels_per_second": f"{speed:.4g}"}
            measures = {name: f"{value:.5g}" for name, value in seen.items()}
            with _going_on("log"):
                log.line({"step": trainer.steps, "seconds": f"{elapsed:.1f}", **measures, **rates})
            shown = {"loss": f"{seen['loss']:.3f}", "bpp": f"{seen['bpp']:.3f}", "px_s": f"{speed:.3g}"}
            shown |= {"skipped": f"{seen['skipped']:g}"} if seen["skipped"] else {}
            bar.set_postfix(shown, psnr=f"{-10 * math.log10(max(seen['mse'], 1e-10)):.2f}")
        if log and time.monotonic() - saved >= config.save_every:
            _save(trainer, elapsed)
            saved = time.monotonic()
        if config.val_every and val and done() / total < 1 and time.monotonic() - validated >= config.val_every * 60:
            _validate(trainer, val, log, elapsed)
            validated = logged = time.monotonic()
    if log:
        _save(trainer, elapsed)
    bar.close()
    return elapsed, done() / total >= 1


def _validate(trainer: Trainer, bank: PictureBank, log: RunLog, elapsed: float) -> list[dict]:
    """Rows of `validate` for the averaged weights, also into the log."""
    model = trainer.average.eval()
    rows, shown = validate(model, bank, validation_levels(model)), panel(model, bank)
    with _going_on("validation"):
        log.validation(rows, shown, step=trainer.steps, seconds=elapsed)
    return rows


def _save(trainer: Trainer, elapsed: float) -> None:
    """Whole or not at all."""
    checkpoint = Path(trainer.config.out, CHECKPOINT)
    partial = checkpoint.with_suffix(".tmp")
    with _going_on("checkpoint"):
        try:
            torch.save({**trainer.state(), "elapsed": elapsed}, partial)
            partial.replace(checkpoint)
        finally:
            partial.unlink(missing_ok=True)


def _without_exact_form(model: CompressionModel) -> str:
    """Why such a model cannot decode alike everywhere, better known before it is trained; "" if it can."""
    try:
        make_exact(model.h_s), make_exact(model.entropy_model)
    except ValueError as error:
        return str(error)
    return ""


def _read_checkpoint(path: Path) -> dict:
    """What `_save` wrote; empty where nothing is there."""
    if not path.exists():
        return {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["steps"], state["model"]
    except OSError:
        raise
    except Exception:  # torch's reader raises nearly everything on other files
        raise ValueError(f"{path} is damaged, or no checkpoint") from None
    return state


def _told_to_stop(folder: Path, held: contextlib.ExitStack) -> Callable[[], bool]:
    """A function that says whether a run is to stop: by the file, or by a first Ctrl-C or SIGTERM; a second acts as ever."""
    asked: list[int] = []
    usual: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        as_usual()

    def as_usual() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler or signal.SIG_DFL)

    held.callback(as_usual)
    if threading.current_thread() is threading.main_thread():  # others get no signals
        usual.update({number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)})
    return lambda: bool(asked) or (folder / STOP).exists()


def _be_alone(folder: Path, held: contextlib.ExitStack, *, take_over: bool = False) -> None:
    """Be the only process at work on the run in a folder. Raises ValueError where there is another; with `take_over`, that one
    is asked to stop, and awaited. The lock ends with `held`, or with the process, and leaves nothing in the folder.
    """
    if fcntl is None:
        return
    handle = os.open(folder, os.O_RDONLY)
    held.callback(os.close, handle)
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not take_over:
                raise ValueError(f"another process works on the run in {folder}") from None
            (folder / STOP).touch()
            time.sleep(0.1)
        except OSError:  # not every file system has locks
            if take_over:
                raise
            return


@contextlib.contextmanager
def _going_on(what: str):
    """A full disk is a word on stderr, and training goes on."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter is torch's
        print(f"{what} not written: {str(error).splitlines()[0]}; training goes on", file=sys.stderr)
