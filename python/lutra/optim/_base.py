"""What the optimizers share: gradients of every kind in, one step of a rule out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._arrays import torch_kind
from ..gather._tables_update import _tables_square, _update_tables
from ..gather._update import STATES, Step, _update_bags, _update_rows
from ..torch_ops.row_update import random_bits, round_bfloat16, step, step_rows
from ._attachment import WHEN, Attachment, Call, TableCall, merge, merge_tables, table_of

#: Values of packed rows that are decoded, updated and encoded at a time.
_VALUES = 1 << 18
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _wide(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _mix(*numbers: int) -> int:
    """One number of 63 bits out of several (splitmix64)."""
    x = 0
    for n in numbers:
        x = (x + n + 0x9E3779B97F4A7C15) & (2**64 - 1)
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        x ^= x >> 31
    return x >> 1


class RowOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: subclasses give `_rule` and `_numbers`."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._attached: dict[Tensor, Attachment] = {}
        super().__init__(params, defaults)

    def _rule(self, group: dict[str, Any]) -> str:
        raise NotImplementedError

    def _numbers(self, group: dict[str, Any], at: int, sparse: bool) -> Step:
        """The rule's numbers at step ``at`` (from 1)."""
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        """TypeError or ValueError for an option that is none."""

    # ---------------------------------------------------------------- torch.optim.Optimizer
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; parameters must be float32, float16, bfloat16 or float64."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for p in group["params"]:
                if p.dtype not in _FLOATS:
                    raise TypeError(f"a parameter has dtype {p.dtype}; it must be a real floating point type")
                if group["stochastic_rounding"] and p.dtype == torch.float16:
                    raise ValueError("stochastic_rounding is for bfloat16 parameters; one here is float16")
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on all parameters that have a gradient.

        Gradients of attached layers are used up; ``.grad`` stays until `zero_grad`, as in torch.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                self._check_gradient(p)
        for group in self.param_groups:
            for p in group["params"]:
                attachment = self._attached.get(p)
                if attachment is not None:
                    calls, attachment.pending = attachment.pending, []
                    attachment.used = False
                    if calls:
                        self._update_attached(p, calls)
                elif p.grad is not None:
                    self._update(group, p)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; what attached layers have gathered is forgotten too."""
        super().zero_grad(set_to_none)
        for attachment in self._attached.values():
            attachment.pending.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the state stays float32 where parameters are float16 or bfloat16."""
        attached = self._attached
        super().load_state_dict(state_dict)  # by way of __setstate__
        self._attached = attached
        saved = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        mine = chain.from_iterable(g["params"] for g in self.param_groups)
        for key, p in zip(saved, mine):  # torch has cast it to the parameter's type
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    self.state[p][name] = value.detach().to(p.device, _wide(p), copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._attached = {}  # copies and pickles are attached to nothing

    @property
    def _step_supports_amp_scaling(self) -> bool:  # read by torch.amp.GradScaler
        if self._attached:
            raise RuntimeError(
                "GradScaler does not see the gradients of attached layers: they would be used scaled. "
                "Detach the layers, or train in bfloat16, which needs no scaler"
            )
        return False

    # ---------------------------------------------------------------- layers
    def attach(self, *layers: torch.nn.Module, when: str = "step") -> None:
        """Fuse backward and update of embedding layers: the gradient of their table is never made.

        From now on the layers keep their ``weight.grad`` (``tables.grad``) None. What a backward pass leaves
        is the gradient of the layer's result; one kernel sorts the ids, sums each touched row's gradient and
        updates the row and its state in place.

        Parameters
        ----------
        *layers : lutra.nn.Embedding, EmbeddingBag, MemoryLinear, or a layer that trains packed (LPTEmbedding,
        ALPTEmbedding)
            Whose weight (tables) is a parameter of this optimizer. Of any other module, such as a whole
            model, all layers of these kinds within it whose weight is a parameter of this optimizer.
        when : {'step', 'backward'}, default 'step'
            'step': the kernel runs in `step`. Results are those without `attach`: gradients accumulate over
            backward passes, `zero_grad` forgets them. 'backward': it runs in the backward pass, so that
            nothing is kept; then there must be one backward pass through one call of the layer for each
            `step`, a second is a RuntimeError. The table changes during backward: a loss that reads it
            elsewhere fails.

        Raises
        ------
        TypeError
            Another kind of layer, with none of these in it.
        ValueError
            The weight is not in this optimizer, or attached to another one; a weight with hooks, which would
            not be called.

        Notes
        -----
        What looks at ``weight.grad`` does not see these gradients: ``clip_grad_norm_`` leaves them out (of
        the norm, too), and ``GradScaler`` is refused. A gradient that reaches ``weight.grad`` by another way
        (a tied head, a penalty on the table) makes `step` a RuntimeError. Deep copies and pickles of the
        layers are ordinary ones. ``sparse`` has no meaning while attached.
        """
        _checks.choice("when", when, dict.fromkeys(WHEN, 0))
        known = {p for g in self.param_groups for p in g["params"]}
        layers = _attachable(layers, known)
        for layer in layers:
            if table_of(layer) not in known:
                raise ValueError("the layer's weight is not a parameter of this optimizer")
            old = layer._attachment
            if old is not None and old.optimizer is not self:
                raise ValueError("the layer is attached to another optimizer: detach it there first")
            if table_of(layer)._backward_hooks or table_of(layer)._post_accumulate_grad_hooks:
                raise ValueError("the layer's weight has hooks, which would never be called")
            shared = self._attached.get(table_of(layer))
            if shared is not None and hasattr(layer, "_write") and shared.owner is not layer:
                raise ValueError(
                    "the layer's weight is attached for another layer: packed tables cannot share it"
                )
            if shared is not None and shared.when != when:
                raise ValueError(f"the layer's weight is attached already, with when={shared.when!r}")
        for layer in layers:
            weight = table_of(layer)
            attachment = self._attached.get(weight)
            if attachment is None:
                attachment = self._attached[weight] = Attachment(
                    self, weight, when, layer if hasattr(layer, "_write") else None
                )
            layer._attachment = attachment
            attachment.layers.add(layer)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` of this optimizer's parameters, attached MemoryLinears too.

        Parameters
        ----------
        max_norm : float
            Of the 2-norm of all gradients together, dense, sparse, or not yet made.

        Returns
        -------
        Tensor
            The norm before.

        Raises
        ------
        ValueError
            Gradients of an attached embedding are among them, or of a layer attached with when='backward',
            which are used before they could be clipped.
        """
        max_norm = _checks.positive("max_norm", max_norm)
        total = torch.zeros((), dtype=torch.float64)
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        for i, grad in enumerate(grads):
            if grad.is_sparse:
                grads[i] = grad = grad.coalesce()._values() if not grad.is_coalesced() else grad._values()
            total += grad.detach().double().square().sum().to(total.device)
        for p, attachment in self._attached.items():
            if attachment.when == "backward" or any(not isinstance(c, TableCall) for c in attachment.pending):
                raise ValueError(
                    "clip_grad_norm_ counts attached MemoryLinear layers (when='step'); detach the others"
                )
            if attachment.pending:
                call = merge_tables(attachment.pending)  # type: ignore[arg-type]
                attachment.pending = [call]
                square = _tables_square(torch_kind(p.is_cuda), p.detach(), *call[:3])
                total += square.to(total.device)
        norm = total.sqrt()
        factor = float(max_norm / (norm + 1e-6))
        if factor < 1:
            for p in (p for g in self.param_groups for p in g["params"] if p.grad is not None):
                p.grad.mul_(factor)
            for attachment in self._attached.values():
                calls: list[Any] = [c._replace(grad=c.grad * factor) for c in attachment.pending]
                attachment.pending = [c._replace(versions=(0, c.versions[1])) for c in calls]
        return norm.float()

    def detach(self, *layers: torch.nn.Module) -> None:
        """Make attached layers ordinary ones again.

        Raises
        ------
        ValueError
            A layer that is not attached to this optimizer.
        RuntimeError
            It has gradients that neither `step` has used nor `zero_grad` forgotten.
        """
        for layer in layers:
            attachment = getattr(layer, "_attachment", None)
            if attachment is None or attachment.optimizer is not self:
                raise ValueError("the layer is not attached to this optimizer")
            if attachment.pending:
                raise RuntimeError("the layer has gradients that step() has not used: call step or zero_grad")
        for layer in layers:
            attachment, layer._attachment = layer._attachment, None
            attachment.layers.discard(layer)
            if not attachment.layers:
                self._attached.pop(attachment.weight, None)

    # ---------------------------------------------------------------- one parameter
    def _check_gradient(self, p: Tensor) -> None:
        if p in self._attached:
            if p.grad is not None:
                raise RuntimeError(
                    "the weight of an attached layer got a gradient by another way (a tied head, a penalty "
                    "on the table, a call under torch.func): detach the layer"
                )
            for call in self._attached[p].pending:
                call.check()
        elif p.grad is not None and p.grad.is_sparse and not 1 <= p.grad.sparse_dim() < max(2, p.dim()):
            raise ValueError(
                f"a sparse gradient has {p.grad.sparse_dim()} sparse dimensions of {p.dim()}; it must have a "
                "dense one: rows"
            )

    def _begin(
        self,
        group: dict[str, Any],
        p: Tensor,
        sparse: bool,
        shape: tuple[int, ...] | None = None,
        leading: int = 1,
    ) -> tuple[Any, ...]:
        """(s0, s1, rule, numbers, seed) of the parameter's next step; ``shape``: of a table that p stands
        for; ``leading``: how many dimensions count its rows.
        """
        whole = p.shape if shape is None else shape
        rule = self._rule(group)
        state = self.state[p]
        for name in STATES[rule]:
            if name not in state:
                size = whole[:leading] if rule == "rowwise_adagrad" else whole
                value = group.get("initial_accumulator_value", 0.0)
                state[name] = torch.full(size, value, dtype=_wide(p), device=p.device)
        at = state["step"] = int(state.get("step", 0)) + 1
        seed = None
        if group["stochastic_rounding"] and p.dtype == torch.bfloat16:
            params = chain.from_iterable(g["params"] for g in self.param_groups)
            place = next(i for i, q in enumerate(params) if q is p)
            seed = _mix(group["seed"], place, at)
        s0, s1 = (*(state[n] for n in STATES[rule]), None, None)[:2]
        return s0, s1, rule, self._numbers(group, at, sparse), seed

    def _update(self, group: dict[str, Any], p: Tensor) -> None:
        grad = p.grad
        assert grad is not None
        if not grad.is_sparse:
            s0, s1, rule, numbers, seed = self._begin(group, p, False)
            return _whole(p.detach(), grad, s0, s1, rule, numbers, seed)
        leading = grad.sparse_dim()
        s0, s1, rule, numbers, seed = self._begin(group, p, True, leading=leading)
        rows, values = grad._indices()[0], grad._values()
        for axis in range(1, leading):
            rows = rows * p.shape[axis] + grad._indices()[axis]
        if not len(rows):
            return None
        table, n = p.detach(), prod(p.shape[:leading])
        shape = n, prod(p.shape[leading:])
        if not table.is_contiguous() and p.dim() > 2:
            raise ValueError("a parameter with sparse gradients must be contiguous, or a matrix")
        values = values.reshape(len(rows), shape[1])
        wanted = (n,) if rule == "rowwise_adagrad" else shape
        s0, s1 = (None if s is None else s.view(wanted) for s in (s0, s1))
        if table.is_contiguous():
            kind = torch_kind(table.is_cuda)
            return _update_rows(kind, table.view(shape), rows, values, s0, s1, rule, numbers, seed)
        return step_rows(table, rows, values, s0, s1, rule, numbers, seed)

    def _update_attached(self, p: Tensor, calls: list[Any]) -> None:
        group = next(g for g in self.param_groups if any(q is p for q in g["params"]))
        if self._attached[p].owner is not None:
            return self._update_stored(group, p, self._attached[p].owner, calls)
        if isinstance(calls[0], TableCall):
            if not p.is_contiguous():
                raise ValueError("the tables of an attached layer must be contiguous")
            s0, s1, rule, numbers, seed = self._begin(group, p, True, leading=2)
            all_calls = merge_tables(calls)
            kind = torch_kind(p.is_cuda)
            return _update_tables(kind, p.detach(), *all_calls[:3], s0, s1, rule, numbers, seed)
        s0, s1, rule, numbers, seed = self._begin(group, p, True)
        kind, table = torch_kind(p.is_cuda), p.detach()
        if not table.is_contiguous():
            raise ValueError("the weight of an attached layer must be contiguous")
        call = calls[0] if len(calls) == 1 else merge(calls)
        if call is not None:
            return _update_bags(
                kind, table, call.grad, call.ids, call.offsets, call.weights, call.argmax, s0, s1, rule,
                numbers, call.mode, call.padding_idx, call.last, seed,
            )  # fmt: skip
        parts = [c.rows(len(table)) for c in calls]
        rows, values = (torch.cat(t) for t in zip(*parts))
        return _update_rows(kind, table, rows, values, s0, s1, rule, numbers, seed)

    def _update_stored(self, group: dict[str, Any], p: Tensor, layer: Any, calls: list[Call]) -> None:
        """A layer that holds its table packed: its touched rows are decoded, updated, and encoded again."""
        call = calls[0] if len(calls) == 1 else merge(calls)
        if call is not None:
            rows, grads = call.rows(layer.num_embeddings)
        else:
            every = [c.rows(layer.num_embeddings) for c in calls]
            rows, slot = torch.unique(torch.cat([r for r, _ in every]), return_inverse=True)
            values = torch.cat([g for _, g in every])
            grads = values.new_zeros(len(rows), values.shape[1]).index_add_(0, slot, values)
        if not bool(grads.isfinite().all()):
            raise RuntimeError(
                f"the gradient of a {type(layer).__name__} holds NaN or infinity, which its codes cannot: "
                "its table was not updated"
            )
        s0, s1, rule, numbers, _ = self._begin(group, p, True, layer._shape)
        if not len(rows):
            return
        batch, seed = sum(c.grad.shape[0] for c in calls), _mix(layer._seed_number(), self.state[p]["step"])
        kind, at_once = torch_kind(p.is_cuda), max(1, _VALUES // max(1, layer.embedding_dim))
        for begin in range(0, len(rows), at_once):  # in pieces that stay in the cache
            piece, g = rows[begin : begin + at_once], grads[begin : begin + at_once].float()
            table, numbers_of = layer._read(piece), torch.arange(len(piece), device=piece.device)
            p0, p1 = (None if s is None else s[piece].float() for s in (s0, s1))
            _update_rows(kind, table, numbers_of, g, p0, p1, rule, numbers)
            for state, part in ((s0, p0), (s1, p1)):
                if part is not None:
                    state[piece] = part.to(state.dtype)
            layer._write(piece, table, g, batch, seed)


def _attachable(layers: tuple[Any, ...], known: set[Tensor]) -> tuple[Any, ...]:
    """The layers themselves; of a module that is none of these kinds, those within it."""
    from ..nn import Embedding, EmbeddingBag, MemoryLinear

    def fits(layer):
        if isinstance(layer, MemoryLinear) and layer.quantized:
            return False
        return _own_forward(layer, Embedding, EmbeddingBag, MemoryLinear) or hasattr(layer, "_write")

    found: list[Any] = []
    for layer in layers:
        if fits(layer):
            found.append(layer)
            continue
        inside = layer.modules() if isinstance(layer, torch.nn.Module) else ()
        within = [m for m in inside if fits(m) and table_of(m) in known]
        if not within:
            raise TypeError(
                "a layer must be a lutra.nn.Embedding, EmbeddingBag, MemoryLinear (not quantized), or one "
                "that trains packed (LPTEmbedding, ALPTEmbedding, their bags); got "
                f"{type(layer).__qualname__}"
            )
        found += within
    return tuple(found)


def _own_forward(layer: torch.nn.Module, *classes: type) -> bool:
    """Whether a layer is one of ours and computes as ours do: subclasses may have made something else of
    it.
    """
    return any(isinstance(layer, c) and type(layer).forward is c.forward for c in classes)  # type: ignore[attr-defined]


def _whole(p: Tensor, grad: Tensor, s0: Any, s1: Any, rule: str, numbers: Step, seed: int | None) -> None:
    """A dense gradient: every value moves, as in torch.optim."""
    if p.dim() == 0:
        p, grad = p.view(1), grad.view(1)
        s0, s1 = (None if s is None else s.view(1) for s in (s0, s1))
    if p.dtype == _wide(p):
        return step(p, grad, s0, s1, rule, numbers)
    w = p.to(_wide(p))
    step(w, grad.to(w.dtype), s0, s1, rule, numbers)
    if seed is not None:
        rows = torch.arange(p.shape[0], device=p.device)
        bits = random_bits(seed, rows, w[0].numel() if len(rows) else 0)
        w = round_bfloat16(w.contiguous(), bits.view(w.shape))
    p.copy_(w)
    return None
