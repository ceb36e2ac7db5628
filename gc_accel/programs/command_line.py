"""How programs begin and end: dataclasses of arguments, read from flags or from one file, and the last of gloo."""

import sys
import time
from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch.distributed as dist
from transformers import HfArgumentParser

LAST_WORKS = 1.0  # seconds, as measured (docs/log.md)


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


def run(main: Callable[[], None]) -> None:
    """The whole of a program on any number of ranks, which finishes its trackers by itself.

    Gloo's threads need the interpreter to let go of the tensors of the last collective. Python ends a thread that asks
    for the interpreter while that goes down, and C++ then aborts the process ("terminate called without an active
    exception"). Nothing can wait for these threads: they live as long as the process group, which default arguments of
    libraries hold. So they are given the interpreter for a moment.
    """
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(LAST_WORKS)
