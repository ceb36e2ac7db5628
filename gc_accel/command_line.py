"""Arguments of programs: dataclasses whose fields carry their help, read from flags or from one file."""

import sys
from dataclasses import field
from typing import Any

from transformers import HfArgumentParser


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A field of an argument dataclass with its help, and with its `choices` where it has some."""
    return field(default=default, metadata={"help": text, **metadata})


def parse(*kinds: type) -> tuple[Any, ...]:
    """One instance of each argument dataclass, from the command line, or from the one YAML or JSON file on it."""
    parser = HfArgumentParser(kinds)
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(sys.argv[1])
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()
