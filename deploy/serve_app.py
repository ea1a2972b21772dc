"""Captioner as a Ray Serve application: replicas on many machines, each of which captions in batches.

    pip install "captioner[ray]"
    serve run deploy.serve_app:app model=FOLDER max_replicas=8 num_gpus=1     # from the repository's folder
    curl --data-binary @photo.jpg "http://127.0.0.1:8000/?beam_size=5&n_best=3"

POST / with the bytes of a picture. In the query are search options, phrases several times if need be, and "image", the
picture's name in the answer. The answer is the JSON record of `captioner caption --json`. Its status is 200; 400 for a
wrong option; 405; 413 for too large a picture; 422 for what is no picture, or has no caption that meets the options; or
503, of Serve itself, when the queue is full. Errors of the application are records too, with our message.

    proxy ──▶ replica: options checked ──▶ body read, decoded in a thread ──▶ `serve.batch` ──▶ model, in its thread

Ray Serve asks `/-/healthz` of its proxies, and `check_health` of each replica: one whose model has failed is replaced.
"""

from __future__ import annotations

import asyncio
import types
import typing
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse

from captioner.api import Captioner
from captioner.caption import Caption, error_record
from captioner.config import SearchOptions
from captioner.errors import CaptionerError, ConfigError, ImageError, ImageTooLargeError, SearchError
from captioner.images import ImageLimits
from captioner.prepared import PreparedPicture, prepare


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `serve run deploy.serve_app:app NAME=VALUE...` takes.

    Args:
        model: a model folder that all machines see, or a hub id; "" is the bundled model.
        device: as in `Captioner.load`.
        max_batch: pictures that go through the model together.
        max_wait_ms: how long a picture waits for others, milliseconds.
        max_queue: requests that each proxy lets wait; one more is answered with 503.
        max_upload_bytes: the most bytes of a picture's file.
        max_pixels: the most pixels of a picture.
        min_replicas: copies of the model that are always there.
        max_replicas: copies of the model at most.
        num_cpus: of each copy.
        num_gpus: of each copy.
    """

    model: str = ""
    device: str = "auto"
    max_batch: int = 32
    max_wait_ms: float = 5.0
    max_queue: int = 256
    max_upload_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000
    min_replicas: int = 1
    max_replicas: int = 4
    num_cpus: float = 1.0
    num_gpus: float = 0.0


class CaptionReplica:
    """One copy of the model.

    Args:
        settings: of all copies.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._limits = ImageLimits(max_pixels=settings.max_pixels, max_bytes=settings.max_upload_bytes)
        self._captioner = Captioner.load(settings.model or None, device=settings.device)
        self._captioner.caption(_grey())  # what the first request would wait for
        self._decoding = asyncio.Semaphore(max(1, int(settings.num_cpus)))
        self._fault: Exception | None = None
        self._caption.set_max_batch_size(settings.max_batch)
        self._caption.set_batch_wait_timeout_s(settings.max_wait_ms / 1000)

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer a request; see the head of this file."""
        image = request.query_params.get("image", "<bytes>")
        try:
            if request.method != "POST":
                message = "POST the bytes of a picture"
                return JSONResponse(error_record(image, ConfigError(message)), 405, {"Allow": "POST"})
            options = self._captioner.search_options(**parse_options(request.query_params.multi_items()))
            body = await self._body(request)
            async with self._decoding:  # decoding takes up to about 20 bytes of memory per pixel
                picture = await asyncio.to_thread(self._prepare, body, image)
            result: Caption | CaptionerError = await self._caption((picture, options))
        except (ConfigError, ImageError, SearchError) as err:
            result = err
        if isinstance(result, Caption):
            return JSONResponse(result.to_record(image))
        return JSONResponse(error_record(image, result), _status(result))

    def check_health(self) -> None:
        """Tell Serve whether this copy is sound; one that raises is replaced."""
        if self._fault is not None:
            raise self._fault

    async def _body(self, request: Request) -> bytes:
        limit = self._settings.max_upload_bytes
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise ImageTooLargeError(f"the picture has more than {limit} bytes; send a smaller file")
        return bytes(body)

    def _prepare(self, body: bytes, image: str) -> PreparedPicture:
        config = self._captioner.config.preprocessing
        return prepare(body, config, name=image, limits=self._limits, keep_source=False)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)  # type: ignore[untyped-decorator]
    async def _caption(self, items: list[tuple[PreparedPicture, SearchOptions]]) -> list[Caption | CaptionerError]:
        return await self._caption_all(items)

    async def _caption_all(self, items: list[tuple[PreparedPicture, SearchOptions]]) -> list[Caption | CaptionerError]:
        """Caption pictures together, those with equal options in one run of the model."""
        try:
            return await asyncio.to_thread(self._run, items)
        except Exception as err:
            self._fault = err
            raise

    def _run(self, items: list[tuple[PreparedPicture, SearchOptions]]) -> list[Caption | CaptionerError]:
        places: dict[SearchOptions, list[int]] = defaultdict(list)
        for place, (_, options) in enumerate(items):
            places[options].append(place)
        results: dict[int, Caption | CaptionerError] = {}
        for options, group in places.items():
            pictures = [items[place][0] for place in group]
            found: Iterable[Caption | CaptionerError]
            try:
                found = list(
                    self._captioner.caption_batch(
                        pictures, batch_size=len(pictures), on_error="return", **options.to_dict()
                    )
                )
            except SearchError as err:  # of options that no picture can meet
                found = [err] * len(group)
            results.update(zip(group, found, strict=True))
        return [results[place] for place in range(len(items))]


def app(arguments: Mapping[str, Any]) -> Application:
    """Build the application.

    Args:
        arguments: `Settings` by their names, as text or as they are.

    Returns:
        What `serve run` and `ray.serve.run` take.

    Raises:
        ConfigError: for an unknown or impossible setting.
    """
    kinds = {field.name: type(field.default) for field in fields(Settings)}
    unknown = sorted(set(arguments) - set(kinds))
    if unknown:
        raise ConfigError(f"unknown setting {', '.join(unknown)}; there are {', '.join(kinds)}")
    settings = Settings(**{name: _parsed(name, str(value), kinds[name]) for name, value in arguments.items()})
    deployment = serve.deployment(
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        # One batch is in the model while the next one is decoded.
        max_ongoing_requests=2 * settings.max_batch,
        max_queued_requests=settings.max_queue,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            # Below a whole batch each, more copies would only make smaller batches.
            "target_ongoing_requests": settings.max_batch,
        },
        health_check_period_s=10,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=30,
    )
    return deployment(CaptionReplica).bind(settings)


def parse_options(items: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Read search options from the query of a URL.

    Args:
        items: names and values; a name of phrases may come several times; "image" is no option and left out.

    Returns:
        The options; what they are and whether they fit is still to be checked.

    Raises:
        ConfigError: for an option given twice, or a value that is no number where one must be.
    """
    hints = typing.get_type_hints(SearchOptions)
    known = {field.name: hints[field.name] for field in fields(SearchOptions)}
    options: dict[str, Any] = {}
    for name, text in items:
        if name == "image":
            continue
        kind = known.get(name, str)  # an unknown one is refused with the rest of wrong usage
        if typing.get_origin(kind) is tuple:
            options[name] = (*options.get(name, ()), text)
        elif name in options:
            raise ConfigError(f"{name} is given twice; give it once")
        else:
            parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
            options[name] = _parsed(name, text, next(part for part in parts if part is not type(None)))
    return options


def _parsed(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError as err:
        wanted = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{name} must be {wanted}, got {text!r}") from err


def _status(error: CaptionerError) -> int:
    if isinstance(error, ConfigError):
        return 400
    return 413 if isinstance(error, ImageTooLargeError) else 422


def _grey() -> Any:
    import numpy as np

    return np.full((64, 64, 3), 128, np.uint8)
