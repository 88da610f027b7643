"""lutra.nn's quantizers of vectors: VectorQuantize, ResidualVQ, FSQ, LatentQuantize."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn = pytest.importorskip("lutra.nn")
F = torch.nn.functional

LAYERS = {
    "vq": lambda **o: nn.VectorQuantize(6, 9, first_batch=False, **o),
    "vq, moving averages": lambda **o: nn.VectorQuantize(6, 9, decay=0.9, revive=0.1, **o),
    "vq, cosine": lambda **o: nn.VectorQuantize(6, 9, cosine=True, **o),
    "residual": lambda **o: nn.ResidualVQ(6, 3, 9, **o),
    "fsq": lambda **o: nn.FSQ((8, 5, 4, 3, 2, 6), **o),
    "fsq, projected": lambda **o: nn.FSQ((8, 5, 5), 6, **o),
    "latent": lambda **o: nn.LatentQuantize(6, 5, **o),
}


def made(name, seed=0, **options):
    torch.manual_seed(seed)
    return LAYERS[name](**options)


def vectors(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------- what every one has to do
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_shapes_dtypes_and_decoding(name, dtype):
    layer = made(name, dtype=dtype)
    x = vectors(4, 7, 6, dtype=dtype).requires_grad_()
    values, codes = layer(x)
    assert values.shape == x.shape and values.dtype == dtype and codes.dtype == torch.int64
    (values.float().square().sum() + nn.regularization(layer).float()).backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    layer.eval()
    values, codes = layer(x)
    assert codes.shape[:2] == (4, 7)
    tolerance = 1e-6 if dtype in (torch.float32, torch.float64) else 2e-2
    decoded = layer.decode(codes).to(dtype)
    torch.testing.assert_close(decoded.reshape(values.shape), values, atol=tolerance, rtol=tolerance)
    assert layer(x[0, 0]).values.shape == (6,)
    for empty in (layer.eval(), layer.train()):
        assert empty(x[:0]).values.shape == (0, 7, 6)
    if dtype == torch.float32:
        strided = vectors(6, 7).T
        torch.testing.assert_close(layer.eval()(strided).values, layer(strided.contiguous()).values)


@pytest.mark.parametrize("name", LAYERS)
def test_copies_checkpoints_and_compile(name):
    layer = made(name)
    x = vectors(11, 6)
    layer(x)
    fresh = made(name, seed=3)
    fresh.load_state_dict(layer.state_dict())
    layer.eval()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh.eval()):
        assert all(torch.equal(a, b) for a, b in zip(other(x), layer(x)))
    torch._dynamo.reset()
    for training in (False, True):
        if training and name == "vq, moving averages":
            continue  # reviving depends on values
        compiled = torch.compile(layer.train(training), backend="aot_eager", fullgraph=not training)
        assert all(torch.equal(a, b) for a, b in zip(compiled(x), copy.deepcopy(layer)(x)))


@pytest.mark.parametrize("name", LAYERS)
def test_bad_input(name):
    layer = made(name)
    with pytest.raises(ValueError, match=r"x has shape \(3, 5\); its last dimension must be 6"):
        layer(torch.zeros(3, 5))
    with pytest.raises(TypeError, match="x must be floating point, got int64"):
        layer(torch.zeros(3, 6, dtype=torch.int64))


@pytest.mark.parametrize("make, error", [
    (lambda: nn.VectorQuantize(0, 4), "dim must be >= 1"),
    (lambda: nn.VectorQuantize(4, 0), "codebook_size must be >= 1"),
    (lambda: nn.VectorQuantize(4, 4, decay=1.0), r"decay is 1\.0; it must be below 1"),
    (lambda: nn.VectorQuantize(4, 4, revive=1.0), "revive needs the moving counts"),
    (lambda: nn.VectorQuantize(4, 4, commitment=-1), "commitment is -1"),
    (lambda: nn.ResidualVQ(4, 2, 4, cosine=True), "cosine has no meaning here"),
    (lambda: nn.ResidualVQ(4, 0, 4), "num_quantizers must be >= 1"),
    (lambda: nn.FSQ((4, 1)), "levels must be >= 2"),
    (lambda: nn.FSQ(()), "levels must hold"),
    (lambda: nn.FSQ((256,) * 8), "it must be at most 2"),
    (lambda: nn.LatentQuantize(4, 0), "levels must be >= 1"),
])  # fmt: skip
def test_bad_parameters(make, error):
    with pytest.raises(ValueError, match=error):
        make()


# ---------------------------------------------------------------- VectorQuantize
@pytest.mark.parametrize("cosine", [False, True])
def test_vq_is_its_formula(cosine):
    layer = made("vq", cosine=cosine, commitment=0.3, dtype=torch.float64)
    x = vectors(40, 6, dtype=torch.float64).requires_grad_()
    book = layer.codebook.detach().clone().requires_grad_()
    z, c = (F.normalize(x, dim=1), F.normalize(book, dim=1)) if cosine else (x, book)
    codes = ((z[:, None] - c[None]) ** 2).sum(2).argmin(1)
    loss = F.mse_loss(c[codes], z.detach()) + 0.3 * F.mse_loss(z, c[codes].detach())
    got = layer(x)
    assert torch.equal(got.codes, codes)
    torch.testing.assert_close(got.values, c[codes])
    torch.testing.assert_close(layer.regularization(), loss)
    g = vectors(40, 6, dtype=torch.float64, seed=5)
    ours = torch.autograd.grad((got.values * g).sum() + 2 * layer.regularization(), (x, layer.codebook))
    plain = torch.autograd.grad((z * g).sum() + 2 * loss, (x, book))  # straight through: as if values were z
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b)


def test_vq_moving_averages():
    layer = nn.VectorQuantize(3, 4, decay=0.8, first_batch=False, dtype=torch.float64)
    assert not list(layer.parameters())
    counts, sums = np.ones(4), layer.codebook.numpy().copy()
    book = sums.copy()
    for step in range(5):
        x = vectors(30, 3, dtype=torch.float64, seed=step)
        layer(x)
        codes = ((x.numpy()[:, None] - book[None]) ** 2).sum(2).argmin(1)
        counts = 0.8 * counts + 0.2 * np.bincount(codes, minlength=4)
        total = np.zeros((4, 3))
        np.add.at(total, codes, x.numpy())
        sums = 0.8 * sums + 0.2 * total
        book = sums / ((counts + 1e-5) / (counts.sum() + 4e-5) * counts.sum())[:, None]
        np.testing.assert_allclose(layer.codebook.numpy(), book, rtol=1e-6)
        assert float(layer.regularization()) > 0
    before = layer.codebook.clone()
    layer.eval()(vectors(30, 3, dtype=torch.float64))
    assert torch.equal(layer.codebook, before) and float(layer.regularization()) == 0


def test_vq_revives_dead_entries():
    torch.manual_seed(0)
    x = vectors(500, 8)
    used = []
    for revive in (0.0, 0.5):
        layer = nn.VectorQuantize(8, 64, decay=0.9, revive=revive, first_batch=False)
        with torch.no_grad():
            for t in (layer.codebook, layer.sums):
                t[8:] = 1e3  # far from all vectors
        for _ in range(60):
            layer(x)
        used.append(len(layer.eval()(x).codes.unique()))
    assert used[0] <= 8 and used[1] >= 60


def test_vq_begins_at_its_first_batch():
    torch.manual_seed(0)
    centres = 10 * vectors(5, 8)
    x = centres.repeat(40, 1) + 0.01 * vectors(200, 8, seed=2)
    layer = nn.VectorQuantize(8, 32)
    values, _ = layer(x)
    assert layer.started and (values - x).abs().max() < 0.1
    book = layer.codebook.detach().clone()
    layer(vectors(200, 8))
    assert torch.equal(layer.codebook, book)


# ---------------------------------------------------------------- ResidualVQ
def test_residual_quantizes_what_is_left():
    layer = nn.ResidualVQ(6, 3, 9, dtype=torch.float64)
    x = vectors(50, 6, dtype=torch.float64).requires_grad_()
    layer(x.detach())  # codebooks from the first batch
    values, codes = layer(x)
    rest, total = x.detach(), torch.zeros(50, 6, dtype=torch.float64)
    for i, part in enumerate(layer.layers):
        nearest = torch.cdist(rest, part.codebook).argmin(1)
        assert torch.equal(codes[:, i], nearest)
        rest, total = rest - part.codebook[nearest].detach(), total + part.codebook[nearest].detach()
    torch.testing.assert_close(values, total)
    torch.testing.assert_close(layer.regularization(), sum(part.regularization() for part in layer.layers))
    g = vectors(50, 6, dtype=torch.float64, seed=3)
    assert torch.equal(torch.autograd.grad((values * g).sum(), x)[0], g)
    errors = [
        float((layer.layers[0](x).values - x).square().mean().detach()),
        float((values - x).square().mean().detach()),
    ]
    assert errors[1] < 0.6 * errors[0]


# ---------------------------------------------------------------- FSQ
def test_fsq_is_its_formula():
    levels = np.array([8, 5, 4, 3, 2, 6])
    layer = made("fsq")
    x = 2 * vectors(3000, 6, dtype=torch.float64)
    half = (levels - 1) * 1.001 / 2
    offset = np.where(levels % 2 == 0, 0.5, 0.0)
    bounded = np.tanh(x.numpy() + np.arctanh(offset / half)) * half - offset
    whole = np.round(bounded)
    values, codes = layer(x)
    np.testing.assert_allclose(values.numpy(), whole / (levels // 2), atol=1e-12)
    digits = (whole + levels // 2).astype(np.int64)
    assert (digits.min(0) == 0).all() and (digits.max(0) == levels - 1).all()
    places = np.concatenate([[1], np.cumprod(levels)[:-1]])
    assert np.array_equal(codes.numpy(), (digits * places).sum(1))
    assert layer.codebook_size == levels.prod() and codes.max() < layer.codebook_size
    every = torch.arange(layer.codebook_size)
    assert len(layer.decode(every).unique(dim=0)) == layer.codebook_size
    x.requires_grad_()  # straight through the rounding, not through the bound
    g = vectors(3000, 6, dtype=torch.float64, seed=4)
    grad = torch.autograd.grad((layer(x).values * g).sum(), x)[0]
    t = torch.from_numpy(half)
    slope = 1 - torch.tanh(x.detach() + torch.from_numpy(np.arctanh(offset / half))) ** 2
    torch.testing.assert_close(grad, g * slope * t / torch.from_numpy(levels // 2))


# ---------------------------------------------------------------- LatentQuantize
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_latent_is_its_formula(levels):
    layer = nn.LatentQuantize(6, levels, quantization=0.3, commitment=0.7, dtype=torch.float64)
    if levels > 1:
        assert layer.values[0].tolist() == torch.linspace(-0.5, 0.5, levels, dtype=torch.float64).tolist()
    with torch.no_grad():
        layer.values.normal_()  # in no order
    x = vectors(40, 6, dtype=torch.float64).requires_grad_()
    v = layer.values.detach().clone().requires_grad_()
    codes = (x[:, :, None] - v[None]).abs().argmin(2)
    chosen = v[torch.arange(6), codes]
    loss = 0.3 * F.mse_loss(chosen, x.detach()) + 0.7 * F.mse_loss(x, chosen.detach())
    got = layer(x)
    assert torch.equal(got.codes, codes) and torch.equal(got.values, chosen)
    ours = torch.autograd.grad(got.values.sum() + layer.regularization(), (x, layer.values))
    plain = torch.autograd.grad(x.sum() + loss, (x, v))
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- training
@pytest.mark.slow
@pytest.mark.parametrize("name, bits, share", [
    ("vq", 6, 0.45), ("moving averages", 6, 0.45), ("cosine", 6, 0.75), ("residual", 12, 0.25),
    ("fsq", 6, 0.5), ("latent", 12, 0.3),
])  # fmt: skip
def test_autoencoders_learn_through_their_codes(name, bits, share):
    """Vectors of 16 dimensions, 4 of them free, through a code of some bits: less error than the mean's."""
    torch.manual_seed(0)
    mix = torch.randn(4, 16)
    layer = {
        "vq": lambda: nn.VectorQuantize(4, 64),
        "moving averages": lambda: nn.VectorQuantize(4, 64, decay=0.95, revive=0.2),
        "cosine": lambda: nn.VectorQuantize(4, 64, cosine=True),
        "residual": lambda: nn.ResidualVQ(4, 2, 64),
        "fsq": lambda: nn.FSQ((4, 4, 4), 4),
        "latent": lambda: nn.LatentQuantize(4, 8, quantization=1.0, commitment=0.1),
    }[name]()
    encode, decode = torch.nn.Linear(16, 4), torch.nn.Linear(4, 16)
    parameters = [*encode.parameters(), *decode.parameters(), *layer.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.01)
    for _ in range(300):
        x = torch.randn(256, 4) @ mix
        loss = F.mse_loss(decode(layer(encode(x)).values), x) + nn.regularization(layer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layer.eval()
    x = torch.randn(2000, 4) @ mix
    values, codes = layer(encode(x))
    error = float((F.mse_loss(decode(values), x) / x.var()).detach())
    used = len(codes.reshape(len(x), -1).unique(dim=0))
    assert used <= 2**bits
    assert error < share
