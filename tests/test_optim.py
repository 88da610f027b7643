"""`lutra.optim`: against torch.optim, and attached layers against ordinary ones."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import lutra.nn
import lutra.optim

OPTIMIZERS = {
    "sgd": lambda p, **o: lutra.optim.SGD(p, lr=0.1, **o),
    "momentum": lambda p, **o: lutra.optim.SGD(p, lr=0.1, momentum=0.9, **o),
    "adagrad": lambda p, **o: lutra.optim.Adagrad(p, lr=0.1, **o),
    "rowwise": lambda p, **o: lutra.optim.RowwiseAdagrad(p, lr=0.1, **o),
    "adam": lambda p, **o: lutra.optim.Adam(p, lr=0.1, **o),
}
V, D = 30, 17


def bags(seed, n=12, length=4):
    return torch.randint(0, V, (n, length), generator=torch.Generator().manual_seed(seed))


def layer(cls=lutra.nn.EmbeddingBag, seed=0, dtype=torch.float32, **options):
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if cls in (lutra.nn.EmbeddingBag, torch.nn.EmbeddingBag):
        options.setdefault("mode", "sum")
    return cls.from_pretrained(weight, freeze=False, **options)


def train(model, optimizer, steps=4, call=None):
    call = call or (lambda m, i: m(bags(i)).square().sum())
    for i in range(steps):
        optimizer.zero_grad()
        call(model, i).backward()
        optimizer.step()


# ---------------------------------------------------------------- gradients in .grad
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("cls", (lutra.nn.EmbeddingBag, torch.nn.EmbeddingBag, torch.nn.Embedding))
@pytest.mark.parametrize(
    "mine, peer",
    [
        (lambda p: lutra.optim.SGD(p, lr=0.01), lambda p: torch.optim.SGD(p, lr=0.01)),
        (
            lambda p: lutra.optim.Adagrad(p, 0.1, lr_decay=0.1, initial_accumulator_value=0.2),
            lambda p: torch.optim.Adagrad(p, 0.1, lr_decay=0.1, initial_accumulator_value=0.2),
        ),
        (lambda p: lutra.optim.Adam(p, lr=0.1), lambda p: torch.optim.SparseAdam(p, lr=0.1)),
    ],
)
def test_sparse_gradients_as_torch(cls, mine, peer, dtype):
    a, b = (layer(cls, dtype=dtype, sparse=True) for _ in range(2))
    train(a, mine(a.parameters()))
    train(b, peer(b.parameters()))
    torch.testing.assert_close(a.weight, b.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize(
    "mine, peer",
    [
        (lambda p: lutra.optim.SGD(p, lr=0.01), lambda p: torch.optim.SGD(p, lr=0.01)),
        (
            lambda p: lutra.optim.SGD(p, lr=0.01, weight_decay=0.1),
            lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1),
        ),
        (
            lambda p: lutra.optim.SGD(p, lr=0.01, momentum=0.9),
            lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        ),
        (lambda p: lutra.optim.Adagrad(p, lr=0.1), lambda p: torch.optim.Adagrad(p, lr=0.1)),
        (
            lambda p: lutra.optim.Adam(p, lr=0.1, weight_decay=0.2),
            lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2),
        ),
    ],
)
def test_dense_gradients_as_torch(mine, peer, dtype):
    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)).to(dtype)

    def call(m, i):
        return (m(torch.ones(3, 5, dtype=dtype)) - i).square().sum()

    a, b = network(), network()
    train(a, mine(a.parameters()), 6, call)
    train(b, peer(b.parameters()), 6, call)
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_shape(name):
    for shape in ((), (3,), (2, 3, 4), (0, 3), (3, 0)):
        p = torch.nn.Parameter(torch.ones(shape))
        optimizer = OPTIMIZERS[name]([p])
        p.grad = torch.ones(shape)
        optimizer.step()
        assert (p < 1).all()
        if len(shape) != 1 or shape[0] == 0:
            continue
        p.grad = torch.sparse_coo_tensor([[0, 2, 0]], torch.ones(3), shape, check_invariants=True)
        before = p.detach().clone()
        optimizer.step()
        assert (p < before).tolist() == [True, False, True]
    cube = torch.nn.Parameter(torch.ones(4, 2, 3))
    optimizer = OPTIMIZERS[name]([cube])
    cube.grad = torch.sparse_coo_tensor([[3, 1, 3]], torch.ones(3, 2, 3), (4, 2, 3), check_invariants=True)
    optimizer.step()
    assert (cube[[0, 2]] == 1).all() and (cube[[1, 3]] < 1).all()
    turned = torch.nn.Parameter(torch.ones(5, 4).t())
    optimizer = OPTIMIZERS[name]([turned])
    turned.grad = torch.sparse_coo_tensor([[3]], torch.ones(1, 5), (4, 5), check_invariants=True)
    optimizer.step()
    assert (turned[:3] == 1).all() and (turned[3] < 1).all()


def test_untouched_rows_do_not_move():
    """Lazy moments, and decay of touched rows only."""
    for name, make in OPTIMIZERS.items():
        a = layer(sparse=True)
        optimizer = make(a.parameters(), weight_decay=0.5)
        before = a.weight.detach().clone()
        for ids in ([[0, 1]], [[1, 2]], [[2, 3]]):
            optimizer.zero_grad()
            a(torch.tensor(ids)).sum().backward()
            optimizer.step()
            if ids == [[0, 1]]:
                row = a.weight[0].detach().clone()
        assert torch.equal(a.weight[0], row), name
        assert torch.equal(a.weight[4:], before[4:]), name
        assert not torch.equal(a.weight[3], before[3])


# ---------------------------------------------------------------- half precision
@pytest.mark.parametrize("how", ("sparse", "dense", "attached"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_keeps_its_state_in_float32(how, dtype):
    a = layer(dtype=dtype, sparse=how == "sparse")
    optimizer = lutra.optim.Adam(a.parameters(), lr=0.01)
    if how == "attached":
        optimizer.attach(a)
    train(a, optimizer)
    state = optimizer.state[a.weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    assert a.weight.dtype == dtype and a.weight.isfinite().all()
    other = lutra.optim.Adam(layer(dtype=dtype).parameters(), lr=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (mine,) = other.state.values()
    assert mine["exp_avg"].dtype == torch.float32 and mine["step"] == 4
    torch.testing.assert_close(mine["exp_avg_sq"], state["exp_avg_sq"], rtol=0, atol=0)
    assert other.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("how", ("sparse", "dense", "attached"))
def test_stochastic_rounding(how):
    """Steps of 1 / 50 of a bfloat16's last bit: to nearest nothing moves, at random the mean does."""
    weights = []
    for stochastic, seed in ((False, 0), (True, 0), (True, 0), (True, 1)):
        a = lutra.nn.EmbeddingBag.from_pretrained(
            torch.ones(8, 64, dtype=torch.bfloat16), freeze=False, mode="sum", sparse=how == "sparse"
        )
        optimizer = lutra.optim.SGD(a.parameters(), 2**-7 / 50, stochastic_rounding=stochastic, seed=seed)
        if how == "attached":
            optimizer.attach(a)
        train(a, optimizer, 100, lambda m, i: m(torch.arange(8).view(8, 1)).sum())
        weights.append(a.weight.detach())
    assert (weights[0] == 1).all()
    assert abs(float(weights[1].float().mean()) - (1 - 2 * 2**-7)) < 2**-9
    assert weights[1].min() > 1 - 12 * 2**-7  # other bits at every step: no value goes down all the time
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[1], weights[3])


# ---------------------------------------------------------------- torch's machinery
def test_schedules_closures_and_groups():
    a, b = layer(sparse=True), torch.nn.Linear(D, 1)
    optimizer = lutra.optim.Adagrad(
        [{"params": a.parameters(), "lr": 0.5}, {"params": b.parameters()}], lr=0.1
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        optimizer.zero_grad()
        loss = b(a(bags(0))).square().sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(6):
        losses.append(float(optimizer.step(closure).detach()))
        schedule.step()
    assert losses[-1] < losses[0] / 2
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 / 64)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.1 / 64)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_continues(name):
    a = layer(sparse=True)
    optimizer = OPTIMIZERS[name](a.parameters())
    train(a, optimizer)
    b = copy.deepcopy(a)
    again = OPTIMIZERS[name](b.parameters())
    again.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    train(a, optimizer)
    train(b, again)
    assert torch.equal(a.weight, b.weight)
    with pytest.raises(ValueError):
        OPTIMIZERS[name]([a.weight, torch.nn.Parameter(torch.ones(1))]).load_state_dict(
            optimizer.state_dict()
        )


# ---------------------------------------------------------------- attached layers
@pytest.mark.parametrize("when", ("step", "backward"))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_attached_is_the_same(simd_level, name, when):
    for cls, options in (
        (lutra.nn.EmbeddingBag, {}),
        (lutra.nn.EmbeddingBag, {"mode": "mean", "padding_idx": 3}),
        (lutra.nn.EmbeddingBag, {"mode": "max"}),
        (lutra.nn.Embedding, {"padding_idx": 3}),
        (lutra.nn.Embedding, {"max_norm": 1.0}),
    ):
        a, b = layer(cls, sparse=options.get("mode") != "max", **options), layer(cls, **options)
        one, two = OPTIMIZERS[name](a.parameters()), OPTIMIZERS[name](b.parameters())
        if options.get("mode") == "max" and name in ("momentum", "adam"):
            continue  # mode 'max' has no sparse gradient in torch; with a dense one moments are not lazy
        two.attach(b, when=when)
        train(a, one)
        train(b, two)
        assert b.weight.grad is None
        torch.testing.assert_close(a.weight, b.weight, rtol=1e-4, atol=1e-4)


def test_attached_float64():
    a, b = layer(dtype=torch.float64, sparse=True), layer(dtype=torch.float64)
    one, two = (lutra.optim.Adam(m.parameters(), lr=0.1) for m in (a, b))
    two.attach(b)
    train(a, one)
    train(b, two)
    torch.testing.assert_close(a.weight, b.weight, rtol=1e-10, atol=1e-12)


def test_attached_with_offsets_and_weights():
    a, b = layer(sparse=True), layer()
    one, two = (lutra.optim.Adagrad(m.parameters(), lr=0.1) for m in (a, b))
    two.attach(b)
    factors = [torch.linspace(-1, 1, 48).reshape(12, 4).requires_grad_() for _ in range(2)]
    offsets = torch.tensor([0, 3, 3, 20])

    def call(m, i):
        w = factors[m is b]
        return m(bags(i), None, w).square().sum() + m(bags(i + 9).reshape(-1), offsets).square().sum()

    train(a, one, 3, call)
    train(b, two, 3, call)
    torch.testing.assert_close(a.weight, b.weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(factors[0].grad, factors[1].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", (lutra.nn.EmbeddingBag, lutra.nn.Embedding))
def test_attached_accumulates(cls):
    """Two calls in a step, two backward passes, and two through one graph."""
    a, b = layer(cls, sparse=True), layer(cls)
    one, two = (lutra.optim.Adam(m.parameters(), lr=0.1) for m in (a, b))
    two.attach(b)
    for m, optimizer in ((a, one), (b, two)):
        for i in range(3):
            optimizer.zero_grad()
            (m(bags(i)).square().sum() + m(bags(i + 7)).sum()).backward()
            loss = m(bags(i + 5, 3)).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(a.weight, b.weight, rtol=1e-4, atol=1e-4)


def test_zero_grad_forgets():
    a = layer()
    optimizer = lutra.optim.SGD(a.parameters(), lr=0.1)
    optimizer.attach(a)
    before = a.weight.detach().clone()
    a(bags(0)).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(a.weight, before)
    a(bags(0)).sum().backward()
    optimizer.step()
    after = a.weight.detach().clone()
    optimizer.step()  # used up
    assert torch.equal(a.weight, after) and not torch.equal(after, before)


def test_two_layers_of_one_weight():
    a, b = layer(), lutra.nn.Embedding(V, D)
    b.weight = a.weight
    optimizer = lutra.optim.SGD(a.parameters(), lr=0.1)
    optimizer.attach(a, b)
    before = a.weight.detach().clone()
    (a(torch.tensor([[1]])).sum() + b(torch.tensor([1, 2])).sum()).backward()
    optimizer.step()
    torch.testing.assert_close((before - a.weight)[:4, 0].detach(), torch.tensor([0, 0.2, 0.1, 0]))
    optimizer.detach(a)
    b(torch.tensor([2])).sum().backward()
    optimizer.step()
    assert a.weight.grad is None
    torch.testing.assert_close((before - a.weight)[:4, 0].detach(), torch.tensor([0, 0.2, 0.2, 0]))


def test_copies_are_ordinary_layers():
    a = layer()
    optimizer = lutra.optim.SGD(a.parameters(), lr=0.1)
    optimizer.attach(a)
    for other in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        other(bags(0)).sum().backward()
        assert other.weight.grad is not None and other.state_dict().keys() == a.state_dict().keys()
    assert copy.deepcopy(optimizer)._attached == {}
    with torch.no_grad():
        assert torch.equal(a(bags(0)), copy.deepcopy(a)(bags(0)))
    a.weight.requires_grad_(False)
    assert not a(bags(0)).requires_grad


@pytest.mark.parametrize("mode", (None, "sum", "mean"))
def test_attached_by_frequency(mode):
    """scale_grad_by_freq: the steps of a layer that is not attached, for ids that occur once and often."""
    options = {"scale_grad_by_freq": True, "padding_idx": 3} | ({} if mode is None else {"mode": mode})
    cls = lutra.nn.Embedding if mode is None else lutra.nn.EmbeddingBag
    a, b = layer(cls, **options), layer(cls, **options)
    one, two = lutra.optim.SGD(a.parameters(), lr=0.1), torch.optim.SGD(b.parameters(), lr=0.1)
    one.attach(a)
    ids = bags(5) % 7
    ids[2] = 3
    flat = ids.reshape(-1)
    calls = [[(ids,)], [(ids,), (ids[:3],)]]  # two calls in a step: each has its own counts
    if mode is not None:
        calls += [
            [(flat, torch.tensor([0, 5, 5, 9, 47]))],
            [(flat.int(), torch.tensor([2, 5], dtype=torch.int32))],
        ]
    if mode == "sum":
        calls.append([(ids, None, torch.rand(12, 4))])
    for m, optimizer in ((a, one), (b, two)):
        for step in calls:
            optimizer.zero_grad()
            sum(m(*call).square().sum() for call in step).backward()
            optimizer.step()
        if mode is not None:
            m.include_last_offset = True
            optimizer.zero_grad()
            m(flat, torch.tensor([0, 5, 5, 48])).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(a.weight, b.weight)


def test_misuse_of_attached_layers():
    a = layer()
    optimizer = lutra.optim.SGD(a.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"lutra\.nn\.Embedding"):
        optimizer.attach(layer(torch.nn.EmbeddingBag))
    with pytest.raises(ValueError, match="not a parameter"):
        optimizer.attach(layer())
    with pytest.raises(ValueError, match="when must be one of"):
        optimizer.attach(a, when="later")
    hooked = layer()
    hooked.weight.register_hook(lambda g: g)
    with pytest.raises(ValueError, match="hooks"):
        lutra.optim.SGD(hooked.parameters()).attach(hooked)
    with pytest.raises(ValueError, match="not attached"):
        optimizer.detach(a)
    optimizer.attach(a)
    optimizer.attach(a)  # again: nothing changes
    with pytest.raises(ValueError, match="another optimizer"):
        lutra.optim.SGD(a.parameters(), lr=0.1).attach(a)
    with pytest.raises(ValueError, match="attached already"):
        optimizer.attach(a, when="backward")
    with pytest.raises(RuntimeError, match="GradScaler"):
        _ = optimizer._step_supports_amp_scaling

    before = a.weight.detach().clone()
    (a(bags(0)).sum() + a.weight.square().sum()).backward()
    with pytest.raises(RuntimeError, match="another way"):
        optimizer.step()
    assert torch.equal(a.weight, before)
    with pytest.raises(RuntimeError, match="not used"):
        optimizer.detach(a)
    optimizer.zero_grad()

    ids = bags(0)
    a(ids).sum().backward()
    ids += 0
    with pytest.raises(RuntimeError, match="modified in place"):
        optimizer.step()
    optimizer.zero_grad()
    a.weight = torch.nn.Parameter(torch.ones(V, D))
    with pytest.raises(RuntimeError, match="not the one that was attached"):
        a(bags(0))


def test_updates_in_backward():
    a = layer()
    optimizer = lutra.optim.Adam(a.parameters(), lr=0.1)
    optimizer.attach(a, when="backward")
    before = a.weight.detach().clone()
    loss = a(bags(0)).square().sum()
    loss.backward(retain_graph=True)
    after = a.weight.detach().clone()
    assert not torch.equal(after, before)
    with pytest.raises(RuntimeError, match="second gradient"):
        loss.backward()
    assert torch.equal(a.weight, after)
    optimizer.step()
    assert torch.equal(a.weight, after) and optimizer.state[a.weight]["step"] == 1
    train(a, optimizer)
    assert optimizer.state[a.weight]["step"] == 5
    factors = torch.ones(12, 4, requires_grad=True)  # their gradient reads the table
    out = a(bags(1), None, factors)
    with torch.no_grad():
        a.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    a, b = layer(sparse=True), layer()
    one, two = (lutra.optim.SGD(m.parameters(), lr=0.01) for m in (a, b))
    two.attach(b)
    train(a, one)
    factor = torch.ones((), requires_grad=True)
    train(
        b,
        two,
        call=lambda m, i: checkpoint(lambda f: m(bags(i)) * f, factor, use_reentrant=False).square().sum(),
    )
    torch.testing.assert_close(a.weight, b.weight, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- errors
def test_errors():
    p = [torch.nn.Parameter(torch.ones(3, 2))]
    for wrong in (
        lambda: lutra.optim.SGD(p, lr=-1),
        lambda: lutra.optim.SGD(p, momentum=1.0),
        lambda: lutra.optim.SGD(p, weight_decay=-0.1),
        lambda: lutra.optim.Adagrad(p, eps=-1),
        lambda: lutra.optim.Adagrad(p, lr_decay=-1),
        lambda: lutra.optim.RowwiseAdagrad(p, initial_accumulator_value=-1),
        lambda: lutra.optim.Adam(p, betas=(0.9, 1.0)),
        lambda: lutra.optim.SGD([]),
        lambda: lutra.optim.SGD([torch.nn.Parameter(p[0].half())], stochastic_rounding=True),
    ):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(TypeError, match="betas"):
        lutra.optim.Adam(p, betas=0.9)
    with pytest.raises(TypeError, match="complex64"):
        lutra.optim.SGD([torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="betas"):
        lutra.optim.Adam([{"params": p, "betas": (2, 0)}])
    p[0].grad = torch.eye(3)[:, :2].to_sparse()
    with pytest.raises(ValueError, match="sparse dimensions"):
        lutra.optim.SGD(p).step()


def test_attached_step_is_compiled_around():
    torch._dynamo.reset()
    a, b = layer(), layer()
    one, two = (lutra.optim.SGD(m.parameters(), lr=0.01) for m in (a, b))
    one.attach(a)
    two.attach(b)
    compiled = torch.compile(lambda ids: b(ids) * 2, backend="aot_eager")
    train(a, one, call=lambda m, i: (m(bags(i)) * 2).square().sum())
    train(b, two, call=lambda m, i: compiled(bags(i)).square().sum())
    torch.testing.assert_close(a.weight, b.weight, rtol=1e-5, atol=1e-5)
