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


Coder = tuple[Callable[[Picture, float | None], bytes], Callable[[bytes], np.ndarray]]  # what encodes, what decodes


def model_coder(job: dict[str, Any]) -> Coder:
    """One of our models, set up as `mlic encode` does it."""
    from .cli import _keep_freed_memory

    _keep_freed_memory()
    import torch

    from .codec import decode_file, encode_picture
    from .container import MlicFile
    from .weights import load_model

    torch.set_num_threads(job["threads"])
    network = load_model(job["name"], device=job["device"])
    return (
        lambda picture, quality: encode_picture(network, picture, quality, effort=job["effort"]).data,
        lambda data: decode_file(network, MlicFile.from_bytes(data)).pixels,
    )


def peer_coder(job: dict[str, Any]) -> Coder:
    """Another codec. The picture's colour profile stays out of its files."""
    from .peers import find_peer

    peer, threads = find_peer(job["name"]), job["threads"]
    return (
        lambda picture, quality: peer.encode(picture.pixels, quality, threads=threads),
        lambda data: peer.decode(data, threads=threads),
    )


def encode_files(encode: Callable, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Code the picture at each quality into `folder`/0, 1, ...; seconds from pixels to bytes in memory."""
    picture, folder, qualities = read_pixels(job["picture"]), Path(job["folder"]), job["qualities"]
    corner = Picture(np.ascontiguousarray(picture.pixels[:WARM_UP_SIDE, :WARM_UP_SIDE]))
    points = []
    for name, source, quality in [(WARM_UP, corner, qualities[0]), *((i, picture, q) for i, q in enumerate(qualities))]:
        data, report = _timed(lambda: encode(source, quality))
        (folder / str(name)).write_bytes(data or b"")  # nothing where it failed, which cannot be decoded either
        points.append(report)
    return points[1:]


def decode_files(decode: Callable, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Decode each file of `folder` into an array beside it; seconds from bytes to pixels in memory."""
    folder, points = Path(job["folder"]), []
    for name in (WARM_UP, *range(len(job["qualities"]))):
        data = (folder / str(name)).read_bytes()
        pixels, report = _timed(lambda: decode(data))
        if pixels is not None:
            np.save(folder / f"{name}.npy", pixels)
        points.append(report)
    return points[1:]


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
        encode, decode = (model_coder if job["kind"] == "model" else peer_coder)(job)
        points = encode_files(encode, job) if job["task"] == "encode" else decode_files(decode, job)
        report = {"points": points, "peak_mib": peak_memory_mib()}
    except MlicError as error:
        report = {"error": str(error)}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
