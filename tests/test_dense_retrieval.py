"""Dense retrieval: loss, encoder, metrics, data and example, each against a plain computation of its own."""

import json
import math
import re

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from gc_accel import GradientCache
from gc_accel.data.builtin.numbers import number_in_words
from gc_accel.data.builtin.passages import (
    HELD_OUT,
    NumberPassages,
    held_out_numbers,
    passage,
    passages_config,
    passages_tokenizer,
)
from gc_accel.data.sources.triplets import Corpus, TripletCollator, TripletDataset, load_triplets, text_id
from gc_accel.encoders.retriever import Retriever, pool
from gc_accel.evaluation.ranking import baseline_metrics, pair_ranks, ranking_metrics
from gc_accel.losses.kernel import tiling
from gc_accel.losses.retrieval import RetrievalLoss
from tests.comparing import assert_equal, gradients
from tests.launching import ROOT, assert_drawn, launch, run_here
from tests.ranks import run_on_ranks

WORDS = {number_in_words(n): n for n in range(10_000)}

# ---------------------------------------------------------------- the loss


def dense_loss(query, passage, passage_ids=None, *, temperature=0.05):
    """The twin: one question after the other, over the list of its candidates."""
    size, per_query, _ = passage.shape
    ids = torch.arange(size * per_query).view(size, per_query) if passage_ids is None else passage_ids
    terms = []
    for i in range(size):
        positive = query[i] @ passage[i, 0] / temperature
        candidates = [positive]
        for j in range(size):
            for k in range(per_query):
                if ids[j, k] != ids[i, 0]:
                    candidates.append(query[i] @ passage[j, k] / temperature)
        terms.append(torch.stack(candidates).logsumexp(0) - positive)
    return torch.stack(terms).mean()


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1)


def value_and_gradients(loss_fn, query, passage, **options):
    leaves = {"query": query.clone().requires_grad_(), "passage": passage.clone().requires_grad_()}
    loss = loss_fn(**leaves, **options)
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("budget", [0, 2**20])
@pytest.mark.parametrize("ids", ["none", "distinct", "repeated"])
@pytest.mark.parametrize(("size", "per_query"), [(11, 1), (7, 3), (3, 2)])
def test_loss_equals_the_dense_twin(monkeypatch, size, per_query, ids, budget):
    monkeypatch.setattr(tiling, "TILE_ROWS", 3)
    monkeypatch.setattr(tiling, "TILE_COLUMNS", 5)
    inputs = unit(size, 6), unit(size, per_query, 6, seed=1)
    every = torch.arange(size * per_query).view(size, per_query)
    options = {
        "none": {},
        "distinct": {"passage_ids": every + 10**17},
        "repeated": {"passage_ids": every % 4},
    }[ids]
    got = value_and_gradients(RetrievalLoss(0.1, tile_budget=budget), *inputs, **options)
    expected = value_and_gradients(lambda **all_: dense_loss(temperature=0.1, **all_), *inputs, **options)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=0)
    assert_equal(got[1], expected[1])
    if ids == "repeated":
        assert abs(float(got[0] - RetrievalLoss(0.1)(*inputs))) > 1e-3, "ids must matter here"


def test_hard_negatives_are_negatives_of_every_question():
    query, passages = unit(5, 6), unit(5, 3, 6, seed=1)
    _, grads = value_and_gradients(RetrievalLoss(), query, passages)
    assert (grads["passage"].flatten(0, 1).norm(dim=1) > 1e-9).all()
    without = dense_loss(query, passages[:, :1])
    assert float(RetrievalLoss()(query, passages)) > float(without) + 1e-3


def test_a_lone_question_has_its_hard_negatives():
    inputs = unit(1, 6), unit(1, 4, 6, seed=1)
    got, expected = (value_and_gradients(loss_fn, *inputs) for loss_fn in (RetrievalLoss(), dense_loss))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=0)
    assert_equal(got[1], expected[1])


def test_a_lone_question_without_a_negative_has_no_loss_and_no_gradient():
    loss, grads = value_and_gradients(RetrievalLoss(), unit(1, 4), unit(1, 1, 4, seed=1))
    assert loss == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads.values())


def test_loss_of_half_precision_is_that_of_float32():
    query, passages = unit(5, 6).bfloat16(), unit(5, 2, 6, seed=1).bfloat16()
    loss = RetrievalLoss()(query, passages)
    torch.testing.assert_close(loss, dense_loss(query.float(), passages.float()), rtol=1e-5, atol=0)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return made


def test_memory_is_linear_in_the_batch(monkeypatch):
    monkeypatch.setattr(tiling, "TILE_ROWS", 16)
    monkeypatch.setattr(tiling, "TILE_COLUMNS", 32)
    inputs = unit(200, 4), unit(200, 3, 4, seed=1)
    with LargestTensor() as largest:
        value_and_gradients(RetrievalLoss(tile_budget=0), *inputs)
    assert 200 * 3 * 4 <= largest.elements <= 2 * 200 * 3 * 4 < 200 * 600 / 10


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 6), (4, 6)), r"\(B, P, D\)"),
        (((4, 6), (3, 2, 6)), r"\(3, 2, 6\)"),
        (((4, 6), (4, 2, 5)), r"\(4, 2, 5\)"),
        (((4, 1, 6), (4, 2, 6)), r"\(B, D\)"),
    ],
)
def test_loss_refuses_shapes_that_do_not_pair_up(shapes, message):
    with pytest.raises(ValueError, match=message):
        RetrievalLoss()(unit(*shapes[0]), unit(*shapes[1]))


def test_loss_refuses_other_arguments():
    with pytest.raises(ValueError, match="an id per passage"):
        RetrievalLoss()(unit(4, 6), unit(4, 2, 6), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature above 0"):
        RetrievalLoss(0.0)


# ---------------------------------------------------------------- cached gradients

# Answers that repeat, and neighbours among the negatives: positives of one question are passages of others.
ANSWERS = (412, 413, 412, 99, 414, 413, 7)


def items(negatives):
    return [
        {
            "query": f"what comes after {n - 1}" if n % 2 else f"what is {n}",
            "positive": passage(n),
            "negatives": [passage(n + 1), passage(n + 100)][:negatives],
        }
        for n in ANSWERS
    ]


def batch_of(negatives, own=slice(None)):
    return TripletCollator(passages_tokenizer())(items(negatives)[own])


def retriever(tied, *, pooling="mean", dropout=0.0):
    torch.manual_seed(1)
    config = passages_config(width=16, layers=1, heads=2)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    towers = [BertModel(config, add_pooling_layer=False) for _ in range(1 if tied else 2)]
    return Retriever(*towers, pooling=pooling).double().train()


def uncached(encoder, batch):
    """The oracle: everything in one forward, one graph, the dense twin."""
    reps = encoder(query={"query": batch["query"]}, passage={"passage": batch["passage"]})
    loss = dense_loss(**reps, passage_ids=batch["passage_ids"])
    loss.backward()
    return loss.detach(), take_gradients(encoder)


def take_gradients(encoder):
    taken = gradients(encoder)
    encoder.zero_grad(set_to_none=True)
    return taken


@pytest.mark.parametrize("retain", [0, 1, "all"])
@pytest.mark.parametrize(
    "sizes", [{"query": 3, "passage": 2}, {"query": 1, "passage": 5}, {"query": 16, "passage": 1}]
)
@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_cached_gradients_equal_the_uncached_ones(tied, negatives, sizes, retain):
    encoder, batch = retriever(tied), batch_of(negatives)
    expected_loss, expected = uncached(encoder, batch)
    loss = GradientCache(encoder, RetrievalLoss(), sizes, retain=retain).forward_backward(batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert_equal(take_gradients(encoder), expected)
    for tower in ("both",) if tied else ("query", "passage"):
        assert any(float(g.norm()) > 1e-3 for n, g in expected.items() if n.startswith(f"towers.{tower}."))


def test_cached_gradients_equal_the_uncached_ones_with_cls_pooling():
    encoder, batch = retriever(True, pooling="cls"), batch_of(2)
    expected = uncached(encoder, batch)[1]
    GradientCache(encoder, RetrievalLoss(), 2).forward_backward(batch)
    assert_equal(take_gradients(encoder), expected)


def test_chunks_padded_by_themselves_give_the_same_gradients():
    """As a loader makes them: each as wide as its own longest text."""
    encoder = retriever(True)
    expected = uncached(encoder, batch_of(2))[1]
    chunks = [batch_of(2, slice(start, start + 3)) for start in range(0, 7, 3)]
    assert len({chunk["passage"]["input_ids"].shape[2] for chunk in chunks}) > 1
    GradientCache(encoder, RetrievalLoss(), 3).forward_backward_chunks(chunks)
    assert_equal(take_gradients(encoder), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_dropout_is_replayed(tied):
    encoder, batch = retriever(tied, dropout=0.3), batch_of(2)
    found = []
    for retain in (0, "all"):  # with all graphs retained nothing needs to be replayed
        torch.manual_seed(5)
        GradientCache(encoder, RetrievalLoss(), 2, retain=retain).forward_backward(batch)
        found.append(take_gradients(encoder))
    assert_equal(*found)
    smooth = uncached(encoder.eval(), batch)[1]
    with pytest.raises(AssertionError, match="is off by"):
        assert_equal(found[0], smooth)


def test_a_frozen_tower_gets_no_gradient_and_the_other_its_own():
    encoder, batch = retriever(False), batch_of(2)
    encoder.towers["passage"].requires_grad_(False)
    assert encoder.frozen_streams == {"passage"}
    expected = uncached(encoder, batch)[1]
    GradientCache(encoder, RetrievalLoss(), 2).forward_backward(batch)
    found = take_gradients(encoder)
    assert_equal(found, expected)
    assert {name for name, grad in found.items() if grad is None} == {
        name for name, _ in encoder.named_parameters() if name.startswith("towers.passage.")
    }


CASES = [(tied, negatives) for tied in (True, False) for negatives in (0, 2)]


def ddp_steps(rank):
    own = (slice(0, 3), slice(3, 7))[rank]
    found = []
    for tied, negatives in CASES:
        encoder = DistributedDataParallel(retriever(tied), find_unused_parameters=True)
        batch = batch_of(negatives, own)
        cache = GradientCache(encoder, RetrievalLoss(), {"query": 2, "passage": 1})
        found.append((cache.forward_backward(batch), gradients(encoder.module)))
    return dist.get_world_size(), batch["passage_ids"][:, 0].tolist(), found


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    results = run_on_ranks(ddp_steps, 2, tmp_path)
    assert [size for size, _, _ in results] == [2, 2]
    assert results[0][1] == [text_id(passage(n)) for n in ANSWERS[:3]]
    assert results[1][1] == [text_id(passage(n)) for n in ANSWERS[3:]]
    for index, (tied, negatives) in enumerate(CASES):
        expected_loss, expected = uncached(retriever(tied), batch_of(negatives))
        for _, _, found in results:
            loss, grads = found[index]
            torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
            assert_equal(grads, expected)


# ---------------------------------------------------------------- the encoder


def reloaded(folder, texts, *, pooling="mean"):
    """Embeddings as a user of transformers computes them."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state
    rows = []
    for states, mask in zip(hidden, tokens["attention_mask"], strict=True):
        kept = states[mask.bool()]
        rows.append(kept[0] if pooling == "cls" else kept.mean(0))
    return F.normalize(torch.stack(rows), dim=-1)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_towers_are_models_of_transformers(tmp_path, tied, pooling):
    torch.manual_seed(3)
    towers = [AutoModel.from_config(passages_config(width=16, layers=1)) for _ in range(1 if tied else 2)]
    encoder = Retriever(*towers, pooling=pooling).eval()
    encoder.save_pretrained(tmp_path)
    for folder in encoder.folders(tmp_path).values():
        passages_tokenizer().save_pretrained(folder)
    texts = [passage(n) for n in ANSWERS]
    tokens = TripletCollator(passages_tokenizer()).tokenize("passage", texts)
    found = {}
    for stream in ("query", "passage"):
        with torch.no_grad():
            found[stream] = encoder.embed(stream, tokens)
            again = Retriever.from_pretrained(tmp_path).eval().embed(stream, tokens)
        folder = tmp_path if tied else tmp_path / stream
        torch.testing.assert_close(reloaded(folder, texts, pooling=pooling), found[stream], rtol=0, atol=1e-6)
        assert torch.equal(again, found[stream])
    assert torch.equal(found["query"], found["passage"]) == tied


def test_two_towers_begin_with_the_same_weights_and_share_none(tmp_path):
    Retriever(BertModel(passages_config(width=16, layers=1))).save_pretrained(tmp_path)
    encoder = Retriever.from_pretrained(tmp_path, tied=False)
    one, other = (dict(encoder.towers[name].named_parameters()) for name in ("query", "passage"))
    assert all(torch.equal(one[name], other[name]) and one[name] is not other[name] for name in one)


def test_encoder_refuses_what_it_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="'mean', 'cls'"):
        Retriever(BertModel(passages_config(width=16, layers=1)), pooling="max")
    retriever(False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="two towers were saved"):
        Retriever.from_pretrained(tmp_path, tied=True)


def test_mean_pooling_leaves_padding_out():
    hidden, mask = unit(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
    torch.testing.assert_close(pool(hidden, mask)[0], hidden[0, :2].mean(0))


# ---------------------------------------------------------------- the metrics


def naive_metrics(scores, answers, ks, mrr_at):
    """Sorted by score, the right passages last among equals."""
    recalls, reciprocals = {k: [] for k in ks}, []
    for row, right in zip(scores, answers, strict=True):
        order = sorted(range(len(row)), key=lambda n: (-row[n], n in right))
        ranks = sorted(1 + order.index(n) for n in right)
        reciprocals.append(1 / ranks[0] if ranks[0] <= mrr_at else 0.0)
        for k in ks:
            recalls[k].append(sum(rank <= k for rank in ranks) / len(ranks))
    return {f"query_to_passage_mrr{mrr_at}": float(np.mean(reciprocals))} | {
        f"query_to_passage_r{k}": float(np.mean(values)) for k, values in recalls.items()
    }


@pytest.mark.parametrize("tile_rows", [1, 4, 1000])
@pytest.mark.parametrize("several", [False, True])
def test_metrics_equal_a_naive_loop(several, tile_rows):
    rng = np.random.default_rng(0)
    answers = [set(rng.choice(23, 1 + several * rng.integers(3), replace=False).tolist()) for _ in range(13)]
    pairs = torch.tensor([(q, n) for q, right in enumerate(answers) for n in right])
    passages = unit(23, 5, seed=1)
    query = unit(13, 5) + passages[[min(right) for right in answers]]  # else next to nothing is found
    found = ranking_metrics(
        query, passages, pairs[torch.randperm(len(pairs))], ks=(1, 3, 7), mrr_at=5, tile_rows=tile_rows
    )
    assert found == pytest.approx(naive_metrics((query @ passages.T).tolist(), answers, (1, 3, 7), 5))
    assert 0 < found["query_to_passage_r1"] < found["query_to_passage_r7"] < 1


def test_a_tie_counts_as_a_loss():
    query = torch.ones(1, 2, dtype=torch.float64)
    passages = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    assert pair_ranks(query, passages, torch.tensor([[0, 0], [0, 2]])).tolist() == [2, 3]
    found = ranking_metrics(query, passages, torch.tensor([[0, 1]]), ks=(1, 2))
    assert found == {"query_to_passage_mrr10": 0.5, "query_to_passage_r1": 0, "query_to_passage_r2": 1}


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_collapsed_or_diverged_encoder_finds_nothing(value):
    rows = torch.full((30, 4), value)
    found = ranking_metrics(rows, rows, torch.arange(30)[:, None].expand(30, 2))
    assert found["query_to_passage_mrr10"] == found["query_to_passage_r10"] == 0


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (torch.tensor([[0, 0]]), "leave questions out"),
        (torch.tensor([[0, 0], [1, 5]]), "outside"),
        (torch.tensor([[0, 0], [-1, 1]]), "outside"),
        (torch.tensor([0, 1]), r"\(R, 2\)"),
        (torch.tensor([[0.0, 0.0], [1.0, 1.0]]), "int64"),
    ],
)
def test_metrics_refuse_pairs_that_do_not_fit(pairs, message):
    with pytest.raises(ValueError, match=message):
        ranking_metrics(unit(2, 3), unit(5, 3), pairs)


def test_metrics_refuse_a_rank_below_one():
    with pytest.raises(ValueError, match="from 1"):
        ranking_metrics(unit(1, 3), unit(5, 3), torch.tensor([[0, 0]]), ks=(0, 1))


def test_chance_is_what_random_embeddings_get():
    texts = [passage(n) for n in range(200)]
    pairs = torch.arange(200)[:, None].expand(200, 2)
    chance = baseline_metrics(texts, texts, pairs)["chance"]
    runs = [ranking_metrics(unit(200, 50, seed=s), unit(200, 50, seed=s + 99), pairs) for s in range(40)]
    for name, value in chance.items():
        assert value == pytest.approx(np.mean([run[name] for run in runs]), rel=0.2)


def test_words_find_copies_but_not_answers():
    texts = [passage(n) for n in range(3000, 3200)]
    pairs = torch.arange(200)[:, None].expand(200, 2)
    copies = baseline_metrics([f"what about {t}" for t in texts], texts, pairs)["tf_idf"]
    digits = baseline_metrics([f"what is {n}" for n in range(3000, 3200)], texts, pairs)["tf_idf"]
    assert copies["query_to_passage_r10"] > 0.8
    assert digits["query_to_passage_r10"] < 0.1


# ---------------------------------------------------------------- the data


def number_of(text):
    """The number that a passage is about."""
    return WORDS[re.fullmatch("(.+) is (odd|even)", text)[1]]


def answer_to(question):
    """The answer, worked out from the question alone."""
    form, named = re.fullmatch("(what is|what comes after|what comes before) (.+)", question).groups()
    number = int(named) if named.isdigit() else WORDS[named]
    return number + {"what is": 0, "what comes after": 1, "what comes before": -1}[form]


@pytest.mark.parametrize("split", ["train", "test"])
def test_passages_answer_their_questions_and_negatives_do_not(split):
    samples = NumberPassages(split, size=500, negatives=2)
    for i in range(500):
        sample = samples[i]
        answer = number_of(sample["positive"])
        assert answer == answer_to(sample["query"])
        wrong = [number_of(text) for text in sample["negatives"]]
        assert len({answer, *wrong}) == 3
        assert all(abs(n - answer) in (1, 2, 10, 100, 1000) for n in wrong)
    queries = [samples[i]["query"] for i in range(500)]
    in_digits = np.mean([any(c.isdigit() for c in query) for query in queries])
    assert 0.55 < in_digits < 0.8  # all "is", half of the others


def test_passages_that_answer_test_questions_are_never_trained_on():
    train, test = NumberPassages("train", size=3000, negatives=5), NumberPassages("test", size=HELD_OUT)
    answers = {test[i]["positive"] for i in range(HELD_OUT)}
    seen = {text for i in range(3000) for text in (train[i]["positive"], *train[i]["negatives"])}
    assert len(answers) == HELD_OUT == len(set(held_out_numbers().tolist()))
    assert answers.isdisjoint(seen)
    assert len(seen) > 3000


def test_number_passages_depend_on_the_seed_alone():
    small, large = NumberPassages("train", size=20, seed=3), NumberPassages("train", size=50, seed=3)
    assert [small[i] for i in range(20)] == [large[i] for i in range(20)]
    assert [small[i] for i in range(20)] != [NumberPassages("train", size=20, seed=4)[i] for i in range(20)]
    tests = [NumberPassages("test", size=HELD_OUT, seed=seed).answers for seed in (0, 1)]
    assert not np.array_equal(*tests)
    assert np.array_equal(*map(np.sort, tests))  # the same numbers are held out


def test_number_passages_refuse_what_does_not_exist():
    with pytest.raises(ValueError, match="at most 1000"):
        NumberPassages("test", size=HELD_OUT + 1)
    with pytest.raises(ValueError, match="from 0 to 5"):
        NumberPassages("train", size=1, negatives=6)
    with pytest.raises(ValueError, match="'train' or 'test'"):
        NumberPassages("valid", size=1)


def test_the_tokenizer_knows_every_word_and_the_model_every_position():
    tokenizer, config = passages_tokenizer(), passages_config()
    texts = [passage(n) for n in range(10_000)] + [f"what comes before {text}" for text in WORDS]
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.unk_token_id not in {i for row in ids for i in row}
    assert max(map(len, ids)) <= config.max_position_embeddings
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.tokenize("what is 407") == ["what", "is", "4", "0", "7"]


ROWS = [
    {"query": f"what is {n}", "positive": passage(n), "negatives": [passage(n + k) for k in (1, 2, 10)]}
    for n in range(40)
]


def write_rows(folder, kind):
    rows, path = datasets.Dataset.from_list(ROWS), folder / f"rows.{kind}"
    if kind == "csv":  # a cell holds one string
        rows = rows.map(lambda row: {"negatives": row["negatives"][0]}, remove_columns="negatives")
    {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[kind](path)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_rows_are_read_from_files(tmp_path, kind):
    rows = load_triplets(str(write_rows(tmp_path, kind)), "train[:10]")
    sample = TripletDataset(rows, negatives=1)[7]
    assert len(rows) == 10
    assert (sample["query"], sample["positive"]) == ("what is 7", passage(7))
    assert sample["negatives"][0] in ROWS[7]["negatives"]


def test_rows_are_read_from_a_folder(tmp_path):
    write_rows(tmp_path, "jsonl").rename(tmp_path / "train.jsonl")
    assert load_triplets(str(tmp_path), "train")["query"][3] == "what is 3"


def test_negatives_are_drawn_anew_each_epoch_and_again_on_resume():
    samples = TripletDataset(datasets.Dataset.from_list(ROWS), negatives=2, seed=1)
    drawn = []
    for epoch in (0, 1, 0):
        samples.set_epoch(epoch)
        drawn.append([samples[i]["negatives"] for i in range(len(samples))])
        assert all(len(set(texts)) == 2 for texts in drawn[-1])
        assert all(set(texts) <= set(row["negatives"]) for texts, row in zip(drawn[-1], ROWS, strict=True))
    assert drawn[0] == drawn[2] != drawn[1]


def test_rows_that_are_wrong_are_named():
    rows = datasets.Dataset.from_list([*ROWS[:3], {"query": "q", "positive": None, "negatives": ["a"]}])
    with pytest.raises(ValueError, match=r"row 3 .* \['positive', 'negatives'\]"):
        TripletDataset(rows, negatives=2)[3]
    with pytest.raises(ValueError, match="set negatives_column"):
        TripletDataset(rows, negatives_column="hard")
    assert TripletDataset(rows, negatives_column="hard", negatives=0)[1]["negatives"] == []
    for source in ("nowhere.jsonl", __file__):
        with pytest.raises(ValueError, match=r"expected a \.csv.* file"):
            load_triplets(source, "train")


def test_a_chunk_keeps_the_passages_of_a_question_together():
    chunk = batch_of(2)
    tokenizer = passages_tokenizer()
    for i, item in enumerate(items(2)):
        assert (
            tokenizer.decode(chunk["query"]["input_ids"][i], skip_special_tokens=True).split()[:2]
            == (item["query"].split()[:2])
        )
        for k, text in enumerate([item["positive"], *item["negatives"]]):
            expected = tokenizer(text)["input_ids"]
            mask = chunk["passage"]["attention_mask"][i, k].bool()
            assert chunk["passage"]["input_ids"][i, k][mask].tolist() == expected
    ids = chunk["passage_ids"]
    assert ids[0, 0] == ids[2, 0] != ids[1, 0] == ids[0, 1]


def test_a_collator_cuts_each_side_at_its_own_length():
    chunk = TripletCollator(passages_tokenizer(), query_length=5, passage_length=7)(items(1))
    assert chunk["query"]["input_ids"].shape == (7, 5)
    assert chunk["passage"]["input_ids"].shape == (7, 2, 7)


def test_a_corpus_holds_each_text_once():
    corpus = Corpus.of(items(1))
    assert len(corpus.queries) == len(set(corpus.queries)) == 5
    assert set(corpus.passages) == {passage(n) for n in (412, 413, 414, 99, 100, 415, 7, 8)}
    for query, found in corpus.relevant.tolist():
        assert number_of(corpus.passages[found]) == answer_to(corpus.queries[query])


# ---------------------------------------------------------------- the example

SMALL = ["--train_size", "96", "--eval_size", "30", "--num_train_epochs", "1", "--logging_steps", "1"]
KEYS = {f"query_to_passage_{name}" for name in ("mrr10", "r1", "r10", "r100")}


def results_of(folder):
    return json.loads((folder / "all_results.json").read_text())


def losses_of(folder):
    log = json.loads((folder / "training_log.json").read_text())
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.slow
def test_built_in_run_writes_everything_and_its_model_reloads(tmp_path):
    sizes = ["--batch_size", "32", "--query_chunk_size", "16", "--passage_chunk_size", "8"]
    run = launch("dense_retrieval.py", "--output_dir", tmp_path, *SMALL, *sizes, "--negatives", "2")
    results = results_of(tmp_path)
    assert {name.removeprefix("eval_") for name in results["after"]} == KEYS == set(results["tf_idf"])
    assert "3/3" in run.stderr, "no progress bar"
    assert len(losses_of(tmp_path)) == 3
    assert_drawn(tmp_path / "training_curve.png")
    held_out = NumberPassages("test", size=30, negatives=2, seed=42)
    corpus = Corpus.of(held_out[i] for i in range(30))
    again = ranking_metrics(
        reloaded(tmp_path, corpus.queries), reloaded(tmp_path, corpus.passages), corpus.relevant
    )
    assert {f"eval_{name}": value for name, value in again.items()} == pytest.approx(results["after"])
    assert len((ROOT / "examples" / "dense_retrieval.py").read_text().splitlines()) <= 200


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    sizes = ["--query_chunk_size", "8", "--passage_chunk_size", "4", "--no_tied"]
    launch("dense_retrieval.py", "--output_dir", one, *SMALL, *sizes, "--batch_size", "32")
    launch(
        "dense_retrieval.py", "--output_dir", two, *SMALL, *sizes, "--batch_size", "16", config="ddp_cpu.yaml"
    )
    assert len(losses_of(one)) == 3
    np.testing.assert_allclose(losses_of(one), losses_of(two), rtol=1e-4)
    assert results_of(one)["after"] == pytest.approx(results_of(two)["after"], abs=0.02)
    weights = [AutoModel.from_pretrained(folder / "passage").state_dict() for folder in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_rows_of_ones_own_by_a_yaml_file_fine_tune_a_saved_model(tmp_path):
    config = BertConfig(**passages_config(width=16, layers=1).to_diff_dict())
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    passages_tokenizer().save_pretrained(tmp_path / "model")
    rows = datasets.Dataset.from_list(ROWS).rename_columns({"query": "anchor", "negatives": "hard"})
    rows.to_json(tmp_path / "rows.jsonl")
    arguments = {
        "model": str(tmp_path / "model"),
        "dataset": str(tmp_path / "rows.jsonl"),
        "query_column": "anchor",
        "negatives_column": "hard",
        "negatives": 3,
        "eval_size": 8,
        "batch_size": 16,
        "tied": False,
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(arguments))
    launch("dense_retrieval.py", tmp_path / "config.yaml")
    results = results_of(tmp_path / "out")
    assert results["arguments"]["negatives"] == 3
    assert 8 < results["corpus"] <= 32
    assert len(losses_of(tmp_path / "out")) == 1  # 8 steps, logged at the last
    launch(
        "dense_retrieval.py", *SMALL, "--output_dir", tmp_path / "more", "--model", tmp_path / "out",
        "--no_tied", "--batch_size", "32",
    )  # fmt: skip
    assert {"query", "passage"} <= {path.name for path in (tmp_path / "more").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_step_on_rows_of_every_kind(tmp_path, monkeypatch, kind):
    flags = ["--dataset", write_rows(tmp_path, kind), "--negatives_column", "negatives", "--negatives", "1"]
    sizes = ["--batch_size", "32", "--eval_size", "8", "--num_train_epochs", "1"]
    run_here("dense_retrieval.py", "--output_dir", tmp_path / "out", *flags, *sizes, monkeypatch=monkeypatch)
    assert len(losses_of(tmp_path / "out")) == 1
    assert results_of(tmp_path / "out")["corpus"] > 8
    assert (tmp_path / "out/model.safetensors").exists()


@pytest.mark.slow
def test_a_short_run_learns(tmp_path):
    launch(
        "dense_retrieval.py", "--output_dir", tmp_path, "--train_size", "8192", "--eval_size", "200",
        "--num_train_epochs", "1", "--batch_size", "256",
    )  # fmt: skip
    results = results_of(tmp_path)
    before, after = (results[name]["eval_query_to_passage_mrr10"] for name in ("before", "after"))
    assert after > 0.2 > 2 * max(before, results["tf_idf"]["query_to_passage_mrr10"])


def test_the_code_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "dense-retrieval.md").read_text(), re.DOTALL)
    names: dict = {}
    exec("\n".join(blocks), names)
    found = reloaded(tmp_path / "retriever", ["what is 412", "four hundred and twelve is even"])
    torch.testing.assert_close(names["embeddings"], found, rtol=0, atol=1e-6)
