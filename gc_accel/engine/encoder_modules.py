"""The modules that an encoder computes with: its own parts, or, of a function, those that it calls.

A function does not say which modules it calls. They are met by a hook, each right before it computes: in time to refuse
its BatchNorm layers, to note what a step will change in it, and to learn where it is.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from gc_accel.distributed import Replicas
from gc_accel.distributed.replicas import refuse_hidden_ddp
from gc_accel.engine.batch_norm import BatchNorms
from gc_accel.inputs.nested import Inputs, call
from gc_accel.state.graph import leaves_of
from gc_accel.state.modules import first_called, meeting
from gc_accel.state.rng import CPU, device_in_use
from gc_accel.state.snapshot import Snapshot


class EncoderModules:
    """What a step looks at in an encoder, and notes of it.

    Args:
        replicas, batch_norms: of the encoder.
    """

    def __init__(self, replicas: Replicas, batch_norms: BatchNorms) -> None:
        self.replicas, self.batch_norms = replicas, batch_norms
        self.is_function = not isinstance(replicas.model, nn.Module)
        self.knows_device = not self.is_function or replicas.accelerator is not None

    def begin_step(self, snapshot: Snapshot) -> None:
        """Look at the layers of a module, and note what a step will change in it.

        Raises:
            ValueError: see `BatchNorms`.
        """
        self.snapshot = snapshot
        if not self.is_function and not self.replicas.sharded:
            snapshot.note(self.replicas.model)
        self.batch_norms.begin_step()

    @contextmanager
    def met(self, encoder: Callable[..., Any], inputs: Callable[[], Inputs]) -> Iterator[None]:
        """A block in which the modules behind a function are met.

        Args:
            encoder: the function.
            inputs: what it will be called with, by which its device is found.
        """
        if not self.is_function:
            yield
            return
        if not self.knows_device and device_in_use() != CPU:
            module = first_called(partial(call, encoder, inputs()))
            self.replicas.device = next(module.parameters()).device if module else device_in_use()
            self.knows_device = True
        with meeting(self._meet):
            yield

    def note_gradients(self, outputs: Iterable[Tensor]) -> None:
        """Of a function, note the gradients that a backward pass of its outputs will change."""
        if self.is_function:
            self.snapshot.note_gradients(leaves_of(outputs))

    def weights(self) -> list[Tensor]:
        """Those that train; of a function those of the modules that it has called in this step."""
        weights = self.snapshot.grads if self.is_function else self.replicas.parameters
        return [weight for weight in weights if weight.requires_grad]

    def called(self) -> Iterable[nn.Module]:
        """All parts; of a function those that it has called in this step."""
        return self.snapshot.modules if self.is_function else self.replicas.model.modules()

    def check_known(self, outputs: Iterable[Tensor], weights: Iterable[Tensor]) -> None:
        """Raise ValueError if outputs were computed with weights that are not among these."""
        others = set(leaves_of(outputs)) - set(weights)
        # A module may mark what it has computed as a leaf, as some do where they checkpoint.
        if others := {leaf for leaf in others if self.is_function or isinstance(leaf, nn.Parameter)}:
            raise ValueError(
                "expected an encoder whose weights belong to modules that it has called in cache(batch), got others, "
                f"of shapes {[tuple(leaf.shape) for leaf in others]}: have such a module hold them"
            )

    def _meet(self, module: nn.Module) -> None:
        if module not in self.snapshot.modules:
            refuse_hidden_ddp(module)
            self.batch_norms.meet(module)
            self.snapshot.note(module)
