"""The outcome of a check: an aligned table to print, JSON and a picture to keep."""

import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gc_accel.equivalence.errors import order
from gc_accel.equivalence.suspects import Suspect

SHOWN = 10  # parameters in the table
WIDTH = 100


@dataclass(frozen=True)
class EquivalenceReport:
    """How far a cached step is from its reference.

    Attributes:
        parameters: relative error of each parameter's gradient, the largest first; see
            `gc_accel.equivalence.errors` for the measure.
        loss: of the cached step.
        loss_difference: from the reference, relative where the loss is above 1.
        representation_difference: largest difference of a representation between the two passes, relative.
        suspects: what makes steps differ, found on this model, with remedies.
        tolerance: the largest error that counts as equal.
        reference: what the cached step was compared with.
        compared: whether there was a cached step to compare; BatchNorm and static_graph are refused by it.
        batch_size, chunk_size, precision: of the check.
    """

    parameters: Mapping[str, float]
    loss: float
    loss_difference: float
    representation_difference: float
    suspects: Sequence[Suspect]
    tolerance: float
    reference: str
    compared: bool
    batch_size: int
    chunk_size: int | Mapping[str, int]
    precision: str

    @property
    def max_relative_error(self) -> float:
        """The largest error of a gradient; NaN if there was none to compare."""
        return next(iter(self.parameters.values()), float("nan"))

    @property
    def ok(self) -> bool:
        """Whether a cached step was taken and no difference exceeds the tolerance."""
        largest = (self.max_relative_error, self.loss_difference, self.representation_difference)
        return self.compared and all(error <= self.tolerance for error in largest)

    def __str__(self) -> str:
        rows = [
            ("loss", self.loss_difference),
            ("representations, second pass", self.representation_difference),
            *list(self.parameters.items())[:SHOWN],
        ]
        if hidden := list(self.parameters.values())[SHOWN:]:
            rows.append((f"{len(hidden)} more parameters, at most", hidden[0]))
        width = max(len(name) for name, _ in rows)
        lines = [self.title, *(f"  {name:<{width}}  {error:8.1e}" for name, error in rows), self.verdict]
        for suspect in self.suspects:
            text = f"{suspect.name}: {suspect.finding}. Remedy: {suspect.remedy}."
            lines += textwrap.wrap(text, WIDTH, initial_indent="* ", subsequent_indent="  ")
        return "\n".join(lines)

    @property
    def title(self) -> str:
        """What was compared with what."""
        sizes = self.chunk_size
        chunks = sizes if isinstance(sizes, int) else ", ".join(f"{n} ({name})" for name, n in sizes.items())
        step = "cached step" if self.compared else "no cached step"
        return f"{step}, batch of {self.batch_size} in chunks of {chunks}, against {self.reference}, {self.precision}"

    @property
    def verdict(self) -> str:
        """Whether they are equal, with the largest error."""
        worst = max(
            (self.max_relative_error, self.loss_difference, self.representation_difference), key=order
        )
        if not self.compared:
            return "NOT COMPARED, for the reason below"
        return (
            f"{'equal' if self.ok else 'NOT EQUAL'}: largest error {worst:.1e}, allowed {self.tolerance:.1e}"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to `path` with the suffix .json and a picture of it with .png, each whole or not at all.

        Args:
            path: with or without one of these suffixes; its folder is made.
        """
        from gc_accel.pictures.errors import error_chart  # matplotlib, which training does without

        target = Path(path)
        target = target.with_suffix("") if target.suffix in (".json", ".png") else target
        target.parent.mkdir(parents=True, exist_ok=True)
        content = {"ok": self.ok, "max_relative_error": self.max_relative_error, **asdict(self)}
        text = json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text)
            os.replace(temporary, f"{target}.json")
        finally:
            temporary.unlink(missing_ok=True)
        notes = [f"{suspect.name}: {suspect.remedy}" for suspect in self.suspects]
        title = f"{self.title}\n{self.verdict}"
        error_chart(self.parameters, f"{target}.png", tolerance=self.tolerance, title=title, notes=notes)


def _finite(value: Any) -> Any:
    """The value with None for NaN and infinity, of which JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
