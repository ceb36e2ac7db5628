"""A frozen tower: left out of pass 2, and with `precompute_frozen` run once, before training, from then on read."""

import json
import os
import pickle

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from datasets import Dataset, Image
from PIL import Image as Picture
from transformers import CLIPModel

import gc_accel.data.sources.readers as readers
from gc_accel import CachedContrastiveArguments, CachedContrastiveTrainer, DualEncoder, GradientCache
from gc_accel.data import (
    HandwrittenNumbers,
    ImageTextCollator,
    ImageTextDataset,
    MultiViewDataset,
    OpenClipCollator,
    image_statistics,
    numbers_config,
    numbers_processor,
)
from gc_accel.losses import CLIPLoss
from gc_accel.training.precomputing import precompute
from tests.launching import QUICK, launch, training_log
from tests.models import dual_encoder, image_text_batch, open_clip_vit
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
SMALL = {"width": 16, "layers": 1, "heads": 2}
SIZE = 26


def make_encoder(freeze=("image",), *, seed=0, dropout=0.0):
    """In float64, with what normalises its images."""
    torch.manual_seed(seed)
    config = numbers_config(**SMALL)
    config.text_config.attention_dropout = config.vision_config.attention_dropout = dropout
    mean, std = image_statistics(numbers_processor())
    return DualEncoder(CLIPModel(config).train(), image_mean=mean, image_std=std, freeze=freeze).double()


def counted(encoder):
    """Samples that each tower has encoded from scratch."""
    seen = {"image": 0, "text": 0}

    def count(part, module):
        def hook(module, args, kwargs):
            seen[part] += len(next(iter([*args, *kwargs.values()])))

        module.register_forward_pre_hook(hook, with_kwargs=True)

    count("image", encoder.model.vision_model)
    count("text", encoder.model.text_model)
    return seen


def arguments(folder, **options):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 5,
        "chunk_size": 3,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
    }
    return CachedContrastiveArguments(**(defaults | options))


def trained(folder, *, encoder=None, data=None, collator=None, **options):
    trainer = CachedContrastiveTrainer(
        make_encoder() if encoder is None else encoder,
        arguments(folder, **options),
        train_dataset=HandwrittenNumbers("train", size=SIZE) if data is None else data,
        data_collator=ImageTextCollator(numbers_processor()) if collator is None else collator,
    )
    trainer.train()
    return trainer


def assert_same_training(one, other, tolerance=1e-9):
    """The same weights, which have moved away from where they began; the frozen ones have not."""
    before = make_encoder().state_dict()
    weights, expected = one.encoder.state_dict(), other.encoder.state_dict()
    moved = [name for name in expected if not torch.equal(expected[name], before[name])]
    assert moved
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=tolerance, atol=tolerance, msg=name)
    losses = [[e["loss"] for e in each.state.log_history if "loss" in e] for each in (one, other)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) > 1


def files(folder):
    return sorted(path.name for path in (folder / "precomputed").glob("*"))


# --- the frozen tower in a cached step ---


@pytest.mark.parametrize("frozen", ["image", "text"])
def test_a_frozen_tower_runs_once_a_step(frozen):
    encoder = dual_encoder("clip", freeze=(frozen,))
    seen = counted(encoder)
    GradientCache(encoder, CLIPLoss(), 3, retain=0).forward_backward(image_text_batch(11))
    other = "text" if frozen == "image" else "image"
    assert seen == {frozen: 11, other: 22}


def test_representations_that_are_given_are_handed_over():
    encoder = make_encoder()
    seen = counted(encoder)
    reps = torch.nn.functional.normalize(torch.randn(4, 16).double(), dim=-1)
    outputs = encoder(image={"image_embeds": reps}, text={"text_embeds": reps.flip(0)})
    assert torch.equal(outputs["image"], reps)
    assert torch.equal(outputs["text"], reps.flip(0))
    assert seen == {"image": 0, "text": 0}


# --- trained from disk ---


@pytest.mark.parametrize("options", [{}, {"dataloader_num_workers": 1}])
def test_training_from_disk_equals_training_from_images(tmp_path, options):
    """With dropout in the text tower, so that the generators count too."""
    with_images = trained(tmp_path / "a", encoder=make_encoder(dropout=0.2), **options)
    encoder = make_encoder(dropout=0.2)
    seen = counted(encoder)
    from_disk = trained(tmp_path / "b", encoder=encoder, precompute_frozen=True, **options)
    assert_same_training(from_disk, with_images)
    assert seen["image"] == SIZE + 1, "every image once, and one to see the width"
    assert files(tmp_path / "b")[0].startswith("image-")


def test_a_tower_that_is_frozen_later_is_encoded_without_dropout(tmp_path):
    encoder = make_encoder(freeze=(), dropout=0.5).train()
    for parameter in encoder.tower("image").values():
        parameter.requires_grad_(False)
    modes = [module.training for module in encoder.modules()]
    assert encoder.model.vision_model.training, "dropout is active"
    data, collator = HandwrittenNumbers("train", size=7), ImageTextCollator(numbers_processor())
    one, other = (
        precompute(
            encoder, data, collator, tmp_path / name, accelerator=Accelerator(cpu=True), progress=False
        )
        for name in "ab"
    )
    assert [module.training for module in encoder.modules()] == modes
    expected = encoder.eval()(image={"pixel_values": collator([data[0]])["pixel_values"]})["image"][0]
    assert torch.allclose(one[0]["image_embeds"], expected)
    assert all(torch.equal(one[i]["image_embeds"], other[i]["image_embeds"]) for i in range(7))


def test_a_frozen_text_tower_likewise(tmp_path):
    expected = trained(tmp_path / "a", encoder=make_encoder(freeze=("text",)))
    encoder = make_encoder(freeze=("text",))
    seen = counted(encoder)
    found = trained(tmp_path / "b", encoder=encoder, precompute_frozen=True)
    assert_same_training(found, expected)
    assert seen["text"] == SIZE + 1 + 3, "three more before, to see whether it notices padding"


def picture_rows(folder, *, size=SIZE, lists=False):
    """Rows of image files and captions, one of them unreadable."""
    folder.mkdir(exist_ok=True)
    numbers, rows = HandwrittenNumbers("train", size=size), []
    for i in range(size):
        Picture.fromarray(numbers[i]["image"].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        text = numbers[i]["text"]
        rows.append({"image": str(folder / f"{i}.png"), "text": [text, "a number", text] if lists else text})
    return rows


def pictures(folder, *, decoded=False, bad=None, **options):
    rows = Dataset.from_list(picture_rows(folder, **options))
    if bad is not None:
        (folder / f"{bad}.png").write_bytes(b"no image")
    if decoded:
        rows = rows.cast_column("image", Image())
    return ImageTextDataset(rows, on_bad_image="error" if bad is None else "skip", seed=3)


@pytest.mark.parametrize("form", [{}, {"decoded": True}, {"bad": 7}, {"lists": True}], ids=str)
def test_images_are_opened_once_in_all(tmp_path, monkeypatch, form):
    """Captions may be drawn anew in each epoch, an unreadable image is left out of both."""
    opened = []
    original = readers.read_image
    monkeypatch.setattr(readers, "read_image", lambda *args: opened.append(1) or original(*args))
    expected = trained(tmp_path / "a", data=pictures(tmp_path / "images", **form))
    assert len(opened) == 48, "two epochs of three batches of eight"
    opened.clear()
    found = trained(tmp_path / "b", data=pictures(tmp_path / "images", **form), precompute_frozen=True)
    assert len(opened) == SIZE + 1
    assert_same_training(found, expected)
    opened.clear()
    trained(tmp_path / "b", data=pictures(tmp_path / "images", **form), precompute_frozen=True)
    # Images were written again, with other times: encoded again.
    assert len(opened) == SIZE + 1
    assert len(files(tmp_path / "b")) == 2


def test_bytes_of_images_are_not_even_read(tmp_path):
    data = pictures(tmp_path / "images")
    rest = data.without("image")
    assert rest._rows.column_names == ["text"]
    assert rest[4] == {"text": data[4]["text"]}
    assert data.without("text")[4].keys() == {"image"}


def test_models_of_open_clip_are_precomputed_too(tmp_path):
    def run(folder, **options):
        torch.manual_seed(0)
        model = open_clip_vit().double()
        open_clip.model.set_model_preprocess_cfg(model, {"size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3})
        collator = OpenClipCollator(model.visual.preprocess_cfg, word_lengths)
        statistics = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
        encoder = DualEncoder(model, **statistics, freeze=("image",)).double()
        return trained(folder, encoder=encoder, collator=collator, **options)

    found, expected = run(tmp_path / "a", precompute_frozen=True), run(tmp_path / "b")
    for name, value in expected.encoder.state_dict().items():
        torch.testing.assert_close(found.encoder.state_dict()[name], value, rtol=1e-9, atol=1e-9)
    assert len(files(tmp_path / "a")) == 1


def word_lengths(texts):
    return torch.tensor([[len(word) for word in (text + " x" * 8).split()[:8]] for text in texts])


# --- the file ---


def compute(folder, encoder=None, data=None, collator=None, **options):
    return precompute(
        make_encoder() if encoder is None else encoder,
        HandwrittenNumbers("train", size=SIZE) if data is None else data,
        ImageTextCollator(numbers_processor()) if collator is None else collator,
        folder / "precomputed",
        accelerator=Accelerator(cpu=True, **options),
        batch_size=4,
        progress=False,
    )


def test_what_is_on_disk_is_taken(tmp_path):
    encoder = make_encoder()
    seen = counted(encoder)
    first = compute(tmp_path, encoder)
    assert seen["image"] == SIZE + 1
    second = compute(tmp_path, encoder)
    assert seen["image"] == SIZE + 1
    data, collator = HandwrittenNumbers("train", size=SIZE), ImageTextCollator(numbers_processor())
    seen["image"] = 0
    compute(tmp_path, encoder, data=second)  # of a data set that has been precomputed before
    assert seen["image"] == 0
    with torch.no_grad():
        pixels = collator([data[i] for i in range(SIZE)])["pixel_values"]
        expected = encoder(image={"pixel_values": pixels})["image"]
    for dataset in (first, second):
        found = torch.stack([dataset[i]["image_embeds"] for i in range(SIZE)])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert dataset[3].keys() == {"image_embeds", "text", "label"}


def test_text_of_another_seed_and_trained_weights_leave_it_valid(tmp_path):
    compute(tmp_path)
    encoder = make_encoder()
    encoder.model.text_projection.weight.data.add_(1)
    encoder.model.logit_scale.data.add_(1)
    compute(tmp_path, encoder)
    assert len(files(tmp_path)) == 1


def changed(what):
    """A run that differs from the first in one thing."""
    encoder, collator = make_encoder(), ImageTextCollator(numbers_processor())
    data = HandwrittenNumbers("train", size=SIZE)
    if what == "weights":
        encoder.model.vision_model.post_layernorm.bias.data[0] += 1e-6
    elif what == "configuration":
        encoder.config.vision_config.hidden_act = "relu"
    elif what == "normalisation":
        encoder.normalise.mean += 0.1
    elif what == "data":
        data.pixels[5, 0, 0] ^= 1
    elif what == "size":
        data = HandwrittenNumbers("train", size=SIZE + 1)
    elif what == "collator":
        collator.image_processor.resample = 0
    return {"encoder": encoder, "collator": collator, "data": data}


@pytest.mark.parametrize("what", ["weights", "configuration", "normalisation", "data", "size", "collator"])
def test_what_is_on_disk_of_something_else_is_not_taken(tmp_path, what):
    compute(tmp_path)
    compute(tmp_path, **changed("nothing"))
    assert len(files(tmp_path)) == 1
    dataset = compute(tmp_path, **changed(what))
    assert len(files(tmp_path)) == 2
    assert len(dataset) == len(changed(what)["data"])


def test_the_fingerprint_of_a_text_tower_knows_its_tokenizer(tmp_path):
    encoder = make_encoder(freeze=("text",))
    compute(tmp_path, encoder)
    compute(tmp_path, encoder, collator=ImageTextCollator(numbers_processor(), max_length=9))
    assert len(files(tmp_path)) == 2


def test_half_a_file_never_stays(tmp_path, monkeypatch):
    encoder = make_encoder()
    calls = []

    def fail(module, args, kwargs):
        calls.append(1)
        if len(calls) == 4:
            assert files(tmp_path)[0].endswith(".partial")
            raise RuntimeError("out of power")

    handle = encoder.model.vision_model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="out of power"):
        compute(tmp_path, encoder)
    assert files(tmp_path) == []
    (tmp_path / "precomputed" / "image-0123.partial").write_bytes(b"of a run that was killed")
    handle.remove()
    assert len(compute(tmp_path, encoder)) == SIZE
    assert [name[-4:] for name in files(tmp_path)] == [".npy"]


def test_rows_are_not_sent_to_workers(tmp_path):
    dataset = compute(tmp_path, data=HandwrittenNumbers("train", size=2000))
    dataset[0]
    embeds = 2000 * 16 * 8
    assert os.path.getsize(dataset.path) > embeds
    dataset.dataset.pixels = dataset._rest.pixels = None
    assert len(pickle.dumps(dataset)) < embeds / 5


class TestRefused:
    def test_no_frozen_tower(self, tmp_path):
        with pytest.raises(ValueError, match=r"one frozen tower of several to precompute, got \[\]"):
            trained(tmp_path, encoder=make_encoder(freeze=()), precompute_frozen=True)

    def test_data_that_are_drawn_anew(self, tmp_path):
        views = MultiViewDataset(HandwrittenNumbers("train", size=SIZE), lambda image: image[None])
        with pytest.raises(ValueError, match=r"the same in every epoch.*got MultiViewDataset"):
            compute(tmp_path, data=views)
        with pytest.raises(ValueError, match=r"a text for every row.*got lists in 'text'"):
            compute(tmp_path, make_encoder(freeze=("text",)), data=pictures(tmp_path / "images", lists=True))

    def test_a_stream(self, tmp_path):
        rows = Dataset.from_list(picture_rows(tmp_path / "images")).to_iterable_dataset()
        with pytest.raises(ValueError, match="got a stream"):
            compute(tmp_path, data=ImageTextDataset(rows))

    def test_representations_that_are_not_finite(self, tmp_path):
        encoder = make_encoder()
        encoder.model.visual_projection.weight.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="expected finite representations of the frozen image tower"):
            compute(tmp_path, encoder)
        assert files(tmp_path) == []


# --- two ranks ---


def rank_rows(rank, folder):
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": dist.get_world_size()}
    os.environ.update(
        {name: str(value) for name, value in ranks.items()}, MASTER_ADDR="localhost", MASTER_PORT="0"
    )
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == dist.get_world_size() == 2
    encoder = make_encoder()
    seen = counted(encoder)
    data = HandwrittenNumbers("train", size=SIZE - 1)
    options = {"accelerator": accelerator, "batch_size": 4, "progress": False}
    dataset = precompute(encoder, data, ImageTextCollator(numbers_processor()), folder, **options)
    return seen["image"], torch.stack([dataset[i]["image_embeds"] for i in range(len(dataset))])


@pytest.mark.slow
def test_ranks_encode_a_share_each(tmp_path):
    results = run_on_ranks(rank_rows, 2, tmp_path, tmp_path / "precomputed")
    assert [seen for seen, _ in results] == [12 + 1, 13 + 1]
    expected = compute(tmp_path / "alone", data=HandwrittenNumbers("train", size=SIZE - 1))
    for _, rows in results:
        for index in range(SIZE - 1):
            torch.testing.assert_close(rows[index], expected[index]["image_embeds"], rtol=1e-12, atol=1e-12)
    assert files(tmp_path) == files(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu.yaml", "ddp_cpu.yaml"])
def test_the_example_trains_from_disk(tmp_path, config):
    sizes = [
        "--train_size",
        "96",
        "--eval_size",
        "20",
        "--per_device_train_batch_size",
        "8",
        "--chunk_size",
        "4",
    ]
    options = [*sizes, "--freeze", "image", *QUICK]
    launch("clip_train.py", "--output_dir", tmp_path / "a", *options, config=config)
    launch("clip_train.py", "--output_dir", tmp_path / "b", *options, "--precompute_frozen", config=config)
    losses = [[entry["loss"] for entry in training_log(tmp_path / name)] for name in "ab"]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert len(losses[0]) > 3
    assert len(files(tmp_path / "b")) == 1
    assert json.loads((tmp_path / "b" / "all_results.json").read_text())["eval_loss"] > 0
