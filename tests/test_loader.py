"""The loader of lazy batches: same samples whatever the ranks, nothing loaded before it is read, exact skipping."""

import time

import pytest
import torch
from accelerate import skip_first_batches

from gc_accel.data import BatchPlan, ChunkedLoader


class Rows(torch.utils.data.Dataset):
    """Item i is i; remembers what was read and which epoch was set."""

    def __init__(self, size):
        self.size, self.read, self.epoch = size, [], None

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.read.append(index)
        return index

    def set_epoch(self, epoch):
        self.epoch = epoch


def loader(size=23, batch_size=6, chunk_size=4, *, num_workers=0, **options):
    dataset = Rows(size)
    plan = BatchPlan(size, batch_size, chunk_size, **options)
    return ChunkedLoader(dataset, plan, torch.tensor, num_workers=num_workers)


def contents(batches):
    return [[chunk.tolist() for chunk in batch] for batch in batches]


def samples(batch):
    return [index for chunk in batch for index in chunk]


def test_batches_are_cut_into_chunks_and_the_rest_of_the_epoch_is_left_out():
    batches = contents(loader())
    assert [[len(chunk) for chunk in batch] for batch in batches] == [[4, 2]] * 3
    assert len({index for batch in batches for index in samples(batch)}) == 18
    assert len(loader()) == 3


def test_global_batches_do_not_depend_on_the_number_of_ranks():
    whole = contents(loader(batch_size=6))
    halves = [contents(loader(batch_size=3, rank=rank, world_size=2)) for rank in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert samples(batch) == [index for part in parts for index in samples(part)]


def test_every_epoch_has_its_own_order_and_the_same_one_each_time():
    first, again, second = loader(), loader(), loader()
    second.set_epoch(1)
    assert second.samples.epoch == 1
    assert contents(first) == contents(again) != contents(second)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_batches_continues_exactly(num_workers):
    one = loader(num_workers=num_workers)
    one.set_epoch(2)
    expected = contents(one)[2:]
    other = loader(num_workers=num_workers)
    other.set_epoch(2)
    skipped = skip_first_batches(other, 2)
    assert contents(skipped) == expected
    assert expected


def test_skipped_batches_are_not_loaded():
    one = loader()
    batches = iter(skip_first_batches(one, 2))
    next(batches)
    assert one.samples.read == []


def test_chunks_are_loaded_while_they_are_read():
    one = loader()
    chunks = iter(next(iter(one)))
    assert one.samples.read == []
    next(chunks)
    assert len(one.samples.read) == 4


def test_batches_fetched_ahead_are_read_in_order():
    """As gradient accumulation does."""
    ahead = list(loader())
    assert contents(ahead) == contents(loader())


def test_sorting_changes_the_chunks_but_not_the_batch():
    plain, by_value = contents(loader()), contents(loader(lengths=list))
    for a, b in zip(plain, by_value, strict=True):
        assert samples(b) == sorted(samples(a))


def test_the_longest_chunk_is_the_last_one_and_is_read_alone():
    one = loader(lengths=list)
    found = one.longest_chunk()
    assert sorted(one.samples.read) == sorted(found.tolist())
    assert torch.equal(found, list(next(iter(loader(lengths=list))))[-1])
    assert len(found) == 2


def test_the_longest_chunk_is_one_that_can_be_read():
    plan = BatchPlan(12, 12, 4, shuffle=False)
    assert ChunkedLoader(Rows(12), plan, lambda own: own if max(own) < 6 else None).longest_chunk() == [
        0,
        1,
        2,
        3,
    ]
    assert ChunkedLoader(Rows(12), plan, lambda own: None).longest_chunk() is None


def test_chunks_keep_within_their_tokens():
    lengths = [7, 1, 3, 3, 9, 2, 2, 1, 30, 4, 4, 4]
    plan = BatchPlan(12, 6, 4, lengths=lambda rows: [lengths[i] for i in rows], chunk_tokens=8)
    batches = ChunkedLoader(Rows(12), plan, list)
    for epoch in range(3):
        batches.set_epoch(epoch)
        seen = []
        for batch in batches:
            chunks = list(batch)
            seen += samples(chunks)
            padded = [len(chunk) * max(lengths[i] for i in chunk) for chunk in chunks]
            assert all(tokens <= 8 or len(c) == 1 for tokens, c in zip(padded, chunks, strict=True))
            assert max(len(chunk) for chunk in chunks) <= 4
            assert len(samples(chunks)) == 6
        assert sorted(seen) == list(range(12))
    with pytest.raises(ValueError, match="texts whose lengths are known"):
        BatchPlan(12, 6, 4, chunk_tokens=8)


def test_iterating_draws_nothing_from_the_generator_of_dropout():
    state = torch.get_rng_state()
    contents(loader(num_workers=1))
    assert torch.equal(state, torch.get_rng_state())


def test_chunks_left_out_by_the_collator_are_skipped():
    dataset = Rows(8)
    keep_even = ChunkedLoader(
        dataset, BatchPlan(8, 8, 1, shuffle=False), lambda rows: None if rows[0] % 2 else rows
    )
    assert [list(batch) for batch in keep_even] == [[[0], [2], [4], [6]]]


def test_a_batch_of_which_everything_is_left_out_is_named():
    nothing = ChunkedLoader(Rows(8), BatchPlan(8, 4, 2), lambda rows: None)
    with pytest.raises(ValueError, match=r"batch 0 of epoch 0.*all left out"):
        list(next(iter(nothing)))


def test_data_set_smaller_than_the_global_batch_is_refused():
    with pytest.raises(ValueError, match=r"batch of 6 samples on 4 process\(es\), got a data set of 23"):
        BatchPlan(23, 6, 4, world_size=4)
    with pytest.raises(ValueError, match="chunk size of at least 1"):
        BatchPlan(23, 6, 0)


class Counted(Rows):
    """Counts what is read, in whatever process."""

    def __init__(self, size):
        super().__init__(size)
        self.count = torch.zeros(1, dtype=torch.long).share_memory_()

    def __getitem__(self, index):
        self.count += 1
        return index


@pytest.mark.parametrize("num_workers", [0, 1])
def test_workers_load_the_next_chunks_while_one_is_encoded(num_workers):
    dataset = Counted(64)
    ahead = {"num_workers": num_workers, "prefetch_factor": 3 if num_workers else None}
    loader = ChunkedLoader(dataset, BatchPlan(64, 64, 4), torch.tensor, **ahead)
    for batch in loader:
        chunks = iter(batch)
        next(chunks)  # which is now encoded
        expected, deadline = 4 if num_workers == 0 else 16, time.monotonic() + 30
        while dataset.count < expected and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert dataset.count == expected
        assert len(list(chunks)) == 15


def test_options_of_loading_reach_the_loader():
    options = {"num_workers": 1, "prefetch_factor": 5, "persistent_workers": True, "pin_memory": True}
    loader = ChunkedLoader(Rows(8), BatchPlan(8, 8, 4), torch.tensor, **options)
    assert {name: getattr(loader.batches.chunk_loader, name) for name in options} == options
