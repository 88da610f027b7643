"""The texts of `factory`: FAISS's words, read into a `Plan` whose parts all fit together."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NoReturn

_BINARY = ("hamming", "jaccard")
_REFINE = {
    "Flat": "float32", "SQfp16": "float16", "SQbf16": "bfloat16", "SQ8": "int8",
}  # fmt: skip
_KEPT = {"SQfp16": "float16", "SQbf16": "bfloat16", "SQ8_direct": "uint8", "SQ8_direct_signed": "int8"}

_EXPECT_TRANSFORM = "PCA64, PCAR64, PCAW64, PCAWR64, OPQ32, OPQ32_64, RR, RR64, L2norm"
_EXPECT_CODE = (
    "Flat, PQ32, PQ32x4, PQ32x4fs, PQ16x6, SQ8, SQ6, SQ4, SQfp16, SQbf16, SQ8_direct, SQ8_direct_signed, "
    "RaBitQ, RaBitQ4, RQ8x8, RSQ4"
)
_EXPECT_REFINE = "RFlat, Refine(SQfp16), Refine(SQbf16), Refine(SQ8)"
# Words that people may mean by what they wrote; for the suggestion in an error.
_WORDS = (
    "Flat", "PQ32", "PQ32x4fs", "SQ8", "SQ6", "SQ4", "SQfp16", "SQbf16", "RaBitQ", "RaBitQ4", "RQ8x8", "RSQ4",
    "HNSW32", "IVF1024", "PCA64", "PCAR64", "PCAW64", "PCAWR64", "OPQ32", "OPQ32_64", "RR64", "L2norm",
    "RFlat",     "Refine(SQfp16)", "Refine(SQ8)", "IDMap", "BFlat",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A transform: 'PCA', 'OPQ', 'RR' or 'L2norm', its output dimension, and its options."""

    kind: str
    d: int
    m: int = 0
    whiten: bool = False
    rotate: bool = False


@dataclass(frozen=True)
class Code:
    """Storage. ``name``: the dtype of 'Flat', the kind of 'SQ'; others: 'PQ', 'RaBitQ', 'RQ', 'RSQ'."""

    kind: str
    name: str = "float32"
    m: int = 0
    bits: int = 8


@dataclass(frozen=True)
class Plan:
    """What a text asks for."""

    text: str
    d: int
    metric: str
    steps: tuple[Step, ...]
    code: Code
    nlist: int | None = None
    soar: bool = False
    graph: int | None = None
    refine: str | None = None

    @property
    def inner(self) -> int:
        """The dimension after the transforms."""
        return self.steps[-1].d if self.steps else self.d

    @property
    def is_binary(self) -> bool:
        return self.metric in _BINARY


def read(text: str, d: int, metric: str) -> Plan:
    """Parse ``text``; a ValueError names the part that is not understood, and what could stand there."""
    return _Reader(text, d, metric).plan()


class _Reader:
    def __init__(self, text: str, d: int, metric: str) -> None:
        if not isinstance(text, str):
            raise TypeError(f"text must be a str such as 'IVF1024,PQ32x4fs,RFlat', got {type(text).__name__}")
        self.text, self.d, self.metric = text, d, metric
        self.parts = _split(text)
        self.at = 0
        self.width = d  # after the transforms so far

    def fail(self, problem: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        where = f"part {at + 1}, {self.parts[at]!r}" if at < len(self.parts) else "its end"
        raise ValueError(f"factory text {self.text!r}, at {where}: {problem}")

    def unknown(self, expected: str) -> NoReturn:
        part = self.parts[self.at] if self.at < len(self.parts) else ""
        close = get_close_matches(part, _WORDS, 1, 0.7)
        hint = f"; did you mean {close[0]!r}?" if close and close[0] != part else ""
        self.fail(f"expected one of {expected}{hint}")

    def take(self, pattern: str) -> re.Match[str] | None:
        """The next part where it matches, and step over it."""
        if self.at >= len(self.parts):
            return None
        match = re.fullmatch(pattern, self.parts[self.at])
        if match:
            self.at += 1
        return match

    def number(self, text: str, name: str, low: int, high: int) -> int:
        """A number of the part that was just taken."""
        value = int(text) if len(text) < 12 else 10**11
        if not low <= value <= high:
            self.fail(f"{name} must be in [{low}, {high}], got {text}", self.at - 1)
        return value

    # ---- the grammar
    def plan(self) -> Plan:
        if not any(self.parts):
            raise ValueError(f"factory text {self.text!r} is empty; expected an index such as {_EXPECT_CODE}")
        self.take("IDMap2?")
        if self.metric in _BINARY:
            return self.binary()
        steps = self.steps()
        nlist, soar = self.lists()
        graph = None if nlist else self.graph()
        code = self.code(optional=graph is not None)
        if graph is not None and code.kind not in ("Flat", "SQ", "PQ"):
            possible = "Flat, SQ8, SQfp16, SQbf16, PQ32"
            self.fail(
                f"a graph is over vectors, scalar codes or PQ: {possible}; not {code.kind}", self.at - 1
            )
        self.take("IDMap2?")
        refine = self.refine()
        self.take("IDMap2?")
        if self.at < len(self.parts):
            self.unknown(f"the end, IDMap{'' if refine else ', ' + _EXPECT_REFINE}")
        return Plan(self.text, self.d, self.metric, tuple(steps), code, nlist, soar, graph, refine)

    def binary(self) -> Plan:
        if self.take("BFlat|Flat") is None:
            self.unknown(f"BFlat (with metric={self.metric!r} vectors are packed bits)")
        self.take("IDMap2?")
        if self.at < len(self.parts):
            self.unknown("the end")
        return Plan(self.text, self.d, self.metric, (), Code("Flat", "bits"))

    def steps(self) -> list[Step]:
        found: list[Step] = []
        while self.at < len(self.parts):
            step = self.step()
            if step is None:
                break
            found.append(step)
            self.width = step.d
        return found

    def step(self) -> Step | None:
        if match := self.take(r"PCA(W?)(R?)(\d+)"):
            d = self.number(match[3], "the dimension after PCA", 1, self.width)
            return Step("PCA", d, whiten=bool(match[1]), rotate=bool(match[2]))
        if match := self.take(r"OPQ(\d+)(?:_(\d+))?"):
            m = self.number(match[1], "the sub-vectors of OPQ", 1, self.width)
            d = self.number(match[2], "the dimension after OPQ", 1, self.width) if match[2] else self.width
            if d % m:
                self.fail(f"{m} sub-vectors do not divide {d} dimensions", self.at - 1)
            return Step("OPQ", d, m=m)
        if match := self.take(r"RR(\d+)?"):
            d = self.number(match[1], "the dimension after RR", 1, self.width) if match[1] else self.width
            return Step("RR", d)
        if self.take("L2norm"):
            return Step("L2norm", self.width)
        return None

    def lists(self) -> tuple[int | None, bool]:
        match = self.take(r"IVF(\d+)(k?)(_SOAR)?(?:_HNSW\d*|\(HNSW\d*\))?")
        if match is None:
            return None, False
        count = self.number(match[1], "the number of lists", 1, 2**24)
        return count * (1024 if match[2] else 1), bool(match[3])

    def graph(self) -> int | None:
        match = self.take(r"HNSW(\d*)")
        if match is None:
            if self.at < len(self.parts) and (joined := re.fullmatch(r"(HNSW\d*)_(.+)", self.parts[self.at])):
                self.parts[self.at : self.at + 1] = [joined[1], joined[2]]  # HNSW32_SQ8 is HNSW32,SQ8
                return self.graph()
            return None
        return self.number(match[1], "the links of a node", 2, 512) if match[1] else 32

    def code(self, optional: bool) -> Code:
        for pattern, make in _CODES:
            if match := self.take(pattern):
                return make(self, match)
        if optional and (self.at == len(self.parts) or re.match("R|IDMap", self.parts[self.at])):
            return Code("Flat")
        first = self.at == 0 or not re.match("IVF|HNSW", self.parts[self.at - 1])
        self.unknown(f"{_EXPECT_TRANSFORM}, IVF1024, HNSW32, {_EXPECT_CODE}" if first else _EXPECT_CODE)

    def refine(self) -> str | None:
        if self.take("RFlat"):
            return "float32"
        match = self.take(r"Refine\((.*)\)")
        if match is None:
            return None
        if match[1] not in _REFINE:
            self.at -= 1
            self.unknown(_EXPECT_REFINE)
        return _REFINE[match[1]]


def _pq(reader: _Reader, match: re.Match[str]) -> Code:
    m = reader.number(match[1], "the sub-vectors of PQ", 1, reader.width)
    bits = reader.number(match[2], "the bits of PQ", 1, 8) if match[2] else 8
    if reader.width % m:
        reader.fail(f"{m} sub-vectors do not divide {reader.width} dimensions", reader.at - 1)
    if match[3] and bits != 4:
        reader.fail("fs (codes scanned in registers) needs 4 bits: x4fs", reader.at - 1)
    return Code("PQ", m=m, bits=bits)


def _rabitq(reader: _Reader, match: re.Match[str]) -> Code:
    bits = match[1] or match[2]
    return Code("RaBitQ", bits=reader.number(bits, "the bits of RaBitQ", 1, 8) if bits else 1)


def _rq(reader: _Reader, match: re.Match[str]) -> Code:
    m = reader.number(match[1], "the steps of RQ", 1, 256)
    return Code("RQ", m=m, bits=reader.number(match[2], "the bits of RQ", 1, 8))


_SQ = {"8": "8bit", "6": "6bit", "4": "4bit", "fp16": "fp16", "bf16": "bf16"}
_CODES: tuple[tuple[str, Callable[[_Reader, re.Match[str]], Code]], ...] = (
    ("Flat", lambda reader, match: Code("Flat")),
    ("SQfp16|SQbf16|SQ8_direct|SQ8_direct_signed", lambda reader, match: Code("Flat", _KEPT[match[0]])),
    ("SQ([864])", lambda reader, match: Code("SQ", _SQ[match[1]], bits=int(match[1]))),
    (r"PQ(\d+)(?:x(\d+))?(fsr?(?:_\d+)?)?(?:np)?", _pq),
    (r"RaBitQ(?:fs(\d*)|(\d*))", _rabitq),
    (r"RQ(\d+)x(\d+)", _rq),
    ("RSQ([48])", lambda reader, match: Code("RSQ", bits=int(match[1]))),
)


def _split(text: str) -> list[str]:
    """The parts between commas that are not in brackets, without spaces around."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if c == "," and depth <= 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]
