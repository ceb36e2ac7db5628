"""Look for suspects in what a direct step did."""

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from gc_accel.equivalence import suspects
from gc_accel.equivalence.errors import Gradients, loss_error
from gc_accel.equivalence.steps import Outcome, Steps
from gc_accel.equivalence.suspects import Suspect
from gc_accel.inputs.nested import slice_inputs
from gc_accel.state.graph import REENTRANT, leaves_and_nodes
from gc_accel.state.rng import RngState

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def in_forward(steps: Steps, direct: Outcome) -> list[Suspect]:
    """BatchNorm, other state that a forward changes, dropout, reentrant checkpointing."""
    suspected = []
    norms = [name for module, name in steps.state.names.items() if isinstance(module, _BatchNorm)]
    statistics = {f"{name}.{key}" if name else key for name in norms for key in STATISTICS}
    if steps.refused is not None:
        suspected.append(suspects.batch_norm(steps.refused))
    elif norms and steps.cache.batch_norms.policy == "ghost":
        suspected.append(suspects.ghost_batch_norm())
    if changed := [name for name in direct.changed if name not in statistics]:
        suspected.append(suspects.hidden_state(changed))
    if direct.drew:
        suspected.append(suspects.dropout())
    if REENTRANT in direct.nodes:
        suspected.append(suspects.reentrant_checkpointing())
    return suspected


def in_loss(steps: Steps, direct: Outcome, allowed: float) -> list[Suspect]:
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
    suspected = [suspects.loss_draws()] if drew else []
    leaves, _ = leaves_and_nodes(loss)
    names = {parameter: name for name, parameter in steps.parameters.items()}
    of_encoder = set(steps.cache.replicas.parameters)
    if read := sorted(names[leaf] for leaf in leaves if leaf in of_encoder):
        suspected.append(suspects.loss_reads_parameters(read))
    if not loss_error(again, loss) <= allowed:
        suspected.append(suspects.loss_reads_state())
    return suspected


def in_gradients(expected: Gradients) -> list[Suspect]:
    """Parameters that train without a gradient, or none with one."""
    missing = [name for name, grad in expected.items() if grad is None]
    suspected = [suspects.without_gradient(missing)] if missing else []
    return [*suspected, suspects.all_zero()] if all_zero(expected) else suspected


def all_zero(gradients: Gradients) -> bool:
    """Whether there is nothing to compare."""
    return not any(grad is not None and grad.count_nonzero() for grad in gradients.values())
