"""Train a small language model on a text: of memory layers, or its dense twin with equal settings.

``python -m lutra.examples.train_lm --arch memoryformer --data FILE``; ``--help`` lists the options.
A run lives in a folder (``--out``). It can be killed at any moment and goes on with ``--resume``: batches
depend on the seed and the step alone, so that the losses are those of a run that was never stopped.
"""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Optional

try:
    import rich
    import typer
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
except ImportError as error:
    raise SystemExit("train_lm needs typer and rich: pip install 'lutra[cli,torch]'") from error

from ._models import ARCHITECTURES
from ._run import Run, draw
from ._training import Settings, Trainer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_D = Settings()


@app.command()
def main(
    data: Annotated[Optional[Path], typer.Option(help="The text; its last tenth is held out.")] = None,  # noqa: UP045
    arch: Annotated[str, typer.Option(help=", ".join(ARCHITECTURES))] = _D.arch,
    out: Annotated[Optional[Path], typer.Option(help="Folder of the run; runs/ARCH where not given.")] = None,  # noqa: UP045
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    tokens: Annotated[str, typer.Option(help="byte, or bpe trained on the text")] = _D.tokens,
    vocab_size: Annotated[int, typer.Option(help="Of the BPE.")] = _D.vocab_size,
    dim: Annotated[int, typer.Option(help="Width.")] = _D.dim,
    layers: int = _D.layers,
    heads: int = _D.heads,
    bits: Annotated[int, typer.Option(help="Of the memory layers' hashes (tau).")] = _D.bits,
    ffn_bits: Annotated[
        int, typer.Option(help="Of the second feed-forward memory layer (tau').")
    ] = _D.ffn_bits,
    context: Annotated[int, typer.Option(help="Tokens seen at once.")] = _D.context,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = _D.batch,
    steps: int = _D.steps,
    lr: Annotated[float, typer.Option(help="Highest learning rate of AdamW.")] = _D.lr,
    warmup: Annotated[int, typer.Option(help="Steps.")] = _D.warmup,
    weight_decay: float = _D.weight_decay,
    clip: Annotated[float, typer.Option(help="Largest norm of all gradients.")] = _D.clip,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16 (autocast)")] = _D.precision,
    compile_model: Annotated[bool, typer.Option("--compile", help="Through torch.compile.")] = _D.compile,
    device: str = _D.device,
    eval_every: Annotated[int, typer.Option(help="Steps between two held-out losses.")] = _D.eval_every,
    eval_windows: Annotated[int, typer.Option(help="Held-out windows.")] = _D.eval_windows,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 200,
    compare: Annotated[Optional[list[Path]], typer.Option(help="Other runs for the plot.")] = None,  # noqa: UP045
    sample: Annotated[int, typer.Option(help="Tokens to write at the end.")] = 200,
    seed: int = _D.seed,
) -> None:
    """Train a small language model on a text, of memory layers or of dense ones."""
    given = dict(locals())
    given["compile"] = given["compile_model"]
    try:
        _train(given)
    except (OSError, ValueError, TypeError, ImportError, FloatingPointError) as error:
        rich.print(f"[red]error:[/red] {rich.markup.escape(str(error))}")
        raise typer.Exit(1) from error


def _train(given: dict[str, Any]) -> None:
    run = Run(given["out"] or Path("runs") / given["arch"])
    if given["resume"]:
        settings = Settings(**_known(run.settings()))
    else:
        if given["data"] is None:
            raise ValueError("name the text: --data FILE")
        if given["arch"] not in ARCHITECTURES:
            raise ValueError(f"--arch must be one of {', '.join(ARCHITECTURES)}; got {given['arch']!r}")
        for name, known in (("tokens", ("byte", "bpe")), ("precision", ("float32", "bfloat16"))):
            if given[name] not in known:
                raise ValueError(f"--{name} must be one of {', '.join(known)}; got {given[name]!r}")
        given["data"] = str(given["data"].resolve(strict=True))
        settings = Settings(**_known(given))
        settings.check()
        run.start(asdict(settings))
    trainer = Trainer(settings, run)
    began = trainer.resume()
    parameters = sum(p.numel() for p in trainer.model.parameters())
    rich.print(
        f"{settings.arch}: {parameters / 1e6:.2f} million parameters, {trainer.corpus.vocab_size} tokens, "
        f"{len(trainer.corpus.train):,} to train on" + (f", from step {began}" if began else "")
    )
    _progress(trainer, given["checkpoint_every"])
    curves = {settings.arch: trainer.losses}
    for other in given["compare"] or []:
        curves[other.name] = Run(other).losses()
    _plot(run, curves)
    last = trainer.losses[-1][2]
    a_byte = f" ({last * trainer.corpus.tokens_per_byte:.4f} a byte)" if settings.tokens == "bpe" else ""
    rich.print(f"held-out loss {last:.4f} nats a token{a_byte}; {run.folder}")
    if given["sample"]:
        rich.print(rich.markup.escape(trainer.sample(given["sample"])))


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {f.name: values[f.name] for f in fields(Settings) if f.name in values}


def _progress(trainer: Trainer, checkpoint_every: int) -> None:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )  # fmt: skip
    smooth: list[float] = []
    latest = ""
    with Progress(*columns) as progress:
        task = progress.add_task("steps", total=trainer.settings.steps, completed=trainer.step, loss="")

        def seen(step: int, value: float, held_out: float) -> None:
            nonlocal latest
            smooth.append(value)
            del smooth[:-50]
            if not math.isnan(held_out):
                latest = f"  held-out {held_out:.4f}"
                progress.console.print(f"step {step:>6}  loss {sum(smooth) / len(smooth):.4f}{latest}")
            progress.update(task, completed=step, loss=f"loss {sum(smooth) / len(smooth):.4f}{latest}")

        trainer.train(checkpoint_every, seen)


def _plot(run: Run, curves: dict[str, list[list[float]]]) -> None:
    try:
        draw(run.plot, curves)
    except ImportError as error:
        rich.print(f"no plot: {error}")
    else:
        rich.print(f"losses: {run.plot}")


if __name__ == "__main__":
    app()
