"""Writing a figure as a PNG, whole or not at all."""

import os
from pathlib import Path

from matplotlib.figure import Figure

DPI = 150


def save_png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes `figure` to `path`, whose folder is made; when drawing raises, what was at `path` stays."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, as a rename is atomic only within one file system.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=DPI)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
