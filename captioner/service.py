"""One model, many users: `Service` answers from many threads, and hands their pictures to the model in batches.

    caller's thread: options checked ──▶ admitted, or refused at once ──▶ picture decoded ──▶ queue ──▶ answer
                                                                                               │         ▲
    model thread:                                           one batch of equal search options ─┴── model ┘

A caption that comes out of a shared batch is the one that `Captioner.caption` gives alone: the same words, and a score
that differs by the rounding of float32. With a seed that holds for sampling too; without one every sample differs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, cast

from captioner.api import Captioner
from captioner.batching import Batcher, Ticket
from captioner.caption import Caption, Word
from captioner.config import SearchOptions
from captioner.errors import ConfigError, ImageError, SearchError, ServiceClosedError, ServiceError, ServiceTimeoutError
from captioner.images import ImageLimits, Picture, Source, open_picture, pixels_to_decode
from captioner.prepared import PreparedPicture, prepare, side_to_open_px
from captioner.requests import CALLER, PLACED, Place, RequestRecord, Turnstile, WordStream, require_present
from captioner.telemetry import Telemetry
from captioner.threads import available_cpus

ROWS_LIMIT = 512
"""Hypotheses that a batch may hold: a search with a wide beam gets smaller batches."""

MAX_DECODERS = 4
"""Pictures that are decoded at a time, at most."""

DECODING_PIXELS = 50_000_000
"""Pixels of the pictures that are decoded at a time, together: each takes up to about 20 bytes of memory."""


@dataclass(frozen=True, kw_only=True)
class ServiceLimits:
    """How much a service takes on.

    Args:
        max_batch: pictures that go through the model together.
        max_wait_ms: how long the model may stand idle, milliseconds, while a picture waits for others that are still
            being decoded; it never waits for nobody.
        max_queue: pictures that may wait, those being decoded among them.
        timeout_s: seconds from the admission of a request to its answer.
        max_upload_bytes: the most bytes of a picture's file.
        max_pixels: the most pixels of a picture, height times width.
        max_uploads_bytes: the most bytes of all uploads that are kept at a time.
    """

    max_batch: int = 32
    max_wait_ms: float = 3.0
    max_queue: int = 256
    timeout_s: float = 60.0
    max_upload_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000
    max_uploads_bytes: int = 2**30

    def __post_init__(self) -> None:
        for name, most in (
            ("max_batch", 4096),
            ("max_queue", 2**20),
            ("max_upload_bytes", 2**40),
            ("max_pixels", 2**40),
            ("max_uploads_bytes", 2**50),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ConfigError(f"{name} must be a whole number, at least 1 and at most {most}, got {value!r}")
        if self.max_uploads_bytes < self.max_upload_bytes:
            raise ConfigError(
                f"max_uploads_bytes must be at least max_upload_bytes, {self.max_upload_bytes}, "
                f"got {self.max_uploads_bytes}"
            )
        for name, least, limit in (("max_wait_ms", 0.0, 1000.0), ("timeout_s", 0.001, 86_400.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= limit:
                raise ConfigError(f"{name} must be a number, at least {least:g} and at most {limit:g}, got {value!r}")


class Service:
    """Answers many users from one model. Safe to call from many threads; a context manager that closes at its end.

        with Service(Captioner.load()) as service:
            service.caption("photo.jpg").text

    Every call may raise, beside what it says itself: `ServiceBusyError`, at once, when the queue is full;
    `ServiceTimeoutError` when the answer took too long; `ServiceClosedError` when the service is closing;
    `ServiceError` when the model has failed; `CancelledError` when who asked has left (see `requests.Callers`).

    Args:
        captioner: the model.
        limits: how much is taken on.
        telemetry: counts and logs; a new one, without a log, when there is none.
    """

    def __init__(
        self,
        captioner: Captioner,
        *,
        limits: ServiceLimits = ServiceLimits(),
        telemetry: Telemetry | None = None,
    ) -> None:
        self.captioner = captioner
        self.limits = limits
        self.telemetry = telemetry or Telemetry()
        self._image_limits = ImageLimits(max_pixels=limits.max_pixels, max_bytes=limits.max_upload_bytes)
        self._decoding = Turnstile(
            min(MAX_DECODERS, available_cpus()), capacity=max(DECODING_PIXELS, limits.max_pixels)
        )
        self._draining = False
        self._batcher = Batcher(
            self._run,
            max_wait_s=limits.max_wait_ms / 1000,
            max_queue=limits.max_queue,
            timeout_s=limits.timeout_s,
            telemetry=self.telemetry,
        )
        self.telemetry.queue.follow(lambda: self._batcher.waiting)
        self.telemetry.ready.follow(lambda: self.ready)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def ready(self) -> bool:
        """Whether requests are taken and the model answers."""
        return self._batcher.ready and not self._draining

    @property
    def waiting(self) -> int:
        """How many pictures wait for the model, those being decoded among them."""
        return self._batcher.waiting

    def refusal(self) -> ServiceError | None:
        """Return the error with which a request of one picture would be refused now; None when it would be taken."""
        if self._draining:
            return ServiceClosedError("the service is closing and takes no more requests; try again later")
        return self._batcher.refusal()

    def reserve(self, count: int) -> Place:
        """Take places in the queue for one who comes; `requests.PLACED` hands them to the calls of this service.

        Args:
            count: of pictures.

        Returns:
            The places; unused, they are free again after the time limit at the latest.

        Raises:
            ServiceBusyError: when there are not so many.
            ServiceClosedError: when the service is closing.
            ServiceError: when it has failed.
        """
        if self._draining and (error := self.refusal()) is not None:
            raise error
        return Place(self._batcher, self._batcher.admit(count, held=True))

    def drain(self) -> None:
        """Let nobody new in at the door: `ready` is False and `refusal` says so, but every call is still answered.

        It comes before `close` where requests pass a door first, as `captioner.asgi` is one: who has been let in there
        may not have reached the service yet.
        """
        self._draining = True

    def close(self, drain_s: float = 30.0) -> None:
        """Take no more requests, finish those that are open, then stop. Closing twice is once.

        Args:
            drain_s: how long open requests may take; what is left then ends with `ServiceClosedError`.
        """
        self._batcher.close(drain_s)

    def caption(self, picture: Source | PreparedPicture, **options: Any) -> Caption:
        """Caption one picture.

        Args:
            picture: as for `Captioner.caption`.
            **options: search options; see `SearchOptions`.

        Returns:
            The caption, the same as `Captioner.caption` gives.

        Raises:
            ImageError: when the picture cannot be read, or is over a limit.
            ConfigError: for an unknown or impossible option.
            SearchError: when no caption can be as the options ask.
        """
        return cast(Caption, _result(self.submit(picture, **options)))

    def submit(self, picture: Source | PreparedPicture, **options: Any) -> Future[Caption]:
        """Start to caption one picture: options are checked and the picture is decoded here and now.

        Args:
            picture: as for `Captioner.caption`.
            **options: search options; see `SearchOptions`.

        Returns:
            The future caption. Cancelled before it started, the picture leaves the queue.

        Raises:
            ImageError: when the picture cannot be read, or is over a limit.
            ConfigError: for an unknown or impossible option.
            SearchError: for a word that the model does not know.
        """
        with RequestRecord(self.telemetry, "caption", pictures=1) as record:
            chosen = self._options(options)
            with self._places(1) as ticket:
                return self._put(ticket, record, picture, chosen, limit=self._batch_limit(chosen))

    def caption_batch(
        self,
        pictures: Sequence[Source | PreparedPicture],
        *,
        on_error: Literal["raise", "return"] = "return",
        **options: Any,
    ) -> list[Caption | ImageError | SearchError]:
        """Caption many pictures; all of them are admitted, or none.

        Args:
            pictures: each as for `Captioner.caption`; at most `limits.max_queue`.
            on_error: "return" gives the error of a picture in the place of its caption; "raise" raises the first.
            **options: search options; see `SearchOptions`.

        Returns:
            For each picture its caption, or why it has none.

        Raises:
            ConfigError: for an unknown or impossible option, or too many pictures.
            SearchError: for a word that the model does not know.
        """
        if on_error not in ("raise", "return"):
            raise ConfigError(f"on_error must be 'raise' or 'return', got {on_error!r}")
        if isinstance(pictures, str | bytes | bytearray | os.PathLike) or not isinstance(pictures, Iterable):
            raise ConfigError(f"pictures must be a list of pictures, got one {type(pictures).__name__}; use caption()")
        given = list(pictures)
        if not given:
            return []
        found: list[Future[Caption] | ImageError] = []
        try:
            with RequestRecord(self.telemetry, "caption_batch", pictures=len(given)) as record:
                chosen = self._options(options)
                with self._places(len(given)) as ticket:
                    for picture in given:
                        try:
                            found.append(self._put(ticket, record, picture, chosen, limit=self._batch_limit(chosen)))
                        except ImageError as err:
                            record.failed(err)
                            found.append(err)
            results = [each if isinstance(each, ImageError) else _caption_or_error(each) for each in found]
        except BaseException:
            for each in found:
                if isinstance(each, Future):
                    each.cancel()
            raise
        for result in results:
            if on_error == "raise" and not isinstance(result, Caption):
                raise result
        return results

    def score(self, picture: Source | PreparedPicture, sentence: str) -> Caption:
        """Read a given sentence as the picture's caption.

        Args:
            picture: as for `Captioner.caption`.
            sentence: words that the model knows.

        Returns:
            The caption of these words, with score, probabilities and maps.

        Raises:
            ImageError: when the picture cannot be read, or is over a limit.
            SearchError: when the sentence is empty, too long, or has a word that the model does not know.
        """

        def read(prepared: PreparedPicture) -> Caption:
            return self.captioner.score(prepared, sentence)

        with RequestRecord(self.telemetry, "score", pictures=1) as record:
            self.captioner.check_sentence(sentence)
            with self._places(1) as ticket:
                future = self._put(ticket, record, picture, _Alone(read), limit=1)
        return cast(Caption, _result(future))

    def stream(self, picture: Source | PreparedPicture, **options: Any) -> Iterator[Word]:
        """Caption one picture and give each word as it is found.

        Args:
            picture: as for `Captioner.caption`.
            **options: search options; `method` is "greedy" unless it is given, or "sample".

        Returns:
            An iterator over the words; closed early, it stops the search.

        Raises:
            ImageError: at once, when the picture cannot be read, or is over a limit.
            ConfigError: at once, for an impossible option, or a beam search.
            SearchError: when no caption can be as the options ask.
        """
        words = WordStream(lambda prepared: self.captioner.stream(prepared, **options))
        with RequestRecord(self.telemetry, "stream", pictures=1) as record:
            self._options({"method": "greedy", **options})
            with self._places(1) as ticket:
                future = self._put(ticket, record, picture, _Alone(words.run), limit=1)
        return words.follow(future)

    def open(self, picture: Source, *, name: str | None = None, side_px: int | None = None) -> Picture:
        """Open a picture to show it; that takes a place in the queue and a turn at the decoder, as captions do.

        Args:
            picture: as for `Captioner.caption`.
            name: what to call it in messages; default: its path, or "<bytes>" and the like.
            side_px: the side that is needed; a larger JPEG is decoded at reduced scale.

        Returns:
            The picture, upright.

        Raises:
            ImageError: when it cannot be read, or is over a limit.
        """
        with (
            RequestRecord(self.telemetry, "open", pictures=1),
            self._places(1) as ticket,
            self._decoder(ticket.deadline_s, picture, side_px),
        ):
            return open_picture(picture, name=name, limits=self._image_limits, side_px=side_px)

    # --- In the caller's thread ---

    def _options(self, options: dict[str, Any]) -> SearchOptions:
        return self.captioner.search_options(**options)

    def _batch_limit(self, options: SearchOptions) -> int:
        rows = options.beam_size if options.method == "beam" else options.n_best
        return max(1, min(self.limits.max_batch, ROWS_LIMIT // rows))

    @contextlib.contextmanager
    def _places(self, count: int) -> Iterator[Ticket]:
        if count > self.limits.max_queue:
            raise ConfigError(f"at most {self.limits.max_queue} pictures per request, got {count}; send fewer at once")
        place = PLACED.get()
        ticket = place.take(self._batcher, count) if place is not None else None
        ticket = ticket or self._batcher.admit(count)
        try:
            yield ticket
        finally:
            self._batcher.release(ticket)

    def _put(
        self,
        ticket: Ticket,
        record: RequestRecord,
        picture: Source | PreparedPicture,
        key: SearchOptions | _Alone,
        *,
        limit: int,
    ) -> Future[Any]:
        caller = CALLER.get()
        item = self._batcher.put(ticket, key, self._prepare(picture, ticket.deadline_s), limit=limit)
        record.watch(item)
        if caller is not None:
            caller.wait_for(item.future)
        return item.future

    def _prepare(self, picture: Source | PreparedPicture, deadline_s: float) -> PreparedPicture:
        if isinstance(picture, PreparedPicture):
            require_present()
            return self.captioner.prepare(picture)
        with self._decoder(deadline_s, picture, side_to_open_px(self.captioner.config.preprocessing)):
            return prepare(picture, self.captioner.config.preprocessing, limits=self._image_limits)

    @contextlib.contextmanager
    def _decoder(self, deadline_s: float, picture: Source, side_px: int | None) -> Iterator[None]:
        """Take a turn at the decoder."""
        require_present()
        weight = pixels_to_decode(picture, limits=self._image_limits, side_px=side_px)
        if not self._decoding.enter(deadline_s, weight=weight):
            raise ServiceTimeoutError("the picture was not decoded within the time limit; try again later")
        try:
            require_present()
            yield
        finally:
            self._decoding.leave(weight=weight)

    # --- In the model thread ---

    def _run(self, key: SearchOptions | _Alone, pictures: list[PreparedPicture]) -> list[Any]:
        self.telemetry.pictures.add(len(pictures))
        if isinstance(key, _Alone):
            return [key.action(pictures[0])]
        found = self.captioner.caption_batch(pictures, batch_size=len(pictures), on_error="return", **key.to_dict())
        return list(found)


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    finally:
        future.cancel()  # the caller was interrupted; nothing to one that is done


def _caption_or_error(future: Future[Caption]) -> Caption | SearchError:
    try:
        return cast(Caption, _result(future))
    except SearchError as err:
        return err


@dataclass(frozen=True, eq=False)
class _Alone:
    """The key of what shares its batch with nothing.

    Args:
        action: what to do with the picture.
    """

    action: Callable[[PreparedPicture], Any]
