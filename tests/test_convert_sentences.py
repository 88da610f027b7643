"""lutra.compress on sentence-transformers: what is saved is loaded again, or refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
from sentence_transformers import SentenceTransformer  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

import lutra.compress  # noqa: E402

try:
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
except ImportError:
    from sentence_transformers.models import Normalize, StaticEmbedding

TEXTS = ["w1 w2 w3", "w4 w999 w7 w7", "w42"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {f"w{i}": i for i in range(1, 1500)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    static = StaticEmbedding(tokenizer, embedding_weights=torch.randn(1500, 24))
    return SentenceTransformer(modules=[static, Normalize()], device="cpu")


def again(folder):
    return SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)


@pytest.mark.parametrize("safe", (True, False))
def test_saved_and_loaded(model, tmp_path, safe):
    lutra.compress.convert(model, "int8")
    want = model.encode(TEXTS)
    model.save(str(tmp_path), safe_serialization=safe)
    other = again(tmp_path)
    np.testing.assert_array_equal(other.encode(TEXTS), want)
    assert isinstance(other[0], StaticEmbedding) and other[0].get_embedding_dimension() == 24
    other.save(str(tmp_path / "twice"))
    np.testing.assert_array_equal(again(tmp_path / "twice").encode(TEXTS), want)


def test_others_loaders_refuse(model, tmp_path):
    """Never a model with an empty table."""
    dense = model[0].embedding.weight.detach().clone()
    lutra.compress.convert(model, "int8")
    model.save(str(tmp_path))
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(tmp_path), device="cpu")
    with pytest.raises(KeyError):
        StaticEmbedding.load(str(tmp_path))
    plain = StaticEmbedding(model.tokenizer, embedding_weights=torch.zeros_like(dense))
    lutra.compress.load_into(plain, tmp_path / "model.safetensors")
    assert torch.equal(plain.embedding.dense(), model[0].embedding.dense())
    (tmp_path / "lutra_table.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say what the table is"):
        again(tmp_path)
    (tmp_path / "lutra_table.json").unlink()
    with pytest.raises(ValueError, match=r"has no lutra_table\.json"):
        again(tmp_path)


def test_files(model, tmp_path):
    """lutra compress on the folder and on the file, and back."""
    want = model.encode(TEXTS)
    model.save(str(tmp_path / "dense"))
    lutra.compress.compress_file(tmp_path / "dense", tmp_path / "small", "int8")
    small = again(tmp_path / "small").encode(TEXTS)
    np.testing.assert_allclose(small, want, atol=0.02)
    lutra.compress.convert(model, "int8")
    np.testing.assert_array_equal(small, model.encode(TEXTS))
    lutra.compress.decompress_file(tmp_path / "small", tmp_path / "back")
    back = SentenceTransformer(str(tmp_path / "back"), device="cpu")
    np.testing.assert_allclose(back.encode(TEXTS), small, atol=1e-6)
    was, now = (json.loads((tmp_path / f / "modules.json").read_text()) for f in ("dense", "back"))
    assert was == now
    lutra.compress.compress_file(
        tmp_path / "dense" / "model.safetensors", tmp_path / "dense" / "m.safetensors", "int8"
    )
    (tmp_path / "dense" / "m.safetensors").rename(tmp_path / "dense" / "model.safetensors")
    with pytest.raises(KeyError):
        SentenceTransformer(str(tmp_path / "dense"), device="cpu")


def test_a_model_of_transformers_inside(tmp_path):
    """Its own save_pretrained must know of the tables too."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *(f"w{i}" for i in range(1200))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "bert")
    first = Transformer(str(tmp_path / "bert"))
    model = SentenceTransformer(modules=[first, Pooling(16)], device="cpu")
    lutra.compress.convert(model, "int8")
    want = model.encode(TEXTS)
    model.save(str(tmp_path / "saved"))
    np.testing.assert_allclose(
        SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS), want, atol=1e-6
    )
