"""How a model does in a wider world: on photos of any kind, with or without captions of their own.

`python -m training survey IMAGES` captions a folder of photos and says how various and how sure the captions are.
Without references nobody can say whether they are true: read some of them beside the photos.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from captioner import Captioner
from captioner.caption import Caption
from captioner.errors import DataError, ImageError, SearchError
from captioner.metrics import Evaluation, evaluate, java
from captioner.metrics import tokenize as ptb_tokenize
from training.sources import DataSource, read_source

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_OPENING_WORDS = 3


@dataclass(frozen=True)
class Survey:
    """What captions of a set of photos are like.

    Args:
        pictures: that were captioned.
        failed: that could not be.
        distinct: different captions, as a share of all.
        man_in_a: share of captions that begin "a man in a".
        vocabulary: different words used.
        mean_words: of a caption.
        mean_confidence: None for a model that was not calibrated.
        unsure: share of captions with a confidence below 0.35.
        openings: the most frequent first three words, with their share.
    """

    pictures: int
    failed: int
    distinct: float
    man_in_a: float
    vocabulary: int
    mean_words: float
    mean_confidence: float | None
    unsure: float | None
    openings: tuple[tuple[str, float], ...]


def survey(captions: Sequence[Caption], *, failed: int = 0) -> Survey:
    """Describe captions.

    Args:
        captions: of different pictures, at least one.
        failed: pictures that could not be captioned.

    Returns:
        The figures.

    Raises:
        DataError: for no caption.
    """
    if not captions:
        raise DataError("survey: no picture could be captioned")
    total = len(captions)
    words = [ptb_tokenize(caption.text) for caption in captions]
    sure = [caption.confidence for caption in captions if caption.confidence is not None]
    openings = Counter(" ".join(tokens[:_OPENING_WORDS]) for tokens in words).most_common(5)
    return Survey(
        pictures=total,
        failed=failed,
        distinct=len({tuple(tokens) for tokens in words}) / total,
        man_in_a=sum(tokens[:4] == ["a", "man", "in", "a"] for tokens in words) / total,
        vocabulary=len({word for tokens in words for word in tokens}),
        mean_words=sum(map(len, words)) / total,
        mean_confidence=sum(sure) / len(sure) if sure else None,
        unsure=sum(value < 0.35 for value in sure) / len(sure) if sure else None,
        openings=tuple((opening, count / total) for opening, count in openings),
    )


def main(arguments: Sequence[str]) -> int:
    """Run `python -m training survey`.

    Args:
        arguments: after the word survey.

    Returns:
        The exit status.

    Raises:
        DataError: when there is no picture.
    """
    parser = argparse.ArgumentParser(prog="python -m training survey", description=__doc__)
    parser.add_argument("images", type=Path, help="folder of photos")
    parser.add_argument("--model", help="model folder (default: the bundled model)")
    parser.add_argument("--captions", type=Path, help="table of their captions, with a column split; gives scores")
    parser.add_argument("--split", default="dev", choices=("train", "dev", "test"), help="of that table")
    parser.add_argument("--output", "-o", type=Path, help="file for the captions, one JSON record per line")
    given = parser.parse_args(arguments)
    references = _references(given.captions, given.images, given.split)
    names = list(references) or sorted(path.name for path in _photos(given.images))
    captioner = Captioner.load(given.model)
    results = dict(
        zip(names, captioner.caption_batch([given.images / name for name in names], on_error="return"), strict=True)
    )
    captions = {name: found for name, found in results.items() if isinstance(found, Caption)}
    described = survey(list(captions.values()), failed=len(results) - len(captions))
    evaluation = _evaluation(captions, references)
    report = dataclasses.asdict(described) | ({} if evaluation is None else {"scores": dict(evaluation.scores)})
    if given.output is not None:
        lines = [json.dumps(found.to_record(name)) for name, found in captions.items()]
        given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    for name, found in results.items():
        if isinstance(found, ImageError | SearchError):
            sys.stderr.write(f"error: {name}: {found}\n")
    return 0


def _photos(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name a folder of photos")
    found = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    if not found:
        raise DataError(f"{folder}: holds no photo ({', '.join(SUFFIXES)})")
    return found


def _references(table: Path | None, images: Path, split: str) -> dict[str, tuple[str, ...]]:
    if table is None:
        return {}
    source = DataSource(
        root=str(table.absolute().parent), annotations=table.name, images=str(images.absolute()), format="table"
    )
    pictures = read_source(source).pictures.get(split)
    if not pictures:
        raise DataError(f"{table}: has no picture of split {split!r}")
    return {picture.name: picture.captions for picture in pictures}


def _evaluation(captions: dict[str, Caption], references: dict[str, tuple[str, ...]]) -> Evaluation | None:
    if not references:
        return None
    predictions = {name: found.text for name, found in captions.items()}
    scored = {name: references[name] for name in predictions}
    return evaluate(predictions, scored, meteor=java.missing("METEOR") is None)
