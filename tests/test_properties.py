"""No input structure, batch size, chunk size, retained graph or tile changes the gradient: random cases."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import normalize

from gc_accel import GradientCache
from gc_accel.losses import CLIPLoss, SigLIPLoss, dense
from tests.comparing import assert_equal, gradients

CASES = 500
WIDTH, DIM = 3, 4  # of an input and of a representation
LOSSES = {  # of a tile budget, which SigLIP has no use for; and the dense twin
    "clip": (lambda budget: CLIPLoss(tile_budget=budget), dense.clip_loss),
    "siglip": (lambda budget: SigLIPLoss(), dense.siglip_loss),
}


class Nested(nn.Module):
    """An encoder of inputs of any nesting: a small map of every tensor, weighted by its place."""

    global_names = ("logit_scale",)

    def __init__(self):
        super().__init__()
        self.leaf = nn.Sequential(nn.Linear(WIDTH, DIM), nn.Tanh())
        self.image, self.text = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.scale = nn.Parameter(torch.tensor([0.5]))

    def forward(self, *args, **kwargs):
        rows = self.embed(args, 1) + self.embed(kwargs, 2)
        image, text = (normalize(head(rows), dim=-1) for head in (self.image, self.text))
        return {"image": image, "text": text, "logit_scale": self.scale.exp()}

    def embed(self, inputs, place):
        if isinstance(inputs, Tensor):
            return (self.leaf(inputs) if inputs.ndim else inputs) / place
        values = inputs.values() if isinstance(inputs, dict) else inputs
        return sum((self.embed(value, place + i) for i, value in enumerate(values)), torch.zeros(()))


def rows(size):
    """A tensor of `size` samples."""
    seeds = st.integers(0, 2**20)
    return seeds.map(
        lambda seed: torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(seed)).double()
    )


def lists(size, each):
    return st.builds(lambda first, rest: [first, *rest], rows(size), st.lists(each, max_size=2))


def mappings(size, each):
    others = st.dictionaries(st.sampled_from("abc"), each, max_size=2)
    return st.builds(lambda first, rest: {"x": first} | rest, rows(size), others)


@st.composite
def cases(draw):
    """Inputs and a configuration; 0-d tensors belong to the whole batch."""
    size = draw(st.integers(1, 12))
    whole = st.floats(-1, 1).map(lambda value: torch.tensor(value, dtype=torch.float64))
    inner = st.recursive(
        rows(size) | whole, lambda each: lists(size, each) | mappings(size, each), max_leaves=4
    )
    structures = {
        "tensor": rows(size),
        "list": lists(size, inner),
        "mapping": mappings(size, inner),
        "list and mapping": st.tuples(lists(size, inner), mappings(size, inner)),
    }
    kind = draw(st.sampled_from(list(structures)))
    return {
        "kind": kind,
        "inputs": draw(structures[kind]),
        "size": size,
        "chunk_size": draw(st.integers(1, 14)),
        "retain": draw(st.sampled_from([0, 1, 2, 5, "all"])),
        "tile_budget": draw(st.sampled_from([0, 64, 1024, 2**28])),
        # One pair has no negatives, and the loss of CLIP no gradient.
        "loss": draw(st.sampled_from(list(LOSSES))) if size > 1 else "siglip",
    }


def call(encoder, kind, inputs):
    """By hand, not in the way that the package finds."""
    if kind == "list":
        return encoder(*inputs)
    if kind == "mapping":
        return encoder(**inputs)
    return encoder(inputs) if kind == "tensor" else encoder(*inputs[0], **inputs[1])


def depth(inputs):
    if isinstance(inputs, Tensor):
        return 0
    return 1 + max(map(depth, inputs.values() if isinstance(inputs, dict) else inputs))


@pytest.mark.slow
def test_no_random_case_changes_the_gradient():
    """float64, to 1e-9, against one forward of everything and a dense loss."""
    seen = Counter()

    @settings(max_examples=CASES, deadline=None, derandomize=True, database=None)
    @given(cases())
    def check(case):
        torch.manual_seed(case["size"])
        encoder = Nested().double()
        streaming, reference = LOSSES[case["loss"]]
        expected_loss = reference(**call(encoder, case["kind"], case["inputs"]))
        expected_loss.backward()
        expected = gradients(encoder)
        encoder.zero_grad(set_to_none=True)
        loss_fn = streaming(case["tile_budget"])
        cache = GradientCache(encoder, loss_fn, case["chunk_size"], retain=case["retain"])
        loss = cache.forward_backward(case["inputs"])
        torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-9, atol=1e-12)
        assert_equal(gradients(encoder), expected)
        seen.update(["cases", case["kind"], case["loss"], ("retain", case["retain"])])
        seen.update([("size", case["size"]), ("chunk_size", case["chunk_size"])])
        seen.update(
            ["deep"] * (depth(case["inputs"]) > 2) + ["ragged"] * (case["size"] % case["chunk_size"] > 0)
        )

    check()
    assert seen["cases"] >= CASES
    assert min(seen[kind] for kind in ("tensor", "list", "mapping", "list and mapping", *LOSSES)) > CASES / 20
    assert min(seen["deep"], seen["ragged"]) > CASES / 10
    assert all(seen["retain", n] for n in (0, 1, 2, 5, "all"))
    assert all(seen["size", n] for n in range(1, 13))
    assert all(seen["chunk_size", n] for n in range(1, 15))
