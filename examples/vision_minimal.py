"""SimCLR in one loop: a small ViT learns handwritten digits without labels, in under a minute on a CPU.

    python examples/vision_minimal.py

Lines marked (*) are what a loop with a direct step would not have.
"""

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTModel, get_cosine_schedule_with_warmup

from gc_accel import GradientCache, VisionEncoder
from gc_accel.data import HandwrittenDigits, MultiViewDataset, ViewsCollator, simclr_transform
from gc_accel.evaluation import knn_accuracy
from gc_accel.losses import NTXentLoss

EPOCHS, BATCH, CHUNK, SIZE = 10, 128, 64, 16

torch.manual_seed(0)
scans = HandwrittenDigits("train", image_size=SIZE)
test_scans = HandwrittenDigits("test", image_size=SIZE)
# A scan of a digit has no colours, and a mirrored or tightly cropped one is another digit.
transform = simclr_transform(SIZE, crop_scale=(0.7, 1.0), jitter=0.0, flip=0.0, grayscale=0.0, blur=0.0)
views = MultiViewDataset(scans, transform)
loader = DataLoader(views, BATCH, shuffle=True, drop_last=True, collate_fn=ViewsCollator())
config = ViTConfig(
    image_size=SIZE,
    patch_size=4,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=2,
)
backbone = ViTModel(config, add_pooling_layer=False)
encoder = VisionEncoder(backbone, pooling="mean", image_mean=[0.5] * 3, image_std=[0.5] * 3)
cache = GradientCache(encoder, NTXentLoss(0.1), CHUNK)  # (*)
optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
steps = EPOCHS * len(loader)
schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)


@torch.no_grad()
def features(images: HandwrittenDigits) -> tuple[Tensor, Tensor]:
    """What the backbone makes of whole scans, and the digits that they show."""
    encoder.eval()
    return encoder.features(images.pixels.expand(-1, 3, -1, -1)), images.labels


print(f"before: kNN accuracy {knn_accuracy(*features(scans), *features(test_scans)):.3f}")
for epoch in range(EPOCHS):
    encoder.train()
    views.set_epoch(epoch)
    for batch in loader:
        loss = cache.forward_backward(batch)  # (*) instead of forward, loss and backward
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
print(f"after: kNN accuracy {knn_accuracy(*features(scans), *features(test_scans)):.3f}")
