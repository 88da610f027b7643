"""Bags of rows: large tables, packed rows, gradients, fused optimizer steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness import INPUTS, Case, near

import lutra

LENGTH = 20


def sectors(row_bytes: int) -> float:
    """Bytes that reading a row costs on average: whole sectors of 32, at whatever place the row begins."""
    step = row_bytes & -row_bytes
    if step >= 32:
        return row_bytes
    places = range(0, 32, step)
    return sum((p + row_bytes + 31) // 32 * 32 for p in places) / len(places)


def ids_of(rows: int, bags: int, count: int = INPUTS) -> list[torch.Tensor]:
    return [torch.randint(0, rows, (bags, LENGTH), device="cuda") for _ in range(count)]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


def tolerance(dtype: torch.dtype) -> Callable[[Any, Any], None]:
    return near(2e-2, 6e-2) if dtype == torch.bfloat16 else near(1e-3, 1e-3)


def random_table(rows: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    table = torch.empty(rows, dim, dtype=dtype, device="cuda")
    for part in table.split(1 << 22):
        part.normal_()
    return table


# ---------------------------------------------------------------- forward
def forward(rows: int, dim: int, dtype: torch.dtype, bags: int, graph: bool = False) -> Case:
    def build() -> tuple[Any, ...]:
        table = random_table(rows, dim, dtype)
        return (
            lambda i: lutra.gather.bag(table, i),
            [(i,) for i in ids_of(rows, bags)],
            lambda i: F.embedding_bag(i, table, mode="sum"),
        )

    size = 2 if dtype == torch.bfloat16 else 4
    moved = bags * (LENGTH * (dim * size + 8) + dim * size)
    gigabytes = rows * dim * size / 1e9
    return Case(
        f"bag {bags}x{LENGTH}, {gigabytes:.2g} GB of {dim} {name_of(dtype)}" + (", graph" if graph else ""),
        None, [], None, tolerance(dtype), bytes=moved, build=build, graph=graph,
    )  # fmt: skip


def packed_rows(kind: str, rows: int, dim: int) -> torch.Tensor:
    """Random codes with scales of 1 and minima of 0."""
    some = lutra.gather.pack_rows(torch.randn(4, dim), kind)
    packed = torch.randint(0, 100, (rows, some.shape[1]), dtype=torch.uint8, device="cuda")
    first = {"int8": dim, "fp8_e4m3": dim, "fp8_e5m2": dim}.get(
        kind, dim // 2 if kind != "int2" else dim // 4
    )
    packed[:, first:] = some[0, first:].cuda()
    return packed


def packed(kind: str, rows: int, dim: int, bags: int) -> Case:
    def build() -> tuple[Any, ...]:
        table = packed_rows(kind, rows, dim)

        def expand(i: torch.Tensor) -> torch.Tensor:
            return lutra.gather.unpack_rows(table, dim, kind, ids=i.reshape(-1)).view(*i.shape, dim).sum(1)

        inputs = [(i,) for i in ids_of(rows, bags)]
        ours = functools.partial(lutra.gather.bag_packed, table, dim=dim, kind=kind)
        near(1e-3, 1e-3)(ours(*inputs[0]), expand(*inputs[0]))
        return ours, inputs, None  # torch has no such rows on a GPU

    row_bytes = lutra.gather.pack_rows(torch.zeros(1, dim), kind).shape[1]
    moved = bags * (LENGTH * (sectors(row_bytes) + 8) + dim * 4)
    return Case(
        f"bag_packed {bags}x{LENGTH}, {rows * row_bytes / 1e9:.2g} GB of {dim} {kind}, sectors",
        None, [], bytes=moved, build=build,
    )  # fmt: skip


def beside(rows: int, dim: int, bags: int) -> Case:
    """8-bit codes with scale and minimum in arrays of their own: two sectors more an id."""

    def build() -> tuple[Any, ...]:
        q = lutra.gather.quantize_rows(torch.randn(rows, dim, device="cuda"))

        def expand(i: torch.Tensor) -> torch.Tensor:
            return ((q.codes[i].float() * q.scale[i][..., None]) + q.minimum[i][..., None]).sum(1)

        def ours(i: torch.Tensor) -> torch.Tensor:
            return lutra.gather.bag(q.codes, i, scale=q.scale, minimum=q.minimum)

        inputs = [(i,) for i in ids_of(rows, bags)]
        near(1e-3, 1e-3)(ours(*inputs[0]), expand(*inputs[0]))
        return ours, inputs, None

    moved = bags * (LENGTH * (dim + 64 + 8) + dim * 4)
    return Case(
        f"bag {bags}x{LENGTH} of {rows}x{dim} uint8, sectors", None, [], None, near(1e-3, 1e-3), bytes=moved,
        build=build,
    )  # fmt: skip


# ---------------------------------------------------------------- backward
def backward(rows: int, dim: int, dtype: torch.dtype, bags: int, kind: str, graph: bool = False) -> Case:
    """The gradient alone: 'dense', or 'sparse' (touched rows; torch's has a row for each id)."""
    size = 2 if dtype == torch.bfloat16 else 4
    n = bags * LENGTH
    expected = rows * (1 - (1 - 1 / rows) ** n)  # touched rows
    moved = n * 8 + bags * dim * size + (rows if kind == "dense" else expected) * dim * size

    def build() -> tuple[Any, ...]:
        g = torch.randn(bags, dim, device="cuda").to(dtype)
        weight = torch.empty(rows, dim, device="cuda", dtype=dtype, requires_grad=True)

        def ours(i: torch.Tensor) -> Any:
            out = lutra.gather.bag_grad(g, i, rows=rows, sparse=kind == "sparse")
            return out if kind == "dense" else out.values

        def theirs(i: torch.Tensor) -> Any:
            grad = torch.autograd.grad(bags_of[i.data_ptr()], weight, g, retain_graph=True)[0]
            return grad if kind == "dense" else grad.coalesce().values()

        inputs = [(i,) for i in ids_of(rows, bags, 3)]
        bags_of = {
            i.data_ptr(): F.embedding_bag(i, weight, mode="sum", sparse=kind == "sparse") for (i,) in inputs
        }
        return ours, inputs, theirs

    what = {"dense": "dense gradient", "sparse": "gradient of touched rows, torch coalesced"}[kind]
    return Case(
        f"{what} {bags}x{LENGTH} of {rows}x{dim} {name_of(dtype)}" + (", graph" if graph else ""),
        None, [], None, tolerance(dtype), bytes=moved, build=build, graph=graph,
    )  # fmt: skip


def both(rows: int, dim: int, bags: int, sparse: bool) -> Case:
    """Forward and backward through autograd."""
    n = bags * LENGTH
    grad = rows * dim * 4 if not sparse else rows * (1 - (1 - 1 / rows) ** n) * dim * 4

    def build() -> tuple[Any, ...]:
        weight = torch.nn.Parameter(torch.randn(rows, dim, device="cuda"))
        g = torch.randn(bags, dim, device="cuda")

        def ours(i: torch.Tensor) -> Any:
            out = lutra.gather.bag(weight, i, sparse_grad=sparse)
            return torch.autograd.grad(out, weight, g)[0]

        def theirs(i: torch.Tensor) -> Any:
            out = F.embedding_bag(i, weight, mode="sum", sparse=sparse)
            return torch.autograd.grad(out, weight, g)[0]

        return ours, [(i,) for i in ids_of(rows, bags)], theirs

    def check(a: Any, b: Any) -> None:
        near(1e-4, 1e-4)(a.to_dense(), b.to_dense())

    return Case(
        f"bag {bags}x{LENGTH} forward + backward {'sparse' if sparse else 'dense'}", None, [], None, check,
        bytes=n * dim * 4 + 2 * bags * dim * 4 + grad, build=build,
    )  # fmt: skip


def update(rule: str, rows: int, dim: int, dtype: torch.dtype, bags: int) -> Case:
    """Backward and optimizer step in one, against torch's gradient of touched rows and its optimizer."""
    size, n = (2 if dtype == torch.bfloat16 else 4), bags * LENGTH
    expected = rows * (1 - (1 - 1 / rows) ** n)
    states = {"sgd": 0, "rowwise_adagrad": 4 / dim, "adagrad": 4, "adam": 8}[rule]
    moved = n * 8 + bags * dim * size + 2 * expected * dim * (size + states)

    def build() -> tuple[Any, ...]:
        table = torch.zeros(rows, dim, device="cuda", dtype=dtype)
        state = lutra.gather.row_state(table, rule) or None
        g = torch.randn(bags, dim, device="cuda").to(dtype)
        inputs = [(i,) for i in ids_of(rows, bags, 3)]

        def ours(i: torch.Tensor) -> None:
            lutra.gather.update_bags(table, g, i, optimizer=rule, state=state, lr=0.01)

        if rule != "sgd" or dtype != torch.float32:
            return ours, inputs, None
        weight = torch.nn.Parameter(torch.zeros(rows, dim, device="cuda"))
        optimizer = torch.optim.SGD([weight], lr=0.01)
        bags_of = {i.data_ptr(): F.embedding_bag(i, weight, mode="sum", sparse=True) for (i,) in inputs}

        def theirs(i: torch.Tensor) -> None:
            weight.grad = torch.autograd.grad(bags_of[i.data_ptr()], weight, g, retain_graph=True)[0]
            optimizer.step()

        return ours, inputs, theirs

    return Case(
        f"{rule} step of {bags}x{LENGTH} ids, {rows}x{dim} {name_of(dtype)}",
        None, [], None, None, bytes=moved, build=build,
    )  # fmt: skip


def cases(scale: int) -> Iterator[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    many, few = 65536 // scale, 4096 // scale
    yield forward(31_250_000 // scale, 128, f32, many)
    yield forward(62_500_000 // scale, 64, f32, many)
    yield forward(62_500_000 // scale, 128, bf16, many)
    yield forward(125_000_000 // scale, 64, bf16, many)
    yield forward(1_000_000, 64, f32, few)
    yield forward(1_000_000, 64, f32, few, graph=True)
    for kind in ("int8", "int4", "nf4", "int2", "fp8_e4m3"):
        yield packed(kind, 32_000_000 // scale, 128, many)
    for kind in ("int8", "int4"):
        yield packed(kind, 64_000_000 // scale, 64, many)
    yield beside(4_000_000 // scale, 128, many)
    for rows, dim, dtype in (
        (31_250_000 // scale, 128, f32),
        (62_500_000 // scale, 128, bf16),
        (1_000_000, 64, f32),
    ):
        yield backward(rows, dim, dtype, many, "sparse")
    yield backward(1_000_000, 64, f32, many, "dense")
    yield backward(1_000_000, 64, f32, few, "dense")
    for bags in (few, many):
        for sparse in (False, True):
            yield both(1_000_000, 64, bags, sparse)
    for rule in ("sgd", "rowwise_adagrad", "adam"):
        yield update(rule, 10_000_000 // scale, 128, f32, many)
    yield update("rowwise_adagrad", 10_000_000 // scale, 128, bf16, many)
