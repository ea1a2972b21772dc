"""Photos one click away, with captions that are ready."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from captioner.images import open_picture
from captioner.page import Message, Model, data_uri, tell

THUMBNAIL_SIDE_PX = 192


class Examples:
    """Photos that are captioned once and then known; nothing is written. Safe to use from many threads.

    Args:
        model: that captions them.
        paths: of the photos.
        usual: the search options with which the page starts; captions found with these are kept.
    """

    def __init__(self, model: Model, paths: Sequence[Path], usual: Mapping[str, Any]) -> None:
        self.paths = tuple(paths)
        self._model = model
        self._usual = dict(usual)
        self._told: dict[int, Message] = {}

    def thumbnails(self) -> list[dict[str, str]]:
        """Return each photo's name and small picture.

        Returns:
            {"name", "picture"}: a readable name, a data URI.

        Raises:
            ImageError: when a photo cannot be read.
        """
        return [
            {
                "name": path.stem.replace("-", " ").replace("_", " "),
                "picture": data_uri(open_picture(path, side_px=THUMBNAIL_SIDE_PX).image, THUMBNAIL_SIDE_PX),
            }
            for path in self.paths
        ]

    def tell(self, index: int, options: Mapping[str, Any], *, run: int) -> Iterator[Message]:
        """Caption an example as `captioner.page.tell` does, or at once where that has been done.

        Args:
            index: of the photo.
            options: of the search.
            run: from `new_run`.

        Yields:
            The messages.
        """
        usual = options == self._usual
        if usual and index in self._told:
            yield {**self._told[index], "run": run}
            return
        path = self.paths[index]
        for message in tell(self._model, str(path), path.name, options, run=run):
            if usual and message.get("phase") == "done":
                self._told[index] = message
            yield message

    def get_ready(self) -> None:
        """Caption all of them, so that a click finds them ready; one that cannot be captioned says so when clicked."""
        for index in range(len(self.paths)):
            for _ in self.tell(index, self._usual, run=0):
                pass
