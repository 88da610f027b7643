"""torch.library.opcheck for ops without a sample in test_torch_dispatch.py: backward ops, updates in place,
output heads. And the rule itself: no op goes without."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
import op_checks  # noqa: E402
from test_gather_csr import make as csr_rows  # noqa: E402
from test_gather_pieces import ROWS, needs_kernel, source, table_for  # noqa: E402
from test_gather_senses import problem as senses_problem  # noqa: E402
from test_gather_train import SIZES as TRAINS  # noqa: E402
from test_gather_train import make as cores_of  # noqa: E402
from test_nn_tied_head import SHAPE  # noqa: E402
from test_nn_tied_head import layer as embedding  # noqa: E402
from test_torch_dispatch import NAMES as SAMPLED  # noqa: E402

import lutra  # noqa: E402
from lutra.gather._update import RULES, _numbers  # noqa: E402
from lutra.nn import _tiles  # noqa: E402

pytestmark = pytest.mark.traces
ops = torch.ops.lutra
BAGS = torch.tensor([[0, 3, 3], [6, 1, 0]])
FLAT, OFFSETS = torch.tensor([5, 0, 2, 2, 6]), torch.tensor([0, 2, 2])


def rand(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


def opcheck(op, args, **options):
    torch.library.opcheck(op.default, args, **options)


# ---------------------------------------------------------------- the rule
def test_every_op_is_given_to_opcheck():
    missing = op_checks.registered() - set(SAMPLED) - op_checks.named_in_tests()
    assert not missing, (
        f"no test gives {', '.join(sorted(missing))} to opcheck: add samples to test_torch_dispatch.py, "
        "or call opcheck(ops.NAME, ...) in the op's own test file"
    )


def test_what_counts_as_named():
    text = "opcheck(torch.ops.lutra.a.default, x)\ntorch.library.opcheck(ops.b, (1,))\n"
    text += "opcheck(op, x)\nops.c(x)\n# opcheck(ops.d, x)"
    assert set(op_checks.named(text)) == {"a", "b"}


# ---------------------------------------------------------------- gradients of bags
def test_gradients_of_csr_rows():
    values, indptr, columns = csr_rows(7, 16)
    for ids, offsets, n, dtype in ((BAGS, None, 2, torch.bfloat16), (FLAT, OFFSETS, 3, torch.float64)):
        values = values.to(dtype)
        grad, weights = rand(n, 16, dtype=dtype), rand(*ids.shape, dtype=dtype)
        mode, w = ("sum", weights) if offsets is None else ("mean", None)
        opcheck(ops.bag_csr_backward, (grad, indptr, columns, ids, offsets, w, mode, 0, False))
        opcheck(ops.bag_csr_weight_grad, (grad, values, indptr, columns, ids, offsets, 0, False))


@needs_kernel
@pytest.mark.parametrize(
    "kind, combine", [("codes", "concat"), ("hash", "sum"), ("qr", "product"), ("robe", "concat")]
)
def test_gradients_of_pieces(kind, combine):
    pieces, stored = source(kind, 4, 3, 5, combine)
    table, stored = table_for(pieces), None if stored is None else torch.from_numpy(stored)
    of = (pieces.kind, list(pieces.numbers), 4, combine, ROWS)
    for ids, offsets, n in ((BAGS, None, 2), (FLAT, OFFSETS, 3)):
        grad, weights = rand(n, pieces.dim), None if offsets is not None else rand(2, 3)
        mode = "mean" if weights is None else "sum"
        opcheck(
            ops.bag_pieces_backward,
            (grad, ids, offsets, weights, stored, None, table, *of, mode, 0, False),
        )
        opcheck(ops.piece_dots, (grad, table, ids, offsets, stored, *of, 0, False))


@pytest.mark.parametrize("gradient", ["hard", "straight_through", "softmax"])
@pytest.mark.parametrize("ragged", [False, True])
def test_gradients_of_senses(gradient, ragged):
    table, ids, context, offsets = senses_problem(9, ragged=ragged)
    best, grad = ops.senses(table, ids, context, offsets)[1], rand(*context.shape)
    for needs in ((True, True), (True, False), (False, True))[ragged : ragged + 2]:
        args = (grad, table, ids, context, best, offsets, gradient, 0.5, *needs)
        opcheck(ops.senses_backward, args)


def test_gradients_of_tensor_trains():
    cores = cores_of(*TRAINS[1])
    for ids, offsets, n in ((BAGS, None, 2), (FLAT, OFFSETS, 3)):
        grad, weights = rand(n, 6), None if offsets is not None else rand(2, 3)
        mode = "mean" if weights is None else "sum"
        opcheck(ops.tensor_train_backward, (grad, *cores, ids, offsets, weights, 11, mode, 0, False))
        opcheck(ops.tensor_train_weight_grad, (grad, *cores, ids, offsets, 11, 0, False))


# ---------------------------------------------------------------- updates in place
@pytest.mark.parametrize("rule", RULES)
def test_updates_of_rows_and_bags(rule):
    numbers = list(_numbers(rule, 0.1, 0.01, 0.9, (0.9, 0.99), 1e-6, 2))
    table = rand(7, 4)
    s0, s1 = (*lutra.gather.row_state(table, rule).values(), None, None)[:2]
    opcheck(ops.update_rows, (table.clone(), torch.tensor([3, 0, 3]), rand(3, 4), s0, s1, rule, numbers))
    more = (s0, s1, rule, numbers)
    opcheck(ops.update_bags, (table.clone(), rand(2, 4), BAGS, None, rand(2, 3), None, *more))
    opcheck(ops.update_bags, (table.clone(), rand(3, 4), FLAT, OFFSETS, None, None, *more, "mean", 0))
    half = table.bfloat16()
    opcheck(ops.update_rows, (half, torch.tensor([3, 0, 3]), rand(3, 4), s0, s1, rule, numbers, 5))


# ---------------------------------------------------------------- output heads
def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def test_heads_of_lookups():
    bits = 3
    tables, codes = rand(3, 5, 1 << bits), torch.randint(0, 255, (11, (3 * bits + 7) // 8), dtype=torch.uint8)
    targets, bias = torch.tensor([0, 10, 3, 3, 7]), rand(11)
    grad = rand(5)
    opcheck(ops.lookups_backward, (rand(5, 11), codes, 3, bits))
    for b, pads, pad, smoothing in ((bias, rand(5), 2, 0.1), (None, None, -1, 0.0)):
        opcheck(ops.lookups_cross_entropy, (tables, codes, targets, b, pads, bits, pad, smoothing))
        t, b, pads = leaves(tables, b, pads)
        opcheck(ops.lookups_cross_entropy, (t, codes, targets, b, pads, bits, pad, smoothing))
        t, b, pads = (None if x is None else x.detach() for x in (t, b, pads))
        lse = ops.lookups_cross_entropy(t, codes, targets, b, pads, bits, pad, smoothing)[1]
        opcheck(
            ops.lookups_cross_entropy_backward,
            (grad, t, codes, targets, lse, b, pads, bits, pad, smoothing),
        )


def test_heads_of_packed_rows():
    for kind, group in (("int8", None), ("nf4", 16)):
        packed = torch.from_numpy(lutra.gather.pack_rows(rand(11, 32).numpy(), kind, group))
        opcheck(ops.packed_logits_backward, (rand(3, 11), packed, 32, kind, group))


@pytest.mark.parametrize("name", ["dense", "int4", "pq", "tt"])
def test_heads_in_tiles(name, monkeypatch):
    monkeypatch.setattr(_tiles, "TILE_BYTES", 64 * SHAPE[1] * 4)  # two tiles
    rows = SHAPE[0]
    if name == "dense":
        arrays, pad_row, table = [rand(*SHAPE)], None, ["dense", *SHAPE, -1]
    else:
        arrays, pad_row, *table = lutra.nn.TiedHead(embedding(name, padding_idx=2))._source()
    arrays, pad_row = ([a.detach() for a in arrays], None if pad_row is None else pad_row.detach())
    hidden, targets, bias, grad = rand(3, SHAPE[1]), torch.tensor([0, rows - 1, 2]), rand(rows), rand(3)
    which = [a.is_floating_point() for a in arrays]
    lse = ops.tiled_cross_entropy(hidden, targets, arrays, pad_row, bias, *table, 0.1)[1]
    given = (rand(3, rows), hidden, arrays, pad_row, *table)
    opcheck(ops.tiled_logits_backward, (*given, True, which))
    opcheck(ops.tiled_logits_backward, (*given, False, [False] * len(arrays)))
    given = (grad, hidden, targets, lse, arrays, pad_row, bias, *table, 0.1)
    opcheck(ops.tiled_cross_entropy_backward, (*given, which))
    hidden, bias, *some = leaves(hidden, bias, *(a for a, w in zip(arrays, which) if w))
    arrays = [some.pop(0) if w else a for a, w in zip(arrays, which)]
    opcheck(ops.tiled_logits, (hidden, arrays, pad_row, *table))
    opcheck(ops.tiled_cross_entropy, (hidden, targets, arrays, pad_row, bias, *table, 0.1))
