"""Models of Hugging Face transformers with compressed embeddings.

A converted model is of a subclass of its class, made here, that knows how to resize and save compressed
layers. What is saved names ``lutra`` as the quantization method in config.json; the quantizer registered
here builds the layers when ``from_pretrained`` loads it. transformers is imported by nothing but this file
and `_hook`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..nn import OutputHead
from ..nn._compressed import Compressed
from ..nn._shared import _Shared
from . import _layers
from ._find import find, untied_head
from ._mixed import mixed, parts
from ._swap import changes, put
from .formats import make

METHOD = "lutra"
VERSION = 1


def describe(model: Any) -> dict[str, Any]:
    """``quantization_config`` of a model: which embedding is stored how."""
    layers = _layers.compressed(model)
    tables = {name: layer.format.config() for name, layer in layers.items()}
    return {"quant_method": METHOD, "version": VERSION, "tables": tables}


class Converted:
    """What a converted model does differently; comes before the model's class in its bases."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        self.config.quantization_config = describe(self)  # type: ignore[attr-defined]
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def _init_weights(self, module: Any) -> None:
        if not isinstance(module, (Compressed, _Shared)):  # those keep what they hold
            super()._init_weights(module)  # type: ignore[misc]

    def _resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self
        layers = [layer for layer in model.modules() if isinstance(layer, Compressed)]
        trainable = [
            {k: p.requires_grad for k, p in layer._parameters.items() if p is not None} for layer in layers
        ]
        shared = [
            (parent, key, child)
            for parent in model.modules()
            for key, child in parent._modules.items()
            if isinstance(child, _Shared)
        ]
        out = super()._resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]
        # set_input_embeddings puts the layer itself at all its places; requires_grad_ follows the
        # placeholder's.
        for parent, key, child in shared:
            parent._modules[key] = child
        for layer, before in zip(layers, trainable):
            for key, parameter in layer._parameters.items():
                if parameter is not None:
                    parameter.requires_grad_(before.get(key, any(before.values())))
        model.config.quantization_config = describe(model)
        return out

    def _get_resized_embeddings(
        self, old_embeddings: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:  # fmt: skip
        if not isinstance(old_embeddings, (Compressed, _Shared)):
            return super()._get_resized_embeddings(  # type: ignore[misc]
                old_embeddings, new_num_tokens, pad_to_multiple_of, mean_resizing
            )
        layer: Any = old_embeddings.embedding if isinstance(old_embeddings, _Shared) else old_embeddings
        rows = layer.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            if not isinstance(pad_to_multiple_of, int):
                raise ValueError(f"pad_to_multiple_of must be an integer, got {pad_to_multiple_of!r}")
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        if rows != layer.num_embeddings:
            _layers.resize(layer, rows, self._new_rows(layer, rows, mean_resizing))
            _layers.follow(self, layer)
        return layer

    def _new_rows(self, layer: Any, rows: int, mean_resizing: bool) -> Any:
        """Rows to be added: the mean of the old ones, or as the model initialises an embedding."""
        added = max(0, rows - layer.num_embeddings)
        if mean_resizing or not added:
            return layer.dense().float().mean(0, keepdim=True).expand(added, -1).cpu().numpy()
        like = torch.nn.Embedding(added, layer.embedding_dim)
        super()._init_weights(like)  # type: ignore[misc]
        return like.weight.detach().numpy()

    def _get_resized_lm_head(
        self, old_lm_head: Any, new_num_tokens: int | None = None, transposed: bool | None = False,
        mean_resizing: bool = True,
    ) -> Any:  # fmt: skip
        if isinstance(old_lm_head, OutputHead):
            table, rows = old_lm_head.table, new_num_tokens
            if rows is not None and rows != table.num_embeddings:
                _layers.resize(table, rows, self._new_rows(table, rows, mean_resizing))
                _layers.follow(self, table)
            return old_lm_head
        if "_tied" in old_lm_head.__dict__:  # has followed its embedding
            return old_lm_head
        return super()._get_resized_lm_head(  # type: ignore[misc]
            old_lm_head, new_num_tokens, transposed, mean_resizing
        )


def attach(model: Any) -> None:
    """Make a model whose embeddings are compressed one that can resize, save and load them."""
    register()
    for module in list(model.modules()):
        if hasattr(module, "_resize_token_embeddings") and _layers.compressed(module):
            made = parts(type(module))
            if made is None or made[0] is not Converted:
                module.__class__ = mixed(Converted, type(module))
    model.config.quantization_config = describe(model)


def untie(model: Any) -> None:
    """Tell a model that its head has a table of its own."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    if hasattr(model, "get_expanded_tied_weights_keys"):  # transformers 5
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


# ---------------------------------------------------------------- loading
class LutraConfig(QuantizationConfigMixin):
    """``quantization_config`` in a config.json: the formats of the tables, by the names of their
    embeddings.
    """

    def __init__(self, tables: dict[str, Any] | None = None, version: int = VERSION, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.tables = tables or {}
        self.version = version


class LutraQuantizer(HfQuantizer):
    """Builds the layers of a saved model before its weights are loaded."""

    requires_calibration = True  # only what `convert` has made can be loaded
    unpadded: list[Any]
    layers: dict[str, Any]

    def preprocess_model(self, model: Any, **kwargs: Any) -> None:
        config: Any = self.quantization_config
        if config.version != VERSION:
            raise ValueError(
                f"the model was saved with version {config.version} of lutra's tables; this lutra "
                f"reads {VERSION}"
            )
        tie(model)
        groups = {name: g for g in find(model) for name in g.embeddings}
        prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
        places = []
        expected = {}
        for name, spec in config.tables.items():
            options = [name, name.removeprefix(prefix), prefix + name]
            found = next((n for n in options if n in groups), None)
            if found is None:
                head, found = _layers.head_of_table(model, options)
                if head is None and name.endswith(
                    ".table"
                ):  # named as in the files, where GPT-NeoX's differs
                    head = untied_head(model)
                    found = "" if head is None else f"{head.name}.table"
                if head is None:
                    raise ValueError(
                        f"the checkpoint stores {name} compressed; {type(model).__name__} has no such "
                        f"embedding or untied head (its embeddings are {', '.join(groups) or 'none'})"
                    )
                groups[found] = head
            group = groups[found]
            format = make(spec)
            layer = _layers.build(group.module, format, None, found)
            expected[name] = layer
            places += changes(model, group, layer)
        self.layers = {}
        self.unpadded = check_files(kwargs.get("checkpoint_files") or [], expected)
        if self.unpadded:  # of `lutra compress`, which does not know which row is the padding
            known = model._keys_to_ignore_on_load_missing or []
            model._keys_to_ignore_on_load_missing = [*known, r"\.padding_row$"]
        put(places)
        self.layers = _layers.compressed(model)

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """transformers 4 does not say which files it reads; it asks about what was in none of them."""
        left = []
        for key in missing_keys:
            name, _, array = key.rpartition(".")
            layer = self.layers.get(name)
            if layer is None or array == "weight":
                left.append(key)
            elif array == "padding_row":
                self.unpadded.append(layer)
            else:
                raise ValueError(f"the checkpoint lacks {key}, which {layer.format.describe()} needs")
        return left

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        for name, layer in _layers.compressed(model).items():
            if any(layer is one for one in self.unpadded):
                _layers.fill_padding(layer)
            check_loaded(layer, name)
            layer.weight.requires_grad_(False)
        model.__dict__.pop("_keys_to_ignore_on_load_missing", None)
        # A model like one that `convert` returns: what quantized models may not do (train, half) this
        # one may.
        for attribute in ("hf_quantizer", "quantization_method"):
            if attribute in model.__dict__:
                delattr(model, attribute)
        attach(model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model


def tie(model: Any) -> None:
    """Tie the weights of a model that is being loaded: loading leaves that for later, but here it must
    be seen.
    """
    expand = getattr(model, "get_expanded_tied_weights_keys", None)
    if expand is None:  # transformers 4
        model.tie_weights()
        return
    for target, source in expand(all_submodels=True).items():
        parent, _, key = target.rpartition(".")
        owner = model.get_submodule(parent)
        if key in owner._parameters:
            setattr(owner, key, model.get_parameter(source))


def check_files(files: Iterable[str], expected: dict[str, Any]) -> list[Any]:
    """Compare the headers of the weight files with the layers: all arrays there, of the right shapes.

    Returns the layers whose padding row is in no file.
    """
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if not os.fspath(file).endswith(".safetensors"):
            return []  # a pickle: what is missing shows after loading
        with safe_open(file, "np") as opened:
            for key in opened.keys():  # noqa: SIM118
                shapes[key] = tuple(opened.get_slice(key).get_shape())
    unpadded: list[Any] = []
    if not shapes:
        return unpadded
    for name, layer in expected.items():
        start = next((k for k in shapes if f".{k}".endswith(f".{name}.format_json")), None)
        if start is None and name.endswith(".table"):  # heads are renamed in files: GPT-NeoX's is embed_out
            others = [k for k in shapes if k.endswith(".table.format_json")]
            start = others[0] if len(others) == 1 else None
        prefix = name if start is None else start.removesuffix(".format_json")
        for key, value in layer.state_dict().items():
            got = shapes.get(f"{prefix}.{key}")
            if got is None and key == "padding_row":
                unpadded.append(layer)
            elif got is None and key != "weight":
                raise ValueError(
                    f"the checkpoint lacks {prefix}.{key}, which {layer.format.describe()} needs"
                )
            if got is not None and got != tuple(value.shape):
                raise ValueError(
                    f"{prefix}.{key} has shape {got} in the checkpoint; by config.json it must be "
                    f"{tuple(value.shape)}"
                )
    return unpadded


def check_loaded(layer: Any, name: str) -> None:
    from ..nn._compressed import read_format

    if any(a.is_meta for a in layer.state_dict().values()):
        raise ValueError(f"the checkpoint does not hold all of {name}")
    stored = read_format(layer.format_json)
    if stored != layer.format.config():
        raise ValueError(f"{name} is stored as {stored}; config.json says {layer.format.config()}")


def register() -> None:
    """Make transformers know the method."""
    from transformers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LutraConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = LutraQuantizer
