"""Running jobs: side by side, with failures, interrupted."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from mlic.errors import DamagedFile
from mlic.folders import Job
from mlic.jobs import report_idle, run_jobs
from mlic.tasks import Coded


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    """Twelve inputs, 0 to 11, that hold their own names."""
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        Path(f"{i}").write_text(f"{i}")


def make_jobs(number: int = 12) -> list[Job]:
    return [Job(Path(f"{i}"), Path(f"out/{i}.mlic"), found=True) for i in range(number)]


@dataclasses.dataclass
class Copy:
    """A task that says how many ran at once, and with how many threads of torch."""

    seconds: float = 0.02
    fails_on: bytes = b"none"
    error: type[BaseException] = DamagedFile
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    running: int = 0
    most: int = 0
    threads: set[int] = dataclasses.field(default_factory=set)

    def __call__(self, data: bytes, extension: str, progress=None) -> Coded:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.threads.add(torch.get_num_threads())
        time.sleep(self.seconds)
        with self.lock:
            self.running -= 1
        if data == self.fails_on:
            raise self.error("bad")
        return Coded(data * 2, 1, (extension,))


@pytest.mark.parametrize("parallel", [1, 3, 12])
def test_all_are_done_side_by_side(parallel):
    before, task, outcomes = torch.get_num_threads(), Copy(), []
    run_jobs(task, make_jobs(), outcomes.append, parallel=parallel)
    assert torch.get_num_threads() == before
    assert (task.most == 1) if parallel == 1 else (1 < task.most <= parallel)
    assert parallel == 1 or task.threads == {1}
    assert sorted(int(o.job.source.name) for o in outcomes) == list(range(12))
    assert all((o.error, o.notes, o.bytes_out) == ("", (".mlic",), 2 * o.bytes_in) for o in outcomes)
    written = {path.name: path.read_text() for path in Path("out").iterdir()}
    assert written == {f"{i}.mlic": f"{i}" * 2 for i in range(12)}


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("error, text", [(DamagedFile, "bad"), (OSError, "bad"), (MemoryError, "not enough memory")])
def test_what_fails_is_reported_and_the_others_go_on(parallel, error, text):
    os.remove("3")
    outcomes = []
    run_jobs(Copy(fails_on=b"5", error=error), make_jobs(), outcomes.append, parallel=parallel)
    failed = {o.job.source.name: o.error for o in outcomes if o.error}
    assert failed["3"] == "No such file or directory" and text in failed["5"] and len(failed) == 2
    assert sorted(os.listdir("out")) == sorted(f"{i}.mlic" for i in range(12) if i not in (3, 5))


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_bug_is_not_dressed_up_as_bad_input(parallel):
    with pytest.raises(ZeroDivisionError):
        run_jobs(Copy(fails_on=b"0", error=ZeroDivisionError), make_jobs(), lambda outcome: None, parallel=parallel)


def test_an_output_that_cannot_be_written():
    Path("out").mkdir()
    Path("out/2.mlic").mkdir()
    outcomes = []
    run_jobs(Copy(), make_jobs(4), outcomes.append, parallel=2)
    assert {o.job.source.name: o.error for o in outcomes if o.error} == {"2": "cannot write out/2.mlic: Is a directory"}
    os.chmod("out", 0o700)
    assert sorted(os.listdir("out")) == ["0.mlic", "1.mlic", "2.mlic", "3.mlic"]


def test_outputs_with_long_names_do_not_get_mixed_up():
    jobs = [Job(Path(f"{i}"), Path(f"{'long ' * 12}{i}")) for i in range(12)]
    run_jobs(Copy(seconds=0), jobs, lambda outcome: None, parallel=12)
    assert [job.target.read_text() for job in jobs] == [f"{i}" * 2 for i in range(12)]


def test_idle_jobs_are_reported_and_left_out():
    open_jobs, outcomes = make_jobs(2), []
    done, hopeless = Job(Path("8"), Path("8.mlic"), done=True), Job(Path("9"), Path("9.mlic"), problem="no")
    assert report_idle([done, *open_jobs, hopeless], outcomes.append) == open_jobs
    assert [(o.job, o.error) for o in outcomes] == [(done, ""), (hopeless, "no")]


@pytest.mark.parametrize("parallel", [1, 3])
def test_after_an_interrupt_nothing_is_written_and_what_was_is_reported(parallel):
    outcomes = []

    def report(outcome):
        outcomes.append(outcome)
        if len(outcomes) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs(Copy(seconds=0.1), make_jobs(), report, parallel=parallel)
    written = sorted(os.listdir("out"))
    assert sorted(f"{o.job.source.name}.mlic" for o in outcomes) == written and 4 <= len(written) < 12
    time.sleep(0.3)  # those that were computing
    assert sorted(os.listdir("out")) == written


def test_warnings_of_this_package_become_notes_of_their_file():
    def task(data: bytes, extension: str, progress=None) -> Coded:
        time.sleep(0.01)
        warnings.warn_explicit(f"lost in {data.decode()}", UserWarning, "tasks.py", 1, module="mlic.tasks")
        warnings.warn_explicit("chatter", UserWarning, "other.py", 1, module="other")
        return Coded(data, 1)

    outcomes = []
    with warnings.catch_warnings(record=True) as heard:
        run_jobs(task, make_jobs(), outcomes.append, parallel=3)
    assert not heard
    assert all(o.notes == (f"lost in {o.job.source.name}",) for o in outcomes) and len(outcomes) == 12
