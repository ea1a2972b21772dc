"""The command `serve`; `python app.py` is the same."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from captioner.terminal import Device, Model, Runtime, Threads, reports_errors


@reports_errors
def serve(
    *,
    model: Model = None,
    device: Device = "auto",
    runtime: Runtime = "auto",
    threads: Threads = None,
    compare: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Show this model beside it; may be repeated.")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on.  [default: GRADIO_SERVER_NAME, or 127.0.0.1: this machine alone]"),
    ] = None,
    port: Annotated[
        str | None, typer.Option(help="Port to listen on, 1 to 65535.  [default: GRADIO_SERVER_PORT, or 7860]")
    ] = None,
    auth: Annotated[
        str | None,
        typer.Option(
            metavar="USER:PASSWORD",
            help="Ask for a login. Other users of this machine may see it in the list of processes: rather use "
            "--auth-file or the variable CAPTIONER_AUTH.",
        ),
    ] = None,
    auth_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Ask for a login; one USER:PASSWORD a line.")
    ] = None,
    trust_proxy: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS[,ADDRESS...]",
            help="Believe these proxies, addresses or networks, whom a request comes from.  [default: "
            "FORWARDED_ALLOW_IPS, or nobody]",
        ),
    ] = None,
    max_upload_mb: Annotated[int, typer.Option(help="The most MiB of a picture's file.")] = 20,
    max_uploads_mb: Annotated[int, typer.Option(help="The most MiB of all uploads that are kept at a time.")] = 1024,
    max_pixels: Annotated[int, typer.Option(help="The most pixels of a picture, height times width.")] = 50_000_000,
    max_queue: Annotated[int, typer.Option(help="Pictures that may wait; more are refused with status 503.")] = 256,
    timeout_s: Annotated[float, typer.Option(help="Seconds until a request is given up.")] = 60.0,
    mcp: Annotated[
        bool, typer.Option("--mcp", help="Offer the endpoints as tools of the Model Context Protocol too.")
    ] = False,
    log: Annotated[bool, typer.Option("--log", help="Write a line of JSON per request to standard error.")] = False,
    log_captions: Annotated[bool, typer.Option("--log-captions", help="Write the captions into it too.")] = False,
) -> None:
    """Serve the page and its API until Ctrl-C or SIGTERM; open requests are answered first."""
    from captioner.service import ServiceLimits
    from captioner.serving import ServeSettings, read_users

    settings = ServeSettings(
        model=model,
        device=device,
        runtime=runtime,
        threads=threads,
        compare=tuple(compare or ()),
        # A platform that runs this says by these variables where it expects the page.
        host=os.getenv("GRADIO_SERVER_NAME", "127.0.0.1") if host is None else host,
        port=os.getenv("GRADIO_SERVER_PORT", "7860") if port is None else port,
        users=read_users(auth, auth_file),
        limits=ServiceLimits(
            max_upload_bytes=max_upload_mb * 2**20,
            max_uploads_bytes=max_uploads_mb * 2**20,
            max_pixels=max_pixels,
            max_queue=max_queue,
            timeout_s=timeout_s,
        ),
        trust_proxy=os.getenv("FORWARDED_ALLOW_IPS", "") if trust_proxy is None else trust_proxy,
        mcp=mcp,
        log=log,
        log_captions=log_captions,
    )
    _page_module().serve(settings)


def _page_module() -> Any:
    """Return `app.py` of this project, wherever the command is run: by its name, another folder's could be meant."""
    path = Path(__file__).resolve().parents[1] / "app.py"
    spec = importlib.util.spec_from_file_location("captioner_app", path)
    if spec is None or spec.loader is None:  # never, for a path that ends in .py
        raise ImportError(path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Run the command alone, as `python app.py` does."""
    alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    alone.command(context_settings={"help_option_names": ["-h", "--help"]})(serve)
    alone()
