"""Every metric against a naive loop in float64, with ties, odd sizes and input that does not fit."""

import math
import warnings
from statistics import median

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import normalize

from gc_accel.evaluation import (
    ProbeAccuracy,
    knn_accuracy,
    linear_probe_accuracy,
    retrieval_metrics,
    zero_shot_accuracy,
    zero_shot_classifier,
)


def rows(n: int, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return normalize(
        torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).to(dtype)


def integers(n: int, d: int, *, seed: int) -> Tensor:
    """Small integers: their dot products are exact, so that equal scores are equal bit by bit."""
    return torch.randint(-1, 2, (n, d), generator=torch.Generator().manual_seed(seed)).double()


def naive_ranks(
    queries: Tensor, candidates: Tensor, query_ids: list[int], candidate_ids: list[int]
) -> list[int]:
    ranks = []
    for query, query_id in zip(queries, query_ids, strict=True):
        scores = [float((query * candidate).sum()) for candidate in candidates]
        best = max(s for s, i in zip(scores, candidate_ids, strict=True) if i == query_id)
        others = [s for s, i in zip(scores, candidate_ids, strict=True) if i != query_id]
        ranks.append(1 + sum(s >= best for s in others))
    return ranks


def naive_retrieval(
    image: Tensor, text: Tensor, image_ids: list[int], text_ids: list[int]
) -> dict[str, float]:
    result = {}
    for name, ranks in (
        ("image_to_text", naive_ranks(image, text, image_ids, text_ids)),
        ("text_to_image", naive_ranks(text, image, text_ids, image_ids)),
    ):
        result |= {f"{name}_r{k}": sum(r <= k for r in ranks) / len(ranks) for k in (1, 5, 10)}
        result[f"{name}_median_rank"] = median(ranks)
    return result


@pytest.mark.parametrize("tile_rows", [1, 7, 1024])
@pytest.mark.parametrize("n", [1, 2, 13, 37])
def test_retrieval_without_labels_equals_the_naive_loop(n: int, tile_rows: int) -> None:
    image, text = rows(n, 5), rows(n, 5, seed=1)
    got = retrieval_metrics(image, text, tile_rows=tile_rows)
    assert got == pytest.approx(naive_retrieval(image, text, list(range(n)), list(range(n))), abs=1e-15)
    assert n < 13 or 0 < got["image_to_text_r10"] < 1, "the case must not be trivial"


@pytest.mark.parametrize("tile_rows", [1, 7, 1024])
@pytest.mark.parametrize("make", [rows, integers], ids=["distinct scores", "many ties"])
def test_retrieval_with_several_captions_per_image_equals_the_naive_loop(make, tile_rows: int) -> None:
    image, text = make(11, 3, seed=2), make(31, 3, seed=3)
    labels = torch.arange(11) * 7 - 5
    text_labels = labels[torch.arange(31) % 11]
    got = retrieval_metrics(image, text, labels=labels, text_labels=text_labels, tile_rows=tile_rows)
    assert got == pytest.approx(
        naive_retrieval(image, text, labels.tolist(), text_labels.tolist()), abs=1e-15
    )


def test_text_labels_default_to_labels_so_equal_captions_match() -> None:
    image, text = torch.eye(4)[[1, 0, 2, 3]], torch.eye(4)
    assert retrieval_metrics(image, text)["image_to_text_r1"] == 0.5
    assert retrieval_metrics(image, text, labels=torch.tensor([0, 0, 1, 2]))["image_to_text_r1"] == 1.0


@pytest.mark.parametrize("value", [1.0, 0.0, math.nan], ids=["constant", "zero", "nan"])
def test_a_collapsed_or_diverged_encoder_is_ranked_last(value: float) -> None:
    image = torch.full((13, 4), value)
    got = retrieval_metrics(image, image)
    assert got["image_to_text_r1"] == got["text_to_image_r10"] == 0.0
    assert got["image_to_text_median_rank"] == 13.0
    assert zero_shot_accuracy(image, image, torch.arange(13))["zero_shot_top5"] == 0.0


def test_float32_gives_the_ranks_of_float64() -> None:
    image, text = rows(37, 16), rows(37, 16, seed=1)
    assert retrieval_metrics(image.float(), text.float()) == retrieval_metrics(image, text)


def test_embeddings_are_taken_as_given_and_not_normalised() -> None:
    text = torch.tensor([[1.0, 0.0], [3.0, 3.0]])
    assert retrieval_metrics(torch.eye(2), text)["image_to_text_r1"] == 0.5
    assert retrieval_metrics(torch.eye(2), normalize(text))["image_to_text_r1"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": torch.zeros(4, 2)}, "one D"),
        ({"text": torch.zeros(5, 3)}, "as many images as texts"),
        ({"text": torch.zeros(3)}, "one embedding per row"),
        ({"image": torch.zeros(0, 3), "text": torch.zeros(0, 3)}, "at least one row"),
        ({"text": torch.zeros(4, 3).double()}, "one floating-point type"),
        ({"labels": torch.arange(3)}, r"labels as \(4,\) integers"),
        ({"labels": torch.ones(4)}, r"labels as \(4,\) integers"),
        ({"text_labels": torch.arange(4)}, "pass both"),
        ({"labels": torch.arange(4), "text_labels": torch.tensor([0, 1, 2, 9])}, r"row 3 \(label 3\)"),
        ({"labels": torch.tensor([0, 1, 2, 2]), "text_labels": torch.arange(4)}, r"row 3 \(label 3\)"),
        ({"ks": (0, 1)}, "at least 1"),
        ({"tile_rows": 0}, "at least 1"),
    ],
)
def test_retrieval_refuses_input_that_does_not_fit(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(**({"image": torch.zeros(4, 3), "text": torch.zeros(4, 3)} | arguments))


@pytest.mark.parametrize("make", [rows, integers], ids=["distinct scores", "many ties"])
def test_zero_shot_equals_the_naive_loop(make) -> None:
    image, classes = make(29, 4, seed=4), make(7, 4, seed=5)
    labels = torch.arange(29) % 7
    ranks = naive_ranks(image, classes, labels.tolist(), list(range(7)))
    expected = {f"zero_shot_top{k}": sum(r <= k for r in ranks) / 29 for k in (1, 5)}
    assert zero_shot_accuracy(image, classes, labels) == pytest.approx(expected, abs=1e-15)


def test_zero_shot_leaves_out_a_k_above_the_number_of_classes() -> None:
    assert zero_shot_accuracy(torch.eye(3), torch.eye(3), torch.arange(3)) == {"zero_shot_top1": 1.0}


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 3]), torch.tensor([0, -1, 2])])
def test_zero_shot_refuses_a_label_without_a_class(labels: Tensor) -> None:
    with pytest.raises(ValueError, match="labels from 0 to 2"):
        zero_shot_accuracy(torch.eye(3), torch.eye(3), labels)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 256])
def test_a_class_embedding_is_the_normalised_mean_of_its_prompts(chunk_size: int) -> None:
    seen: list[int] = []

    def encode(prompts: list[str]) -> Tensor:
        seen.append(len(prompts))
        return torch.stack([rows(1, 6, seed=sum(map(ord, p)))[0] * len(p) for p in prompts])

    names, templates = ["cat", "{odd} dog", "a"], ["a photo of a {}.", "{}"]
    got = zero_shot_classifier(encode, names, templates, chunk_size=chunk_size)
    expected = []
    for name in names:
        prompts = [rows(1, 6, seed=sum(map(ord, t.replace("{}", name))))[0] for t in templates]
        mean = sum(prompts) / len(prompts)
        expected.append(mean / mean.norm())
    assert max(seen) <= chunk_size
    assert sum(seen) == 6
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("names", "templates", "returned", "message"),
    [
        ([], ["{}"], 1, "0 names"),
        (["cat"], [], 1, r"templates \[\]"),
        (["cat"], ["a photo"], 1, "for the name"),
        (["cat"], ["{}"], 2, r"return \(1, D\)"),
    ],
)
def test_the_classifier_refuses_input_that_does_not_fit(
    names, templates, returned: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        zero_shot_classifier(lambda prompts: torch.ones(returned, 3), names, templates)


def naive_knn(
    train: Tensor, train_labels: Tensor, test: Tensor, labels: Tensor, k: int, temperature: float
) -> float:
    correct = 0
    for query, truth in zip(test, labels.tolist(), strict=True):
        cosines = [float(query @ row / query.norm() / row.norm()) for row in train]
        votes: dict[int, float] = {}
        for i in sorted(range(len(train)), key=lambda i: -cosines[i])[:k]:
            label = int(train_labels[i])
            votes[label] = votes.get(label, 0.0) + math.exp(cosines[i] / temperature)
        correct += max(votes, key=lambda label: votes[label]) == truth
    return correct / len(test)


@pytest.mark.parametrize("temperature", [0.07, 10.0])
@pytest.mark.parametrize("k", [1, 4, 53])
def test_knn_equals_the_naive_loop(k: int, temperature: float) -> None:
    train, test = integers(53, 4, seed=0) + rows(53, 4), integers(31, 4, seed=1) + rows(31, 4, seed=1)
    train_labels, labels = (train[:, 0] > 0).long() * 9 - 4, (test[:, 0] > 0).long() * 9 - 4
    train_labels[::5] = 2
    expected = naive_knn(train, train_labels, test, labels, k, temperature)
    got = knn_accuracy(train, train_labels, test, labels, k=k, temperature=temperature, tile_rows=7)
    assert got == pytest.approx(expected, abs=1e-15)
    assert 0 < got < 1, "the case must not be trivial"


def test_knn_does_not_overflow_at_a_small_temperature() -> None:
    train, labels = rows(13, 5, dtype=torch.float32), torch.arange(13)
    assert knn_accuracy(train, labels, train, labels, k=3, temperature=1e-4) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": 6}, "1 to 5"), ({"k": 0}, "1 to 5"), ({"k": 1, "temperature": 0.0}, "positive")],
)
def test_knn_refuses_options_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knn_accuracy(rows(5, 3), torch.arange(5), rows(2, 3), torch.arange(2), **options)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """400 training and 200 test scans; some pixels at the edge are constant."""
    data = load_digits()
    x, y = torch.from_numpy(data.data).float()[:600], torch.from_numpy(data.target).long()[:600]
    test = torch.arange(600) % 3 == 0
    return x[~test], y[~test], x[test], y[test]


def test_the_logistic_probe_equals_a_pipeline_of_scikit_learn() -> None:
    train, train_labels, test, labels = (t.numpy() for t in digits())
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=5000))
    expected = pipeline.fit(train.astype("float64"), train_labels).score(test.astype("float64"), labels)
    got = linear_probe_accuracy(*digits(), C=0.01)
    assert got == ProbeAccuracy(last=expected, best=expected)
    assert 0.9 < expected < 1.0


def test_the_sgd_probe_finds_the_optimum_of_logistic_regression() -> None:
    train, test = rows(301, 3) + 5, rows(203, 3, seed=1) + 5
    train_labels, labels = ((x[:, 0] + 0.8 * x[:, 1].sin() > 4.3).long() for x in (train, test))
    train_labels[::7] = 1 - train_labels[::7]  # overlapping classes: the optimum is finite
    got = linear_probe_accuracy(train, train_labels, test, labels, solver="sgd", batch_size=64)
    optimum = linear_probe_accuracy(train, train_labels, test, labels, C=1e6)
    assert got.last == pytest.approx(optimum.last, abs=2 / 203)
    assert got.best >= got.last > 0.8


@torch.no_grad()
def test_the_sgd_probe_reads_the_digits_also_under_no_grad() -> None:
    got = linear_probe_accuracy(*digits(), solver="sgd", epochs=30)
    assert 0.9 < got.last <= got.best < 1.0


def test_the_logistic_probe_does_not_depend_on_scale_or_shift_of_the_features() -> None:
    train, train_labels, test, labels = (t.double() if t.is_floating_point() else t for t in digits())
    moved = linear_probe_accuracy(train * 1e-3 + 7, train_labels, test * 1e-3 + 7, labels)
    assert moved == linear_probe_accuracy(train, train_labels, test, labels)


def test_the_sgd_probe_repeats_with_its_seed_and_leaves_the_global_rng_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = (linear_probe_accuracy(*digits(), solver="sgd", epochs=3, seed=1) for _ in range(2))
    assert first == second
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("solver", ["logistic", "sgd"])
def test_a_test_label_that_was_never_trained_on_counts_as_wrong(solver) -> None:
    train, train_labels = torch.tensor([[-1.0], [1.0], [-2.0], [2.0]]), torch.tensor([3, 8, 3, 8])
    got = linear_probe_accuracy(train, train_labels, train, torch.tensor([3, 8, 3, 5]), solver=solver)
    assert got.last == 0.75


def test_a_probe_that_does_not_converge_says_so() -> None:
    with pytest.warns(ConvergenceWarning):
        linear_probe_accuracy(*digits(), max_iter=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_probe_accuracy(*digits())


@pytest.mark.parametrize(
    ("train_labels", "options", "message"),
    [
        (torch.zeros(5).long(), {}, "two classes"),
        (torch.arange(4), {}, "train_labels as"),
        (torch.arange(5), {"solver": "svm"}, "'logistic' or 'sgd'"),
    ],
)
def test_a_linear_probe_refuses_input_that_does_not_fit(
    train_labels: Tensor, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_probe_accuracy(rows(5, 3), train_labels, rows(2, 3), torch.arange(2), **options)
