"""Which files are taken and what becomes of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlic.folders import Job, picture_extensions, plan_jobs


@pytest.fixture(autouse=True)
def tree(tmp_path, monkeypatch) -> None:
    """photos/ with pictures at three depths and files that are none of this package's business."""
    monkeypatch.chdir(tmp_path)
    for name in "a.png B.JPG notes.txt .hidden.png sub/b.webp sub/deep/c.tiff .trash/d.png x.mlic".split():
        path = Path("photos", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"content")


def plan(*inputs, output=None, decode=False, **settings) -> list[Job]:
    takes, gives = ({".mlic"}, ".png") if decode else (picture_extensions(), ".mlic")
    return plan_jobs(inputs, output, takes=takes, gives=gives, **settings)


def targets(*inputs, **settings) -> dict[str, str]:
    jobs = plan(*inputs, **settings)
    assert not any(job.problem or job.done for job in jobs)
    return {job.source.as_posix(): job.target.as_posix() for job in jobs}


def make(name: str, *, age: int) -> None:
    """An output, `age` seconds older than photos/a.png."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(b"old")
    time = os.stat("photos/a.png").st_mtime_ns - age * 10**9
    os.utime(name, ns=(time, time))


ALL = ["photos/B.JPG", "photos/a.png", "photos/sub/b.webp", "photos/sub/deep/c.tiff"]
CODED = ["out/B.mlic", "out/a.mlic", "out/sub/b.mlic", "out/sub/deep/c.mlic"]


def test_a_folder_beside_the_inputs():
    assert targets("photos") == {source: str(Path(source).with_suffix(".mlic")) for source in ALL}
    assert targets("photos", decode=True) == {"photos/x.mlic": "photos/x.png"}


@pytest.mark.parametrize("name", ["photos", "photos/", "./photos", "photos/**", "photos/*"])
@pytest.mark.parametrize("output", ["out", "out/", "./out"])
def test_a_tree_into_a_folder(name, output):
    assert sorted(targets(name, output=output).items()) == list(zip(ALL, CODED))
    assert os.path.isdir("out") and not os.path.exists("out/sub")  # those come with their files


def test_the_current_folder():
    os.chdir("photos")
    assert targets(".", output="../out")["sub/b.webp"] == "../out/sub/b.mlic"
    assert targets("**/*.webp", output="../out") == {"sub/b.webp": "../out/sub/b.mlic"}


def test_globs():
    assert list(targets("photos/*.png", output="out").values()) == ["out/a.mlic"]
    assert targets("photos/**/[bc].*", output="out") == {ALL[2]: CODED[2], ALL[3]: CODED[3]}
    assert list(targets("photos/s*", output="out").values()) == CODED[2:]
    assert list(targets("photos/*.png", "photos/**/*.png", "photos/a.png")) == ["photos/a.png"]


def test_a_file_whose_name_looks_like_a_glob():
    Path("[a].png").touch()
    assert targets("[a].png") == {"[a].png": "[a].mlic"}


@pytest.mark.parametrize("name", ["empty", "photos/*.gif", "none/**", "photos/*.txt"])
def test_where_there_is_nothing_to_take(name):
    os.mkdir("empty")
    [job] = plan(name, output="out")
    assert job.problem.startswith("no pictures ") and str(job.source) == name
    assert plan(name, decode=True)[0].problem.startswith("no .mlic files ")


def test_outputs_that_are_not_older_are_done():
    make("out/a.mlic", age=0)
    make("out/B.mlic", age=-100)
    states = {job.source.name: job.done for job in plan("photos", output="out")}
    assert states == {"a.png": True, "B.JPG": True, "b.webp": False, "c.tiff": False}
    assert not any(job.done or job.problem for job in plan("photos", output="out", force=True))
    [job] = plan("photos/a.png", output="out")  # by its name
    assert not job.done and "exists; give another -o, or -f" in job.problem


def test_older_outputs_are_kept_without_force():
    make("photos/a.mlic", age=100)
    [job] = plan("photos/*.png")
    assert not job.done and "is older than it; -u overwrites such outputs, -f all" in job.problem
    assert not plan("photos/*.png", force=True)[0].problem
    make("photos/a.png", age=200)  # an original beside its coded file
    [job] = plan("photos/a*", decode=True)
    assert not job.done and "photos/a.png exists" in job.problem


@pytest.mark.parametrize("name", ["photos/*.png", "photos/a.png"])
def test_older_outputs_are_done_again_with_update(name):
    make("out/a.mlic", age=100)
    [job] = plan(name, output="out", update=True)
    assert not job.done and not job.problem
    make("out/a.mlic", age=0)
    [job] = plan(name, output="out", update=True)
    assert job.done
    [job] = plan(name, output="out", update=True, force=True)
    assert not job.done and not job.problem


def test_what_comes_by_a_pipe_has_no_age():
    make("out/a.mlic", age=100)
    [job] = plan("-", output="out/a.mlic", update=True)
    assert not job.done and "exists" in job.problem


def test_an_empty_output_is_not_done():
    make("out/a.mlic", age=-100)
    Path("out/a.mlic").write_bytes(b"")
    [job] = plan("photos/*.png", output="out")
    assert not job.done and "exists" in job.problem
    [job] = plan("photos/*.png", output="out", update=True)
    assert not job.done and not job.problem


def test_pictures_with_one_output_keep_their_extensions():
    Path("photos/a.jpg").touch()
    Path("photos/sub/a.png").touch()
    coded = [*CODED[:1], "out/a.png.mlic", *CODED[2:], "out/a.jpg.mlic", "out/sub/a.mlic"]
    assert targets("photos", output="out") == dict(zip([*ALL, "photos/a.jpg", "photos/sub/a.png"], coded))
    assert list(targets("photos/a.png", "photos/a.jpg").values()) == ["photos/a.png.mlic", "photos/a.jpg.mlic"]
    make("out/a.mlic", age=-100)  # of which of them is not known
    assert not any(job.done or job.problem for job in plan("photos", output="out"))
    Path("photos/a.jpg.webp").touch()  # would become what a.jpg does
    problems = {job.source.name: job.problem for job in plan("photos", output="out")}
    why = "photos/a.jpg and photos/a.jpg.webp would both become out/a.jpg.mlic: rename one, or give them apart"
    assert problems["a.jpg"] == problems["a.jpg.webp"] == why and not problems["a.png"]


def test_two_inputs_with_one_output():
    """Of files that were found, none is done, or a later job would take the one for the other; two that were named are a
    mistake.
    """
    os.makedirs("other")
    Path("other/a.png").touch()
    for inputs in (["photos/*.png", "other"], ["photos/a.png", "other"], ["other", "photos/a.png"]):
        assert [bool(job.problem) for job in plan(*inputs, output="out")] == [True, True]
    with pytest.raises(ValueError, match="would both become out/a.mlic"):
        plan("photos/a.png", "other/a.png", output="out")
    assert len(plan("photos/a.png", "photos", "photos/*.png", output="out")) == len(ALL)  # one file, three times given


def locked(path, monkeypatch) -> None:
    """A folder that may neither be listed nor entered, for root as well."""
    scan, access = os.scandir, os.access

    def refusing(inner, answer=None):
        def outer(given, *args, **kwargs):
            if isinstance(given, (str, os.PathLike)) and Path(os.path.abspath(given)).is_relative_to(Path(path).absolute()):
                if answer is not None:
                    return answer
                raise PermissionError(13, "Permission denied", str(given))
            return inner(given, *args, **kwargs)

        return outer

    monkeypatch.setattr(os, "scandir", refusing(scan))
    monkeypatch.setattr(os, "access", refusing(access, False))


def test_folders_that_cannot_be_read_are_told(monkeypatch):
    locked("photos/sub", monkeypatch)
    jobs = {str(job.source): job.problem for job in plan("photos", output="out")}
    assert jobs == {"photos/B.JPG": "", "photos/a.png": "", "photos/sub": "Permission denied"}
    [job] = plan("photos/sub", "./photos/sub/", output="out")
    assert job.problem == "Permission denied"


def test_folders_that_cannot_be_written_are_told_before_the_work(monkeypatch):
    os.mkdir("out")
    locked("out", monkeypatch)
    with pytest.raises(ValueError, match="cannot write into folder out"):
        plan("photos", output="out")
    [job] = plan("photos/a.png", output="out/a.mlic")
    assert job.problem == "cannot write out/a.mlic: Permission denied"
    os.mkdir("elsewhere")
    os.symlink("../elsewhere/a.mlic", "out/link.mlic")
    assert not plan("photos/a.png", output="out/link.mlic")[0].problem  # what it points to is what is written
    make("out/a.mlic", age=0)
    assert plan("photos/*.png", output="out")[0].done, "nothing is left to write"


def test_links_to_nothing_are_told():
    os.symlink("nowhere.png", "photos/link.png")
    assert any(str(job.source) == "photos/link.png" and not job.problem for job in plan("photos", output="out"))


def test_no_file_is_replaced_by_its_own_output():
    os.symlink("a.png", "photos/c.mlic")
    [job] = plan("photos/c.mlic", output="photos/a.png", force=True, decode=True)
    assert "its own output" in job.problem


@pytest.mark.parametrize("output", ["-", "out.mlic", "photos/a.png", "photos/a.png/"])
def test_outputs_that_are_no_folder(output):
    for inputs in (["photos"], ["photos/*.png"], ["photos/a.png", "photos/B.JPG"]):
        with pytest.raises(ValueError, match="folder"):
            plan(*inputs, output=output)


def test_pictures_are_what_pillow_reads():
    assert {".png", ".jpg", ".jpeg", ".webp", ".tif", ".avif", ".ppm"} <= picture_extensions()
    assert not {".mlic", ".pdf", ".mpg", ".h5", ".txt", ""} & picture_extensions()
