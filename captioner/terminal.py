"""What the commands share: words to the user, errors into exit status, the search options as options.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import inspect
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from captioner.config import METHODS, SearchOptions
from captioner.errors import CaptionerError, ConfigError

FAILED, WRONG_USAGE, SOME_FAILED, INTERRUPTED = 1, 2, 3, 130

Model = Annotated[
    str | None,
    typer.Option("--model", metavar="FOLDER", help="Model folder or hub id 'user/name'.  [default: the bundled model]"),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")]
Runtime = Annotated[
    str,
    typer.Option(
        "--runtime",
        metavar="auto|torch|onnx|onnx-int8",
        help="What computes; auto is ONNX Runtime on a CPU where the model was exported, else PyTorch.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", help="Of the CPU to compute on.  [default: all that this process may use]"),
]
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
def standard_output() -> Iterator[None]:
    """Tell faults of standard output from those of any other file."""
    try:
        yield
    except OSError as err:
        raise OutputError(err.errno, err.strerror) from err


def say(text: str) -> None:
    """Write to standard output."""
    with standard_output():
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


def print_json(record: dict[str, Any]) -> None:
    """Write a record to standard output."""
    say(json.dumps(record))  # in ASCII: valid whatever the terminal's encoding, or a file's name, is
