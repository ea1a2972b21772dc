"""Predictions and references from files, or a clear error with file, line and fault.

Predictions: JSONL records as `captioner batch` writes them, or COCO results. References: Karpathy JSON, COCO
captions JSON, a Flickr8k token file, or JSONL. The format is told from the content, not from the name of the
file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from captioner.errors import MetricError

_SHOWN = 20


@dataclass(frozen=True)
class References:
    """The reference captions of a set of pictures.

    Attributes:
        captions: by the name of the picture.
        names_by_id: from a COCO image id, as text, to that name; empty where the format has no ids.
        source: the file, its format and split, for the protocol card.
    """

    captions: Mapping[str, Sequence[str]]
    names_by_id: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    def name_of(self, picture: str) -> str:
        """Return the name under which a picture of a prediction file is known here.

        Args:
            picture: a path, a file name or a COCO image id.

        Returns:
            The name; `picture` itself where nothing matches.
        """
        if picture in self.captions:
            return picture
        if picture in self.names_by_id:
            return self.names_by_id[picture]
        last = PurePosixPath(picture.replace("\\", "/")).name
        return last if last in self.captions else picture


def listed(names: Sequence[str]) -> str:
    """Write names for an error message: the first few, and how many more.

    Args:
        names: what to list, at least one.

    Returns:
        "a, b, c" or "a, b, c, d, e and 7 more".
    """
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def read_predictions(path: Path | str, references: References) -> dict[str, str]:
    """Read one caption per picture.

    Args:
        path: JSONL records `{"image", "caption", "error"}`, or COCO results `[{"image_id", "caption"}]`.
        references: names the pictures: by path, file name or id.

    Returns:
        The caption of each picture, by the picture's name in the references.

    Raises:
        MetricError: the file is unreadable or damaged, a picture comes twice, or a record holds an error
            instead of a caption.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        records = [(f"{path}: entry {i}", r, "image_id") for i, r in enumerate(read_json(path, text), start=1)]
    else:
        records = [(f"{path}:{line}", r, "image") for line, r in read_jsonl(path, text)]
    captions: dict[str, str] = {}
    twice: list[str] = []
    failed: list[str] = []
    for where, record, key in records:
        picture = references.name_of(_name(where, record, key))
        if isinstance(record.get("error"), dict):
            failed.append(f"{picture}: {record['error'].get('message', record['error'])}")
        elif record.get("error") is not None:
            failed.append(f"{picture}: {record['error']}")
        elif picture in captions:
            twice.append(picture)
        else:
            captions[picture] = _text(where, record, "caption")
    if failed:
        raise MetricError(
            f"{path}: {len(failed)} records hold an error instead of a caption ({listed(failed)}); "
            "caption these pictures, or leave them out of predictions and references"
        )
    if twice:
        raise MetricError(f"{path}: {len(twice)} pictures are predicted twice ({listed(twice)}); keep one caption each")
    return captions


def read_references(path: Path | str, *, split: str | None = None, only: Path | str | None = None) -> References:
    """Read the reference captions of each picture.

    Args:
        path: Karpathy JSON, COCO captions JSON, Flickr8k token file, or JSONL `{"image", "captions"}`.
        split: of a Karpathy JSON; default there: "test". The other formats have no splits.
        only: text file with one picture name per line; the other pictures are left out.

    Returns:
        The captions by picture.

    Raises:
        MetricError: the file is unreadable, damaged or of no known format, the split or a picture of `only`
            is not in it, or nothing is left.
    """
    text = read_text(path)
    if not text.lstrip().startswith("{"):
        found, kind = flickr_references(path, text), "Flickr8k token file"
    elif (whole := _whole_object(path, text)) is None:
        found, kind = _reference_lines(path, text), "JSONL"
    elif "annotations" in whole:
        found, kind = coco_references(path, whole), "COCO captions"
    else:
        split = "test" if split is None else split
        found, kind = _karpathy(path, whole, split), f"Karpathy JSON, split {split}"
    if split is not None and not kind.startswith("Karpathy"):
        raise MetricError(f"{path}: split {split!r} was asked for, but a {kind} has no splits; leave the split out")
    source = f"{Path(path).name} ({kind})"
    captions = dict(found.captions)
    if only is not None:
        names = [line.strip() for line in read_text(only).splitlines() if line.strip()]
        unknown = [name for name in names if name not in captions]
        if unknown:
            raise MetricError(
                f"{only}: {len(unknown)} pictures are not in {path} ({listed(unknown)}); correct the list"
            )
        captions = {name: captions[name] for name in names}
        source += f", only {Path(only).name}"
    if not captions:
        raise MetricError(f"{path}: no picture with captions; expected references as {kind}")
    return References(captions, found.names_by_id, source)


def read_text(path: Path | str) -> str:
    """Read a text file.

    Args:
        path: UTF-8, with or without a byte order mark.

    Returns:
        Its text.

    Raises:
        MetricError: the file is missing, unreadable or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as err:
        raise MetricError(f"{path}: cannot be read: {err.strerror}; give an existing file") from err
    except UnicodeDecodeError as err:
        raise MetricError(f"{path}: not UTF-8 text at byte {err.start}; save it as UTF-8") from err


def read_json(path: Path | str, text: str) -> Any:
    """Parse the text of a JSON file.

    Args:
        path: names the file in the error.
        text: its content.

    Returns:
        The value.

    Raises:
        MetricError: not JSON, with the line.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as err:
        line = getattr(err, "lineno", 1)
        raise MetricError(f"{path}:{line}: not JSON: {getattr(err, 'msg', err)}; correct this line") from err


def read_jsonl(path: Path | str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Parse the text of a file with one JSON object per line; blank lines are passed over.

    Args:
        path: names the file in errors.
        text: its content.

    Yields:
        The number of each line, from 1, and its object.

    Raises:
        MetricError: a line is not a JSON object.
    """
    # Not str.splitlines: it would also split at U+2028 and others, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise MetricError(f"{path}:{number}: not JSON: {getattr(err, 'msg', err)}; correct this line") from err
        if not isinstance(record, dict):
            raise MetricError(f"{path}:{number}: expected an object with an image, got {line.strip()[:40]}")
        yield number, record


def _whole_object(path: Path | str, text: str) -> dict[str, Any] | None:
    """Return the one object of a JSON file; None if the file is JSONL."""
    first, _, rest = text.strip().partition("\n")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        # The first line is no object of its own: an indented file, or a damaged one.
        content = read_json(path, text)
        return content if isinstance(content, dict) else None
    is_line = bool(rest) or (isinstance(record, dict) and "image" in record)
    return None if is_line else record


def _name(where: str, record: Any, key: str) -> str:
    value = record.get(key) if isinstance(record, dict) else None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise MetricError(f"{where}: no {key!r}; expected a name or a number")
    return str(value)


def _text(where: str, record: Any, key: str) -> str:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str):
        raise MetricError(f"{where}: {key!r} must be text, got {value!r}")
    return value


def _list(where: str, record: Any, key: str) -> list[Any]:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, list) or not value:
        raise MetricError(f"{where}: {key!r} must be a list with at least one entry, got {value!r:.40}")
    return value


def _add(captions: dict[str, list[str]], where: str, name: str, sentences: list[str]) -> None:
    if name in captions:
        raise MetricError(f"{where}: picture {name} comes twice; keep one entry per picture")
    captions[name] = sentences


def _reference_lines(path: Path | str, text: str) -> References:
    captions: dict[str, list[str]] = {}
    for line, record in read_jsonl(path, text):
        where = f"{path}:{line}"
        sentences = _list(where, record, "captions")
        if not all(isinstance(s, str) for s in sentences):
            raise MetricError(f"{where}: 'captions' must be texts")
        _add(captions, where, _name(where, record, "image"), sentences)
    return References(captions)


def flickr_references(path: Path | str, text: str) -> References:
    """Parse the text of a Flickr8k or Flickr30k token file (Hodosh et al. 2013).

    Args:
        path: names the file in errors.
        text: lines `NAME.jpg#N<TAB>caption`.

    Returns:
        The captions by file name, in the order of the file.

    Raises:
        MetricError: a line is malformed.
    """
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        key, tab, sentence = line.rstrip("\r").partition("\t")
        name, sharp, index = key.rpartition("#")
        if not (tab and sharp and name and index.isdigit()):
            raise MetricError(
                f"{path}:{number}: no reference line; expected NAME.jpg#N<TAB>caption, Karpathy JSON, "
                f"COCO captions JSON or JSONL; got {line.strip()[:40]!r}"
            )
        captions.setdefault(name, []).append(sentence.strip())
    return References(captions)


def coco_references(path: Path | str, content: dict[str, Any]) -> References:
    """Read COCO captions (Chen et al. 2015).

    Args:
        path: names the file in errors.
        content: its object, with "images" and "annotations".

    Returns:
        The captions by file name, and the file names by id; a picture that "images" does not name is called by
        its id.

    Raises:
        MetricError: an entry is malformed, or an id names two files.
    """
    names: dict[str, str] = {}
    for i, image in enumerate(_list(str(path), content, "images") if content.get("images") else (), start=1):
        where = f"{path}: image {i}"
        number, name = _name(where, image, "id"), _name(where, image, "file_name")
        if names.setdefault(number, name) != name:
            raise MetricError(f"{where}: id {number} is of two files, {names[number]} and {name}; give each its own")
    captions: dict[str, list[str]] = {}
    for i, record in enumerate(_list(str(path), content, "annotations"), start=1):
        where = f"{path}: annotation {i}"
        number = _name(where, record, "image_id")
        captions.setdefault(names.get(number, number), []).append(_text(where, record, "caption"))
    return References(captions, names)


@dataclass(frozen=True)
class KarpathyImage:
    """One picture of a Karpathy JSON.

    Attributes:
        name: file name.
        folder: "filepath", the folder of the file, as COCO has it; empty where the data set has one folder.
        split: "train", "restval", "val" or "test".
        captions: sentences as written.
        number: "cocoid" or "imgid", as text; empty where there is neither.
    """

    name: str
    folder: str
    split: str
    captions: tuple[str, ...]
    number: str


def karpathy_images(path: Path | str, content: Any) -> Iterator[KarpathyImage]:
    """Read the pictures of a Karpathy JSON (Karpathy and Fei-Fei 2015), of all splits.

    Args:
        path: names the file in errors.
        content: its object, with "images".

    Yields:
        The pictures in the order of the file.

    Raises:
        MetricError: an entry is malformed.
    """
    for i, image in enumerate(_list(str(path), content, "images"), start=1):
        where = f"{path}: image {i}"
        name = _name(where, image, "filename")
        number = next((_name(where, image, key) for key in ("cocoid", "imgid") if key in image), "")
        yield KarpathyImage(
            name=name,
            folder=_text(where, image, "filepath") if "filepath" in image else "",
            split=_text(where, image, "split"),
            captions=tuple(_text(where, sentence, "raw") for sentence in _list(where, image, "sentences")),
            number=number,
        )


def _karpathy(path: Path | str, content: dict[str, Any], split: str) -> References:
    captions: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    splits: dict[str, None] = {}
    for image in karpathy_images(path, content):
        splits[image.split] = None
        if image.split == split:
            _add(captions, str(path), image.name, list(image.captions))
            if image.number:
                names[image.number] = image.name
    if split not in splits:
        raise MetricError(f"{path}: no split {split!r}; it has {', '.join(splits)}")
    return References(captions, names)
