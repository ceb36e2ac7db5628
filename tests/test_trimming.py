"""Sorting by length, trimming and token budgets move time and memory, never the gradient: either padding side."""

from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from gc_accel import CachedContrastiveArguments, CachedContrastiveTrainer, DualEncoder, GradientCache
from gc_accel.data import HandwrittenNumbers, ImageTextCollator, numbers_processor
from gc_accel.data.padding import padding_is_inert
from gc_accel.encoders.retriever import Retriever
from gc_accel.inputs.nested import concatenate
from gc_accel.inputs.trimming import (
    length_order,
    length_sorted_chunks,
    sorted_by_length,
    trim_padding,
    trimming_is_inert,
)
from gc_accel.losses import CLIPLoss, dense
from tests.comparing import assert_equal, gradients
from tests.models import TEXT, siglip

WORDS = 20
TOWER = {"vocab_size": WORDS + 60, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
TOWER |= {"num_attention_heads": 2, "max_position_embeddings": 48}


def bert():
    """Absolute positions, by column unless they are given."""
    return BertModel(BertConfig(**TOWER, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def llama():
    """Rotary positions: a decoder."""
    return LlamaModel(LlamaConfig(**TOWER, num_key_value_heads=1))


TOWERS = {"bert": bert, "llama": llama}


class Pair(nn.Module):
    """A text tower, pooled at the mean of its tokens or at its last one, beside a linear image tower."""

    streams = MappingProxyType(
        {"image": ("pixel_values",), "text": ("input_ids", "attention_mask", "position_ids")}
    )
    global_names = ("logit_scale",)

    def __init__(self, kind="bert", pooling="mean"):
        super().__init__()
        torch.manual_seed(4)
        self.tower, self.pooling = TOWERS[kind](), pooling
        for module in self.tower.modules():  # the norms of Llama would round to float32
            for name, child in module.named_children():
                if type(child).__name__ == "LlamaRMSNorm":
                    setattr(module, name, nn.RMSNorm(child.weight.shape, child.variance_epsilon))
        self.image = nn.Linear(6, 8)
        self.scale = nn.Parameter(torch.tensor([2.0]))
        self.widths = []  # of the texts of every call

    def forward(self, image=None, text=None):
        outputs = {"logit_scale": self.scale.exp()}
        if image is not None:
            outputs["image"] = normalize(self.image(image["pixel_values"].flatten(1)), dim=-1)
        if text is not None:
            self.widths.append(text["input_ids"].shape[1])
            hidden = self.tower(**text).last_hidden_state
            weights = text["attention_mask"].to(hidden.dtype)[..., None]
            mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
            outputs["text"] = normalize(mean if self.pooling == "mean" else hidden[:, -1], dim=-1)
        return outputs

    def save_pretrained(self, directory, state_dict=None):
        raise NotImplementedError

    load_pretrained = save_pretrained


def batch_of(lengths, *, side="right", width=None, positions=False, seed=0):
    """Texts of some lengths, padded as a whole, images and labels."""
    generator = torch.Generator().manual_seed(seed)
    size, width = len(lengths), width or max(lengths)
    columns = torch.arange(width)
    if side == "left":
        columns = columns.flip(0)
    mask = (columns < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, WORDS, (size, width), generator=generator) * mask
    batch = {
        "pixel_values": torch.randn(size, 6, generator=generator).double(),
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.arange(size) // 2 * 2 % 5,
    }
    return batch | ({"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if positions else {})


def whole(encoder, batch):
    """The oracle: everything padded, one call, one graph, a dense loss."""
    text = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    loss = dense.clip_loss(
        **encoder(image={"pixel_values": batch["pixel_values"]}, text=text), labels=batch["labels"]
    )
    loss.backward()
    return loss.detach(), gradients(encoder)


def assert_exact(kind, batch, **options):
    shift = options.get("shift", False)
    expected_loss, expected = whole(Pair(kind).double(), batch)
    encoder = Pair(kind).double()
    chunks = list(length_sorted_chunks(batch, **options))
    loss = GradientCache(encoder, CLIPLoss(), options["chunk_size"]).forward_backward_chunks(chunks)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-12)
    # Rotary angles are computed in float32, and those of other positions are rounded otherwise.
    if shift and kind == "llama":
        assert all(
            torch.allclose(gradients(encoder)[name], value, atol=1e-6) for name, value in expected.items()
        )
    else:
        assert_equal(gradients(encoder), expected)
    return encoder, chunks


CASES = (
    ("bert", {"side": "right"}),
    ("bert", {"side": "left"}),
    ("bert", {"side": "right", "positions": True}),
    ("bert", {"side": "left", "positions": True}),
    ("llama", {"side": "right"}),
    ("llama", {"side": "left"}),
    ("llama", {"side": "left", "positions": True}),
)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(CASES),
    st.lists(st.integers(1, 12), min_size=2, max_size=9),
    st.integers(0, 3),
    st.integers(1, 10),
    st.none() | st.integers(1, 60),
    st.integers(0, 50),
)
def test_no_lengths_chunks_or_budgets_change_the_gradient(
    case, lengths, spare, chunk_size, chunk_tokens, seed
):
    kind, form = case
    batch = batch_of(lengths, width=max(lengths) + spare, seed=seed, **form)
    _, chunks = assert_exact(kind, batch, chunk_size=chunk_size, chunk_tokens=chunk_tokens)
    assert sum(len(chunk["labels"]) for chunk in chunks) == len(lengths)
    for chunk in chunks:
        size, width = chunk["input_ids"].shape
        assert size <= chunk_size
        assert chunk_tokens is None or size * width <= chunk_tokens or size == 1
        if form["side"] == "right" or "positions" in form:
            assert width == chunk["attention_mask"].sum(1).max(), "trimmed to its longest"
        else:
            assert width == max(lengths) + spare, "padding on the left stays where positions would move"


def test_positions_may_move_where_they_are_relative():
    batch = batch_of([1, 9, 4, 2, 8], side="left", width=11)
    encoder, chunks = assert_exact("llama", batch, chunk_size=2, shift=True)
    assert [chunk["input_ids"].shape[1] for chunk in chunks] == [2, 8, 9]
    assert max(encoder.widths) == 9


def test_sorting_and_trimming_halve_the_tokens():
    """Lengths as of captions: most are short."""
    lengths = (torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 2 * 38 + 2).long().tolist()
    batch = batch_of(lengths)
    chunks = list(length_sorted_chunks(batch, chunk_size=8))
    assert sum(chunk["input_ids"].numel() for chunk in chunks) < 0.5 * batch["input_ids"].numel()


def test_everything_of_a_sample_moves_along():
    batch = batch_of([3, 1, 2, 1])
    batch |= {"captions": ["d", "a", "c", "b"], "flag": None, "scale": torch.tensor(2.0)}
    found = sorted_by_length(batch)
    assert found["captions"] == ["a", "b", "c", "d"]
    assert length_order(batch) == [1, 3, 2, 0]
    assert torch.equal(found["pixel_values"], batch["pixel_values"][[1, 3, 2, 0]])
    assert found["labels"].tolist() == batch["labels"][[1, 3, 2, 0]].tolist()
    assert (found["flag"], found["scale"]) == (None, torch.tensor(2.0))
    cut = concatenate([chunk["captions"] for chunk in length_sorted_chunks(batch, chunk_size=3)])
    assert cut == found["captions"]


def test_nested_texts_are_trimmed_each_by_its_own_mask():
    """Questions with several passages each, as the retriever takes them."""
    query, passages = batch_of([2, 1, 3, 1], width=5), batch_of([4, 1, 2, 2, 1, 1, 5, 1, 6, 1, 2, 3], width=7)
    names = ("input_ids", "attention_mask")
    batch = {
        "query": {name: query[name] for name in names},
        "passage": {name: passages[name].unflatten(0, (4, 3)) for name in names},
    }
    chunks = list(length_sorted_chunks(batch, chunk_size=2))
    assert [chunk["query"]["input_ids"].shape for chunk in chunks] == [(2, 1), (2, 3)]
    assert [chunk["passage"]["attention_mask"].shape for chunk in chunks] == [(2, 3, 3), (2, 3, 6)]
    bounded = list(length_sorted_chunks(batch, chunk_size=4, chunk_tokens=30))
    tokens = [sum(part["input_ids"].numel() for part in chunk.values()) for chunk in bounded]
    assert tokens == [20, 14, 21]

    def contrast(passage, query):
        return (passage[:, 0] @ query.T * 3).exp().sum().log() - (passage[:, 1:] * query[:, None]).sum()

    def retriever():
        torch.manual_seed(0)
        return Retriever(bert()).double()

    direct, encoder = retriever(), retriever()
    reps = direct(query={"query": batch["query"]}, passage={"passage": batch["passage"]})
    contrast(**reps).backward()
    assert trimming_is_inert(encoder, batch)
    GradientCache(encoder, contrast, 2).forward_backward_chunks(chunks)
    assert_equal(gradients(encoder), gradients(direct))


def test_vectors_of_tokens_are_trimmed_like_their_mask():
    batch = batch_of([2, 3], width=7, side="left", positions=True)
    vectors = torch.randn(2, 7, 5)
    found = trim_padding(batch | {"inputs_embeds": vectors})
    assert torch.equal(found["inputs_embeds"], vectors[:, 4:])
    several = {name: torch.stack([value, value], 1) for name, value in batch.items() if name != "labels"}
    found = trim_padding(several | {"inputs_embeds": torch.stack([vectors, vectors], 1)})
    assert found["inputs_embeds"].shape == (2, 2, 3, 5)


@pytest.mark.parametrize("name", ["special_tokens_mask", "global_attention_mask", "bbox"])
def test_all_that_a_tokenizer_makes_is_trimmed(name):
    batch = batch_of([3, 2], width=8)
    values = torch.arange(16).view(2, 8)
    values = torch.stack([values] * 4, 2) if name == "bbox" else values
    assert torch.equal(trim_padding(batch | {name: values})[name], values[:, :3])


def test_a_text_without_tokens_keeps_its_padding():
    batch = batch_of([0, 3, 2], width=6)
    assert trim_padding(batch)["input_ids"].shape == (3, 6)
    assert_exact("bert", batch, chunk_size=2)
    widths = [chunk["input_ids"].shape[1] for chunk in length_sorted_chunks(batch, chunk_size=2)]
    assert widths == [3, 6]


@pytest.mark.parametrize(
    ("kind", "pooling", "form", "shift", "inert"),
    [
        ("bert", "mean", {"side": "right"}, False, True),
        ("bert", "last", {"side": "right"}, False, False),
        ("bert", "mean", {"side": "left"}, True, False),
        ("bert", "mean", {"side": "left", "positions": True}, False, True),
        ("llama", "mean", {"side": "left"}, True, True),
        ("llama", "last", {"side": "left"}, True, True),
        ("llama", "last", {"side": "right"}, False, False),
    ],
)
def test_the_model_tells_whether_it_notices(kind, pooling, form, shift, inert):
    encoder = Pair(kind, pooling).double().train()
    batch = batch_of([9, 3, 5, 4], width=12, **form)
    assert trimming_is_inert(encoder, batch, shift=shift) is inert
    assert encoder.training
    with pytest.raises(ValueError, match="padding that trimming would cut, got none"):
        trimming_is_inert(encoder, trim_padding(batch_of([9, 9], **form)), shift=shift)


def test_a_tower_that_pools_its_last_position_is_found_out():
    encoder = DualEncoder(siglip(**(TEXT | {"max_position_embeddings": 12})))
    batch = {**batch_of([4, 9], width=12), "pixel_values": torch.randn(2, 3, 8, 8)}
    assert not trimming_is_inert(encoder, batch)


def test_bad_inputs_are_refused():
    batch = batch_of([3, 1])
    with pytest.raises(ValueError, match="expected an attention_mask"):
        list(length_sorted_chunks({"input_ids": batch["input_ids"]}, chunk_size=2))
    with pytest.raises(ValueError, match="the same number of samples"):
        sorted_by_length(batch | {"labels": torch.zeros(3)})
    for wrong in ({"chunk_size": 0}, {"chunk_size": 2, "chunk_tokens": 0}):
        with pytest.raises(ValueError, match="at least 1 sample and token"):
            list(length_sorted_chunks(batch, **wrong))


# --- the trainer, with tokenizers that pad on the left ---


def left_padding(model_max_length=16):
    """A processor like those of decoders: padding on the left, and no end token to pool at."""
    processor = numbers_processor()
    backend = processor.tokenizer.backend_tokenizer
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
    return processor


class Numbers(Pair):
    """For the built-in images, uint8."""

    def __init__(self, kind, pooling):
        super().__init__(kind, pooling)
        self.image = nn.Linear(3 * 32 * 32, 8)

    def forward(self, image=None, text=None):
        if image is not None:
            image = {"pixel_values": image["pixel_values"].to(self.scale.dtype) / 255}
        return super().forward(image, text)


@pytest.mark.parametrize(("kind", "padding"), [("llama", "longest"), ("bert", "max_length")])
def test_the_trainer_is_exact_with_padding_on_the_left(tmp_path, kind, padding):
    """One step of SGD in sorted chunks is that of the whole batch, padded to the maximum, in one graph.

    A decoder with rotary positions may be trimmed, one that counts columns is padded to the maximum.
    """
    data, rate = HandwrittenNumbers("train", size=20), 0.5
    arguments = CachedContrastiveArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=20,
        chunk_size=6,
        chunk_tokens=64,
        max_steps=1,
        learning_rate=rate,
        optim="sgd",
        max_grad_norm=0.0,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    encoder = Numbers(kind, "last").double()
    collator = ImageTextCollator(left_padding())
    trainer = CachedContrastiveTrainer(
        encoder, arguments, loss="clip", train_dataset=data, data_collator=collator
    )
    assert collator.padding == padding
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    encoder.widths.clear()
    trainer.train()
    assert len(set(encoder.widths)) > 1 if kind == "llama" else set(encoder.widths) == {16}

    reference = Numbers(kind, "last").double()
    full = ImageTextCollator(left_padding())
    full.padding = "max_length"
    batch = full([data[i] for i in range(20)])
    assert batch["attention_mask"][:, 0].sum() == 0, "padding must be on the left"
    assert batch["attention_mask"][:, -1].sum() == 20
    _, expected = whole(reference, batch)
    moved = {name: (before[name] - p.detach()) / rate for name, p in encoder.named_parameters()}
    for name, value in expected.items():
        if value is not None:
            # Rotary angles are rounded to float32.
            tolerance = 1e-5 if kind == "llama" else 1e-9
            assert (moved[name] - value).norm() <= tolerance * max(1e-2, float(value.norm())), name


def test_a_tokenizer_without_a_limit_is_tested_too():
    """It has no maximum length to pad to, so a tower that sees the padding cannot be trained exactly."""
    collator = ImageTextCollator(left_padding(model_max_length=int(1e30)))
    assert collator.max_length is None
    assert padding_is_inert(Numbers("llama", "last"), collator)
    with pytest.raises(ValueError, match=r"a maximum length.*pass max_length"):
        padding_is_inert(Numbers("bert", "last"), collator)
    limited = ImageTextCollator(left_padding(model_max_length=int(1e30)), max_length=16)
    assert not padding_is_inert(Numbers("bert", "last"), limited)


@pytest.mark.parametrize(
    ("encoder", "look"),
    [
        (
            Numbers("llama", "last"),
            lambda encoder: padding_is_inert(encoder, ImageTextCollator(left_padding())),
        ),
        (
            Pair("bert", "mean").double(),
            lambda encoder: trimming_is_inert(encoder, batch_of([9, 3], width=12)),
        ),
    ],
)
def test_a_look_at_padding_leaves_every_part_in_its_mode(encoder, look):
    encoder.train()
    next(module for module in encoder.modules() if isinstance(module, torch.nn.Linear)).eval()
    before = [module.training for module in encoder.modules()]
    assert set(before) == {True, False}
    look(encoder)
    assert [module.training for module in encoder.modules()] == before
