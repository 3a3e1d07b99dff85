"""The process that codes one picture for `mlic eval`: `python -m mlic.coding_process`, a job on stdin, a report on stdout.

Encoding and decoding are two such processes. All that the second gets from the first are the files in a folder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .errors import MlicError
from .pictures import Picture, read_pixels

WARM_UP = "warm-up"  # a file from a corner of the picture, coded first and not timed
WARM_UP_SIDE = 64


class ModelCoder:
    """One of our models, set up as `mlic encode` does it."""

    def __init__(self, model: str, device: str, threads: int, effort: int) -> None:
        from .cli import _keep_freed_memory

        _keep_freed_memory()
        import torch

        from .weights import load_model

        torch.set_num_threads(threads)
        self.model, self.device, self.effort = model, device, effort
        self.network = load_model(model, device=device)

    def encode(self, picture: Picture, quality: float | None) -> bytes:
        from .codec import encode_picture

        return encode_picture(self.network, picture, quality, effort=self.effort).data

    def decode(self, data: bytes) -> np.ndarray:
        from .codec import decode_picture, model_for
        from .container import MlicFile

        file = MlicFile.from_bytes(data)
        return decode_picture(model_for(file, self.model, self.device), file)


class PeerCoder:
    """Another codec. The picture's colour profile stays out of its files."""

    def __init__(self, name: str, threads: int) -> None:
        from .peers import find_peer

        self.peer, self.threads = find_peer(name), threads

    def encode(self, picture: Picture, quality: float | None) -> bytes:
        return self.peer.encode(picture.pixels, quality, threads=self.threads)

    def decode(self, data: bytes) -> np.ndarray:
        return self.peer.decode(data, threads=self.threads)


def encode_files(coder: ModelCoder | PeerCoder, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Code the picture at each quality into `folder`/0, 1, ...; seconds from pixels to bytes in memory."""
    picture, folder = read_pixels(job["picture"]), Path(job["folder"])
    corner = Picture(np.ascontiguousarray(picture.pixels[:WARM_UP_SIDE, :WARM_UP_SIDE]))
    points = []
    for name, source, quality in [(WARM_UP, corner, job["qualities"][0])] + [
        (str(index), picture, quality) for index, quality in enumerate(job["qualities"])
    ]:
        data, report = _timed(lambda: coder.encode(source, quality))
        if data is not None:
            (folder / name).write_bytes(data)
        points.append(report)
    return points[1:]


def decode_files(coder: ModelCoder | PeerCoder, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Decode each file of `folder` into an array beside it; seconds from bytes to pixels in memory."""
    folder = Path(job["folder"])
    if (folder / WARM_UP).exists():
        _timed(lambda: coder.decode((folder / WARM_UP).read_bytes()))
    points = []
    for index in range(len(job["qualities"])):
        if not (folder / str(index)).exists():
            points.append({"error": "no file to decode"})
            continue
        data = (folder / str(index)).read_bytes()
        pixels, report = _timed(lambda: coder.decode(data))
        if pixels is not None:
            np.save(folder / f"{index}.npy", pixels)
        points.append(report)
    return points


def peak_memory_mib() -> float | None:
    """Peak resident memory of this process or of the largest it started, whichever is more; None where not known."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # what ru_maxrss counts in
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include what the parent held before it started this process
        own = next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return round(max(own, children) / (1 << 20), 1)


def _timed(run: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    started = time.perf_counter()
    try:
        result = run()
    except Exception as error:  # any failure of a codec is a result
        text = str(error).splitlines() or [""]
        return None, {"error": text[0] if isinstance(error, MlicError) else f"{type(error).__name__}: {text[0]}"}
    return result, {"seconds": time.perf_counter() - started}


def main() -> None:
    job = json.load(sys.stdin)
    try:
        if job["kind"] == "model":
            coder: ModelCoder | PeerCoder = ModelCoder(job["name"], job["device"], job["threads"], job["effort"])
        else:
            coder = PeerCoder(job["name"], job["threads"])
        points = (encode_files if job["task"] == "encode" else decode_files)(coder, job)
        report = {"points": points, "peak_mib": peak_memory_mib()}
    except MlicError as error:
        report = {"error": str(error)}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
