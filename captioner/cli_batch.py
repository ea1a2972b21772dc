"""The commands `batch` and `merge`: parse, run, report."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from captioner.errors import CaptionerError, ConfigError
from captioner.terminal import (
    FAILED,
    INTERRUPTED,
    SOME_FAILED,
    Device,
    Model,
    Runtime,
    Threads,
    complain,
    print_json,
    reports_errors,
    search_options,
)

if TYPE_CHECKING:
    from captioner.batch import Progress, Summary

Output = Annotated[
    str,
    typer.Option(
        "--output",
        "-o",
        metavar="PATH",
        help="A file .jsonl, .csv or .parquet, or a folder. Its journal, .progress, is kept beside it.",
    ),
]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        metavar="jsonl|csv|parquet|txt|xmp",
        help="What to write; may be repeated, or several with commas.  [default: by the output's name]",
    ),
]
Report = Annotated[bool, typer.Option("--json", help="Write a summary as JSON to standard output.")]


@search_options
@reports_errors
def batch(
    *,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Pictures, folders, globs, manifests (.txt, .csv, .jsonl), archives (.zip, .tar...), or - for paths "
            "on standard input.",
        ),
    ],
    output: Output,
    formats: Formats = None,
    into: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="For txt, xmp and maps.  [default: the output, if it is a folder]"),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Text of txt and xmp, such as 'a photo, {caption}'.  [default: the caption]")
    ] = None,
    alt_text: Annotated[
        bool, typer.Option("--alt-text", help="Write alternative texts too: alt_text in tables, and in XMP files.")
    ] = False,
    sidecar: Annotated[
        str, typer.Option(metavar="picture|name", help="Name XMP files a.jpg.xmp, or a.xmp.")
    ] = "picture",
    maps: Annotated[
        str | None, typer.Option(metavar="npz|figure", help="Save where each word was looked at, for every picture.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Only such pictures of folders and archives.")
    ] = None,
    hidden: Annotated[bool, typer.Option("--hidden", help="Hidden files and folders too.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite/--resume", help="Start anew, or go on where the last run ended.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try pictures again that failed in an earlier run.")
    ] = False,
    max_errors: Annotated[
        int | None, typer.Option(metavar="N", help="Stop once more than N pictures have failed.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Caption only part I of N; `captioner merge` joins the parts.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures that go through the model together.")] = 32,
    workers: Annotated[
        int | None, typer.Option(help="Processes that decode pictures.  [default: one for each CPU]")
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="local|ray", help="Caption on this machine, or on a Ray cluster (captioner[ray]).")
    ] = "local",
    actors: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="With ray: processes that hold the model.  [default: one for each GPU or machine]"
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="With ray: the cluster.  [default: $RAY_ADDRESS, else this machine]"),
    ] = None,
    max_members: Annotated[
        int | None, typer.Option(metavar="N", help="The most entries of an archive.  [default: 1000000]")
    ] = None,
    max_member_bytes: Annotated[
        int | None, typer.Option(metavar="N", help="The most bytes of a picture in an archive.  [default: 104857600]")
    ] = None,
    max_total_bytes: Annotated[
        int | None, typer.Option(metavar="N", help="The most bytes an archive unpacks to.  [default: 1099511627776]")
    ] = None,
    max_ratio: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="How many times its size an archive unpacks to; below --max-member-bytes in all, any.  [default: 200]",
        ),
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(metavar="N", help="The most pixels of a picture.  [default: 100000000]")
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(metavar="N", help="The most bytes of a picture's file.  [default: 104857600]")
    ] = None,
    model: Model = None,
    device: Device = "auto",
    runtime: Runtime = "auto",
    threads: Threads = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")] = False,
    as_json: Report = False,
    options: dict[str, Any],
) -> None:
    """Caption whole folders and archives into files, going on where the last run ended."""
    _hold_standard_streams()
    from captioner.progress import make_display

    stop, last = threading.Event(), _Last(output, as_json=as_json)
    with last, make_display(quiet=quiet) as display, _stopped_by_signals(stop):
        from captioner.archives import ArchiveLimits
        from captioner.batch import run
        from captioner.images import ImageLimits

        limits = {
            "max_members": max_members,
            "max_member_bytes": max_member_bytes,
            "max_total_bytes": max_total_bytes,
            "max_ratio": max_ratio,
        }
        last.show = display.update
        summary = run(
            sources,
            output,
            formats=_split(formats),
            into=into,
            template=template,
            alt_text=alt_text,
            sidecar=sidecar,
            maps=maps,
            pattern=pattern,
            hidden=hidden,
            limits=ArchiveLimits(**_given(limits)),
            picture_limits=ImageLimits(**_given({"max_pixels": max_pixels, "max_bytes": max_bytes})),
            overwrite=overwrite,
            retry_failed=retry_failed,
            max_errors=max_errors,
            shard=shard,
            batch_size=batch_size,
            workers=workers,
            engine=engine,  # type: ignore[arg-type]  # any other is refused with the rest of wrong usage
            actors=actors,
            ray_address=ray_address,
            model=model,
            device=device,
            runtime=runtime,
            threads=threads,
            stop=stop,
            progress=last.update,
            note=display.say,
            **options,
        )
    _report(summary, quiet=quiet, as_json=as_json, overwrite=overwrite)


@reports_errors
def merge(
    *,
    parts: Annotated[list[str], typer.Argument(metavar="PART...", help="The outputs of all shards.")],
    output: Output,
    formats: Formats = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Report = False,
) -> None:
    """Join the outputs of `batch --shard 1/n` to `n/n`, and check that nothing is missing or twice."""
    from captioner.merge import merge as join

    merged = join(parts, output, formats=_split(formats), overwrite=overwrite)
    if as_json:
        print_json(merged.to_dict())
    else:
        typer.echo(
            f"{merged.parts} parts, {merged.pictures} pictures, {merged.failed} of them failed: "
            f"{', '.join(merged.outputs)}",
            err=True,
        )


def _given(options: dict[str, int | None]) -> dict[str, int]:
    return {name: value for name, value in options.items() if value is not None}


def _split(formats: list[str] | None) -> list[str]:
    return [name.strip() for text in formats or () for name in text.split(",")]


@contextlib.contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Let the first interrupt, or a request to end, ask for a stop, and the second stop at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        with contextlib.suppress(OSError):  # by the system's own call: a handler may come amid a write
            os.write(2, b"stopping after this batch; once more stops at once, and nothing is lost\n")

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, ask) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _hold_standard_streams() -> None:
    """Open what was closed of input, output and errors, so that no file of ours gets its number, and its text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one


class _Last:
    """Remembers how far a run has come, so that a summary can be written of one that ends by an error.

    Args:
        output: as it was named.
        as_json: write it at all.
    """

    def __init__(self, output: str, *, as_json: bool) -> None:
        self._output, self._as_json = output, as_json
        self._progress: Progress | None = None
        self._failed: Counter[str] = Counter()
        self.show: Callable[[Progress], None] = lambda progress: None

    def update(self, progress: Progress) -> None:
        self._progress = progress
        self._failed.update(type(result).__name__ for _, result in progress.results if isinstance(result, Exception))
        self.show(progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._as_json and isinstance(error, CaptionerError) and not isinstance(error, ConfigError):
            at = self._progress
            summary = {
                "outputs": [self._output],
                "captioned": 0 if at is None else at.captioned,
                "skipped": 0 if at is None else at.skipped,
                "failed": dict(sorted(self._failed.items())),
                "failed_before": 0,
                "seconds": 0.0 if at is None else round(at.seconds, 3),
                "stopped": "failed",
            }
            print_json({**summary, "error": {"type": type(error).__name__, "message": str(error)}})


def _tell(say: Callable[[], None]) -> None:
    """Say something on standard error, if anybody is there: what was done, and the status, are the same if not."""
    with contextlib.suppress(OSError):
        say()


def _report(summary: Summary, *, quiet: bool, as_json: bool, overwrite: bool) -> None:
    """Say what was done, and end with the status of the contract."""
    if as_json:
        print_json(summary.to_dict())
    if not quiet:
        earlier = f", {summary.skipped} done before" if summary.skipped else ""
        _tell(lambda: typer.echo(f"{summary.captioned} captioned{earlier}: {', '.join(summary.outputs)}", err=True))
    failed = sum(summary.failed.values())
    if failed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in summary.failed.items())
        hint = f"; {summary.failed_before} of them before, --retry-failed tries again" if summary.failed_before else ""
        pictures = failed + summary.captioned + summary.skipped
        _tell(lambda: complain(f"{failed} of {pictures} pictures have an error on record: {kinds}{hint}"))
    goes_on = f"the same command {'without --overwrite ' if overwrite else ''}goes on from here"
    if summary.stopped == "interrupted":
        _tell(lambda: complain(f"interrupted; {goes_on}"))
        raise typer.Exit(INTERRUPTED)
    if summary.stopped == "errors":
        _tell(lambda: complain(f"too many pictures failed; {goes_on}"))
        raise typer.Exit(FAILED)
    if failed:
        raise typer.Exit(SOME_FAILED)
