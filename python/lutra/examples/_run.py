"""The folder of a training run: settings, a checkpoint that is always whole, losses, a plot."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..index._files import Tensor as Entry
from ..index._files import write, write_bytes

FORMAT, VERSION = "lutra.train_lm", "1"


class Run:
    """A folder with ``config.json``, ``checkpoint.safetensors``, ``losses.png`` and, for BPE, the tokenizer.

    The checkpoint has the model, the optimizer, torch's random state, the step and all losses so far in one
    file, which is written beside the old one, synced and renamed: a run that is killed at any moment finds
    the old or the new one, never half of one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint, self.config = folder / "checkpoint.safetensors", folder / "config.json"
        self.tokenizer, self.plot = folder / "tokenizer.json", folder / "losses.png"

    def start(self, config: dict[str, Any]) -> None:
        """Make the folder; FileExistsError where it holds a run already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self.checkpoint, self.config):
            if path.exists():
                raise FileExistsError(
                    f"{path} exists: add --resume to go on with that run, or name another folder with --out"
                )
        write_bytes(self.config, [json.dumps(config, indent=2).encode() + b"\n"])

    def settings(self) -> dict[str, Any]:
        """What the run was started with."""
        try:
            return dict(json.loads(self.config.read_text()))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.folder} holds no run: {self.config.name} is missing") from error
        except ValueError as error:
            raise ValueError(f"{self.config} is no JSON: {error}") from error

    def save(
        self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, losses: list[list[float]]
    ) -> None:
        """Write the checkpoint. ``losses``: (step, training loss, held-out loss or NaN)."""
        arrays = {f"model.{name}": value for name, value in model.state_dict().items()}
        state = optimizer.state_dict()
        plain: dict[str, dict[str, Any]] = {}
        for number, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    arrays[f"optimizer.{number}.{name}"] = value
                else:
                    plain.setdefault(str(number), {})[name] = value
        arrays["random"] = torch.get_rng_state()
        entries = [Entry.of_array(name, value.detach().cpu().numpy()) for name, value in arrays.items()]
        entries.append(Entry.of_array("losses", np.asarray(losses, np.float64).reshape(-1, 3)))
        note = {"step": step, "optimizer": {"state": plain, "param_groups": state["param_groups"]}}
        write(self.checkpoint, entries, {"format": FORMAT, "version": VERSION, "run": json.dumps(note)})

    def load(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[list[float]]]:
        """Read the checkpoint into both: (step, losses); (0, []) where nothing was saved yet."""
        if not self.checkpoint.exists():
            return 0, []
        with self._open() as (file, note):
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        weights = {n.removeprefix("model."): a for n, a in arrays.items() if n.startswith("model.")}
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{self.checkpoint} does not fit the model: {error}") from error
        state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in note["optimizer"]["state"].items()}
        for name, value in arrays.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".", 2)
                state.setdefault(int(number), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": note["optimizer"]["param_groups"]})
        torch.set_rng_state(arrays["random"])
        return int(note["step"]), [list(row) for row in arrays["losses"].tolist()]

    def losses(self) -> list[list[float]]:
        """The losses in the checkpoint; FileNotFoundError where there is none."""
        if not self.checkpoint.exists():
            raise FileNotFoundError(f"{self.folder} holds no checkpoint")
        with self._open() as (file, _):
            return [list(row) for row in file.get_tensor("losses").tolist()]

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The checkpoint's tensors and its note; every problem is a ValueError that names the file."""
        try:
            with safe_open(os.fspath(self.checkpoint), "pt") as file:
                yield file, self._note(file.metadata() or {})
        except SafetensorError as error:
            raise ValueError(f"{self.checkpoint} is damaged: {error}") from error

    def _note(self, metadata: dict[str, str]) -> dict[str, Any]:
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{self.checkpoint} is no checkpoint of train_lm")
        if metadata.get("version") != VERSION:
            raise ValueError(
                f"{self.checkpoint} has version {metadata.get('version')}; this lutra reads {VERSION}"
            )
        return dict(json.loads(metadata["run"]))


def draw(path: Path, curves: dict[str, list[list[float]]]) -> None:
    """Plot losses against steps, one colour a run: training thin (smoothed), held-out thick with points."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (name, losses) in enumerate(curves.items()):
        table = np.asarray(losses, np.float64).reshape(-1, 3)
        if not len(table):
            continue
        colour = f"C{i}"
        smooth = max(1, len(table) // 100)
        kernel = np.full(smooth, 1 / smooth)
        axes.plot(
            np.convolve(table[:, 0], kernel, "valid"), np.convolve(table[:, 1], kernel, "valid"),
            color=colour, alpha=0.4, linewidth=1,
        )  # fmt: skip
        seen = table[~np.isnan(table[:, 2])]
        label = f"{name}: {seen[-1, 2]:.3f}" if len(seen) else name
        axes.plot(seen[:, 0], seen[:, 2], color=colour, marker="o", markersize=3, label=label)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(title="held-out loss")
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix("."), dpi=120)
    pyplot.close(figure)
    write_bytes(path, [picture.getbuffer()])
