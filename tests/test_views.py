"""Views of a sample stay together, and are the same whoever draws them."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader

from gc_accel.data.builtin.digits import HandwrittenDigits
from gc_accel.data.transforms import multicrop_transform, simclr_transform
from gc_accel.data.views import MultiViewDataset, ViewsCollator, fold_views
from gc_accel.inputs.nested import split


def numbered(*names):
    """Images (len(names), 3, 2, 2), each filled with its own number."""
    return torch.tensor(names).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def numbers(views):
    return views[:, :, 0, 0, 0].tolist()


class TestFoldViews:
    def test_pairs_the_views_of_concatenated_batches(self):
        first, second = numbered(10, 20, 30), numbered(11, 21, 31)
        assert numbers(fold_views(torch.cat([first, second]))) == [[10, 11], [20, 21], [30, 31]]

    def test_pairs_more_than_two_views(self):
        views = [numbered(10 + v, 20 + v) for v in range(3)]
        assert numbers(fold_views(torch.cat(views), 3)) == [[10, 11, 12], [20, 21, 22]]

    def test_pairs_views_that_lie_next_to_each_other(self):
        views = numbered(10, 11, 20, 21, 30, 31)
        assert numbers(fold_views(views, views_layout="sample_major")) == [[10, 11], [20, 21], [30, 31]]

    def test_undoes_the_scripts_own_concatenation(self):
        """SupContrast concatenates what its loader stacks by view: torch.cat([images[0], images[1]])."""
        stacked = torch.randn(5, 2, 3, 4, 4)
        assert torch.equal(fold_views(torch.cat([stacked[:, 0], stacked[:, 1]])), stacked)

    @pytest.mark.parametrize("chunk_size", [1, 2, 3])
    def test_no_chunk_parts_the_views_of_a_sample(self, chunk_size):
        batch = fold_views(torch.cat([numbered(10, 20, 30, 40, 50), numbered(11, 21, 31, 41, 51)]))
        for chunk in split({"pixel_values": batch}, chunk_size):
            assert all(second == first + 1 for first, second in numbers(chunk["pixel_values"]))

    def test_folding_a_chunk_of_a_concatenation_would_pair_strangers(self):
        """What the docstring warns of, so that this file fails if the layouts were confused."""
        chunk = torch.cat([numbered(10, 20, 30, 40), numbered(11, 21, 31, 41)])[:4]
        assert numbers(fold_views(chunk)) == [[10, 30], [20, 40]]

    @pytest.mark.parametrize(
        ("count", "options", "message"),
        [
            (5, {}, "multiple of 2 images, as many as views, got 5"),
            (4, {"views": 3}, "multiple of 3"),
            (4, {"views": 0}, "multiple of 0"),
            (4, {"views_layout": "interleaved"}, "'view_major' or 'sample_major', got 'interleaved'"),
        ],
    )
    def test_bad_input(self, count, options, message):
        with pytest.raises(ValueError, match=message):
            fold_views(torch.zeros(count, 3, 2, 2), **options)


def dataset_of_views(transform=None, seed=0):
    transform = transform or simclr_transform(16, crop_scale=(0.3, 1.0))
    return MultiViewDataset(HandwrittenDigits("test"), transform, seed=seed)


def equal(one, other):
    return torch.equal(one["views"], other["views"])


class TestMultiViewDataset:
    def test_the_views_of_a_sample_do_not_depend_on_what_was_drawn_before(self):
        dataset = dataset_of_views()
        first = dataset[7]
        torch.rand(5)
        assert not equal(dataset[8], first)
        assert equal(dataset[7], first)
        assert equal(dataset_of_views()[7], first)

    def test_two_views_of_a_sample_differ(self):
        views = dataset_of_views()[7]["views"]
        assert views.shape == (2, 3, 16, 16)
        assert not torch.equal(views[0], views[1])

    @pytest.mark.parametrize("change", ["epoch", "seed", "index"])
    def test_another_epoch_seed_or_index_draws_other_views(self, change):
        """Of one image, so that only the draw can differ."""
        image = HandwrittenDigits("test")[0]["image"]
        samples = [{"image": image}] * 9
        dataset = MultiViewDataset(samples, simclr_transform(16), seed=change == "seed")
        dataset.set_epoch(int(change == "epoch"))
        found = dataset[4 if change == "index" else 3]
        assert not equal(found, MultiViewDataset(samples, simclr_transform(16))[3])

    def test_the_global_generator_is_left_alone(self):
        dataset, state = dataset_of_views(), torch.get_rng_state()
        dataset[3]
        assert torch.equal(torch.get_rng_state(), state)

    def test_workers_draw_what_the_main_process_draws_in_every_epoch(self):
        dataset, alone = dataset_of_views(), dataset_of_views()
        loader = DataLoader(
            dataset,
            batch_size=5,
            sampler=range(12),
            num_workers=2,
            persistent_workers=True,
            collate_fn=ViewsCollator(),
        )
        seen = []
        for epoch in range(2):
            dataset.set_epoch(epoch)
            alone.set_epoch(epoch)
            pixels = torch.cat([chunk["pixel_values"] for chunk in loader])
            assert torch.equal(pixels, torch.stack([alone[i]["views"] for i in range(12)]))
            seen.append(pixels)
        assert not torch.equal(*seen)

    def test_samples_keep_their_label_and_those_left_out_stay_out(self):
        image = HandwrittenDigits("test")[0]["image"]
        samples = [{"image": image, "label": 5, "text": "a photo"}, None, {"image": image}]
        dataset = MultiViewDataset(samples, simclr_transform(8))
        assert len(dataset) == 3
        assert dataset[0]["label"] == 5
        assert set(dataset[0]) == {"views", "label"}
        assert dataset[1] is None
        assert set(dataset[2]) == {"views"}


class TestViewsCollator:
    def test_samples_become_a_chunk_in_their_order(self):
        dataset = dataset_of_views()
        items = [dataset[i] for i in (4, 2, 9)]
        chunk = ViewsCollator()(items)
        assert chunk["pixel_values"].shape == (3, 2, 3, 16, 16)
        assert chunk["pixel_values"].dtype == torch.uint8
        assert all(torch.equal(chunk["pixel_values"][n], item["views"]) for n, item in enumerate(items))
        assert chunk["labels"].tolist() == [dataset.dataset[i]["label"] for i in (4, 2, 9)]
        assert chunk["labels"].dtype == torch.int64

    def test_crops_of_several_resolutions_become_one_tensor_each(self):
        dataset = dataset_of_views(multicrop_transform((16, 8), (2, 3)))
        items = [dataset[i] for i in range(4)]
        crops = ViewsCollator()(items)["pixel_values"]
        assert [tuple(crop.shape) for crop in crops] == [(4, 3, 16, 16)] * 2 + [(4, 3, 8, 8)] * 3
        assert all(torch.equal(crops[v][n], items[n]["views"][v]) for v in range(5) for n in range(4))

    def test_samples_left_out_leave_no_trace(self):
        items = [dataset_of_views()[i] for i in range(2)]
        chunk = ViewsCollator()([None, items[0], None, items[1]])
        assert torch.equal(chunk["pixel_values"], ViewsCollator()(items)["pixel_values"])
        assert ViewsCollator()([None]) is None

    def test_labels_appear_only_if_samples_have_them(self):
        item = dataset_of_views()[0]
        del item["label"]
        assert set(ViewsCollator()([item])) == {"pixel_values"}

    def test_samples_of_different_views_are_refused(self):
        item = dataset_of_views()[0]
        other = copy.copy(item) | {"views": item["views"][:1]}
        with pytest.raises(
            ValueError, match=r"same views of every sample, got the shapes .*\(\(3, 16, 16\),\)"
        ):
            ViewsCollator()([item, other])
