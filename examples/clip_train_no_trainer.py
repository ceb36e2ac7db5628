"""The image-text example as a loop of one's own, on a plain Accelerator.

    accelerate launch examples/clip_train_no_trainer.py --batch_size 1024 --chunk_size 128

Lines marked (*) are what a loop with a direct step would not have.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, send_to_device, set_seed
from tqdm.auto import tqdm
from transformers import CLIPModel, get_cosine_schedule_with_warmup

from gc_accel import DualEncoder, GradientCache
from gc_accel.data import (
    BatchPlan,
    ChunkedLoader,
    HandwrittenNumbers,
    ImageTextCollator,
    image_statistics,
    numbers_config,
    numbers_processor,
)
from gc_accel.evaluation import retrieval_metrics
from gc_accel.losses import CLIPLoss
from gc_accel.programs.cores import use_all_cores

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output_dir", default="outputs/clip_no_trainer", help="Where the model is saved.")
parser.add_argument("--batch_size", type=int, default=1024, help="Contrastive batch of one device.")
parser.add_argument("--chunk_size", type=int, default=128, help="Samples that the encoder sees at once.")
parser.add_argument("--epochs", type=int, default=6, help="Passes over the training set.")
parser.add_argument("--train_size", type=int, default=60_000, help="Images of the training set.")
parser.add_argument("--learning_rate", type=float, default=4e-3, help="Peak of the schedule.")
parser.add_argument("--seed", type=int, default=42, help="Of weights and data.")
args = parser.parse_args()

use_all_cores()
set_seed(args.seed)
accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
processor = numbers_processor()
collator = ImageTextCollator(processor)
train_set = HandwrittenNumbers("train", size=args.train_size)
ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
plan = BatchPlan(len(train_set), args.batch_size, args.chunk_size, seed=args.seed, **ranks)
loader = ChunkedLoader(train_set, plan, collator)  # (*) batches as lazy sequences of chunks
mean, std = image_statistics(processor)
encoder = DualEncoder(CLIPModel(numbers_config()), image_mean=mean, image_std=std)
optimizer = torch.optim.AdamW(
    [
        {"params": [p for p in encoder.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in encoder.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ],
    lr=args.learning_rate,
    betas=(0.9, 0.98),
)
steps = args.epochs * len(loader)
schedule = get_cosine_schedule_with_warmup(optimizer, steps // 7, steps)
encoder, optimizer = accelerator.prepare(encoder, optimizer)
cache = GradientCache(encoder, CLIPLoss(), args.chunk_size, accelerator)  # (*)

bar = tqdm(total=steps, disable=not accelerator.is_main_process)
for epoch in range(args.epochs):
    encoder.train()
    loader.set_epoch(epoch)
    for batch in loader:
        loss = cache.forward_backward_chunks(batch)  # (*) instead of forward, loss and backward
        accelerator.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        accelerator.unwrap_model(encoder).clamp_logit_scale()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        bar.update()

model = accelerator.unwrap_model(encoder).eval()
test_set = HandwrittenNumbers("test", size=1000)
parts = []
with torch.no_grad():
    for start in range(0, len(test_set), 250):
        chunk = send_to_device(collator([test_set[i] for i in range(start, start + 250)]), accelerator.device)
        text = {key: chunk[key] for key in ("input_ids", "attention_mask")}
        parts.append(model(image={"pixel_values": chunk["pixel_values"]}, text=text))
metrics = retrieval_metrics(*(torch.cat([part[name] for part in parts]) for name in ("image", "text")))
if accelerator.is_main_process:
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    print({name: round(value, 3) for name, value in metrics.items()})
accelerator.end_training()
