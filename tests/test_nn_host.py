"""lutra.nn.HostEmbedding and HostEmbeddingBag against torch's layers."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from safetensors.torch import save_file  # noqa: E402

import lutra.nn  # noqa: E402

IDS = torch.tensor([[1, 2, 1], [9, 0, 3]])
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("padding_idx", (None, 2))
@pytest.mark.parametrize("sparse", (False, True))
def test_embedding(dtype, padding_idx, sparse):
    theirs = torch.nn.Embedding(10, 5, padding_idx, dtype=dtype, sparse=sparse)
    ours = lutra.nn.HostEmbedding.from_embedding(theirs)
    ours.sparse = sparse
    a, b = theirs(IDS), ours(IDS)
    assert b.dtype == dtype and torch.equal(a, b)
    for out in (a, b):
        (out * torch.arange(5).to(dtype)).sum().backward()
    got, want = ours.table.grad, theirs.weight.grad
    assert got.is_sparse == sparse
    assert torch.allclose(got.to_dense().double(), want.to_dense().double(), rtol=1e-2)
    with torch.no_grad():
        assert torch.equal(ours(IDS), a)


@pytest.mark.parametrize("mode", ("sum", "mean", "max"))
def test_bag(mode):
    theirs = torch.nn.EmbeddingBag(10, 5, mode=mode, padding_idx=3)
    ours = lutra.nn.HostEmbeddingBag.from_embedding(theirs)
    flat, offsets = IDS.reshape(-1), torch.tensor([0, 2, 2])
    weights = torch.rand(6) if mode == "sum" else None
    for arguments in ((IDS,), (flat, offsets, weights)):
        theirs.weight.grad = ours.table.grad = None
        a, b = theirs(*arguments), ours(*arguments)
        assert torch.allclose(a, b)
        for out in (a, b):
            out.square().sum().backward()
        assert torch.allclose(ours.table.grad.to_dense(), theirs.weight.grad, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sparse", (False, True))
@pytest.mark.parametrize("norm_type", (1.0, 2.0))
def test_max_norm_and_scale_grad_by_freq(dtype, sparse, norm_type, tmp_path):
    """torch's Embedding: results, gradients, and the table afterwards; of a file, the same results."""
    theirs = torch.nn.Embedding(
        10, 5, padding_idx=3, max_norm=1.5, norm_type=norm_type, scale_grad_by_freq=True, dtype=dtype
    )
    ours = lutra.nn.HostEmbedding.from_embedding(theirs)
    assert f"max_norm=1.5{f', norm_type={norm_type}' * (norm_type != 2)}, scale_grad" in repr(ours)
    ours.sparse = sparse
    ours.save(tmp_path / "t.safetensors")
    mapped = lutra.nn.HostEmbedding(path=tmp_path / "t.safetensors", max_norm=1.5, norm_type=norm_type)
    untouched = mapped.table.clone()
    a, b = theirs(IDS), ours(IDS)
    assert torch.equal(a, b) and torch.equal(ours.table, theirs.weight)
    assert torch.equal(mapped(IDS), a) and torch.equal(mapped.table, untouched)
    for out in (a, b):
        (out * torch.arange(5).to(dtype)).sum().backward()
    assert ours.table.grad.is_sparse == sparse
    torch.testing.assert_close(ours.table.grad.to_dense(), theirs.weight.grad)
    assert ours(IDS[:0]).shape == mapped(IDS[:0]).shape == (0, 3, 5)


@pytest.mark.parametrize("mode", ("sum", "mean", "max"))
def test_bag_max_norm_and_scale_grad_by_freq(mode, tmp_path):
    theirs = torch.nn.EmbeddingBag(10, 5, mode=mode, padding_idx=3, max_norm=1.5)
    ours = lutra.nn.HostEmbeddingBag.from_embedding(theirs)
    assert (ours.max_norm, ours.mode, ours.padding_idx) == (1.5, mode, 3)
    ours.save(tmp_path / "t.safetensors")
    mapped = lutra.nn.HostEmbeddingBag(
        path=tmp_path / "t.safetensors", mode=mode, padding_idx=3, max_norm=1.5
    )
    ours.scale_grad_by_freq = mode != "max"
    flat, offsets = IDS.reshape(-1), torch.tensor([0, 2, 2])
    weights = torch.rand(6) if mode == "sum" else None
    for arguments in ((IDS,), (flat, offsets, weights)):
        theirs.weight.grad = ours.table.grad = None
        given = mapped(*arguments)  # before the others shorten rows
        a, b = theirs(*arguments), ours(*arguments)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, given)
        assert torch.equal(ours.table, theirs.weight)
        for out in (a, b):
            out.square().sum().backward()
        want = theirs.weight.grad  # torch's EmbeddingBag divides by the wrong counts
        if mode != "max":
            want = want / torch.bincount(flat, minlength=10).clamp(min=1).unsqueeze(1)
        torch.testing.assert_close(ours.table.grad.to_dense(), want)


def test_signatures_are_torchs():
    import inspect

    for ours, theirs in (
        (lutra.nn.HostEmbedding, torch.nn.Embedding),
        (lutra.nn.HostEmbeddingBag, torch.nn.EmbeddingBag),
    ):
        for method in ("__init__", "from_pretrained"):
            mine = inspect.signature(getattr(ours, method)).parameters
            known = inspect.signature(getattr(theirs, method)).parameters
            want = [name for name in known if not name.startswith("_")]
            got = [name for name, p in mine.items() if p.kind is not p.KEYWORD_ONLY]
            assert got == want
            for name in set(want) - {"sparse", "num_embeddings", "embedding_dim", "self"}:
                assert mine[name].default == known[name].default


def test_nothing_moves_or_casts_the_table():
    layer = lutra.nn.HostEmbedding(10, 4)
    model = torch.nn.Sequential(layer, torch.nn.Linear(4, 2))
    before = layer.table.data_ptr()
    model.to(torch.bfloat16)
    assert layer.table.data_ptr() == before and layer.table.dtype == torch.float32
    assert layer(IDS).dtype == torch.bfloat16 and model(IDS).dtype == torch.bfloat16
    model.to("meta")
    assert layer.table.device.type == "cpu" and layer.weight.device.type == "meta"
    assert all(p.numel() in (0, 8, 2) for p in model.parameters())


def test_training_touches_only_its_rows():
    layer = lutra.nn.HostEmbedding(10, 4)
    before = layer.table.detach().clone()
    optimizer = torch.optim.SparseAdam([layer.table], lr=0.1)
    layer(torch.tensor([3, 7])).sum().backward()
    optimizer.step()
    changed = (layer.table.detach() != before).any(1).nonzero().squeeze(1)
    assert changed.tolist() == [3, 7]


@pytest.mark.parametrize("dtype", FLOATS)
def test_file(tmp_path, dtype):
    path = tmp_path / "t.safetensors"
    layer = lutra.nn.HostEmbedding(100, 7, dtype=dtype)
    layer.save(path)
    mapped = lutra.nn.HostEmbedding(path=path)
    assert mapped.mapped and (mapped.num_embeddings, mapped.embedding_dim) == (100, 7)
    assert torch.equal(mapped(IDS), layer(IDS)) and not mapped(IDS).requires_grad
    bags = lutra.nn.HostEmbeddingBag(path=path, mode="sum")
    assert torch.allclose(bags(IDS).float(), mapped(IDS).float().sum(1), atol=0.1)
    assert torch.allclose(bags(IDS).float(), mapped(IDS).float().sum(1), rtol=0.02, atol=0.02)
    content = path.read_bytes()
    mapped.table[0] = 5  # reaches no file
    assert path.read_bytes() == content
    for copied in (copy.deepcopy(mapped), pickle.loads(pickle.dumps(mapped))):
        assert copied.mapped and torch.equal(copied(IDS[0]), layer(IDS[0]))
    assert len(pickle.dumps(mapped)) < 5000
    assert list(mapped.state_dict()) == ["weight"]
    mapped.load_state_dict(mapped.state_dict())


def test_a_large_file_is_not_read(tmp_path):
    """A sparse file of 64 GB, more than this machine's memory: only the pages of the rows are read."""
    import json

    rows, dim = 1 << 28, 64
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [rows, dim], "data_offsets": [0, rows * dim * 4]}}
    ).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / "large.safetensors"
    try:
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + rows * dim * 4)
        layer = lutra.nn.HostEmbedding(path=path)
    except OSError as error:
        pytest.skip(f"no file of 64 GB can be mapped here: {error}")
    assert not layer(torch.tensor([0, rows - 1])).any()


def test_state_dict():
    a, b = lutra.nn.HostEmbedding(10, 4), lutra.nn.HostEmbedding(10, 4)
    assert set(a.state_dict()) == {"table", "weight"}
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.table, b.table) and b.table.requires_grad
    with pytest.raises(RuntimeError, match="table has shape"):
        lutra.nn.HostEmbedding(9, 4).load_state_dict(a.state_dict())
    with pytest.raises(RuntimeError, match=r"[Mm]issing"):
        b.load_state_dict({})
    model = torch.nn.Sequential(lutra.nn.HostEmbedding(10, 4))
    model.load_state_dict({"0.table": a.table, "0.weight": a.weight})
    assert torch.equal(model[0].table, a.table)


def test_copies():
    layer = lutra.nn.HostEmbedding(10, 4, padding_idx=-1)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied.table, layer.table) and copied.table.data_ptr() != layer.table.data_ptr()
        assert copied.padding_idx == 9 and not copied(torch.tensor([9])).any()


def test_bad_input(tmp_path):
    layer = lutra.nn.HostEmbedding(10, 4)
    for bad in (10, -1):
        with pytest.raises(IndexError):
            layer(torch.tensor([bad]))
        with pytest.raises(IndexError):
            lutra.nn.HostEmbeddingBag(10, 4)(torch.tensor([[bad]]))
    with pytest.raises(TypeError, match="int64 or int32"):
        layer(torch.zeros(3))
    with pytest.raises(TypeError, match="missing"):
        lutra.nn.HostEmbedding(10)
    with pytest.raises(ValueError, match="padding_idx"):
        lutra.nn.HostEmbedding(10, 4, 10)
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.zeros(3, 2), "b": torch.ones(4, 2), "c": torch.zeros(3)}, path)
    assert lutra.nn.HostEmbedding(path=path, name="b").num_embeddings == 4
    with pytest.raises(ValueError, match="name one of"):
        lutra.nn.HostEmbedding(path=path)
    with pytest.raises(ValueError, match="no floating point tensor 'c'"):
        lutra.nn.HostEmbedding(path=path, name="c")
    with pytest.raises(ValueError, match=r"holds \(4, 2\)"):
        lutra.nn.HostEmbedding(5, 2, path=path, name="b")
    save_file({"b": torch.ones(4, 2)}, path)
    whole = path.read_bytes()
    for cut in (0, 4, 20, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cannot be mapped"):
            lutra.nn.HostEmbedding(path=path, name="b")
    with pytest.raises(FileNotFoundError):
        lutra.nn.HostEmbedding(path=tmp_path / "none")
    with pytest.raises(ValueError, match="mode 'max' does not support scale_grad_by_freq"):
        lutra.nn.HostEmbeddingBag(10, 4, mode="max", scale_grad_by_freq=True)(IDS)
    with pytest.raises(IndexError):
        lutra.nn.HostEmbeddingBag(10, 4, max_norm=1.0)(torch.tensor([[10]]))
