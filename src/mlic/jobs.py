"""Running a list of jobs: each file is read, coded and written whole; what fails is reported, and the others go on."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .errors import MlicError
from .folders import Job
from .saving import write_whole
from .tasks import Task
from .tiles import Progress

_heard = threading.local()  # .notes: warnings on the file that this thread is at


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a job. `error` is "" unless it failed; sizes are in bytes, and 0 where nothing was done."""

    job: Job
    error: str = ""
    notes: tuple[str, ...] = ()
    detail: str = ""
    bytes_in: int = 0
    bytes_out: int = 0
    pixels: int = 0
    seconds: float = 0.0


Report = Callable[[Outcome], None]


def report_idle(jobs: Sequence[Job], report: Report) -> list[Job]:
    """Report the jobs in which there is nothing to do, or nothing can be done -> the others."""
    for job in jobs:
        if job.done or job.problem:
            report(Outcome(job, job.problem))
    return [job for job in jobs if not (job.done or job.problem)]


def run_jobs(task: Task, jobs: Sequence[Job], report: Report, *, parallel: int = 1, progress: Progress | None = None) -> None:
    """Do the jobs, `parallel` at a time, and report each in this thread when it ends.

    Those done side by side have one of torch's threads each. After Ctrl-C nothing more is written, what was written is
    reported, and KeyboardInterrupt goes on to the caller; other threads may then still compute for a moment.
    """
    with _hearing():
        if parallel == 1:
            for job in jobs:
                report(_write(*_code(task, job, progress)))
        else:
            _run_threads(task, jobs, report, parallel)


def _run_threads(task: Task, jobs: Sequence[Job], report: Report, parallel: int) -> None:
    import torch

    finished: queue.SimpleQueue[Any] = queue.SimpleQueue()  # outcomes, and exceptions that are bugs
    writing, stopped = threading.Lock(), threading.Event()

    def work(job: Job) -> None:
        try:
            outcome, data = _code(task, job)
            with writing:
                if not stopped.is_set():
                    finished.put(_write(outcome, data))
        except BaseException as error:
            finished.put(error)

    pool = ThreadPoolExecutor(parallel, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for job in jobs:
            pool.submit(work, job)
        for _ in jobs:
            outcome = finished.get()
            if isinstance(outcome, BaseException):
                raise outcome
            report(outcome)
    finally:
        with writing:
            stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        while not finished.empty():
            if isinstance(outcome := finished.get(), Outcome):
                report(outcome)


@contextlib.contextmanager
def _hearing() -> Iterator[None]:
    """Make this package's warnings notes on the file whose thread they come from, and silence those of others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module="mlic")
        warnings.showwarning = lambda message, *_, **__: getattr(_heard, "notes", []).append(str(message))
        yield


def _code(task: Task, job: Job, progress: Progress | None = None) -> tuple[Outcome, bytes]:
    """-> (outcome so far, what to write). Exceptions that are nobody's input's fault come through."""
    started = time.perf_counter()
    _heard.notes = []
    try:
        data = sys.stdin.buffer.read() if str(job.source) == "-" else job.source.read_bytes()
        coded = task(data, job.extension, progress)
    except (MlicError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):  # torch's way to say it
            raise
        return Outcome(job, reason(error)), b""
    seconds, notes = time.perf_counter() - started, (*coded.notes, *_heard.notes)
    outcome = Outcome(job, notes=notes, detail=coded.detail, bytes_in=len(data), pixels=coded.pixels, seconds=seconds)
    return outcome, coded.data


def _write(outcome: Outcome, data: bytes) -> Outcome:
    job = outcome.job
    if outcome.error:
        return outcome
    try:
        if str(job.target) == "-":
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            if job.found:
                job.target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(job.target, data)
    except OSError as error:
        text = reason(error)
        text = text if str(job.target) in text else f"cannot write {job.target}: {text}"
        return dataclasses.replace(outcome, error=text)
    return dataclasses.replace(outcome, bytes_out=len(data))


def reason(error: Exception) -> str:
    """An error in one line for the user."""
    if isinstance(error, (MemoryError, RuntimeError)):
        return "not enough memory for this picture"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())
