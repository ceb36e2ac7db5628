"""A loss of the library inside of anything else is that of the global batch, on any number of ranks."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gc_accel import GradientCache
from gc_accel.compat.grad_cache.loss import DistributedContrastiveLoss
from gc_accel.losses import CLIPLoss, NNCLRLoss, SigLIPLoss, dense
from tests.comparing import assert_equal, gradients
from tests.models import dual_encoder, image_text_batch
from tests.ranks import run_on_ranks

SIZE = 12


def clip(**reps: Tensor) -> Tensor:
    return dense.clip_loss(reps["image"], reps["text"], reps["logit_scale"])


def clip_and_siglip(**reps: Tensor) -> Tensor:
    return clip(**reps) + 0.3 * dense.siglip_loss(**reps)


def with_a_term(**reps: Tensor) -> Tensor:
    return clip(**reps) + (reps["image"] @ reps["text"].T).logsumexp(1).mean()


class Holder(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, **reps: Tensor) -> Tensor:
        return self.loss(**reps)

    def bound(self, **reps: Tensor) -> Tensor:
        return self.loss(**reps)


class WithATerm(Holder):
    def forward(self, **reps: Tensor) -> Tensor:
        return self.loss(**reps) + (reps["image"] @ reps["text"].T).logsumexp(1).mean()


def a_sum(**reps: Tensor) -> Tensor:
    return CLIPLoss()(**reps) + 0.3 * SigLIPLoss()(**reps)


def published(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    return DistributedContrastiveLoss()(logit_scale * image, text) + 0 * logit_bias.sum()


def by_rows(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    targets = torch.arange(len(image))
    return nn.functional.cross_entropy(logit_scale * image @ text.T, targets) + 0 * logit_bias.sum()


LOSSES = {  # of ranks, and its oracle
    "itself": (CLIPLoss(), clip),
    "a lambda": (lambda **reps: CLIPLoss()(**reps), clip),
    "a partial": (partial(CLIPLoss().forward), clip),
    "a bound method": (Holder(CLIPLoss()).bound, clip),
    "a module": (Holder(CLIPLoss()), clip),
    "a module that adds a term": (WithATerm(CLIPLoss()), with_a_term),
    "a sum": (a_sum, clip_and_siglip),
    "a published class": (published, by_rows),
}


def encoder_of() -> nn.Module:
    return dual_encoder("siglip")


def on_ranks(rank: int) -> Any:
    batch = image_text_batch(SIZE)
    own = {name: value[:5] if rank == 0 else value[5:] for name, value in batch.items()}
    found = {}
    for name, (loss, _) in LOSSES.items():
        encoder = encoder_of()
        cache = GradientCache(DistributedDataParallel(encoder, find_unused_parameters=True), loss, 2)
        value, grads = cache.forward_backward(own), gradients(encoder)
        encoder.zero_grad()
        cached = cache(own)
        cached.backward()
        found[name] = value, grads, cached.detach(), gradients(encoder)
    return own["pixel_values"], found, dist.get_world_size()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    results = run_on_ranks(on_ranks, 2, tmp_path_factory.mktemp("ranks"))
    assert [world for *_, world in results] == [2, 2]
    assert not torch.equal(results[0][0][:5], results[1][0][:5])
    return [found for _, found, _ in results]


@pytest.mark.parametrize("name", LOSSES)
def test_equals_one_process_with_the_whole_batch(name, ranks):
    encoder, batch = encoder_of(), image_text_batch(SIZE)
    outputs = encoder(image={"pixel_values": batch["pixel_values"]}, text={"input_ids": batch["input_ids"]})
    expected = LOSSES[name][1](**outputs)
    expected.backward()
    assert max(float(p.grad.norm()) for p in encoder.parameters() if p.grad is not None) > 1e-3
    for value, grads, cached, cached_grads in (found[name] for found in ranks):
        torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(cached, expected.detach(), rtol=1e-12, atol=0)
        assert_equal(grads, gradients(encoder))
        assert_equal(cached_grads, gradients(encoder))


@pytest.mark.parametrize("wrap", [lambda loss: lambda views: loss(views=views, nearest=views), Holder])
def test_a_state_that_would_never_move_is_refused(wrap):
    model = nn.Linear(6, 4)
    with pytest.raises(ValueError, match="expected NNCLRLoss as the loss itself"):
        GradientCache(model, wrap(NNCLRLoss(queue_size=8, dim=4)), 2).forward_backward(torch.randn(6, 6))
    assert model.weight.grad is None


def other_groups(rank: int) -> str:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    encoder = DistributedDataParallel(
        encoder_of(), process_group=groups[rank // 2], find_unused_parameters=True
    )
    own = image_text_batch(4, seed=rank)
    with pytest.raises(ValueError, match="expected a loss over the ranks") as caught:
        GradientCache(encoder, CLIPLoss(), 2).forward_backward(own)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    loss = GradientCache(encoder, CLIPLoss(process_group=groups[rank // 2]), 2).forward_backward(own)
    assert loss > 0
    return str(caught.value)


@pytest.mark.slow
def test_a_loss_over_other_ranks_than_the_encoder_is_refused(tmp_path):
    messages = run_on_ranks(other_groups, 4, tmp_path)
    assert "[2, 3] of the encoder" in messages[3]
    assert "over [0, 1, 2, 3]" in messages[3]
