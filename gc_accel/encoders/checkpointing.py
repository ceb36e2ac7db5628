"""Gradient checkpointing inside a chunk, whatever the library that published the model calls it."""

from collections.abc import Mapping
from typing import Any

# transformers renamed it in 5.x and calls an encoder by either name; timm and open_clip have the third.
TRANSFORMERS_NAMES = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
OTHER_NAME = "set_grad_checkpointing"


class Checkpointing:
    """What `transformers.Trainer` calls on an encoder whose arguments ask for gradient checkpointing."""

    @property
    def published(self) -> Any:
        """The model inside the encoder."""
        raise NotImplementedError

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **placement: Any
    ) -> None:
        """Recompute activations inside each chunk instead of keeping them.

        Args:
            activation_checkpointing_kwargs: of `torch.utils.checkpoint.checkpoint`, for transformers' models.
            placement: `every_n_layers` and `offload`, for transformers' models.

        Raises:
            ValueError: for `use_reentrant=True`, which cannot sync once a step; for a model that cannot
                checkpoint, or not in that way.
        """
        options = {"use_reentrant": False} | dict(activation_checkpointing_kwargs or {})
        if options["use_reentrant"]:
            raise ValueError("expected use_reentrant=False, got True: several calls share one reduction")
        model = self.published
        wanted = {k: v for k, v in placement.items() if v != {"every_n_layers": 1, "offload": False}.get(k)}
        for name in TRANSFORMERS_NAMES:
            if enable := getattr(model, name, None):
                return enable(options, **wanted)
        if wanted or not hasattr(model, OTHER_NAME):
            raise ValueError(
                f"expected a model that can checkpoint {wanted or 'its layers'}, got {type(model).__name__}: "
                "leave that out"
            )
        getattr(model, OTHER_NAME)()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **placement: Any
    ) -> None:
        """The same, by the name that transformers used first."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **placement)
