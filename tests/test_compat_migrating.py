"""The blocks of docs/migrating.md are run: before and after end at the same weights."""

import copy
import re
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from gc_accel.losses import dense
from tests.comparing import assert_equal
from tests.compat_programs import bert, published, tokens
from tests.models import clip, image_text_batch, open_clip_vit

TEXT = (Path(__file__).parents[1] / "docs" / "migrating.md").read_text()
SECTIONS = {
    "GradCache": "From GradCache",
    "con-learning": "From grad-cache-con-learning",
    "sentence-transformers": "From the cached losses of sentence-transformers",
    "open_clip": "From open_clip's `--accum-freq`",
    "Accelerate": "From a loop on Accelerate",
}


def section(name):
    """The languages and texts of a section's two blocks, before and after."""
    text = TEXT.split(f"## {SECTIONS[name]}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"(Before|After):\n\n```(\w+)\n(.*?)```", text, flags=re.DOTALL)
    assert [when for when, _, _ in blocks] == ["Before", "After"]
    return [(language, code) for _, language, code in blocks]


def moved_by(step, *models):
    """How far the weights of copies of some models go in `step(optimizer, *copies)`."""
    copies = copy.deepcopy(models)
    parameters = [parameter for each in copies for parameter in each.parameters()]
    step(torch.optim.SGD(parameters, lr=0.5), *copies)
    return {
        f"{number}.{name}": (value.reshape(start.shape) - start).detach()
        for number, (each, model) in enumerate(zip(copies, models, strict=True))
        for (name, value), start in zip(each.named_parameters(), model.parameters(), strict=True)
    }


def run(code, **variables):
    exec(code, {"torch": torch, "__name__": "migrated", **variables})


def stepped(optimizer, losses):
    """Plain training: a step for each loss, which is computed when its turn comes."""
    for loss in losses:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def contrast(x, y):
    return F.cross_entropy(x @ y.T, torch.arange(len(x)) * (len(y) // len(x)))


def test_every_section_is_here():
    assert re.findall(r"^## (.*)$", TEXT, flags=re.MULTILINE) == list(SECTIONS.values())


def test_from_gradcache():
    published()
    loader = [(tokens(35, seed), tokens(70, seed + 10)) for seed in (1, 2)]

    def plain(optimizer, a, b):
        stepped(optimizer, (contrast(a(**q).pooler_output, b(**p).pooler_output) for q, p in loader))

    expected = moved_by(plain, bert(1), bert(2))
    for language, code in section("GradCache"):
        assert language == "python"

        def step(optimizer, a, b, code=code):
            run(code, query_encoder=a, passage_encoder=b, loader=loader, optimizer=optimizer)

        assert_equal(moved_by(step, bert(1), bert(2)), expected)


def test_from_grad_cache_con_learning():
    (_, before), (_, after) = section("con-learning")
    torch.manual_seed(1)
    model = nn.Linear(6, 5).double()
    loader = [(torch.randn(2, 9, 6, dtype=torch.float64), torch.arange(9) % 4) for _ in range(2)]

    def plain(optimizer, model):
        views = ((torch.stack([model(view) for view in pair], dim=1), labels) for pair, labels in loader)
        stepped(optimizer, (dense.supcon_loss(*each, base_temperature=0.07) for each in views))

    def migrated(optimizer, model):
        run(after.replace("64", "4"), model=model, loader=loader, optimizer=optimizer)

    assert_equal(moved_by(migrated, model), moved_by(plain, model))
    with pytest.raises(ImportError, match="GradCache"):
        run(before)


class Sentences(nn.Module):
    """What a SentenceTransformer is to a loss: a mapping of features in, their embedding added."""

    def __init__(self):
        super().__init__()
        self.bert = bert(1)

    def forward(self, features):
        mask = features["attention_mask"][..., None]
        hidden = self.bert(**features).last_hidden_state * mask
        return {**features, "sentence_embedding": hidden.sum(1) / mask.sum(1)}


def test_from_sentence_transformers():
    (_, _), (_, after) = section("sentence-transformers")
    loader = [{"anchor": tokens(35, seed), "positive": tokens(35, seed + 10, length=8)} for seed in (1, 2)]

    def plain(optimizer, model):
        def embed(features):
            return F.normalize(model(features)["sentence_embedding"], dim=-1)

        stepped(optimizer, (contrast(20 * embed(each["anchor"]), embed(each["positive"])) for each in loader))

    def migrated(optimizer, model):
        run(after, model=model, loader=loader, optimizer=optimizer, accelerator=Accelerator(cpu=True))

    model = Sentences()
    assert_equal(moved_by(migrated, model), moved_by(plain, model))


def test_from_open_clip():
    (language, before), (_, after) = section("open_clip")
    assert language == "bash"
    assert "--accum-freq" in before
    torch.manual_seed(1)
    model = open_clip_vit().double()
    loader = [tuple(image_text_batch(12, seed=seed).values()) for seed in (1, 2)]

    def plain(optimizer, model):
        stepped(optimizer, (open_clip.ClipLoss()(*model(images, texts)) for images, texts in loader))

    def migrated(optimizer, model):
        accelerator = Accelerator(cpu=True)
        code = after.replace("256", "5")
        run(code, model=model, loader=loader, optimizer=optimizer, accelerator=accelerator)

    assert_equal(moved_by(migrated, model), moved_by(plain, model))


def test_from_accelerate():
    torch.manual_seed(1)
    model = clip().double()
    loader = [image_text_batch(20, seed=seed) for seed in (1, 2)]

    def step_of(code):
        def step(optimizer, model):
            run(code, model=model, loader=loader, optimizer=optimizer, accelerator=Accelerator(cpu=True))

        return step

    (_, before), (_, after) = section("Accelerate")
    assert_equal(moved_by(step_of(after), model), moved_by(step_of(before), model))
