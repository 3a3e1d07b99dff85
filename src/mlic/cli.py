"""The `mlic` command: the group, and what its commands share. They parse and print; the rest is the library's."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from . import __version__
from .cores import cores
from .errors import MlicError

INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT, as shells have it
_progress_lock = threading.RLock()


class FileName(click.Path):
    """A path, and not the nothing that an unset variable of a shell becomes, which would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(value, param, ctx) if value != "" else self.fail("an empty file name", param, ctx)


class Number(click.FloatRange):
    """Without nan and inf, which a FloatRange lets through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{value} is no finite number", param, ctx)


POSITIVE = Number(0, min_open=True)
INPUT = FileName(readable=False, allow_dash=True, path_type=Path)  # unusable inputs are reported one by one
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where to compute. auto: cuda if there is one.",
)
threads_option = click.option("-j", "--threads", type=click.IntRange(1), help="CPU threads. Default: all cores.")
force_option = click.option("-f", "--force", is_flag=True, help="Overwrite existing outputs.")


def together(*options):
    """Several of click's decorators as one, shown in this order."""

    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _say(None, "interrupted")
            sys.exit(INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mlic")
def main() -> None:
    """A learned image codec.

    \b
    mlic encode photo.png              -> photo.mlic
    mlic encode -q 70 photos -o coded  -> coded/**/*.mlic
    mlic decode photo.mlic             -> photo.png
    mlic decode - -o - < a.mlic > a.png

    An input or output called - is stdin or stdout. `mlic COMMAND --help` has more examples.
    Exit code: 0 all done, 1 an input failed, 2 wrong usage, 130 interrupted by Ctrl-C.
    """
    _keep_freed_memory()
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs comes as an exception too


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that lets the shell complete this command's options and files.

    \b
    bash   in ~/.bashrc:    eval "$(mlic completion bash)"
    zsh    in ~/.zshrc:     eval "$(mlic completion zsh)"
    fish   once:            mlic completion fish > ~/.config/fish/completions/mlic.fish
    """
    from click.shell_completion import get_completion_class

    complete = get_completion_class(shell)(main, {}, "mlic", "_MLIC_COMPLETE")
    click.echo(complete.source_template % complete.source_vars())


@contextlib.contextmanager
def reported(source: Path | None = None) -> Iterator[None]:
    """What fails for want of an input, weights or an output: one line, and exit code 1."""
    try:
        yield
    except (MlicError, OSError) as error:
        _fail(source, error)
        sys.exit(1)


def _set_threads(threads: int | None) -> None:
    """Of torch; None: as many as it would take itself, but in a container, whose cores it does not know."""
    import torch

    torch.set_num_threads(min(threads or torch.get_num_threads(), cores()))


def _device(name: str) -> str:
    if name == "cpu":
        return name
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch finds no CUDA device here")
    return "cuda" if torch.cuda.is_available() else "cpu"


def _fail(source: Path | None, error: Exception | str) -> None:
    """One line on stderr, red on a terminal unless NO_COLOR is set."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if source is None and isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {text}"
    _say(source, text, None if os.environ.get("NO_COLOR") else "red")


def _say(source: Path | None, text: str, colour: str | None = None) -> None:
    tqdm = _progress_bar()
    where = "" if source is None else f"{'stdin' if str(source) == '-' else source}: "
    with tqdm.external_write_mode(file=sys.stderr):  # not into the middle of a progress bar
        line = f"mlic: {where}{text}"
        click.echo(click.style(line, fg=colour) if colour else line, err=True)


def _progress_bar():
    """tqdm, with a lock of this process alone. With its own, from Python 3.14 on it starts a process that looks after the lock
    and complains when this one is ended.
    """
    from tqdm import tqdm

    tqdm.set_lock(_progress_lock)
    return tqdm


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory: page faults otherwise take a sixth or more of the time."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD
            libc.mallopt(parameter, value)
    except (OSError, AttributeError):  # another system
        pass


from . import cli_code, cli_info, cli_measure, cli_models, cli_train  # noqa: E402, F401  (they add their commands to `main`)
