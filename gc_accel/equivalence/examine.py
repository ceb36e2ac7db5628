"""Look for suspects in what a direct step did."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gc_accel.equivalence import suspects
from gc_accel.equivalence.errors import Gradients, loss_error
from gc_accel.equivalence.steps import Step, Steps
from gc_accel.equivalence.suspects import Suspect
from gc_accel.gradient_cache import GradientCache
from gc_accel.inputs.nested import slice_inputs
from gc_accel.state.graph import REENTRANT, leaves_and_nodes
from gc_accel.state.rng import RngState

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def refusal(cache: GradientCache) -> str | None:
    """What a cached step says against the BatchNorm layers of the encoder, if anything."""
    if cache.batch_norms.policy == "error":
        try:
            cache.batch_norms.begin_step()
        except ValueError as error:
            return str(error)
    return None


def in_forward(steps: Steps, direct: Step, refused: str | None) -> list[Suspect]:
    """BatchNorm, other state that a forward changes, dropout, reentrant checkpointing."""
    found = []
    norms = [name for module, name in steps.state.names.items() if isinstance(module, _BatchNorm)]
    statistics = {f"{name}.{key}" if name else key for name in norms for key in STATISTICS}
    if refused is not None:
        found.append(suspects.batch_norm(refused))
    elif norms and steps.cache.batch_norms.policy == "ghost":
        found.append(suspects.ghost_batch_norm())
    if changed := [name for name in direct.changed if name not in statistics]:
        found.append(suspects.hidden_state(changed))
    if direct.drew:
        found.append(suspects.dropout())
    if REENTRANT in direct.nodes:
        found.append(suspects.reentrant_checkpointing())
    return found


def in_loss(steps: Steps, direct: Step, allowed: float) -> list[Suspect]:
    """A loss that is not a function of the representations alone.

    It is taken twice, of the same representations and from the same random numbers; in between the encoder
    sees other inputs. Every rank makes the same calls.
    """
    outputs = {name: output.clone().requires_grad_() for name, output in direct.outputs.items()}
    start = RngState.current(steps.cache.replicas.device)
    loss = steps.loss(outputs, direct.taught)
    drew = not start.is_current()
    with torch.no_grad():
        steps.encode([slice_inputs(steps.inputs, 0, 2)])
    with start.replayed():
        again = steps.loss(outputs, direct.taught)
    found = [suspects.loss_draws()] if drew else []
    leaves, _ = leaves_and_nodes(loss)
    names = {parameter: name for name, parameter in steps.parameters.items()}
    own = _own_parameters(steps.cache.model)
    if read := sorted(names[leaf] for leaf in leaves if leaf in own):
        found.append(suspects.loss_reads_parameters(read))
    if not loss_error(again, loss) <= allowed:
        found.append(suspects.loss_reads_state())
    return found


def in_gradients(expected: Gradients) -> list[Suspect]:
    """Parameters that train without a gradient, or none with one."""
    missing = [name for name, grad in expected.items() if grad is None]
    found = [suspects.without_gradient(missing)] if missing else []
    return [*found, suspects.all_zero()] if all_zero(expected) else found


def all_zero(gradients: Gradients) -> bool:
    """Whether there is nothing to compare."""
    return not any(grad is not None and grad.count_nonzero() for grad in gradients.values())


def _own_parameters(model: Any) -> set[Tensor]:
    return set(model.parameters()) if isinstance(model, nn.Module) else set()
