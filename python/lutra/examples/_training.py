"""The training loop of `train_lm`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ._models import build
from ._run import Run
from ._text import Corpus

#: (step, training loss, held-out loss or NaN)
Losses = list[list[float]]


@dataclass(frozen=True)
class Settings:
    """What a run depends on; the same settings on the same machine give the same losses."""

    arch: str = "memoryformer"
    data: str = ""
    tokens: str = "byte"
    vocab_size: int = 4096
    dim: int = 256
    layers: int = 4
    heads: int = 8
    bits: int = 8
    ffn_bits: int = 10
    context: int = 128
    batch: int = 16
    steps: int = 2000
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.0
    clip: float = 1.0
    precision: str = "float32"
    compile: bool = False
    device: str = "cpu"
    eval_every: int = 200
    eval_windows: int = 64
    seed: int = 0

    def check(self) -> None:
        """ValueError for a number that is none."""
        for name in ("dim", "layers", "heads", "context", "batch", "steps", "eval_every", "eval_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class Trainer:
    """A model, its optimizer and the text, ready to make steps."""

    def __init__(self, settings: Settings, run: Run | None = None) -> None:
        settings.check()
        self.settings, self.run = settings, run
        self.corpus = Corpus(
            settings.data, settings.tokens, settings.vocab_size, settings.context,
            None if run is None else run.tokenizer,
        )  # fmt: skip
        torch.manual_seed(settings.seed)
        self.model = build(
            settings.arch, self.corpus.vocab_size, dim=settings.dim, layers=settings.layers,
            heads=settings.heads, bits=settings.bits, ffn_bits=settings.ffn_bits,
        ).to(settings.device)  # fmt: skip
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(0.9, 0.95),
        )
        self.loss: Callable[[torch.Tensor], torch.Tensor] = self.model.loss
        if settings.compile:
            self.loss = torch.compile(self.model.loss)
        self.held_out = torch.from_numpy(self.corpus.evaluation(settings.eval_windows))
        self.step, self.losses = 0, []  # type: int, Losses

    def rate(self, step: int) -> float:
        """Learning rate: a linear warm-up, then half a cosine down to a tenth."""
        s = self.settings
        if step < s.warmup:
            return s.lr * (step + 1) / s.warmup
        done = (step - s.warmup) / max(1, s.steps - s.warmup)
        return s.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))

    def _autocast(self) -> Any:
        s = self.settings
        kind = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(s.precision)
        return torch.autocast(s.device.partition(":")[0], kind or torch.bfloat16, enabled=kind is not None)

    def one_step(self) -> float:
        """Make one step; the training loss before it."""
        s = self.settings
        ids = torch.from_numpy(self.corpus.batch(s.seed, self.step, s.batch)).to(s.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        self.model.train()
        with self._autocast():
            loss = self.loss(ids)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {self.step + 1}: start again with a lower --lr (now {s.lr})"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        self.optimizer.step()
        self.step += 1
        return value

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss on the held-out windows, nats a token."""
        self.model.eval()
        total = 0.0
        with self._autocast():
            for part in self.held_out.split(self.settings.batch):
                total += float(self.loss(part.to(self.settings.device))) * len(part)
        return total / len(self.held_out)

    def train(
        self, checkpoint_every: int = 0, seen: Callable[[int, float, float], None] | None = None
    ) -> Losses:
        """Go on to the last step. ``seen(step, training loss, held-out loss or NaN)`` is told of each."""
        s = self.settings
        while self.step < s.steps:
            value = self.one_step()
            last = self.step == s.steps
            held_out = self.evaluate() if last or self.step % s.eval_every == 0 else math.nan
            self.losses.append([self.step, value, held_out])
            if self.run is not None and (last or (checkpoint_every and self.step % checkpoint_every == 0)):
                self.save()
            if seen is not None:
                seen(self.step, value, held_out)
        return self.losses

    def save(self) -> None:
        """Write the run's checkpoint."""
        if self.run is not None:
            self.run.save(self.step, self.model, self.optimizer, self.losses)

    def resume(self) -> int:
        """Take over the run's checkpoint; the step it was at."""
        if self.run is not None:
            self.step, self.losses = self.run.load(self.model, self.optimizer)
        return self.step

    def sample(self, tokens: int, temperature: float = 0.8) -> str:
        """A continuation of the first held-out token."""
        self.model.eval()
        start = self.held_out[:1, :1].to(self.settings.device)
        generator = torch.Generator(self.settings.device).manual_seed(self.settings.seed)
        made = self.model.generate(start, tokens, temperature=temperature, top_k=50, generator=generator)
        return self.corpus.decode(made[0].tolist())
