"""One walk over every structure that an encoder's inputs may have."""

from collections import UserDict

import pytest
import torch
from transformers import BatchEncoding

from gc_accel.inputs.joining import join
from gc_accel.inputs.nested import batch_size, concatenate, select, slice_inputs, split, unpacked
from gc_accel.inputs.packing import Packed
from gc_accel.inputs.walk import INPUTS, flatten, leaves, map_samples

B = 5
CAPTIONS = [f"caption {i}" for i in range(B)]


def tensor(*shape):
    """A tensor `(B, ...)` of which every number differs."""
    return torch.arange(B * torch.Size(shape).numel()).reshape(B, *shape)


def patches():
    return Packed(torch.arange(14).reshape(7, 2), (2, 0, 1, 4, 0))


STRUCTURES = {  # inputs, and the paths of their per-sample values
    "tensor": (lambda: tensor(3), ["batch"]),
    "packed": (patches, ["batch"]),
    "captions": (lambda: list(CAPTIONS), ["batch"]),
    "a tuple of captions": (lambda: tuple(CAPTIONS), ["batch"]),
    "token lists": (lambda: [[i] * (i + 1) for i in range(B)], ["batch"]),
    "dict": (lambda: {"x": tensor(3), "flag": True, "none": None}, ["batch['x']"]),
    "BatchEncoding": (lambda: BatchEncoding({"input_ids": tensor(4)}), ["batch['input_ids']"]),
    "UserDict": (lambda: UserDict(a=tensor(), b=list(CAPTIONS)), ["batch['a']", "batch['b']"]),
    "list": (lambda: [tensor(), None, list(CAPTIONS)], ["batch[0]", "batch[2]"]),
    "pair": (
        lambda: ([tensor(2), torch.tensor(3.0)], {"rows": patches(), "empty": []}),
        ["batch[0][0]", "batch[1]['rows']"],
    ),
    "nested": (
        lambda: {"page": {"pixels": patches(), "ids": tensor(3)}, "text": [UserDict(ids=tensor(1)), "no"]},
        ["batch['page']['pixels']", "batch['page']['ids']", "batch['text'][0]['ids']"],
    ),
}
every_structure = pytest.mark.parametrize(("make", "paths"), STRUCTURES.values(), ids=STRUCTURES)


def as_lists(inputs):
    """Inputs as plain values, which compare with `==`."""
    return map_samples(
        lambda v: (v.rows.tolist(), v.counts) if isinstance(v, Packed) else [*map(plain, v)], inputs
    )


def plain(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value


@every_structure
def test_leaves_are_the_per_sample_values_with_their_paths(make, paths):
    inputs = make()
    assert [path for path, _ in leaves(inputs)] == paths
    seen = []
    map_samples(seen.append, inputs)
    assert [id(value) for value in seen] == [id(value) for _, value in leaves(inputs)]
    assert batch_size(inputs) == B


@every_structure
def test_a_map_keeps_the_structure_and_whole_batch_values(make, paths):
    def check(before, after):
        if hasattr(before, "keys"):
            assert type(after) is dict
            assert list(after) == list(before)
            for key in before:
                check(before[key], after[key])
        elif any(before is value for _, value in leaves(inputs)):
            assert after == "mapped"
        elif isinstance(before, (list, tuple)) and before:
            assert type(after) is type(before)
            for one, other in zip(before, after, strict=True):
                check(one, other)
        else:
            assert after is before

    inputs = make()
    check(inputs, map_samples(lambda value: "mapped", inputs))


@every_structure
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5])
def test_chunks_joined_are_the_batch(make, paths, chunk_size):
    inputs = make()
    chunks = list(split(inputs, chunk_size))
    assert [batch_size(chunk) for chunk in chunks[:-1]] == [chunk_size] * (len(chunks) - 1)
    assert as_lists(concatenate(chunks)) == as_lists(inputs)
    batch, padded = join(chunks)
    assert as_lists(batch) == as_lists(inputs)
    assert padded == []


@every_structure
def test_a_slice_is_a_selection_of_consecutive_samples(make, paths):
    inputs = make()
    assert as_lists(slice_inputs(inputs, 1, 4)) == as_lists(select(inputs, [1, 2, 3]))
    assert as_lists(select(select(inputs, [4, 2, 0, 1, 3]), [2, 3, 1, 4, 0])) == as_lists(inputs)


def test_slices_are_views_and_selections_are_copies():
    inputs = {"x": tensor(3), "rows": patches()}
    view, copy = slice_inputs(inputs, 0, 3), select(inputs, [0, 1, 2])
    for a, b in ((inputs["x"], "x"), (inputs["rows"].rows, "rows")):
        cut, chosen = (chunk[b] if b == "x" else chunk[b].rows for chunk in (view, copy))
        assert cut.data_ptr() == a.data_ptr() != chosen.data_ptr()


def test_a_slice_of_captions_takes_no_time_of_the_whole_list():
    class Counted(list):
        looked = 0

        def __iter__(self):
            for value in super().__iter__():
                Counted.looked += 1
                yield value

        def __getitem__(self, index):
            return Counted(super().__getitem__(index))

    captions = Counted(["caption"] * 100_000)
    slice_inputs(captions, 500, 504)
    assert 0 < Counted.looked <= INPUTS


def test_tensors_of_different_widths_are_padded_and_named():
    chunks = [
        {"text": {"ids": torch.ones(2, 3), "mask": torch.ones(2, 3, 1)}, "x": torch.ones(2, 4)},
        {"text": {"ids": torch.ones(1, 5), "mask": torch.ones(1, 2, 2)}, "x": torch.ones(1, 4)},
    ]
    batch, padded = join(chunks)
    assert padded == ["batch['text']['ids']", "batch['text']['mask']"]
    assert batch["text"]["ids"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["text"]["mask"].shape == (3, 3, 2)
    assert batch["text"]["mask"].sum(dim=(1, 2)).tolist() == [3, 3, 4]


def test_a_mapping_loses_packed_values_without_rows():
    none = patches().cut(1, 2)
    given = unpacked({"page": {"pixels": none, "sizes": patches(), "ids": tensor()}, "list": [none]})
    assert given["page"].keys() == {"sizes", "ids"}
    assert given["page"]["sizes"].shape == (7, 2)
    assert given["list"][0].shape == (0, 2)


def test_flattened_values_are_those_of_any_depth():
    x, y = tensor(), tensor(2)
    held = list(flatten({"a": [[x], (None, UserDict(b=y))], "c": "caption"}))
    assert [id(value) for value in held] == [id(x), id(None), id(y), id(held[-1])]
    assert held[-1] == "caption"


def test_structures_that_differ_are_refused():
    with pytest.raises(ValueError, match="zip"):
        concatenate([[tensor(), tensor()], [tensor()]])
    with pytest.raises(KeyError, match="b"):
        concatenate([{"a": tensor(), "b": tensor()}, {"a": tensor()}])
