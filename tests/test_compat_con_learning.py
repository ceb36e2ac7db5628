"""The class in place of `grad_cache_con_learning.GradCache`: the original training steps, line by line."""

import copy
import re
from importlib.metadata import metadata

import pytest
import torch
import torch.nn.functional as F
from grad_cache_con_learning import losses as published_losses
from torch import nn

from gc_accel import losses as streaming
from gc_accel.compat.grad_cache_con_learning import GradCache
from gc_accel.compat.grad_cache_con_learning.losses import ConLoss, SupConLoss
from tests.comparing import assert_equal, gradients

SIZE = 7
CHUNK_SIZES = (1, 4, 5, 64)
HERE = "gc_accel.compat.grad_cache_con_learning"


class Net(nn.Module):
    """Blocks with an exit each, or the last one alone; what comes out is L2-normalised."""

    def __init__(self, exits=0, dropout=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(nn.Linear(12, 12).double() for _ in range(exits + 1))
        self.heads = nn.ModuleList(nn.Linear(12, 5).double() for _ in range(exits + 1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, images):
        x, features = images.flatten(1), []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = self.dropout(block(x).relu())
            features.append(F.normalize(head(x), dim=1))
        return (features[:-1], features[-1]) if len(features) > 1 else features[0]


def images(size=2 * SIZE):
    return torch.randn(size, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def labels():
    return torch.tensor([0, 1, 0, 2, 1, 0, 3])


def blocks_of_the_readme():
    """The Python blocks of the published README, which is in the package's metadata."""
    text = metadata("grad-cache-con-learning").get_payload()
    found = re.findall(r"```py\n(.*?)```", text, flags=re.DOTALL)
    assert len(found) == 11
    return {name: found[2 + 3 * i : 5 + 3 * i] for i, name in enumerate(("SupCon", "SimCLR", "SelfCon"))}


@pytest.mark.parametrize("name", ["SupCon", "SimCLR", "SelfCon"])
def test_the_blocks_of_the_published_readme(name):
    """Its un-cached block, with the published losses, is the oracle of the block that takes its place."""
    model = Net(exits=2 if name == "SelfCon" else 0)
    batch = images(SIZE) if name == "SelfCon" else images()
    construct, direct, cached = blocks_of_the_readme()[name]
    results = []
    for step in (direct, cached):
        trained = copy.deepcopy(model)
        loss = published_losses.ConLoss() if name == "SelfCon" else published_losses.SupConLoss()
        variables = {"torch": torch, "model": trained, "images": batch, "x": batch, "criterion": loss}
        variables |= {"y": labels(), "labels": labels(), "batch_size": SIZE}
        variables["optimizer"] = torch.optim.SGD(trained.parameters(), lr=0.5)
        exec(construct.replace("grad_cache_con_learning", HERE), variables)
        exec(step, variables)
        moved = {key: value - model.state_dict()[key] for key, value in trained.state_dict().items()}
        results.append((gradients(trained), moved))
    for expected, got in zip(*results, strict=True):
        assert_equal(got, expected)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("name", ["SupCon", "SimCLR"])
def test_pairs_are_those_of_the_batch_for_any_chunk_size(name, chunk_size):
    model, y = Net(), labels() if name == "SupCon" else None
    views = torch.stack(model(images()).chunk(2), dim=1)
    expected_loss = published_losses.SupConLoss()(views, y)
    expected_loss.backward()
    expected = gradients(model)
    model.zero_grad()
    loss = GradCache(model, chunk_size, SupConLoss(), name)(images(), y)
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-6, atol=0)  # its mask is in float32
    assert_equal(gradients(model), expected)


def test_pairs_within_chunks_would_be_seen():
    """The published class halves every chunk, which pairs samples that do not belong together."""
    model, y = Net(), labels()
    published_losses.SupConLoss()(torch.stack(model(images()).chunk(2), 1), y).backward()
    expected = gradients(model)
    model.zero_grad()
    halved = [torch.stack(model(chunk).chunk(2), 1) for chunk in images().split(4)]
    published_losses.SupConLoss()(torch.cat(halved), y).backward()
    with pytest.raises(AssertionError, match="is off by"):
        assert_equal(gradients(model), expected)


FLAGS = {
    "none": {},
    "supcon_s": {"supcon_s": True},
    "selfcon_s_FG": {"selfcon_s_FG": True},
    "selfcon_m_FG": {"selfcon_m_FG": True},
}


@pytest.mark.parametrize("chunk_size", [3, 64])
@pytest.mark.parametrize("flags", FLAGS)
def test_selfcon_with_the_flags_of_its_loss(flags, chunk_size):
    exits = 0 if flags == "supcon_s" else 2
    model, options = Net(exits), FLAGS[flags]
    batch = images() if flags == "selfcon_m_FG" else images(SIZE)
    outputs = model(batch)
    views = torch.stack([*outputs[0], outputs[1]] if exits else [outputs], dim=1)
    published_losses.ConLoss()(views, labels(), **options).backward()
    expected = gradients(model)
    model.zero_grad()
    model.register_forward_hook(lambda *args: args[2] if exits else ([], args[2]))
    GradCache(model, chunk_size, ConLoss(), "SelfCon").cache_step(batch, labels(), **options)
    assert_equal(gradients(model), expected)


def test_an_exit_that_is_no_list():
    class OneExit(Net):
        def forward(self, images):
            exits, backbone = super().forward(images)
            return exits[0], backbone

    model = OneExit(exits=1)
    ConLoss()(torch.stack(model(images()), dim=1), torch.arange(14) % 5).backward()
    expected = gradients(model)
    model.zero_grad()
    GradCache(model, 4, ConLoss(), "SelfCon")(images(), torch.arange(14) % 5)
    assert_equal(gradients(model), expected)


def test_losses_of_this_package_fit_too():
    model = Net()
    cache = GradCache(model, 4, streaming.SupConLoss(base_temperature=0.07))
    cache(images(), labels())
    expected = gradients(model)
    model.zero_grad()
    GradCache(model, 4, SupConLoss())(images(), labels())
    assert_equal(gradients(model), expected)


def test_frozen_parameters_stay_frozen():
    model = Net()
    model.blocks.requires_grad_(False)
    GradCache(model, 4, SupConLoss())(images(), labels())
    assert model.blocks[0].weight.grad is None
    assert not model.blocks[0].weight.requires_grad
    assert model.heads[0].weight.grad.norm() > 0


def test_dropout_is_that_of_the_first_pass():
    model = Net(dropout=0.5)
    torch.manual_seed(4)
    rows = torch.cat([model(chunk) for chunk in images().split(4)])
    SupConLoss()(torch.stack(rows.chunk(2), 1), labels()).backward()
    expected = gradients(model)
    model.zero_grad()
    torch.manual_seed(4)
    GradCache(model, 4, SupConLoss())(images(), labels())
    assert_equal(gradients(model), expected)
    SupConLoss()(torch.stack(model.eval()(images()).chunk(2), 1), labels()).backward()
    with pytest.raises(AssertionError, match="is off by"):
        assert_equal(gradients(model), expected)


def test_autocast_holds_for_the_model_too():
    model, seen = Net().float(), []
    model.blocks[0].register_forward_hook(lambda *args: seen.append(args[2].dtype))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    GradCache(model, 4, SupConLoss(), fp16=True, scaler=scaler)(images().float(), labels())
    assert set(seen) == {torch.float16}
    found = {name: grad / 2**6 for name, grad in gradients(model).items()}
    model.zero_grad()
    SupConLoss()(torch.stack(model(images().float()).chunk(2), 1), labels()).backward()
    largest = max(float(p.grad.norm()) for p in model.parameters())
    for name, p in model.named_parameters():
        assert float((found[name] - p.grad).norm()) < 0.05 * largest, name


def test_evaluation_without_a_gradient():
    model = Net()
    with torch.no_grad():
        loss = GradCache(model, 4, SupConLoss())(images(), labels())
        torch.testing.assert_close(loss, SupConLoss()(torch.stack(model(images()).chunk(2), 1), labels()))


class TestRefused:
    def check(self, match, *args, options=(), **kwargs):
        options = {"chunk_size": 4, "loss_fn": SupConLoss(), **dict(options)}
        model = Net()
        with pytest.raises(ValueError, match=match):
            GradCache(model, **options)(*args, **kwargs)
        assert all(p.grad is None for p in model.parameters())

    def test_chunk_sizes_and_losses(self):
        self.check("chunk_size, once", options={"chunk_sizes": 4})
        self.check("chunk_size, once", options={"chunk_size": None})
        self.check("a loss_fn", options={"loss_fn": None})
        self.check("chunk size of at least 1", options={"chunk_size": 0})
        self.check("loss_type", options={"loss_type": "MoCo"})

    def test_float16_without_a_scaler(self):
        self.check("expected a scaler", options={"fp16": True})

    def test_labels(self):
        self.check("no labels for SimCLR", images(), labels(), options={"loss_type": "SimCLR"})
        self.check("labels for SupCon, got none", images())

    def test_an_odd_number_of_views(self):
        self.check("two views of every image, got 13 rows", images(13), labels())

    def test_batch_norm(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)).double()
        with pytest.raises(ValueError, match="BatchNorm in training mode"):
            GradCache(model, 4, SupConLoss())(images(), labels())
        GradCache(model, 4, SupConLoss(), batch_norm="ghost")(images(), labels())
        assert model[1].weight.grad.norm() > 0


def test_the_published_class_cannot_be_imported():
    with pytest.raises(ImportError):
        from grad_cache_con_learning import GradCache  # noqa: F401
