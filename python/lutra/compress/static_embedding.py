"""sentence-transformers' StaticEmbedding with a compressed table: saved and loaded as such.

sentence-transformers writes the class of each module into modules.json and asks that class to load it. A
converted StaticEmbedding is of the class here, so ``SentenceTransformer(folder, trust_remote_code=True)``
loads it (by itself it trusts no class outside of its own package, and says so). In lutra only `_attach`
imports this file, once sentence-transformers is there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

try:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding as _Theirs
except ImportError:  # before 5.2
    from sentence_transformers.models import StaticEmbedding as _Theirs

from ._static import CONFIG, VERSION

_DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


class StaticEmbedding(_Theirs):
    """sentence-transformers' StaticEmbedding with a compressed table; `lutra.compress.convert` makes it."""

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """As theirs; ``embedding.weight``, the stand-in of no columns, is left out: their loader would take
        it for the table.
        """
        place, layer = Path(output_path), self.embedding
        state = {k: v.contiguous() for k, v in self.state_dict().items() if k != "embedding.weight"}
        config = {
            "version": VERSION,
            "shape": [layer.num_embeddings, layer.embedding_dim],
            "dtype": str(layer.weight.dtype).removeprefix("torch."),
            "replaces": f"{_Theirs.__module__}.{_Theirs.__qualname__}",
        }
        if safe_serialization:
            from safetensors.torch import save_file

            save_file(state, place / "model.safetensors")
        else:
            torch.save(state, place / "pytorch_model.bin")
        (place / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        self.tokenizer.save(str(place / "tokenizer.json"))

    @classmethod
    def load(cls, model_name_or_path: str, **options: Any) -> Any:
        """What `save` or ``lutra compress`` has written; options as their ``load``."""
        from ._load import load_into

        known = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        where = {k: options[k] for k in known if k in options}
        described = cls.load_file_path(model_name_or_path, filename=CONFIG, **where)
        if described is None:
            raise ValueError(
                f"{model_name_or_path} has no {CONFIG}: it was not saved with a compressed table"
            )
        try:
            config = json.loads(Path(described).read_text())
            version, (rows, dim), dtype = config["version"], config["shape"], _DTYPES[config["dtype"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{described} does not say what the table is: {error!r}") from None
        if version != VERSION:
            raise ValueError(f"{described} is of version {version!r}; this lutra reads {VERSION}")
        tokenizer = cls.load_file_path(model_name_or_path, filename="tokenizer.json", **where)
        state = cls.load_torch_weights(model_name_or_path=model_name_or_path, **where)
        stand_in = torch.empty(rows, dim, dtype=dtype)  # never touched
        return load_into(_Theirs(Tokenizer.from_file(tokenizer), embedding_weights=stand_in), state)
