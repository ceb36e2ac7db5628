"""What goes with each loss of `vision_train.py`: one line per method.

    temperature    none where the loss has none
    encoder        what the loss wants of `VisionEncoder`: a predictor, prototypes, rows that are not normalised
    loss           further options; a queue of 0 is one that can be asked for
    momentum       of the momentum encoder, for those that have one; papers have more of it, over far more steps
    schedule       of that momentum
    kind           its name in `gc_accel.losses.LOSSES`, if that is another

Views are drawn by the transform.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gc_accel import VisionEncoder
from gc_accel.data import simclr_transform, supcon_transform
from gc_accel.data.transforms import MultiView
from gc_accel.losses import LOSSES, MomentumEncoder
from gc_accel.losses.stateful.momentum import Schedule
from gc_accel.programs.command_line import option


class Recipe(NamedTuple):
    """What goes with a loss."""

    temperature: float | None = None
    encoder: Mapping[str, Any] = {}
    loss: Mapping[str, Any] = {}
    momentum: float | None = None
    schedule: Schedule = "cosine"
    transform: Callable[..., MultiView] = simclr_transform
    views: int = 2
    needs_labels: bool = False
    exits: tuple[str, ...] = ()  # of the built-in model
    kind: str | None = None


RAW = {"normalize": False}
PREDICTOR = {"head": "norm_mlp", "predictor": 512}

RECIPES = {
    "simclr": Recipe(0.2),
    "supcon": Recipe(0.1, transform=supcon_transform, needs_labels=True),
    "selfcon": Recipe(0.1, transform=supcon_transform, needs_labels=True, views=1, exits=("2",)),
    "dcl": Recipe(0.2),
    "align_uniform": Recipe(),
    "spectral": Recipe(encoder=RAW, loss={"mu": 10.0}),
    "hsic": Recipe(),
    "barlow": Recipe(encoder=RAW),
    "vicreg": Recipe(encoder=RAW),
    "swav": Recipe(0.1, encoder={"prototypes": 64}, loss={"queue_size": 0}),
    "nnclr": Recipe(0.1, encoder=PREDICTOR, loss={"queue_size": 1024}),
    "moco": Recipe(0.2, encoder=PREDICTOR, momentum=0.99),  # v3
    "moco_v2": Recipe(0.2, loss={"queue_size": 1024}, momentum=0.99, schedule="constant", kind="moco"),
    "byol": Recipe(encoder=PREDICTOR, momentum=0.99),
    "simsiam": Recipe(encoder=PREDICTOR),
}


@dataclass
class LossArguments:
    """What is minimised."""

    loss: str = option("simclr", "The loss.", choices=list(RECIPES))
    temperature: float | None = option(None, "Of the loss, if it has one; by default the recipe's.")
    queue_size: int | None = option(None, "Rows of the queue of NNCLR, MoCo v2 and SwAV.")
    momentum: float | None = option(None, "Of the momentum encoder of BYOL and MoCo.")


def make_loss(args: LossArguments, encoder: VisionEncoder) -> Any:
    """The loss by its recipe, around the encoder's prototypes, or a momentum encoder of it.

    Raises:
        ValueError: a flag is for other losses, or takes away the queue that the loss needs.
    """
    recipe = RECIPES[args.loss]
    options: dict[str, Any] = dict(recipe.loss)
    own = {
        "temperature": recipe.temperature,
        "momentum": recipe.momentum,
        "queue_size": options.get("queue_size"),
    }
    for name, default in own.items():
        asked = getattr(args, name)
        if asked is not None and default is None:
            raise ValueError(f"expected no --{name} for --loss {args.loss}, which has none, got {asked}")
        if default is not None:
            options[name] = default if asked is None else asked
    if recipe.loss.get("queue_size") and options["queue_size"] < 1:
        raise ValueError(
            f"expected a --queue_size of at least 1 for --loss {args.loss}, got {args.queue_size}: leave it out"
        )
    if recipe.momentum is not None:
        following: dict[str, Any] = {"momentum": options.pop("momentum"), "schedule": recipe.schedule}
        options["teacher"] = MomentumEncoder(encoder, **following)
    if options.get("queue_size"):
        options["dim"] = encoder.dim
        options |= {"prototypes": encoder.further["scores"]} if args.loss == "swav" else {}
    return LOSSES[recipe.kind or args.loss](**options)
