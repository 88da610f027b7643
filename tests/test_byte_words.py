"""lutra.address.word_offsets and lutra.nn.ByteWordPooling."""

from __future__ import annotations

import copy
import pickle
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lutra

torch = pytest.importorskip("torch")
ByteWordPooling = lutra.nn.ByteWordPooling
words = lutra.address.word_offsets

PATTERNS = {  # what a style means, as a regular expression over bytes
    "space": rb"(?s)^[ \t\n\v\f\r]+[^ \t\n\v\f\r]*[ \t\n\v\f\r]*|[^ \t\n\v\f\r]+[ \t\n\v\f\r]*",
    "leading": rb"[ \t\n\v\f\r]+[^ \t\n\v\f\r]*|[^ \t\n\v\f\r]+",
    "spacebyte": rb"(?:(?<![^0-9A-Za-z\x80-\xbf])|^)[0-9A-Za-z\x80-\xbf]*[^0-9A-Za-z\x80-\xbf]|.+",
}


def by_loop(text, style):
    """Offsets, one byte at a time."""

    def inside(b):
        return chr(b).isalnum() if b < 128 else 0x80 <= b < 0xC0

    starts, seen = [], False
    for i, b in enumerate(text):
        space, before = b in b" \t\n\v\f\r", i > 0 and text[i - 1] in b" \t\n\v\f\r"
        if i == 0:
            new = True
        elif style == "space":
            new = not space and before and seen
        elif style == "leading":
            new = space and not before
        else:
            new = not inside(text[i - 1]) and (i < 2 or inside(text[i - 2]))
        seen = seen or not space
        if new:
            starts.append(i)
    return [*starts, len(text)]


TEXT = b"  To be,  or not\n\n to be: \xc3\xa9t\xc3\xa9 3.14 "


@pytest.mark.parametrize("style", sorted(PATTERNS))
def test_word_offsets_of_a_text(style):
    want = by_loop(TEXT, style)
    assert words(TEXT, style).tolist() == want
    assert words(np.frombuffer(TEXT, np.uint8), style).dtype == np.int64
    assert words(torch.frombuffer(bytearray(TEXT), dtype=torch.uint8), style).tolist() == want
    assert words(np.frombuffer(TEXT, np.uint8).astype(np.int64), style).tolist() == want
    if style != "spacebyte":
        starts = [m.start() for m in re.finditer(PATTERNS[style], TEXT)]
        assert starts == want[:-1]
    for short in (b"", b" ", b"a", b"  ", b" a", b"a ", b"ab", b"."):
        assert words(short, style).tolist() == by_loop(short, style)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(b" \n.aZ9\xc3\xa9"), max_size=12), min_size=1, max_size=4),
    st.sampled_from(sorted(PATTERNS)), st.sampled_from([None, 0, 1, 3, 20]),
)  # fmt: skip
def test_batches(texts, style, most):
    length = max(map(len, texts)) + 1
    data = np.full((len(texts), length), ord(" "), np.uint8)
    for row, text in zip(data, texts):
        row[: len(text)] = text
    lengths = np.array([len(t) for t in texts])
    got = words(data, style, lengths, most)
    torch_got = words(torch.from_numpy(data), style, torch.from_numpy(lengths), most)
    assert torch_got.tolist() == got.tolist()
    each = [by_loop(bytes(t), style) if t else [0] for t in texts]
    wide = max(len(e) - 1 for e in each) if most is None else most
    assert got.shape == (len(texts), wide + 1)
    for row, offsets, text in zip(got.tolist(), each, texts):
        assert row == (offsets + [len(text)] * (wide + 1))[: wide + 1]


def test_bad_texts():
    with pytest.raises(TypeError, match="data has dtype float32"):
        words(np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="data must be bytes"):
        words("text")
    with pytest.raises(ValueError, match="style must be one of"):
        words(b"a", "word")
    with pytest.raises(ValueError, match="for 2-d data"):
        words(b"a", max_words=3)
    with pytest.raises(ValueError, match=r"lengths\[1\] is 5; it must lie in \[0, 4\]"):
        words(np.zeros((2, 4), np.uint8), lengths=np.array([0, 5]))
    with pytest.raises(ValueError, match=r"lengths has shape \(3,\)"):
        words(np.zeros((2, 4), np.uint8), lengths=np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="data must be 1-d or 2-d"):
        words(np.zeros((2, 4, 1), np.uint8))


# ---------------------------------------------------------------- pooling
def by_words(layer, data, offsets):
    """The definition: a word at a time, a byte at a time."""
    rows = []
    weight = layer.weight
    for begin, end in pairwise(offsets):
        vectors = []
        for i in range(begin, end):
            if layer.skip is not None and layer.skip[data[i]]:
                continue
            row = weight[data[i]]
            if layer.max_positions:
                row = row + weight[layer.num_embeddings + min(i - begin, layer.max_positions - 1)]
            vectors.append(row)
        if not vectors:
            rows.append(torch.zeros_like(weight[0]))
            continue
        v = torch.stack(vectors)
        if layer.mode == "attention":
            p = torch.softmax(v @ layer.query / layer.embedding_dim**0.5, 0)
            rows.append((p[:, None] * v).sum(0))
        else:
            rows.append({"sum": v.sum(0), "mean": v.mean(0), "max": v.amax(0)}[layer.mode])
    return torch.stack(rows)


@pytest.mark.parametrize("mode", ["sum", "mean", "max", "attention"])
@pytest.mark.parametrize("positions", [0, 1, 3])
@pytest.mark.parametrize("ignore", [None, b" \n"])
def test_equals_the_definition(mode, positions, ignore):
    torch.manual_seed(0)
    for size in (256, 300):
        layer = ByteWordPooling(7, mode, num_embeddings=size, max_positions=positions, ignore=ignore).double()
        for repeat in (1, 40):  # few bytes and more than there are pairs of byte and place
            text = torch.tensor(list(TEXT * repeat), dtype=torch.uint8)
            offsets = words(text)
            want = by_words(layer, text.tolist(), offsets.tolist())
            got = layer(text)
            torch.testing.assert_close(got, want)
            if repeat == 1:
                g = torch.randn_like(want)
                parameters = list(layer.parameters())
                for a, b in zip(
                    torch.autograd.grad(got, parameters, g), torch.autograd.grad(want, parameters, g)
                ):
                    torch.testing.assert_close(a, b)
                single = copy.deepcopy(layer).float()
                torch.testing.assert_close(single(text), want.float(), atol=1e-5, rtol=1e-5)
    # given words that leave bytes out at both ends, and an empty one
    given_offsets = torch.tensor([3, 5, 5, 9])
    got = layer(text, given_offsets)
    torch.testing.assert_close(got, by_words(layer, text.tolist(), given_offsets.tolist()))


@pytest.mark.parametrize("mode", ["sum", "mean", "max", "attention"])
@pytest.mark.parametrize("positions", [0, 4])
def test_a_padded_batch_is_its_texts(mode, positions):
    torch.manual_seed(0)
    layer = ByteWordPooling(5, mode, max_positions=positions, ignore=b" ")
    texts = [b"to be, or not", b"", b"that ", b" is the question: whether"]
    batch = torch.randint(0, 256, (4, 30), dtype=torch.uint8)
    for row, text in zip(batch, texts):
        row[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    lengths = torch.tensor([len(t) for t in texts])
    out = layer(batch, lengths=lengths)
    assert out.shape == (4, 4, 5)
    for row, text in zip(out, texts):
        n = len(words(text)) - 1
        if n:
            torch.testing.assert_close(row[:n], layer(torch.tensor(list(text), dtype=torch.uint8)))
        assert not row[n:].any()
    offsets = words(batch, lengths=lengths, max_words=6)
    assert torch.equal(layer(batch, offsets)[:, :4], out) and layer(batch, offsets).shape == (4, 6, 5)
    assert torch.equal(layer(batch.long(), offsets), layer(batch, offsets))
    assert layer(batch[:0], offsets[:0]).shape == (0, 6, 5)


@pytest.mark.parametrize("mode", ["mean", "max", "attention"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_copies_and_files(mode, dtype):
    torch.manual_seed(0)
    layer = ByteWordPooling(8, mode, max_positions=4, ignore=b" ")
    text = torch.tensor(list(TEXT), dtype=torch.uint8)
    want = layer(text)
    half = copy.deepcopy(layer).to(dtype)(text)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), want, atol=0.06, rtol=0.02)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(text), want)
    other = ByteWordPooling(8, mode, max_positions=4, ignore=b" ")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(text), want)


@pytest.mark.traces
@pytest.mark.parametrize("mode", ["mean", "max", "attention"])
def test_compile(mode):
    layer = ByteWordPooling(8, mode, max_positions=4, ignore=b" ")
    batch = torch.tensor([list(TEXT), list(TEXT[::-1])], dtype=torch.uint8)
    lengths = torch.tensor([20, 30])

    def run(x, n):
        return layer(x, words(x, lengths=n, max_words=9))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch, lengths), run(batch, lengths))


def test_bad_input():
    layer = ByteWordPooling(4)
    text = torch.tensor([1, 2, 3], dtype=torch.uint8)
    for offsets in ([0, 4], [-1, 2], [2, 1]):
        with pytest.raises(IndexError, match=r"offsets\[\d\] is"):
            layer(text, torch.tensor(offsets))
    with pytest.raises(IndexError, match=r"offsets\[1, 1\] is 4"):
        layer(text.repeat(2, 1), torch.tensor([[0, 3], [0, 4]]))
    with pytest.raises(IndexError):
        layer(torch.tensor([1, 256]))
    with pytest.raises(TypeError, match="input has dtype"):
        layer(text.float())
    with pytest.raises(TypeError, match="offsets has dtype"):
        layer(text, torch.tensor([0.0, 3.0]))
    with pytest.raises(ValueError, match=r"it must be \(2, 'words \+ 1'\)"):
        layer(text.repeat(2, 1), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="lengths goes with words"):
        layer(text.repeat(2, 1), torch.tensor([[0, 3], [0, 3]]), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="mode must be one of"):
        ByteWordPooling(4, "median")
    with pytest.raises(ValueError, match="ignore must be in"):
        ByteWordPooling(4, ignore=[256])


def test_shakespeare(data_folder):
    """Every byte of 1.1 MB counts once: sums of words add up to the sum of the text."""
    raw = (data_folder / "tinyshakespeare.txt").read_bytes()
    text = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    offsets = words(text)
    assert len(offsets) - 1 == len(raw.split())
    layer = ByteWordPooling(16, "sum")
    total = torch.bincount(text, minlength=256).double() @ layer.weight.double()
    torch.testing.assert_close(layer(text, offsets).double().sum(0), total, rtol=1e-4, atol=1e-2)
