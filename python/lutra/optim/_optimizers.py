"""SGD, Adagrad, RowwiseAdagrad and Adam."""

from __future__ import annotations

from typing import Any

from .. import _checks
from ..gather._update import Step, adam_step, check_betas, fraction, not_negative
from ._base import RowOptimizer

_COMMON = """
    stochastic_rounding : bool, default False
        bfloat16 parameters are rounded up or down at random, with the probability that keeps the mean, so
        that updates below half a unit of their last bit are not lost. float32 and float64 parameters are not
        concerned, float16 ones are refused.
    seed : int, default 0
        Of the stochastic rounding. The same seed gives the same bits.
"""
_NOTES = """
    Sparse gradients (coalesced or not) and attached layers (`attach`) update the touched rows only, dense
    gradients every value. The state is float32 where parameters are float16 or bfloat16; parameters of these
    types are updated in float32 and rounded once. Deterministic. For float64 the same steps are composed of
    torch's operations.
"""


def _document(cls: Any) -> Any:
    cls.__doc__ = cls.__doc__.replace("    {common}\n", _COMMON.lstrip("\n")).replace(
        "    {notes}\n", _NOTES.lstrip("\n")
    )
    return cls


class _Options(RowOptimizer):
    def __init__(self, params: Any, stochastic_rounding: bool, seed: int, **options: Any) -> None:
        super().__init__(params, {**options, "stochastic_rounding": bool(stochastic_rounding), "seed": seed})

    def _check_group(self, group):
        for name in ("lr", "weight_decay", "eps", "lr_decay", "initial_accumulator_value"):
            if name in group:
                not_negative(name, group[name])
        _checks.integer("seed", group["seed"], 0)


@_document
class SGD(_Options):
    """Stochastic gradient descent, ``torch.optim.SGD`` on touched rows.

    Parameters
    ----------
    params : iterable
        As of any torch optimizer.
    lr : float, default 1e-3
    momentum : float, default 0
        Lazy with sparse gradients and attached layers: ``buffer = momentum * buffer + grad`` and the update
        are done for touched rows; a row that a step does not touch keeps its buffer, and is not moved by it
        (torch would decay every buffer and move every row). With dense gradients it is torch's.
    weight_decay : float, default 0
        Decoupled: rows are multiplied by ``1 - lr * weight_decay``. Without momentum that is torch's. With
        sparse gradients and attached layers touched rows only decay.
    {common}
    Notes
    -----
    {notes}
    Examples
    --------
    >>> import torch, lutra.nn, lutra.optim
    >>> table = lutra.nn.EmbeddingBag(10, 4, mode="sum")
    >>> optimizer = lutra.optim.SGD(table.parameters(), lr=0.5)
    >>> optimizer.attach(table)
    >>> before = table.weight.detach().clone()
    >>> table(torch.tensor([[1, 2, 1]])).sum().backward()
    >>> optimizer.step()
    >>> (before - table.weight).detach()[:4, 0]
    tensor([0.0000, 1.0000, 0.5000, 0.0000])
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params, stochastic_rounding, seed, lr=lr, momentum=momentum, weight_decay=weight_decay
        )

    def _check_group(self, group):
        super()._check_group(group)
        fraction("momentum", group["momentum"])

    def _rule(self, group):
        return "momentum" if group["momentum"] else "sgd"

    def _numbers(self, group, at, sparse):
        lr = float(group["lr"])
        return Step(lr, 1 - lr * group["weight_decay"], group["momentum"])


@_document
class Adagrad(_Options):
    """Adagrad, ``torch.optim.Adagrad`` on touched rows: one state number for each value of the table.

    Parameters
    ----------
    params : iterable
        As of any torch optimizer.
    lr : float, default 1e-2
    lr_decay : float, default 0
        As in torch: the rate of step t is ``lr / (1 + (t - 1) * lr_decay)``.
    weight_decay : float, default 0
        Decoupled (torch's Adagrad adds it to the gradient): values are multiplied by ``1 - rate *
        weight_decay``. With sparse gradients and attached layers those of touched rows only.
    initial_accumulator_value : float, default 0
    eps : float, default 1e-10
    {common}
    Notes
    -----
    {notes}
    References
    ----------
    Duchi, Hazan, Singer, Adaptive Subgradient Methods for Online Learning and Stochastic Optimization, JMLR
    2011.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params, stochastic_rounding, seed, lr=lr, lr_decay=lr_decay, weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value, eps=eps,
        )  # fmt: skip

    def _rule(self, group):
        return "adagrad"

    def _numbers(self, group, at, sparse):
        lr = float(group["lr"]) / (1 + (at - 1) * group["lr_decay"])
        return Step(lr, 1 - lr * group["weight_decay"], 0.0, 0.0, group["eps"])


@_document
class RowwiseAdagrad(_Options):
    """Adagrad with one state number a row.

    ``sum += mean(grad**2)``, then ``row -= lr / (sqrt(sum) + eps) * grad``.
    The optimizer of most recommenders (FBGEMM's EXACT_ROWWISE_ADAGRAD, DLRM's): its state is 1 / dim of the
    table.

    Parameters
    ----------
    params : iterable
        As of any torch optimizer. A vector's rows are its values; a tensor of more dimensions is a matrix of
        ``shape[0]`` rows.
    lr : float, default 1e-2
    weight_decay : float, default 0
        Decoupled: rows are multiplied by ``1 - lr * weight_decay``; with sparse gradients and attached layers
        touched rows only.
    initial_accumulator_value : float, default 0
    eps : float, default 1e-8
    {common}
    Notes
    -----
    {notes}
    References
    ----------
    Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems,
    arXiv 1906.00091. Khudia et al., FBGEMM, arXiv 2101.05615.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-8,
        *,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params, stochastic_rounding, seed, lr=lr, weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value, eps=eps,
        )  # fmt: skip

    def _rule(self, group):
        return "rowwise_adagrad"

    def _numbers(self, group, at, sparse):
        lr = float(group["lr"])
        return Step(lr, 1 - lr * group["weight_decay"], 0.0, 0.0, group["eps"])


@_document
class Adam(_Options):
    """Adam: ``torch.optim.SparseAdam`` on touched rows, ``torch.optim.AdamW`` on dense gradients.

    Parameters
    ----------
    params : iterable
        As of any torch optimizer.
    lr : float, default 1e-3
    betas : (float, float), default (0.9, 0.999)
    eps : float, default 1e-8
    weight_decay : float, default 0
        Decoupled, as in AdamW: values are multiplied by ``1 - lr * weight_decay``; with sparse gradients and
        attached layers those of touched rows only.
    {common}
    Notes
    -----
    With sparse gradients and attached layers the moments are lazy: those of rows that a step does not touch
    do not decay. The bias correction counts the parameter's steps, not the row's, as in SparseAdam.

    {notes}
    References
    ----------
    Kingma and Ba, Adam: A Method for Stochastic Optimization, ICLR 2015. Loshchilov and Hutter, Decoupled
    Weight Decay Regularization, ICLR 2019.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params, stochastic_rounding, seed, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )

    def _check_group(self, group):
        super()._check_group(group)
        check_betas(group["betas"])

    def _rule(self, group):
        return "adam"

    def _numbers(self, group, at, sparse):
        return adam_step(float(group["lr"]), group["betas"], group["eps"], at, group["weight_decay"], sparse)
