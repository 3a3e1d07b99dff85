"""How many cores this process may keep busy: in a container not all that the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # of Linux


def cores() -> int:
    """Those that it may run on, or what its control groups let it use (as `docker run --cpus` says), whichever is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, _quotas())]))


def _quotas() -> Iterator[float]:
    """Of this process's groups and all that they are in, in cores."""
    for line in _text(OWN_GROUPS).splitlines():
        _, kinds, place = line.split(":", 2)  # no kinds: version 2
        if kinds and "cpu" not in kinds.split(","):
            continue
        group = Path(place.lstrip("/"))
        for folder in (GROUPS / kinds / inner for inner in (group, *group.parents)):
            version_1 = f"{_text(folder / 'cpu.cfs_quota_us')} {_text(folder / 'cpu.cfs_period_us')}"
            limit = (_text(folder / "cpu.max") or version_1).split()
            if len(limit) == 2 and all(map(str.isdigit, limit)):  # not "max" or -1: as much as there is
                yield int(limit[0]) / int(limit[1])


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
