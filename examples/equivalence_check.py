"""A batch of 64 in chunks of 16: is it the same training as without a cache? The whole experiment.

    python examples/equivalence_check.py --output_dir outputs/equivalence

A CLIP image tower and a CLIP text tower, each with a projection head of its own, learn the handwritten numbers
from the same weights and batches in four ways:

    direct        one graph over 64
    cached        chunks of 16, gradient cache
    accumulated   wrong: chunks of 16, each with its own loss, gradients added up
    diagonal      wrong: a cache, but the loss sees each chunk's representations alone

once with an unnormalised dot-product loss and once with CLIP's, in float64 and float32, from several seeds.
Written: equivalence.json with every curve and the error of every gradient, equivalence.md with the table, and
equivalence.png. In `docs/exactness.md` it is explained why they come out as they do.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from equivalence_ways import LOSSES, WAYS, Batch, TwoTowers, encode
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import set_seed

from gc_accel import check_equivalence
from gc_accel.data import HandwrittenNumbers, ImageTextCollator, numbers_config, numbers_processor
from gc_accel.data.builtin.scans import Split
from gc_accel.equivalence.errors import gradient_errors
from gc_accel.evaluation import linear_probe_accuracy, retrieval_metrics
from gc_accel.pictures.ways import ways_figure, ways_table
from gc_accel.programs.command_line import option, parse
from gc_accel.programs.cores import use_all_cores

DIGITS, IMAGE_SIZE = 3, 24


@dataclass
class Arguments:
    """The experiment; the defaults are those of the published table."""

    output_dir: str = option("outputs/equivalence", "Where table, figure and numbers are written.")
    batch_size: int = option(64, "Samples that the loss sees.")
    chunk_size: int = option(16, "Samples that the encoder sees at once.")
    steps: int = option(120, "Optimizer steps of each run.")
    seeds: int = option(3, "Runs of each kind, with weights and batches of their own.")
    learning_rate: float = option(1e-3, "Of AdamW, constant.")
    width: int = option(64, "Of the image tower; `numbers_config` says what the text tower has.")
    layers: int = option(2, "Of each tower.")
    train_size: int = option(4096, "Images to train on.")
    eval_size: int = option(300, "Images, all of different numbers, for retrieval and for the probe.")
    probe_size: int = option(1500, "Training images that the linear probe learns from.")


@dataclass(frozen=True)
class Run:
    """What one training gave, and how far it is from the direct one with the same seed."""

    dtype: str
    loss: str
    way: str
    seed: int
    curve: list[float]  # loss of the whole batch before each step
    gradient_errors: dict[str, float]  # at step 0
    distance: float  # of the final weights, over the distance that direct training covers
    retrieval: float  # R@1, mean of both directions
    probe: float  # accuracy of a linear layer on the leading digit


@dataclass(frozen=True)
class Data:
    """Training images and test images as batches of tensors, and the leading digits of their numbers."""

    train: Batch
    test: Batch
    train_digits: Tensor
    test_digits: Tensor

    @classmethod
    def read(cls, args: Arguments) -> "Data":
        collate = ImageTextCollator(numbers_processor(image_size=IMAGE_SIZE))
        collate.padding = "max_length"  # one width for all, so that batches can be drawn from one tensor
        found = []
        parts: tuple[tuple[Split, int], ...] = (("train", args.train_size), ("test", args.eval_size))
        for part, size in parts:
            images = HandwrittenNumbers(part, size=size, digits=DIGITS, image_size=IMAGE_SIZE)
            batch = dict(collate([images[i] for i in range(size)]) or {})
            digits = batch.pop("labels") // 10 ** (DIGITS - 1)
            found.append((batch | {"pixel_values": batch["pixel_values"] / 127.5 - 1}, digits))
        (train, train_digits), (test, test_digits) = found
        return cls(train, test, train_digits, test_digits)

    def to(self, dtype: torch.dtype) -> "Data":
        train, test = (
            {**each, "pixel_values": each["pixel_values"].to(dtype)} for each in (self.train, self.test)
        )
        return replace(self, train=train, test=test)

    def batches(self, args: Arguments, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(args.steps):
            rows = torch.randperm(args.train_size, generator=generator)[: args.batch_size]
            yield {key: value[rows] for key, value in self.train.items()}


def build(args: Arguments, loss: str, seed: int) -> TwoTowers:
    """A model with the weights of a seed."""
    set_seed(seed)
    config = numbers_config(image_size=IMAGE_SIZE, width=args.width, layers=args.layers, heads=4)
    return TwoTowers(config, normalize=loss == "CLIP").train()


def judge(model: TwoTowers, data: Data, probe_size: int) -> dict[str, float]:
    """Retrieval between all test pairs, and the linear probe."""
    model.eval()
    with torch.no_grad():
        reps = encode(model, data.test)
        known = model.features({"pixel_values": data.train["pixel_values"][:probe_size]})
        features = model.features({"pixel_values": data.test["pixel_values"]})
    recall = retrieval_metrics(reps["image"], reps["text"])
    probe = linear_probe_accuracy(known, data.train_digits[:probe_size], features, data.test_digits)
    return {
        "retrieval": (recall["image_to_text_r1"] + recall["text_to_image_r1"]) / 2,
        "probe": probe.last,
    }


def compare_ways(args: Arguments, data: Data, dtype: torch.dtype, loss: str, seed: int) -> Iterator[Run]:
    """Train in every way from the same weights on the same batches, directly first."""
    reference: dict[str, Any] = {}
    data = data.to(dtype)
    for way, step in WAYS.items():
        model = build(args, loss, seed).to(dtype)
        start = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
        curve, grads = [], dict[str, Tensor | None]()
        for batch in data.batches(args, seed):
            curve.append(float(step(model, LOSSES[loss], batch, args.chunk_size)))
            grads = grads or {name: p.grad for name, p in model.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
        end = nn.utils.parameters_to_vector(model.parameters()).detach()
        reference = reference or {"grads": grads, "end": end, "covered": (end - start).norm()}
        yield Run(
            dtype=str(dtype).removeprefix("torch."),
            loss=loss,
            way=way,
            seed=seed,
            curve=curve,
            gradient_errors=gradient_errors(grads, reference["grads"]),
            distance=float((end - reference["end"]).norm() / reference["covered"]),
            **judge(model, data, args.probe_size),
        )


def main() -> None:
    """Check one step, train in all ways, write."""
    (args,) = parse(Arguments)
    use_all_cores()
    output, data = Path(args.output_dir), Data.read(args)
    for loss, loss_fn in LOSSES.items():
        batch = next(data.to(torch.float64).batches(args, 0))
        print(
            f"{loss}: {check_equivalence(build(args, loss, 0).double(), loss_fn, batch, args.chunk_size)}\n"
        )
    kinds = [(d, n, s) for n in LOSSES for d in (torch.float64, torch.float32) for s in range(args.seeds)]
    runs = list[dict[str, Any]]()
    with tqdm(total=len(kinds) * len(WAYS)) as bar:
        for kind in kinds:
            for run in compare_ways(args, data, *kind):
                runs.append(asdict(run))
                bar.set_postfix_str(f"{run.loss}, {run.dtype}, seed {run.seed}, {run.way}")
                bar.update()
    output.mkdir(parents=True, exist_ok=True)
    (output / "equivalence.json").write_text(json.dumps({"arguments": asdict(args), "runs": runs}) + "\n")
    (output / "equivalence.md").write_text(ways_table(runs))
    ways_figure(runs, output / "equivalence.png")
    print(f"{ways_table(runs)}\nWritten to {output}: equivalence.json, equivalence.md, equivalence.png")


if __name__ == "__main__":
    main()
