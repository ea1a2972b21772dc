"""Document frequencies for CIDEr-D: in how many pictures of a corpus each n-gram occurs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner.errors import MetricError
from captioner.metrics import ptb

MAX_ORDER = 4
# Whole numbers up to here are exact in double precision.
_MOST_DOCUMENTS = 2**53

_FORMAT = "captioner-document-frequencies-1"


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many pictures of a corpus each n-gram occurs.

    Attributes:
        name: what the protocol card calls the corpus.
        documents: pictures in the corpus.
        counts: pictures in which the n-gram is in at least one reference.
    """

    name: str
    documents: int
    counts: Mapping[tuple[Hashable, ...], int]

    def __post_init__(self) -> None:
        if not 1 <= self.documents <= _MOST_DOCUMENTS:
            raise MetricError(
                f"document frequencies {self.name!r}: documents must be 1 to {_MOST_DOCUMENTS}, got {self.documents}"
            )
        for count in (min(self.counts.values(), default=0), max(self.counts.values(), default=0)):
            if not 0 <= count <= self.documents:
                raise MetricError(
                    f"document frequencies {self.name!r}: an n-gram is in {count} of {self.documents} documents"
                )

    @classmethod
    def of(cls, references: Iterable[Sequence[Sequence[Hashable]]], *, name: str) -> DocumentFrequencies:
        """Count a corpus.

        Args:
            references: the tokenised references of each picture.
            name: what the protocol card shall call the corpus.

        Returns:
            The frequencies of all n-grams up to order 4.
        """
        counts: Counter[tuple[Hashable, ...]] = Counter()
        documents = 0
        for sentences in references:
            documents += 1
            counts.update({gram for tokens in sentences for gram in _ngrams(tokens)})
        return cls(name, documents, dict(counts))

    @classmethod
    def of_captions(cls, references: Mapping[str, Sequence[str]], *, name: str) -> DocumentFrequencies:
        """Count a corpus of untokenised captions, as `evaluate` would tokenise them.

        Args:
            references: the reference captions by picture, such as `read_references(path).captions`.
            name: what the protocol card shall call the corpus.

        Returns:
            The frequencies.

        Raises:
            MetricError: no pictures.
        """
        # Like coco-caption's scorers, at any white space: "1\u00a01/2" is two words.
        tokens = ([" ".join(ptb.tokenize(caption)).split() for caption in many] for many in references.values())
        return cls.of(tokens, name=name)

    def describe(self) -> str:
        """Return what tells this corpus from any other, for the protocol card.

        Returns:
            Its name, its size and the start of a hash of all counts.
        """
        lines = sorted(f"{' '.join(map(str, gram))}\t{n}\n" for gram, n in self.counts.items())
        digest = hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
        return f"{self.name} ({self.documents} pictures, sha256 {digest[:16]})"

    def save(self, path: Path | str) -> None:
        """Write the frequencies as JSON.

        Args:
            path: file to write; an older one is replaced.

        Raises:
            MetricError: a token is no text or has a blank in it, so that the file could not be read back; or
                the file cannot be written.
        """
        for gram in self.counts:
            for token in gram:
                if not isinstance(token, str) or not token or token.split(" ") != [token]:
                    raise MetricError(f"{path}: token {token!r} cannot be saved; expected text without blanks")
        content = {
            "format": _FORMAT,
            "name": self.name,
            "documents": self.documents,
            "counts": {" ".join(map(str, gram)): n for gram, n in self.counts.items()},
        }
        try:
            Path(path).write_text(json.dumps(content), encoding="utf-8")
        except OSError as err:
            raise MetricError(f"{path}: cannot be written: {err.strerror}; choose another place") from err

    @classmethod
    def load(cls, path: Path | str) -> DocumentFrequencies:
        """Read what `save` wrote.

        Args:
            path: the file.

        Returns:
            The frequencies.

        Raises:
            MetricError: the file is missing, unreadable or of another format.
        """
        try:
            content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as err:
            raise MetricError(f"{path}: cannot be read: {err.strerror}; give a document-frequency file") from err
        except (ValueError, RecursionError) as err:
            raise MetricError(f"{path}: not JSON: {err}; write it anew with DocumentFrequencies.save") from err
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise MetricError(f'{path}: no document-frequency file; expected "format": "{_FORMAT}"')
        try:
            counts = {tuple(gram.split(" ")): int(n) for gram, n in content["counts"].items()}
            return cls(str(content["name"]), int(content["documents"]), counts)
        except (KeyError, AttributeError, TypeError, ValueError, OverflowError) as err:
            raise MetricError(f"{path}: damaged document-frequency file ({err!r}); write it anew") from err


def _ngrams(tokens: Sequence[Hashable]) -> Iterable[tuple[Hashable, ...]]:
    for order in range(1, MAX_ORDER + 1):
        yield from zip(*(tokens[i:] for i in range(order)), strict=False)
