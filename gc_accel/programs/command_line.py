"""How programs begin, with arguments read from flags or from one file, and how they end on any number of ranks."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from transformers import HfArgumentParser

from gc_accel.training.options import option

__all__ = ["option", "parse", "run"]
LAST_WORKS = 1.0  # seconds that gloo's threads need, as measured (docs/log.md)


def parse(*kinds: type) -> tuple[Any, ...]:
    """Read one instance of each argument dataclass, from the command line or from the one YAML or JSON file on it."""
    parser = HfArgumentParser(kinds)
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(sys.argv[1])
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


def run(main: Callable[[], None]) -> None:
    """Run the whole of a program, on any number of ranks. The program finishes its trackers by itself.

    Gloo's threads need the interpreter to let go of the tensors of the last collective. Python ends a thread that asks
    for the interpreter while that goes down, and C++ then aborts the process ("terminate called without an active
    exception"). Nothing can wait for these threads: they live as long as the process group, which default arguments of
    libraries hold. So they are given the interpreter for a moment.
    """
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(LAST_WORKS)
