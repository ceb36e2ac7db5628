"""Time and peak memory of the losses, forward and backward, next to other implementations.

    python benchmarks/loss.py                                  # both tables of docs/benchmarks.md, 15 minutes
    python benchmarks/loss.py --sizes 4096 --memory_sizes      # the first column of the first one, a minute
    python benchmarks/loss.py --one clip 0 262144              # MiB and seconds of a single step, D = 64

Time is processor time of the one thread, counted in products: how many matrix products X Yᵀ of B x B x D,
D = 512, take as long. All contenders take turns in every round, each ratio is taken within its round, and the
table has the median. Memory is the peak of resident memory, each figure from a process of its own, because that
peak never falls, beyond what was there before and beyond the representations and their gradients.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss as OpenClipLoss
from open_clip.loss import SigLipLoss as OpenSigLipLoss
from torch import Tensor

from gc_accel.losses import CLIPLoss, NTXentLoss, SigLIPLoss, SupConLoss, dense
from gc_accel.losses.kernel.classes import class_sums
from gc_accel.memory.meters import peak_memory_mib

DIM = 512
MEMORY_DIM = 64
CLASSES = 1000
TEMPERATURE, BIAS = 0.07, -10.0  # the defaults of SupCon and, as scale and bias, of CLIP and SigLIP
WARM_UP = 1024  # allocates what any size needs: threads, buffers of the matrix library, one tile
Step = Callable[[], None]


def dense_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """As fast as one matrix can be: half the copies of the readable twin."""
    logits = (image * scale) @ text.T
    return (logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()).mean() / 2


def dense_supcon(views: Tensor, labels: Tensor) -> Tensor:
    """Likewise, without a matrix of positives. There are no orphans."""
    rows, (sums, counts, which) = views.flatten(0, 1), class_sums(views.sum(1), labels)
    others = 2 * counts.index_select(0, which).repeat_interleave(2) - 1
    siblings = sums.index_select(0, which).repeat_interleave(2, dim=0) - rows
    logits = (rows / TEMPERATURE) @ rows.T
    logits = logits.fill_diagonal_(-torch.inf)
    return (logits.logsumexp(1) - (rows * siblings).sum(1) / TEMPERATURE / others).mean()


PAIRS = {
    "CLIP, open_clip": OpenClipLoss(),
    "CLIP, one dense matrix": dense_clip,
    "CLIP": CLIPLoss(),
    "CLIP, budget 0": CLIPLoss(tile_budget=0),
}
BIASED = {"SigLIP, open_clip": OpenSigLipLoss(), "SigLIP": SigLIPLoss()}
VIEWS = {  # of B / 2 samples, so that there are B rows
    "SupCon, one dense matrix": dense_supcon,
    "SupCon": SupConLoss(),
    "SupCon, budget 0": SupConLoss(tile_budget=0),
}
LOSSES = (*PAIRS, *BIASED, *VIEWS)
BASELINES = ("CLIP, open_clip", "CLIP, one dense matrix", "SigLIP, open_clip", "SupCon, one dense matrix")
MEMORY = {
    "clip": lambda budget: CLIPLoss(tile_budget=budget),
    "siglip": lambda budget: SigLIPLoss(),
    "simclr": lambda budget: NTXentLoss(tile_budget=budget),
    "supcon": lambda budget: SupConLoss(tile_budget=budget),
    "dense": lambda budget: dense.clip_loss,
}


def representations(size: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random image and text representations `(size, dim)` and a logit scale, with gradients to come."""
    image, text = (F.normalize(torch.randn(size, dim), dim=1).requires_grad_() for _ in range(2))
    return image, text, torch.tensor([1 / TEMPERATURE], requires_grad=True)


def steps(size: int) -> dict[str, Step]:
    """What takes turns: one product, and a forward and backward pass of each loss."""
    image, text, scale = representations(size, DIM)
    views, labels = image.detach().view(size // 2, 2, DIM), torch.arange(size // 2) % CLASSES
    matrix = torch.empty(size, size)

    def product() -> None:
        torch.mm(image.detach(), text.detach().T, out=matrix)

    def of_pairs(loss: Callable[..., Tensor], *bias: Tensor) -> None:
        loss(*(each.detach().requires_grad_() for each in (image, text, scale, *bias))).backward()

    def of_views(loss: Callable[..., Tensor]) -> None:
        loss(views.detach().requires_grad_(), labels).backward()

    result = {"product": product}
    result |= {name: lambda loss=loss: of_pairs(loss) for name, loss in PAIRS.items()}
    bias = torch.tensor([BIAS])
    result |= {name: lambda loss=loss: of_pairs(loss, bias) for name, loss in BIASED.items()}
    result |= {name: lambda loss=loss: of_views(loss) for name, loss in VIEWS.items()}
    return result


def times(size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time of each contender in each round."""
    contenders = steps(size)
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, step in contenders.items():
            begin = time.thread_time()
            step()
            if number:  # the first round warms up
                found[name].append(time.thread_time() - begin)
    return found


def ratio(found: dict[str, list[float]], name: str, to: str) -> float:
    """The median over rounds of the time of one contender over that of another."""
    return median(a / b for a, b in zip(found[name], found[to], strict=True))


def print_times(sizes: list[int], rounds: list[int]) -> None:
    """The table of products, and below it how much faster the losses are than what they stand for."""
    found = {size: times(size, number) for size, number in zip(sizes, rounds, strict=True)}
    print("| products of B × B × 512 at B = | " + " | ".join(f"{size:,}" for size in sizes) + " |")
    print("|---" * (len(sizes) + 1) + "|")
    for name in LOSSES:
        print(f"| {name} | " + " | ".join(f"{ratio(found[n], name, 'product'):.2f}" for n in sizes) + " |")
    print("\n| times faster at B = | " + " | ".join(f"{size:,}" for size in sizes) + " |")
    print("|---" * (len(sizes) + 1) + "|")
    for name in LOSSES:
        for other in BASELINES:
            if name not in BASELINES and name.split(",")[0] == other.split(",")[0]:
                row = " | ".join(f"{ratio(found[n], other, name):.2f}" for n in sizes)
                print(f"| {name}, against {other} | {row} |")


def step_of(loss_name: str, tile_budget: int, size: int) -> float:
    """Forward and backward on `size` random rows of MEMORY_DIM; MiB of those and of their gradients."""
    loss = MEMORY[loss_name](tile_budget)
    if loss_name in ("simclr", "supcon"):
        rows = [F.normalize(torch.randn(size // 2, 2, MEMORY_DIM), dim=2).requires_grad_()]
        loss(rows[0], torch.arange(size // 2) % CLASSES).backward()
    else:
        *rows, scale = representations(size, MEMORY_DIM)
        loss(*rows, scale).backward()
    return sum(2 * each.nbytes for each in rows) / 2**20


def measure(loss_name: str, tile_budget: int, size: int) -> tuple[float, float]:
    """Peak in MiB beyond representations and their gradients, and seconds, of one step in this process."""
    torch.set_num_threads(1)
    step_of(loss_name, tile_budget, WARM_UP)
    before, begin = peak_memory_mib(torch.device("cpu")), time.perf_counter()
    inevitable = step_of(loss_name, tile_budget, size)
    return peak_memory_mib(torch.device("cpu")) - before - inevitable, time.perf_counter() - begin


def measure_apart(loss_name: str, tile_budget: int, size: int) -> float:
    """The peak, from a fresh process."""
    command = [sys.executable, __file__, "--one", loss_name, str(tile_budget), str(size)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200)
    return float(run.stdout.split()[0])


def print_memory(sizes: list[int]) -> None:
    """The table of peaks."""
    rows = {
        "CLIP, budget 0": ("clip", 0),
        "CLIP, budget 64 MiB": ("clip", 64 * 2**20),
        "SigLIP": ("siglip", 0),
        "NT-Xent, budget 0": ("simclr", 0),
        "SupCon, budget 0": ("supcon", 0),
    }
    print("\n| MiB at B = | " + " | ".join(f"{size:,}" for size in sizes) + " |")
    print("|---" * (len(sizes) + 1) + "|")
    print("| one B × B matrix | " + " | ".join(f"{size**2 / 2**18:,.0f}" for size in sizes) + " |")
    inevitable = (f"{4 * size * MEMORY_DIM / 2**18:,.0f}" for size in sizes)
    print("| two representations and their gradients | " + " | ".join(inevitable) + " |")
    for name, (loss, budget) in rows.items():
        print(f"| {name} | " + " | ".join(f"{measure_apart(loss, budget, n):,.0f}" for n in sizes) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[4096, 16384])
    parser.add_argument("--rounds", type=int, nargs="*", default=[11, 3], help="for each of the sizes")
    parser.add_argument("--memory_sizes", type=int, nargs="*", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument(
        "--one", nargs=3, metavar=("LOSS", "BUDGET", "SIZE"), help="one measurement of memory"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.one:
        loss, budget, size = args.one
        print(*measure(loss, int(budget), int(size)))
        return
    print_times(args.sizes, args.rounds[: len(args.sizes)])
    if args.memory_sizes:
        print_memory(args.memory_sizes)


if __name__ == "__main__":
    main()
