"""A source as a whole: which part of it is whose, what it held, how much there is."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from captioner.errors import ConfigError
from captioner.journal import name_hash
from captioner.sources import find_pictures

_TAR = re.compile(r"\.(tar|tgz|tbz2|txz|tzst|tar\.\w+)$", re.IGNORECASE)


@dataclass(frozen=True)
class Shard:
    """One of several parts of a source, chosen by a hash of the pictures' names: the same on every machine.

    Args:
        number: from 1.
        count: of parts.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "2/8".

        Args:
            text: number and count.

        Returns:
            The shard.

        Raises:
            ConfigError: when it is something else.
        """
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(f"shard must be i/n with i from 1 to n, such as 2/8, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def holds(self, name: bytes) -> bool:
        """Return whether a picture is in the part.

        Args:
            name: its `name_hash`.

        Returns:
            Whether it is.
        """
        return int.from_bytes(name[:8], "big") % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


WHOLE = Shard(1, 1)


class Seen:
    """Number and sum of the names of a whole source, by which the shards of it are known to belong together."""

    def __init__(self) -> None:
        self.count = self._sum = 0

    def add(self, name: bytes) -> None:
        """Take a picture in.

        Args:
            name: its `name_hash`.
        """
        self.count += 1
        self._sum = (self._sum + int.from_bytes(name, "big")) % 2**128

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, equal for equal sources, whatever the order."""
        return {"pictures": self.count, "names": f"{self._sum:032x}"}


class Total:
    """Counts the pictures of a run beside the work, where that takes no more than listing them.

    Its `value` is None until they are counted. A context manager, which ends the counting.

    Args:
        sources: as of `find_pictures`.
        search: its other arguments.
        part: what of them is counted.
        wanted: False counts nothing.
    """

    def __init__(self, sources: Sequence[str], search: Mapping[str, Any], part: Shard, *, wanted: bool) -> None:
        self.value: int | None = None
        self._sources, self._search, self._part = sources, search, part
        # Standard input can be read only once, and a tar has no list of what is in it.
        self._wanted = wanted and not any(source == "-" or _TAR.search(source) for source in sources)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._count, name="count pictures", daemon=True)

    def __enter__(self) -> Self:
        if self._wanted:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._wanted:
            self._thread.join()

    def _count(self) -> None:
        count = 0
        try:
            for picture in find_pictures(self._sources, **self._search):
                if self._left.is_set():
                    return
                count += self._part.holds(name_hash(picture.name))
        except Exception:  # the run meets the same and says it; a total is then of no use
            return
        self.value = count
