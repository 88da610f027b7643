"""The trainer of language models: batches, checkpoints, kill -9, resuming, twins, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner  # noqa: E402

from lutra.examples._models import ARCHITECTURES, build  # noqa: E402
from lutra.examples._run import Run, draw  # noqa: E402
from lutra.examples._text import Corpus  # noqa: E402
from lutra.examples._training import Settings, Trainer  # noqa: E402
from lutra.examples.train_lm import app  # noqa: E402

TINY = Settings(
    dim=16, layers=2, heads=2, bits=4, ffn_bits=5, context=16, batch=4, steps=8, warmup=2, eval_every=4,
    eval_windows=4,
)  # fmt: skip
OPTIONS = [
    "--dim", "16", "--layers", "2", "--heads", "2", "--bits", "4", "--ffn-bits", "5", "--context", "16",
    "--batch", "4", "--warmup", "2", "--eval-every", "4", "--eval-windows", "4", "--sample", "5",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"".join(b"%d bottles of beer on the wall, \xc3\xa9\n" % (i % 13) for i in range(300)))
    return path


def settings(text: Path, **options) -> Settings:
    return replace(TINY, data=str(text), **options)


def same(a, b) -> None:
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))  # NaN equals NaN here


# ---------------------------------------------------------------- the text
def test_batches_depend_on_seed_and_step_alone(text):
    corpus = Corpus(text, "byte", 256, 16)
    a = corpus.batch(3, 5, 4)
    same(a, Corpus(text, "byte", 256, 16).batch(3, 5, 4))
    assert a.shape == (4, 17) and a.dtype == np.int64
    assert (a != corpus.batch(3, 6, 4)).any() and (a != corpus.batch(4, 5, 4)).any()
    raw = text.read_bytes()[: len(corpus.train)]
    assert all(bytes(row.tolist()) in raw for row in a)  # nothing of the held-out part


def test_evaluation_windows_are_of_the_held_out_part(text):
    corpus = Corpus(text, "byte", 256, 16)
    raw = text.read_bytes()
    windows = corpus.evaluation(7)
    assert len(windows) == 7 and len(corpus.train) + len(corpus.held_out) == len(raw)
    assert all(bytes(row.tolist()) in raw[len(corpus.train) :] for row in windows)
    assert len(corpus.evaluation(10**6)) == (len(corpus.held_out) - 1) // 16


def test_byte_pairs_come_back_as_text_and_are_kept(text, tmp_path):
    pytest.importorskip("tokenizers")
    kept = tmp_path / "tokenizer.json"
    first = Corpus(text, "bpe", 300, 16, kept)
    assert 256 < first.vocab_size <= 300 and first.tokens_per_byte < 0.5
    same(first.train, Corpus(text, "bpe", 999, 16, kept).train)  # the kept one is used
    everything = [*first.train.tolist(), *first.held_out.tolist()]
    assert first.decode(everything) == text.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "tokens", "message"),
    [
        (b"", "byte", "is empty"),
        (b"short", "byte", r"training part .* has 5 tokens; one window takes context \+ 1 = 17"),
        (b"x" * 60, "byte", "held-out part"),
        (b"\xff\xfe" * 300, "bpe", "not UTF-8"),
    ],
)
def test_texts_that_cannot_be_used(tmp_path, content, tokens, message):
    if tokens == "bpe":
        pytest.importorskip("tokenizers")
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Corpus(path, tokens, 300, 16)


# ---------------------------------------------------------------- models
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_architecture_learns_and_generates_as_it_computes(text, arch):
    trainer = Trainer(settings(text, arch=arch, steps=12, lr=1e-2))
    losses = trainer.train()
    assert losses[-1][1] < losses[0][1] - 0.3  # a text of 13 lines is learnt quickly
    assert len(trainer.sample(6).encode()) >= 1
    model = trainer.model.eval()
    ids = trainer.held_out[:1, :7]
    with torch.no_grad():
        step = model.generate(ids, 3, temperature=0)  # through the cache of keys and values
        for at in range(7, 10):
            assert int(model(step[:, :at])[0, -1].argmax()) == int(step[0, at])


def test_twins_differ_in_their_blocks_only():
    shapes = [
        {n: tuple(p.shape) for n, p in build(a, 50, dim=16, layers=2, heads=2, bits=4).named_parameters()}
        for a in ARCHITECTURES
    ]
    around = [{n: s for n, s in names.items() if not n.startswith("blocks.")} for names in shapes]
    assert all(names == around[0] for names in around)
    with pytest.raises(ValueError, match="arch must be one of"):
        build("sparse", 50, dim=16, layers=2, heads=2)


# ---------------------------------------------------------------- checkpoints
def test_a_resumed_run_is_the_run_that_never_stopped(text, tmp_path):
    whole = Trainer(settings(text)).train()
    run = Run(tmp_path / "run")
    run.start(asdict(settings(text)))
    first = Trainer(settings(text), run)
    for _ in range(5):
        first.losses.append([first.step + 1, first.one_step(), float("nan")])
    first.losses[3][2] = whole[3][2]
    first.save()
    torch.manual_seed(123)  # nothing may lean on the state that happens to be there
    second = Trainer(settings(text), run)
    assert second.resume() == 5
    same(second.train(), whole)
    same(run.losses(), whole)


def test_a_run_that_is_killed_goes_on(text, tmp_path):
    """kill -9 while it writes checkpoints after every step; then --resume; the losses are those of one go."""
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "lutra.examples.train_lm", "--data", str(text), "--out", str(out), *OPTIONS,
        "--steps", "400", "--checkpoint-every", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    checkpoint, began = out / "checkpoint.safetensors", time.monotonic()
    while not checkpoint.exists() and process.poll() is None and time.monotonic() - began < 60:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    process.stderr.close()
    at = len(Run(out).losses())  # a whole file, whenever it was
    assert 1 <= at < 400
    (out / "config.json").write_text(
        json.dumps({**json.loads((out / "config.json").read_text()), "steps": at + 4})
    )
    done = CliRunner().invoke(app, ["--out", str(out), "--resume", "--sample", "0"])
    assert done.exit_code == 0, done.output
    assert len(Run(out).losses()) == at + 4


def test_damaged_and_foreign_checkpoints(text, tmp_path):
    run = Run(tmp_path / "run")
    run.start(asdict(settings(text)))
    trainer = Trainer(settings(text), run)
    trainer.one_step()
    trainer.save()
    good = run.checkpoint.read_bytes()
    run.checkpoint.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="damaged"):
        Trainer(settings(text), run).resume()
    run.checkpoint.write_bytes(good)
    with pytest.raises(ValueError, match="does not fit the model"):
        Trainer(settings(text, layers=1), run).resume()
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3)}, run.checkpoint)
    with pytest.raises(ValueError, match="no checkpoint of train_lm"):
        Trainer(settings(text), run).resume()


def test_a_loss_that_is_no_number_stops_before_it_is_stored(text, tmp_path):
    run = Run(tmp_path / "run")
    run.start(asdict(settings(text)))
    trainer = Trainer(settings(text), run)
    with torch.no_grad():
        trainer.model.head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower --lr"):
        trainer.train(checkpoint_every=1)
    assert not run.checkpoint.exists()


# ---------------------------------------------------------------- the command
def test_command_trains_plots_and_compares(text, tmp_path):
    pytest.importorskip("matplotlib")
    runner = CliRunner()
    for arch, more in (("dense", []), ("memoryformer", ["--compare", str(tmp_path / "dense")])):
        arguments = ["--data", str(text), "--arch", arch, "--out", str(tmp_path / arch), *OPTIONS]
        done = runner.invoke(app, [*arguments, "--steps", "4", "--precision", "bfloat16", *more])
        assert done.exit_code == 0, done.output
        assert "held-out loss" in done.output
    png = (tmp_path / "memoryformer" / "losses.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the text"),
        (["--data", "TEXT", "--arch", "sparse"], "--arch must be one of"),
        (["--data", "TEXT", "--tokens", "word"], "--tokens must be one of"),
        (["--data", "TEXT", "--steps", "0"], "steps must be at least 1"),
        (["--data", "TEXT", "--dim", "20", "--bits", "8", "--heads", "2"], "multiple of"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--resume"], "holds no run"),
    ],
)
def test_command_errors_leave_no_run(text, tmp_path, arguments, message):
    arguments = [str(text) if a == "TEXT" else a for a in arguments]
    done = CliRunner().invoke(app, ["--out", str(tmp_path / "run"), *arguments])
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_a_finished_run_is_not_overwritten(text, tmp_path):
    arguments = [
        "--data",
        str(text),
        "--arch",
        "dense",
        "--out",
        str(tmp_path / "run"),
        *OPTIONS,
        "--steps",
        "1",
    ]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and "--resume" in done.output
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


def test_plot_of_a_run_without_held_out_losses(tmp_path):
    pytest.importorskip("matplotlib")
    draw(tmp_path / "p.png", {"a": [[1, 2.0, float("nan")]], "b": []})
    assert (tmp_path / "p.png").stat().st_size > 1000
