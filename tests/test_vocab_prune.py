"""lutra.vocab.prune, count_tokens and map_ids."""

from __future__ import annotations

import numpy as np
import pytest

import lutra
from lutra.compress import FORMATS
from lutra.vocab import count_tokens, map_ids, prune

TABLE = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
COUNTS = np.array([0, 5, 0, 2, 1, 5, 0, 9] + [0] * 30 + [3, 0])


def test_what_is_kept():
    for options, want in (
        ({}, [1, 3, 4, 5, 7, 38]),
        ({"min_count": 3}, [1, 5, 7, 38]),
        ({"min_count": 3, "special": [0, 39, 1]}, [0, 1, 5, 7, 38, 39]),
        ({"rows": 3}, [1, 5, 7]),
        ({"rows": 2}, [1, 7]),  # of two with five, the lower
        ({"rows": 4, "special": np.array([0, 2])}, [0, 1, 2, 7]),
        ({"min_count": 0}, list(range(40))),
        ({"min_count": 100, "special": [3]}, [3]),
    ):
        got = prune(TABLE, COUNTS, **options)
        assert got.kept.tolist() == want, options
        assert np.array_equal(got.table, TABLE[want]) and got.exact
        assert [got.id_map[i] for i in want] == list(range(len(want)))
        assert (got.id_map >= 0).sum() == len(want) and got.id_map.shape == (40,)
    assert prune(TABLE, special=[5, 2]).kept.tolist() == [2, 5]
    assert prune(TABLE, COUNTS.tolist(), rows=1).kept.tolist() == [7]


def test_vocab_and_ids():
    got = prune(TABLE, COUNTS, special=[0])
    assert got.vocab({"pad": 0, "a": 1, "b": 2, "c": 38}) == {"pad": 0, "a": 1, "c": 6}
    with pytest.raises(IndexError, match=r"vocab\['z'\] is 40"):
        got.vocab({"z": 40})
    ids = np.array([[1, 7], [0, 38]], np.int32)
    new = map_ids(ids, got)
    assert new.dtype == np.int32 and new.tolist() == [[1, 5], [0, 6]]
    assert np.array_equal(got.table[new], TABLE[ids])
    with pytest.raises(ValueError, match=r"ids\[1, 0\] is 2, a token that was pruned, as are 2 of 4 ids"):
        map_ids(np.array([[1, 7], [2, 39]]), got)
    assert map_ids(np.array([[1, 7], [2, 39]]), got.id_map, unk=0).tolist() == [[1, 5], [0, 0]]
    with pytest.raises(IndexError, match=r"ids\[2\] is 40; ids must lie in \[0, 40\)"):
        map_ids(np.array([1, 1, 40]), got, unk=0)
    with pytest.raises(IndexError, match=r"ids\[0\] is -1"):
        map_ids(np.array([-1]), got, unk=0)
    with pytest.raises(ValueError, match="unk must be in"):
        map_ids(np.array([2]), got, unk=7)
    with pytest.raises(TypeError, match="ids has dtype float64"):
        map_ids(np.array([1.0]), got)
    with pytest.raises(TypeError, match="id_map must be a 1-d array"):
        map_ids(np.array([1]), np.zeros((2, 2), np.int64))
    assert map_ids(np.zeros((0, 3), np.int64), got).shape == (0, 3)


def test_counting():
    torch = pytest.importorskip("torch")
    want = [1, 2, 0, 1]
    assert count_tokens(np.array([[0, 1], [1, 3]]), 4).tolist() == want
    assert count_tokens(torch.tensor([[0, 1], [1, 3]]), 4).tolist() == want
    assert count_tokens(iter([[0, 1], [], torch.tensor([1]), np.array([3], np.uint8)]), 4).tolist() == want
    assert count_tokens([], 3).tolist() == [0, 0, 0]
    with pytest.raises(IndexError, match=r"ids holds 4; ids must lie in \[0, 4\)"):
        count_tokens([[0, 4]], 4)
    with pytest.raises(IndexError, match="ids holds -1"):
        count_tokens(np.array([-1]), 4)
    with pytest.raises(TypeError, match="ids must be integers"):
        count_tokens(np.array([1.0]), 4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_torch(dtype):
    torch = pytest.importorskip("torch")
    table = torch.from_numpy(TABLE).to(getattr(torch, dtype))
    got = prune(table, torch.from_numpy(COUNTS))
    assert torch.equal(got.table, table[got.kept]) and got.table.dtype == table.dtype
    ids = torch.tensor([[1, 7]])
    assert torch.equal(map_ids(ids, got), torch.tensor([[0, 4]]))
    for cls in (torch.nn.Embedding, torch.nn.EmbeddingBag, lutra.nn.Embedding, lutra.nn.EmbeddingBag):
        layer = cls(40, 6, padding_idx=2, max_norm=2.5, dtype=table.dtype)
        layer.weight.requires_grad_(cls is torch.nn.Embedding)
        layer.eval()
        before = layer.weight.detach().clone()
        new = prune(layer, COUNTS)
        assert type(new.table) is cls and new.table.padding_idx == 1 and new.table.num_embeddings == 7
        assert new.table.max_norm == 2.5 and not new.table.training
        assert new.table.weight.requires_grad == layer.weight.requires_grad
        assert torch.equal(new.table.weight, layer.weight[new.kept]) and torch.equal(layer.weight, before)
        if dtype in ("float32", "float64"):
            assert torch.equal(new.table(map_ids(ids, new)), layer(ids))
        assert layer.num_embeddings == 40 and layer.padding_idx == 2


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_compressed(name):
    """Every format: to the bit where each row has its own codes, else encoded again."""
    torch = pytest.importorskip("torch")
    import format_checks

    shape = format_checks.SHAPES[0]
    table = format_checks.table(name, shape)
    if table is None:
        pytest.skip(f"{name} stores no table of {shape}")
    counts = np.random.default_rng(1).integers(0, 9, shape[0])
    counts[:3] = 0
    try:
        got = prune(table, counts)
    except ValueError as error:  # parameters that do not fit the smaller table
        assert "must" in str(error)
        pytest.skip(f"{name} cannot store the smaller table: {error}")
    assert got.table.format.name == name and got.table.shape == (len(got.kept), shape[1])
    old, new = np.asarray(table[got.kept], np.float32), np.asarray(got.table.decode(), np.float32)
    if got.exact:
        assert np.array_equal(old, new)
        assert got.table.nbytes <= table.nbytes
    else:
        assert np.square(old - new).sum() < np.square(old).sum()
    layer = getattr(lutra.nn, f"{table.format.layer}Embedding").from_table(
        table, padding_idx=1, dtype=torch.float32
    )
    try:
        pruned = prune(layer, counts)
    except ValueError:
        return
    assert type(pruned.table) is type(layer) and pruned.table.padding_idx == pruned.id_map[1] >= 0
    ids = torch.from_numpy(pruned.kept)
    a, b = pruned.table(map_ids(ids, pruned)), layer(ids)
    assert torch.equal(a, b) if pruned.exact else a.shape == b.shape


def test_low_rank_is_cut_not_encoded_again():
    table = lutra.compress.encode(TABLE, "low_rank", rank=3)
    got = prune(table, COUNTS)
    assert got.exact and np.shares_memory(got.table.data["basis"], table.data["basis"])


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"special": [40]}, IndexError, r"special holds 40"),
        ({"special": [-1]}, IndexError, r"special holds -1"),
        ({"special": [1.5]}, TypeError, r"special must be an integer"),
        ({"counts": COUNTS[:3]}, ValueError, r"counts has shape \(3,\)"),
        ({"counts": -COUNTS}, ValueError, r"not negative"),
        ({"rows": 1, "special": [1, 2]}, ValueError, r"rows is 1; there are 2 special tokens"),
        ({"rows": 0}, ValueError, r"rows must be >= 1"),
        ({"min_count": 100}, ValueError, r"no token would be left"),
        ({"min_count": 1.5}, TypeError, r"min_count must be an integer"),
        ({"counts": None, "rows": 3}, ValueError, r"rows needs counts"),
        ({"source": TABLE.astype(np.int64)}, TypeError, r"source has dtype int64"),
        ({"source": [[1.0]]}, TypeError, r"source must be"),
    ],
)
def test_bad_arguments_are_named(options, error, text):
    with pytest.raises(error, match=text):
        prune(**{"source": TABLE, "counts": COUNTS, **options})


def test_a_real_table_and_text(data_folder):
    """tinyshakespeare by its bytes, as ids of a table of 256: 65 characters are used."""
    raw = np.frombuffer((data_folder / "tinyshakespeare.txt").read_bytes(), np.uint8).astype(np.int64)
    table = np.load(data_folder / "minilm_token_table_30522x384_f16.npy")[:256]
    got = prune(table, count_tokens(raw, 256), special=[0])
    assert got.table.shape == (66, 384) and got.table.dtype == np.float16
    assert np.array_equal(got.table[map_ids(raw, got)[:1000]], table[raw[:1000]])
