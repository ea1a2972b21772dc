"""What captions the pictures of a batch run: `Engine`, and the one of this machine, `LocalEngine`."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from captioner.api import BATCH_LIMIT, Captioner
from captioner.caption import Caption
from captioner.config import SearchOptions
from captioner.decoding import Decoders, default_workers
from captioner.errors import ConfigError, DataError, ImageError, SearchError
from captioner.images import DEFAULT_LIMITS, ImageLimits
from captioner.prepared import PreparedPicture
from captioner.sources import SourcePicture

Result = Caption | ImageError | SearchError | DataError
"""What comes of a picture; a DataError when its own file cannot be written."""


class Engine(Protocol):
    """What captions the pictures: here, or on a cluster. A context manager, which holds what it needs meanwhile.

    Args:
        identity: of model and search, as plain values: equal where records are.
    """

    identity: Mapping[str, Any]

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def captions(self, pictures: Iterator[SourcePicture]) -> Iterator[list[tuple[SourcePicture, Result]]]:
        """Caption pictures.

        Args:
            pictures: drawn from as they are needed.

        Returns:
            An iterator over batches of pictures and what came of them, every picture once, in their order.
        """
        ...


class LocalEngine:
    """Captions on this machine: decodes in processes of their own, runs the model in this one.

    Args:
        captioner: makes the captioner; called once the decoding processes have been started, since both take time.
        batch_size: pictures that go through the model together.
        workers: processes that decode; None is one for each CPU, 0 decodes in this process.
        options: search options.
        picture_limits: of pixels and bytes.

    Raises:
        ConfigError: for an impossible setting.
    """

    def __init__(
        self,
        captioner: Callable[[], Captioner],
        *,
        batch_size: int = 32,
        workers: int | None = None,
        options: Mapping[str, Any] | None = None,
        picture_limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or not 1 <= batch_size <= BATCH_LIMIT:
            raise ConfigError(
                f"batch_size must be a whole number, at least 1 and at most {BATCH_LIMIT}, got {batch_size!r}"
            )
        self._options = dict(options or {})
        SearchOptions.from_dict(self._options)  # wrong usage is said before the model is loaded
        self._make, self._batch_size, self._picture_limits = captioner, batch_size, picture_limits
        self._decoders = Decoders(default_workers() if workers is None else workers)
        self.identity: Mapping[str, Any] = {}

    def __enter__(self) -> Self:
        self._decoders.__enter__()
        try:
            self._captioner = self._make()
            self._captioner.caption_batch([], **self._options)  # says what this model cannot do
            self.identity = {
                "model": fingerprint(self._captioner),
                # Resolved: an option that is set to the model's default is no other option.
                "search": self._captioner.search_options(**self._options).to_dict(),
            }
        except BaseException:
            self._decoders.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._decoders.close()

    def captions(self, pictures: Iterator[SourcePicture]) -> Iterator[list[tuple[SourcePicture, Result]]]:
        """Caption pictures; see `Engine`."""
        decoded = self._decoders.map(
            pictures,
            self._captioner.config.preprocessing,
            # While the model has one batch, the next one is made ready.
            ahead=2 * self._batch_size + self._decoders.workers,
            limits=self._picture_limits,
        )
        while batch := list(itertools.islice(decoded, self._batch_size)):
            good = [item for _, item in batch if isinstance(item, PreparedPicture)]
            found = self._captioner.caption_batch(good, batch_size=self._batch_size, on_error="return", **self._options)
            yield [(picture, next(found) if isinstance(item, PreparedPicture) else item) for picture, item in batch]


def fingerprint(captioner: Captioner) -> str:
    """Return a SHA-256 of everything of a model that its captions depend on, however it was loaded."""
    settings = captioner.config.to_dict()
    del settings["search"]  # defaults; what a run uses stands in its search options
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(captioner.tokenizer.to_json().encode())
    for name, value in captioner.runtime.weights():
        digest.update(f"{name} torch.{value.dtype} {list(value.shape)}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    digest.update(captioner.runtime.variant.encode())
    return digest.hexdigest()
