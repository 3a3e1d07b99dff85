"""The `mlic train` and `mlic train-plot` commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from .cli import INTERRUPTED, POSITIVE, Number, _device, device_option, main, reported, threads_option
from .config import CONFIGS
from .errors import MlicError

SHARE = Number(0, 1, min_open=True)
FOLDER = click.Path(exists=True, file_okay=False)


@main.command()
@click.option(
    "--model",
    default="fast",
    show_default=True,
    metavar="NAME|FILE",
    help=f"{', '.join(CONFIGS)}, or weights whose config to take.",
)
@click.option("--data", multiple=True, required=True, type=FOLDER, help="Folder of pictures. May be repeated.")
@click.option("--val", multiple=True, type=FOLDER, help="Pictures to measure on at the end.")
@click.option("--val-every", type=POSITIVE, help="Measure on them every so many minutes, too.")
@click.option("--tensorboard", is_flag=True, help="Also write TensorBoard events to OUT.")
@click.option("--steps", type=click.IntRange(1), help="Length of the run in steps, or ...")
@click.option("--minutes", type=POSITIVE, help="... in minutes. The schedule fits itself to it.")
@click.option("--resume", is_flag=True, help="Go on with the run in OUT, also into a longer one.")
@click.option("--take-over", is_flag=True, help="Compile first, then stop the process that runs in OUT and go on with it.")
@click.option("--init", metavar="NAME|FILE", help="Begin from these weights instead of fresh ones.")
@click.option("--lmbda", type=POSITIVE, help="Rate-distortion trade-off of a single-rate model.")
@click.option("--metric", default="mse", show_default=True, type=click.Choice(["mse", "ms-ssim"]))
@click.option("--out", default="runs/model", show_default=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--batch", default=4, show_default=True, type=click.IntRange(1), help="Crops a step (in each process).")
@click.option("--crop", default=256, show_default=True, type=click.IntRange(64), help="Pixels a side.")
@click.option("--last-crop", type=click.IntRange(64), help="Pixels a side in the last share.")
@click.option("--last-share", default=0.15, show_default=True, type=Number(0, 1), help="Of the run.")
@click.option("--scale", "scales", multiple=True, type=SHARE, default=(1.0, 0.75, 0.5), show_default=True, help="Of pictures.")
@click.option("--papers-share", default=0.3, show_default=True, type=Number(0, 1), help="At the papers' rates.")
@click.option("--optimiser", default="muon", show_default=True, type=click.Choice(["adam", "muon"]))
@click.option("--lr", default=1e-3, show_default=True, type=POSITIVE)
@click.option("--muon-lr", default=1.0, show_default=True, type=POSITIVE, help="Of Muon's matrices, relative to --lr.")
@click.option("--muon-decay", default=0.0, show_default=True, type=Number(0), help="Weight decay of these.")
@click.option("--decay", default=0.5, show_default=True, type=SHARE, help="Of the run.")
@click.option("--save-every", default=300.0, show_default=True, type=Number(0), help="Seconds.")
@click.option("--compile", "compiled", type=click.Choice(["formulas", "all"]), help="Of the step, by torch.compile.")
@click.option("--bf16/--no-bf16", default=None, help="Default: where the device has units for bfloat16.")
@click.option("--graph/--no-graph", default=True, show_default=True, help="Capture the step as a CUDA graph.")
@click.option("--branches", default=4, show_default=True, type=click.IntRange(0), help="CUDA streams beside the first.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1))
@device_option
@threads_option
def train(data, val, out, device, resume, take_over, **settings) -> None:
    """Train a model and write its weights to OUT/MODEL.safetensors.

    \b
    mlic train --data photos --minutes 60 --out runs/fast
    torchrun --nproc-per-node 4 -m mlic train --data photos --steps 100000
    """
    from .train import train as run
    from .train_config import TrainConfig
    from .weights import load_model, save_weights

    try:
        if settings["model"] not in CONFIGS:
            settings["model"] = load_model(settings["model"]).config
    except MlicError as error:
        raise click.UsageError(str(error)) from None
    try:
        with reported(out):
            config = TrainConfig(data=data, val=val, out=str(out), **settings)
            trained = run(config, device=_device(device), resume=resume, take_over=take_over)
            if trained is None:
                click.echo(f"{out}: stopped; --resume goes on", err=True)
                sys.exit(INTERRUPTED)
            if int(os.environ.get("RANK", 0)) == 0:
                target = out / f"{trained.config.name}.safetensors"
                save_weights(target, trained.cpu(), half=True, notes={"training": config.told()})
                click.echo(f"{target}: weights {trained.digest[:8].hex()}")
    except ValueError as error:
        raise click.UsageError(str(error)) from None


@main.command("train-plot")
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
def train_plot(run) -> None:
    """Draw the logs of the run in folder RUN into RUN/run.png."""
    from .train_log import plot

    with reported(run):
        click.echo(plot(run))
