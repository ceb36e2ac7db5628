"""Processor cores of this machine, shared among the processes of a run on the CPU."""

import os
import sys

import torch


def use_all_cores() -> None:
    """Let torch use every core that falls to this process.

    `accelerate launch` sets `OMP_NUM_THREADS=1` for processes on a CPU unless it is told
    `--num_cpu_threads_per_process`. A value other than 1 is left as it is; to have one thread, give the
    process one core (`taskset`).
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # Linux says which cores this process may use, which can be fewer than the machine has.
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // processes))
