"""Which settings learn most in equal time: short runs on the same pictures, measured on pictures of their own.

    python benchmarks/compare_training.py --data PHOTOS --val OTHERS --seconds 150 --device cuda
    python benchmarks/compare_training.py --data PHOTOS --val OTHERS --steps 4000 --set ablation --transforms fast \
        --crop 256 --optimiser adam

Prints a table: steps, the loss on the validation pictures (mean over seven levels), the BD-rate against the first
variant, negative where fewer bits do. Time is the device's; on a CPU, the process's own computing, so that other work on
the machine counts little. Decoding, compiling and validation do not count. With --steps instead of --seconds, runs see
equally many pixels: for what a CPU is slow at, such as Muon.
"""

from __future__ import annotations

import dataclasses
import json
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import nn

from mlic import learning, transforms
from mlic.bdrate import compare_curves
from mlic.config import FAST, AttentionConfig
from mlic.data import PictureBank
from mlic.model import STRIDE, level_lambda
from mlic.strategies import Estimate
from mlic.train_config import TrainConfig
from mlic.trainer import Trainer
from mlic.validation import validate, validation_levels
from mlic.weights import load_model

PIXEL_SCALE, FIRST_STEPS = transforms.PIXEL_SCALE, 5
LEARNING = {"PARTS": learning.PARTS}


def contexts(intra: AttentionConfig | None, inter: AttentionConfig | None):
    return {"model": dataclasses.replace(FAST, name="fast-contexts", step_hidden=0, intra=intra, inter=inter)}


def ablation() -> dict[str, dict]:
    """The papers' entropy models, on the transforms of `fast`, with contexts of a size that fits these."""
    intra = AttentionConfig(kind="linear", width=32, heads=2, reprojection_kernel=3, expansion=2)
    inter = AttentionConfig(kind="linear", width=64, heads=2, reprojection_kernel=1, expansion=2)
    soft_intra, soft_inter = (dataclasses.replace(a, kind="softmax") for a in (intra, inter))
    return {
        "checkerboard + channel": contexts(None, None),
        "MEM: + intra-slice, softmax": contexts(soft_intra, None),
        "MEM+: + inter-slice, softmax": contexts(soft_intra, soft_inter),
        "MEM++: both linear": contexts(intra, inter),
    }


class NoiseAlone(Estimate):
    """In training, the rate is that of uniform noise for scales too."""

    def _bits(self) -> torch.Tensor:
        symbols, scale, at = self._all_said()
        noisy = at + torch.rand_like(at) - 0.5
        return self.gaussian.bits(noisy, scale, noisy) if self.noisy else self.gaussian.bits(symbols, scale, at)


SETS = {
    "learning": lambda: {
        "as it is": {},
        "the same, seed 1": {"seed": 1},
        "prior and gains as the rest": {"PARTS": (("", 1.0),)},
        "torch's own start": {"start": lambda model: None},
        "rate of noise alone": {"estimate": NoiseAlone},
        "anchors all at once": {"model": dataclasses.replace(FAST, step_hidden=0)},
        "relu": {"model": dataclasses.replace(FAST, activation="relu")},
        "gelu": {"model": dataclasses.replace(FAST, activation="gelu")},
    },
    "settings": lambda: {
        "as it is": {},
        "adam": {"optimiser": "adam"},
        "adam at half the learning rate": {"optimiser": "adam", "lr": 5e-4},
        "muon, matrices at 0.5 x": {"muon_lr": 0.5},
        "muon, matrices at 2 x": {"muon_lr": 2.0},
        "muon, matrices at 5 x": {"muon_lr": 5.0},
        "muon, weight decay 0.1": {"muon_decay": 0.1},
        "level weight 0.25": {"level_weight": 0.25},
        "level weight 0.75": {"level_weight": 0.75},
        "half the batch": {"batch": 0.5},
        "twice the batch": {"batch": 2.0},
        "larger crops for the last 20%": {"last_crop": 2.0, "last_share": 0.2},
        "random start of the linear branches": {"random_linear": True},
        "no linear branches": {"random_linear": None},
    },
    "ablation": ablation,
}


def trained_transforms(weights: str) -> Callable[[nn.Module], None]:
    """A start with g_a and g_s as the weights have them, which stay so, and hyper transforms, gains and prior as well, which
    learn on: what differs is the entropy model, which begins anew.
    """
    given = {name: value for name, value in load_model(weights).state_dict().items() if not name.startswith("entropy_model.")}

    def start(model: nn.Module) -> None:
        learning.start(model)
        model.load_state_dict(model.state_dict() | given)
        for net in (model.g_a, model.g_s):
            net.requires_grad_(False)

    return start


def start_of_linear(trainer: Trainer, random: bool | None) -> None:
    """In place of the DCT: torch's own random start, or (None) no linear branch at all; then the nets' output is not
    scaled down.
    """
    transforms.PIXEL_SCALE = 1.0 if random is None else PIXEL_SCALE
    if random is False:
        return
    with torch.no_grad():
        for model in (trainer.model, trainer.average):
            torch.manual_seed(1)
            for net in (model.g_a, model.g_s):
                net.linear.reset_parameters()
                if random is None:
                    net.linear.weight.zero_()
                    net.linear.bias.zero_()
                    net.tail.reset_parameters()
    if random is None:
        for net in (trainer.model.g_a, trainer.model.g_s):
            net.linear.requires_grad_(False)


def run(
    config: TrainConfig,
    bank: PictureBank,
    *,
    seconds: float | None,
    device: str,
    random_linear: bool | None = False,
    start: Callable[[nn.Module], None] = learning.start,
    **rates,
) -> tuple[Trainer, float]:
    """For so many seconds, or config.steps steps. Returns the trainer and the seconds a step took."""
    for name, value in (LEARNING | rates).items():
        setattr(learning, name, value)
    with unittest.mock.patch("mlic.trainer.start", start):
        trainer = Trainer(config, device=device, bank=bank)
    start_of_linear(trainer, random_linear)

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()  # the step's own bound of two steps in the queue is near enough but for the ends
        return time.process_time() if device == "cpu" else time.monotonic()

    for _ in range(FIRST_STEPS):  # not timed: a CUDA graph is captured here
        trainer.step(0.0)
    begun, progress = now(), 0.0
    while progress < 1:
        trainer.step(progress)
        spent = (time.process_time() if device == "cpu" else time.monotonic()) - begun
        progress = spent / seconds if seconds else trainer.steps / config.steps
    return trainer, (now() - begun) / (trainer.steps - FIRST_STEPS)


@click.command()
@click.option("--data", multiple=True, required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--val", multiple=True, required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--set", "which", default="learning", show_default=True, type=click.Choice(list(SETS)))
@click.option("--only", multiple=True, help="Variants by name; the first is what the others are compared with.")
@click.option("--seconds", type=float, help="Length of each variant's run in seconds, or ...")
@click.option("--steps", type=int, help="... in steps of the usual batch.")
@click.option("--transforms", help="Take all but the entropy model from these weights; g_a and g_s then stay as they are.")
@click.option("--optimiser", default="muon", show_default=True, type=click.Choice(["adam", "muon"]))
@click.option("--batch", default=4, show_default=True)
@click.option("--crop", default=128, show_default=True)
@click.option("--val-size", default=256, show_default=True, help="Validation pictures' middle, pixels a side.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--threads", type=int)
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Append a line for each variant.")
def main(data, val, which, only, seconds, steps, transforms, optimiser, batch, crop, val_size, device, threads, out) -> None:
    if (seconds is None) == (steps is None):
        raise click.UsageError("give either --seconds or --steps")
    variants = SETS[which]()
    if unknown := set(only) - set(variants):
        raise click.UsageError(f"no variant called {', '.join(sorted(unknown))}; there are {', '.join(variants)}")
    largest = crop * int(max(v.get("last_crop", 1) for v in variants.values()))
    bank = PictureBank(data, smallest=crop, scales=TrainConfig.scales, device=device)
    bank.count(largest)
    val_bank = PictureBank(val, smallest=STRIDE, device=device)
    usual_start = trained_transforms(transforms) if transforms else learning.start
    first = None
    print("| variant | steps | ms a step | validation loss | BD-rate |")
    print("| --- | ---: | ---: | ---: | ---: |", flush=True)
    for name in only or variants:
        changes = dict(variants[name])
        beside = {key: changes.pop(key) for key in ("random_linear", *LEARNING) if key in changes}
        beside["start"] = changes.pop("start", usual_start)
        estimate = changes.pop("estimate", Estimate)
        times, last_crop = changes.pop("batch", 1), changes.pop("last_crop", None)
        config = TrainConfig(
            **{"model": "fast", "data": data, "out": "", "crop": crop, "optimiser": optimiser, "threads": threads}
            | {"steps": max(1, round((steps or 1) / times)), "batch": max(1, round(batch * times))}
            | ({"last_crop": round(crop * last_crop)} if last_crop else {})
            | changes
        )
        with unittest.mock.patch("mlic.model.Estimate", estimate):
            trainer, a_step = run(config, bank, seconds=seconds, device=device, **beside)
        rows = validate(trainer.average.eval(), val_bank, validation_levels(trainer.model), val_size)
        lmbda = level_lambda(trainer.shape, torch.tensor([row["level"] for row in rows])).tolist()
        losses = [  # each over lambda^0.5, which makes all levels count alike, whatever the run itself was weighted by
            (at / 0.01) ** -0.5 * (row["bpp"] + at * 255**2 * 10 ** (-row["psnr"] / 10)) for at, row in zip(lmbda, rows)
        ]
        loss = sum(losses) / len(losses)
        points = [(row["bpp"], row["psnr"]) for row in rows]
        first = first or points
        delta = compare_curves(first, points)
        bd = "-" if delta.rate_cubic is None else f"{delta.rate_cubic:+.1f}%"
        print(f"| {name} | {trainer.steps} | {1000 * a_step:.1f} | {loss:.3f} | {bd} |", flush=True)
        if out:
            with open(out, "a") as file:
                line = {"variant": name, "set": which, "batch": config.batch, "steps": trainer.steps, "a_step": a_step}
                line |= {"loss": loss, "rows": rows, "skipped": trainer.read_measures()["skipped"]}
                json.dump(line, file)
                file.write("\n")
        del trainer


if __name__ == "__main__":
    main()
