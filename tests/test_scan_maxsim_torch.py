"""maxsim on torch tensors: the same results, and gradients."""

import numpy as np
import pytest

import lutra
from lutra.reference import maxsim as reference

torch = pytest.importorskip("torch")
import lutra.torch_ops  # noqa: E402

ops = torch.ops.lutra
maxsim = lutra.scan.maxsim

QP, XP = torch.tensor([0, 3, 3, 8]), torch.tensor([0, 4, 4, 9, 11])
CANDIDATES = torch.tensor([[2, 0, -1, 2], [1, 3, 0, 0], [3, 3, 1, 0]])


def rand(*shape, dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)


def finite(scores):
    return torch.where(torch.isfinite(scores), scores, 0)


def composed(q, qp, x, xp):
    """In torch's own operations, for autograd."""
    rows = []
    for i in range(len(qp) - 1):
        row = []
        for j in range(len(xp) - 1):
            a, b = q[qp[i] : qp[i + 1]], x[xp[j] : xp[j + 1]]
            row.append((a @ b.T).amax(1).sum() if len(a) and len(b) else q.new_zeros(()))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_same_as_numpy():
    rng = np.random.default_rng(0)
    q, x = rng.standard_normal((8, 21)).astype(np.float32), rng.standard_normal((11, 21)).astype(np.float32)
    args = torch.tensor(q), QP, torch.tensor(x), XP
    want = maxsim(q, QP.numpy(), x, XP.numpy())
    got = maxsim(*args)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), want)
    strided = torch.tensor(np.repeat(x, 2, 0))[::2], torch.tensor(np.repeat(x, 2, 1))[:, ::2]
    for s in strided:
        np.testing.assert_array_equal(maxsim(args[0], QP, s, XP).numpy(), want)
    for options in ({"k": 3}, {"k": 3, "candidates": CANDIDATES}, {"k": 9, "symmetric": True}):
        of_numpy = {n: v.numpy() if torch.is_tensor(v) else v for n, v in options.items()}
        best, wanted = maxsim(*args, **options), maxsim(q, QP.numpy(), x, XP.numpy(), **of_numpy)
        np.testing.assert_array_equal(best.ids.numpy(), wanted.ids)
        np.testing.assert_array_equal(best.scores.numpy(), wanted.scores)
    padded = lutra.scan.maxsim_padded(args[0].reshape(2, 4, 21), args[2][:10].reshape(2, 5, 21))
    np.testing.assert_array_equal(
        padded.numpy(), lutra.scan.maxsim_padded(q.reshape(2, 4, 21), x[:10].reshape(2, 5, 21))
    )
    with pytest.raises(TypeError, match="docs must be a torch tensor"):
        maxsim(args[0], QP, x, XP)


@pytest.mark.parametrize("options", [{}, {"candidates": CANDIDATES}, {"k": 2}, {"symmetric": True,
"normalize": True},
                                     {"candidates": CANDIDATES, "symmetric": True, "k": 2}])  # fmt: skip
def test_gradients_of_the_composition(options):
    """float64 is the reference."""
    q, x = rand(8, 6, dtype=torch.float64, grad=True), rand(11, 6, dtype=torch.float64, grad=True)

    def function(q, x):
        result = maxsim(q, QP, x, XP, **options)
        return finite(result.scores if "k" in options else result)

    assert torch.autograd.gradcheck(function, (q, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("candidates", [None, CANDIDATES])
def test_gradients_of_the_kernel(simd_level, dtype, candidates):
    q, x = rand(8, 70).to(dtype).requires_grad_(), rand(11, 70).to(dtype).requires_grad_()
    weights = rand(3, 4)
    weights[0, 0] = 0
    (finite(maxsim(q, QP, x, XP, candidates=candidates)) * weights).sum().backward()
    wide = [a.detach().float().requires_grad_() for a in (q, x)]
    scores = composed(wide[0], QP, wide[1], XP)
    if candidates is not None:
        scores = torch.where(candidates >= 0, scores.gather(1, candidates.clamp_min(0)), 0)
    (scores * weights).sum().backward()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip((q, x), wide):
        assert a.grad.dtype == dtype
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("masks", [False, True])
def test_gradients_at_size(masks):
    generator = np.random.default_rng(1)
    lengths = [generator.integers(0, 40, n) for n in (9, 30)]
    qp, xp = (torch.tensor(np.concatenate([[0], np.cumsum(n)])) for n in lengths)
    q, x = rand(int(qp[-1]), 33, grad=True), rand(int(xp[-1]), 33, grad=True)
    options, arrays = {}, [q.detach().numpy(), qp.numpy(), x.detach().numpy(), xp.numpy(), None]
    if masks:
        options = {"query_mask": torch.rand(len(q)) < 0.8, "doc_mask": torch.rand(len(x)) < 0.8}
    of = {n: v.numpy() for n, v in options.items()}
    _, argmax = reference.maxsim(*arrays, **of)
    scores = maxsim(q, qp, x, xp, **options)
    weights = rand(9, 30)
    got = torch.autograd.grad((finite(scores) * weights).sum(), (q, x), retain_graph=True)
    weights = torch.where(torch.isfinite(scores), weights, 0)
    want = reference.maxsim_backward(weights.detach().numpy(), *arrays, argmax)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-4, atol=1e-4)
    again = torch.autograd.grad((finite(scores) * weights).sum(), (q, x))
    assert all(torch.equal(a, b) for a, b in zip(got, again))


def test_ties_go_to_the_lowest_row(simd_level):
    q, x = torch.ones(20, 5, requires_grad=True), torch.ones(40, 5, requires_grad=True)
    maxsim(q, torch.tensor([0, 20]), x, torch.tensor([0, 3, 40])).sum().backward()
    assert x.grad.nonzero()[:, 0].unique().tolist() == [0, 3]


def test_codes_give_the_queries_a_gradient():
    q = rand(8, 8, grad=True)
    codes, scale = (rand(11, 8) * 50).to(torch.int8), rand(11).abs()
    maxsim(q, QP, codes, XP, doc_scale=scale)[[0, 2]][:, [0, 2, 3]].sum().backward()
    mine, q.grad = q.grad, None
    maxsim(q, QP, codes.float() * scale[:, None], XP)[[0, 2]][:, [0, 2, 3]].sum().backward()
    torch.testing.assert_close(mine, q.grad)
    q.grad = None
    docs = lutra.scan.ResidualTokens(
        torch.randint(0, 255, (11, 2), dtype=torch.uint8),
        torch.arange(11, dtype=torch.int32),
        rand(11, 8),
        rand(4),
        True,
    )
    maxsim(q, QP, docs, XP)[[0, 2]][:, [0, 2, 3]].sum().backward()
    mine, q.grad = q.grad, None
    rows = torch.from_numpy(reference.decode_residual(*(a.numpy() for a in docs[:4]), True))
    maxsim(q, QP, rows, XP)[[0, 2]][:, [0, 2, 3]].sum().backward()
    torch.testing.assert_close(mine, q.grad)


def test_the_composition_for_cuda_gives_the_same():
    from lutra._arrays import torch_kind
    from lutra.scan._maxsim_call import Call
    from lutra.scan._maxsim_composed import composed, composed_backward

    q, x = torch.randint(-3, 4, (8, 6)).float(), torch.randint(-3, 4, (11, 6)).float()
    masks = torch.rand(11) < 0.7, torch.rand(8) < 0.7
    none = (None, None, None)
    residual = (
        torch.randint(0, 255, (11, 2), dtype=torch.uint8),
        torch.zeros(11, dtype=torch.int32),
        x[:1],
        rand(4),
        True,
    )
    for cand in (None, CANDIDATES):
        for docs, codes, (xm, qm) in (
            (x, none, (None, None)),
            (x, none, masks),
            (residual[0], residual[1:4], masks),
        ):
            c = Call(torch_kind(False), q, QP, docs, XP, cand, None, xm, qm, codes)
            c.unit = True
            scores, argmax = composed(c)
            want, rows = reference.maxsim(*c.numpy())
            torch.testing.assert_close(scores, torch.from_numpy(want))
            assert torch.equal(argmax, torch.from_numpy(rows))
            if codes is none:
                grad = rand(3, 4)
                wanted = reference.maxsim_backward(grad.numpy(), *c.numpy()[:4], None, rows)
                for a, b in zip(composed_backward(c, grad, argmax), wanted):
                    torch.testing.assert_close(a, torch.from_numpy(b))


@pytest.mark.traces
def test_opcheck():
    q, x = rand(8, 6, grad=True), rand(11, 6, grad=True)
    for cand in (None, CANDIDATES):
        torch.library.opcheck(torch.ops.lutra.maxsim.default, (q, QP, x, XP, cand))
        masks = (None, torch.rand(11) < 0.8, torch.rand(8) < 0.8)
        torch.library.opcheck(
            torch.ops.lutra.maxsim.default, (q, QP, x, XP, cand, *masks, None, None, None, False, True)
        )
        fixed = q.detach(), QP, x.detach(), XP, cand
        torch.library.opcheck(torch.ops.lutra.maxsim_topk.default, (*fixed, *[None] * 6, 3))
        argmax = ops.maxsim(q, QP, x, XP, cand, *[None] * 6, False, True)[1]
        for needs in ((True, True), (False, True)):
            torch.library.opcheck(
                torch.ops.lutra.maxsim_backward.default,
                (rand(3, 4), q.detach(), QP, x.detach(), XP, cand, argmax, *needs),
            )


@pytest.mark.traces
def test_compiles():
    q, x = rand(8, 6, grad=True), rand(11, 6)

    def loss(q, x):
        return (
            finite(maxsim(q, QP, x, XP, normalize=True)).sum()
            + finite(maxsim(q, QP, x, XP, k=2).scores).sum()
        )

    torch.compile(loss, fullgraph=True, backend="aot_eager")(q, x).backward()
    compiled, q.grad = q.grad, None
    loss(q, x).backward()
    torch.testing.assert_close(compiled, q.grad)


def test_half_in_training():
    """A step on the loss moves the score."""
    q, x = rand(8, 16, grad=True), rand(11, 16).half()
    scores = maxsim(q, QP, x, XP)
    scores[0, 0].backward()
    with torch.no_grad():
        assert maxsim(q + 0.01 * q.grad, QP, x, XP)[0, 0] > scores[0, 0]
