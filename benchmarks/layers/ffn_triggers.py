"""The top triggers of feed-forward keys over a stream of tokens, against torch.topk.

Milliseconds a batch: of `ColumnTop`; of ``topk`` of what was kept and the batch, concatenated; and of keeping
all coefficients for one ``topk`` at the end, whose memory grows with the corpus.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from lutra.models.ffn_memory import ColumnTop, top_triggers

TOP = 25


class Concatenated:
    """topk of the concatenation of what was kept and what is new."""

    def __init__(self, keys: int) -> None:
        self.scores = torch.full((keys, TOP), -torch.inf)
        self.rows = torch.full((keys, TOP), -1)
        self.seen = 0

    def update(self, scores):
        self.scores, at = torch.cat([self.scores, scores.T], 1).topk(TOP)
        old = self.rows.gather(1, at.clamp(max=TOP - 1))
        self.rows = torch.where(at < TOP, old, at - TOP + self.seen)
        self.seen += len(scores)


class Everything:
    """All coefficients, and topk of them at the end."""

    def __init__(self, keys: int) -> None:
        self.kept: list = []

    def update(self, scores):
        self.kept.append(scores.T.contiguous())

    def finish(self):
        self.scores, self.rows = torch.cat(self.kept, 1).topk(TOP)


def timed(function: Callable[[], object], clock) -> float:
    begin = clock()
    function()
    return 1e3 * (clock() - begin)


def stream(keys: int, tokens: int, batches: int) -> Iterator[dict]:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    ours, theirs, all_of_it = ColumnTop(keys, TOP), Concatenated(keys), Everything(keys)
    torch.manual_seed(0)
    total = {"lutra": 0.0, "topk": 0.0, "everything": 0.0}
    marks = {batches // 4, batches}
    for i in range(1, batches + 1):
        scores = torch.relu(torch.randn(tokens, keys))
        ways = ("lutra", ours), ("topk", theirs), ("everything", all_of_it)
        for name, way in ways if i % 2 else ways[::-1]:
            total[name] += timed(lambda way=way, scores=scores: way.update(scores), clock)
        if i in marks:
            about = {"keys": keys, "batch": tokens, "tokens": i * tokens, "threads": torch.get_num_threads()}
            shown = {name: ms / i for name, ms in total.items()}
            if i < batches:
                shown.pop("everything")
            else:
                shown["everything"] += timed(all_of_it.finish, clock) / i
                assert torch.equal(ours.scores, theirs.scores)
                assert torch.equal(ours.scores, all_of_it.scores)
                assert (ours.rows == theirs.rows).float().mean() > 0.999  # topk takes any of equal ones
            yield {"what": "top of columns", **about, **shown}


def model(quick: bool) -> Iterator[dict]:
    """A model's forward pass, and the same with all its layers watched."""
    try:
        from transformers import GPT2Config, GPT2Model
    except ImportError:
        return
    width, layers = (64, 2) if quick else (768, 4)
    torch.manual_seed(0)
    net = GPT2Model(GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, vocab_size=1000)).eval()
    corpus = [torch.randint(0, 1000, (8, 256)) for _ in range(2 if quick else 24)]
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with torch.no_grad():
        net(corpus[0])
        plain = timed(lambda: [net(input_ids=b, use_cache=False) for b in corpus], clock) / len(corpus)
        watched = timed(lambda: top_triggers(net, corpus, top=TOP, progress=False), clock) / len(corpus)
    yield {
        "what": "model", "keys": layers * 4 * width, "batch": 2048, "tokens": 2048 * len(corpus),
        "threads": torch.get_num_threads(), "forward": plain, "with triggers": watched,
    }  # fmt: skip


def rows(quick: bool) -> Iterator[dict]:
    yield from stream(*((256, 300, 8) if quick else (3072, 2048, 32)))
    if not quick:
        yield from stream(11008, 1024, 16)
    yield from model(quick)


def line(row: dict) -> str:
    head = f"{row['what']:14} keys {row['keys']:5} batch {row['batch']} tokens {row['tokens']:6}: "
    names = ("lutra", "topk", "everything", "forward", "with triggers")
    return head + "; ".join(f"{name} {row[name]:.2f} ms" for name in names if name in row)
