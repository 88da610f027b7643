"""transformers is told of lutra as soon as both are imported, in either order, and imported by neither."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from typing import Any

NAME = "transformers.quantizers.auto"


def install() -> None:
    """Register now where transformers is loaded, else when it gets loaded."""
    if NAME in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from . import _transformers

    _transformers.register()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; has the module's own loader run, and then registers."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader  # what asks later meets the real one
        self._loader.exec_module(module)
        module.AUTO_QUANTIZER_MAPPING["lutra"] = _late
        module.AUTO_QUANTIZATION_CONFIG_MAPPING["lutra"] = _LateConfig


class _LateConfig:
    """Stands for the configuration until it is asked for: transformers is half imported when it is
    registered.
    """

    @staticmethod
    def from_dict(config: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        from . import _transformers

        return _transformers.LutraConfig.from_dict(config, *args, **kwargs)


def _late(config: Any, **kwargs: Any) -> Any:
    from . import _transformers

    return _transformers.LutraQuantizer(config, **kwargs)
