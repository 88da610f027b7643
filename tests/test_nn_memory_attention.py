"""lutra.nn.memory_attention, MemoryBank and KNNMemoryAttention against the NumPy reference and torch."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import lutra  # noqa: E402
import lutra.nn  # noqa: E402
from lutra import _backend  # noqa: E402
from lutra.nn import KNNMemoryAttention, MemoryBank, memory_attention  # noqa: E402
from lutra.reference.attention import memory_attention as reference  # noqa: E402

F = torch.nn.functional
ops = torch.ops.lutra
sdpa = F.scaled_dot_product_attention


def bank_of(heads=2, n=33, d=8, dv=None, *, dtype=torch.float32, **options):
    bank = MemoryBank(heads, d, dv, dtype=dtype, **options)
    bank.add(torch.randn(heads, n, d), torch.randn(heads, n, dv or d))
    return bank


def inputs(batch=2, heads=4, kv=4, tokens=5, keys=7, d=8, dv=8, dtype=torch.float32):
    shapes = (batch, heads, tokens, d), (batch, kv, keys, d), (batch, kv, keys, dv)
    return [torch.randn(s, dtype=dtype) for s in shapes]


def numpy(*tensors):
    return [
        t.detach().to(torch.float64 if t.dtype == torch.float64 else torch.float32).numpy() for t in tensors
    ]


# ---------------------------------------------------------------- against the definition
@pytest.mark.parametrize(
    ("n", "k", "heads", "kv", "of_bank", "tokens", "keys", "d", "dv"),
    [
        (1, 1, 1, 1, 1, 1, 1, 1, 1), (2, 5, 4, 2, 1, 3, 3, 15, 15), (33, 4, 6, 3, 2, 5, 7, 16, 17),
        (97, 31, 4, 4, 4, 2, 3, 63, 8), (65, 2, 6, 2, 6, 17, 16, 33, 31), (700, 3, 2, 1, 1, 65, 1, 8, 8),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("metric", "mask"), [("cosine", None), ("ip", "causal"), ("cosine", "bool"), ("ip", "float")]
)
def test_equals_the_reference(simd_level, n, k, heads, kv, of_bank, tokens, keys, d, dv, metric, mask):
    bank = bank_of(of_bank, n, d, dv, metric=metric)
    q, key, value = inputs(2, heads, kv, tokens, keys, d, dv)
    options = {"is_causal": mask == "causal", "attn_mask": None}
    if mask == "bool":
        options["attn_mask"] = torch.rand(2, 1, tokens, keys) > 0.4
    if mask == "float":
        options["attn_mask"] = torch.randn(heads, tokens, keys)
    threshold = 0.2 if metric == "cosine" and n > 2 else None
    for _ in range(2):  # the second time with the codes
        out, weights = memory_attention(
            q, key, value, bank, top_k=k, similarity_threshold=threshold, enable_gqa=True, scale=0.7,
            return_weights=True, **options,
        )  # fmt: skip
        again = memory_attention(
            q,
            key,
            value,
            bank,
            top_k=k,
            similarity_threshold=threshold,
            enable_gqa=True,
            scale=0.7,
            **options,
        )
        bank.build()
    if mask in ("bool", "float"):
        options["attn_mask"] = options["attn_mask"].numpy()
    want = reference(
        *numpy(q, key, value, bank.keys, bank.values), top_k=k, metric=metric,
        similarity_threshold=threshold, scale=0.7, **options,
    )  # fmt: skip
    for got, right in zip((out, *weights), want):
        np.testing.assert_allclose(got.numpy(), right, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(again, out, rtol=1e-5, atol=1e-6)


def test_all_memories_are_keys_like_others():
    bank = bank_of(4, 20)
    q, key, value = inputs()
    out = memory_attention(q, key, value, bank, top_k=50)
    both = [torch.cat([m.expand(2, -1, -1, -1), a], 2) for m, a in ((bank.keys, key), (bank.values, value))]
    torch.testing.assert_close(out, sdpa(q, *both))
    # a causal mask hides local keys and no memory
    causal = torch.cat([torch.ones(5, 20, dtype=torch.bool), torch.ones(5, 7, dtype=torch.bool).tril()], 1)
    out = memory_attention(q, key, value, bank, top_k=20, is_causal=True)
    torch.testing.assert_close(out, sdpa(q, *both, attn_mask=causal))


def test_without_memories_it_is_torchs_function():
    q, key, value = inputs()
    for bank in (None, MemoryBank(4, 8), [None, None], [None, MemoryBank(2, 8)]):
        for causal in (False, True):
            out = memory_attention(q, key, value, bank, is_causal=causal)
            assert torch.equal(out, sdpa(q, key, value, is_causal=causal))
            out, weights = memory_attention(q, key, value, bank, is_causal=causal, return_weights=True)
            torch.testing.assert_close(out, sdpa(q, key, value, is_causal=causal))
            assert weights.memory.shape == weights.ids.shape == (2, 4, 5, 0)
    flat = memory_attention(q[0], key[0], value[0], None)
    torch.testing.assert_close(flat, sdpa(q, key, value)[0])


def test_a_bank_for_each_item():
    banks = [bank_of(2, 33), None, bank_of(2, 3), MemoryBank(2, 8)]
    q, key, value = inputs(4)
    out, weights = memory_attention(q, key, value, banks, top_k=5, return_weights=True)
    assert weights.ids.shape == (4, 4, 5, 5)
    for i, bank in enumerate(banks):
        alone, w = memory_attention(q[i], key[i], value[i], bank, top_k=5, return_weights=True)
        torch.testing.assert_close(out[i], alone)
        m = w.ids.shape[-1]
        torch.testing.assert_close(weights.memory[i, ..., :m], w.memory)
        assert (weights.ids[i, ..., m:] == -1).all() and (weights.memory[i, ..., m:] == 0).all()
    total = weights.local.sum(-1) + weights.memory.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_who_sees_nothing_gets_zeros():
    bank = bank_of(4)
    q, key, value = inputs()
    nothing = torch.zeros(5, 7, dtype=torch.bool)
    out = memory_attention(q, key, value, bank, nothing, similarity_threshold=2.0)
    assert torch.equal(out, torch.zeros_like(out))
    none = memory_attention(q, key[:, :, :0], value[:, :, :0], bank, similarity_threshold=2.0)
    assert torch.equal(none, torch.zeros_like(none))
    alone = memory_attention(q, key[:, :, :0], value[:, :, :0], bank, top_k=1)  # memories are all there is
    ids = memory_attention(q, key, value, bank, top_k=1, return_weights=True)[1].ids
    want = torch.stack([bank.values[h][ids[:, h, :, 0]] for h in range(4)], 1)
    torch.testing.assert_close(alone, want)


def test_the_threshold_itself_is_not_above_it():
    bank = MemoryBank(1, 2, metric="ip")
    bank.add(torch.tensor([[[2.0, 0], [3.0, 0], [4.0, 0]]]), torch.randn(1, 3, 2))
    q = torch.tensor([[[[1.0, 0.0]]]])
    _, seen = memory_attention(q, q, q, bank, similarity_threshold=3.0, return_weights=True)
    assert seen.ids.tolist() == [[[[2, 1, 0]]]]
    assert (seen.memory[0, 0, 0] > 0).tolist() == [True, False, False]
    want = reference(*numpy(q, q, q, bank.keys, bank.values), metric="ip", similarity_threshold=3.0)
    np.testing.assert_allclose(seen.memory.numpy(), want[2], rtol=1e-5)


def test_ties_go_to_the_lowest_and_threads_change_nothing(simd_level, threads):
    bank = MemoryBank(1, 4)
    bank.add(torch.ones(1, 40, 4), torch.randn(1, 40, 4))
    assert bank.search(torch.ones(1, 2, 4), 3).ids.tolist() == [[[0, 1, 2]] * 2]
    torch.manual_seed(1)
    bank, many = bank_of(2, 3000, 16), torch.randn(2, 200, 16)
    if _backend.core:
        _backend.core.set_num_threads(1)
    one = bank.search(many, 7)
    if _backend.core:
        _backend.core.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, bank.search(many, 7)))


# ---------------------------------------------------------------- gradients
@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_gradients(metric):
    bank = bank_of(1, 12, 4, 3, dtype=torch.float64, metric=metric)
    q, key, value = inputs(1, 2, 1, 3, 4, 4, 3, torch.float64)
    leaves = [a.requires_grad_() for a in (q, key, value)]

    def f(q, key, value):
        return memory_attention(
            q, key, value, bank, top_k=3, is_causal=True, enable_gqa=True, similarity_threshold=-0.5
        )

    assert torch.autograd.gradcheck(f, leaves)
    bank32 = bank.to(dtype=torch.float32)
    single = [a.detach().float().requires_grad_() for a in leaves]
    want = torch.autograd.grad(f(*leaves).square().sum(), leaves)
    bank = bank32
    for a, b in zip(torch.autograd.grad(f(*single).square().sum(), single), want):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)
    assert not bank.keys.requires_grad and not bank.values.requires_grad


@pytest.mark.traces
def test_compile_and_opcheck():
    bank = bank_of(2, 40)
    q, key, value = inputs()
    torch.library.opcheck(ops.memory_search.default, (torch.randn(2, 3, 8), bank.handle, 5))
    torch.library.opcheck(
        ops.memory_search.default, (torch.randn(2, 3, 8, requires_grad=True), bank.handle, 5)
    )

    def f(q):
        return memory_attention(q, key, value, bank, top_k=4, is_causal=True)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    a, b = q.clone().requires_grad_(), q.clone().requires_grad_()
    torch.testing.assert_close(compiled(a), f(b))
    compiled(a).sum().backward()
    f(b).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    bank.add(q[0, :2] * 9, value[0, :2, :5] + 9)  # what the compiled function must see
    torch.testing.assert_close(compiled(a), f(b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_and_autocast(dtype):
    bank, (q, key, value) = bank_of(4, 50, dtype=dtype), inputs()
    wide = bank.to(dtype=torch.float32)
    assert wide.to(dtype=torch.float32) is wide
    want = memory_attention(*(a.to(dtype).float() for a in (q, key, value)), wide, top_k=4)
    out = memory_attention(*(a.to(dtype) for a in (q, key, value)), bank, top_k=4)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), want, rtol=0.03, atol=0.03)
    mixed = memory_attention(*(a.to(dtype) for a in (q, key, value)), wide, top_k=4)
    assert mixed.dtype == dtype
    with torch.autocast("cpu", dtype=dtype):
        q.requires_grad_()
        out = memory_attention(q, key, value, wide, top_k=4)
        assert out.dtype == dtype and sdpa(q, key, value).dtype == dtype
        out.float().sum().backward()
    assert q.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), want, rtol=0.03, atol=0.03)


def test_dropout_and_non_contiguous():
    bank, (q, key, value) = bank_of(4), inputs()
    out = memory_attention(q, key, value, bank, top_k=4)
    turned = [a.transpose(1, 2).contiguous().transpose(1, 2) for a in (q, key, value)]
    torch.testing.assert_close(memory_attention(*turned, bank, top_k=4), out)
    torch.manual_seed(0)
    mean = sum(memory_attention(q, key, value, bank, None, 0.5, top_k=4) for _ in range(200)) / 200
    torch.testing.assert_close(mean, out, rtol=0.4, atol=0.4)
    assert memory_attention(q, key, value, bank, None, 1.0, top_k=4).abs().max() == 0


# ---------------------------------------------------------------- the bank
def test_codes_change_nothing(simd_level):
    bank = bank_of(2, 2000, 16)
    query = torch.randn(2, 150, 16)
    before = bank.search(query, 9)
    assert bank._screens is None or bank._queries >= 128
    bank.build()
    for a, b in zip(bank.search(query, 9), before):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    bank.add(torch.zeros(2, 1, 16), torch.zeros(2, 1, 16))
    assert bank._screens is None and bank.search(query, 5000).ids.shape == (2, 150, 2001)


@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_what_is_searched_without_a_kernel(metric, monkeypatch):
    monkeypatch.setattr("lutra.nn._memory_bank._PART", 200)
    bank, query = bank_of(2, 60, metric=metric), torch.randn(2, 9, 8)
    want = bank.search(query, 4)
    for head in range(2):
        scores, ids = bank._dense(query[head], head, 4)
        assert torch.equal(ids, want.ids[head])
        torch.testing.assert_close(scores, want.scores[head])


@pytest.mark.parametrize("index", ["IVF8,Flat", "HNSW16", "Flat", "SQ8"])
def test_other_indexes(index):
    d, n = 16, 320 if _backend.core else 40  # building a graph takes the reference long
    if index.startswith("IVF") and n < 320:
        index = "IVF1,Flat"
    bank, exact = bank_of(2, n, d, index=index), MemoryBank(2, d)
    exact.add(bank.keys, bank.values)
    query = torch.randn(2, 20, d)
    got, want = bank.search(query, 5), exact.search(query, 5)
    hits = (got.ids.unsqueeze(-1) == want.ids.unsqueeze(-2)).any(-1).float().mean()
    assert hits > 0.3 and len(bank.indexes) == 2
    more = torch.randn(2, 10, d)
    bank.add(more, more)
    assert (bank.search(more, 1).ids[:, :, 0] >= n).float().mean() > 0.8
    q, key, value = inputs(d=d, dv=d)
    out, weights = memory_attention(q, key, value, bank, top_k=3, return_weights=True)
    assert out.isfinite().all() and (weights.memory > 0).any()
    with pytest.raises(ValueError, match="factory text"):
        MemoryBank(2, d, index="Nonsense")


def test_growing_in_parts_and_copies():
    torch.manual_seed(0)
    keys, values = torch.randn(3, 97, 5), torch.randn(3, 97, 2)
    bank = MemoryBank(3, 5, 2)
    for i in range(0, 97, 8):
        bank.add(keys[:, i : i + 8], values[:, i : i + 8])
    assert torch.equal(bank.keys, keys) and torch.equal(bank.values, values) and len(bank) == 97
    torch.testing.assert_close(bank.norms, keys.norm(dim=-1))
    table, step = bank.rows("values")
    assert torch.equal(table[2 * step + 96], values[2, 96])
    want = bank.search(keys[:, :4], 3)
    for other in (copy.copy(bank), copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert all(torch.equal(a, b) for a, b in zip(other.search(keys[:, :4], 3), want))
        other.add(keys[:, :1], values[:, :1])
        bank.add(values.new_zeros(3, 1, 5), values.new_zeros(3, 1, 2))
        assert torch.equal(other.keys[:, -1], keys[:, 0]) and (bank.keys[:, -1] == 0).all()
    batch = MemoryBank(3, 5, 2)
    batch.add(torch.stack([keys[:, :4], keys[:, 4:8]]), torch.stack([values[:, :4], values[:, 4:8]]))
    assert torch.equal(batch.keys, keys[:, :8])
    batch.clear()
    assert len(batch) == 0 and batch.search(keys[:, :4], 3).ids.shape == (3, 4, 0)
    assert "n=100" in repr(bank) and bank.nbytes >= 4 * 3 * 100 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mmap", [True, False])
def test_files(tmp_path, dtype, mmap):
    if dtype == torch.bfloat16:
        pytest.importorskip("ml_dtypes")
    path = tmp_path / "bank.safetensors"
    bank = bank_of(3, 50, 6, 4, dtype=dtype, metric="ip")
    bank.add(torch.randn(3, 1, 6), torch.randn(3, 1, 4))  # there is room behind
    bank.save(path)
    again = MemoryBank.load(path, mmap=mmap)
    assert torch.equal(again.keys, bank.keys) and torch.equal(again.values, bank.values)
    assert torch.equal(again.norms, bank.norms) and repr(again) == repr(bank)
    again.add(torch.ones(3, 1, 6), torch.ones(3, 1, 4))
    again.save(path)  # over the file that it is mapped from
    assert len(MemoryBank.load(path)) == 52
    MemoryBank(2, 3).save(path)
    assert len(MemoryBank.load(path)) == 0
    content = path.read_bytes()
    path.write_bytes(content[:-3] if len(content) % 2 else content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"bank\.safetensors"):
        MemoryBank.load(path)
    lutra.index.Flat(4).save(path)
    with pytest.raises(ValueError, match="not a MemoryBank"):
        MemoryBank.load(path)


def test_bad_input():
    bank, (q, key, value) = bank_of(2), inputs()
    with pytest.raises(ValueError, match=r"keys\[1, 3, 2\] is nan"):
        keys = torch.zeros(2, 5, 8)
        keys[1, 3, 2] = torch.nan
        bank.add(keys, torch.zeros(2, 5, 8))
    with pytest.raises(ValueError, match=r"values\[0, 0, 0\] is inf"):
        bank_of(2, dtype=torch.float16).add(torch.zeros(2, 1, 8), torch.full((2, 1, 8), 1e6))
    for keys, values in ((torch.zeros(2, 5, 7), torch.zeros(2, 5, 8)), (torch.zeros(3, 5, 8),) * 2):
        with pytest.raises(ValueError, match="keys has shape"):
            bank.add(keys, values)
    with pytest.raises(ValueError, match="keys holds 5 tokens, values 4"):
        bank.add(torch.zeros(2, 5, 8), torch.zeros(2, 4, 8))
    with pytest.raises(TypeError, match=r"keys must be a floating point tensor, got torch\.int64"):
        bank.add(torch.zeros(2, 5, 8).long(), torch.zeros(2, 5, 8))
    with pytest.raises(TypeError, match="values"):
        bank.add(torch.zeros(2, 5, 8), np.zeros((2, 5, 8)))
    assert len(bank) == 33
    for other, message in (
        (bank_of(2, 3, 9, 8), "keys of width 9"),
        (bank_of(2, 3, 8, 9), "values of width 9"),
        (bank_of(3, 3), "3 heads, which do not divide"),
        ([bank], "1 banks for a batch of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            memory_attention(q, key, value, other)
    with pytest.raises(TypeError, match="bank must be"):
        memory_attention(q, key, value, "bank")
    with pytest.raises(ValueError, match="enable_gqa"):
        memory_attention(q, key[:, :2], value[:, :2], bank)
    with pytest.raises(ValueError, match="exclude"):
        memory_attention(q, key, value, bank, torch.ones(5, 7), is_causal=True)
    with pytest.raises(TypeError, match="attn_mask must be"):
        memory_attention(q, key, value, bank, torch.ones(5, 7).long())
    with pytest.raises(ValueError, match="top_k"):
        memory_attention(q, key, value, bank, top_k=0)
    with pytest.raises(ValueError, match="query has shape"):
        bank.search(torch.zeros(2, 3, 7), 1)
    with pytest.raises(ValueError, match="NaN"):
        memory_attention(q * torch.nan, key, value, bank)
    with pytest.raises(ValueError, match="metric"):
        MemoryBank(2, 8, metric="l2")
    with pytest.raises(TypeError, match="dtype"):
        MemoryBank(2, 8, dtype=torch.int8)


# ---------------------------------------------------------------- the layer
def test_in_the_place_of_torchs_layer():
    x, y = torch.randn(2, 6, 12), torch.randn(2, 9, 12)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[0, 7:] = True
    for batch_first in (True, False):
        dense = torch.nn.MultiheadAttention(12, 3, batch_first=batch_first).eval()
        layer = KNNMemoryAttention.from_attention(dense, top_k=3)
        assert not layer.training and layer.batch_first == batch_first
        a, b = (x, y) if batch_first else (x.transpose(0, 1), y.transpose(0, 1))
        for options in (
            {}, {"key_padding_mask": padding}, {"average_attn_weights": False},
            {"attn_mask": torch.rand(6, 9) > 0.6, "key_padding_mask": padding},
            {"attn_mask": torch.randn(6, 6, 9)}, {"attn_mask": torch.randn(6, 9)},
        ):  # fmt: skip
            for got, want in zip(layer(a, b, b, **options), dense(a, b, b, **options)):
                torch.testing.assert_close(got, want)
        mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
        want = dense(a, a, a, attn_mask=mask, need_weights=False)[0]
        torch.testing.assert_close(layer(a, is_causal=True, need_weights=False)[0], want)
        none = torch.zeros(2, 6, dtype=torch.bool)
        torch.testing.assert_close(layer(a, key_padding_mask=none, is_causal=True)[0], want)
    torch.testing.assert_close(layer(x[0])[0], dense(x[0], x[0], x[0])[0])
    with pytest.raises(ValueError, match="kdim"):
        KNNMemoryAttention.from_attention(torch.nn.MultiheadAttention(12, 3, kdim=4))


@pytest.mark.parametrize("batch_first", [True, False])
def test_remembering(batch_first):
    layer = KNNMemoryAttention(12, 6, num_kv_heads=3, top_k=50, batch_first=batch_first).eval()
    past, x = torch.randn(1, 20, 12), torch.randn(1, 5, 12)
    a, b = (past, x) if batch_first else (past.transpose(0, 1), x.transpose(0, 1))
    both = torch.cat([past, x], 1)
    mask = torch.cat([torch.zeros(5, 20, dtype=torch.bool), torch.ones(5, 5, dtype=torch.bool).triu(1)], 1)
    whole = both if batch_first else both.transpose(0, 1)
    want, weights = layer(b, whole, attn_mask=mask)
    layer.remember(a)
    got, local = layer(b, is_causal=True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(local, weights[..., 20:])
    assert len(layer.bank) == 20 and "bank" not in "".join(layer.state_dict())
    torch.testing.assert_close(copy.deepcopy(layer)(b, is_causal=True)[0], want)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(b, is_causal=True)[0], want)
    layer.bank = [MemoryBank(3, 2), MemoryBank(3, 2)]
    two = torch.randn(2, 4, 12)
    layer.remember(two if batch_first else two.transpose(0, 1))
    assert [len(b) for b in layer.bank] == [4, 4] and not torch.equal(layer.bank[0].keys, layer.bank[1].keys)
    with pytest.raises(ValueError, match="one item for each bank"):
        layer.remember(a)


def test_in_an_encoder_it_trains_compiles_and_is_checkpointed():
    encoder = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    encoder.self_attn = KNNMemoryAttention.from_attention(encoder.self_attn, top_k=3)
    x = torch.randn(2, 5, 16)
    plain = encoder(x)
    encoder.self_attn.remember(torch.randn(1, 40, 16))
    out = encoder(x)
    assert not torch.allclose(out, plain, atol=1e-3)
    out.square().sum().backward()
    grads = [p.grad.clone() for p in encoder.parameters()]
    assert all(g.abs().sum() > 0 for g in grads[:3])
    encoder.zero_grad()
    from torch.utils.checkpoint import checkpoint

    checkpoint(encoder, x, use_reentrant=False).square().sum().backward()
    for p, g in zip(encoder.parameters(), grads):
        torch.testing.assert_close(p.grad, g)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), out.detach())  # not its fused way
    half = copy.deepcopy(encoder.self_attn).to(torch.bfloat16)
    assert half(x.to(torch.bfloat16))[0].dtype == torch.bfloat16
    assert "top_k=3" in repr(encoder.self_attn)
