"""TopKSAE: a sparse autoencoder whose dense activations are never written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..gather import bag, row_dots
from ..torch_ops import ops, plain
from ._product_keys import flat_inputs
from ._sae_ops import make_codes, select


class SparseCodes(NamedTuple):
    """What `TopKSAE.encode` gives: the values of k latents of each input, and which they are."""

    values: Tensor
    ids: Tensor


class SAEOutput(NamedTuple):
    """Result of `TopKSAE.loss`."""

    loss: Tensor
    reconstruction: Tensor
    codes: SparseCodes
    fvu: Tensor
    auxiliary: Tensor


class TopKSAE(torch.nn.Module):
    """A sparse autoencoder that keeps the k largest activations.

    ::

        values, ids = top k of relu(weight @ (x - decoder_bias) + bias)
        reconstruction = sum of values * decoder[ids] + decoder_bias

    Parameters
    ----------
    in_features : int
        d.
    num_latents : int
        n.
    k : int, default 32
        At most n.
    dead_after : int, default 100_000
        A latent is dead when so many training inputs in a row have not used it.
    aux_k : int, optional
        Dead latents that the auxiliary loss lets explain what is left; default in_features / 2.
    sparse : bool, default False
        The gradients of weight and decoder are sparse tensors of the touched rows. (Also with False only
        these are summed; the rest is zeros.)
    device, dtype : optional

    Attributes
    ----------
    weight : Parameter, shape (n, d)
        The encoder; begins as a copy of decoder.
    bias : Parameter, shape (n,)
    decoder : Parameter, shape (n, d)
        A direction for each latent; begins with random rows of norm 1.
    decoder_bias : Parameter, shape (d,)
    unused : Tensor, int64, shape (n,)
        How many training inputs each latent has not been used by since its last use.

    Raises
    ------
    ValueError
        An argument out of range, an input of another width, NaN among activations.

    Notes
    -----
    The k latents are found by an exact scan with selection inside (`lutra.scan.knn_screened` over 8-bit codes
    of the encoder, which misses none, or `lutra.scan.knn`): nothing of size (inputs, n) is written. Of equal
    activations the lower latent is taken. Where fewer than k are positive, the next ones come with value 0.
    The codes take d + 8 bytes a latent. In training they are made for each call that pays for it (32
    inputs); in evaluation they are kept, until the encoder or the mode changes. On CUDA there are none:
    tensor cores bound the activations (`lutra.scan.knn`).

    Gradients flow through the chosen entries: k rows of encoder and decoder an input. float64 is computed
    with torch's own ops, which write the activations.

    References
    ----------
    Makhzani and Frey, k-Sparse Autoencoders, 2013, arXiv 1312.5663. Gao et al., Scaling and evaluating sparse
    autoencoders, 2024, arXiv 2406.04093 (auxiliary loss, initialisation).

    Examples
    --------
    >>> import torch, lutra.nn
    >>> sae = lutra.nn.TopKSAE(16, 200, k=4)
    >>> codes = sae.encode(torch.randn(3, 16))
    >>> codes.ids.shape, sae.decode(codes).shape
    (torch.Size([3, 4]), torch.Size([3, 16]))
    """

    unused: Tensor
    _made_for: Any
    _screen: Any
    _inputs: int

    def __init__(
        self,
        in_features: int,
        num_latents: int,
        k: int = 32,
        *,
        dead_after: int = 100_000,
        aux_k: int | None = None,
        sparse: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_features = _checks.integer("in_features", in_features, 1)
        self.num_latents = _checks.integer("num_latents", num_latents, 1)
        self.k = _checks.integer("k", k, 1)
        if k > num_latents:
            raise ValueError(f"k is {k}; it must be at most num_latents = {num_latents}")
        self.dead_after = _checks.integer("dead_after", dead_after, 1)
        self.aux_k = _checks.integer("aux_k", max(1, in_features // 2) if aux_k is None else aux_k, 1)
        self.sparse = bool(sparse)
        factory = {"device": device, "dtype": dtype}
        self.weight = torch.nn.Parameter(torch.empty(num_latents, in_features, **factory))
        self.bias = torch.nn.Parameter(torch.empty(num_latents, **factory))
        self.decoder = torch.nn.Parameter(torch.empty(num_latents, in_features, **factory))
        self.decoder_bias = torch.nn.Parameter(torch.empty(in_features, **factory))
        self.register_buffer("unused", torch.zeros(num_latents, dtype=torch.int64, device=device))
        self._forget()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random decoder rows of norm 1, the encoder a copy of them, biases of zero."""
        with torch.no_grad():
            torch.nn.init.normal_(self.decoder)
            self.normalize_()
            self.weight.copy_(self.decoder)
            self.bias.zero_()
            self.decoder_bias.zero_()
            self.unused.zero_()

    @torch.no_grad()
    def normalize_(self, ids: Tensor | None = None) -> TopKSAE:
        """Give decoder rows (all, or those of ``ids``) the norm 1; to be called after an optimizer's step."""
        if ids is None:
            self.decoder.copy_(torch.nn.functional.normalize(self.decoder, dim=1))
        else:
            ids = torch.unique(ids)
            self.decoder[ids] = torch.nn.functional.normalize(self.decoder[ids], dim=1)
        return self

    # ---------------------------------------------------------------- encode
    def encode(self, x: Tensor) -> SparseCodes:
        """The k largest activations of each input (..., d): values and ids, (..., k), largest first."""
        flat = flat_inputs(x, self.in_features)
        centred = self._centred(flat)
        found, ids = self._select(centred.detach())
        if torch.is_grad_enabled() and (centred.requires_grad or self.weight.requires_grad):
            found = row_dots(self.weight, ids, centred, sparse_grad=self.sparse) + self.bias[ids]
        values = found.relu()
        shape = (*x.shape[:-1], self.k)
        return SparseCodes(values.reshape(shape), ids.reshape(shape))

    def _centred(self, flat: Tensor) -> Tensor:
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        return flat.to(wide) - self.decoder_bias.to(wide)

    @torch.no_grad()
    def _select(self, x: Tensor, k: int | None = None, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k largest pre-activations of centred inputs and their latents; among some latents only."""
        k = self.k if k is None else k
        weight, bias = self.weight.detach(), self.bias.detach()
        if among is not None:
            found, ids = ops.linear_topk(x, weight[among], bias[among], k)
            return found, among[ids]
        if self.training or x.dtype == torch.float64 or not (x.is_cpu and plain(x, weight, bias)):
            return ops.linear_topk(x, weight, bias, k)
        made_for = (weight.data_ptr(), weight._version, bias.data_ptr(), bias._version)
        if made_for != self._made_for:
            self._forget()
            self._made_for = made_for
        self._inputs += len(x)
        if self._screen is None:
            self._screen = make_codes(self._inputs, weight, bias, k)
        return select(x, weight, bias, self._screen, k)

    def _forget(self) -> None:
        """What evaluation keeps: 8-bit codes of the encoder, once they have paid."""
        self._made_for = self._screen = None
        self._inputs = 0

    def train(self, mode: bool = True) -> TopKSAE:
        """As in torch; what was kept of the encoder is forgotten."""
        self._forget()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles make their own
        return {**self.__dict__, "_made_for": None, "_screen": None, "_inputs": 0}

    # ---------------------------------------------------------------- decode
    def decode(self, codes: SparseCodes | tuple[Tensor, Tensor]) -> Tensor:
        """Reconstructions (..., d) of codes: one bag of decoder rows each."""
        return self._bag(*codes) + self.decoder_bias

    def _bag(self, values: Tensor, ids: Tensor) -> Tensor:
        if values.shape != ids.shape or ids.dim() < 1:
            raise ValueError(
                f"codes.values has shape {tuple(values.shape)}, codes.ids {tuple(ids.shape)}; they must be "
                "equal"
            )
        length = ids.shape[-1]
        out = bag(
            self.decoder, ids.reshape(-1, length), weights=values.reshape(-1, length), sparse_grad=self.sparse
        )
        return out.reshape(*ids.shape[:-1], self.in_features)

    def forward(self, x: Tensor) -> tuple[Tensor, SparseCodes]:
        """Reconstruction and codes; in training mode uses of latents are counted."""
        codes = self.encode(x)
        if self.training:
            self.count(codes)
        return self.decode(codes), codes

    @torch.no_grad()
    def count(self, codes: SparseCodes) -> None:
        """Add inputs to the count since each latent's last use."""
        self.unused += codes.ids.numel() // self.k
        uses = self.unused.new_zeros(self.num_latents)
        uses.index_add_(0, codes.ids.reshape(-1), (codes.values > 0).reshape(-1).to(uses.dtype))
        self.unused.masked_fill_(uses > 0, 0)

    @property
    def dead(self) -> Tensor:
        """Latents that the last ``dead_after`` training inputs have not used."""
        return torch.nonzero(self.unused >= self.dead_after).squeeze(1)

    def loss(self, x: Tensor, aux_weight: float = 1 / 32) -> SAEOutput:
        """Squared error of the reconstruction and, where latents are dead, AuxK's loss.

        Both are shares of the inputs' variance: the fraction that stays unexplained (FVU), and the fraction
        of what is left that the ``aux_k`` dead latents of the largest activations do not explain.

        Parameters
        ----------
        x : Tensor, shape (..., d)
        aux_weight : float, default 1 / 32

        Returns
        -------
        SAEOutput
            ``loss = fvu + aux_weight * auxiliary``, with the reconstruction and codes.
        """
        reconstruction, codes = self(x)
        wide = reconstruction.dtype if reconstruction.dtype == torch.float64 else torch.float32
        left = x.to(wide) - reconstruction.to(wide)
        flat = x.reshape(-1, self.in_features).to(wide)
        variance = (flat - flat.mean(0)).square().sum().clamp(min=1e-12)
        fvu = left.square().sum() / variance
        auxiliary = fvu.new_zeros(())
        dead = self.dead
        if aux_weight and len(dead):
            target = left.detach().reshape(-1, self.in_features)
            centred = self._centred(flat)
            _, ids = self._select(centred.detach(), min(self.aux_k, len(dead)), dead)
            values = (row_dots(self.weight, ids, centred, sparse_grad=self.sparse) + self.bias[ids]).relu()
            missed = target - self._bag(values, ids).to(wide)
            auxiliary = missed.square().sum() / target.square().sum().clamp(min=1e-12)
            auxiliary = torch.nan_to_num(auxiliary)
        return SAEOutput(fvu + aux_weight * auxiliary, reconstruction, codes, fvu, auxiliary)

    # ---------------------------------------------------------------- steering
    def steer(
        self, x: Tensor, latents: Mapping[int, float], *, keep_error: bool = True, normalize: bool = False
    ) -> Tensor:
        """Inputs with some latents set to given values.

        Parameters
        ----------
        x : Tensor, shape (..., d)
        latents : mapping of int to float
            The activation that each of these latents shall have; 0 takes it out.
        keep_error : bool, default True
            What the autoencoder does not reconstruct stays in the result: ``x`` is moved along the decoder
            rows of these latents only. False: the result is the reconstruction from the changed codes.
        normalize : bool, default False
            Give the results the norm 1, for an index by inner product over unit vectors.

        Returns
        -------
        Tensor, shape (..., d)
            To be searched with, for example by `lutra.index`.

        References
        ----------
        O'Neill, Ye, Iyer and Wu, Disentangling Dense Embeddings with Sparse Autoencoders, 2024,
        arXiv 2408.00657.
        """
        if not isinstance(latents, Mapping) or not latents:
            raise TypeError(f"latents must be a mapping of latents to values, got {latents!r}")
        numbers = [_checks.integer("a latent", i, 0, self.num_latents - 1) for i in latents]
        ids = torch.tensor(numbers, device=x.device)
        flat = flat_inputs(x, self.in_features)
        codes = self.encode(flat)
        wanted = torch.tensor([float(v) for v in latents.values()], device=x.device, dtype=codes.values.dtype)
        same = codes.ids.unsqueeze(-1) == ids  # (inputs, k, latents)
        now = (codes.values.unsqueeze(-1) * same).sum(1)
        moved = (wanted - now) @ self.decoder[ids].to(codes.values.dtype)
        out = (flat if keep_error else self.decode(codes)) + moved
        if normalize:
            out = torch.nn.functional.normalize(out, dim=-1)
        return out.reshape(x.shape).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return (
            f"in_features={self.in_features}, num_latents={self.num_latents}, k={self.k}, "
            f"dead_after={self.dead_after}, aux_k={self.aux_k}, sparse={self.sparse}"
        )
