"""The built-in data set: words, captions, what separates train from test, and its processor."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, CLIPModel, CLIPProcessor

from gc_accel.data import HandwrittenNumbers, all_captions, number_in_words, numbers_config, numbers_processor


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (101, "one hundred and one"),
        (412, "four hundred and twelve"),
        (1000, "one thousand"),
        (3005, "three thousand and five"),
        (3050, "three thousand and fifty"),
        (5100, "five thousand one hundred"),
        (9999, "nine thousand nine hundred and ninety-nine"),
    ],
)
def test_numbers_are_spelled_in_british_english(number, words):
    assert number_in_words(number) == words


@pytest.mark.parametrize("number", [-1, 10_000])
def test_a_number_without_words_is_refused(number):
    with pytest.raises(ValueError, match="0 to 9999"):
        number_in_words(number)


def test_every_number_has_its_own_words():
    assert len({number_in_words(n) for n in range(10_000)}) == 10_000


def scans_of(dataset, digits=4):
    """The set of 8 x 8 scans that a data set shows, as bytes, found in its images again."""
    found = set()
    left = (dataset.pixels.shape[2] - 8 * digits) // 2
    for image in dataset.pixels:
        for place in range(digits):
            column = image[:, left + 8 * place : left + 8 * (place + 1)]
            # Top and bottom rows of a scan are never both black, so they show where it sits.
            rows = np.flatnonzero(column.any(axis=1))
            assert len(rows) == 8
            found.add(column[rows].tobytes())
    return found


def test_test_images_show_no_scan_that_was_trained_on_whatever_the_seeds():
    train = scans_of(HandwrittenNumbers("train", size=4000, seed=3))
    test = scans_of(HandwrittenNumbers("test", size=2000, seed=8))
    assert len(train) > 1300
    assert len(test) > 300
    assert not train & test


@pytest.mark.parametrize(("digits", "count"), [(3, 900), (4, 9000)])
def test_the_test_split_shows_each_number_once(digits, count):
    dataset = HandwrittenNumbers("test", size=count, digits=digits)
    assert sorted(dataset[i]["label"] for i in range(count)) == all_captions(digits)[0]
    with pytest.raises(ValueError, match=f"at most {count}"):
        HandwrittenNumbers("test", size=count + 1, digits=digits)


def test_training_numbers_repeat_and_have_no_leading_zero():
    labels = [item["label"] for item in HandwrittenNumbers("train", size=3000, digits=3)]
    assert min(labels) >= 100
    assert max(labels) <= 999
    assert 800 < len(set(labels)) < 900


def test_a_smaller_training_set_is_the_beginning_of_a_larger_one():
    small, large = HandwrittenNumbers("train", size=7), HandwrittenNumbers("train", size=501)
    for index in (6, 0, 3):
        assert small[index]["text"] == large[index]["text"]
        assert torch.equal(small[index]["image"], large[index]["image"])


def test_the_seed_changes_numbers_and_images():
    first, second = HandwrittenNumbers("train", size=50, seed=0), HandwrittenNumbers("train", size=50, seed=1)
    assert (first.numbers != second.numbers).mean() > 0.9
    assert (first.pixels != second.pixels).any(axis=(1, 2)).all()


def test_an_item_has_a_grey_image_its_caption_and_the_number():
    dataset = HandwrittenNumbers("test", size=5, digits=3, image_size=40)
    item = dataset[2]
    assert item["image"].shape == (3, 40, 40)
    assert item["image"].dtype == torch.uint8
    assert torch.equal(item["image"][0], item["image"][2])
    assert item["image"].max() > 200
    assert item["text"] == f"a photo of the number {number_in_words(item['label'])}"
    assert dataset.texts([0, 2])[1] == item["text"]


def test_three_digits_are_centred_and_stand_at_different_heights():
    pixels = HandwrittenNumbers("train", size=200, digits=3).pixels
    assert not pixels[:, :, :4].any()
    assert not pixels[:, :, 28:].any()
    assert pixels.any(axis=(0, 2)).all()


def test_an_image_shows_the_digits_of_its_label_from_left_to_right():
    """Nearest training scan per place reads the number: an oracle that knows nothing of the composition."""
    from sklearn.datasets import load_digits

    data = load_digits()
    dataset = HandwrittenNumbers("test", size=50)
    for index in range(50):
        read = ""
        for place in range(4):
            column = dataset.pixels[index][:, 8 * place : 8 * place + 8]
            scan = column[np.flatnonzero(column.any(axis=1))].astype(float) * (16 / 255)
            read += str(data.target[((data.images - scan) ** 2).sum((1, 2)).argmin()])
        assert int(read) == dataset[index]["label"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "split"),
        ({"digits": 5}, "digits"),
        ({"image_size": 31}, "image_size of at least 32"),
    ],
)
def test_an_argument_out_of_range_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        HandwrittenNumbers(**{"split": "train", "size": 1, **arguments})


@pytest.mark.parametrize("digits", [3, 4])
def test_every_caption_is_tokenised_without_unknown_words_or_cuts(digits):
    tokenizer = numbers_processor().tokenizer
    captions = all_captions(digits)[1]
    rows = tokenizer(captions)["input_ids"]
    assert not any(tokenizer.unk_token_id in row for row in rows)
    assert max(len(row) for row in rows) <= tokenizer.model_max_length
    assert len({tuple(row) for row in rows}) == len(captions)


def test_captions_are_padded_on_the_right_and_end_with_the_end_token():
    tokenizer = numbers_processor().tokenizer
    tokens = tokenizer(["seven", "ninety-nine"], padding=True)
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert [row[0] for row in tokens["input_ids"]] == [start, start]
    assert tokens["input_ids"][0][-3:] == [end, pad, pad]
    assert tokens["input_ids"][1][-1] == end
    assert tokens["attention_mask"] == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("loader", [AutoProcessor, CLIPProcessor])
def test_the_processor_survives_saving(loader, tmp_path):
    processor = numbers_processor()
    processor.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    captions = all_captions()[1][::97]
    images = [HandwrittenNumbers("test", size=1)[0]["image"]]
    before = processor(text=captions, images=images, padding=True, return_tensors="pt")
    after = loaded(text=captions, images=images, padding=True, return_tensors="pt")
    assert set(before) == set(after) == {"input_ids", "attention_mask", "pixel_values"}
    for key in before:
        assert torch.equal(before[key], after[key]), key
    assert loaded.tokenizer.model_max_length == processor.tokenizer.model_max_length
    assert loaded.tokenizer.eos_token_id == processor.tokenizer.eos_token_id


def test_the_text_tower_pools_at_the_end_token():
    """It pools at the highest token id if eos_token_id is 2: then words after the first would not count."""
    processor, config = numbers_processor(), numbers_config()
    text = config.text_config
    tokenizer = processor.tokenizer
    assert text.eos_token_id == tokenizer.eos_token_id != 2
    assert (text.bos_token_id, text.pad_token_id) == (tokenizer.bos_token_id, tokenizer.pad_token_id)
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    tokens = processor(text=["one hundred and three"], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        output = model.text_model(**tokens)
    end = tokens["input_ids"][0].tolist().index(tokenizer.eos_token_id)
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, end])


def test_the_config_makes_a_small_clip_that_takes_what_the_processor_makes():
    torch.manual_seed(0)
    model = CLIPModel(numbers_config(width=32, layers=1, heads=2))
    items = [HandwrittenNumbers("test", size=3)[i] for i in range(3)]
    inputs = numbers_processor()(
        text=[item["text"] for item in items],
        images=[item["image"] for item in items],
        padding=True,
        return_tensors="pt",
    )
    output = model(**inputs)
    assert output.logits_per_image.shape == (3, 3)
    assert output.image_embeds.shape == (3, 32)
