"""Random views, and the built-in digits that they are drawn from."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from gc_accel.data.builtin.digits import HandwrittenDigits
from gc_accel.data.transforms import (
    handwriting_transform,
    multicrop_transform,
    simclr_transform,
    supcon_transform,
)

RECIPES = {
    "simclr": simclr_transform,
    "supcon": supcon_transform,
    "handwriting": handwriting_transform,
}
STILL = {"crop_scale": (1.0, 1.0), "jitter": 0.0, "flip": 0.0, "grayscale": 0.0, "blur": 0.0}


def photo(height=40, width=50):
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_views_are_uint8_of_one_size_and_differ(recipe):
    views = RECIPES[recipe](24, views=3)(photo())
    assert views.shape == (3, 3, 24, 24)
    assert views.dtype == torch.uint8
    assert type(views) is torch.Tensor
    assert len({view.numpy().tobytes() for view in views}) == 3


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_image_of_pil_and_its_tensor_give_the_same_views(recipe):
    transform = RECIPES[recipe](24)
    state = torch.get_rng_state()
    from_pil = transform(photo())
    torch.set_rng_state(state)
    assert torch.equal(transform(as_tensor(photo())), from_pil)


def test_views_come_from_the_generator_of_torch_alone():
    transform = simclr_transform(24, blur=1.0)
    state = torch.get_rng_state()
    first = transform(photo())
    torch.set_rng_state(state)
    np.random.default_rng().random()
    assert torch.equal(transform(photo()), first)


def test_grey_images_become_rgb():
    grey = photo().convert("L")
    views = simclr_transform(24, **STILL)(grey)
    assert views.shape == (2, 3, 24, 24)
    assert torch.equal(views[:, 0], views[:, 2])


def test_crops_of_several_resolutions_come_in_groups():
    views = multicrop_transform((24, 12), (2, 3))(photo())
    assert [tuple(view.shape) for view in views] == [(3, 24, 24)] * 2 + [(3, 12, 12)] * 3
    assert all(view.dtype == torch.uint8 for view in views)


def test_small_crops_show_less_of_the_image():
    """A gradient from black to white: the smaller the crop, the smaller the range it spans."""
    ramp = torch.arange(256).expand(3, 256, 256).to(torch.uint8)
    still = {name: value for name, value in STILL.items() if name != "crop_scale"}
    transform = multicrop_transform((32, 31), (40, 40), crop_scales=((0.5, 1), (0.05, 0.2)), **still)
    spans = [int(view.max()) - int(view.min()) for view in transform(ramp)]
    assert min(spans[:40]) > max(spans[40:]) > 20


def test_a_recipe_with_everything_off_leaves_the_scan_as_it_is():
    digit = HandwrittenDigits("test", image_size=8)[0]["image"]
    views = simclr_transform(8, **STILL)(digit)
    assert torch.equal(views[0], digit)
    assert torch.equal(views[1], digit)


def test_a_flip_of_probability_one_always_flips():
    digit = HandwrittenDigits("test", image_size=8)[0]["image"]
    views = simclr_transform(8, **{**STILL, "flip": 1.0})(digit)
    assert torch.equal(views, digit.flip(2).expand(2, -1, -1, -1))
    assert not torch.equal(views[0], digit)


def test_a_grayscale_of_probability_one_always_takes_the_colours():
    coloured, grey = (simclr_transform(24, **{**STILL, "grayscale": p})(photo()) for p in (0.0, 1.0))
    assert not torch.equal(coloured[:, 0], coloured[:, 1])
    assert torch.equal(grey[:, 0], grey[:, 1])
    assert torch.equal(grey[:, 0], grey[:, 2])


@pytest.mark.parametrize("option", ["jitter", "blur"])
def test_jitter_and_blur_act(option):
    digit = HandwrittenDigits("test", image_size=8)[0]["image"]
    views = simclr_transform(8, views=20, **{**STILL, option: 1.0})(digit)
    changed = [not torch.equal(view, digit) for view in views]
    assert sum(changed) > 10


def test_handwriting_is_bent_and_its_ink_stays():
    digits = HandwrittenDigits("test", image_size=16)
    changes = []
    for strength in (0.0, 1.0, 2.0):
        bend = handwriting_transform(16, strength=strength)
        views = torch.stack([bend(digits[i]["image"]) for i in range(60)]).double()
        scans = digits.pixels[:60].expand(-1, 3, -1, -1).unsqueeze(1).double()
        changes.append(float((views - scans).abs().mean()))
        assert 0.6 < float(views.mean() / scans.mean()) < 1.2
    assert changes[0] < 1
    assert 5 < changes[1] < changes[2]


def test_transforms_can_be_sent_to_workers():
    transform = pickle.loads(pickle.dumps(multicrop_transform((16, 8), (1, 1))))
    assert len(transform(photo())) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: simclr_transform(0), "size of at least 1"),
        (lambda: simclr_transform(8, views=0), "at least one view"),
        (lambda: simclr_transform(8, crop_scale=(0.0, 1.0)), "crop_scale"),
        (lambda: supcon_transform(8, crop_scale=(0.5, 0.2)), "crop_scale"),
        (lambda: simclr_transform(8, jitter=3), "jitter from 0 to 2.5"),
        (lambda: supcon_transform(8, flip=1.5), r"probabilities from 0 to 1, got \{'flip': 1.5\}"),
        (lambda: handwriting_transform(8, strength=5), "strength from 0 to 4, got 8 and 5"),
        (lambda: handwriting_transform(8, views=0), "at least one view"),
        (lambda: multicrop_transform((8, 4), (2,)), "got 2, 1 and 2"),
        (lambda: multicrop_transform((8, 4), (2, 0)), "at least one view"),
        (lambda: simclr_transform(8)(torch.rand(3, 9, 9)), r"uint8 tensor, got torch\.float32"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class TestHandwrittenDigits:
    def test_an_item_is_a_grey_image_with_its_digit(self):
        dataset = HandwrittenDigits("test", image_size=20)
        item = dataset[4]
        assert item["image"].shape == (3, 20, 20)
        assert item["image"].dtype == torch.uint8
        assert torch.equal(item["image"][0], item["image"][2])
        assert item["image"].max() > 150
        assert item["label"] in range(10)

    @pytest.mark.parametrize("seed", [0, 3])
    def test_no_scan_is_in_both_splits_and_every_digit_is_in_each(self, seed):
        splits = [HandwrittenDigits(split, seed=seed, image_size=8) for split in ("train", "test")]
        assert [len(split) for split in splits] == [1437, 360]
        train, test = ({image.numpy().tobytes() for image in split.pixels} for split in splits)
        assert not train & test
        for split in splits:
            share = torch.bincount(split.labels, minlength=10) / len(split)
            assert share.min() > 0.09

    def test_the_seed_moves_scans_between_the_splits(self):
        one, other = (HandwrittenDigits("test", seed=seed, image_size=8) for seed in (0, 1))
        scans = [{image.numpy().tobytes() for image in split.pixels} for split in (one, other)]
        assert len(scans[0] & scans[1]) < 150

    def test_labels_are_those_of_the_scans(self):
        from sklearn.datasets import load_digits

        data = load_digits()
        dataset = HandwrittenDigits("test", image_size=8)
        for index in range(0, 360, 30):
            item = dataset[index]
            scan = item["image"][0].numpy().astype(float) * (16 / 255)
            assert data.target[((data.images - scan) ** 2).sum((1, 2)).argmin()] == item["label"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [({"split": "validation"}, "'train' or 'test'"), ({"image_size": 0}, "image_size of at least 1")],
    )
    def test_an_argument_out_of_range_is_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            HandwrittenDigits(**{"split": "train", **arguments})
