"""as_tokens: every form in which encoders give token vectors."""

import numpy as np
import pytest

from lutra.index import as_tokens

LENGTHS = (3, 0, 5, 1)


def documents(dtype=np.float32, d=4):
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((n, d)) * 50).astype(dtype) for n in LENGTHS]


def padded(docs):
    x = np.full((len(docs), max(map(len, docs)), docs[0].shape[1]), 7, docs[0].dtype)
    mask = np.zeros(x.shape[:2], bool)
    for i, doc in enumerate(docs):
        x[i, : len(doc)], mask[i, : len(doc)] = doc, True
    return x, mask


def check(result, docs):
    tokens, ptr = result
    assert isinstance(tokens, np.ndarray) and ptr.dtype == np.int64
    np.testing.assert_array_equal(tokens, np.concatenate(docs))
    np.testing.assert_array_equal(ptr, np.cumsum([0, *map(len, docs)]))
    assert tokens.dtype == docs[0].dtype


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.int8, np.uint8])
def test_lists(dtype):
    docs = documents(dtype)
    check(as_tokens(docs), docs)
    check(as_tokens(docs, 4), docs)
    check(as_tokens(tuple(docs)), docs)
    check(as_tokens((docs[0], docs[2])), [docs[0], docs[2]])  # not (tokens, ptr)
    objects = np.empty(len(docs), object)
    objects[:] = docs
    check(as_tokens(objects), docs)


def test_masks():
    docs = documents()
    x, mask = padded(docs)
    for given in (mask, mask.astype(np.int64), mask.astype(np.uint8), mask.tolist()):
        check(as_tokens(x, 4, given), docs)
    check(as_tokens({"token_embeddings": x, "attention_mask": mask.astype(int), "input_ids": None}), docs)
    check(
        as_tokens({"token_embeddings": list(x), "masks": list(mask), "attention_mask": list(mask | True)}),
        docs,
    )
    check(
        as_tokens([{"token_embeddings": a, "attention_mask": m.astype(int)} for a, m in zip(x, mask)]), docs
    )
    check(as_tokens([{"token_embeddings": doc} for doc in docs]), docs)
    inside = mask.copy()
    inside[2, 1] = False  # a mask need not end where it begins to be false
    expected = [docs[0], docs[1], np.delete(docs[2], 1, 0), docs[3]]
    check(as_tokens(x, mask=inside), expected)
    tokens, ptr = as_tokens(docs)
    check(as_tokens((tokens, ptr), mask=inside[mask]), expected)
    check(as_tokens(docs, mask=[m[: len(doc)] for m, doc in zip(inside, docs)]), expected)
    check(as_tokens(x, mask=np.zeros_like(mask)), [doc[:0] for doc in docs])


def test_what_is_not_copied():
    docs = documents()
    x, mask = padded(docs)
    tokens, ptr = as_tokens(docs)
    again = as_tokens((tokens, ptr), 4)
    assert again[0] is tokens and again[1] is ptr
    assert as_tokens((tokens, ptr), mask=np.ones(len(tokens), bool))[0] is tokens
    assert as_tokens([tokens])[0] is tokens
    for given in (None, np.ones_like(mask)):
        flat, ends = as_tokens(x, mask=given)
        assert np.shares_memory(flat, x) and ends.tolist() == [0, 5, 10, 15, 20]
    for other in (ptr.astype(np.int32), ptr.tolist(), ptr.astype(np.uint64)):
        flat, ends = as_tokens((tokens, other))
        assert flat is tokens and ends.dtype == np.int64 and ends.tolist() == ptr.tolist()


def test_no_documents():
    with pytest.raises(ValueError, match="no documents"):
        as_tokens([])
    tokens, ptr = as_tokens([], 4)
    assert tokens.shape == (0, 4) and ptr.tolist() == [0]
    tokens, ptr = as_tokens((np.empty((0, 4), np.float32), [0]))
    assert tokens.shape == (0, 4) and ptr.tolist() == [0]
    tokens, ptr = as_tokens(np.empty((0, 6, 4), np.float32))
    assert tokens.shape == (0, 4) and ptr.tolist() == [0]
    tokens, ptr = as_tokens(np.empty((2, 0, 4), np.float32))
    assert tokens.shape == (0, 4) and ptr.tolist() == [0, 0, 0]


def test_torch():
    torch = pytest.importorskip("torch")
    docs = documents()
    x, mask = padded(docs)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors = [torch.from_numpy(doc).to(dtype) for doc in docs]
        whole = torch.cat(tensors)
        end = np.cumsum([0, *LENGTHS]).tolist()
        dense = torch.from_numpy(x).to(dtype)
        for result in (
            as_tokens(tensors),
            as_tokens(dense, mask=torch.from_numpy(mask)),
            as_tokens(dense, mask=torch.from_numpy(mask).long()),
            as_tokens(dense, mask=mask),
            as_tokens((whole, torch.tensor(end))),
            as_tokens((whole, end)),
            as_tokens((whole, np.array(end))),
            as_tokens((whole, torch.tensor(end, dtype=torch.int32))),
            as_tokens(tensors, mask=[torch.ones(n) > 0 for n in LENGTHS]),
        ):
            assert torch.equal(result[0], whole) and result[0].dtype == dtype
            assert isinstance(result[1], torch.Tensor) and result[1].dtype == torch.int64
            assert result[1].tolist() == end
    tokens, ptr = torch.cat(tensors), torch.tensor(end)
    again = as_tokens((tokens, ptr))
    assert again[0] is tokens and again[1] is ptr
    assert as_tokens(dense)[0].data_ptr() == dense.data_ptr()


def test_nested_tensors():
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(doc) for doc in documents() if len(doc)]
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.nested_tensor(tensors, layout=layout)
        tokens, ptr = as_tokens(nested, 4)
        assert torch.equal(tokens, torch.cat(tensors)) and ptr.tolist() == [0, 3, 8, 9]
        if layout is torch.jagged:
            assert tokens.data_ptr() == nested.values().data_ptr()


@pytest.mark.cuda
def test_cuda():
    torch = pytest.importorskip("torch")
    docs = documents()
    x, mask = padded(docs)
    for result in (
        as_tokens([torch.from_numpy(doc).cuda() for doc in docs]),
        as_tokens(torch.from_numpy(x).cuda(), mask=torch.from_numpy(mask)),
        as_tokens((torch.from_numpy(np.concatenate(docs)).cuda(), np.cumsum([0, *LENGTHS]))),
    ):
        assert result[0].is_cuda and result[1].is_cuda
        check([a.cpu().numpy() for a in result], docs)


X = np.zeros((5, 4), np.float32)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "x must be a list of arrays", lambda: as_tokens(None)),
        (TypeError, "x must be a list of arrays", lambda: as_tokens("documents")),
        (TypeError, r"x\[0\] must be a NumPy, torch or CuPy array", lambda: as_tokens([[[1.0, 2.0]]])),
        (TypeError, "without 'token_embeddings'", lambda: as_tokens({"sentence_embedding": X})),
        (ValueError, r"give \[x\] where it is one document", lambda: as_tokens(X)),
        (ValueError, "3-d", lambda: as_tokens(np.zeros((1, 2, 3, 4), np.float32))),
        (ValueError, r"x\[1\] must be 2-d", lambda: as_tokens([X, X[0]])),
        (
            ValueError,
            r"x\[1\] has vectors of 3 dimensions; they must have d = 4",
            lambda: as_tokens([X, X[:, :3]]),
        ),
        (ValueError, "encode without padding", lambda: as_tokens([X[None], X[None]])),
        (ValueError, "must have d = 5", lambda: as_tokens([X], 5)),
        (ValueError, "must have d = 5", lambda: as_tokens((X, [0, 5]), 5)),
        (ValueError, "must have d = 5", lambda: as_tokens(X[None], 5)),
        (TypeError, r"x\[1\] has dtype float64", lambda: as_tokens([X, X.astype(float)])),
        (TypeError, "dtype int64", lambda: as_tokens([X.astype(int)])),
        (ValueError, "must rise", lambda: as_tokens((X, [0, 3, 2, 5]))),
        (ValueError, "must begin with 0", lambda: as_tokens((X, [1, 5]))),
        (ValueError, "must end with the number of tokens, 5", lambda: as_tokens((X, [0, 4]))),
        (TypeError, "ptr must be integers", lambda: as_tokens((X, [0.0, 5.0]))),
        (ValueError, "ptr must be 1-d", lambda: as_tokens((X, np.empty(0, np.int64)))),
        (ValueError, "2-d", lambda: as_tokens((X[0], [0, 4]))),
        (ValueError, "mask has shape", lambda: as_tokens(X[None], mask=np.ones((1, 4), bool))),
        (ValueError, "mask has shape", lambda: as_tokens((X, [0, 5]), mask=np.ones(4, bool))),
        (TypeError, "mask must hold bools", lambda: as_tokens(X[None], mask=np.ones((1, 5)))),
        (ValueError, "mask must be a list of 1 arrays", lambda: as_tokens([X], mask=np.ones((1, 5), bool))),
        (ValueError, r"mask\[0\] has shape", lambda: as_tokens([X], mask=[np.ones(4, bool)])),
    ],
)
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_several_libraries():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"x\[1\] is a torch tensor"):
        as_tokens([X, torch.zeros(2, 4)])
