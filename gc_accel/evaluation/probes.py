"""How much of a label can be read off frozen features: nearest neighbours and a linear layer.

kNN is the weighted vote of Wu et al. 2018 (arXiv 1805.01978, section 3.4), as DINO and SelfCon use it. The
linear probe is a logistic regression solved to the end, or the linear layer trained with SGD that the papers
on SimCLR, MoCo and SupCon report.

Shapes: N training rows, M test rows, D dim, K classes, k neighbours.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from gc_accel.evaluation.retrieval import check_embeddings, check_labels


@dataclass(frozen=True)
class ProbeAccuracy:
    """Test accuracy of a probe at the end of its training, and the best of all epochs.

    `best` is chosen on the test set, so it is optimistic; it is here because many papers report it.
    """

    last: float
    best: float


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    tile_rows: int = 1024,
) -> float:
    """Accuracy of the vote of the k nearest training rows, each with weight exp(cosine / temperature).

    Args:
        train_features: `(N, D)`; both sets of features are L2-normalised here.
        train_labels: `(N,)` integers.
        features: `(M, D)`.
        labels: `(M,)` integers.
        k: neighbours, at most N.
        temperature: of the weights; they become equal as it grows.
        tile_rows: how many test rows are compared with all training rows at once.

    Raises:
        ValueError: if the shapes do not fit, k is above N or below 1, or the temperature is not positive.

    Source: Wu et al. 2018, arXiv 1805.01978, section 3.4.
    """
    _check_sets(train_features, train_labels, features, labels)
    if not 1 <= k <= len(train_features):
        raise ValueError(
            f"expected k from 1 to {len(train_features)} training rows, got {k}: choose a smaller k"
        )
    if temperature <= 0:
        raise ValueError(f"expected a positive temperature, got {temperature}: 0.07 is usual")
    device = features.device
    classes, train_ids = train_labels.to(device).unique(return_inverse=True)
    train_rows = normalize(train_features.to(device), dim=-1)
    correct = 0
    for rows, truth in zip(features.split(tile_rows), labels.to(device).split(tile_rows), strict=True):
        cosines, neighbours = (normalize(rows, dim=-1) @ train_rows.T).topk(k, dim=1)
        # The softmax divides each query's weights by their sum: the same vote, and no overflow at a small T.
        weights = (cosines / temperature).softmax(dim=1)
        votes = weights.new_zeros(len(rows), len(classes)).scatter_add_(1, train_ids[neighbours], weights)
        correct += int((classes[votes.argmax(dim=1)] == truth).sum())
    return correct / len(features)


def linear_probe_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    solver: Literal["logistic", "sgd"] = "logistic",
    C: float = 1.0,
    max_iter: int = 5000,
    epochs: int = 100,
    learning_rate: float = 0.1,
    batch_size: int = 256,
    seed: int = 0,
) -> ProbeAccuracy:
    """Test accuracy of a linear classifier on frozen features, standardised with the training statistics.

    Args:
        train_features: `(N, D)`.
        train_labels: `(N,)` integers, of two classes at least.
        features: `(M, D)`.
        labels: `(M,)` integers.
        solver: `logistic`: scikit-learn's L2-regularised logistic regression in float64; if it does not
            converge within `max_iter`, its ConvergenceWarning reaches the caller. `sgd`: a linear layer with
            cross-entropy, momentum 0.9 and a cosine schedule, on the device of `train_features`.
        C: inverse regularisation of `logistic`.
        max_iter: iterations of `logistic`.
        epochs: of `sgd`.
        learning_rate: of `sgd`, at its start.
        batch_size: of `sgd`.
        seed: of the order of the batches of `sgd`.

    Returns:
        `last` and `best` accuracy; the same number for `logistic`, which has one result.

    Raises:
        ValueError: if the shapes do not fit, there is one class only, or the solver is unknown.
    """
    _check_sets(train_features, train_labels, features, labels)
    if solver not in ("logistic", "sgd"):
        raise ValueError(f"expected solver 'logistic' or 'sgd', got {solver!r}: choose one of the two")
    classes, train_ids = train_labels.cpu().unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"expected training rows of two classes or more, got {len(classes)}: pass more labels"
        )
    # A test label that was never trained on gets the id -1 and is always wrong.
    matches = labels.cpu()[:, None] == classes
    ids = torch.where(matches.any(dim=1), matches.int().argmax(dim=1), -1)
    train_rows, rows = _standardised(train_features, features)
    if solver == "logistic":
        return _logistic(train_rows, train_ids, rows, ids, C=C, max_iter=max_iter)
    return _sgd(
        train_rows.to(train_features),
        train_ids.to(train_features.device),
        rows.to(train_features),
        ids.to(train_features.device),
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
    )


def _logistic(
    train_rows: Tensor, train_ids: Tensor, rows: Tensor, ids: Tensor, *, C: float, max_iter: int
) -> ProbeAccuracy:
    probe = LogisticRegression(C=C, max_iter=max_iter)
    probe.fit(train_rows.numpy(), train_ids.numpy())
    accuracy = float((probe.predict(rows.numpy()) == ids.numpy()).mean())
    return ProbeAccuracy(last=accuracy, best=accuracy)


@torch.enable_grad()  # evaluation code mostly runs under no_grad
def _sgd(
    train_rows: Tensor,
    train_ids: Tensor,
    rows: Tensor,
    ids: Tensor,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> ProbeAccuracy:
    classes = int(train_ids.max()) + 1
    weight = train_rows.new_zeros(classes, train_rows.shape[1], requires_grad=True)
    bias = train_rows.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=learning_rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    accuracies = []
    for _ in range(epochs):
        for batch in torch.randperm(len(train_rows), generator=generator).to(rows.device).split(batch_size):
            optimizer.zero_grad()
            cross_entropy(train_rows[batch] @ weight.T + bias, train_ids[batch]).backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            accuracies.append(((rows @ weight.T + bias).argmax(dim=1) == ids).double().mean().item())
    return ProbeAccuracy(last=accuracies[-1], best=max(accuracies))


def _standardised(train_features: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets less the training mean, over the training deviation; a constant column becomes zero."""
    # In float64 and by scikit-learn, which tells a constant column from one that varies by rounding only.
    train_rows = train_features.detach().double().cpu().numpy()
    scaler = StandardScaler().fit(train_rows)
    rows = scaler.transform(features.detach().double().cpu().numpy())
    return torch.from_numpy(scaler.transform(train_rows)), torch.from_numpy(rows)


def _check_sets(train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor) -> None:
    check_embeddings("train_features", train_features, "features", features)
    check_labels("train_labels", train_labels, len(train_features))
    check_labels("labels", labels, len(features))
