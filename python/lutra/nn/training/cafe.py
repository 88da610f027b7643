"""CAFE: a sketch finds the features that matter while it trains; they get rows of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks
from ._stored import Remapped, StoredEmbedding, StoredEmbeddingBag, hashed

_SLOTS = 4  # of a bucket


class _CAFE(Remapped):
    """CAFE: hot features, found by a sketch, have rows of their own, the others share hashed ones.

    Parameters
    ----------
    hot : int, optional
        Rows for hot features; default num_embeddings / 32.
    shared : int, optional
        Rows that the others share, by a hash; default num_embeddings / 32.
    slots : int, optional
        Of the sketch, a multiple of 4 or rounded up to one; default 4 * hot.
    importance : {'gradient', 'frequency'}, default 'gradient'
        What a feature's score adds up: the L2 norm of its gradient, or how often it occurs.
    every : int, default 100
        `step` migrates after so many steps.
    decay : float, default 0.98
        Scores are multiplied by it at every migration, so that what was hot long ago is forgotten. In (0, 1].
    seed : int, optional
        Of the hashes; default from torch's generator. A buffer.

    Notes
    -----
    HotSketch: an id is hashed to a bucket of 4 slots of (id, score, row). Where it is there, its score grows;
    otherwise it takes a free slot, or that of the smallest score, on top of which its own is put
    (SpaceSaving). In training mode every backward pass (every call, with 'frequency') updates it. `migrate`
    gives the ``hot`` slots of the highest scores rows of their own: a feature that becomes hot begins with a
    copy of its shared row, one that no longer is hot goes back to it. Call ``step()`` (or
    `lutra.nn.step_schedules`) after each step of the optimizer.

    The optimizer's state of a row that changes hands stays as it is. Memory, `nbytes`: ``(hot + shared) *
    dim`` values and 16 bytes a slot. Copies and checkpoints hold the sketch. Deterministic.

    References
    ----------
    Zhang et al., CAFE: Towards Compact, Adaptive, and Fast Embedding for Large-scale Recommendation Models,
    SIGMOD 2024 (arXiv 2312.03256). The published code compares scores with a threshold that it adapts to the
    number of hot rows; here the threshold is the ``hot``-th score itself.
    """

    _float32 = ("scores",)

    def _method(
        self,
        hot: int | None = None,
        shared: int | None = None,
        slots: int | None = None,
        importance: str = "gradient",
        every: int = 100,
        decay: float = 0.98,
        seed: int | None = None,
    ) -> None:
        n = self.num_embeddings
        self.hot = max(1, n // 32) if hot is None else _checks.integer("hot", hot, 1)
        self.shared = max(1, n // 32) if shared is None else _checks.integer("shared", shared, 1)
        slots = 4 * self.hot if slots is None else _checks.integer("slots", slots, self.hot)
        self.buckets = (slots + _SLOTS - 1) // _SLOTS
        _checks.choice("importance", importance, {"gradient": 0, "frequency": 1})
        self.importance, self.every = importance, _checks.integer("every", every, 1)
        self.decay = _checks.positive("decay", decay)
        if self.decay > 1:
            raise ValueError(f"decay must be in (0, 1], got {decay}")
        self._given = {"hot": self.hot, "shared": self.shared, "importance": importance, "every": every}
        self._seed(seed)
        device = self.weight.device
        shape = self.buckets, _SLOTS
        self.register_buffer("keys", torch.full(shape, -1, dtype=torch.int64, device=device))
        self.register_buffer("scores", torch.zeros(shape, device=device))
        self.register_buffer("rows", torch.full(shape, -1, dtype=torch.int32, device=device))
        self.register_buffer("steps", torch.tensor(0, dtype=torch.int64))
        self._make(self.hot + self.shared)

    # ---------------------------------------------------------------- look-up
    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(bucket, slot) of ids; slot -1 where the sketch does not hold them."""
        bucket = hashed(ids, self._seed_number() + 1, self.buckets)
        same = self.keys[bucket] == ids.unsqueeze(1)
        return bucket, torch.where(same.any(1), same.to(torch.uint8).argmax(1), -1)

    def _shared_row(self, ids: Tensor) -> Tensor:
        return hashed(ids, self._seed_number(), self.shared) + self.hot

    def _index(self, ids: Tensor) -> Tensor:
        bucket, slot = self._find(ids)
        own = torch.where(slot >= 0, self.rows[bucket, slot.clamp(min=0)].long(), -1)
        return torch.where(own >= 0, own, self._shared_row(ids))

    def _fill(self, dense: Tensor) -> None:
        self.keys.fill_(-1)
        self.scores.zero_()
        self.rows.fill_(-1)
        self._fill_means(dense)

    def _rows(self, ids: Tensor) -> Tensor:
        return self._watch(super()._rows(ids), ids)

    def _bags(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, mode: str, last: bool
    ) -> Tensor:
        out = super()._bags(ids, offsets, weights, mode, last)
        if not self._watching():
            return out
        flat = ids.reshape(-1)
        if offsets is None:
            bags = torch.arange(ids.shape[0], device=ids.device).repeat_interleave(ids.shape[1])
        else:
            ends = offsets[1:] if last else torch.cat([offsets[1:], offsets.new_tensor([len(flat)])])
            first = offsets[: len(ends)]
            bags = torch.arange(len(ends), device=ids.device).repeat_interleave(ends - first)
            begin = int(offsets[0]) if len(offsets) else 0
            flat = flat[begin : begin + len(bags)]
            weights = None if weights is None else weights[begin : begin + len(bags)]
        factor = None
        if weights is not None:
            factor = weights.detach().reshape(-1).abs().float()
        elif mode == "mean":
            counted = torch.ones_like(bags) if self.padding_idx is None else (flat != self.padding_idx).long()
            count = torch.zeros(len(out), dtype=torch.int64, device=ids.device).index_add_(0, bags, counted)
            factor = 1 / count.clamp(min=1)[bags].float()
        return self._watch(out, flat, bags, factor)

    # ---------------------------------------------------------------- the sketch
    def _watching(self) -> bool:
        return self.training and torch.is_grad_enabled() and self.table.requires_grad

    def _watch(
        self, out: Tensor, ids: Tensor, bags: Tensor | None = None, factor: Tensor | None = None
    ) -> Tensor:
        if not self._watching():
            return out
        if self.importance == "frequency":
            self.observe(ids)
            return out

        def seen(grad: Tensor) -> None:
            norm = grad.detach().float().norm(dim=1)
            if bags is not None:
                norm = norm[bags]
            self.observe(ids, norm if factor is None else norm * factor)

        if out.requires_grad:
            out.register_hook(seen)
        return out

    @torch.no_grad()
    def observe(self, ids: Tensor, scores: Tensor | None = None) -> None:
        """Add to the features' scores: what training does by itself.

        Parameters
        ----------
        ids : Tensor, shape (n,), int64
        scores : Tensor, shape (n,), optional
            Default: one for each.
        """
        if scores is None:
            scores = torch.ones(len(ids), device=ids.device)
        if self.padding_idx is not None:
            keep = ids != self.padding_idx
            ids, scores = ids[keep], scores[keep]
        ids, slot = torch.unique(ids, return_inverse=True)
        score = torch.zeros(len(ids), device=ids.device).index_add_(0, slot, scores.float())
        bucket, slot = self._find(ids)
        known = slot >= 0
        self.scores[bucket[known], slot[known]] += score[known]
        ids, score, bucket = ids[~known], score[~known], bucket[~known]
        while len(ids):  # one new id of each bucket at a time, in the order of the ids
            order = torch.sort(bucket, stable=True).indices
            sorted_bucket = bucket[order]
            first = torch.ones(len(order), dtype=torch.bool, device=ids.device)
            first[1:] = sorted_bucket[1:] != sorted_bucket[:-1]
            now = order[first]
            at, low = bucket[now], torch.where(self.keys[bucket[now]] < 0, -1.0, self.scores[bucket[now]])
            slot = low.argmin(1)
            self.scores[at, slot] = score[now] + self.scores[at, slot]
            self.keys[at, slot] = ids[now]
            self.rows[at, slot] = -1  # who was there goes back to its shared row
            left = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
            left[now] = False
            ids, score, bucket = ids[left], score[left], bucket[left]

    @torch.no_grad()
    def migrate(self) -> int:
        """Give the features of the highest scores rows of their own; how many became hot.

        Scores are multiplied by ``decay`` afterwards.
        """
        keys, scores, rows = self.keys.view(-1), self.scores.view(-1), self.rows.view(-1)
        ranked = torch.where(keys >= 0, scores, -1.0)
        best = torch.sort(ranked, descending=True, stable=True).indices[: self.hot]
        best = best[keys[best] >= 0]
        chosen = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
        chosen[best] = True
        rows[~chosen] = -1
        used = torch.zeros(self.hot, dtype=torch.bool, device=keys.device)
        used[rows[rows >= 0].long()] = True
        fresh = best[rows[best] < 0]
        free = (~used).nonzero().reshape(-1)[: len(fresh)]
        rows[fresh] = free.int()
        self.table[free] = self.table[self._shared_row(keys[fresh])]
        scores *= self.decay
        return len(fresh)

    def step(self) -> None:
        """Count a step of the optimizer; `migrate` after every ``every``-th."""
        self.steps += 1
        if int(self.steps) % self.every == 0:
            self.migrate()

    def hot_ids(self) -> Tensor:
        """The ids that have rows of their own now, increasing."""
        return torch.sort(self.keys[self.rows >= 0]).values


class CAFEEmbedding(_CAFE, StoredEmbedding):
    pass


class CAFEEmbeddingBag(_CAFE, StoredEmbeddingBag):
    pass
