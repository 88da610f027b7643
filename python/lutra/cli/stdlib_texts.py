"""The docstrings of the installed Python standard library: the demo's texts, which are on every machine.

Sources are parsed, not imported. Only modules written in C, which have no source, are imported: public ones
(``math``), and private ones for the names that the public module of that name takes from them (``_csv``).
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

#: Left out: tests, programs, tables, what is there for other packages or for fun, and what ``os`` wraps.
SKIP = {
    "antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "nt", "posix", "pydoc_data",
    "this", "turtledemo",
}  # fmt: skip
SKIP_INSIDE = {"__main__", "__pycache__", "idle_test", "test", "tests"}
#: Importing these prints, opens a device or warns.
NO_IMPORT = {"nis", "ossaudiodev", "readline", "spwd"}


class Text(NamedTuple):
    """A documented thing: its qualified name, what it is, and its docstring."""

    title: str
    kind: str  # 'module', 'class', 'function', 'method'
    doc: str

    @property
    def module(self) -> str:
        """The top-level module."""
        return self.title.split(".", 1)[0]


def modules() -> list[str]:
    """Public top-level modules of the standard library, sorted."""
    return sorted(name for name in sys.stdlib_module_names if not name.startswith("_") and name not in SKIP)


def read_module(name: str) -> list[Text]:
    """The texts of a top-level module and of the modules inside it; empty where it is not installed."""
    with warnings.catch_warnings():  # of modules that will be removed, of backslashes in old docstrings
        warnings.simplefilter("ignore")
        texts = _read(name)
    unique: dict[str, Text] = {}
    for text in texts:
        unique.setdefault(text.title, text)
    return list(unique.values())


def _read(name: str) -> list[Text]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    if (stdlib / name / "__init__.py").is_file():
        return [text for path in sorted((stdlib / name).rglob("*.py")) for text in _read_file(path, stdlib)]
    if (stdlib / f"{name}.py").is_file():
        return _read_file(stdlib / f"{name}.py", stdlib)
    module = _compiled(name)
    return [] if module is None else list(_of_compiled(module, name, None))


# ---------------------------------------------------------------- from sources
def _read_file(path: Path, stdlib: Path) -> list[Text]:
    parts = path.relative_to(stdlib).with_suffix("").parts
    if any(part in SKIP_INSIDE for part in parts):
        return []
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    if any(part.startswith("_") for part in parts):
        return []
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    return list(_of_source(tree, ".".join(parts)))


def _of_source(tree: ast.Module, name: str) -> Iterator[Text]:
    yield from _text(name, "module", ast.get_docstring(tree))
    for node in _statements(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and _behind(node.module) == name.split(".")[0]:
            module = _compiled(node.module)
            if module is not None:
                names = {alias.name for alias in node.names}
                yield from _of_compiled(module, name, None if "*" in names else names)
        else:
            yield from _of_definition(node, name, "function")


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements of a module, also those behind ``if`` and ``try``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.If, ast.Try, ast.ExceptHandler)):
            yield from _statements(node)
        elif isinstance(node, ast.stmt):
            yield node


def _of_definition(node: ast.AST, parent: str, kind: str) -> Iterator[Text]:
    if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith(
        "_"
    ):
        return
    title = f"{parent}.{node.name}"
    is_class = isinstance(node, ast.ClassDef)
    yield from _text(title, "class" if is_class else kind, ast.get_docstring(node))
    if is_class:
        for child in node.body:
            yield from _of_definition(child, title, "method")


def _text(title: str, kind: str, doc: str | None) -> Iterator[Text]:
    if doc and doc.strip():
        yield Text(title, kind, doc.strip())


# ---------------------------------------------------------------- from compiled modules
def _behind(name: str | None) -> str | None:
    """The public module that a module is the C half of: ``'csv'`` for ``'_csv'``."""
    if name in ("posix", "nt"):
        return "os"
    return name[1:] if name and name.startswith("_") else None


def _compiled(name: str | None) -> ModuleType | None:
    """A module that has no Python source, imported; None for any other."""
    if name is None or name in NO_IMPORT or "." in name:
        return None
    try:
        spec = importlib.util.find_spec(name)
        extension = spec is not None and isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)
        if name in sys.builtin_module_names or (extension and name in sys.stdlib_module_names):
            return importlib.import_module(name)
    except (ImportError, ValueError):
        pass
    return None


def _of_compiled(module: ModuleType, parent: str, names: set[str] | None) -> Iterator[Text]:
    """Texts of the public names (or of ``names``) of a compiled module, as if ``parent`` defined them."""
    if parent == module.__name__:
        yield from _text(parent, "module", inspect.getdoc(module))
    for name, value in vars(module).items():
        if name.startswith("_") or (names is not None and name not in names):
            continue
        title = f"{parent}.{name}"
        if inspect.isclass(value):
            yield from _text(title, "class", _own_doc(value))
            for method, function in vars(value).items():
                if not method.startswith("_") and (
                    callable(function) or isinstance(function, (classmethod, staticmethod))
                ):
                    yield from _text(f"{title}.{method}", "method", _own_doc(function))
        elif callable(value):
            yield from _text(title, "function", _own_doc(value))


def _own_doc(value: object) -> str | None:
    """The docstring of the object itself, not one that it inherits."""
    doc = getattr(value, "__doc__", None)
    return inspect.cleandoc(doc) if isinstance(doc, str) else None
