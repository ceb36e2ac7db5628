"""The blocks of GradCache's README, section by section, on tiny models; each equals the step without a cache.

Its distributed blocks are in `test_compat_on_ranks.py`. The blocks of the README of grad-cache-con-learning, which
comes with the package, are executed as they stand in `test_compat_con_learning.py`.
"""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gc_accel.compat.grad_cache import GradCache
from gc_accel.compat.grad_cache.functional import cached, cat_input_tensor
from gc_accel.compat.grad_cache.loss import SimpleContrastiveLoss
from tests.comparing import assert_equal
from tests.compat_programs import bert, published

ANIMALS = ["cat", "goldfish", "sparrow", "oak"]
SENTENCES = ["it purrs on the sofa", "it swims in a bowl", "it sings at dawn", "it is no animal at all"]


def tokenizer():
    words = sorted({word for text in ANIMALS + SENTENCES for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["[PAD]", *words])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", model_max_length=8)


def contrast(x, y):
    return F.cross_entropy(x @ y.T, torch.arange(len(x)))


def moved(before, after):
    """How far each weight went."""
    start = before.state_dict()
    return {name: value - start[name] for name, value in after.state_dict().items()}


@pytest.mark.parametrize("method", ["__init__", "cache_step"])
def test_arguments_have_the_published_names_order_and_defaults(method):
    ours, theirs = (
        inspect.signature(getattr(each, method)).parameters for each in (GradCache, published().GradCache)
    )
    same = [(p.name, p.default, p.kind) for p in ours.values()][: len(theirs)]
    assert same == [(p.name, p.default, p.kind) for p in theirs.values()]


@pytest.mark.parametrize("tied", [False, True])
def test_learning_a_bi_encoder(tied):
    tokenize = tokenizer()
    start = [bert(1), bert(1 if tied else 2)]
    results = []
    for is_cached in (True, False):
        encoder1 = copy.deepcopy(start[0])
        encoder2 = encoder1 if tied else copy.deepcopy(start[1])
        parameters = {*encoder1.parameters(), *encoder2.parameters()}
        optimizer = torch.optim.SGD(sorted(parameters, key=id), lr=0.5)
        gc = GradCache(
            models=[encoder1, encoder2],
            chunk_sizes=2,
            loss_fn=SimpleContrastiveLoss(),
            get_rep_fn=lambda output: output.pooler_output,
        )
        xx = tokenize(ANIMALS, return_tensors="pt", padding=True)
        yy = tokenize(SENTENCES, return_tensors="pt", padding=True)
        optimizer.zero_grad()
        if is_cached:
            gc(xx, yy, reduction="mean")
        else:
            contrast(encoder1(**xx).pooler_output, encoder2(**yy).pooler_output).backward()
        optimizer.step()
        results.append([moved(start[0], encoder1), moved(start[1], encoder2)])
    for got, expected in zip(*results, strict=True):
        assert_equal(got, expected)


def test_the_functional_approach_with_autocast_and_a_scaler():
    """Two steps of 16 small batches each. Autocast leaves float64 alone, so that it can be compared exactly."""
    start, tokenize = bert(1), tokenizer()
    autocast = torch.autocast("cpu", torch.bfloat16)
    loader = [
        [
            tokenize([text], return_tensors="pt", padding="max_length")
            for text in (ANIMALS[i % 4], SENTENCES[i % 3])
        ]
        for i in range(32)
    ]

    @cached
    @autocast
    def call_model(model, input):
        return model(**input).pooler_output

    @cat_input_tensor
    @autocast
    def contrastive_loss(x, y):
        return contrast(x, y)

    model = copy.deepcopy(start)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    cache_x, cache_y, closures_x, closures_y = [], [], [], []
    for step, (xx, yy) in enumerate(loader):
        rx, cx = call_model(model, xx)
        ry, cy = call_model(model, yy)
        cache_x.append(rx)
        cache_y.append(ry)
        closures_x.append(cx)
        closures_y.append(cy)
        if (step + 1) % 16 == 0:
            scaler.scale(contrastive_loss(cache_x, cache_y)).backward()
            for f, r in zip(closures_x + closures_y, cache_x + cache_y, strict=True):
                f(r)
            cache_x, cache_y, closures_x, closures_y = [], [], [], []
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    direct = copy.deepcopy(start)
    optimizer = torch.optim.SGD(direct.parameters(), lr=0.1)
    for part in (loader[:16], loader[16:]):
        sides = [[direct(**inputs).pooler_output for inputs in side] for side in zip(*part, strict=True)]
        contrast(*map(torch.cat, sides)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_equal(moved(start, model), moved(start, direct))
