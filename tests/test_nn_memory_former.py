"""lutra.nn.MemoryFormerBlock, MemoryFormerLM and the model class for transformers."""

from __future__ import annotations

import copy
import importlib.util
import math
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional
nn = pytest.importorskip("lutra.nn")

SMALL = {"dim": 32, "num_layers": 2, "num_heads": 4, "bits": 4, "ffn_bits": 5}


def model(**options):
    torch.manual_seed(0)
    lm = nn.MemoryFormerLM(**{"vocab_size": 40, **SMALL, **options})
    for name, p in lm.named_parameters():  # far from zero, so that every part counts
        if name.endswith("tables"):
            torch.nn.init.normal_(p, std=0.3)
    return lm.eval()


def tokens(*shape, seed=1):
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(seed))


def memory(layer, x):
    z = x.unflatten(-1, (layer.num_tables, layer.bits))
    codes = ((z >= 0).long() << torch.arange(layer.bits)).sum(-1)
    weights = torch.sigmoid(2 * z.abs()).prod(-1) * z.abs().sum(-1)
    rows = layer.tables[torch.arange(layer.num_tables), codes]
    return (weights.unsqueeze(-1) * rows).sum(-2) + layer.bias


def turned(x, dims, base=10000.0):
    """Rotary positions by complex numbers, x (heads, tokens, size)."""
    half = dims // 2
    z = torch.complex(x[..., :half], x[..., half:dims])
    angle = torch.arange(x.shape[1]).unsqueeze(1) * base ** (-2 * torch.arange(half) / dims)
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag, x[..., dims:]), -1)


def by_hand(lm, ids):
    """Logits of one text, from the formulas."""
    x = lm.embedding(ids)
    if lm.positions is not None:
        x = x + lm.positions.weight[: len(ids)]
    for block in lm.blocks:
        q, k, v = (
            part.unflatten(-1, (block.num_heads, -1)).transpose(0, 1)
            for part in memory(block.qkv, block.norm(x)).chunk(3, -1)
        )
        if block.rotary_dims:
            q, k = turned(q, block.rotary_dims), turned(k, block.rotary_dims)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        hidden = memory(block.expand, block.ffn_norm(x))
        x = x + memory(block.contract, block.hidden_norm(hidden))
    return lm.norm(x) @ lm.head.weight.t()


@pytest.mark.parametrize("options", [{}, {"rotary": 1.0}, {"positions": "learned"}, {"rotary": 0.0}], ids=str)
def test_equals_the_formulas(options):
    lm = model(**options)
    ids = tokens(2, 9)
    with torch.no_grad():
        got = lm(ids)
        for text, logits in zip(ids, got):
            torch.testing.assert_close(logits, by_hand(lm, text), rtol=1e-4, atol=1e-4)


def test_block_alone_is_causal_and_takes_a_cache():
    torch.manual_seed(0)
    block = nn.MemoryFormerBlock(32, 4, bits=4, ffn_bits=5).eval()
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        out = block(x)
        changed = x.clone()
        changed[:, 4] += 1
        assert torch.equal(block(changed)[:, :4], out[:, :4])
        cache = nn.KeyValueCache()
        parts = [block(x[:, :3], cache=cache), block(x[:, 3:4], cache=cache), block(x[:, 4:], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, 1), out, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 6 and "num_heads=4" in repr(block)


@pytest.mark.parametrize("options", [{}, {"positions": "learned", "tie_embeddings": True}], ids=str)
def test_cache_and_padding(options):
    lm = model(**options)
    ids = tokens(2, 150)
    with torch.no_grad():
        want = lm(ids)
        cache, parts = nn.KeyValueCache(), []
        for begin, end in ((0, 5), (5, 6), (6, 90), (90, 150)):
            parts.append(lm(ids[:, begin:end], cache=cache))
        torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(lm(ids, last=2), want[:, -2:])
        short = ids[:1, :4]
        padded = torch.cat((ids[1:, :3], short), 1)  # three tokens of padding at the left
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
        got = lm(padded, attention_mask=mask)
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got[:, 3:], lm(short), rtol=1e-4, atol=1e-4)
        right = lm(torch.cat((short, ids[1:, :3]), 1), attention_mask=mask.flip(1))
        torch.testing.assert_close(right[:, :4], lm(short), rtol=1e-4, atol=1e-4)


def test_generate():
    lm = model()
    ids = tokens(2, 4)
    out = lm.generate(ids, 6, temperature=0)
    assert out.shape == (2, 10) and torch.equal(out[:, :4], ids)
    for i in range(4, 10):  # the likeliest token of the whole text before it
        assert torch.equal(lm(out[:, :i])[:, -1].argmax(-1), out[:, i])
    first = lm.generate(ids, 5, top_k=3, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, lm.generate(ids, 5, top_k=3, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(lm.generate(ids, 4, top_k=1), lm.generate(ids, 4, temperature=0))
    eos = int(out[0, 4])
    stopped = lm.generate(ids[:1], 6, temperature=0, eos=eos)
    assert stopped.shape == (1, 5) and stopped[0, 4] == eos


def test_gradients_and_checkpointing():
    lm = model(learn_temperature="table").train()
    ids = tokens(2, 8)
    lm.loss(ids).backward()
    want = {n: p.grad.clone() for n, p in lm.named_parameters()}
    assert all(g.abs().sum() > 0 for g in want.values())
    logits = lm(ids)[:, :-1].reshape(-1, 40)
    torch.testing.assert_close(lm.loss(ids), F.cross_entropy(logits, ids[:, 1:].reshape(-1)))
    lm.zero_grad()
    lm.gradient_checkpointing = True
    lm.loss(ids).backward()
    for name, p in lm.named_parameters():
        torch.testing.assert_close(p.grad, want[name], msg=name)


def test_compile_copies_dtypes_and_autocast():
    lm = model()
    ids = tokens(2, 6)
    want = lm(ids)
    torch.testing.assert_close(torch.compile(lm, backend="aot_eager", fullgraph=True)(ids), want)
    other = model()
    other.load_state_dict(lm.state_dict())
    assert torch.equal(other(ids), want) and torch.equal(copy.deepcopy(lm)(ids), want)
    for dtype in (torch.bfloat16, torch.float16):
        out = copy.deepcopy(lm).to(dtype)(ids)
        assert out.dtype == dtype and torch.isfinite(out).all()
    with torch.autocast("cpu", torch.bfloat16):
        loss = lm.train().loss(ids)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in lm.parameters())
    assert model(tie_embeddings=True).head.weight is not None
    tied = model(tie_embeddings=True)
    assert tied.head.weight is tied.embedding.weight


def test_it_learns_a_text_by_heart():
    torch.manual_seed(0)
    lm = nn.MemoryFormerLM(20, **SMALL)
    ids = torch.randint(0, 20, (4, 24))
    optimizer = torch.optim.Adam(lm.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = lm.loss(ids)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.0


def test_published_sizes():
    with torch.device("meta"):
        lm = nn.MemoryFormerLM.published("tiny")
        assert (lm.num_layers, lm.dim, lm.blocks[0].contract.in_features) == (6, 512, 640)
        assert (
            sum(p.numel() for p in lm.blocks[0].parameters()) == 69_206_016 + 4 * 512 + 640 + 512 + 512 + 640
        )
        assert nn.MemoryFormerLM.published("small", 1000).dim == 768
    with pytest.raises(ValueError, match="name must be one of 'tiny', 'small'"):
        nn.MemoryFormerLM.published("huge")


def test_bad_arguments_are_named():
    for options, words in (
        ({"bits": 5}, "dim is 32; it must be a multiple of bits = 5"),
        ({"num_heads": 3}, "dim is 32; it must be a multiple of num_heads = 3"),
        ({"rotary": 1.5}, r"rotary must be in \[0, 1\]"),
        ({"positions": "alibi"}, "positions must be one of 'rotary', 'learned'"),
        ({"num_layers": 0}, "num_layers must be >= 1"),
    ):
        with pytest.raises(ValueError, match=words):
            nn.MemoryFormerLM(**{"vocab_size": 40, **SMALL, **options})
    lm = model(positions="learned", max_positions=8)
    with pytest.raises(ValueError, match="9 tokens; learned positions end at max_positions = 8"):
        lm(tokens(1, 9))
    with pytest.raises(ValueError, match=r"ids has shape \(3,\)"):
        lm(tokens(3))
    with pytest.raises(TypeError, match="ids must be an int64"):
        lm(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 2\).*must be \(1, 3\)"):
        lm(tokens(1, 3), attention_mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match="either ids or embeddings"):
        lm(None)
    with pytest.raises(ValueError, match=r"x has shape \(2, 32\)"):
        lm.blocks[0](torch.zeros(2, 32))
    with pytest.raises(ValueError, match="ids is empty"):
        lm.generate(tokens(1, 0), 3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model(dim=64).load_state_dict(model().state_dict())


# ---------------------------------------------------------------- transformers
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def hugging_face(**options):
    from lutra.models.memoryformer import MemoryFormerConfig, MemoryFormerForCausalLM

    config = MemoryFormerConfig(
        **{
            "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bits": 4,
            "ffn_bits": 5, "bos_token_id": 0, "pad_token_id": 0, **options,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    return MemoryFormerForCausalLM(config).eval()


@needs_transformers
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load(tmp_path, tied):
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = hugging_face(tie_word_embeddings=tied, learn_temperature="table", hash_temperature=0.7)
    hf.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert AutoConfig.from_pretrained(tmp_path).hash_temperature == 0.7
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(other) is type(hf)
    for (name, a), b in zip(hf.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), name
    ids = tokens(2, 5)
    assert torch.equal(hf(ids).logits, other(ids).logits)
    assert (other.lm.head.weight is other.lm.embedding.weight) == tied
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.lm.blocks[0].qkv.tables.dtype == torch.bfloat16


@needs_transformers
def test_loss_training_and_checkpointing():
    hf = hugging_face().train()
    ids = tokens(2, 6)
    out = hf(ids, labels=ids)
    torch.testing.assert_close(out.loss, hf.lm.loss(ids))
    assert out.logits.shape == (2, 6, 40)
    out.loss.backward()
    want = hf.lm.blocks[0].expand.tables.grad.clone()
    hf.zero_grad()
    hf.gradient_checkpointing_enable()
    assert hf.lm.gradient_checkpointing
    hf(ids, labels=ids).loss.backward()
    torch.testing.assert_close(hf.lm.blocks[0].expand.tables.grad, want)
    loss, logits = hf(ids, labels=ids, return_dict=False)[:2]
    assert loss.dim() == 0 and logits.shape == (2, 6, 40)
    assert hf(inputs_embeds=hf.get_input_embeddings()(ids)).logits.shape == (2, 6, 40)


@needs_transformers
def test_generation():
    hf = hugging_face()
    ids = tokens(2, 4)
    got = hf.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, hf.lm.generate(ids, 6, temperature=0))
    assert torch.equal(got, hf.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))
    assert hf.generate(ids, max_new_tokens=3, num_beams=3).shape == (2, 7)
    padded = torch.cat((torch.zeros(1, 2, dtype=torch.int64), ids[:1]), 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    from_padded = hf.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(from_padded[:, 2:], got[:1])
    hf.resize_token_embeddings(50)
    assert hf(ids).logits.shape[-1] == 50


def test_lutra_nn_needs_no_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import lutra.nn, lutra.models\n"
        "try:\n    import lutra.models.memoryformer\n"
        "except ImportError as error:\n    print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "needs transformers: pip install transformers" in out
