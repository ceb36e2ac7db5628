"""What makes a cached step differ from a direct one, or look as if it did, and what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

SHOWN = 6  # names in a finding


@dataclass(frozen=True)
class Suspect:
    """Something about a model, a loss or a configuration, and its remedy."""

    name: str
    finding: str
    remedy: str


def batch_norm(refusal: str) -> Suspect:
    return Suspect(
        "BatchNorm",
        f"the cached step refuses the encoder: {refusal}. The errors here are those of the same chunks in one "
        "graph against the batch in one",
        'batch_norm="frozen" (exact), batch_norm="ghost" (exact for the chunks), GroupNorm or LayerNorm instead, or '
        "a head with BatchNorm behind the cut",
    )


def ghost_batch_norm() -> Suspect:
    return Suspect(
        "BatchNorm",
        "layers normalise each chunk by its own statistics, as batch_norm='ghost' asks for, so it was compared "
        "against the same chunks in one graph",
        "none needed if that is what you want; batch_norm='frozen' gives the gradient of the whole batch",
    )


def dropout() -> Suspect:
    return Suspect(
        "dropout",
        "the forward draws random numbers (dropout, stochastic depth, patch dropout), and chunks draw other masks "
        "than the whole batch. Both passes of the cache see the same masks, so it was compared against the same "
        "chunks and masks in one graph",
        "none needed: the gradient is exact for the masks that were drawn. To compare with the whole batch, set "
        "the rates to zero or call .eval()",
    )


def without_gradient(names: Sequence[str]) -> Suspect:
    return Suspect(
        "no_gradient",
        f"{_listed(names)} train by their setting, yet neither step gives them a gradient",
        "freeze them with requires_grad_(False) if they have no part in the loss; under DDP they need "
        "find_unused_parameters=True. If they should have one, look for no_grad, detach, or reentrant "
        "checkpointing of inputs that need no gradient",
    )


def all_zero() -> Suspect:
    return Suspect(
        "nothing_compared",
        "every gradient is zero, and the comparison of zeros proves nothing",
        "check with a batch of at least two different samples",
    )


def autocast(precision: torch.dtype, allowed: float) -> Suspect:
    name = str(precision).removeprefix("torch.")
    return Suspect(
        "autocast",
        f"the encoder computes in {name}, in which gradients that are added up chunk by chunk round otherwise than "
        f"those of the batch; errors up to {allowed:.0e} are that",
        "to see that the step itself is exact, check once without mixed precision, best on encoder.double() with "
        "inputs in float64; encode in one precision whether or not a graph is kept",
    )


def hidden_state(names: Sequence[str]) -> Suspect:
    return Suspect(
        "hidden_state",
        f"a forward changes {_listed(names)}; a cached step calls it twice per chunk, so the second pass may see "
        "another model than the first, and what is counted or averaged moves on at another pace",
        "update such state once per step, outside of forward; put modules that keep statistics in eval mode",
    )


def loss_draws() -> Suspect:
    return Suspect(
        "loss",
        "the loss draws random numbers, so it is not a function of the representations; on several ranks each "
        "draws others, and their shares do not add up to one loss",
        "draw them before the step and pass them to the loss by keyword, or from a generator with a fixed seed",
    )


def loss_reads_parameters(names: Sequence[str]) -> Suspect:
    return Suspect(
        "loss",
        f"the loss reads {_listed(names)} of the encoder, past the representations; on several ranks that part of "
        "the gradient is never reduced",
        "return it from the encoder and declare it there as one of its `global_names`, as DualEncoder does with "
        "the logit scale",
    )


def loss_reads_state() -> Suspect:
    return Suspect(
        "loss",
        "the loss of the same representations changes when the encoder is called in between or when it is taken "
        "twice: it reads something that a forward leaves behind, which in a cached step is that of one chunk",
        "return whatever the loss needs from the encoder as a representation, or pass it to the loss by keyword",
    )


def static_graph() -> Suspect:
    return Suspect(
        "static_graph",
        "DistributedDataParallel has static_graph=True, which takes every call for a repetition of the first; a "
        "cached step calls the encoder in several ways. The cached step refuses it, so nothing was compared",
        "build it with find_unused_parameters=True and without static_graph",
    )


def reentrant_checkpointing() -> Suspect:
    return Suspect(
        "reentrant_checkpointing",
        "the encoder checkpoints activations with use_reentrant=True, which hides parameters from the graph: on "
        "several ranks gradients are reduced at the wrong call, and inputs that need no gradient lose all of it",
        'checkpoint with use_reentrant=False (gradient_checkpointing_kwargs={"use_reentrant": False})',
    )


def padding(paths: Sequence[str]) -> Suspect:
    return Suspect(
        "padding",
        f"{_listed(paths)} are as wide as the longest sample of each chunk, and padding changes the outcome",
        "pass an attention mask, or pad every chunk to one length",
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
