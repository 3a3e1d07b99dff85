"""Which files a command takes and what becomes of them: named files, folders, globs and - -> a list of jobs."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from .plugins import load_plugins

NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow knows their names, but reads no pictures from them


@dataclasses.dataclass(frozen=True)
class Job:
    """One input and its output; a path called - is stdin or stdout."""

    source: Path
    target: Path
    found: bool = False  # through a folder or glob, not by its own name: folders are made for it
    done: bool = False  # its output is there and not older: nothing to do
    problem: str = ""  # why it cannot be done
    gives: str = ""  # the kind of output, as a file name extension, for stdout

    @property
    def extension(self) -> str:
        """Of the output."""
        return self.gives if str(self.target) == "-" else self.target.suffix


def picture_extensions() -> set[str]:
    """File name extensions of the pictures Pillow reads here, such as ".png"; ".mlic" is none of them."""
    from PIL import Image

    load_plugins()
    known = Image.registered_extensions().items()
    return {extension for extension, kind in known if kind in Image.OPEN and kind not in NO_PICTURES} - {".mlic"}


def plan_jobs(
    inputs: Sequence[str | Path],
    output: str | None,
    *,
    takes: Collection[str],
    gives: str,
    force: bool = False,
    update: bool = False,
    others: dict[Path, Counter[str]] | None = None,
) -> list[Job]:
    """A job for each input, where folders and globs stand for the files in them.

    Of folders (with all folders in them) and globs, files are taken whose extension is in `takes`; hidden ones are not.
    Their outputs lie beside them, or keep their place in the tree under the folder `output`. `gives` is the outputs'
    extension, in place of the inputs' own, or behind it where several inputs would have one output. `force` overwrites
    outputs, `update` those that are older than their inputs. `others` is told how many files, of which extensions, each
    folder has besides. Folders that cannot be read, and files that would have the output of another all the same, are jobs
    with a problem. Raises ValueError when `output` does not fit the inputs, or two inputs given by their own names would
    have one output.
    """
    unread: list[OSError] = []
    others = {} if others is None else others
    listed = [(Path(text), *_find(Path(text), takes, unread, others)) for text in map(str, inputs)]
    folder = _folder(output, len(listed), trees=any(base is not None for _, base, _ in listed))
    wanted: list[Job] = []
    problems = {os.path.realpath(error.filename): error for error in unread}
    jobs = [Job(Path(error.filename), Path(error.filename), problem=str(error.strerror)) for error in problems.values()]
    for given, base, sources in listed:
        if base is not None and not sources and not any(Path(error.filename).is_relative_to(given) for error in unread):
            kinds = "pictures" if len(takes) > 1 else f"{next(iter(takes))} files"
            jobs.append(Job(given, given, problem=f"no {kinds} {'in this folder' if os.path.isdir(given) else 'match'}"))
        for source in sources:
            if output is not None and folder is None:
                target = Path(output)
            elif str(source) == "-":
                target = folder / f"stdin{gives}" if folder else Path("-")
            else:
                inner = source.parent.relative_to(base) if base is not None else ""
                target = (source.parent if folder is None else folder / inner) / (source.stem + gives)
            wanted.append(Job(source, target, found=base is not None, gives=gives))
    apart = [job for same in _by_target(wanted) for job in _renamed(same)]
    planned = [job for same in _by_target(apart) for job in _without_rivals(same)]
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make folder {folder}: {error.strerror}") from None
    planned = [job if job.problem else _looked_at(job, force=force, update=update) for job in planned]
    if folder is not None and not os.access(folder, os.W_OK) and not all(job.done or job.problem for job in planned):
        raise ValueError(f"cannot write into folder {folder}")
    return jobs + planned


def check_target(target: Path, *, force: bool) -> None:
    """Raises OSError where a file cannot or must not be written."""
    there = os.path.exists(target)
    if there and not (os.path.isfile(target) or os.path.isdir(target)):
        return  # a device or pipe is there to be written to
    if there and not force:
        raise FileExistsError(f"{target} exists; give another -o, or -f, which overwrites it")
    if not os.path.isdir(target.parent):
        raise FileNotFoundError(f"cannot write {target}: no folder {target.parent}")
    if not os.access(os.path.dirname(os.path.realpath(target)), os.W_OK):
        raise PermissionError(f"cannot write {target}: Permission denied")


def _find(
    given: Path, takes: Collection[str], unread: list[OSError], others: dict[Path, Counter[str]]
) -> tuple[Path | None, list[Path]]:
    """(None, the file itself), or for a folder or glob (folder that the tree's layout is relative to, files in it).
    Folders that cannot be read go to `unread`, the extensions of a folder's other files to `others`.
    """
    if os.path.isdir(given):
        others[given] = Counter()
        return given, sorted(_walk(given, takes, unread, others[given]))
    if str(given) == "-" or os.path.exists(given) or not glob.has_magic(str(given)):
        return None, [given]
    parts = list(given.parts)
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    found: dict[Path, None] = {}
    for path in map(Path, sorted(glob.glob(str(given), recursive=True))):
        inside = sorted(_walk(path, takes, unread, Counter())) if os.path.isdir(path) else [path] * _fits(path, takes)
        found.update(dict.fromkeys(inside))
    return Path(*parts[:fixed]), list(found)


def _walk(folder: Path, takes: Collection[str], unread: list[OSError], others: Counter[str]) -> Iterator[Path]:
    for place, folders, names in os.walk(folder, onerror=unread.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in names):
            if _fits(path, takes):
                yield path
            elif _fits(path, kind := {path.suffix.lower()}):
                others.update(kind)


def _fits(path: Path, takes: Collection[str]) -> bool:
    """A link to nothing fits: reading it will say so."""
    named = not path.name.startswith(".") and path.suffix.lower() in takes
    return named and (os.path.isfile(path) or not os.path.exists(path))


def _folder(output: str | None, number: int, *, trees: bool) -> Path | None:
    """The folder that outputs go to; None where `output` is one file or nothing."""
    if output is None:
        return None
    path = Path(output)
    if output != "-" and (os.path.isdir(path) or output.endswith(("/", os.sep))):
        return path
    if number == 1 and not trees:
        return None
    if os.path.exists(path) or path.suffix or output == "-":
        what = f"{number} inputs need" if number > 1 else "a folder or pattern needs"
        raise ValueError(f"{what} a folder behind -o, not {path}")
    return path


def _by_target(jobs: Iterable[Job]) -> list[list[Job]]:
    """The jobs of each target, of each source the first."""
    groups: dict[str, dict[str, Job]] = {}
    for job in jobs:
        same = groups.setdefault(os.path.normcase(os.path.realpath(job.target)), {})
        same.setdefault(os.path.realpath(job.source), job)
    return [list(same.values()) for same in groups.values()]


def _renamed(same: list[Job]) -> list[Job]:
    """The jobs of one target, each with one of its own if the inputs' extensions make it so: a.jpg.mlic and a.png.mlic."""
    names = {job.source.name for job in same}
    if len(same) == 1 or len(names) < len(same) or "-" in names:
        return same
    return [dataclasses.replace(job, target=job.target.with_name(job.source.name + job.gives)) for job in same]


def _without_rivals(same: list[Job]) -> list[Job]:
    """The jobs of one target: the only one, or several with a problem. Raises ValueError where two are of named inputs."""
    if len(same) == 1:
        return same
    first, second, *_ = same
    problem = f"{first.source} and {second.source} would both become {first.target}: rename one, or give them apart"
    if sum(not job.found for job in same) > 1:
        raise ValueError(problem)
    return [dataclasses.replace(job, problem=problem) for job in same]


def _looked_at(job: Job, *, force: bool, update: bool) -> Job:
    """The job, as `done` or with a problem if it is."""
    piped = str(job.source) == "-"
    if str(job.target) == "-" or not (piped or os.path.lexists(job.source)):  # reading it will say so
        return job
    try:
        there = os.path.exists(job.target)
        if there and not piped and os.path.samefile(job.source, job.target):
            if job.source.suffix.lower() == job.gives:
                raise FileExistsError(f"a {job.gives} file already, which would be replaced by its own output")
            raise FileExistsError("it would be replaced by its own output: give another -o")
        if (job.found or update) and not (force or piped) and job.target.is_file():
            made = job.target.stat()
            if made.st_size and made.st_mtime_ns >= job.source.stat().st_mtime_ns:
                return dataclasses.replace(job, done=True)
            if not update:
                raise FileExistsError(f"{job.target} exists and is older than it; -u overwrites such outputs, -f all")
        if there or not job.found:
            check_target(job.target, force=force or (update and not piped))
    except OSError as error:
        return dataclasses.replace(job, problem=error.strerror or str(error))
    return job
