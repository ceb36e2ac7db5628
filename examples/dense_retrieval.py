"""Train or fine-tune a dense retriever at any batch size, in a loop of one's own on a plain Accelerator.

    accelerate launch examples/dense_retrieval.py                 # the built-in number passages, from scratch
    accelerate launch examples/dense_retrieval.py config.yaml     # all arguments from one YAML or JSON file
    accelerate launch examples/dense_retrieval.py \\
        --model bert-base-uncased --dataset path/or/hub-name --batch_size 4096 --passage_chunk_size 32

Written to the output folder: the encoder in its own format with its tokenizer (in `query` and `passage` without
--tied), the log (training_log.json), the metrics before and after (all_results.json) and training_curve.png.
Lines marked (*) are what a loop with a direct step would not have.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, send_to_device, set_seed
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from gc_accel import GradientCache
from gc_accel.data import BatchPlan, ChunkedLoader
from gc_accel.data.builtin.passages import NumberPassages, passages_config, passages_tokenizer
from gc_accel.data.sources.triplets import Corpus, TripletCollator, TripletDataset, load_triplets
from gc_accel.distributed import RankedBatch
from gc_accel.encoders import Retriever
from gc_accel.evaluation import baseline_metrics, ranking_metrics
from gc_accel.losses import RetrievalLoss
from gc_accel.pictures import training_curve
from gc_accel.programs.command_line import option, parse, run
from gc_accel.programs.cores import use_all_cores

BUILT_IN = "numbers"
COLUMNS = ("query_column", "positive_column", "negatives_column")
FROM_SCRATCH, FINE_TUNING = 3e-3, 2e-5  # peak learning rates


@dataclass
class Arguments:
    """Model, data and training, with defaults for the built-in data."""

    output_dir: str = option("outputs/dense_retrieval", "Folder for everything that is written.")
    model: str | None = option(None, "Text encoder: hub name or folder; by default a tiny BERT from scratch.")
    tied: bool = option(True, "One tower for questions and passages; --no_tied trains one for each.")
    pooling: str | None = option(
        None, "Tokens to one vector; by default as saved, or else mean.", choices=["mean", "cls"]
    )
    dataset: str = option(BUILT_IN, "'numbers' (built in), a csv, jsonl or parquet file, folder, hub name.")
    dataset_config: str | None = option(None, "Configuration, for a data set that has several.")
    train_split: str = option("train", "Split to train on.")
    eval_split: str | None = option(None, "Split to evaluate on; by default training rows are held out.")
    query_column: str = option("query", "Column of the questions.")
    positive_column: str = option("positive", "Column of their passages, or of lists to draw one from.")
    negatives_column: str = option("negatives", "Column of hard negatives, or of lists to draw from.")
    negatives: int = option(1, "Hard negatives of each question.")
    train_size: int = option(25_600, "Questions of the built-in training set.")
    eval_size: int = option(1000, "Questions to evaluate on.")
    query_length: int | None = option(None, "Tokens of a question; what is more is cut.")
    passage_length: int | None = option(None, "Tokens of a passage; what is more is cut.")
    batch_size: int = option(512, "Contrastive batch of one device, in questions.")
    query_chunk_size: int = option(256, "Questions encoded at once. Memory and speed, never the result.")
    passage_chunk_size: int = option(128, "Questions whose passages are encoded at once, 1 + negatives each.")
    num_train_epochs: int = option(4, "Passes over the training set.")
    learning_rate: float | None = option(None, "Peak; by default 2e-5 to fine-tune, 3e-3 from scratch.")
    weight_decay: float = option(0.01, "Of all parameters.")
    warmup: float = option(0.1, "Part of all steps.")
    temperature: float = option(0.05, "Of the softmax over all passages of the global batch.")
    logging_steps: int = option(10, "Steps from one entry of the log to the next.")
    num_workers: int = option(0, "Processes that load chunks.")
    seed: int = option(42, "Of weights and data.")


def load_rows(args: Arguments) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Rows to train on and at most `eval_size` others, held out of them or of a split of their own."""
    rows = load_triplets(args.dataset, args.train_split, name=args.dataset_config)
    if args.eval_split is None:
        parts = rows.train_test_split(test_size=args.eval_size, seed=args.seed)
        return parts["train"], parts["test"]
    others = load_triplets(args.dataset, args.eval_split, name=args.dataset_config).shuffle(args.seed)
    return rows, others.select(range(min(args.eval_size, len(others))))


def load_data(args: Arguments) -> tuple[NumberPassages | TripletDataset, Corpus]:
    """Rows to train on, and the questions of the others with all their passages."""
    options: Any = {"negatives": args.negatives, "seed": args.seed}
    train: NumberPassages | TripletDataset
    test: NumberPassages | TripletDataset
    if args.dataset == BUILT_IN:
        train = NumberPassages("train", size=args.train_size, **options)
        test = NumberPassages("test", size=args.eval_size, **options)
    else:
        options |= {name: getattr(args, name) for name in COLUMNS}
        train, test = (TripletDataset(rows, **options) for rows in load_rows(args))
    return train, Corpus.of(test[i] for i in range(len(test)))


def load_model(args: Arguments) -> tuple[Retriever, PreTrainedTokenizerBase]:
    """The encoder and the tokenizer of its towers."""
    pooling: Any = args.pooling
    if args.model is not None:
        encoder = Retriever.from_pretrained(args.model, tied=args.tied, pooling=pooling)
        return encoder, AutoTokenizer.from_pretrained(args.model)
    towers = [AutoModel.from_config(passages_config()) for _ in range(1 if args.tied else 2)]
    return Retriever(*towers, pooling=pooling or "mean"), passages_tokenizer()


@torch.no_grad()
def evaluate(
    encoder: torch.nn.Module, collator: TripletCollator, corpus: Corpus, accelerator: Accelerator
) -> dict[str, float]:
    """Metrics over the corpus, of which each process encodes a part."""
    model = accelerator.unwrap_model(encoder).eval()

    def embed(stream: str, texts: list[str], size: int = 250) -> Tensor:
        with accelerator.split_between_processes(texts) as own, accelerator.autocast():
            chunks = [collator.tokenize(stream, own[i : i + size]) for i in range(0, len(own), size)]
            rows = [model.embed(stream, send_to_device(each, accelerator.device)).float() for each in chunks]
        part = torch.cat(rows)
        return RankedBatch(len(part), part.device).gather(part)

    embedded = embed("query", corpus.queries), embed("passage", corpus.passages)
    metrics = ranking_metrics(*embedded, corpus.relevant)
    return {f"eval_{name}": value for name, value in metrics.items()}


def write(
    output: Path, model: Retriever, state: dict[str, Tensor], tokenizer: Any, log: list[dict], results: dict
) -> None:
    """The encoder with its tokenizer, the log, the metrics and the curve; a table on the screen."""
    model.save_pretrained(output, state)
    for folder in {output, *model.folders(output).values()}:
        tokenizer.save_pretrained(folder)
    (output / "training_log.json").write_text(json.dumps(log, indent=2) + "\n")
    (output / "all_results.json").write_text(json.dumps(results, indent=2) + "\n")
    training_curve(log, output / "training_curve.png")
    for name in ("chance", "tf_idf", "before", "after"):
        print(f"{name:8}", {key.split("_")[-1]: round(v, 4) for key, v in results[name].items()})
    print(f"Written to {output}: the encoder, all_results.json, training_log.json, training_curve.png")


def main() -> None:
    """Build, train, evaluate, write."""
    (args,) = parse(Arguments)
    use_all_cores()
    set_seed(args.seed)
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    encoder, tokenizer = load_model(args)
    with accelerator.main_process_first():
        train_set, corpus = load_data(args)
    collator = TripletCollator(tokenizer, query_length=args.query_length, passage_length=args.passage_length)
    chunk_sizes = {"query": args.query_chunk_size, "passage": args.passage_chunk_size}
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    plan = BatchPlan(len(train_set), args.batch_size, max(chunk_sizes.values()), seed=args.seed, **ranks)
    loader = ChunkedLoader(train_set, plan, collator, num_workers=args.num_workers)  # (*) batches as chunks
    rate = args.learning_rate or (FROM_SCRATCH if args.model is None else FINE_TUNING)
    optimizer = torch.optim.AdamW(encoder.parameters(), rate, (0.9, 0.98), weight_decay=args.weight_decay)
    steps = args.num_train_epochs * len(loader)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(args.warmup * steps), steps)
    encoder, optimizer = accelerator.prepare(encoder, optimizer)
    cache = GradientCache(encoder, RetrievalLoss(args.temperature), chunk_sizes, accelerator)  # (*)

    results: dict[str, Any] = {**baseline_metrics(*corpus), "arguments": asdict(args)}
    results["before"] = evaluate(encoder, collator, corpus, accelerator)
    log = [{"step": 0, **results["before"]}]
    bar = tqdm(total=steps, disable=not accelerator.is_main_process)
    step, start = 0, perf_counter()
    for epoch in range(args.num_train_epochs):
        encoder.train()
        loader.set_epoch(epoch)
        for batch in loader:
            loss = cache.forward_backward_chunks(batch)  # (*) instead of forward, loss and backward
            norm = accelerator.clip_grad_norm_(encoder.parameters(), 1.0)
            [lr] = schedule.get_last_lr()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            if step % args.logging_steps == 0 or step == steps:
                log.append({"step": step, "loss": float(loss), "learning_rate": lr, "grad_norm": float(norm)})
                bar.set_postfix(loss=f"{float(loss):.3f}")
        results["after"] = evaluate(encoder, collator, corpus, accelerator)
        log.append({"step": step, **results["after"]})
    bar.close()
    results |= {"seconds": perf_counter() - start, "corpus": len(corpus.passages)}

    state = accelerator.get_state_dict(encoder)
    if accelerator.is_main_process:
        write(Path(args.output_dir), accelerator.unwrap_model(encoder), state, tokenizer, log, results)


if __name__ == "__main__":
    run(main)
