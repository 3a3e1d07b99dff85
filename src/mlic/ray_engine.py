"""Running a list of jobs on a Ray cluster, whose machines need mlic and a shared file system: they read and write.

Each file is a Ray task of its own. When its worker dies, the files decide what to do: an output that has appeared is
counted, and a file without one is given out again. Outputs appear whole, so none is lost, and none is there by half.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from .config import CONFIGS
from .errors import MlicError
from .folders import Job
from .jobs import Outcome, Report, run_jobs
from .tasks import Task

ATTEMPTS = 3  # a file whose worker dies that often is to blame
KNOCK = 10.0  # seconds for a cluster to answer
GRACE = 10.0  # seconds for files that are being coded to be finished after Ctrl-C
Stamp = tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class _Given:
    """A job that is out with a worker, for which time, and what its output looked like before."""

    job: Job
    attempt: int
    before: Stamp = None


def run_on_ray(
    task: Task, jobs: Sequence[Job], report: Report, *, parallel: int | None = None, address: str | None = None
) -> None:
    """Do the jobs on a cluster, at most `parallel` at a time (default: one for each of its CPUs), and report each.

    Without an address it is the cluster that Ray finds (RAY_ADDRESS, or one started on this machine), else one for this
    call on this machine. Raises MlicError when Ray is missing, no cluster answers or its workers lack mlic. After
    Ctrl-C no more files are given out, those that workers are at are awaited for a while, and KeyboardInterrupt goes on.
    """
    ray = import_ray()
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address)
    try:
        _run(ray, task, jobs, report, parallel)
    finally:
        if ours:
            ray.shutdown()


def import_ray():
    """The module. Raises MlicError with the remedy."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or a cluster of our own would report to Ray's makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of a change to come
    try:
        import ray
    except ImportError as error:
        raise MlicError(f"--engine ray needs Ray ({error}): pip install 'mlic[ray]'") from None
    return ray


def _connect(ray, address: str | None) -> None:
    try:
        _knock(address or os.environ.get("RAY_ADDRESS", ""))
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise MlicError(f"no Ray cluster{f' at {address}' if address else ''}: {text}") from None


def _knock(address: str) -> None:
    """Raises OSError where no cluster can be: Ray itself would try for many minutes."""
    if match := re.fullmatch(r"(?:ray://)?([^/:]+|\[.+\]):(\d+)", address):
        socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=KNOCK).close()


def _run(ray, task: Task, jobs: Sequence[Job], report: Report, parallel: int | None) -> None:
    errors, resources = ray.exceptions, ray.cluster_resources()
    dead = (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.ObjectLostError)
    cuda = getattr(task, "device", "cpu") == "cuda"
    if cuda and not resources.get("GPU"):
        raise MlicError("--device cuda: the Ray cluster has no GPU")
    remote = ray.remote(_work).options(num_cpus=1, num_gpus=int(cuda), max_retries=0)
    task, folders = _for_workers(task)
    limit = parallel or max(1, int(resources.get("CPU", 1)))
    waiting = [_Given(job, 1) for job in reversed(jobs)]
    out: dict[object, _Given] = {}
    crashed: list[Job] = []
    try:
        while waiting or out:
            while waiting and len(out) < limit:
                given = waiting.pop()
                given = dataclasses.replace(given, before=_stamp(given.job.target))
                out[remote.remote(task, _absolute(given.job), folders)] = given
            [reference], _ = ray.wait(list(out), num_returns=1)
            given = out[reference]
            try:
                outcome = dataclasses.replace(ray.get(reference), job=given.job)
            except dead as error:
                crashed.append(given.job)
                outcome = _after_crash(given, error)
            except errors.RayError as error:
                del out[reference]
                if missing := re.search(r"No module named '[^']+'", str(error)):
                    raise MlicError(f"Ray's workers need mlic, installed as it is here: {missing[0]}") from None
                raise  # a bug
            del out[reference]
            if outcome is None:
                waiting.append(_Given(given.job, given.attempt + 1))
                continue
            if given.attempt > 1 and not outcome.error:
                note = f"done at attempt {given.attempt}, after its worker died"
                outcome = dataclasses.replace(outcome, notes=(*outcome.notes, note))
            report(outcome)
    finally:
        for outcome in _stop(ray, out):
            report(outcome)
        for job in [*crashed, *(given.job for given in out.values())]:
            _sweep(job.target)


def _work(task: Task, job: Job, weights_folders: str) -> Outcome:
    """In a worker: one job with one of torch's threads. The weights stay in memory for the next one."""
    from .cli import _keep_freed_memory

    _keep_freed_memory()
    import torch

    torch.set_num_threads(1)
    os.environ["MLIC_WEIGHTS"] = weights_folders
    outcomes: list[Outcome] = []
    run_jobs(task, [job], outcomes.append)
    return outcomes[0]


def _for_workers(task: Task) -> tuple[Task, str]:
    """The task with paths that hold in any working directory, and MLIC_WEIGHTS likewise."""
    model = getattr(task, "model", None)
    if model is not None and model not in CONFIGS:
        task = dataclasses.replace(task, model=os.path.abspath(model))
    folders = os.environ.get("MLIC_WEIGHTS", "").split(os.pathsep)
    return task, os.pathsep.join(os.path.abspath(folder) for folder in folders if folder)


def _after_crash(given: _Given, error: Exception) -> Outcome | None:
    """What became of a file whose worker is gone; None: give it out again."""
    made = _stamp(given.job.target)
    if made is not None and made != given.before:
        size_in, size_out = given.job.source.stat().st_size, given.job.target.stat().st_size
        return Outcome(given.job, notes=("a worker died after writing it",), bytes_in=size_in, bytes_out=size_out)
    if given.attempt < ATTEMPTS:
        return None
    return Outcome(given.job, error=f"{ATTEMPTS} workers died on it ({type(error).__name__}); out of memory?")


def _stop(ray, out: dict[object, _Given]) -> Iterator[Outcome]:
    """Wait for what workers are at -> what became of it. (ray.cancel could bring down this process: Ray 2.60 ends it when
    a cancelled task replies after all.)
    """
    ended = ray.wait(list(out), num_returns=len(out), timeout=GRACE)[0] if out else []
    for reference in ended:
        try:
            yield dataclasses.replace(ray.get(reference), job=out[reference].job)
        except ray.exceptions.RayError:
            pass


def _stamp(path: Path) -> Stamp:
    """Changes whenever a file is replaced; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _sweep(target: Path) -> None:
    """Remove what a worker that died while writing left behind; see saving.write_whole."""
    for path in glob.glob(glob.escape(str(target.parent / f".{target.name[:40]}.")) + "*.part"):
        Path(path).unlink(missing_ok=True)


def _absolute(job: Job) -> Job:
    """Workers have working directories of their own."""
    return dataclasses.replace(job, source=Path(os.path.abspath(job.source)), target=Path(os.path.abspath(job.target)))
