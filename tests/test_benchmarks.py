"""Every contender of the benchmarks makes the gradient that it stands for, and every table prints."""

import sys
from functools import partial

import pytest
import torch

from benchmarks import batch_memory, captions, contenders, measuring, overhead, peers, retaining
from benchmarks.clips import CONTEXT, END, TINY, caption_lengths
from benchmarks.clips import captions as captions_of
from gc_accel.inputs.nested import split
from gc_accel.losses import dense

SIZE, CHUNK = 12, 4
LENGTHS = [3, 9, 5, 7, 4, 12, 6, 3, 8, 5, 10, 4]
EXACT = ["direct", "direct, in chunks", "gc_accel, retain=0", "gc_accel"]
PEERS = {
    "GradCache 0.0.1": "gradcache",
    "sentence-transformers": "sentence_transformers",
    "open_clip, accum-freq": "open_clip_train",
}


@pytest.fixture
def double():
    """Models and batches of the benchmarks in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def errors_of(name, dropout=0.0):
    """Errors of towers and logit scale of a contender, against the reference of its own first pass."""
    if name in PEERS:
        pytest.importorskip(PEERS[name])
    encoder, batch = TINY.encoder(dropout), TINY.batch(LENGTHS)
    step = partial(peers.CONTENDERS[name](encoder, CHUNK), batch)
    return measuring.gradient_errors(step, encoder, batch, dense.clip_loss)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", [*EXACT, "GradCache 0.0.1", "sentence-transformers"])
def test_has_the_gradient_of_its_first_pass_in_one_graph(name, dropout):
    towers, scale = errors_of(name, dropout)
    assert towers < 1e-9
    assert scale < 1e-9


@pytest.mark.usefixtures("double")
def test_accum_freq_is_exact_without_dropout_but_for_the_logit_scale():
    """Its gradient is added once for every chunk."""
    towers, scale = errors_of("open_clip, accum-freq")
    assert towers < 1e-9
    assert scale == pytest.approx(SIZE / CHUNK - 1)


@pytest.mark.usefixtures("double")
def test_accum_freq_does_not_replay_dropout():
    assert errors_of("open_clip, accum-freq", 0.5)[0] > 0.1


@pytest.mark.usefixtures("double")
def test_accumulation_is_the_mean_over_chunks_and_another_objective():
    encoder, batch = TINY.encoder(), TINY.batch(LENGTHS)
    contenders.accumulation(encoder, CHUNK)(batch)
    found, _ = measuring.gradients(encoder)
    encoder.zero_grad()
    for chunk in split(batch, CHUNK):
        contenders.direct(encoder, CHUNK)(chunk)
    whole, _ = measuring.gradients(encoder)
    assert measuring.error(found, whole / (SIZE / CHUNK)) < 1e-9
    assert errors_of("plain accumulation (another objective)")[0] > 0.1


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("freeze", [(), ("image",)])
@pytest.mark.parametrize("name", captions.CONTENDERS)
def test_captions_of_any_length_have_the_gradient_of_the_direct_step(name, freeze):
    for peer, module in PEERS.items():
        if name.startswith(peer):
            pytest.importorskip(module)
    encoder, batch = (captions.text_alone if freeze else captions.whole)(TINY, LENGTHS)
    found = []
    for make in (contenders.direct, captions.CONTENDERS[name]):
        encoder.zero_grad()
        make(encoder, CHUNK)(batch)
        found.append(measuring.gradients(encoder))
    (expected, scale), (towers, own) = found
    assert float(expected.norm()) > 1e-3
    assert measuring.error(towers, expected) < 1e-9
    assert measuring.error(own, scale) < 1e-9


def test_captions_have_the_lengths_they_should():
    lengths = caption_lengths(20000)
    assert sum(lengths) / len(lengths) == pytest.approx(14, abs=0.2), "twelve, start and end"
    assert min(lengths) >= 3
    assert max(lengths) <= CONTEXT
    batch = captions_of(LENGTHS)
    assert batch["attention_mask"].sum(1).tolist() == LENGTHS
    assert (batch["input_ids"] == END).long().argmax(1).tolist() == [length - 1 for length in LENGTHS]


def test_tokens_are_counted_with_their_padding():
    assert captions.tokens([5, 2, 3, 4], 2) == (14, 2 * 3 + 2 * 5, 2 * 5 + 2 * 4, 4 * 5)


@pytest.mark.parametrize(
    ("program", "options", "expected"),
    [
        (peers, "--batches 12 --chunks 4 --rounds 1", ["| gc_accel |", "1.66667 + 2"]),
        (overhead, "--batches 12 --chunks 4 --rounds 2", ["| 12 | 4 | gc_accel |"]),
        (
            retaining,
            "--batch 12 --chunks 4 --sweep_batch 12 --sweep_chunks 4 --rounds 2 2",
            ["gc_accel, retain=1"],
        ),
        (captions, "--batch 12 --chunks 4 --rounds 2", ["| gc_accel |"]),
    ],
)
def test_prints_its_table(program, options, expected, monkeypatch, capsys, tmp_path):
    for module in PEERS.values():
        pytest.importorskip(module)
    figure = tmp_path / "figure.png"
    drawn = ["--figure", str(figure)] if program in (retaining, captions) else []
    monkeypatch.setattr(program, "settle", lambda: None)
    monkeypatch.setattr(sys, "argv", ["program", "--tiny", *options.split(), *drawn])
    program.main()
    printed = capsys.readouterr().out
    assert all(each in printed for each in expected), printed
    assert not drawn or figure.stat().st_size > 1000


def test_memory_of_a_step_in_the_chunks_of_a_batch_is_below_that_of_the_batch():
    (_, chunks), (_, whole) = (batch_memory.measure(name, 512) for name in ("gc_accel", "direct"))
    assert 0 < chunks < whole / 4


def test_a_peer_that_is_not_installed_is_named_with_the_remedy():
    with pytest.raises(SystemExit, match=r"no_such_peer.*gc-accel\[bench\]"):
        contenders.needed("no_such_peer")
