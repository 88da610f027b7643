"""compress_file, decompress_file, the report, and their commands. No torch is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lutra
from lutra.compress import _checkpoint, _choose, _compress_file
from lutra.compress.formats import FORMATS

ROWS, DIM = 1100, 16


@pytest.fixture
def checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((ROWS, DIM), dtype=np.float32)
    tensors = {
        "model.embed_tokens.weight": table,
        "model.embed_positions.weight": rng.standard_normal((2048, DIM), dtype=np.float32),
        "lm_head.weight": rng.standard_normal((ROWS, DIM), dtype=np.float32),
        "model.layers.0.up_proj.weight": rng.standard_normal((1200, DIM)).astype(np.float16),
        "model.norm.weight": np.ones(DIM, np.float32),
        "steps": np.array(7, np.int64),
        "mask": np.array([True, False, True]),
        "empty": np.zeros((0, 3), np.float32),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"format": "pt", "note": "x"})
    return path, tensors


def metadata(path):
    with safe_open(path, "np") as file:
        return file.metadata()


@pytest.mark.parametrize("name", sorted(n for n, f in FORMATS.items() if not f.slow))
def test_there_and_back_in_every_format(checkpoint, tmp_path, name):
    path, tensors = checkpoint
    small, dense = tmp_path / "small.safetensors", tmp_path / "dense.safetensors"
    limit = int(0.6 * ROWS * DIM * 4)
    fits = _choose.fits(_choose.Job("t", tensors["model.embed_tokens.weight"]), [FORMATS[name]], limit)
    if not fits:
        pytest.skip("does not store such a table in 60 %")
    report = lutra.compress.compress_file(path, small, fits[0])
    assert [e.module for e in report.tables] == ["model.embed_tokens.weight"]
    stored = load_file(small)
    assert set(tensors) - {"model.embed_tokens.weight"} <= set(stored)
    arrays = fits[0].arrays((ROWS, DIM))
    sizes = sum(stored[f"model.embed_tokens.{k}"].nbytes for k in arrays)
    assert sizes == report.after <= limit
    assert lutra.compress.decompress_file(small, dense) == ["model.embed_tokens.weight"]
    back = load_file(dense)
    assert set(back) == set(tensors) and metadata(dense) == {"format": "pt", "note": "x"}
    for key, want in tensors.items():
        if key != "model.embed_tokens.weight":
            assert back[key].dtype == want.dtype and np.array_equal(back[key], want)
    table = lutra.compress.Table(fits[0], (ROWS, DIM), {k: stored[f"model.embed_tokens.{k}"] for k in arrays})
    got = back["model.embed_tokens.weight"]
    assert np.array_equal(got, np.asarray(table.decode(), np.float32))
    lost = np.linalg.norm(got - tensors["model.embed_tokens.weight"])
    error = lost / np.linalg.norm(tensors["model.embed_tokens.weight"])
    assert report.tables[0].error == pytest.approx(error, rel=1e-3, abs=1e-6)


def test_budget(checkpoint, tmp_path):
    path, _ = checkpoint
    small = tmp_path / "small.safetensors"
    report = lutra.compress.compress_file(path, small, budget="20%")
    assert report.after <= 0.2 * report.before and len(report.tried) > 1
    assert report.tables[0].error == min(e.error for e in report.tried if not e.note)
    with pytest.raises(ValueError, match="smallest that can be met"):
        lutra.compress.compress_file(path, tmp_path / "no", budget=10)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
def test_types(tmp_path, dtype):
    values = np.random.default_rng(0).standard_normal((1000, 8), dtype=np.float32)
    out = _checkpoint.Out.array("wte.weight", values, dtype)
    _checkpoint.write(tmp_path / "a", [out], {})
    lutra.compress.compress_file(tmp_path / "a", tmp_path / "b", "low_rank", rank=8)
    lutra.compress.decompress_file(tmp_path / "b", tmp_path / "c")
    before = _checkpoint.Checkpoint(tmp_path / "a").tensors["wte.weight"]
    small = _checkpoint.Checkpoint(tmp_path / "b").tensors
    after = _checkpoint.Checkpoint(tmp_path / "c").tensors["wte.weight"]
    assert before.dtype == after.dtype == small["wte.factor"].dtype == dtype
    np.testing.assert_allclose(after.values(), before.values(), atol=0.05 if dtype == "BF16" else 5e-3)


def test_bfloat16_is_rounded_to_even():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.concatenate([
        np.random.default_rng(0).standard_normal(1000, dtype=np.float32),
        np.array([0, -0.0, 1, 1.00390625, 1.01171875, 3e38, 1e-40], np.float32),
    ])  # fmt: skip
    assert np.array_equal(_choose.round_to(x, "bfloat16"), x.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_tied_head_that_was_saved_too(checkpoint, tmp_path):
    _, tensors = checkpoint
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "tied")
    lutra.compress.compress_file(tmp_path / "tied", tmp_path / "small", "low_rank", rank=4)
    assert "lm_head.weight" not in load_file(tmp_path / "small")
    lutra.compress.decompress_file(tmp_path / "small", tmp_path / "dense")
    back = load_file(tmp_path / "dense")
    assert np.array_equal(back["lm_head.weight"], back["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "name, found",
    [
        ("transformer.wte.weight", True), ("transformer.wpe.weight", False), ("shared.weight", True),
        ("bert.embeddings.word_embeddings.weight", True),
        ("bert.embeddings.position_embeddings.weight", False),
        ("bert.embeddings.token_type_embeddings.weight", False), ("gpt_neox.embed_in.weight", True),
        ("embed_out.weight", False), ("lm_head.weight", False), ("emb_l.3.weight", True), ("embedding", True),
        ("model.layers.0.mlp.up_proj.weight", False), ("embeddings.projection.weight", False),
        ("model.decoder.embed_tokens.weight", True), ("model.embed_positions.weight", False),
    ],
)  # fmt: skip
def test_names_of_tables(name, found):
    stored = _checkpoint.Stored(name, "F32", (5000, 8), "", 0, 0)
    assert bool(_compress_file.find_tables({name: stored}, 1000)) == found


def test_errors(checkpoint, tmp_path):
    path, tensors = checkpoint
    out = tmp_path / "out"

    def refuses(error, message, *args, **kwargs):
        with pytest.raises(error, match=message):
            lutra.compress.compress_file(*args, **kwargs)
        assert not out.exists() and not list(tmp_path.glob(".lutra-*"))

    refuses(ValueError, "is the input", path, path, "low_rank")
    link = tmp_path / "link"
    link.symlink_to(path)
    refuses(ValueError, "is the input", path, link, "low_rank")
    assert np.array_equal(load_file(path)["lm_head.weight"], tensors["lm_head.weight"])
    refuses(ValueError, "give a format or a budget", path, out)
    refuses(ValueError, "has no tensor 'x'", path, out, "low_rank", tensors=["x"])
    refuses(ValueError, "F32 \\(16,\\); a table", path, out, "low_rank", tensors=["model.norm.weight"])
    refuses(ValueError, "looks like a table", path, out, "low_rank", min_rows=5000)
    refuses(FileNotFoundError, "no file or folder", tmp_path / "none", out, "low_rank")
    refuses(FileNotFoundError, "no folder", path, tmp_path / "a" / "b", "low_rank")
    refuses(ValueError, "is a folder", path, tmp_path, "low_rank")
    bad = tmp_path / "bad"
    bad.write_bytes(path.read_bytes()[:-9])
    refuses(ValueError, "damaged or no safetensors", bad, out, "low_rank")
    tensors["model.embed_tokens.weight"][5, 1] = np.inf
    save_file(tensors, bad)
    refuses(ValueError, r"model\.embed_tokens\.weight: row 5 holds NaN or infinity", bad, out, "low_rank")
    tensors["model.embed_tokens.weight"][5, 1] = 0
    save_file({**tensors, "model.embed_tokens.basis": np.ones(1)}, bad)
    refuses(ValueError, "name of another tensor", bad, out, "low_rank", rank=4)
    lutra.compress.compress_file(path, tmp_path / "small", "low_rank", rank=4)
    refuses(ValueError, "compressed already", tmp_path / "small", out, "low_rank")
    with pytest.raises(ValueError, match="holds no tables"):
        lutra.compress.decompress_file(path, out)
    stored = load_file(tmp_path / "small")
    del stored["model.embed_tokens.basis"]
    save_file(stored, bad, metadata(tmp_path / "small"))
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.basis is missing"):
        lutra.compress.decompress_file(bad, out)
    save_file(stored, bad, {"lutra.compress": "{"})
    with pytest.raises(ValueError, match="cannot be read"):
        lutra.compress.decompress_file(bad, out)
    assert not out.exists()


def test_a_failure_while_writing_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    path, _ = checkpoint
    out = tmp_path / "out"
    out.write_bytes(b"older")
    monkeypatch.setattr(os, "fsync", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lutra.compress.compress_file(path, out, "low_rank", rank=4)
    assert out.read_bytes() == b"older" and not list(tmp_path.glob(".lutra-*"))


def test_shards_of_a_folder(checkpoint, tmp_path):
    _, tensors = checkpoint
    folder = tmp_path / "hf"
    folder.mkdir()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, folder / file)
    index = {"weight_map": {k: f for f, keys in parts.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    lutra.compress.compress_file(folder, tmp_path / "small", "low_rank", rank=4)
    made = sorted(p.name for p in (tmp_path / "small").iterdir())
    assert made == ["config.json", "model.safetensors", "tokenizer.json"]
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"]["tables"] == {
        "model.embed_tokens": {"format": "low_rank", "rank": 4}
    }
    lutra.compress.decompress_file(tmp_path / "small", tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert set(load_file(tmp_path / "dense" / "model.safetensors")) == set(tensors)
    with pytest.raises(ValueError, match="there already"):
        lutra.compress.compress_file(folder, tmp_path / "small", "low_rank")
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names b\.safetensors"):
        lutra.compress.compress_file(folder, tmp_path / "other", "low_rank")


# ---------------------------------------------------------------- with torch
def test_the_file_of_a_model_is_loaded_into_it(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save

    model = torch.nn.Sequential(torch.nn.Embedding(1000, 8, padding_idx=3), torch.nn.Linear(8, 2))
    save({k.replace("0.", "emb."): v for k, v in model.state_dict().items()}, tmp_path / "m")
    lutra.compress.compress_file(tmp_path / "m", tmp_path / "s", budget="40%")

    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = torch.nn.Embedding(1000, 8, padding_idx=3)
            self.add_module("1", torch.nn.Linear(8, 2))

    loaded = lutra.compress.load_into(Named(), tmp_path / "s")
    lutra.compress.decompress_file(tmp_path / "s", tmp_path / "d")
    dense = torch.from_numpy(load_file(tmp_path / "d")["emb.weight"])
    torch.testing.assert_close(loaded.emb(torch.arange(1000)), dense)


def test_the_folder_of_a_model_is_loaded_by_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "a")
    lutra.compress.compress_file(tmp_path / "a", tmp_path / "b", "low_rank", rank=8)
    lutra.compress.decompress_file(tmp_path / "b", tmp_path / "c")
    small, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values()), info
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    ids = torch.arange(20).reshape(2, 10)
    torch.testing.assert_close(small(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ("Llama", "GPTNeoX"))
def test_an_untied_head(tmp_path, kind):
    """The head of a folder and that of a file become an OutputHead; back and forth as `convert`'s."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=1000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        tie_word_embeddings=False,
    )  # fmt: skip
    cls = getattr(transformers, f"{kind}ForCausalLM")
    cls(config).save_pretrained(tmp_path / "a")
    name = "lm_head" if kind == "Llama" else "embed_out"
    report = lutra.compress.compress_file(tmp_path / "a", tmp_path / "b", "int8", head="compressed")
    assert [e.module for e in report.tables][1:] == [f"{name}.weight"]
    stored = load_file(tmp_path / "b" / "model.safetensors")
    assert f"{name}.table.codes" in stored and f"{name}.weight" not in stored
    small, info = cls.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values()), info
    head = small.get_output_embeddings()
    assert isinstance(head, lutra.nn.OutputHead)
    lutra.compress.decompress_file(tmp_path / "b", tmp_path / "c")
    dense, was = (cls.from_pretrained(tmp_path / folder) for folder in "ca")
    ids = torch.arange(20).reshape(2, 10)
    torch.testing.assert_close(small(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-4)
    live = lutra.compress.convert(was, "int8", head="compressed")
    assert torch.equal(live(ids).logits, small(ids).logits)
    small.save_pretrained(tmp_path / "d")
    assert torch.equal(cls.from_pretrained(tmp_path / "d")(ids).logits, small(ids).logits)
    if kind == "Llama":  # the file alone, by name, and into the model as its class builds it
        file = tmp_path / "a" / "model.safetensors"
        lutra.compress.compress_file(file, tmp_path / "s", "int8", tensors=["lm_head.weight"])
        alone = lutra.compress.load_into(cls.from_pretrained(tmp_path / "a"), tmp_path / "s")
        assert isinstance(alone.lm_head, lutra.nn.OutputHead)
        assert torch.equal(alone.lm_head.table.dense(), head.table.dense())


def test_heads_that_are_none(checkpoint, tmp_path):
    path, tensors = checkpoint
    with pytest.raises(ValueError, match="head must be 'auto' or 'compressed'"):
        lutra.compress.compress_file(path, tmp_path / "no", "int8", head="dense")
    del tensors["lm_head.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="no tensor looks like an untied output head"):
        lutra.compress.compress_file(path, tmp_path / "no", "int8", head="compressed")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, path)
    report = lutra.compress.compress_file(path, tmp_path / "tied", "int8", head="compressed")
    assert len(report.tables) == 1 and "lm_head.table.codes" not in load_file(tmp_path / "tied")


# ---------------------------------------------------------------- the command line
def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "lutra", *map(str, arguments)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "COLUMNS": "160"},
    )  # fmt: skip


def test_commands(checkpoint, tmp_path):
    pytest.importorskip("typer")
    path, _ = checkpoint
    small, dense = tmp_path / "small.safetensors", tmp_path / "dense.safetensors"
    done = command(
        "compress", path, "--budget", "30%", "--formats", "low_rank", "-o", small, "--json", tmp_path / "j"
    )
    assert done.returncode == 0, done.stderr
    assert "no size within the budget" not in done.stdout
    assert "low_rank:rank=4" in done.stdout and "model.embed_tokens.weight" in done.stdout
    assert json.loads((tmp_path / "j").read_text())["tables"][0]["format"] == "low_rank:rank=4"
    assert small.stat().st_size < path.stat().st_size
    done = command("compress", path, "--format", "int8", "--head", "compressed", "-o", tmp_path / "h")
    assert done.returncode == 0 and "lm_head.weight" in done.stdout, done.stderr
    done = command("decompress", small, "-o", dense)
    assert done.returncode == 0 and "model.embed_tokens.weight" in done.stdout
    done = command("compress", path, "--budget", "9%", "--formats", "int8,low_rank", "-o", tmp_path / "f")
    assert "no size within the budget: int8" in done.stdout
    done = command("compress", path, "--budget", "1", "-o", tmp_path / "no")
    assert (
        done.returncode == 1 and "smallest that can be met" in done.stderr and "Traceback" not in done.stderr
    )
    done = command("compress", path, "-o", tmp_path / "no")
    assert done.returncode == 1 and "give a budget" in done.stderr


def test_report(checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    from lutra.compress import _html

    path, _ = checkpoint
    out = tmp_path / "report.html"
    _html.write(path, out, formats=["low_rank"], progress=False)
    text = out.read_text()
    assert text.startswith("<!doctype html>") and text.count("<svg") == 1
    assert "low_rank:rank=7" in text and "model.embed_tokens.weight" in text
    assert "currentColor" in text and "#010203" not in text
    # nothing is fetched: links stand only in the names of the SVG's languages
    links = set(re.findall(r"(?:https?:)?//[\w./-]+", text))
    assert all("w3.org" in link for link in links), links
    assert not re.search(r"<(script|link|img|image)\b", text)
    with pytest.raises(ValueError, match="is the input"):
        _html.write(path, path, formats=["low_rank"])


def test_report_leaves_out_what_takes_too_long(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from lutra.compress import _choose, _html

    encoded = []
    attempt = _choose.attempt

    def measured(job, format, seed=0):
        """rq takes time in proportion to the bytes, low_rank none."""
        encoded.append((format.name, len(job.table)))
        option = attempt(job, format, seed)
        cost = (10 + len(job.table) / 100) * option.nbytes / job.dense
        option.cpu = cost if format.name == "rq" else 0.0
        return option

    monkeypatch.setattr(_choose, "attempt", measured)
    path, tables = checkpoint
    rows = len(tables["model.embed_tokens.weight"])
    out = tmp_path / "report.html"
    whole = _html.write(path, out, formats=["rq"], limit=1e9, progress=False)
    tried = len(encoded)
    assert whole == [] and "left out" not in out.read_text() and tried > 2
    encoded.clear()
    left_out = _html.write(path, out, formats=["low_rank", "rq"], limit=3.0, progress=False)
    text = out.read_text()
    assert 0 < len(left_out) < tried and text.count("left out: about") == len(left_out)
    assert f"rq ({len(left_out)})" in text and "--formats rq --limit" in text
    assert encoded.count(("rq", rows)) == tried - len(left_out) and ("low_rank", rows) in encoded
    # a large table: two samples say what the first size takes
    encoded.clear()
    monkeypatch.setattr(_html, "SAMPLES", (20, 40))
    monkeypatch.setattr(_html, "LARGE", 1)
    left_out = _html.write(path, out, formats=["rq"], limit=1e-3, progress=False)
    assert encoded == [("rq", 20), ("rq", 40)] and len(left_out) == tried
    linear = lambda job, format, seed=0: _choose.Option(format, 1, cpu=5 + len(job.table) / 100)  # noqa: E731
    monkeypatch.setattr(_choose, "attempt", linear)
    job = _html.jobs_of(path, None, 1000)[1][0]
    estimate = _html._would_take(job, _html._samples(job, 0), left_out[0].format, 0.5, 0)
    assert estimate == pytest.approx(5 + rows / 100)
