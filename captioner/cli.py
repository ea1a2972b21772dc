"""The command line: parse, run, report. Results go to standard output, everything else to standard error.

Exit status: 0 all well, 1 failed, 2 wrong usage, 3 some pictures failed (each named), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import inspect
import io
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from captioner.config import METHODS, SearchOptions
from captioner.errors import CaptionerError, ConfigError, ImageError, SearchError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from captioner.api import Captioner
    from captioner.caption import Caption

FAILED, WRONG_USAGE, SOME_FAILED, INTERRUPTED = 1, 2, 3, 130
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
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="FOLDER", help="Model folder or hub id 'user/name'.  [default: the bundled model]"),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON, one record per line.")]


class OutputError(OSError):
    """Standard output cannot be written."""


def one_line(text: str) -> str:
    """Return a text that a terminal shows as it is: a file's name may hold line breaks and escape codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def complain(error: BaseException | str) -> None:
    """Write one line about what went wrong to standard error."""
    typer.echo(f"error: {one_line(' '.join(str(error).splitlines()))}", err=True)


@contextlib.contextmanager
def _standard_output() -> Iterator[None]:
    """Tell faults of standard output from those of any other file."""
    try:
        yield
    except OSError as err:
        raise OutputError(err.errno, err.strerror) from err


def say(text: str) -> None:
    """Write to standard output."""
    with _standard_output():
        typer.echo(text)


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn our own errors into one line and the exit status of the contract."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except CaptionerError as err:
            complain(err)
            raise typer.Exit(WRONG_USAGE if isinstance(err, ConfigError) else FAILED) from err
        except KeyboardInterrupt as err:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from err
        except OutputError as err:
            if err.errno == errno.EPIPE:  # its reader, such as `head`, has seen enough: Typer ends quietly
                raise
            complain(f"standard output cannot be written: {err.strerror or err}")
            # What is left in its buffer would fail once more when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILED) from err
        except OSError as err:
            complain(err)
            raise typer.Exit(FAILED) from err

    return run


def search_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every field of `SearchOptions`; it gets those that the user set, as a dictionary.

    Names, types, defaults and help are read from the settings class, so that they are the same in Python and here.
    """
    hints = typing.get_type_hints(SearchOptions)
    # `getdoc`, since compilers from Python 3.13 on take the indentation out of docstrings.
    docstring = inspect.getdoc(SearchOptions) or ""
    help_texts = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", docstring, re.MULTILINE))
    added = []
    for field in dataclasses.fields(SearchOptions):
        kind = hints[field.name]
        many = typing.get_origin(kind) is tuple
        if isinstance(kind, types.UnionType):
            (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
        default = "" if many or field.default is None else f"  [default: {field.default}]"
        option = typer.Option(
            "--" + field.name.replace("_", "-"),
            help=" ".join(help_texts[field.name].split()).replace("`", "") + default,
            metavar="|".join(METHODS) if field.name == "method" else "TEXT, may be repeated" if many else None,
        )
        wanted: Any = list[str] if many else kind
        annotation = typing.cast(Any, Annotated)[wanted | None, option]
        added.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

    @functools.wraps(command)
    def run(**kwargs: Any) -> None:
        given = {parameter.name: kwargs.pop(parameter.name) for parameter in added}
        command(**kwargs, options={name: value for name, value in given.items() if value not in (None, [])})

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]
    run.__signature__ = inspect.Signature(own + added)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in own + added}
    return run


def _load(model: str | None, device: str) -> Captioner:
    from captioner.api import Captioner

    return Captioner.load(model, device=device)


@app.command()
@search_options
@reports_errors
def caption(
    *,
    photos: Photos,
    as_json: Json = False,
    model: Model = None,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(help="Pictures that go through the model together.")] = 32,
    options: dict[str, Any],
) -> None:
    """Caption pictures. Bad pictures are named, the others captioned."""
    from captioner.caption import error_record

    SearchOptions.from_dict(options)  # wrong usage is said before the model is loaded
    captioner = _load(model, device)
    failed = 0
    results = captioner.caption_batch(photos, batch_size=batch_size, on_error="return", **options)
    for photo, result in zip(photos, results, strict=True):
        if isinstance(result, ImageError | SearchError):
            failed += 1
            complain(result)
            if as_json:
                _print_json(error_record(photo, result))
        elif as_json:
            _print_json(result.to_record(photo))
        else:
            _print_caption(photo, result)
    if failed:
        if len(photos) > 1:
            complain(f"{failed} of {len(photos)} pictures could not be captioned")
        raise typer.Exit(SOME_FAILED)


def _print_json(record: dict[str, Any]) -> None:
    say(json.dumps(record))  # in ASCII: valid whatever the terminal's encoding, or a file's name, is


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
    options: dict[str, Any],
) -> None:
    """Caption a picture and draw where it was looked at for each word."""
    SearchOptions.from_dict(options)
    _check_output(output, photo)
    if sentence is not None and options:
        raise ConfigError(f"--sentence needs no search; leave out {', '.join(sorted(options))}")
    captioner = _load(model, device)
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
    with _standard_output():
        Console().print(table)


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
        _print_json(result.to_dict())
    else:
        say(result.table())
    if not options["meteor"]:
        complain(f"METEOR is left out: {java.missing('METEOR')}")


@app.command()
@reports_errors
def info(*, model: Model = None, as_json: Json = False) -> None:
    """Tell what model this is and what runs it."""
    import torch
    import torchvision

    from captioner import __version__

    captioner = _load(model, "auto")
    config = captioner.config
    facts: dict[str, Any] = {
        "captioner": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": str(captioner.device),
        "model": "bundled" if model is None else model,
        "decoder": config.decoder,
        "decoder_settings": dataclasses.asdict(config.decoder_settings),
        "encoder": dataclasses.asdict(config.encoder),
        "preprocessing": dataclasses.asdict(config.preprocessing),
        "grid": list(captioner.model.encoder.grid_hw),
        "vocabulary_size": config.vocabulary_size,
        "max_words": config.max_tokens - 1,
        "parameters": sum(parameter.numel() for parameter in captioner.model.parameters()),
    }
    if as_json:
        _print_json(facts | {"card": captioner.card})
        return
    for name, value in facts.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else one_line(str(value))
        say(f"{name.replace('_', ' '):18} {shown}")
    if captioner.card:
        say("\n" + captioner.card.strip())


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
