"""Which ops the tests give to ``torch.library.opcheck``, read from the tests' source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
#: An op as it is written in a call: torch.ops.lutra.bag, ops.bag.default
WRITTEN = re.compile(r"^(?:torch\.ops\.lutra|ops)\.(\w+?)(?:\.default)?$")


def named(source: str) -> Iterator[str]:
    """Names of the ops that a source file gives to a function named opcheck, called by their own names.

    A variable in place of the op counts for nothing: what it holds is not to be seen in the source.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        if ast.unparse(node.func).split(".")[-1] == "opcheck":
            found = WRITTEN.match(ast.unparse(node.args[0]))
            if found:
                yield found[1]


def named_in_tests() -> set[str]:
    """Of all test files on the CPU."""
    return {name for path in sorted(HERE.glob("test_*.py")) for name in named(path.read_text())}


def registered() -> set[str]:
    """Every op of ``torch.ops.lutra``, those of the layers and formats too."""
    import torch

    import lutra.compress
    import lutra.nn
    import lutra.torch_ops  # noqa: F401

    names = torch._C._dispatch_get_all_op_names()
    return {n.removeprefix("lutra::").split(".")[0] for n in names if n.startswith("lutra::")}
