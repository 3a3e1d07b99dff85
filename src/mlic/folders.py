"""Which files a command takes and what becomes of them: named files, folders, globs and - -> a list of jobs."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow knows their names, but reads no pictures from them


@dataclasses.dataclass(frozen=True)
class Job:
    """One input and its output; a path called - is stdin or stdout."""

    source: Path
    target: Path
    found: bool = False  # through a folder or glob, not by its own name: folders are made for it
    done: bool = False  # found, and its output is there and not older: nothing to do
    problem: str = ""  # why it cannot be done


def picture_extensions() -> set[str]:
    """File name extensions of the pictures Pillow reads here, such as ".png"; ".mlic" is none of them."""
    from PIL import Image

    known = Image.registered_extensions().items()
    return {extension for extension, kind in known if kind in Image.OPEN and kind not in NO_PICTURES} - {".mlic"}


def plan_jobs(
    inputs: Sequence[str | Path], output: str | None, *, takes: Collection[str], gives: str, force: bool = False
) -> list[Job]:
    """A job for each input, where folders and globs stand for the files in them.

    Of folders (with all folders in them) and globs, files are taken whose extension is in `takes`; hidden ones are not.
    Their outputs lie beside them, or keep their place in the tree under the folder `output`. `gives` is the outputs'
    extension. Raises ValueError when `output` does not fit the inputs, or two inputs would have one output.
    """
    listed = [(Path(text), *_find(Path(text), takes)) for text in map(str, inputs)]
    folder = _folder(output, len(listed), trees=any(base is not None for _, base, _ in listed))
    pairs: dict[str, tuple[Path, Path, bool]] = {}
    jobs = []
    for given, base, sources in listed:
        if base is not None and not sources:
            kinds = "pictures" if len(takes) > 1 else f"{next(iter(takes))} files"
            jobs.append(Job(given, given, problem=f"no {kinds} {'in this folder' if given.is_dir() else 'match'}"))
        for source in sources:
            if output is not None and folder is None:
                target = Path(output)
            elif str(source) == "-":
                target = folder / f"stdin{gives}" if folder else Path("-")
            else:
                inner = source.parent.relative_to(base) if base is not None else ""
                target = (source.parent if folder is None else folder / inner) / (source.stem + gives)
            key = os.path.normcase(os.path.realpath(target))
            other, _, _ = pairs.setdefault(key, (source, target, base is not None))
            if os.path.realpath(other) != os.path.realpath(source):
                raise ValueError(f"{other} and {source} would both become {target}: rename one, or give them apart")
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make folder {folder}: {error.strerror}") from None
    return jobs + [_job(source, target, found=found, force=force) for source, target, found in pairs.values()]


def check_target(target: Path, *, force: bool) -> None:
    """Raises OSError where a file cannot or must not be written."""
    if (target.is_file() or target.is_dir()) and not force:  # a device or pipe is there to be written to
        raise FileExistsError(f"{target} exists; -f overwrites")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: no folder {target.parent}")


def _find(given: Path, takes: Collection[str]) -> tuple[Path | None, list[Path]]:
    """(None, the file itself), or for a folder or glob (folder that the tree's layout is relative to, files in it)."""
    if given.is_dir():
        return given, sorted(_walk(given, takes))
    if str(given) == "-" or given.exists() or not glob.has_magic(str(given)):
        return None, [given]
    parts = list(given.parts)
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    found: dict[Path, None] = {}
    for path in map(Path, sorted(glob.glob(str(given), recursive=True))):
        inside = sorted(_walk(path, takes)) if path.is_dir() else [path] * _fits(path, takes)
        found.update(dict.fromkeys(inside))
    return Path(*parts[:fixed]), list(found)


def _walk(folder: Path, takes: Collection[str]) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (path for path in (Path(place, name) for name in names) if _fits(path, takes))


def _fits(path: Path, takes: Collection[str]) -> bool:
    return not path.name.startswith(".") and path.suffix.lower() in takes and path.is_file()


def _folder(output: str | None, number: int, *, trees: bool) -> Path | None:
    """The folder that outputs go to; None where `output` is one file or nothing."""
    if output is None:
        return None
    path = Path(output)
    if output != "-" and (path.is_dir() or output.endswith(("/", os.sep))):
        return path
    if number == 1 and not trees:
        return None
    if path.exists() or path.suffix or output == "-":
        what = f"{number} inputs need" if number > 1 else "a folder or pattern needs"
        raise ValueError(f"{what} a folder behind -o, not {path}")
    return path


def _job(source: Path, target: Path, *, found: bool, force: bool) -> Job:
    if str(target) == "-":
        return Job(source, target)
    try:
        if found and not force and target.is_file():
            made = target.stat()
            if made.st_size and made.st_mtime_ns >= source.stat().st_mtime_ns:
                return Job(source, target, found, done=True)
            raise FileExistsError(f"{target} exists and is older than it; -f overwrites")
        if not found or target.exists():
            check_target(target, force=force)
    except OSError as error:
        return Job(source, target, found, problem=str(error))
    return Job(source, target, found)
