"""Streams: no sample twice, as many batches on every rank, exact resume without decoding, items as map-style."""

import gzip
import io
import json
import tarfile
import zipfile
from functools import cache, partial
from itertools import chain, pairwise

import datasets
import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from datasets.distributed import split_dataset_by_node
from PIL import Image
from transformers import CLIPModel

import gc_accel.data.sources.readers as readers
from gc_accel import CachedContrastiveArguments, CachedContrastiveTrainer, DualEncoder
from gc_accel.data import (
    HandwrittenNumbers,
    ImageTextCollator,
    ImageTextDataset,
    MultiViewDataset,
    StreamedRow,
    StreamLoader,
    StreamPlan,
    image_statistics,
    load_image_text,
    numbers_config,
    numbers_processor,
)
from gc_accel.data.sources.rows import stream_of, take_rows
from gc_accel.losses import CLIPLoss
from gc_accel.programs.splits import SplitArguments, check_streaming, load_splits
from tests.launching import launch, metrics, run_here, training_log
from tests.ranks import run_on_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # of the readers of datasets
]


@pytest.fixture(autouse=True, scope="module")
def _no_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# --- a stream of numbers ---


def rows_of(ranges, log=None):
    """A shard for each range, with its numbers."""
    for start, stop in ranges:
        for number in range(start, stop):
            if log is not None:
                log.append(number)
            yield {"number": number}


def numbers(sizes, log=None):
    """A stream of whole numbers from 0 on, in shards of these sizes."""
    ranges = list(pairwise(np.cumsum([0, *sizes]).tolist()))
    options = {"gen_kwargs": {"ranges": ranges}}
    return datasets.IterableDataset.from_generator(partial(rows_of, log=log), **options)


class Numbers(torch.utils.data.Dataset):
    """Item of a row is its number; remembers what was decoded and the passes that were set."""

    def __init__(self):
        self.decoded, self.epochs = [], []

    def __getitem__(self, index):
        self.decoded.append(index.row["number"])
        return index.row["number"]

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def loader(sizes=(9, 4, 10), batch_size=6, chunk_size=4, *, batches=7, num_workers=0, log=None, **options):
    options = {"shuffle_buffer": 5, "read_ahead": num_workers > 0} | options
    plan = StreamPlan(numbers(sizes, log), batch_size, chunk_size, batches=batches, **options)
    return StreamLoader(Numbers(), plan, torch.tensor, num_workers=num_workers)


def contents(batches):
    return [[chunk.tolist() for chunk in batch] for batch in batches]


def samples(batches):
    return [number for batch in batches for chunk in batch for number in chunk]


def test_a_pass_has_no_sample_twice_and_the_rest_is_left_out():
    one = loader()
    batches = contents(one)
    assert len(batches) == len(one) == 7
    assert [[len(chunk) for chunk in batch] for batch in batches] == [[4, 2]] * 7
    assert one.plan.passes == [3, 3]
    for start in (0, 3, 6):
        seen = samples(batches[start : start + 3])
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(range(23))


def test_batches_are_those_of_the_library_in_its_order():
    expected = []
    for epoch in range(3):
        stream = numbers((9, 4, 10)).shuffle(seed=3, buffer_size=5)
        stream.set_epoch(epoch)
        expected.append([number for block in stream.iter(32) for number in block["number"]][:18])
    batches = contents(loader(batches=9, seed=3))
    assert [samples(batches[i : i + 3]) for i in (0, 3, 6)] == expected
    assert expected[0] != expected[1] != expected[2] != list(range(18))


def test_the_seed_decides_the_order_and_no_buffer_keeps_it():
    assert contents(loader()) == contents(loader()) != contents(loader(seed=1))
    assert samples(contents(loader(batches=3, shuffle_buffer=0))) == list(range(18))


def test_workers_do_not_change_the_order():
    one, other = loader(), loader(num_workers=1)
    assert contents(one) == contents(other)
    assert other.samples.decoded == []  # but in another process


def test_every_pass_draws_anew():
    one = loader()
    contents(one)
    assert one.samples.epochs == [0, 1, 2]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("skipped", [2, 3, 5, 8])
def test_skipping_continues_exactly_and_decodes_nothing(skipped, num_workers):
    expected = contents(loader(batches=10))[skipped:]
    log = []
    one = loader(batches=10, num_workers=num_workers, log=log)
    batches = contents(skip_first_batches(one, skipped))
    assert batches == expected
    assert one.plan.passes == [3, 3, 3]
    if num_workers == 0:
        assert one.samples.decoded == samples(expected)


def test_passes_that_are_known_are_not_read_again():
    expected = contents(loader(batches=10))[7:]
    logs = []
    for passes in ([], [3, 3]):
        logs.append(log := [])
        one = loader(batches=10, log=log)
        one.plan.passes = passes
        assert contents(skip_first_batches(one, 7)) == expected
    assert len(logs[0]) - len(logs[1]) == 2 * 23


def test_handles_cost_nothing():
    log = []
    one = loader(log=log)
    handles = list(one)
    assert log == []
    chunks = iter(handles[0])
    next(chunks)
    assert len(one.samples.decoded) == 4
    assert contents(handles[1:2]) == contents(loader())[1:2]


def test_a_batch_may_be_read_again():
    handles = list(loader())
    first = contents(handles[:5])
    assert contents(handles[3:5]) == first[3:5]


def test_sorting_and_a_token_budget_change_the_chunks_but_not_the_batch():
    lengths = [7, 1, 3, 3, 9, 2, 2, 1, 30, 4, 4, 4, 5, 6, 1, 2, 3, 8, 1, 1, 2, 9, 3]

    def of(rows):
        assert all(isinstance(row, StreamedRow) for row in rows)
        return [lengths[row.row["number"]] for row in rows]

    plain = contents(loader())
    for tokens in (None, 8):
        cut = contents(loader(lengths=of, chunk_tokens=tokens))
        for a, b in zip(plain, cut, strict=True):
            assert sorted(samples([a])) == sorted(samples([b]))
            in_order = [lengths[number] for number in samples([b])]
            assert in_order == sorted(in_order)
            for chunk in b if tokens else ():
                assert len(chunk) == 1 or len(chunk) * max(lengths[number] for number in chunk) <= tokens
    assert {len(batch) for batch in cut} != {2}, "the budget never cut a chunk"
    with pytest.raises(ValueError, match="texts whose lengths are known"):
        loader(chunk_tokens=8)


def test_iterating_draws_nothing_from_the_generator_of_dropout():
    state = torch.get_rng_state()
    contents(loader(num_workers=1))
    assert torch.equal(state, torch.get_rng_state())


def test_a_stream_without_a_batch_or_an_end_is_refused():
    with pytest.raises(ValueError, match=r"at least one batch of 24 samples.*lower the batch size"):
        contents(loader(batch_size=24))
    with pytest.raises(ValueError, match="the number of batches, as a stream has no length, got 0"):
        loader(batches=0)
    with pytest.raises(ValueError, match="one epoch, got epoch 1"):
        loader().set_epoch(1)
    with pytest.raises(ValueError, match="chunk size of at least 1"):
        loader(chunk_size=0)
    with pytest.raises(ValueError, match="wrap it in an ImageTextDataset"):
        stream_of(numbers((4,)))


def test_memory_is_that_of_a_batch_and_the_buffer():
    """Reading is at most a block ahead of what is handed out, the buffer and the batch aside."""
    log = []
    one = loader(sizes=(1000,), batch_size=6, batches=3, shuffle_buffer=8, log=log)
    next(iter(next(iter(one))))
    assert len(log) <= 8 + 6 + 32


@pytest.mark.parametrize("read_ahead", [False, True])
def test_the_longest_chunk_of_a_stream_is_decoded_alone(read_ahead):
    def lengths(rows):
        return [row.row["number"] for row in rows]

    one = loader(lengths=lengths, read_ahead=read_ahead)
    found = one.longest_chunk()
    assert one.samples.decoded == found.tolist()
    assert torch.equal(found, list(next(iter(loader(lengths=lengths))))[-1])
    assert loader(sizes=(3, 2)).longest_chunk() is None


# --- ranks ---


def read_on_a_rank(rank, world_size, sizes, skipped, options):
    one = loader(sizes, rank=rank, world_size=world_size, **options)
    share = [number for block in one.plan.share.iter(32) for number in block["number"]]
    batches = contents(skip_first_batches(one, skipped))
    return {"share": len(share), "batches": batches, "passes": one.plan.passes}


@pytest.mark.parametrize("sizes", [(21, 8), (9, 4, 11)])  # shards by rank; samples by rank
def test_ranks_share_a_pass_without_repeats_and_have_as_many_batches(tmp_path, sizes):
    options = {"batch_size": 3, "batches": 9}
    ranks = run_on_ranks(read_on_a_rank, 2, tmp_path, 2, sizes, 0, options)
    assert ranks[0]["share"] + ranks[1]["share"] == sum(sizes)
    if len(sizes) == 2:
        assert {each["share"] for each in ranks} == {21, 8}, "shares are meant to be unequal"
    passes = ranks[0]["passes"]
    assert passes == ranks[1]["passes"]
    assert len(passes) >= 2
    assert passes[0] == min(each["share"] for each in ranks) // 3
    ends = np.cumsum([0, *passes]).tolist()
    for start, stop in zip(ends, [*ends[1:], 9], strict=True):
        seen = [number for each in ranks for number in samples(each["batches"][start:stop])]
        assert len(set(seen)) == len(seen) == 2 * 3 * (stop - start)
    (tmp_path / "resumed").mkdir()
    resumed = run_on_ranks(read_on_a_rank, 2, tmp_path / "resumed", 2, sizes, 4, options)
    assert [each["batches"] for each in resumed] == [each["batches"][4:] for each in ranks]


def refuse_on_a_rank(rank):
    with pytest.raises(ValueError, match=r"for each of 2 process\(es\)") as error:
        contents(loader((21, 2), batch_size=3, rank=rank, world_size=2))
    return str(error.value)


def test_a_share_without_a_batch_is_refused_on_all_ranks(tmp_path):
    assert len(run_on_ranks(refuse_on_a_rank, 2, tmp_path)) == 2


def test_shares_of_four_ranks_are_disjoint_and_so_are_the_numbers_of_their_rows():
    shares, numbered = [], []
    for rank in range(4):
        share = split_dataset_by_node(numbers((9, 4, 10)).shuffle(seed=0, buffer_size=5), rank, 4)
        plan = StreamPlan(numbers((9, 4, 10)), 2, 2, batches=1, rank=rank, world_size=4, shuffle_buffer=5)
        own = [row for block in plan.share.iter(32) for row in block["number"]]
        assert own == [row["number"] for row in share]
        shares.append(own)
        numbered += [row.number for (chunk,) in plan.batches_of_chunks() for row in chunk]
    assert len(set(numbered)) == len(numbered) > 15
    assert sorted(chain.from_iterable(shares)) == list(range(23))


# --- images and texts ---


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@cache
def handwriting(count):
    """Numbers as PNG files, their captions and their labels."""
    numbers = HandwrittenNumbers("train", size=count)
    items = [numbers[i] for i in range(count)]
    images = [png(Image.fromarray(item["image"].permute(1, 2, 0).numpy())) for item in items]
    return [
        {"png": image, "txt": item["text"], "cls": i % 3}
        for i, (image, item) in enumerate(zip(images, items, strict=True))
    ]


def write_shards(folder, items, sizes):
    """Webdataset shards of these sizes, `000.tar` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for item in items[number : number + size]:
                parts = {"png": item["png"], "txt": item["txt"].encode(), "cls": str(item["cls"]).encode()}
                parts["json"] = json.dumps({"number": number}).encode()
                for extension, data in parts.items():
                    info = tarfile.TarInfo(f"{number:05}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    assert number == len(items)


COLUMNS = {"image_column": "png", "caption_column": "txt", "label_column": "cls"}


def items_of(dataset):
    """Every item of a stream, in its order."""
    return [dataset[StreamedRow(i, row)] for i, row in enumerate(dataset.stream)]


def assert_same_items(found, expected):
    assert len(found) == len(expected) > 1
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert a["image"].tobytes() == b["image"].tobytes()
        assert a.get("text") == b.get("text")
        assert a.get("label") == b.get("label")


@pytest.mark.parametrize("source", ["", "/*.tar", "/000.tar"])
def test_webdataset_shards_are_read_as_a_stream_and_as_a_table(tmp_path, source):
    shards = tmp_path / "shards"
    write_shards(shards, handwriting(8), (5, 3))
    stream = ImageTextDataset(
        load_image_text(f"{shards}{source}", "train", streaming=True, **head(COLUMNS)), **COLUMNS
    )
    table = ImageTextDataset(load_image_text(f"{shards}{source}", "train", **head(COLUMNS)), **COLUMNS)
    assert stream.stream is not None
    assert table.stream is None
    assert_same_items(items_of(stream), [table[i] for i in range(len(table))])
    assert len(table) == (5 if source == "/000.tar" else 8)
    assert [item["label"] for item in items_of(stream)][:4] == [0, 1, 2, 0]
    assert len({item["image"].tobytes() for item in items_of(stream)}) == len(table)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("source", ["", "/*.tar", "/001.tar"])
@pytest.mark.parametrize("kept", [0, 0.4, 0.7, "junk"])
def test_a_shard_that_is_not_whole_is_named(tmp_path, source, streaming, kept):
    shards = tmp_path / "shards"
    write_shards(shards, handwriting(8), (4, 4))
    options = {"streaming": streaming, "image_column": "png"}
    assert len(list(load_image_text(f"{shards}{source}", "train", **options))) in (4, 8)
    whole = (shards / "001.tar").read_bytes().rstrip(b"\0")
    (shards / "001.tar").write_bytes(b"junk" * 999 if kept == "junk" else whole[: int(kept * len(whole))])
    with pytest.raises(
        ValueError, match=rf"expected a whole tar archive, .*: {shards}/001.tar\. Copy it again"
    ):
        load_image_text(f"{shards}{source}", "train", **options)


def test_a_compressed_shard_is_read(tmp_path):
    write_shards(tmp_path, handwriting(3), (3,))
    shard = tmp_path / "000.tar"
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    assert len(list(load_image_text(str(shard), "train", streaming=True, image_column="png"))) == 3


def head(columns):
    return {"image_column": columns["image_column"]}


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "folder", "zip", "embedded"])
def test_every_source_streams_what_it_loads(tmp_path, kind):
    folder, items = tmp_path / "photos", handwriting(4)
    folder.mkdir()
    for i, item in enumerate(items):
        (folder / f"{i}.png").write_bytes(item["png"])
    column = "file_name" if kind in ("folder", "zip") else "image"
    table = datasets.Dataset.from_list(
        [{column: f"{i}.png", "text": it["txt"]} for i, it in enumerate(items)]
    )
    source = folder / f"rows.{kind}"
    if kind in ("csv", "tsv"):
        table.to_csv(source, sep="\t" if kind == "tsv" else ",")
    elif kind in ("json", "jsonl"):
        table.to_json(source, lines=kind == "jsonl")
    elif kind == "parquet":
        table.to_parquet(source)
    elif kind == "embedded":
        source = folder / "embedded.parquet"
        table.map(lambda row: {"image": (folder / row["image"]).read_bytes()}).cast_column(
            "image", datasets.Image()
        ).to_parquet(source)
    else:
        source = folder
        table.to_csv(folder / "metadata.csv")
    if kind == "zip":
        source = tmp_path / "zipped"
        source.mkdir()
        with zipfile.ZipFile(source / "photos.zip", "w") as archive:
            for i in range(4):
                archive.write(folder / f"{i}.png", f"{i}.png")
    options = {"caption_column": None if kind == "zip" else "text"}
    stream = ImageTextDataset(load_image_text(str(source), "train", streaming=True), **options)
    expected = ImageTextDataset(load_image_text(str(source), "train"), **options)
    found = items_of(stream)
    assert_same_items(found, [expected[i] for i in range(4)])


def embedded(images, **columns):
    """A stream of rows with encoded images."""
    rows = [
        {"image": {"bytes": image, "path": f"{i}.png"}}
        | {name: values[i] for name, values in columns.items()}
        for i, image in enumerate(images)
    ]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    return table.to_iterable_dataset(num_shards=2)


def test_a_missing_column_is_named_with_those_that_exist(tmp_path):
    stream = embedded([png(Image.new("RGB", (2, 2)))] * 2, text=["a", "b"], kind=["cat", "dog"])
    for argument in ("image_column", "caption_column", "label_column"):
        with pytest.raises(ValueError, match=rf"'wrong'.*'image', 'text', 'kind'.*set {argument}"):
            ImageTextDataset(stream, **{argument: "wrong"})
    with pytest.raises(ValueError, match=r"integers in the column 'kind'.*ClassLabel"):
        ImageTextDataset(stream, label_column="kind")
    (tmp_path / "rows.csv").write_text("image,title\n0.png,one\n")
    rows = load_image_text(str(tmp_path / "rows.csv"), "train", streaming=True)
    with pytest.raises(ValueError, match=r"'text'.*'image', 'title'.*set caption_column"):
        ImageTextDataset(rows)
    with pytest.raises(ValueError, match=r"whole split to stream, got 'train\[:5\]'"):
        load_image_text(str(tmp_path / "rows.csv"), "train[:5]", streaming=True)


@pytest.mark.parametrize(("choice", "num_workers"), [("error", 0), ("skip", 0), ("skip", 1)])
def test_an_unreadable_image_is_named_or_left_out_and_counted(choice, num_workers):
    images = [png(Image.new("RGB", (2, 2), (i, 0, 0))) for i in range(8)]
    images[5] = b"no image"
    dataset = ImageTextDataset(embedded(images, text=["a"] * 8), on_bad_image=choice)
    plan = StreamPlan(dataset.stream, 8, 3, batches=2, read_ahead=num_workers > 0)
    batches = StreamLoader(dataset, plan, list, num_workers=num_workers)
    if choice == "error":
        with pytest.raises(ValueError, match=r"row \d \(in the order of the stream\).*'5\.png'.*skip"):
            list(next(iter(batches)))
    else:
        read = [item for batch in batches for chunk in batch for item in chunk]
        assert sum(item is None for item in read) == dataset.skipped == 2
        assert len(read) == 16


def test_captions_are_known_without_their_images_and_drawn_anew_in_each_pass(monkeypatch):
    captions = [[f"{i}" + "x" * k for k in range(5)] for i in range(12)]
    dataset = ImageTextDataset(embedded([png(Image.new("RGB", (2, 2)))] * 12, text=captions))
    plan = StreamPlan(dataset.stream, 12, 12, batches=2, shuffle_buffer=0)
    drawn = [
        [item["text"] for chunk in batch for item in chunk] for batch in StreamLoader(dataset, plan, list)
    ]
    monkeypatch.setattr(readers, "read_image", None)
    again = StreamPlan(dataset.stream, 12, 12, batches=2, shuffle_buffer=0)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        again.epoch = epoch
        ((rows,),) = again.batches_of_chunks()
        assert dataset.texts(rows) == drawn[epoch]
    same = sum(a == b for a, b in zip(sorted(drawn[0]), sorted(drawn[1]), strict=True))
    assert same < 9


def shifted(image):
    """A view that depends on the image and on torch's generator."""
    return torch.from_numpy(np.asarray(image).copy()).float() + torch.rand(2, 1, 1, 1)


def test_views_depend_on_seed_pass_and_sample_alone():
    images = [png(Image.new("RGB", (2, 2), (i, 0, 0))) for i in range(8)]

    def views(skipped, num_workers=0):
        dataset = MultiViewDataset(ImageTextDataset(embedded(images), caption_column=None), shifted, seed=3)
        plan = StreamPlan(dataset.stream, 8, 3, batches=3, read_ahead=num_workers > 0)
        batches = skip_first_batches(StreamLoader(dataset, plan, list, num_workers=num_workers), skipped)
        return [torch.stack([item["views"] for chunk in batch for item in chunk]) for batch in batches]

    whole = views(0)
    torch.testing.assert_close(views(2)[0], whole[2], rtol=0, atol=0)
    torch.testing.assert_close(views(1, num_workers=1)[1], whole[2], rtol=0, atol=0)
    draws = [batch.frac().flatten(1)[:, 0].tolist() for batch in whole]
    assert len({round(draw, 6) for batch in draws for draw in batch}) == 24


# --- held-out samples ---


def arguments(source, **options):
    return SplitArguments(**({"dataset": str(source), "streaming": True, "image_column": "png"} | options))


def test_held_out_samples_never_turn_up_in_training(tmp_path):
    items = [*handwriting(20), handwriting(20)[3] | {"txt": "the same image again"}]
    write_shards(tmp_path, items, (8, 2, 7, 4))
    args = arguments(tmp_path, eval_size=6)
    rows, held_out = load_splits(args)
    assert isinstance(held_out, datasets.Dataset)
    assert len(held_out) == 6
    evaluated = {image["bytes"] for image in held_out["png"]}
    assert len(evaluated) == 6
    for world_size in (1, 2, 3):
        trained = []
        for rank in range(world_size):
            plan = StreamPlan(rows, 1, 1, batches=1, rank=rank, world_size=world_size)
            trained += [row["bytes"] for block in plan.share.iter(4) for row in block["png"]]
        assert not evaluated & set(trained)
        assert len(trained) == sum(item["png"] not in evaluated for item in items)
    assert load_splits(args)[1]["txt"] == held_out["txt"]
    assert load_splits(arguments(tmp_path, eval_size=6, split_seed=1))[1]["txt"] != held_out["txt"]
    assert len(ImageTextDataset(held_out, **COLUMNS)[0]["text"]) > 10


def test_an_evaluation_split_is_taken_into_memory(tmp_path):
    items = handwriting(12)
    for name, part in (("train", items[:7]), ("test", items[7:])):
        write_shards(tmp_path / name, part, (len(part),))
    rows, held_out = load_splits(arguments(tmp_path, eval_split="test", eval_size=4))
    assert len(held_out) == 4
    assert set(held_out["txt"]) <= {item["txt"] for item in items[7:]}
    assert len(list(rows)) == 7
    assert len(load_splits(arguments(tmp_path, eval_split="test", eval_size=99))[1]) == 5


def test_a_stream_no_longer_than_its_evaluation_set_is_refused(tmp_path):
    write_shards(tmp_path, handwriting(5), (5,))
    for size in (5, 9):
        with pytest.raises(ValueError, match=rf"more than eval_size = {size} rows in split 'train', got 5"):
            load_splits(arguments(tmp_path, eval_size=size))
    with pytest.raises(ValueError, match=r"'image', got a data set with \['png'.*set image_column"):
        load_splits(arguments(tmp_path, eval_size=2, image_column="image"))


def test_rows_are_taken_from_all_over_a_short_stream():
    taken = take_rows(numbers((30, 30)), 12, seed=1)["number"]
    assert len(set(taken)) == 12
    assert max(taken) > 30
    assert taken != sorted(taken)
    assert len(take_rows(numbers((3,)), 12)) == 3


# --- training ---


@pytest.fixture
def shards(tmp_path):
    """Thirty numbers in three shards: three batches of eight in a pass."""
    write_shards(tmp_path / "shards", handwriting(30), (14, 5, 11))
    return tmp_path / "shards"


def make_trainer(folder, shards, *, dropout=0.0, **options):
    torch.manual_seed(0)
    config = numbers_config(width=16, layers=1, heads=2)
    config.text_config.attention_dropout = config.vision_config.attention_dropout = dropout
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "chunk_size": 3,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "shuffle_buffer": 6,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    rows = load_image_text(str(shards), "train", streaming=True)
    return CachedContrastiveTrainer(
        model=CLIPModel(config),
        args=CachedContrastiveArguments(**(defaults | options)),
        train_dataset=ImageTextDataset(rows, image_column="png", caption_column="txt"),
        processing_class=numbers_processor(),
    )


def weights(trainer):
    return {name: value.clone() for name, value in trainer.encoder.model.state_dict().items()}


def assert_same_weights(one, other, start):
    for name, value in weights(one).items():
        assert torch.equal(weights(other)[name], value), name
    assert sum(not torch.equal(value, start[name]) for name, value in weights(one).items()) > 30


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (0, 2), (1, 1)])
def test_resume_in_the_middle_of_a_pass_gives_the_same_weights(tmp_path, shards, workers, accumulation):
    """With dropout, from the third step on: at one batch a step the last of the first pass, at two in the second."""
    options = {"save_strategy": "steps", "save_steps": 2, "dataloader_num_workers": workers, "dropout": 0.3}
    options |= {"gradient_accumulation_steps": accumulation, "max_steps": 5}
    whole = make_trainer(tmp_path / "run", shards, **options)
    start = weights(whole)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["stream_passes"] == ([] if accumulation == 1 else [3])
    resumed = make_trainer(tmp_path / "other", shards, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == whole.state.global_step == 5
    assert_same_weights(whole, resumed, start)


@pytest.mark.parametrize("steps", [2, 4])  # in the first pass, in the second
def test_a_finished_run_goes_on_with_more_steps(tmp_path, shards, steps):
    options = {"dropout": 0.3, "lr_scheduler_type": "constant"}
    whole = make_trainer(tmp_path / "whole", shards, max_steps=5, **options)
    start = weights(whole)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": steps}
    make_trainer(tmp_path / "short", shards, max_steps=steps, **saving, **options).train()
    longer = make_trainer(tmp_path / "longer", shards, max_steps=5, **options)
    longer.train(resume_from_checkpoint=str(tmp_path / "short" / f"checkpoint-{steps}"))
    assert longer.state.global_step == 5
    assert_same_weights(whole, longer, start)


def test_images_of_skipped_batches_are_not_decoded(tmp_path, shards, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    make_trainer(tmp_path / "run", shards, **options).train()
    read, decode = [], readers.read_image
    monkeypatch.setattr(readers, "read_image", lambda *args: read.append(1) or decode(*args))
    resumed = make_trainer(tmp_path / "other", shards, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert len(read) == 8


def batches_by_hand(shards, count, seed):
    """The rows of a run, gathered from `datasets` alone."""
    batches, epoch = [], 0
    while len(batches) < count:
        rows = datasets.load_dataset(
            "webdataset", data_files=f"{shards}/*.tar", split="train", streaming=True
        )
        rows = rows.shuffle(seed=seed, buffer_size=6)
        rows.set_epoch(epoch)
        rows = list(rows)
        batches += [rows[i : i + 8] for i in range(0, len(rows) - 7, 8)]
        epoch += 1
    return batches[:count]


def test_a_run_equals_the_same_batches_fed_by_hand(tmp_path, shards):
    """Plain PyTorch, whole batches, no cache; the run sorts by length, which no loss can see."""
    trainer = make_trainer(
        tmp_path, shards, max_steps=5, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant"
    )
    start = weights(trainer)
    processor = numbers_processor()
    mean, std = image_statistics(processor)
    model = CLIPModel(trainer.model.model.config)
    encoder = DualEncoder(model, image_mean=mean, image_std=std)
    encoder.load_state_dict(trainer.model.state_dict())
    trainer.train()
    collate, optimizer = ImageTextCollator(processor), torch.optim.SGD(encoder.parameters(), lr=1e-2)
    for rows in batches_by_hand(shards, 5, trainer.args.seed):
        chunk = collate([{"image": row["png"].convert("RGB"), "text": row["txt"]} for row in rows])
        reps = encoder(image={"pixel_values": chunk.pop("pixel_values")}, text=chunk)
        CLIPLoss()(**reps).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = 0
    for name, value in weights(trainer).items():
        torch.testing.assert_close(encoder.model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
        moved += not torch.equal(value, start[name])
    assert moved > 30


def test_logs_count_passes_and_steps(tmp_path, shards):
    trainer = make_trainer(tmp_path, shards)
    result = trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["stream_pass"] for entry in logged] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [entry["epoch"] for entry in logged] == [step / 8 for step in range(1, 9)]
    assert trainer.state.max_steps == 8
    assert trainer.state.num_train_epochs == 1
    assert all(entry["samples_per_second"] > 0 for entry in logged[1:])
    assert result.metrics["train_samples_per_second"] == pytest.approx(
        64 / result.metrics["train_runtime"], rel=0.05
    )


def test_steps_have_to_be_given(tmp_path, shards):
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        make_trainer(tmp_path, shards, max_steps=-1)
    options = {"dataset": "shards", "streaming": True}
    with pytest.raises(ValueError, match="expected --max_steps with --streaming"):
        check_streaming(SplitArguments(**options), -1, built_in="numbers")
    with pytest.raises(ValueError, match="a --dataset to stream, got the built-in 'shards'"):
        check_streaming(SplitArguments(**options), 5, built_in="shards")
    check_streaming(SplitArguments(**options), 5, built_in="numbers")
    check_streaming(SplitArguments(dataset="numbers"), -1, built_in="numbers")


# --- every source, through the command line ---

ONE_STEP = [
    "--max_steps",
    "1",
    "--per_device_train_batch_size",
    "8",
    "--chunk_size",
    "4",
    "--logging_steps",
    "1",
]
ONE_STEP += ["--eval_size", "6", "--use_cpu", "--output_dir", "out"]
SHARDS = ["--image_column", "png"]
STREAM = ["--streaming", "--shuffle_buffer", "8"]
SOURCES = {  # what is written, and the flags that read it
    "built-in": [],
    "metadata.csv": ["--dataset", "photos"],
    "metadata.jsonl": ["--dataset", "photos"],
    "rows.csv": ["--dataset", "photos/rows.csv"],
    "rows.tsv": ["--dataset", "photos/rows.tsv"],
    "rows.json": ["--dataset", "photos/rows.json"],
    "rows.jsonl": ["--dataset", "photos/rows.jsonl"],
    "rows.parquet": ["--dataset", "photos/rows.parquet"],
    "hub": ["--dataset", "someone/flowers", "--train_split", "train", "--eval_split", "test"],
    "classes": ["--dataset", "classes"],
    "shards": ["--dataset", "shards", *SHARDS],
    "one shard": ["--dataset", "shards/000.tar", *SHARDS],
    "streamed metadata.csv": ["--dataset", "photos", *STREAM],
    "streamed metadata.jsonl": ["--dataset", "photos", *STREAM],
    "streamed rows.csv": ["--dataset", "photos/rows.csv", *STREAM],
    "streamed rows.tsv": ["--dataset", "photos/rows.tsv", *STREAM],
    "streamed rows.json": ["--dataset", "photos/rows.json", *STREAM],
    "streamed rows.jsonl": ["--dataset", "photos/rows.jsonl", *STREAM],
    "streamed rows.parquet": ["--dataset", "photos/rows.parquet", *STREAM],
    "streamed hub": ["--dataset", "someone/flowers", "--eval_split", "test", *STREAM],
    "streamed classes": ["--dataset", "classes", *STREAM],
    "streamed shards": ["--dataset", "shards/*.tar", *SHARDS, *STREAM, "--dataloader_num_workers", "1"],
    "streamed one shard": ["--dataset", "shards/000.tar", *SHARDS, *STREAM],
}
CLIP = ["--train_size", "20"]
VISION = ["--image_size", "16", "--probe_size", "10", "--eval_strategy", "no"]
# Pictures in class folders have no captions.
CLIP_SOURCES = [source for source in SOURCES if "classes" not in source]


def write_source(name, folder):
    """The files of a source, in a folder of its own."""
    name, items = name.removeprefix("streamed "), handwriting(20)
    if name in ("shards", "one shard"):
        write_shards(folder / "shards", items, (13, 7) if name == "shards" else (20,))
    elif name == "classes":
        for i, item in enumerate(items):
            place = folder / "classes" / "abc"[item["cls"]]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}.png").write_bytes(item["png"])
    elif name == "hub":
        table = datasets.Dataset.from_list(
            [
                {"image": {"bytes": it["png"], "path": None}, "text": it["txt"], "label": it["cls"]}
                for it in items
            ]
        ).cast_column("image", datasets.Image())
        for split, rows in (("train", range(13)), ("test", range(13, 20))):
            table.select(rows).to_parquet(folder / "someone" / "flowers" / f"{split}.parquet")
    elif name != "built-in":
        photos, column = folder / "photos", "file_name" if name.startswith("metadata") else "image"
        photos.mkdir()
        for i, item in enumerate(items):
            (photos / f"{i}.png").write_bytes(item["png"])
        table = datasets.Dataset.from_list(
            [{column: f"{i}.png", "text": item["txt"], "label": item["cls"]} for i, item in enumerate(items)]
        )
        write = {
            ".csv": table.to_csv,
            ".tsv": partial(table.to_csv, sep="\t"),
            ".json": partial(table.to_json, lines=False),
            ".jsonl": table.to_json,
            ".parquet": table.to_parquet,
        }
        write[f".{name.partition('.')[2]}"](photos / name)


def assert_trained_one_step(output, *, streamed):
    (entry,) = training_log(output)
    assert entry["loss"] > 0
    assert entry["grad_norm"] > 0
    assert ("stream_pass" in entry) == streamed
    assert np.isfinite(metrics(output)["eval_loss"])
    assert (output / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("source", CLIP_SOURCES)
def test_clip_trains_on_every_source(tmp_path, monkeypatch, source):
    write_source(source, tmp_path)
    monkeypatch.chdir(tmp_path)
    captions = ["--caption_column", "txt"] if "shard" in source else []
    run_here("clip_train.py", *ONE_STEP, *SOURCES[source], *CLIP, *captions, monkeypatch=monkeypatch)
    assert_trained_one_step(tmp_path / "out", streamed=source.startswith("streamed"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("source", SOURCES)
def test_vision_trains_on_every_source(tmp_path, monkeypatch, source):
    """With labels, which every source has."""
    write_source(source, tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = ["--loss", "supcon", *(["--label_column", "cls"] if "shard" in source else [])]
    run_here("vision_train.py", *ONE_STEP, *SOURCES[source], *VISION, *flags, monkeypatch=monkeypatch)
    assert_trained_one_step(tmp_path / "out", streamed=source.startswith("streamed"))
    assert 0 <= metrics(tmp_path / "out")["eval_probe_last_backbone"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("script", ["clip_train.py", "vision_train.py"])
def test_two_processes_stream(tmp_path, monkeypatch, script):
    write_source("shards", tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = ["--caption_column", "txt", *CLIP] if script == "clip_train.py" else VISION
    flags = [*SOURCES["streamed shards"], *flags, "--per_device_train_batch_size", "3"]
    launch(script, *ONE_STEP, *flags, config="ddp_cpu.yaml")
    assert_trained_one_step(tmp_path / "out", streamed=True)


@pytest.mark.parametrize("script", ["clip_train.py", "vision_train.py"])
def test_streaming_without_steps_is_refused_before_anything_is_loaded(monkeypatch, script):
    with pytest.raises(ValueError, match="expected --max_steps with --streaming"):
        run_here(script, "--dataset", "nowhere/at/all", "--streaming", "--use_cpu", monkeypatch=monkeypatch)
