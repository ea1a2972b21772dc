"""Folders and globs, walked lazily: one folder's names are held at a time, and all paths come by their code points."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from captioner.archives import is_archive

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"}
    | {".tif", ".tiff", ".avif", ".heic", ".heif"}
)
FIGURE_SUFFIX = ".maps.png"
"""End of the names of the figures that `captioner.writers` draws: they are no pictures to caption."""

OWN_SUFFIXES = (".txt", ".xmp", ".npz", ".jsonl", ".csv", ".parquet", ".progress", ".progress.lock")
"""Ends of the names of what a batch run writes, which no pattern takes for pictures."""

HIDDEN = "hidden files and folders"
NO_PICTURES = "no pictures by their names"
LeaveOut = Callable[[str, str], None]
"""Called with a reason and the name of what is left out."""


def is_picture_name(name: str) -> bool:
    """Tell a picture by its suffix.

    Args:
        name: of a file.

    Returns:
        Whether it is one.
    """
    stem, dot, suffix = name.rpartition(".")
    return bool(stem) and f"{dot}{suffix.lower()}" in PICTURE_SUFFIXES and not name.lower().endswith(FIGURE_SUFFIX)


def is_ours(name: str) -> bool:
    """Tell by its name what a batch run may have written, so that none takes it for a picture.

    Args:
        name: of a file.

    Returns:
        Whether it may be one.
    """
    return name.lower().endswith((FIGURE_SUFFIX, *OWN_SUFFIXES))


def names_suffix(pattern: str) -> bool:
    """Tell whether a pattern names a suffix itself, so that files which are no pictures by their names may be meant.

    Args:
        pattern: such as "*.dat".

    Returns:
        Whether it ends in one, without a wildcard.
    """
    return re.search(r"\.[^*?\[\]/]+$", pattern) is not None


def joined(folder: str, relative: str) -> str:
    """Join two paths as a user would write them.

    Args:
        folder: "." adds nothing.
        relative: below it.

    Returns:
        The path.
    """
    return relative if folder == "." else f"{folder.rstrip('/')}/{relative}"


def walk(
    folder: str,
    *,
    hidden: bool,
    leave_out: LeaveOut,
    descend: Callable[[tuple[str, ...]], bool] = lambda parts: True,
) -> Iterator[tuple[str, OSError | None]]:
    """Walk through a folder. Links are followed, to each folder once.

    Args:
        folder: where to begin.
        hidden: take what begins with a dot too.
        leave_out: called for what is not taken.
        descend: tells by the parts of its path whether to look into a folder.

    Yields:
        Each path below the folder, those of folders with a slash at the end and before what they hold, and None. A
        folder that cannot be read comes once more with the fault; "" is the first.
    """
    visited: set[tuple[int, int]] = set()
    stack: list[tuple[str, Iterator[str]]] = []

    def enter(below: str) -> OSError | None:
        path = joined(folder, below) if below else folder
        try:
            status = Path(path).stat()
            if (status.st_dev, status.st_ino) in visited:
                leave_out("folders that links lead to again", path)
            else:
                visited.add((status.st_dev, status.st_ino))
                stack.append((below, iter(_names(path, hidden, leave_out))))
        except OSError as err:
            return err
        return None

    if (fault := enter("")) is not None:
        yield "", fault
    while stack:
        below, names = stack[-1]
        name = next(names, None)
        if name is None:
            stack.pop()
            continue
        relative = below + name
        yield relative, None
        if name.endswith("/") and descend(PurePosixPath(relative).parts) and (fault := enter(relative)) is not None:
            yield relative, fault


def _names(folder: str, hidden: bool, leave_out: LeaveOut) -> list[str]:
    """Return the names in a folder, those of folders with a slash, so that sorting orders whole paths."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link that leads to itself
                is_folder = False
            if hidden or not entry.name.startswith("."):
                names.append(f"{entry.name}/" if is_folder else entry.name)
            elif is_folder or is_picture_name(entry.name):
                leave_out(HIDDEN, joined(folder, entry.name))
    names.sort()
    return names


def glob_matches(
    folder: str, pattern: tuple[str, ...], *, hidden: bool, leave_out: LeaveOut
) -> Iterator[tuple[str, OSError | None]]:
    """Find what a glob stands for: folders, archives, and files with the suffix of a picture or one that it names.

    Args:
        folder: before the first wildcard.
        pattern: the parts after it; `*`, `?` and `[abc]` within one part, `**` for any number of folders.
        hidden: take what begins with a dot, even where no part of the pattern does.
        leave_out: called for what is not taken.

    Yields:
        As `walk`. What lies in a folder that fits does not come by itself.
    """
    hidden = hidden or any(part.startswith(".") for part in pattern)
    any_suffix = names_suffix(pattern[-1])
    inside: str | None = None  # the folder that fitted last

    def descend(parts: tuple[str, ...]) -> bool:
        return inside is None and _fits(parts, pattern, begins=True)

    if _fits((), pattern):
        yield "", None
        return
    for relative, fault in walk(folder, hidden=hidden, leave_out=leave_out, descend=descend):
        if inside is not None and not relative.startswith(inside):
            inside = None
        if fault is not None:
            yield relative, fault
        elif _fits(PurePosixPath(relative).parts, pattern):
            if relative.endswith("/"):
                inside = relative
            elif not (
                relative.lower().endswith(FIGURE_SUFFIX)  # said by whoever asks
                or (any_suffix and not is_ours(relative))
                or is_picture_name(relative)
                or is_archive(Path(relative))
            ):
                leave_out(NO_PICTURES, joined(folder, relative))
                continue
            yield relative, None


def _fits(path: tuple[str, ...], pattern: tuple[str, ...], *, begins: bool = False) -> bool:
    """Tell whether a glob stands for a path, or, with `begins`, may stand for something below it."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return _fits(path, pattern[1:], begins=begins) or (bool(path) and _fits(path[1:], pattern, begins=begins))
    if not path:
        return begins
    return fnmatch.fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:], begins=begins)
