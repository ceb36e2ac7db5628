"""Loops that know nothing of a gradient cache: `loss = cache(batch)` in each of them trains as the full batch does.

Every batch says which samples it has, so the reference makes the same optimizer steps, whoever shuffles and shards.
"""

import os
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel, BertTokenizer, Trainer, TrainingArguments

from gc_accel import GradientCache
from gc_accel.losses import SigLIPLoss, dense
from tests.comparing import assert_equal, gradients
from tests.models import TEXT, dual_encoder, image_text_batch
from tests.ranks import run_on_ranks
from tests.topologies import DDP_2, ONE_PROCESS, accelerator_for, forget_accelerators

SIZE, BATCH, ACCUMULATED, CHUNK = 48, 6, 2, 2  # whole optimizer steps in an epoch, on two ranks too
RATE = 0.3  # at which the gradient of every step matters to the weights
Seen = list[list[int]]  # the samples of every batch of one rank


class Pairs(torch.utils.data.Dataset):
    """Images and captions, and which one it is."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        batch = image_text_batch(SIZE)
        self.columns = batch | {"pixel_values": batch["pixel_values"].to(dtype), "index": torch.arange(SIZE)}

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


def noted(batch: dict[str, Any], seen: Seen) -> dict[str, Any]:
    """A batch without its indices, which are noted."""
    seen.append(batch["index"].tolist())
    return {name: value for name, value in batch.items() if name != "index"}


def weights(encoder: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}


def full_batch(encoder: Any, indices: list[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    batch = {name: column[indices] for name, column in Pairs(dtype).columns.items()}
    return dense.siglip_loss(
        **encoder(
            image={"pixel_values": batch["pixel_values"]},
            text={"input_ids": batch["input_ids"]},
        )
    )


def assert_trained_as_the_full_batch(ranks: list[tuple[Seen, dict[str, torch.Tensor]]]) -> None:
    """One process with the samples of all ranks in one graph, and the same optimizer steps."""
    batches = [[*chain(*parts)] for parts in zip(*(seen for seen, _ in ranks), strict=True)]
    assert len(batches) >= 2 * ACCUMULATED
    assert all(len(set(batch)) == BATCH * len(ranks) for batch in batches), "ranks hold different data"
    encoder = dual_encoder("siglip")
    start, optimizer = weights(encoder), torch.optim.SGD(encoder.parameters(), lr=RATE)
    for first in range(0, len(batches), ACCUMULATED):
        optimizer.zero_grad()
        step = batches[first : first + ACCUMULATED]
        for batch in step:
            (full_batch(encoder, batch) / len(step)).backward()
        optimizer.step()
    expected = {name: value - start[name] for name, value in weights(encoder).items()}
    assert float(expected["model.logit_scale"].abs()) > 1e-4
    for _, after in ranks:
        assert_equal({name: after[name] - start[name] for name in start}, expected)


Loop = Callable[[str], tuple[Seen, dict[str, torch.Tensor]]]


def an_accelerate_loop(topology: str) -> tuple[Seen, dict[str, torch.Tensor]]:
    accelerator = accelerator_for(topology, gradient_accumulation_steps=ACCUMULATED)
    model, seen = dual_encoder("siglip"), list[list[int]]()
    loader = DataLoader(Pairs(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))
    encoder, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=RATE), loader
    )
    cache = GradientCache(encoder, SigLIPLoss(), CHUNK, accelerator)
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(encoder):
                loss = cache(noted(batch, seen))
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    return seen, weights(model)


class CachedTrainer(Trainer):
    """A trainer of transformers with a loss of its own."""

    cache: Any = None
    seen: Any = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.cache is None:
            self.cache, self.seen = GradientCache(model, SigLIPLoss(), CHUNK), []
        loss = self.cache(noted(inputs, self.seen))
        return (loss, {}) if return_outputs else loss


def a_trainer(folder: Any, **options: Any) -> CachedTrainer:
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATED,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "num_train_epochs": 2,
        "dataloader_pin_memory": False,
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return CachedTrainer(
        dual_encoder("siglip"),
        TrainingArguments(**(arguments | options)),
        train_dataset=Pairs(),
        eval_dataset=Pairs(),
        data_collator=torch.utils.data.default_collate,
    )


def a_trainer_of_transformers(topology: str, folder: Any = "unused") -> tuple[Seen, dict[str, torch.Tensor]]:
    accelerator_for(topology)  # the environment of a rank
    trainer = a_trainer(folder)
    assert trainer.args.world_size == {ONE_PROCESS: 1, DDP_2: 2}[topology]
    trainer.train()
    return trainer.seen, weights(trainer.model)


class Module(lightning.LightningModule):
    """A module of Lightning, with automatic optimisation."""

    def __init__(self, dtype: torch.dtype = torch.float64, rate: float = RATE) -> None:
        super().__init__()
        self.encoder = dual_encoder("siglip").to(dtype)
        self.cache = GradientCache(self.encoder, SigLIPLoss(), CHUNK, retain=0)
        self.rate, self.seen = rate, list[list[int]]()
        self.autocasts = list[bool]()

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.cache(noted(batch, self.seen))

    def on_before_backward(self, _: torch.Tensor) -> None:
        self.autocasts.append(torch.is_autocast_enabled("cpu"))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class Validated(Module):
    """With a validation step, of which Lightning wants a loader too."""

    def __init__(self) -> None:
        super().__init__()
        self.validated = list[torch.Tensor]()

    def validation_step(self, batch: Any, _: int) -> None:
        self.validated.append(self.cache(noted(batch, [])))


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def a_lightning_loop(topology: str) -> tuple[Seen, dict[str, torch.Tensor]]:
    module, options = Module(), dict[str, Any](devices=1)
    if topology == DDP_2:
        rank = str(dist.get_rank())
        os.environ |= {"LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
        options = {"devices": 2, "strategy": "ddp"}
    trainer = lightning.Trainer(
        max_epochs=2, accumulate_grad_batches=ACCUMULATED, num_sanity_val_steps=0, **QUIET, **options
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        warnings.filterwarnings(
            "ignore", ".*number of training batches .* is smaller than the logging interval"
        )
        trainer.fit(module, DataLoader(Pairs(), BATCH, shuffle=True))
    assert trainer.world_size == {ONE_PROCESS: 1, DDP_2: 2}[topology]
    return module.seen, weights(module.encoder)


LOOPS: dict[str, Loop] = {
    "accelerate": an_accelerate_loop,
    "transformers": a_trainer_of_transformers,
    "lightning": a_lightning_loop,
}


@pytest.fixture(autouse=True)
def accelerators():
    yield
    forget_accelerators()


@pytest.mark.parametrize("name", LOOPS)
def test_trains_as_the_full_batch(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_trained_as_the_full_batch([LOOPS[name](ONE_PROCESS)])


def on_a_rank(rank: int, name: str, folder: str) -> Any:
    os.chdir(folder)
    return LOOPS[name](DDP_2)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_two_ranks_train_as_the_full_batch(name, tmp_path):
    assert_trained_as_the_full_batch(run_on_ranks(on_a_rank, 2, tmp_path, name, str(tmp_path)))


def test_a_trainer_of_transformers_evaluates(tmp_path):
    trainer = a_trainer(tmp_path, label_names=["index"], prediction_loss_only=True)
    found = trainer.evaluate()["eval_loss"]
    batches = torch.arange(SIZE).split(BATCH)
    losses = [full_batch(trainer.model, batch.tolist()).item() for batch in batches]
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-6)


ignored = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*is smaller than the logging interval",
    "ignore:.*LeafSpec",
)


@ignored
def test_lightning_validates_without_a_graph():
    module = Validated()
    loader = DataLoader(Pairs(), BATCH)
    lightning.Trainer(devices=1, **QUIET).validate(module, loader, verbose=False)
    expected = [
        full_batch(module.encoder, batch.tolist()).detach() for batch in torch.arange(SIZE).split(BATCH)
    ]
    torch.testing.assert_close(module.validated, expected, rtol=1e-12, atol=0)


@ignored
def test_lightning_leaves_autocast_before_backward():
    module, dtypes = Module(torch.float32, rate=0.0), []
    linear = next(each for each in module.encoder.modules() if isinstance(each, nn.Linear))
    linear.register_forward_hook(lambda *args: dtypes.append((torch.is_grad_enabled(), args[-1].dtype)))
    module.on_before_optimizer_step = lambda _: module.found.append(gradients(module.encoder))
    module.found = []
    trainer = lightning.Trainer(max_steps=1, devices=1, precision="bf16-mixed", **QUIET)
    trainer.fit(module, DataLoader(Pairs(torch.float32), BATCH))
    assert module.autocasts == [False]
    assert dtypes == [(False, torch.bfloat16)] * 3 + [(True, torch.bfloat16)] * 3
    exact = dual_encoder("siglip").float()
    full_batch(exact, module.seen[0], torch.float32).backward()
    direct = dual_encoder("siglip").float()
    with torch.autocast("cpu", torch.bfloat16):
        full_batch(direct, module.seen[0], torch.float32).backward()
    off, allowed = (distance(each, gradients(exact)) for each in (module.found[0], gradients(direct)))
    assert 1e-3 < off <= 1.2 * allowed


def distance(got: Any, exact: Any) -> float:
    names = [name for name, grad in exact.items() if grad is not None]
    differences = torch.cat([(got[name] - exact[name]).flatten() for name in names])
    return float(differences.norm() / torch.cat([exact[name].flatten() for name in names]).norm())


WORDS = [f"word{index}" for index in range(24)]


def sentence_encoder(folder: Any) -> SentenceTransformer:
    """A tiny BERT, saved as any local model is."""
    torch.manual_seed(1)
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = BertConfig(**(TEXT | rates | {"vocab_size": len(vocabulary), "initializer_range": 0.5}))
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    transformer = Transformer(str(folder))
    pooling = Pooling(transformer.get_embedding_dimension())
    return SentenceTransformer(modules=[transformer, pooling], device="cpu").double()


def in_batch_loss(anchors: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    logits = nn.functional.normalize(anchors, dim=-1) @ nn.functional.normalize(positives, dim=-1).T * 5
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)))


class InBatch(nn.Module):
    """A loss of sentence-transformers, in one graph or in chunks."""

    def __init__(self, model: SentenceTransformer, *, cached: bool) -> None:
        super().__init__()
        self.model, self.batches = model, list[int]()
        self.cache = GradientCache(self.encode, in_batch_loss, CHUNK) if cached else None

    def encode(self, *columns: Any) -> tuple[torch.Tensor, ...]:
        self.batches.append(len(columns[0]["input_ids"]))
        return tuple(self.model(dict(column))["sentence_embedding"] for column in columns)

    def forward(self, sentence_features: Any, labels: Any = None) -> torch.Tensor:
        columns = [*sentence_features]
        return self.cache(columns) if self.cache else in_batch_loss(*self.encode(*columns))


def sentences(seed: int) -> list[str]:
    drawn = torch.randint(len(WORDS), (SIZE, 5), generator=torch.Generator().manual_seed(seed))
    return [" ".join(WORDS[index] for index in row[: 2 + number % 4]) for number, row in enumerate(drawn)]


def trained_sentences(folder: Any, *, cached: bool) -> tuple[dict[str, torch.Tensor], list[int]]:
    model = sentence_encoder(folder)
    start, loss = weights(model), InBatch(model, cached=cached)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATED,
        num_train_epochs=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    rows = Dataset.from_dict({"anchor": sentences(3), "positive": sentences(4)})
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=rows, loss=loss).train()
    return {name: value - start[name] for name, value in weights(model).items()}, loss.batches


def test_sentence_transformers_train_as_the_full_batch(tmp_path):
    for name in ("whole", "cached"):
        (tmp_path / name).mkdir()
    expected, whole = trained_sentences(tmp_path / "whole", cached=False)
    found, chunks = trained_sentences(tmp_path / "cached", cached=True)
    assert set(whole) == {BATCH}
    assert set(chunks) == {CHUNK}
    assert len(chunks) > len(whole)
    assert float(expected["0.model.embeddings.word_embeddings.weight"].norm()) > 1e-2
    assert_equal(found, expected)
