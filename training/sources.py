"""Where training pictures and their captions come from: one function per format, one settings object for all.

    flickr8k   Flickr8k.token.txt and lists of names               Hodosh et al. 2013
    karpathy   one JSON: COCO, Flickr8k or Flickr30k               Karpathy and Fei-Fei 2015
    coco       one captions JSON per split                         Chen et al. 2015
    table      a folder with captions.csv or captions.jsonl        own photos
    shards     tar files, streamed                                 `training.shards`

A fault of a list or table is a `DataError`, at once; a fault of one picture (no file, no caption) is a `BadPicture`,
for the caller to count.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from captioner.errors import ConfigError, DataError, MetricError
from captioner.metrics.readers import (
    coco_references,
    flickr_references,
    karpathy_images,
    listed,
    read_json,
    read_text,
)
from training.tables import read_cell, read_rows

DEV_SHARE = 0.1
FEWEST_DEV = 5
SHUFFLE_BUFFER = 1000
_OPTIONS = {
    "flickr8k": ("images",),
    "karpathy": ("annotations", "images"),
    "coco": ("train_annotations", "train_images", "dev_annotations", "dev_images"),
    "table": ("annotations", "images", "image_column", "caption_column", "split_column", "dev_share"),
    "shards": ("train_shards", "dev_shards", "shuffle_buffer"),
}
FORMATS = tuple(_OPTIONS)
_NEEDED = {"karpathy": ("annotations",), "shards": ("train_shards", "dev_shards")}
_SPLITS = {
    "train": "train",
    "restval": "train",  # the rest of COCO's validation pictures, which everybody trains on
    "dev": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "test": "test",
}
_UNDIVIDED = "undivided"


@dataclass(frozen=True)
class CaptionedPicture:
    """A photo and its reference captions.

    Args:
        name: the key of the picture in every list: its file name, below its folder.
        path: of the file; of the tar file, for a picture within one.
        captions: reference captions, as written, without space around them.
    """

    name: str
    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class BadPicture:
    """A picture that cannot be used.

    Args:
        name: as in `CaptionedPicture`, printable; of the tar file, where a part of that is damaged.
        message: the thing, the fault, the remedy.
    """

    name: str
    message: str


@dataclass(frozen=True)
class SourceContent:
    """What a data source holds.

    Args:
        pictures: usable pictures by split: "train", "dev", and "test" where there is one.
        missing: pictures that are named but have no file, no caption or an empty one; of all splits.
    """

    pictures: Mapping[str, list[CaptionedPicture]]
    missing: list[BadPicture] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Which data, in which format. Paths are relative to the root, or absolute; None takes the default.

    Args:
        root: folder of the data.
        format: "flickr8k", "karpathy", "coco", "table" or "shards".
        annotations: karpathy: the JSON file; table: the file with the captions, one JSON object per line if its name
            ends in .jsonl, else comma-separated values (default: captions.csv or captions.jsonl, whichever is there).
        images: flickr8k (default: Images), karpathy, table (default: the root): folder of the pictures.
        train_annotations: coco; default: annotations/captions_train2017.json.
        train_images: coco; folder of the training pictures, default: train2017.
        dev_annotations: coco; default: annotations/captions_val2017.json.
        dev_images: coco; folder of the dev pictures, default: val2017.
        image_column: table; the column with the file names, default: image.
        caption_column: table; the column with the captions, default: caption; in JSONL also captions, and either may
            be a list.
        split_column: table; the column with "train", "dev" (or "val") or "test"; default: split, if there is one.
        dev_share: table without splits; about this share of the pictures becomes dev, by a hash of the name, so that
            a picture stays where it is when others are added; default: 0.1, but at least 5 pictures
            or, of fewer than 20, a quarter. Dev and train get at least one picture
            each, which may change places when a set is so small that its share would hold none.
        train_shards: shards; tar files such as train-{000000..000099}.tar, or with * and ?.
        dev_shards: shards; likewise.
        shuffle_buffer: shards; pictures, as files in memory, among which the next one is drawn; default: 1000.

    Raises:
        ConfigError: for an unknown format, an option of another format, a missing or an impossible value.
    """

    root: str
    format: str = "table"
    annotations: str | None = None
    images: str | None = None
    train_annotations: str | None = None
    train_images: str | None = None
    dev_annotations: str | None = None
    dev_images: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    split_column: str | None = None
    dev_share: float | None = None
    train_shards: str | None = None
    dev_shards: str | None = None
    shuffle_buffer: int | None = None

    def __post_init__(self) -> None:
        if self.format not in _OPTIONS:
            raise ConfigError(f"data source: format must be one of {', '.join(_OPTIONS)}, got {self.format!r}")
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        for name, value in given.items():
            owners = [format_name for format_name, options in _OPTIONS.items() if name in options]
            if owners and self.format not in owners:
                raise ConfigError(
                    f"data source: {name} is an option of format {' and '.join(owners)}, not of {self.format}; "
                    "leave it out, or change the format"
                )
            if name not in ("dev_share", "shuffle_buffer") and not _is_word(value):
                raise ConfigError(f"data source: {name} must be text and not empty, got {value!r}")
        for name in _NEEDED.get(self.format, ()):
            if name not in given:
                raise ConfigError(f"data source: format {self.format} needs {name}; give it, relative to root")
        self._check_numbers()
        self._check_columns()

    def _check_numbers(self) -> None:
        share, buffer = self.dev_share, self.shuffle_buffer
        if share is not None and not (_is_number(share, int | float) and 0 < share < 1):
            raise ConfigError(f"data source: dev_share must be above 0 and below 1, got {share!r}")
        if buffer is not None and not (_is_number(buffer, int) and buffer >= 1):
            raise ConfigError(f"data source: shuffle_buffer must be a whole number, at least 1, got {buffer!r}")

    def _check_columns(self) -> None:
        if self.dev_share is not None and self.split_column is not None:
            raise ConfigError("data source: dev_share and split_column exclude each other; leave one of them out")
        names = [self.image_column or "image", self.caption_column or "caption", self.split_column or "split"]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"data source: image_column, caption_column and split_column must differ, got {', '.join(names)}"
            )


def _is_word(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def _is_number(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # bool is an int in Python


def read_source(source: DataSource) -> SourceContent:
    """Read the names and captions of a data source; opens no picture.

    Args:
        source: of any format but "shards".

    Returns:
        The pictures by split, and those that cannot be used.

    Raises:
        ConfigError: for shards, which are streamed.
        DataError: when the root, a list or a table is missing or malformed, a picture is in two splits or twice in
            one, or a split has no usable picture.
    """
    if source.format == "shards":
        raise ConfigError("data source: format shards is streamed, not read at once; use training.shards")
    root = Path(source.root)
    if not _exists(root, Path.is_dir):
        raise DataError(f"{root}: no such folder; root must be the folder of the data")
    try:
        found = _READERS[source.format](source, root)
    except MetricError as err:  # It comes from a parser that evaluation shares; here the file is training data.
        raise DataError(str(err)) from err
    _refuse_repeated(source, found)
    missing: list[BadPicture] = []
    usable = {split: list(_usable(pictures, missing)) for split, pictures in found.items()}
    if _UNDIVIDED in usable:
        usable = _divide(root, usable[_UNDIVIDED], source.dev_share)
    for split in ("train", "dev"):
        if not usable.get(split):
            named = len(found.get(split) or found.get(_UNDIVIDED) or ())
            raise DataError(f"{root}: {_why_empty(split, named, missing)}")
    return SourceContent({split: usable[split] for split in ("train", "dev", "test") if usable.get(split)}, missing)


def data_hash(pictures: Mapping[str, Iterable[CaptionedPicture]]) -> str:
    """Fingerprint the names and captions of a data set.

    Args:
        pictures: by split, in order.

    Returns:
        SHA-256, hexadecimal; another split, order, name or caption gives another one.
    """
    digest = hashlib.sha256()
    for split, of_split in pictures.items():
        for picture in of_split:
            digest.update(json.dumps([split, picture.name, *picture.captions]).encode() + b"\n")
    return digest.hexdigest()


def printable(text: str) -> str:
    """Escape what does not print, so that a name from a stranger's file stays on one line of a message or report.

    Args:
        text: a name; may hold line breaks, or surrogates that have no UTF-8.

    Returns:
        The text, unchanged if it prints; cut to 300 characters.
    """
    text = text if len(text) <= 300 else f"{text[:200]}...{text[-80:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


# --- What all formats share ---


def _why_empty(split: str, named: int, missing: list[BadPicture]) -> str:
    if named and missing:
        reasons = listed([bad.message for bad in missing])
        return f"none of the {named} pictures of split {split!r} can be used ({reasons}); check root and images"
    return f"split {split!r} has no picture; training needs both 'train' and 'dev'"


def _refuse_repeated(source: DataSource, found: Mapping[str, list[CaptionedPicture]]) -> None:
    split_of: dict[str, str] = {}
    twice: list[str] = []
    for split, pictures in found.items():
        for picture in pictures:
            if picture.name in split_of:
                twice.append(f"{printable(picture.name)} in {split_of[picture.name]} and {split}")
            split_of[picture.name] = split
    if twice:
        raise DataError(f"{source.root}: pictures that come twice: {listed(twice)}; name every picture once")


def _usable(pictures: Iterable[CaptionedPicture], missing: list[BadPicture]) -> Iterator[CaptionedPicture]:
    for picture in pictures:
        name = printable(picture.name)
        if not picture.captions:
            missing.append(BadPicture(name, f"{name}: has no caption; add one, or leave it out"))
        elif not all(picture.captions):
            missing.append(BadPicture(name, f"{name}: has an empty caption; fill or remove it"))
        elif not _exists(picture.path, Path.is_file):
            path = printable(str(picture.path))
            missing.append(BadPicture(name, f"{path}: no such file; check the name and the folder"))
        else:
            yield picture


def _exists(path: Path, is_kind: Any) -> bool:
    with contextlib.suppress(OSError, ValueError):  # a name too long, a folder that may not be entered
        return bool(is_kind(path))
    return False


def _picture(name: str, folder: Path, captions: Iterable[str]) -> CaptionedPicture:
    return CaptionedPicture(name, folder / name, tuple(caption.strip() for caption in captions))


def _divide(root: Path, pictures: list[CaptionedPicture], dev_share: float | None) -> dict[str, list[CaptionedPicture]]:
    """Choose the dev pictures by a hash of their names; without a wanted share, of few pictures a quarter."""
    if len(pictures) == 1:
        raise DataError(f"{root}: only one usable picture; training needs at least two, one of them for dev")
    place = {picture.name: _hash_share(picture.name) for picture in pictures}
    dev = {name for name, share in place.items() if share < (DEV_SHARE if dev_share is None else dev_share)}
    fewest = max(1, min(FEWEST_DEV, len(pictures) // 4)) if dev_share is None else 1
    if len(dev) < fewest:
        dev = set(sorted(place, key=lambda name: place[name])[:fewest])
    if len(dev) == len(pictures) > 0:
        dev.remove(max(place, key=lambda name: place[name]))
    return {
        "train": [picture for picture in pictures if picture.name not in dev],
        "dev": [picture for picture in pictures if picture.name in dev],
    }


def _hash_share(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone."""
    # JSON can hold half of a surrogate pair, which has no UTF-8 of its own.
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:6]) / 2**48


# --- Formats ---


def _flickr8k(source: DataSource, root: Path) -> dict[str, list[CaptionedPicture]]:
    path = root / "Flickr8k.token.txt"
    captions = flickr_references(path, read_text(path)).captions
    found = {}
    for split in ("train", "dev", "test"):
        path = root / f"Flickr_8k.{split}Images.txt"
        if split == "test" and not path.exists():
            continue
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        found[split] = [_picture(name, root / (source.images or "Images"), captions.get(name, ())) for name in names]
    return found


def _karpathy(source: DataSource, root: Path) -> dict[str, list[CaptionedPicture]]:
    path = root / str(source.annotations)
    found: dict[str, list[CaptionedPicture]] = {}
    for image in karpathy_images(path, read_json(path, read_text(path))):
        split = _split(f"{path}: {printable(image.name)}", image.split)
        picture = _picture(image.name, root / (source.images or "") / image.folder, image.captions)
        found.setdefault(split, []).append(picture)
    return found


def _coco(source: DataSource, root: Path) -> dict[str, list[CaptionedPicture]]:
    parts = {
        "train": (
            source.train_annotations or "annotations/captions_train2017.json",
            source.train_images or "train2017",
        ),
        "dev": (source.dev_annotations or "annotations/captions_val2017.json", source.dev_images or "val2017"),
    }
    found = {}
    for split, (file, images) in parts.items():
        path, folder = root / file, root / images
        content = read_json(path, read_text(path))
        if not isinstance(content, dict) or not content.get("images"):
            raise DataError(f"{path}: no 'images'; expected COCO captions, an object with 'images' and 'annotations'")
        references = coco_references(path, content)
        names = list(references.names_by_id.values())
        if unknown := sorted(references.captions.keys() - set(names)):
            raise DataError(f"{path}: captions of pictures that 'images' does not name: ids {listed(unknown)}")
        found[split] = [_picture(name, folder, references.captions.get(name, ())) for name in names]
    return found


def _split(where: str, value: str) -> str:
    if value not in _SPLITS:
        raise DataError(f"{where}: unknown split {value!r}; expected one of {', '.join(_SPLITS)}")
    return _SPLITS[value]


# --- Tables ---


def _table(source: DataSource, root: Path) -> dict[str, list[CaptionedPicture]]:
    path = _table_path(source, root)
    folder = root / (source.images or "")
    name_of: dict[str, str] = {}
    captions: dict[str, list[str]] = {}
    split_of: dict[str, str] = {}
    split_column = source.split_column
    for line, row in read_rows(path):
        where = f"{path}:{line}"
        if not captions and split_column is None and "split" in row:  # The first row says what columns there are.
            split_column = "split"
            if source.dev_share is not None:
                raise DataError(f"{path}: has a column 'split', and dev_share is set; leave one of them out")
        value = read_cell(where, row, source.image_column or "image", "image_column")
        name = name_of.get(value) or name_of.setdefault(value, _row_name(folder, value))
        split = _UNDIVIDED
        if split_column is not None:
            split = _split(where, read_cell(where, row, split_column, "split_column"))
        if split_of.setdefault(name, split) != split:
            raise DataError(
                f"{where}: {printable(name)} is in split {split_of[name]!r} further up and in {split!r} here"
            )
        captions.setdefault(name, []).extend(_captions(where, row, source.caption_column))
    found: dict[str, list[CaptionedPicture]] = {}
    for name, texts in captions.items():
        found.setdefault(split_of[name], []).append(_picture(name, folder, texts))
    if not found:
        raise DataError(f"{path}: no row below the names of the columns; write one row per picture and caption")
    return found


def _table_path(source: DataSource, root: Path) -> Path:
    if source.annotations is not None:
        return root / source.annotations
    there = [path for path in (root / "captions.csv", root / "captions.jsonl") if path.is_file()]
    if len(there) != 1:
        fault = "both captions.csv and captions.jsonl" if there else "neither captions.csv nor captions.jsonl"
        raise DataError(f"{root}: {fault} there; name the file with annotations, or choose another format")
    return there[0]


def _captions(where: str, row: Mapping[str, Any], column: str | None) -> list[str]:
    if column is None:
        column = "captions" if "captions" in row and "caption" not in row else "caption"
    value = row.get(column)
    if not isinstance(value, list):
        return [read_cell(where, row, column, "caption_column")]
    if not value:
        raise DataError(f"{where}: {column!r} is an empty list; give at least one caption")
    return [read_cell(where, {column: text}, column, "caption_column") for text in value]


def _row_name(folder: Path, value: str) -> str:
    """Give a file one name, however it is written, so that it cannot be in two splits."""
    name = Path(os.path.normpath(value))
    whole = Path(os.path.normpath(folder.absolute()))
    return (name.relative_to(whole) if name.is_relative_to(whole) else name).as_posix()


_READERS = {"flickr8k": _flickr8k, "karpathy": _karpathy, "coco": _coco, "table": _table}
