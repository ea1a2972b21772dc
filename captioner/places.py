"""What a source is, by its name; and what a picture is called, and where it lies, by its."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from captioner.archives import is_archive
from captioner.errors import ConfigError
from captioner.manifests import MANIFEST_SUFFIXES, expand_braces, printable


@dataclass(frozen=True)
class Source:
    """A source that was understood.

    Args:
        kind: "file", "folder", "glob", "archive", "manifest" or "stdin".
        text: as given; of a glob, the folder before its first wildcard.
        root: absolute; the folder that holds its pictures.
        parts: of a glob, what follows the folder.
    """

    kind: str
    text: str
    root: str
    parts: tuple[str, ...] = ()


def spelled(text: str) -> list[str]:
    """Write out the braces of a source.

    Args:
        text: as given.

    Returns:
        The sources that it stands for; itself when there is a file of that name.
    """
    return [text] if os.path.lexists(text) else expand_braces(text)


def resolve(text: str) -> Source:
    """Tell by its name, and by what is there, what a source is.

    Args:
        text: as given, without braces.

    Returns:
        What was understood.

    Raises:
        ConfigError: when nothing can be meant by it.
    """
    if text == "-":
        return Source("stdin", text, str(Path.cwd()))
    if not text or "\0" in text:
        raise ConfigError(f"{text!r} is not the name of a file or folder; correct it")
    label = printable(text)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise ConfigError(f"{label}: a URL, and nothing is fetched; download it first and give the file")
    path = Path(text)
    if path.is_dir():
        return Source("folder", str(path), absolute(text))
    there = os.path.lexists(text)
    if not there and re.search(r"[*?\[]", text):
        first = next(i for i, part in enumerate(path.parts) if re.search(r"[*?\[]", part))
        folder = str(Path(*path.parts[:first]))
        return Source("glob", folder, absolute(folder), path.parts[first:])
    if is_archive(path):
        return Source("archive", str(path), absolute(text))
    if path.suffix.lower() in MANIFEST_SUFFIXES:
        return Source("manifest", str(path), absolute(str(path.parent)))
    if not there and (text.endswith("/") or not path.suffix):
        raise ConfigError(f"{label}: no such file or folder; check the path")
    return Source("file", str(path), absolute(str(path.parent)))


def absolute(path: str) -> str:
    """Return an absolute path without "..", following no link."""
    return os.path.abspath(path)  # noqa: PTH100 - `Path.absolute` keeps "..", and `resolve` follows links


def plain_name(name: str) -> str:
    """Return the one spelling of a file's name, by which a picture is known again.

    Args:
        name: as a list has it: "./p//a.jpg", "p/../a.jpg".

    Returns:
        "p/a.jpg", "a.jpg"; with ".." left where it leads out of a link to somewhere else.
    """
    plain = str(Path(name))
    if ".." not in Path(plain).parts:
        return plain
    shorter = os.path.normpath(plain)
    with contextlib.suppress(OSError, ValueError):  # a NUL, or a surrogate that stands for no byte
        return shorter if os.path.realpath(shorter) == os.path.realpath(plain) else plain
    return plain


def member_place(name: str) -> PurePosixPath:
    """Turn a member's name into a path that leads nowhere else: "../a.jpg" → "__/a.jpg", "/a.jpg" → "a.jpg".

    Args:
        name: in the archive.

    Returns:
        A relative path without "..".
    """
    parts = name.replace("\\", "/").split("/")
    return PurePosixPath(*("__" if part == ".." else part for part in parts if part not in ("", ".")))
