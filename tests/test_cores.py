"""How many cores are taken where a container, or a list of cores, allows fewer than there are."""

from __future__ import annotations

import os

import pytest
import torch
from command import folder, run, use_small_weights, weights_folder  # noqa: F401

from mlic import cli, cli_code
from mlic import cores as module

GROUPS = {
    "none": ("", {}, 8),
    "version 2, in a container": ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
    "version 2, no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
    "version 2, of a group around": ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
    "version 2, the least": ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "700000 100000\n"}, 4),
    "less than one": ("0::/\n", {"cpu.max": "1000 100000\n"}, 1),
    "more than there are": ("0::/\n", {"cpu.max": "6400000 100000\n"}, 8),
    "version 1": ("3:memory:/m\n4:cpu:/d\n", {"cpu/d/cpu.cfs_quota_us": "500000\n", "cpu/d/cpu.cfs_period_us": "100000\n"}, 5),
    "version 1, in a container": (
        "4:cpu,cpuacct:/docker/x\n",
        {"cpu,cpuacct/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        1,
    ),
    "version 1, no limit": ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
}


@pytest.mark.parametrize("own, files, number", GROUPS.values(), ids=GROUPS)
def test_control_groups(own, files, number, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(module, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(module, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert module.cores() == number


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux knows which cores a process may run on")
def test_cores_that_a_process_may_run_on():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert module.cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert module.cores() <= len(before)


@pytest.mark.parametrize("arguments, threads", [((), 3), (("-j", 2), 2), (("-j", 64), 3)])
def test_the_command_takes_no_more(arguments, threads, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "cores", lambda: 3)
    monkeypatch.setattr(cli_code, "cores", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert run("encode", "a.png", *arguments).exit_code == 0 and asked == [threads]
    assert cli_code._share_threads(*(arguments[1:] or [None]), 100, "cpu") == threads
