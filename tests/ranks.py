"""Run a function on several gloo ranks on this machine, with a hard time limit."""

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(
    fn: Callable[..., Any], world_size: int, folder: Path, *args: Any, timeout: float = 120
) -> list[Any]:
    """What `fn(rank, *args)` returned on each rank, inside a process group of that size."""
    context = mp.get_context("forkserver")  # whose server imports once for all ranks of all tests
    context.set_forkserver_preload(["gc_accel", fn.__module__])
    processes = [
        context.Process(target=_run, args=(fn, rank, world_size, str(folder), args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.exitcode is None:
            for each in processes:
                each.kill()
            raise TimeoutError(
                f"a rank of {world_size} still ran after {timeout} s: do all make the same collectives?"
            )
    results = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]
    for result in results:
        if isinstance(result, str):
            raise AssertionError(f"a rank failed:\n{result}")
    return [result["returned"] for result in results]


def _run(fn: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting", timedelta(seconds=60), world_size=world_size, rank=rank
    )
    assert dist.get_world_size() == world_size
    try:
        result: Any = {"returned": fn(rank, *args)}
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
