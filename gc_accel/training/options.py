"""A field of an argument dataclass, for the trainer and for programs."""

from dataclasses import field
from typing import Any


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A field of an argument dataclass with its help, and with its `choices` where it has some."""
    return field(default=default, metadata={"help": text, **metadata})
