"""What an autograd graph holds: the tensors that it ends in, and the kinds of its nodes."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

REENTRANT = "CheckpointFunctionBackward"  # the node of torch.utils.checkpoint with use_reentrant=True


def leaves_and_nodes(output: Tensor) -> tuple[list[Tensor], frozenset[str]]:
    """The leaves that `output` depends on, and the names of the nodes on the way to them."""
    leaves, names = list[Tensor](), set[str]()
    seen, waiting = set[Any](), [output.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(node.name())
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return leaves, frozenset(names)


def leaves_of(outputs: Iterable[Tensor]) -> list[Tensor]:
    """The leaves that any of some outputs depends on."""
    return [leaf for output in outputs for leaf in leaves_and_nodes(output)[0]]
