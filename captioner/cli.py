"""The command line: parse, run, report. Results go to standard output, everything else to standard error.

Exit status: 0 all well, 1 failed, 2 wrong usage, 3 some pictures failed (each named), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from captioner.cli_batch import batch, merge
from captioner.cli_serve import serve
from captioner.config import SearchOptions
from captioner.errors import CaptionerError, ConfigError, ImageError, SearchError
from captioner.model_folder import GRAPHS, INT8_GRAPHS
from captioner.terminal import (
    FAILED,
    SOME_FAILED,
    Device,
    Json,
    Model,
    Runtime,
    Threads,
    complain,
    one_line,
    print_json,
    reports_errors,
    say,
    search_options,
    standard_output,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from captioner.api import Captioner
    from captioner.caption import Caption

FIGURE_SUFFIXES = (".png", ".pdf", ".svg", ".jpg")

app = typer.Typer(
    name="captioner",
    help="A picture in, a sentence out, and for every word the place in the picture that it came from.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Photos = Annotated[list[str], typer.Argument(metavar="PHOTO...", help="Picture files.")]
Photo = Annotated[str, typer.Argument(metavar="PHOTO", help="A picture file.")]


def _load(model: str | None, device: str, runtime: str = "auto", threads: int | None = None) -> Captioner:
    from captioner.api import Captioner

    return Captioner.load(model, device=device, runtime=runtime, threads=threads)


@app.command()
@search_options
@reports_errors
def caption(
    *,
    photos: Photos,
    as_json: Json = False,
    model: Model = None,
    device: Device = "auto",
    runtime: Runtime = "auto",
    threads: Threads = None,
    batch_size: Annotated[int, typer.Option(help="Pictures that go through the model together.")] = 32,
    options: dict[str, Any],
) -> None:
    """Caption pictures. Bad pictures are named, the others captioned."""
    from captioner.caption import error_record

    SearchOptions.from_dict(options)  # wrong usage is said before the model is loaded
    captioner = _load(model, device, runtime, threads)
    failed = 0
    results = captioner.caption_batch(photos, batch_size=batch_size, on_error="return", **options)
    for photo, result in zip(photos, results, strict=True):
        if isinstance(result, ImageError | SearchError):
            failed += 1
            complain(result)
            if as_json:
                print_json(error_record(photo, result))
        elif as_json:
            print_json(result.to_record(photo))
        else:
            _print_caption(photo, result)
    if failed:
        if len(photos) > 1:
            complain(f"{failed} of {len(photos)} pictures could not be captioned")
        raise typer.Exit(SOME_FAILED)


def _print_caption(photo: str, result: Caption) -> None:
    name = one_line(photo)
    say(f"{name}: {one_line(result.text)}{_sure(result)}")
    for other in result.alternatives:
        say(f"{' ' * len(name)}  {one_line(other.text)}")


def _sure(result: Caption) -> str:
    return "" if result.confidence is None else f" ({result.confidence:.0%} confident)"


@app.command()
@search_options
@reports_errors
def explain(
    *,
    photo: Photo,
    output: Annotated[Path, typer.Option("--output", "-o", help="Figure to write: .png, .pdf, .svg or .jpg.")],
    sentence: Annotated[
        str | None, typer.Option(help="Explain this sentence about the picture instead of searching for one.")
    ] = None,
    model: Model = None,
    device: Device = "auto",
    runtime: Runtime = "auto",
    threads: Threads = None,
    options: dict[str, Any],
) -> None:
    """Caption a picture and draw where it was looked at for each word."""
    SearchOptions.from_dict(options)
    _check_output(output, photo)
    if sentence is not None and options:
        raise ConfigError(f"--sentence needs no search; leave out {', '.join(sorted(options))}")
    captioner = _load(model, device, runtime, threads)
    try:
        found = captioner.caption(photo, **options) if sentence is None else captioner.score(photo, sentence)
        figure = found.figure()
    except ImageError as err:
        complain(err)
        raise typer.Exit(SOME_FAILED) from err
    _save(figure, output)
    say(f"{one_line(photo)}: {one_line(found.text)}{_sure(found)}")
    _print_words(found)
    say(f"figure: {one_line(str(output))}")


def _check_output(output: Path, photo: str) -> None:
    if output.suffix.lower() not in FIGURE_SUFFIXES:
        raise ConfigError(f"{output}: not a figure's name; it must end in {', '.join(FIGURE_SUFFIXES)}")
    with contextlib.suppress(OSError, ValueError):  # what is not there, or cannot be reached, is told when it is used
        if output.samefile(photo):
            raise ConfigError(f"{output}: is the photo itself, which the figure would replace; name another file")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"{output}: there is no folder {output.parent}; make it first")


def _save(figure: Figure, output: Path) -> None:
    """Write a figure at once or not at all."""
    try:
        target = output.resolve()
        partial = target.with_name(f".captioner-{os.getpid()}.partial")
        try:
            figure.savefig(partial, format=output.suffix[1:].lower())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as err:
        raise CaptionerError(f"{output}: the figure cannot be written: {err.strerror or err}") from err


def _print_words(found: Caption) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("word", "probability", "looked at most (row, column)", box=None)
    for word in found.words:
        peak = int(word.attention.argmax())
        row, column = divmod(peak, word.attention.shape[1])
        rows, columns = word.attention.shape
        place = f"({row + 1}, {column + 1}) of {rows} x {columns}"
        table.add_row(word.text, f"{word.probability:.2f}", place)
    with standard_output():
        Console().print(table)


app.command()(batch)
app.command()(merge)
app.command()(serve)


@app.command()
@reports_errors
def evaluate(
    *,
    predictions: Annotated[Path, typer.Argument(help="JSONL records of `captioner`, or COCO results.")],
    references: Annotated[
        Path, typer.Argument(help="Karpathy JSON, COCO captions JSON, Flickr8k token file, or JSONL.")
    ],
    against: Annotated[
        Path | None, typer.Option(help="Second predictions for the same pictures, compared with the first.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a Karpathy JSON.  [default: test]")] = None,
    only: Annotated[
        Path | None, typer.Option(help="Text file with the names of the pictures to score, one per line.")
    ] = None,
    frequencies: Annotated[
        Path | None, typer.Option(help="Fixed document frequencies for CIDEr-D.  [default: of the references]")
    ] = None,
    spice: Annotated[bool, typer.Option("--spice", help="Also SPICE; needs Java.")] = False,
    as_json: Json = False,
) -> None:
    """Score captions: BLEU, ROUGE-L, CIDEr-D (x100), and METEOR where Java is."""
    from captioner import metrics
    from captioner.metrics import java

    truth = metrics.read_references(references, split=split, only=only)
    options: dict[str, Any] = {
        "frequencies": None if frequencies is None else metrics.DocumentFrequencies.load(frequencies),
        "meteor": java.missing("METEOR") is None,
        "spice": spice,
        "source": truth.source,
    }
    first = metrics.read_predictions(predictions, truth)
    result: metrics.Evaluation | metrics.Comparison
    if against is None:
        result = metrics.evaluate(first, truth.captions, **options)
    else:
        second = metrics.read_predictions(against, truth)
        result = metrics.compare(first, second, truth.captions, **options)
    if as_json:
        print_json(result.to_dict())
    else:
        say(result.table())
    if not options["meteor"]:
        complain(f"METEOR is left out: {java.missing('METEOR')}")


@app.command()
@reports_errors
def info(*, model: Model = None, as_json: Json = False) -> None:
    """Tell what model this is and what runs it."""
    from importlib.metadata import version

    from captioner import __version__

    captioner = _load(model, "auto")
    config = captioner.config
    facts: dict[str, Any] = {
        "captioner": __version__,
        **{name: version(name) for name in ("torch", "torchvision", "onnxruntime")},
        "runtime": captioner.runtime.name,
        "runtimes": list(captioner.runtimes),
        "device": captioner.device,
        "model": "bundled" if model is None else model,
        "decoder": config.decoder,
        "decoder_settings": dataclasses.asdict(config.decoder_settings),
        "encoder": dataclasses.asdict(config.encoder),
        "preprocessing": dataclasses.asdict(config.preprocessing),
        "grid": list(captioner.runtime.grid_hw),
        "vocabulary_size": config.vocabulary_size,
        "max_words": config.max_tokens - 1,
        "parameters": sum(value.size for name, value in captioner.runtime.weights() if not _is_statistic(name)),
    }
    if as_json:
        print_json(facts | {"card": captioner.card})
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{k} {v}" for k, v in value.items())
        else:
            shown = ", ".join(value) if name == "runtimes" else one_line(str(value))
        say(f"{name.replace('_', ' '):18} {shown}")
    if captioner.card:
        say("\n" + captioner.card.strip())


def _is_statistic(name: str) -> bool:
    """Return whether a weight was counted and not learned: of batch norms, and of the confidence."""
    return name.startswith("familiarity.") or name.endswith((".running_mean", ".running_var", ".num_batches_tracked"))


@app.command()
@reports_errors
def export(
    *,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="The model folder; the graphs are written into it.")],
    form: Annotated[str, typer.Option("--format", metavar="onnx", help="Of the graphs.")] = "onnx",
    int8: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PHOTOS",
            help="Quantise the model to 8 bits too, for --runtime onnx-int8 on CPUs with VNNI; a folder of photos "
            "like those that it will see, at least 32.",
        ),
    ] = None,
) -> None:
    """Write a model's ONNX graphs into its folder, checked against PyTorch: several times as fast on a CPU."""
    if form != "onnx":
        raise ConfigError(f"--format must be onnx, got {form!r}")
    from captioner.runtimes.export import export_onnx

    written = export_onnx(folder, int8_photos=int8 or ())
    facts = written.description["onnx"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    graphs = [*GRAPHS, *(INT8_GRAPHS if written.has_int8 else ())]
    say(f"{one_line(folder)}: {', '.join(graphs)}; opset {facts['opset']}, {versions}")


def _version(wanted: bool) -> None:
    if wanted:
        from captioner import __version__

        say(f"captioner {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; the console script."""
    if sys.stdout is None:  # the shell's >&-
        complain("standard output is closed; let it go to a file or a terminal")
        raise SystemExit(FAILED)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
    app()
