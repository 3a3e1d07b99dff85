"""`mlic eval`: code pictures with a model or another codec, by way of real files, and measure what comes back.

Every picture is coded by one fresh process and decoded by another; see `coding_process`. This module starts them,
compares pixels, and keeps the results file.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .errors import MlicError, ResultsError
from .folders import picture_extensions
from .metrics import MS_SSIM_MIN_SIDE, ms_ssim, ms_ssim_db, psnr
from .pictures import read_pixels
from .results import Results

MODEL_QUALITIES = (1, 15, 30, 45, 60, 75, 90, 100)
Run = dict[str, Any]  # what a coding process needs to know of the codec: kind, name, device, effort


def model_codec(
    model: str, *, device: str = "cpu", name: str | None = None, effort: int | None = None
) -> tuple[dict[str, Any], Run]:
    """A model's entry in a results file, and how to run it. Raises WeightsError when it is not here, and ValueError for an
    `effort` that it does not take.
    """
    from .refine import passes_of
    from .weights import load_model

    network = load_model(model, device=device)
    name, passes = name or network.config.name, passes_of(network, effort)
    entry = {
        "name": name,
        "label": f"mlic {name} (measured)",
        "kind": "model",
        "settings": {
            "model": network.config.name,
            "device": device,
            "variable_rate": network.config.variable_rate,
            "effort": passes,
        },
        "software": f"mlic {__version__} with torch {metadata.version('torch')}",
        "weights": network.digest.hex(),
    }
    return entry, {"kind": "model", "name": str(model), "device": device, "effort": passes}


def peer_codec(peer: str) -> tuple[dict[str, Any], Run]:
    """Another codec's entry in a results file, and how to run it. Raises MlicError naming the package it lacks."""
    from .peers import find_peer

    codec = find_peer(peer)
    entry = {
        "name": peer,
        "label": codec.label,
        "kind": "peer",
        "settings": json.loads(json.dumps(codec.settings())),
        "software": codec.version(),
    }
    return entry, {"kind": "peer", "name": peer}


def find_pictures(inputs: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Files, and the pictures in folders, sorted in each; notes say what of a folder was left out.

    Raises MlicError for a folder without pictures, and for two pictures of one name.
    """
    paths, notes, extensions = [], [], picture_extensions()
    for source in inputs:
        if not source.is_dir():
            paths.append(source)
            continue
        files = sorted(path for path in source.iterdir() if path.is_file())
        found = [path for path in files if path.suffix.lower() in extensions]
        if not found:
            raise MlicError(f"no pictures in folder {source}")
        if len(found) < len(files):
            notes.append(f"{len(files) - len(found)} files of {source} are no pictures by their names")
        paths += found
    names = [path.name for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MlicError(f"two pictures are called {twice[0]}: results go by file name")
    return paths, notes


def evaluate(
    paths: Sequence[Path],
    codec: dict[str, Any],
    run: Run,
    *,
    qualities: Sequence[float | None],
    output: Path | None = None,
    threads: int = 1,
    jobs: int = 1,
    force: bool = False,
    progress: Callable[[dict[str, Any], bool], None] = lambda picture, known: None,
) -> Results:
    """Measure a codec (from `model_codec` or `peer_codec`) on pictures of different file names: what a results file holds.

    `qualities` are in the codec's own unit, (None,) for a model of one rate; `jobs` pictures are measured at once, with
    `threads` for each, where the codec can be told. With an `output`, it is written after every picture, and pictures
    already in it are not measured again; failed ones are, and `force` starts it afresh. `progress` gets each picture's
    entry, and whether it was found in the file. Times count as disturbed with several `jobs`, and where the machine was
    busy at the start. Raises ResultsError where the file holds other settings, another version, or pictures that are not
    among `paths`.
    """
    results = Results(
        codec=codec,
        qualities=list(qualities),
        threads=threads,
        jobs=jobs,
        environment=environment(),
        disturbed=jobs > 1 or _load() + threads > (os.cpu_count() or 1) + 0.5,
    )
    done: dict[str, dict[str, Any]] = {}
    if output and output.exists() and not force:
        before = Results.load(output)
        _check_same(output, before, results)
        results.disturbed |= before.disturbed
        done = {picture["picture"]: picture for picture in before.complete()}
        if strangers := sorted({p["picture"] for p in before.pictures} - {path.name for path in paths}):
            raise ResultsError(f"{output} holds {strangers[0]}, which is not among the inputs; -f starts afresh")

    entries = dict(done)
    settings = {"qualities": qualities, "threads": threads}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(measure_picture, path, run, done=done.get(path.name), **settings) for path in paths]
        try:
            for future in concurrent.futures.as_completed(futures):
                entry = future.result()
                entries[entry["picture"]] = entry
                results.pictures = [entries[path.name] for path in paths if path.name in entries]
                if output:
                    results.save(output)
                progress(entry, entry is done.get(entry["picture"]))
        finally:
            pool.shutdown(cancel_futures=True)
    return results


def measure_picture(
    path: Path,
    run: Run,
    *,
    qualities: Sequence[float | None],
    threads: int = 1,
    done: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A picture's entry in a results file: coded, decoded and compared, or `done` where that is of the same pixels."""
    try:
        picture = read_pixels(path)
    except MlicError as error:
        return {"picture": path.name, "error": str(error)}
    height, width = picture.pixels.shape[:2]
    entry: dict[str, Any] = {
        "picture": path.name,
        "width": width,
        "height": height,
        "pixels_sha256": pixels_digest(picture.pixels),
        "notes": list(picture.notes),
    }
    if done and done["pixels_sha256"] == entry["pixels_sha256"]:
        return done
    with tempfile.TemporaryDirectory() as name:
        job = {**run, "picture": str(path), "folder": name, "qualities": list(qualities), "threads": threads}
        reports = [_run_process({**job, "task": task}) for task in ("encode", "decode")]
        if error := next((report["error"] for report in reports if "error" in report), None):
            return entry | {"error": error}
        entry |= {"encode_peak_mib": reports[0]["peak_mib"], "decode_peak_mib": reports[1]["peak_mib"]}
        entry["points"] = [
            _point(quality, Path(name), index, picture.pixels, *(report["points"][index] for report in reports))
            for index, quality in enumerate(qualities)
        ]
    return entry


def _point(
    quality: float | None, folder: Path, index: int, pixels: np.ndarray, encode: dict[str, Any], decode: dict[str, Any]
) -> dict[str, Any]:
    if error := encode.get("error") or decode.get("error"):
        return {"quality": quality, "error": error}
    decoded = np.load(folder / f"{index}.npy")
    if decoded.shape != pixels.shape:
        return {"quality": quality, "error": f"decoded to shape {decoded.shape}, not {pixels.shape}"}
    size = (folder / str(index)).stat().st_size
    noise = psnr(pixels, decoded)
    similarity = ms_ssim(pixels, decoded) if min(pixels.shape[:2]) >= MS_SSIM_MIN_SIDE else None
    return {
        "quality": quality,
        "bytes": size,
        "bpp": 8 * size / (pixels.shape[0] * pixels.shape[1]),
        "psnr": _finite(noise),
        "ms_ssim": similarity,
        "ms_ssim_db": None if similarity is None else _finite(ms_ssim_db(similarity)),
        "encode_s": round(encode["seconds"], 5),
        "decode_s": round(decode["seconds"], 5),
    }


def _run_process(job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "mlic.coding_process"]
    variables = {**os.environ, "OMP_NUM_THREADS": str(job["threads"])}
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=variables)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"error": f"the {job['task']} process ended with code {done.returncode}: {lines[-1]}"}
    return json.loads(done.stdout)


def pixels_digest(pixels: np.ndarray) -> str:
    """SHA-256 of the shape's repr and the pixels: the same for a picture in whatever lossless file.

    >>> pixels_digest(np.zeros((2, 3, 3), np.uint8))[:16]
    '912c1186b206cf99'
    """
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def environment() -> dict[str, Any]:
    """Versions and machine class; nothing that names a machine or a person."""
    return {
        "mlic": __version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "numpy", "pillow", "constriction")},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # not every machine can have constriction
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30))
    except (AttributeError, ValueError, OSError):
        return None


def _load() -> float:
    """Processes that want a core, averaged over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _check_same(path: Path, before: Results, now: Results) -> None:
    for what in ("codec", "qualities", "threads", "jobs", "environment"):
        old, new = getattr(before, what), getattr(now, what)
        if old != new:
            if isinstance(old, dict):
                key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
                what, old, new = f"{what}: {key}", old.get(key), new.get(key)
            raise ResultsError(f"{path} was measured with other settings ({what} {old}, now {new}); -f starts afresh")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
