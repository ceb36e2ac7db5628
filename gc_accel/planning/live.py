"""How many bytes of tensors are alive: counted as they are made and freed, whether they hold values or not.

A dispatch mode sees the result of every operation, forward and backward. Each new storage is counted once, with
all views of it, until nothing refers to it any more. On fake tensors, which have shapes but no values, that is
the memory of a step that nobody has to run: autograd keeps and frees them as it would real ones.

Not seen is what an operation uses inside and has freed when it returns, such as a convolution's workspace.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors that were made in its context and are still alive.

    Args:
        known: tensors that were there before, whose views do not count.

    Attributes:
        now: bytes alive.
        peak: the largest `now` so far, or since `restart`.

    Example:
        >>> with LiveBytes(model.parameters()) as live:
        ...     model(inputs).sum().backward()
        >>> live.peak
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        # By identity of the storage, of which torch hands out one and the same Python object while it is alive.
        self.counted = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._count(each)
        return result

    def restart(self) -> None:
        """Forget the peak."""
        self.peak = self.now

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.counted:
            return
        self.counted.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, nbytes: int) -> None:
        self.now -= nbytes
