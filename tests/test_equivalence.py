"""One call says whether a cached step equals a direct one, names what makes them differ, and leaves no trace."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import CLIPModel, ViTConfig, ViTModel

from gc_accel import DualEncoder, GradientCache, VisionEncoder, check_equivalence
from gc_accel.data import (
    BatchPlan,
    ChunkedLoader,
    HandwrittenNumbers,
    ImageTextCollator,
    image_statistics,
    numbers_config,
    numbers_processor,
)
from gc_accel.equivalence import check_equivalence_chunks, representation_drift
from gc_accel.losses import CLIPLoss, NTXentLoss, SigLIPLoss, dense
from gc_accel.passes import Passes
from tests.models import IMAGE, MODELS, dual_encoder, image_text_batch
from tests.ranks import run_on_ranks
from tests.test_gradient_cache import Pair, pair_loss, structures

SIZE = 11


@pytest.fixture(autouse=True)
def _one_accelerator_each():
    """Accelerators share one state, with one precision, until it is reset."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def losses(encoder):
    return SigLIPLoss() if "logit_bias" in encoder.global_names else CLIPLoss()


def check_dual(kind="clip", *, chunk_size=4, dropout=0.0, **options):
    encoder = dual_encoder(kind, dropout=dropout)
    return check_equivalence(encoder, losses(encoder), image_text_batch(SIZE), chunk_size, **options)


def suspects(report):
    return {suspect.name: suspect for suspect in report.suspects}


def x(rows=SIZE):
    return torch.randn(rows, 6, dtype=torch.float64)


class TestEqual:
    """Exact on every kind of encoder and input, with nothing to suspect."""

    @pytest.mark.parametrize("kind", MODELS)
    def test_dual_encoders(self, kind):
        encoder, batch = dual_encoder(kind), image_text_batch(SIZE)
        report = check_equivalence(encoder, losses(encoder), batch, 4)
        assert report.ok, report
        assert 0 < report.max_relative_error <= 1e-9
        assert report.suspects == []
        assert set(report.parameters) == {name for name, p in encoder.named_parameters() if p.requires_grad}
        assert list(report.parameters.values()) == sorted(report.parameters.values(), reverse=True)
        streams = {name: {k: batch[k] for k in keys if k in batch} for name, keys in encoder.streams.items()}
        loss = dense.siglip_loss if "logit_bias" in encoder.global_names else dense.clip_loss
        assert report.loss == pytest.approx(loss(**encoder(**streams)).item(), rel=1e-12)
        assert (report.batch_size, report.chunk_size, report.precision) == (SIZE, 4, "float64")

    @pytest.mark.parametrize("retain", [0, 2, "all"])
    def test_retained_chunks_and_chunk_sizes_by_stream(self, retain):
        assert check_dual(chunk_size={"image": 2, "text": 5}, retain=retain).ok

    def test_views(self):
        encoder = VisionEncoder(
            ViTModel(ViTConfig(**IMAGE), add_pooling_layer=False), projection_dim=4
        ).double()
        views = {"pixel_values": torch.randn(SIZE, 2, 3, 8, 8, dtype=torch.float64)}
        report = check_equivalence(encoder, NTXentLoss(), views, 3)
        assert report.ok, report
        assert report.suspects == []

    @pytest.mark.parametrize("kind", structures())
    def test_input_structures(self, kind):
        report = check_equivalence(Pair(), pair_loss, structures()[kind], 3)
        assert report.ok, report
        assert {"a.weight", "a.bias"} <= set(report.parameters)

    def test_labels_in_the_batch_and_by_keyword(self):
        encoder, labels = dual_encoder("clip"), torch.arange(SIZE) // 3
        batch = image_text_batch(SIZE)
        inside = check_equivalence(encoder, CLIPLoss(), {**batch, "labels": labels}, 4)
        by_keyword = check_equivalence(encoder, CLIPLoss(), batch, 4, labels=labels)
        assert inside.ok
        assert by_keyword.ok
        assert inside.loss == by_keyword.loss != check_dual().loss

    def test_frozen_tower(self):
        encoder = dual_encoder("clip", freeze=("image",))
        report = check_equivalence(encoder, CLIPLoss(), image_text_batch(SIZE), 4)
        assert report.ok, report
        assert not any("vision" in name for name in report.parameters)

    def test_a_callable_that_is_no_module(self):
        """Its parameters, and those of the loss, are found in the graph."""
        embedding = nn.Embedding(30, 5).double()
        temperature = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        embedding.weight.grad = torch.ones_like(embedding.weight)

        def encoder(texts):
            return embedding(torch.tensor([len(text) for text in texts]))

        texts = ["a" * n for n in range(7)]
        report = check_equivalence(encoder, lambda reps: pair_loss(reps / temperature), texts, 2)
        assert report.ok, report
        assert len(report.parameters) == 2
        assert any("Embedding" in name for name in report.parameters)
        assert temperature.grad is None
        assert torch.equal(embedding.weight.grad, torch.ones_like(embedding.weight))

    def test_float32_has_its_own_tolerance(self):
        encoder, batch = dual_encoder("clip").float(), image_text_batch(SIZE)
        report = check_equivalence(
            encoder, CLIPLoss(), batch | {"pixel_values": batch["pixel_values"].float()}, 4
        )
        assert report.ok, report
        assert 1e-9 < report.max_relative_error <= report.tolerance == 1e-5
        assert report.precision == "float32"

    @pytest.mark.parametrize("steps", [1, 3])
    def test_accumulation_is_divided_out(self, steps):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
        encoder = accelerator.prepare(dual_encoder("clip"))
        accelerator.gradient_state._set_sync_gradients(False)
        report = check_equivalence(encoder, CLIPLoss(), image_text_batch(SIZE), 4, accelerator=accelerator)
        assert report.ok, report
        assert not accelerator.sync_gradients

    def test_gradient_scaler_is_divided_out(self):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        encoder = accelerator.prepare(dual_encoder("clip"))
        report = check_equivalence(encoder, CLIPLoss(), image_text_batch(SIZE), 4, accelerator=accelerator)
        assert report.ok, report


class TestChunks:
    """A batch that comes chunk by chunk, as a loader yields it."""

    def test_lazy_chunks(self):
        encoder, batch = dual_encoder("clip"), image_text_batch(SIZE)
        chunks = ({k: v[a:b] for k, v in batch.items()} for a, b in [(0, 5), (5, 8), (8, 11)])
        report = check_equivalence_chunks(encoder, CLIPLoss(), chunks, 4)
        assert report.ok, report
        assert report.loss == pytest.approx(check_dual().loss, rel=1e-12)
        assert report.batch_size == SIZE

    def test_a_batch_of_the_loader_which_can_be_trained_on_afterwards(self):
        """uint8 images, captions padded by chunk, labels."""
        images, processor = HandwrittenNumbers("train", size=40), numbers_processor()
        lengths = [len(images[i]["text"]) for i in range(40)]
        plan = BatchPlan(40, 12, 4, lengths=lambda rows: [lengths[row] for row in rows])
        loader = ChunkedLoader(images, plan, ImageTextCollator(processor))
        mean, std = image_statistics(processor)
        config = numbers_config(width=16, layers=1, heads=2)
        encoder = DualEncoder(CLIPModel(config), image_mean=mean, image_std=std).train().double()
        batch = next(iter(loader))
        first, again = ([chunk["labels"].tolist() for chunk in batch] for _ in range(2))
        report = check_equivalence_chunks(encoder, CLIPLoss(), batch, 4)
        assert report.ok, report
        assert report.suspects == []
        assert len({chunk["input_ids"].shape[1] for chunk in batch}) > 1, "not padded by chunk"
        assert first == again == [chunk["labels"].tolist() for chunk in batch]

    def ragged(self):
        batch = image_text_batch(SIZE)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        first = {k: v[:6] for k, v in batch.items()}
        second = {k: v[6:, :5] if v.ndim == 2 else v[6:] for k, v in batch.items()}
        second["input_ids"][:, -1] = 31
        return [first, second]

    def test_chunks_of_different_widths_are_padded_for_the_reference(self):
        report = check_equivalence_chunks(dual_encoder("clip"), CLIPLoss(), self.ragged(), 4)
        assert report.ok, report
        assert report.suspects == []

    def test_padding_that_changes_the_outcome_is_suspected(self):
        """SigLIP pools the last position, and nothing tells it which is padding."""
        report = check_equivalence_chunks(dual_encoder("siglip"), SigLIPLoss(), self.ragged(), 4)
        assert not report.ok
        assert "input_ids" in suspects(report)["padding"].finding

    def test_no_chunks(self):
        with pytest.raises(ValueError, match="at least one sample"):
            check_equivalence_chunks(dual_encoder("clip"), CLIPLoss(), [], 4)


class TestDifferent:
    """A cached step that is wrong is seen."""

    def wrong(self, monkeypatch, owner, name, replacement):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: replacement(original, *args))
        return check_dual()

    def test_a_chunk_that_is_left_out(self, monkeypatch):
        pushed = []

        def push(original, self, encoded):
            pushed.append(set(encoded.leaves))
            if pushed.count({"image", "logit_scale"}) != 3 or "text" in encoded.leaves:
                original(self, encoded)

        report = self.wrong(monkeypatch, Passes, "push", push)
        assert pushed.count({"image", "logit_scale"}) == 3, "chunks of 4, 4 and 3"
        assert not report.ok
        assert report.max_relative_error > 0.1
        assert "vision" in next(iter(report.parameters))
        assert report.loss_difference <= 1e-12
        assert "NOT EQUAL" in str(report)

    def test_a_scale_that_is_slightly_off(self, monkeypatch):
        def gradients(original, self, calls, *rest):
            loss = original(self, calls, *rest)
            for encoded in calls:
                for leaf in encoded.leaves.values():
                    leaf.grad = None if leaf.grad is None else leaf.grad * (1 + 1e-7)
            return loss

        report = self.wrong(monkeypatch, GradientCache, "cache_gradients", gradients)
        assert report.max_relative_error == pytest.approx(1e-7, rel=0.01)
        assert not report.ok

    def test_tolerance_decides(self):
        assert check_dual(tolerance=1e-9).ok
        assert not check_dual(tolerance=1e-20).ok

    def test_nan_is_not_equal(self):
        class Broken(nn.Linear):
            def forward(self, x):
                return super().forward(x) * (torch.nan if torch.is_grad_enabled() and len(x) < 4 else 1.0)

        report = check_equivalence(Broken(6, 5).double(), pair_loss, x(), 3, retain=0)
        assert not report.ok
        assert math.isnan(report.max_relative_error)


class Steady(nn.Module):
    """A linear map; subclasses do something besides."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 5).double()

    def forward(self, x):
        return self.linear(x)


class Counting(Steady):
    """Its output depends on how often it was called."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.last = None

    def forward(self, x):
        self.calls += 1
        self.last = super().forward(x)
        return self.last * (1 + 0.1 * self.calls)


class TestSuspects:
    """Each is named on a model that shows it, with its remedy."""

    def test_batch_norm_in_training_mode(self):
        encoder = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).double()
        report = check_equivalence(encoder, pair_loss, x(12), 3)
        assert not report.ok
        assert not report.compared
        assert "NOT COMPARED" in str(report)
        assert report.max_relative_error > 0.01, "what grouping would change is shown"
        suspect = suspects(report)["BatchNorm"]
        assert "'1'" in suspect.finding
        assert "frozen" in suspect.remedy
        assert "hidden_state" not in suspects(report)
        assert encoder[1].num_batches_tracked == 0
        assert encoder[1].training
        encoder[1].eval()
        report = check_equivalence(encoder, pair_loss, x(12), 3)
        assert report.ok, report
        assert report.suspects == []

    def test_batch_norm_policies(self):
        encoder = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 5)).double()
        frozen = check_equivalence(encoder, pair_loss, x(12), 3, batch_norm="frozen")
        assert frozen.ok, frozen
        assert "whole batch" in frozen.reference
        ghost = check_equivalence(encoder, pair_loss, x(12), 3, batch_norm="ghost")
        assert ghost.ok, ghost
        assert "same chunks" in ghost.reference
        assert "ghost" in suspects(ghost)["BatchNorm"].finding
        assert encoder[1].training
        assert encoder[1].num_batches_tracked == 0

    @pytest.mark.parametrize("policy", ["error", "frozen", "ghost"])
    def test_batch_norm_behind_a_function(self, policy):
        """It is met when the function calls it, by the reference too."""
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 5)).double()
        report = check_equivalence(lambda x: model(x), pair_loss, x(12), 3, batch_norm=policy)
        expected = check_equivalence(model, pair_loss, x(12), 3, batch_norm=policy)
        assert (report.ok, report.compared, report.reference) == (
            expected.ok,
            expected.compared,
            expected.reference,
        )
        assert report.ok == (policy != "error"), report
        assert suspects(report).keys() == suspects(expected).keys()
        assert len(report.parameters) == 6
        assert model[1].training
        assert model[1].track_running_stats
        assert model[1].num_batches_tracked == 0

    def test_frozen_batch_norm_without_running_statistics_is_refused(self):
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False)).double()
        for encoder in (model, lambda x: model(x)):
            with pytest.raises(ValueError, match="expected no BatchNorm in training mode"):
                check_equivalence(encoder, pair_loss, x(12), 3, batch_norm="frozen")
        assert model[1].training

    @pytest.mark.parametrize("kind", ["clip", "vision_text", "open_clip"])
    def test_dropout_is_compared_with_the_chunked_reference(self, kind):
        report = check_dual(kind, dropout=0.5)
        assert report.ok, report
        assert "same chunks and masks" in report.reference
        assert "same chunks and masks" in str(report)
        assert ".eval()" in suspects(report)["dropout"].remedy
        assert report.loss != pytest.approx(check_dual(kind).loss, abs=1e-4), "dropout was not active"

    def test_labels_keep_to_their_samples_in_the_chunked_reference(self):
        """Without labels the order of the samples could be any, as long as it is one."""
        encoder, batch = dual_encoder("clip", dropout=0.5), image_text_batch(SIZE)
        report = check_equivalence(encoder, CLIPLoss(), {**batch, "labels": torch.arange(SIZE) // 3}, 4)
        assert report.ok, report
        assert "same chunks and masks" in report.reference

    def test_dropout_in_eval_mode_is_none(self):
        encoder = dual_encoder("clip", dropout=0.5).eval()
        report = check_equivalence(encoder, CLIPLoss(), image_text_batch(SIZE), 4)
        assert report.ok
        assert report.suspects == []
        assert "whole batch" in report.reference

    def test_dropout_that_is_not_replayed_is_seen(self, monkeypatch):
        monkeypatch.setattr(
            "gc_accel.state.rng.RngState.is_current", lambda self: False
        )  # both see dropout everywhere
        monkeypatch.setattr(
            "gc_accel.state.rng.RngState.restore", lambda self: None
        )  # and none of them replays
        report = check_dual("vision_text", dropout=0.5)
        assert not report.ok
        assert report.representation_difference > 0.1

    def test_parameters_without_gradient(self):
        class Spare(Steady):
            def __init__(self):
                super().__init__()
                self.unused = nn.Linear(6, 5).double()

        report = check_equivalence(Spare(), pair_loss, x(), 4)
        assert report.ok, report
        assert "unused.weight, unused.bias" in suspects(report)["no_gradient"].finding
        assert "requires_grad_(False)" in suspects(report)["no_gradient"].remedy
        assert "unused.weight" not in report.parameters

    def test_no_gradient_at_all_proves_nothing(self):
        report = check_equivalence(dual_encoder("clip"), CLIPLoss(), image_text_batch(1), 4)
        assert not report.ok
        assert "two different samples" in suspects(report)["nothing_compared"].remedy

    def test_mixed_precision(self):
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        encoder = accelerator.prepare(dual_encoder("clip").float())
        batch = image_text_batch(SIZE)
        batch["pixel_values"] = batch["pixel_values"].float()
        report = check_equivalence(encoder, CLIPLoss(), batch, 4, accelerator=accelerator)
        assert report.ok, report
        assert report.max_relative_error > 1e-4, "not in half precision"
        assert "bfloat16" in suspects(report)["autocast"].finding
        assert "float64" in suspects(report)["autocast"].remedy

    def test_autocast_around_the_call(self):
        batch = image_text_batch(SIZE)
        batch["pixel_values"] = batch["pixel_values"].float()
        with torch.autocast("cpu", torch.bfloat16):
            report = check_equivalence(dual_encoder("clip").float(), CLIPLoss(), batch, 4)
        assert report.ok, report
        assert report.precision == "bfloat16"

    def test_a_precision_of_one_pass_only(self):
        """Autocast where a graph is kept: the passes see different numbers."""

        class Half(Steady):
            def forward(self, x):
                with torch.autocast("cpu", torch.bfloat16, enabled=torch.is_grad_enabled()):
                    return super().forward(x)

        report = check_equivalence(Half().float(), pair_loss, x().float(), 4, retain=0)
        assert not report.ok
        assert report.representation_difference > 1e-4

    def test_hidden_state(self):
        encoder = Counting()
        report = check_equivalence(encoder, pair_loss, x(), 4)
        assert not report.ok
        assert report.representation_difference > 0.01
        assert "calls, last" in suspects(report)["hidden_state"].finding
        assert "outside of forward" in suspects(report)["hidden_state"].remedy
        assert encoder.calls == 0
        assert encoder.last is None

    def test_spectral_norm_moves_in_forward(self):
        encoder = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)).double()
        report = check_equivalence(encoder, pair_loss, x(), 4)
        assert not report.ok
        assert "_u" in suspects(report)["hidden_state"].finding

    def test_loss_that_draws_random_numbers(self):
        def loss(reps):
            return pair_loss(reps + 0.1 * torch.randn_like(reps))

        report = check_equivalence(Steady(), loss, x(), 4)
        assert "random" in suspects(report)["loss"].finding
        assert "by keyword" in suspects(report)["loss"].remedy
        assert "dropout" not in suspects(report)

    def test_loss_that_reads_a_parameter_of_the_model(self):
        encoder = Steady()
        encoder.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        report = check_equivalence(encoder, lambda reps: pair_loss(reps * encoder.scale), x(), 4)
        assert report.ok, "in one process the gradient is right all the same"
        assert "reads scale of" in suspects(report)["loss"].finding
        assert "global_names" in suspects(report)["loss"].remedy

    def test_loss_that_reads_what_the_last_forward_left(self):
        class Leaving(Steady):
            def forward(self, x):
                self.mean = x.mean(0)
                return super().forward(x)

        encoder = Leaving()
        report = check_equivalence(
            encoder,
            lambda reps: pair_loss(reps) + (reps * encoder.linear(encoder.mean).detach()).sum(),
            x(),
            4,
        )
        assert not report.ok
        assert "in between" in suspects(report)["loss"].finding
        assert "as a representation" in suspects(report)["loss"].remedy

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
    def test_reentrant_checkpointing(self):
        class Checkpointed(nn.Module):
            def __init__(self, use_reentrant):
                super().__init__()
                self.first, self.second = nn.Linear(6, 6).double(), nn.Linear(6, 5).double()
                self.use_reentrant = use_reentrant

            def forward(self, x):
                return checkpoint(self.second, self.first(x), use_reentrant=self.use_reentrant)

        report = check_equivalence(Checkpointed(True), pair_loss, x(), 4)
        assert report.ok, report
        assert "use_reentrant=False" in suspects(report)["reentrant_checkpointing"].remedy
        assert check_equivalence(Checkpointed(False), pair_loss, x(), 4).suspects == []

    def test_text_of_every_suspect_is_in_the_table(self):
        report = check_equivalence(Counting(), pair_loss, x(), 4)
        words = " ".join(str(report).split())
        for suspect in report.suspects:
            assert f"{suspect.name}: {' '.join(suspect.finding.split())}. Remedy: {suspect.remedy}." in words


class Restless(Counting):
    """Changes everything that a forward can change."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("queue", torch.zeros(2, dtype=torch.float64))
        self.note = torch.zeros(3)

    def forward(self, x):
        self.queue = self.queue + 1
        self.note += 1
        self.fresh = len(x)
        with torch.no_grad():
            self.linear.weight.clamp_(-0.1, 0.1)
        return self.dropout(super().forward(x))


class TestNoTrace:
    """Weights, gradients, buffers, attributes and generators are those that were found."""

    def check(self, loss_fn, error=None):
        encoder, inputs = Restless(), x()
        kept = torch.randn(5, 6, dtype=torch.float64)
        encoder.linear.weight.grad = kept
        before, attributes = copy.deepcopy(encoder.state_dict()), set(vars(encoder))
        grad, note, rng = kept.clone(), encoder.note, torch.get_rng_state()
        if error is None:
            report = check_equivalence(encoder, loss_fn, inputs, 4)
            names = ("calls", "fresh", "last", "linear.weight", "note", "queue")
            assert f"changes {', '.join(names)};" in suspects(report)["hidden_state"].finding
        else:
            with pytest.raises(RuntimeError, match=error):
                check_equivalence(encoder, loss_fn, inputs, 4)
        assert torch.equal(torch.get_rng_state(), rng)
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert set(vars(encoder)) == attributes
        assert encoder.note is note
        assert not note.any()
        assert encoder.linear.weight.grad is kept
        assert torch.equal(kept, grad)
        assert encoder.linear.bias.grad is None

    def test_after_a_check(self):
        self.check(pair_loss)

    @pytest.mark.parametrize("call", [1, 2, 3, 4])
    def test_after_an_error(self, call):
        calls = []

        def loss(reps):
            calls.append(len(reps))
            if len(calls) == call:
                raise RuntimeError("no loss today")
            return pair_loss(reps)

        self.check(loss, error="no loss today")
        assert len(calls) == call


class TestReport:
    """An aligned table, and files that are written whole or not at all."""

    def test_table(self):
        report = check_dual()
        lines = str(report).splitlines()
        assert lines[0] == (
            "cached step, batch of 11 in chunks of 4, against the whole batch in one graph, float64"
        )
        rows = lines[1:-1]
        assert len({len(row) for row in rows}) == 1, "not aligned"
        assert rows[0].split()[0] == "loss"
        assert float(rows[2].split()[-1]) == pytest.approx(report.max_relative_error, rel=0.1)
        assert rows[-1].split()[:3] == [str(len(report.parameters) - 10), "more", "parameters,"]
        assert lines[-1].startswith("equal: largest error")

    @pytest.mark.parametrize("name", ["check", "check.json", "check.png"])
    def test_save(self, tmp_path, name):
        report = check_dual(dropout=0.5)
        report.save(tmp_path / "out" / name)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["check.json", "check.png"]
        saved = json.loads((tmp_path / "out" / "check.json").read_text())
        assert saved["ok"] is True
        assert saved["parameters"] == report.parameters
        assert saved["max_relative_error"] == report.max_relative_error
        assert saved["suspects"][0]["name"] == "dropout"
        picture = np.asarray(Image.open(tmp_path / "out" / "check.png").convert("L"))
        assert picture.std() > 5

    def test_names_with_dots_stay(self, tmp_path):
        check_dual().save(tmp_path / "step0.5")
        assert (tmp_path / "step0.5.json").exists()
        assert (tmp_path / "step0.5.png").exists()

    def test_nan_is_null_in_json(self, tmp_path):
        encoder = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).double()
        check_equivalence(encoder, pair_loss, x(12), 3).save(tmp_path / "check")
        saved = json.loads((tmp_path / "check.json").read_text())
        assert saved["representation_difference"] is None
        assert saved["ok"] is False

    def test_what_was_there_stays_if_writing_fails(self, tmp_path, monkeypatch):
        (tmp_path / "check.json").write_text("old")
        (tmp_path / "check.png").write_text("old")
        report = check_dual()

        def fail(self, text):
            with self.open("w") as file:
                file.write(text[:10])
            raise OSError("disk full")

        monkeypatch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="disk full"):
            report.save(tmp_path / "check")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["check.json", "check.png"]
        assert (tmp_path / "check.json").read_bytes() == b"old"


class TestDrift:
    """The difference between two representations of one chunk."""

    def test_none_where_random_numbers_are_replayed(self):
        batch = {**image_text_batch(SIZE), "labels": torch.arange(SIZE)}
        rng = torch.get_rng_state()
        assert representation_drift(dual_encoder("clip", dropout=0.5), batch, torch.device("cpu")) <= 1e-12
        torch.set_rng_state(rng)
        encoder = Steady()
        assert representation_drift(encoder, x(), torch.device("cpu")) <= 1e-12

    def test_of_hidden_state(self):
        encoder = Counting()
        rng = torch.get_rng_state()
        drift = representation_drift(encoder, inputs := x(), torch.device("cpu"))
        assert drift == pytest.approx(0.1 / 1.1), "1.2 against 1.1"
        assert encoder.calls == 0
        torch.set_rng_state(rng)
        assert torch.equal(inputs, x())

    def test_leaves_the_generator_where_it_was(self):
        encoder, chunk, rng = dual_encoder("clip", dropout=0.5), image_text_batch(4), torch.get_rng_state()
        representation_drift(encoder, chunk, torch.device("cpu"))
        assert torch.equal(torch.get_rng_state(), rng)


class Spread(nn.Module):
    """A loss written for one process, of which each rank sees other random numbers."""

    def forward(self, image, text, logit_scale, **_):
        return dense.clip_loss(image + 0.1 * torch.randn_like(image), text, logit_scale)


def ddp_checks(rank):
    own = {key: value.chunk(2)[rank] for key, value in image_text_batch(SIZE).items()}
    assert len(own["input_ids"]) == 6 - rank
    torch.manual_seed(rank)
    found = {}
    for name, kind, dropout, loss in [
        ("siglip", "siglip", 0.0, SigLIPLoss()),
        ("any callable", "clip", 0.0, dense.clip_loss),
        ("dropout", "clip", 0.5, CLIPLoss()),
        ("random loss", "clip", 0.0, Spread()),
    ]:
        encoder = DistributedDataParallel(dual_encoder(kind, dropout=dropout), find_unused_parameters=True)
        torch.manual_seed(rank)
        rng = torch.get_rng_state()
        found[name] = check_equivalence(encoder, loss, own, 2)
        assert torch.equal(torch.get_rng_state(), rng)
        assert all(p.grad is None for p in encoder.parameters())
        assert representation_drift(encoder, own, torch.device("cpu")) <= 1e-12
        if rank == 0 and name == "siglip":
            found["loss"] = found[name].loss
    # The step of a training works afterwards.
    GradientCache(encoder, CLIPLoss(), 2).forward_backward(own)
    found["gradient"] = encoder.module.model.logit_scale.grad
    static = DistributedDataParallel(dual_encoder("clip"), static_graph=True)
    found["static_graph"] = check_equivalence(static, CLIPLoss(), own, 2)
    found["pixels"] = own["pixel_values"]
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    results = run_on_ranks(ddp_checks, 2, tmp_path_factory.mktemp("ranks"))
    assert len(results) == 2
    assert not torch.equal(results[0]["pixels"][0], results[1]["pixels"][0]), "ranks must hold different data"
    return results


@pytest.mark.slow
class TestTwoRanks:
    """Every rank gets the same errors, against a reference that adds gradients up by itself."""

    @pytest.mark.parametrize("name", ["siglip", "any callable", "dropout"])
    def test_equal(self, two_ranks, name):
        for report in (result[name] for result in two_ranks):
            assert report.ok, report
            assert 0 < report.max_relative_error <= 1e-9
        assert two_ranks[0][name].parameters == two_ranks[1][name].parameters
        assert ("dropout" in suspects(two_ranks[0][name])) == (name == "dropout")

    def test_the_loss_is_that_of_the_global_batch(self, two_ranks):
        encoder = dual_encoder("siglip")
        report = check_equivalence(encoder, SigLIPLoss(), image_text_batch(SIZE), 4)
        assert two_ranks[0]["loss"] == pytest.approx(report.loss, rel=1e-12)

    def test_random_loss_is_suspected(self, two_ranks):
        assert "random" in suspects(two_ranks[0]["random loss"])["loss"].finding

    def test_static_graph_is_reported(self, two_ranks):
        for report in (result["static_graph"] for result in two_ranks):
            assert not report.ok
            assert not report.compared
            assert "find_unused_parameters=True" in suspects(report)["static_graph"].remedy
            assert "NOT COMPARED" in str(report)

    def test_training_goes_on(self, two_ranks):
        assert two_ranks[0]["gradient"].abs() > 0
        assert torch.equal(two_ranks[0]["gradient"], two_ranks[1]["gradient"])


def test_sharded_encoders_are_refused():
    accelerator = Accelerator(cpu=True)
    encoder = accelerator.prepare(DualEncoder(MODELS["clip"]()))
    accelerator.state.distributed_type = DistributedType.FSDP
    with pytest.raises(ValueError, match="FSDP: check it on one process before it is sharded"):
        check_equivalence(encoder, CLIPLoss(), image_text_batch(4), 2, accelerator=accelerator)
