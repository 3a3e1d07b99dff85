"""The shape of a model, as plain data: what is stored in a weights file and what a builder needs.

A model of the family is one config. MLIC, MLIC+, MLIC++ and `fast` differ in these fields and in nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

ANCHOR, NON_ANCHOR = True, False
PAPERS_LAMBDAS = (0.0018, 0.0483)  # the first and the last of the six that the papers' models are trained for


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """A global context: which attention, how wide, and the nets behind it.

    `width` and `heads` of None mean "as wide as the input, heads of 32 channels" (inter) or "as wide as the slice,
    2 heads" (intra), which is what the papers' models use.
    """

    kind: Literal["softmax", "linear"]
    width: int | None = None
    heads: int | None = None
    reprojection_kernel: int = 5
    expansion: int = 4  # hidden channels of the closing MLP, in slices


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Dimensions and parts of one codec network.

    Sizes are channels. `slices` are the channel counts of the latent's slices in coding order (Minnen & Singh 2020);
    their sum is M. The entropy model's parts follow Jiang et al., ACM MM 2023, sections 3.2 to 3.5, and
    arXiv 2307.15421 for the linear form of the global contexts.
    """

    name: str
    transform: Literal["residual", "patch"]
    width: int  # N: channels inside the transforms (at 1/8 for "patch")
    slices: tuple[int, ...]
    z_channels: int
    phi_h_channels: int  # output of h_s: first half "hyper scales", second half "hyper means"
    coarse_width: int = 0  # "patch" only: channels at 1/16
    depth: tuple[int, int] = (0, 0)  # "patch" only: residual blocks at 1/8 and at 1/16
    activation: Literal["gelu", "relu", "leaky"] = "gelu"  # inside hyper transforms and entropy nets
    channel_hidden: tuple[int, int] = (192, 128)
    channel_out: int | None = 128  # None: twice the slice
    local: Literal["conv", "window", "conv3"] = "window"
    intra: AttentionConfig | None = AttentionConfig(kind="linear")
    inter: AttentionConfig | None = None
    hyper_hidden: int = 0  # 0: all of z has the factorised prior; otherwise a quarter, and nets for the rest, see HyperContext
    step_hidden: int = 0  # 0: a slice's anchors all at once; otherwise the first slice's in three steps, see AnchorSteps
    parameters_hidden: tuple[int, ...] = (320, 256, 128)
    lrp_hidden: tuple[int, int] = (224, 128)
    lrp_kernels: tuple[int, int, int] = (3, 3, 3)
    scale_form: Literal["linear", "log"] = "linear"  # what the entropy nets emit for the scale
    error_bits: float | None = None  # weight of the error when symbols are chosen, see GaussianPrior; None: the nearest
    dependent: int = 0  # states of dependent quantisation of y, see dependent.py; 0: plain symbols
    shifted: bool = False  # whether values lie off the lattices of dependent quantisation, as `gaussian.shifts` says
    quality_levels: int = 0  # 0: one rate; otherwise the number of learned gain vectors
    lambda_range: tuple[float, float] = PAPERS_LAMBDAS  # MSE on 0..255, at the first and the last level
    padding: Literal["zero", "edge"] = "zero"

    def __post_init__(self) -> None:
        """Raises ValueError on values no builder knows: a config may come from a file."""
        for field, hint in get_type_hints(ModelConfig).items():
            if get_origin(hint) is Literal and getattr(self, field) not in get_args(hint):
                raise ValueError(f"{field} is {getattr(self, field)!r}, not one of {', '.join(get_args(hint))}")
        sizes = [self.width, self.z_channels, self.phi_h_channels, *self.slices, *self.channel_hidden]
        sizes += [*self.parameters_hidden, *self.lrp_hidden, *self.lrp_kernels]
        optional = [self.coarse_width, *self.depth, self.hyper_hidden, self.step_hidden, self.quality_levels]
        if not all(type(size) is int and 1 <= size <= 4096 for size in sizes) or not all(
            type(size) is int and 0 <= size <= 4096 for size in optional
        ):
            raise ValueError("sizes must be whole numbers from 1 to 4096")
        if self.error_bits is not None and not (isinstance(self.error_bits, (int, float)) and self.error_bits > 0):
            raise ValueError("error_bits is a positive number or None")
        if self.dependent not in (0, 512):
            raise ValueError(f"dependent is 0 or 512 states, not {self.dependent!r}, which other versions of mlic may know")
        if type(self.shifted) is not bool:
            raise ValueError(f"shifted is true or false, not {self.shifted!r}")
        if not (isinstance(self.name, str) and re.fullmatch(r"[\w+-][\w+.-]*", self.name)):  # it is part of file names
            raise ValueError(f"a model's name has letters, digits, and + - . _ in it, not {self.name!r}")
        if (self.transform == "patch") != (self.quality_levels >= 2):
            raise ValueError("patch transforms have two quality levels or more, residual ones none")

    @property
    def latent_channels(self) -> int:
        return sum(self.slices)

    @property
    def hyper_batches(self) -> int:
        """How many batches of symbols z has."""
        return 4 if self.hyper_hidden else 1

    @property
    def symbol_batches(self) -> int:
        """How many a tile has: z's, and the halves of each slice, one of them perhaps in three steps."""
        return self.hyper_batches + 2 * len(self.slices) + (2 if self.step_hidden else 0)

    @property
    def variable_rate(self) -> bool:
        return self.quality_levels > 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Read what `to_json` wrote. Raises ValueError on unknown or missing fields."""
        try:
            fields: dict[str, Any] = json.loads(text)
            for key, value in fields.items():
                if isinstance(value, list):
                    fields[key] = tuple(value)
            for key in ("intra", "inter"):
                if fields.get(key) is not None:
                    fields[key] = AttentionConfig(**fields[key])
            return cls(**fields)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a model config of this version of mlic: {error}") from None


MLIC = ModelConfig(
    name="mlic",
    transform="residual",
    width=192,
    slices=(32,) * 6,
    z_channels=192,
    phi_h_channels=384,
    local="conv",
    intra=AttentionConfig(kind="softmax"),
)
MLIC_PLUS = ModelConfig(
    name="mlic+",
    transform="residual",
    width=192,
    slices=(32,) * 10,
    z_channels=192,
    phi_h_channels=640,
    local="window",
    intra=AttentionConfig(kind="softmax"),
    inter=AttentionConfig(kind="softmax"),
)
MLIC_PLUS_PLUS = dataclasses.replace(
    MLIC_PLUS, name="mlic++", intra=AttentionConfig(kind="linear"), inter=AttentionConfig(kind="linear")
)
FAST = ModelConfig(
    name="fast",
    transform="patch",
    width=192,
    coarse_width=256,
    depth=(5, 1),
    slices=(16, 32, 48, 96, 128, 128),
    z_channels=128,
    phi_h_channels=320,
    activation="leaky",
    channel_hidden=(128, 96),
    channel_out=None,
    local="conv3",
    intra=None,
    inter=None,
    hyper_hidden=40,
    step_hidden=64,
    parameters_hidden=(192, 128),
    lrp_hidden=(96, 64),
    lrp_kernels=(1, 3, 1),
    scale_form="log",
    error_bits=15.0,
    dependent=512,
    shifted=True,
    quality_levels=64,
    lambda_range=(0.0002, 0.15),
    padding="edge",
)
CONFIGS = {config.name: config for config in (FAST, MLIC, MLIC_PLUS, MLIC_PLUS_PLUS)}


def quality_of(model: str, code: int) -> float | None:
    """What a file's quality code is in 1..100; None for a model of one rate, and one that is not known by name.

    >>> quality_of("fast", 16128), quality_of("mlic", 65535)
    (100.0, None)
    """
    top = (CONFIGS[model].quality_levels - 1) * 256 if model in CONFIGS else -1
    return round(1 + 99 * code / top, 2) if code <= top else None
