"""Tables that stay packed while they train: what `lpt` and `alpt` share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import _checks
from ...gather import bag_packed, pack_rows, unpack_rows
from ...gather._packed import row_layout
from ._scaffold import entries_of, reduce_bags
from ._stored import Stored

if TYPE_CHECKING:
    from ...compress import Table

KINDS = {8: "int8", 4: "int4", 2: "int2"}
_BLOCK = 1 << 16
_OUT = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Packed(Stored):
    """The table is a buffer ``packed`` (rows, row_bytes) uint8 of `lutra.gather.pack_rows`.

    There is no gradient of it: an optimizer of `lutra.optim` to which the layer is attached reads the touched
    rows, updates them in float32 and writes them back (`_write`).
    """

    packed: Tensor
    kind: str
    #: Set by `lutra.optim`'s ``attach``.
    _attachment: Any = None

    def _make(self, bits: int, seed: int | None) -> None:
        if bits not in KINDS:
            raise ValueError(f"bits must be 8, 4 or 2, got {bits!r}")
        if self.sparse:
            raise ValueError(
                f"{type(self).__name__} has no sparse gradients: attach it to a lutra.optim optimizer"
            )
        self.bits, self.kind = bits, KINDS[bits]
        self._seed(seed)
        at = row_layout(self.embedding_dim, self.kind, None)
        device = self.weight.device
        self.register_buffer(
            "packed", torch.zeros(self.num_embeddings, at.row_bytes, dtype=torch.uint8, device=device)
        )
        self.weight.requires_grad_(True)

    def _start(self) -> None:
        for begin in range(0, self.num_embeddings, _BLOCK):
            n = min(_BLOCK, self.num_embeddings - begin)
            rows = torch.randn(n, self.embedding_dim, device=self.weight.device)
            if self.padding_idx is not None and begin <= self.padding_idx < begin + n:
                rows[self.padding_idx - begin] = 0
            self._encode(rows, torch.arange(begin, begin + n, device=rows.device))

    def _fill(self, dense: Tensor) -> None:
        for begin in range(0, len(dense), _BLOCK):
            rows = dense[begin : begin + _BLOCK]
            self._encode(rows, torch.arange(begin, begin + len(rows), device=rows.device))

    def reset_parameters(self) -> None:
        """Fresh rows, about N(0, 1); zeros in the padding row."""
        with torch.no_grad():
            self._start()

    def _encode(self, rows: Tensor, ids: Tensor) -> None:
        """Store rows as they are first: rounded to nearest."""
        raise NotImplementedError

    def _shrink(self, rows: Tensor, ids: Tensor, factor: Tensor) -> None:
        """Store ``rows * factor``, factor (n, 1); each id once."""
        self._encode(rows * factor, ids)

    def _write(self, ids: Tensor, rows: Tensor, grads: Tensor, batch: int, seed: int) -> None:
        """Store updated rows (n, dim) float32, each id once; ``grads`` is what updated them."""
        raise NotImplementedError

    # ---------------------------------------------------------------- reading
    def _read(self, ids: Tensor, dtype: str = "float32") -> Tensor:
        return unpack_rows(self.packed, self.embedding_dim, self.kind, None, ids, dtype=dtype)

    def _values(self, ids: Tensor) -> Tensor:
        return self._read(ids, _OUT.get(self.weight.dtype, "float32")).to(self.weight.dtype)

    def _trains(self) -> bool:
        if not (self.weight.requires_grad and torch.is_grad_enabled()):
            return False
        if self._attachment is not None:
            return True
        if self.training:
            raise RuntimeError(
                f"{type(self).__name__} has no gradient of its table and trains only attached: "
                "optimizer.attach(layer) with an optimizer of lutra.optim (or layer.requires_grad_(False))"
            )
        return False

    @torch.no_grad()
    def _renorm(self, ids: Tensor) -> None:
        """Shorten the stored rows of these ids to max_norm, as torch does."""
        if self.max_norm is None or not ids.numel():
            return
        ids = torch.unique(ids)
        rows = self._read(ids)
        norm = rows.norm(p=self.norm_type, dim=1, keepdim=True)
        slack = 1e-6 if self.bits == 8 else 2.0**-9  # scales of float16: what was shortened can be longer
        long = (norm > self.max_norm * (1 + slack)).squeeze(1)
        if bool(long.any()):
            self._shrink(rows[long], ids[long], self.max_norm / (norm[long] + 1e-7))

    def _given_out(self, ids: Tensor) -> Tensor:
        return self._rows(ids)  # `_renorm` and the attachment see to the rest

    def _by_entry(self) -> bool:
        return False

    def _rows(self, ids: Tensor) -> Tensor:
        self._renorm(ids)
        return self._attachment.stored(self, ids) if self._trains() else self._values(ids)

    def _bags(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, mode: str, last: bool
    ) -> Tensor:
        self._renorm(ids)
        if self._trains():
            return self._attachment.stored(self, ids, offsets, weights, mode, last)
        return self._reduce(ids, offsets, weights, mode, last)

    def _reduce(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, mode: str, last: bool
    ) -> Tensor:
        dtype = _OUT.get(self.weight.dtype)
        if dtype is None or not self.packed.is_cpu:
            rows, entries, pad = self._entries(ids)
            return reduce_bags(rows, entries, offsets, weights, mode, pad, last)
        return bag_packed(
            self.packed, ids, offsets, weights, dim=self.embedding_dim, kind=self.kind, mode=mode,
            padding_idx=self.padding_idx, include_last_offset=last, dtype=dtype,
        )  # fmt: skip

    def _entries(self, ids: Tensor) -> tuple[Tensor, Tensor, int | None]:
        """The rows of a call, its ids as numbers of these rows, and which of them is the padding."""
        return entries_of(self._values(ids.reshape(-1)), ids, self.padding_idx)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    # ---------------------------------------------------------------- becoming a format
    def compressed(self) -> Table:
        """The packed rows as a `lutra.compress.Table` in the format 'int8', 'int4' or 'int2'."""
        from ...compress import Table, format

        made = format(self.kind)
        (name,) = made.arrays(self._shape)
        return Table(made, self._shape, {name: self.packed.detach().clone()})


def nearest(layer: Packed, rows: Tensor, ids: Tensor, scale: Tensor | None = None) -> None:
    _pack(layer, rows, ids, "nearest", 0, scale)


def at_random(layer: Packed, rows: Tensor, ids: Tensor, seed: int, scale: Tensor | None = None) -> None:
    _pack(layer, rows, ids, "stochastic", seed, scale)


def _pack(layer, rows, ids, rounding, seed, scale):
    pack_rows(
        rows.float(), layer.kind, rounding=rounding, seed=seed, out=layer.packed, ids=ids,
        scale=None if scale is None else scale.float().reshape(-1, 1).contiguous(),
    )  # fmt: skip


def check_seed(seed: int | None) -> int | None:
    return None if seed is None else _checks.integer("seed", seed, 0, 2**62)
