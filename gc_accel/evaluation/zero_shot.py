"""Zero-shot classification: an image belongs to the class whose prompt embedding is nearest.

The classifier is that of CLIP (Radford et al. 2021, arXiv 2103.00020, section 3.1.4): each class name is put
into every template, and the class embedding is the normalised mean of the normalised prompt embeddings.

Shapes: N images, K classes, P templates, D dim.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gc_accel.evaluation.retrieval import check_embeddings, check_labels, match_ranks


@torch.no_grad()
def zero_shot_accuracy(
    image: Tensor, class_embeddings: Tensor, labels: Tensor, *, ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """The fraction of images whose true class is among the k best; a tie counts as wrong.

    Args:
        image: `(N, D)`. A positive factor on a row changes nothing.
        class_embeddings: `(K, D)`, normalised, as `zero_shot_classifier` returns them.
        labels: `(N,)` integers, each the row of its class in `class_embeddings`.
        ks: the k of each accuracy; those above K are left out, as everything is among the K best of K.

    Returns:
        `zero_shot_top1`, `zero_shot_top5`, one for each k.

    Raises:
        ValueError: if the shapes do not fit or a label names no class.
    """
    check_embeddings("image", image, "class_embeddings", class_embeddings)
    check_labels("labels", labels, len(image))
    classes, low, high = len(class_embeddings), int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"expected labels from 0 to {classes - 1}, got {low} to {high}: a label is the "
            " row of its class in class_embeddings"
        )
    class_ids = torch.arange(classes, device=image.device)
    ranks = match_ranks(image, class_embeddings, labels.to(image.device), class_ids)
    return {f"zero_shot_top{k}": (ranks <= k).double().mean().item() for k in ks if k <= classes}


@torch.no_grad()
def zero_shot_classifier(
    encode_text: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[str] = ("a photo of a {}.",),
    *,
    chunk_size: int = 256,
) -> Tensor:
    """One embedding per class: the normalised mean of its normalised prompt embeddings.

    Args:
        encode_text: takes at most `chunk_size` prompts and returns their embeddings `(len(prompts), D)`,
            normalised or not.
        class_names: K names.
        templates: P sentences, each with `{}` where the name goes.
        chunk_size: how many prompts are encoded at once.

    Returns:
        `(K, D)`, L2-normalised rows.

    Raises:
        ValueError: if a name, a template or a `{}` is missing, or `encode_text` returns a wrong number of
            rows.

    Example:
        >>> zero_shot_classifier(encode_text, ["cat", "dog"], ["a photo of a {}.", "a drawing of a {}."])
    """
    if not class_names or not templates or any("{}" not in template for template in templates):
        raise ValueError(
            f"expected class names, and templates with {{}} for the name, got {len(class_names)} names and "
            f"templates {list(templates)}: write for example 'a photo of a {{}}.'"
        )
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    embeddings = torch.cat(
        [_encode(encode_text, prompts[i : i + chunk_size]) for i in range(0, len(prompts), chunk_size)]
    )
    return normalize(embeddings.unflatten(0, (len(class_names), len(templates))).mean(dim=1), dim=-1)


def _encode(encode_text: Callable[[list[str]], Tensor], prompts: list[str]) -> Tensor:
    embeddings = encode_text(prompts)
    if embeddings.ndim != 2 or len(embeddings) != len(prompts):
        raise ValueError(
            f"expected encode_text to return ({len(prompts)}, D), got {tuple(embeddings.shape)}: return one "
            "embedding per prompt"
        )
    # A mean of unit vectors loses digits in half precision, and the result is small.
    return normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=-1)
