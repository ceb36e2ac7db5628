"""Packed inputs of vision-language processors are cut by sample, whatever the images of each."""

from itertools import chain
from types import MappingProxyType
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import recursively_apply, send_to_device
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from gc_accel import GradientCache, check_equivalence
from gc_accel.inputs.nested import batch_size, concatenate, select, slice_inputs, split, unpacked
from gc_accel.inputs.packing import Packed, images_per_sample, pack
from gc_accel.losses import dense
from tests.comparing import assert_equal, gradients
from tests.ranks import run_on_ranks

IMAGE, START, PAD = 40, 41, 0
PACKED = {"pixel_values": "image_grid_thw"}
IMAGES = (0, 2, 1, 1, 0, 3, 0)  # of each sample


def qwen():
    """A tiny Qwen2-VL from a configuration, with patches of 4 x 4 merged two by two."""
    torch.manual_seed(3)
    text = {
        "vocab_size": 48,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    } | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), PAD)
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=42,
        vision_start_token_id=START,
    )
    model = Qwen2VLModel(config)
    for module in model.language_model.modules():  # whose norms would round to float32
        for name, child in module.named_children():
            if isinstance(child, Qwen2VLRMSNorm):
                setattr(module, name, nn.RMSNorm(child.weight.shape, child.variance_epsilon))
    return model


class Pages(nn.Module):
    """Questions and pages, which are text with any number of images; the last token pooled."""

    streams = MappingProxyType({"page": ("page",), "question": ("question",)})

    def __init__(self):
        super().__init__()
        self.model = qwen()
        self.grids = []  # of every call

    def forward(self, page=None, question=None):
        given = {"page": page and page["page"], "question": question and question["question"]}
        return {name: self.embed(**inputs) for name, inputs in given.items() if inputs is not None}

    def embed(self, **inputs):
        self.grids.append(inputs.get("image_grid_thw"))
        # Rotary angles in float32 would be rounded in one way or another by their place in the tensor.
        with patch.object(torch.Tensor, "float", torch.Tensor.double):
            hidden = self.model(**inputs, use_cache=False).last_hidden_state
        return normalize(hidden[:, -1], dim=-1)


def contrast(page, question):
    return dense.clip_loss(page, question, torch.tensor([9.0], dtype=page.dtype))


def pages(images=IMAGES, *, seed=0):
    """What the processor makes: left-padded texts with a run of image tokens per image, and packed patches."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *size):
        return torch.randint(low, high, size, generator=generator)

    pictures = [
        draw(0, 256, 3, 8 * int(draw(1, 4, 1)), 8 * int(draw(1, 4, 1))).to(torch.uint8)
        for _ in range(sum(images))
    ]
    if pictures:
        options = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 24 * 24}
        batch = dict(Qwen2VLImageProcessor(**options)(pictures, return_tensors="pt"))
        batch["pixel_values"] = batch["pixel_values"].double()
    else:
        batch = {"image_grid_thw": torch.zeros(0, 3, dtype=torch.long)}
    remaining = iter((batch["image_grid_thw"].prod(1) // 4).tolist())
    texts = []
    for count in images:
        runs = [[START, *[IMAGE] * next(remaining)] for _ in range(count)]
        texts.append([*draw(1, 40, int(draw(1, 5, 1))).tolist(), *chain(*runs), *draw(1, 40, 2).tolist()])
    width = max(map(len, texts))
    batch["input_ids"] = torch.tensor([[PAD] * (width - len(text)) + text for text in texts])
    batch["attention_mask"] = (batch["input_ids"] != PAD).long()
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    return batch if pictures else {key: value for key, value in batch.items() if key != "image_grid_thw"}


def packed_pages(images=IMAGES, **options):
    return pack(pages(images, **options), PACKED, images=images)


def whole(images=IMAGES):
    """A batch as the processor makes it; nothing in it has been packed."""
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(1, 40, (len(images), 5), generator=generator)
    return {"page": pages(images), "question": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}


def packed(images=IMAGES):
    batch = whole(images)
    return batch | {"page": pack(batch["page"], PACKED, images=images)}


def direct(images=IMAGES):
    """The oracle: the processor's batch in one call and one graph."""
    encoder, batch = Pages().double(), whole(images)
    loss = contrast(encoder.embed(**batch["page"]), encoder.embed(**batch["question"]))
    loss.backward()
    return loss.detach(), gradients(encoder)


@pytest.mark.parametrize("retain", [0, "all"])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7])
def test_chunks_give_the_gradient_of_the_whole_batch(chunk_size, retain):
    expected_loss, expected = direct()
    assert expected["model.visual.patch_embed.proj.weight"].norm() > 1e-3
    assert len(pages()["image_grid_thw"].unique(dim=0)) > 2, "images must differ in size"
    encoder = Pages().double()
    loss = GradientCache(encoder, contrast, chunk_size, retain=retain).forward_backward(packed())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=0)
    assert_equal(gradients(encoder), expected)
    assert None in encoder.grids, "a chunk without images must have been encoded without any"


def test_a_single_stream_takes_packed_inputs_by_keyword():
    """An encoder without streams, as `model(**batch)` is called."""

    class Embedder(Pages):
        streams = MappingProxyType({None: ()})

        def forward(self, **inputs):
            return self.embed(**inputs)

    def spread(reps):
        return (reps @ reps.T).exp().mean()

    reference = Embedder().double()
    spread(reference(**pages())).backward()
    encoder = Embedder().double()
    GradientCache(encoder, spread, 3).forward_backward(packed_pages())
    assert_equal(gradients(encoder), gradients(reference))


def test_a_batch_without_any_image_is_text():
    images = (0, 0, 0)
    assert "pixel_values" not in packed(images)["page"]
    encoder = Pages().double()
    GradientCache(encoder, contrast, 2).forward_backward(packed(images))
    assert_equal(gradients(encoder), direct(images)[1])


def test_equivalence_is_checked_on_packed_inputs_too():
    report = check_equivalence(Pages().double(), contrast, packed(), chunk_size=2)
    assert report.ok
    assert report.max_relative_error < 1e-9


def test_unpacked_inputs_are_refused_with_a_word_on_packing():
    with pytest.raises(ValueError, match=r"'pixel_values'\] has .*gc_accel\.inputs\.packing\.pack"):
        GradientCache(Pages().double(), contrast, 2).forward_backward(whole())


# --- several ranks ---

SHARES = ((0, 4), (4, 7))


def step_on_a_rank(rank):
    start, stop = SHARES[rank]
    own = slice_inputs(packed(), start, stop)
    assert own["page"]["pixel_values"].counts[0] == 0, "the call that reduces must be without images"
    encoder = DistributedDataParallel(Pages().double(), find_unused_parameters=True)
    loss = GradientCache(encoder, contrast, 2).forward_backward(own)
    return loss, gradients(encoder.module), dist.get_world_size()


@pytest.mark.slow
def test_ranks_with_other_images_train_as_one_process(tmp_path):
    expected_loss, expected = direct()
    results = run_on_ranks(step_on_a_rank, 2, tmp_path)
    for loss, grads, world_size in results:
        assert world_size == 2
        torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=0)
        assert_equal(grads, expected)


# --- the pieces ---


def test_packed_rows_go_with_their_sample():
    rows = Packed(torch.arange(6), (2, 0, 3, 1))
    assert batch_size({"x": rows, "y": torch.zeros(4)}) == 4
    assert rows.cut(1, 3).rows.tolist() == [2, 3, 4]
    assert rows.cut(1, 3).counts == (0, 3)
    assert rows.select([3, 2, 1]).rows.tolist() == [5, 2, 3, 4]
    assert unpacked([{"a": rows, "b": rows.cut(1, 2)}])[0].keys() == {"a"}


def test_packed_tensors_travel_with_the_batch():
    """Whatever moves, converts or records tensors in nested inputs finds them."""
    batch = {"page": packed_pages()}
    found = []
    recursively_apply(found.append, batch)
    assert len(found) == 5
    moved = send_to_device(batch, torch.device("meta"))["page"]
    assert all(unpacked(value).device.type == "meta" for value in moved.values())
    assert moved["pixel_values"].counts == batch["page"]["pixel_values"].counts


def test_sizes_of_an_image_are_one_row_each():
    batch = {
        "pixel_values": torch.arange(4),
        "image_sizes": torch.arange(8).reshape(4, 2),
        "x": torch.zeros(3),
    }
    found = pack(batch, {"pixel_values": None, "image_sizes": None}, images=torch.tensor([1, 3, 0]))
    chunk = slice_inputs(found, 1, 3)
    assert unpacked(chunk)["pixel_values"].tolist() == [1, 2, 3]
    assert unpacked(chunk)["image_sizes"].tolist() == [[2, 3], [4, 5], [6, 7]]
    assert pack(batch, {"pixel_values": None})["pixel_values"].counts == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("images", "match"),
    [
        ((0, 2, 1, 1, 0, 2, 0), r"add up to the 7 of.*got \[0, 2,"),
        ((9, -3, 1), "got"),
        (None, "the same number"),
    ],
)
def test_images_that_do_not_add_up_are_refused(images, match):
    with pytest.raises(ValueError, match=match):
        batch_size(pack(pages((0, 2, 1, 1, 0, 3, 0, 0)), PACKED, images=images))


def test_missing_values_are_named():
    batch = pages()
    with pytest.raises(ValueError, match=r"together, got a batch without \['image_grid_thw'\]"):
        pack({"pixel_values": batch["pixel_values"]}, PACKED)
    with pytest.raises(ValueError, match=r"rows of 'pixel_values', got .* and \d+ rows"):
        pack(batch | {"pixel_values": batch["pixel_values"][:-1]}, PACKED, images=IMAGES)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(1, 10), st.integers(0, 99), st.randoms()
)
def test_any_images_come_back_from_any_chunks_and_any_order(images, chunk_size, seed, random):
    batch = pages(images, seed=seed)
    if sum(images):
        counts = (batch["input_ids"] == IMAGE).sum(1)
        assert images_per_sample(counts, batch["image_grid_thw"]) == list(images)
    together = pack(batch, PACKED, images=images)
    order = list(range(len(images)))
    random.shuffle(order)
    shuffled = select(together, order)
    back = select(shuffled, [order.index(i) for i in range(len(images))])
    chunks = list(split(back, chunk_size))
    assert max(map(batch_size, chunks)) <= chunk_size
    for name, value in batch.items():
        joined = concatenate([chunk[name] for chunk in chunks])
        assert torch.equal(joined.rows if isinstance(joined, Packed) else joined, value)
    # by hand: the rows of each sample
    if sum(images):
        ends = torch.cat([torch.zeros(1, dtype=torch.long), batch["image_grid_thw"].prod(1).cumsum(0)])
        owner = torch.repeat_interleave(torch.arange(len(images)), torch.tensor(images))
        for position, sample in enumerate(order):
            own = [batch["pixel_values"][ends[i] : ends[i + 1]] for i in torch.where(owner == sample)[0]]
            cut = slice_inputs(shuffled, position, position + 1)["pixel_values"].rows
            assert torch.equal(cut, torch.cat(own) if own else cut[:0])


def test_images_that_two_samples_would_share_are_refused():
    sizes = torch.tensor([[1, 2, 2], [1, 4, 4]])
    assert images_per_sample(torch.tensor([1, 0, 4]), sizes) == [1, 0, 1]
    for tokens in ([2, 3], [0, 0], [1, 3]):
        with pytest.raises(ValueError, match="part 2 images of 20 rows by sample"):
            images_per_sample(torch.tensor(tokens), sizes)
