"""Jobs on a Ray cluster of two workers, some of which are killed in the middle of their work."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from command import (  # noqa: F401  (fixtures among them)
    files,
    folder,
    misused,
    refused,
    run,
    succeed,
    use_small_weights,
    weights_folder,
)
from PIL import Image

ray = pytest.importorskip("ray")

from mlic import ray_engine  # noqa: E402
from mlic.errors import MlicError  # noqa: E402
from mlic.folders import Job  # noqa: E402
from mlic.jobs import Outcome  # noqa: E402
from mlic.ray_engine import run_on_ray  # noqa: E402
from mlic.tasks import Encode  # noqa: E402

NUMBER = 12


@pytest.fixture(autouse=True, scope="module")
def cluster():
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray_engine.import_ray()
    ray.init("local", num_cpus=2, object_store_memory=100 << 20, **options)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find the tests
    yield
    ray.shutdown()


@pytest.fixture
def jobs(photo) -> list[Job]:
    """Pictures 0.png to 11.png, and marks/ for what the workers have to tell."""
    os.mkdir("marks")
    for i in range(NUMBER):
        Image.fromarray(photo[i : i + 30, :40]).save(f"{i}.png")
    return [Job(Path(f"{i}.png"), Path(f"out/{i}.mlic"), found=True) for i in range(NUMBER)]


@pytest.fixture
def expected(jobs) -> dict[str, bytes]:
    """The outputs, by name, as they are without Ray."""
    task = Encode(effort=0)
    return {job.target.name: task(job.source.read_bytes(), ".mlic").data for job in jobs}


def outputs() -> dict[str, bytes]:
    """All that is in out/, hidden files too."""
    return {path.name: path.read_bytes() for path in Path("out").iterdir()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marked(Encode):
    """Leaves a mark named by process and attempt while it works, and dies where it is told to."""

    marks: str
    seconds: float = 0.0
    dies: str = ""  # "writing" or "written": in os.replace, before or after it does its work, the first `times` times
    times: int = 1

    def __call__(self, data, extension, progress=None):
        mark = Path(self.marks, f"{os.getpid()}-{time.time_ns()}")
        mark.touch()
        if self.dies and len(list(Path(self.marks).glob("dead*"))) < self.times:
            replace = os.replace

            def die(source, target):
                if self.dies == "written":
                    replace(source, target)
                Path(self.marks, f"dead-{time.time_ns()}").touch()
                os.kill(os.getpid(), signal.SIGKILL)

            os.replace = die
        time.sleep(self.seconds)
        coded = super().__call__(data, extension, progress)
        mark.rename(mark.with_name(f"ended-{mark.name}"))
        return coded


def test_the_command_gives_the_files_it_gives_without_ray(jobs, expected):
    os.makedirs("photos/sub")
    for job in jobs:
        os.rename(job.source, Path("photos", "sub" if int(job.source.stem) % 2 else "", job.source))
    Path("photos/broken.png").write_bytes(b"no picture")
    result = run("encode", "photos", "-o", "out", "--engine", "ray", "--effort", 0)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0] == "mlic: photos/broken.png: not a picture Pillow can read"
    assert result.stderr.splitlines()[1].startswith("mlic: 12 done, 0 skipped, 1 failed; ")
    assert {path.name: path.read_bytes() for path in Path("out").rglob("*.mlic")} == expected
    assert Path("out/sub/3.mlic").exists() and Path("out/4.mlic").exists()
    result = run("decode", "out", "-o", "back", "--engine", "ray", "-j", 1)
    assert result.exit_code == 0 and result.stderr.startswith("mlic: 12 done, 0 skipped, 0 failed; ")
    succeed("decode", "out/sub/3.mlic", "-o", "3.png")
    assert Path("3.png").read_bytes() == Path("back/sub/3.png").read_bytes()


def test_a_worker_is_killed_while_it_computes(jobs, expected):
    killed = []

    def kill() -> None:
        while not killed:
            working = [path for path in Path("marks").iterdir() if path.name[0].isdigit()]
            if working and len(list(Path("out").glob("*.mlic"))) >= 2:
                killed.append(len(os.listdir("out")))
                os.kill(int(working[0].name.split("-")[0]), signal.SIGKILL)
            time.sleep(0.01)

    os.mkdir("out")
    outcomes: list[Outcome] = []
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run_on_ray(Marked(effort=0, marks=os.path.abspath("marks"), seconds=0.15), jobs, outcomes.append)
    assert killed and killed[0] < NUMBER - 2  # while there was work
    assert outputs() == expected
    assert sorted(o.job.target.name for o in outcomes) == sorted(expected) and not any(o.error for o in outcomes)
    [note] = [note for o in outcomes for note in o.notes]
    assert note == "done at attempt 2, after its worker died"
    marks = [path.name for path in Path("marks").iterdir()]
    assert len(marks) == NUMBER + 1 and sum(name.startswith("ended") for name in marks) == NUMBER


@pytest.mark.parametrize("when, note", [("writing", "done at attempt 2"), ("written", "a worker died after")])
def test_a_worker_is_killed_while_it_writes(jobs, expected, when, note):
    os.mkdir("out")
    Path("out/0.mlic").write_bytes(b"old")  # to be overwritten
    outcomes: list[Outcome] = []
    run_on_ray(Marked(effort=0, marks=os.path.abspath("marks"), dies=when), jobs[:4], outcomes.append, parallel=1)
    assert outputs() == {name: expected[name] for name in ("0.mlic", "1.mlic", "2.mlic", "3.mlic")}  # and no .part
    assert [o.job.source.name for o in outcomes] == ["0.png", "1.png", "2.png", "3.png"]
    assert [(o.error, o.bytes_out) for o in outcomes] == [("", len(data)) for data in outputs_in_order()]
    assert [len(o.notes) for o in outcomes] == [1, 0, 0, 0] and outcomes[0].notes[0].startswith(note)
    runs = len([path for path in Path("marks").iterdir() if not path.name.startswith("dead")])
    assert runs == (5 if when == "writing" else 4)  # what was written is not done again


def outputs_in_order() -> list[bytes]:
    return [data for _, data in sorted(outputs().items())]


def test_a_file_that_kills_its_workers_is_given_up(jobs, expected, monkeypatch):
    monkeypatch.setattr(ray_engine, "ATTEMPTS", 2)  # a new worker takes a while
    task = Marked(effort=0, marks=os.path.abspath("marks"), dies="writing", times=2)
    outcomes: list[Outcome] = []
    run_on_ray(task, jobs[:3], outcomes.append, parallel=1)
    assert outcomes[0].error.startswith("2 workers died on it")
    assert [o.error for o in outcomes[1:]] == ["", ""]
    assert outputs() == {name: expected[name] for name in ("1.mlic", "2.mlic")}


def test_an_interrupt_leaves_whole_files_that_were_told(jobs, expected):
    outcomes: list[Outcome] = []
    interrupted: list[float] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if len(outcomes) == 3:
            interrupted.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_on_ray(Marked(effort=0, marks=os.path.abspath("marks"), seconds=0.2), jobs, report)
    assert time.monotonic() - interrupted[0] < 15  # a worker may take a minute to begin, but not to end
    written = outputs()
    assert 3 <= len(written) < NUMBER and written.items() <= expected.items()
    assert sorted(o.job.target.name for o in outcomes) == sorted(written)
    time.sleep(0.5)
    assert outputs() == written


@pytest.mark.parametrize("missing", ["Task", "work"])
def test_workers_without_the_package(jobs, monkeypatch, missing):
    module = types.ModuleType("only_here")
    exec("class Task:\n    device = 'cpu'\ndef work(task, job, weights): pass\n", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    module.Task.__module__ = "only_here"
    if missing == "work":
        module.work.__module__ = "only_here"
        monkeypatch.setattr(ray_engine, "_work", module.work)
    with pytest.raises(MlicError, match="workers need mlic, installed as it is here: No module named 'only_here'"):
        run_on_ray(module.Task() if missing == "Task" else Encode(), jobs[:1], lambda outcome: None)


def test_no_cluster_at_an_address(jobs, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        said = refused("encode", "0.png", "--engine", "ray", "--ray-address", address)
        assert said.startswith(f"mlic: no Ray cluster at {address}: ")
    assert "0.mlic" not in files()


def test_what_is_not_for_a_cluster(jobs):
    assert "stdin and stdout" in misused("encode", "-", "--engine", "ray")
    assert "stdin and stdout" in misused("encode", "0.png", "-o", "-", "--engine", "ray")
    assert "the Ray cluster has no GPU" in refused("encode", "0.png", "--engine", "ray", "--device", "cuda")
