"""Where pictures come from: files, folders, globs, manifests, archives and standard input → `SourcePicture`s.

Nothing is opened but lists and archives, and nothing is held but one folder's names at a time. The same sources give
the same pictures in the same order: sources as given, a folder by the code points of the paths, an archive as it is.

Where a result lies in a mirrored output, `SourcePicture.relative`, is below the nearest folder that holds all sources
(an archive counts as a folder), so that no two pictures share a place.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from captioner.archives import (
    DEFAULT_ARCHIVE_LIMITS,
    ArchiveLimits,
    Content,
    HeldContent,
    NoContent,
    check_archive,
    is_archive,
    read_members,
)
from captioner.errors import ConfigError, DataError, ImageReadError
from captioner.folders import FIGURE_SUFFIX, HIDDEN, glob_matches, is_picture_name, joined, walk
from captioner.manifests import MANIFEST_SUFFIXES, expand_braces, manifest_paths, printable, stream_paths

_OUTSIDE = "_outside"


@dataclass(frozen=True, kw_only=True)
class SourcePicture:
    """A picture that is still to be opened. It can be pickled, and read in another process.

    Args:
        name: the path as the user would write it; of a member "photos.zip!/inner/a.jpg".
        path: of the file: the picture, or the archive that holds it.
        member: its name in the archive; None for a file.
        size_bytes: of the picture; None where it is missing or no file.
        mtime_ns: when the file or archive was changed, nanoseconds; None likewise.
        relative: its place in a mirrored output; never leads out of it.
        content: how to read a member, or why there is nothing to read; None for a file. A member of a compressed tar
            is held here as a whole.
    """

    name: str
    path: Path
    member: str | None
    size_bytes: int | None
    mtime_ns: int | None
    relative: PurePosixPath
    content: Content | None = field(default=None, repr=False)

    def read(self) -> Path | bytes:
        """Fetch what `captioner.images.open_picture` takes.

        Returns:
            A path, which it reads itself, or the bytes of a member.

        Raises:
            ImageReadError: when there is nothing to read, or the archive is damaged or has changed.
        """
        if self.content is None:
            return self.path
        label = printable(self.name)
        if isinstance(self.content, NoContent):
            raise ImageReadError(f"{label}: {self.content.message}")
        if isinstance(self.content, HeldContent):
            return self.content.data
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_mtime_ns == self.mtime_ns:
                    return self.content.read(file)
        except OSError as err:
            raise ImageReadError(f"{label}: cannot be read ({err.strerror or err}); check the archive") from err
        except ImageReadError as err:
            raise ImageReadError(f"{label}: {err}") from err.__cause__
        raise ImageReadError(f"{label}: the archive was changed after it was listed; run again")


def ignore(message: str) -> None:
    """Take a message and do nothing with it.

    Args:
        message: any.
    """


def find_pictures(
    sources: Sequence[str | os.PathLike[str]],
    *,
    pattern: str | None = None,
    hidden: bool = False,
    limits: ArchiveLimits = DEFAULT_ARCHIVE_LIMITS,
    stdin: IO[Any] | None = None,
    note: Callable[[str], None] = ignore,
) -> Iterator[SourcePicture]:
    """Find pictures, lazily.

    Args:
        sources: each one of

            - a file, taken whatever its suffix, and if it is missing too, so that its error is recorded
            - a folder, with all folders in it: the files with the suffix of a picture, or those of `pattern`
            - a glob with `*`, `?`, `[abc]` and `**`, for what the shell did not expand: pictures, folders and archives
            - a manifest: .txt, .csv or .jsonl (`captioner.manifests`); its paths are relative to its folder
            - an archive: .zip, .tar, .tar.gz, .tar.bz2, .tar.xz (.tar.zst from Python 3.14 on), such as the shards of
              WebDataset; `shards-{000..012}.tar` names several
            - "-", paths on standard input, one a line or NUL-separated
        pattern: which files of folders and archives to take instead of those with the suffix of a picture: "*.jpg"
            goes by the name, "2024/*.jpg" by the path below the source; upper and lower case are the same, and `*`
            stands for slashes too.
        hidden: take files and folders too whose names begin with a dot.
        limits: of archives.
        stdin: read for "-"; default: standard input.
        note: called with one line about what was left out: hidden files, links in a circle, files reached twice.

    Returns:
        An iterator over the pictures. A file that was there before is left out; so a file is captioned once. The
        iterator raises DataError when a list or archive turns out to be damaged, after what comes before.

    Raises:
        ConfigError: at once, when there is no source, or one cannot be understood: no such folder, a glob that fits
            nothing, a damaged archive, a manifest without a fitting column.
    """
    if isinstance(sources, str | os.PathLike) or not sources:
        raise ConfigError(f"sources must be a list of at least one file, folder or archive, got {sources!r}")
    texts = [text for source in sources for text in _spelled(os.fspath(source))]
    if texts.count("-") > 1:
        raise ConfigError("'-' is given twice, but standard input can be read only once; give it once")
    plan = [_resolve(text) for text in texts]
    finder = _Finder(plan, pattern, hidden, limits, sys.stdin if stdin is None else stdin, note)
    for source in plan:
        finder.check(source)
    return finder.pictures()


# --- What a source is ---


@dataclass(frozen=True)
class _Source:
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


def _spelled(text: str) -> list[str]:
    return [text] if os.path.lexists(text) else expand_braces(text)


def _resolve(text: str) -> _Source:
    if text == "-":
        return _Source("stdin", text, str(Path.cwd()))
    if not text or "\0" in text:
        raise ConfigError(f"{text!r} is not the name of a file or folder; correct it")
    label = printable(text)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise ConfigError(f"{label}: a URL, and nothing is fetched; download it first and give the file")
    path = Path(text)
    if path.is_dir():
        return _Source("folder", str(path), _absolute(text))
    there = os.path.lexists(text)
    if not there and re.search(r"[*?\[]", text):
        first = next(i for i, part in enumerate(path.parts) if re.search(r"[*?\[]", part))
        folder = str(Path(*path.parts[:first]))
        return _Source("glob", folder, _absolute(folder), path.parts[first:])
    if is_archive(path):
        return _Source("archive", str(path), _absolute(text))
    if path.suffix.lower() in MANIFEST_SUFFIXES:
        return _Source("manifest", str(path), _absolute(str(path.parent)))
    if not there and (text.endswith("/") or not path.suffix):
        raise ConfigError(f"{label}: no such file or folder; check the path")
    return _Source("file", str(path), _absolute(str(path.parent)))


def _absolute(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - `Path.absolute` keeps "..", and `resolve` follows links


def member_place(name: str) -> PurePosixPath:
    """Turn a member's name into a path that leads nowhere else: "../a.jpg" → "__/a.jpg", "/a.jpg" → "a.jpg".

    Args:
        name: in the archive.

    Returns:
        A relative path without "..".
    """
    parts = name.replace("\\", "/").split("/")
    return PurePosixPath(*("__" if part == ".." else part for part in parts if part not in ("", ".")))


# --- The walk ---


class _Finder:
    """Walks through sources and remembers which files it met.

    Args:
        plan: the sources.
        pattern: as of `find_pictures`.
        hidden: likewise.
        limits: likewise.
        stdin: likewise.
        note: likewise.
    """

    def __init__(
        self,
        plan: Sequence[_Source],
        pattern: str | None,
        hidden: bool,
        limits: ArchiveLimits,
        stdin: IO[Any],
        note: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._root = os.path.commonpath([source.root for source in plan])
        self._pattern = None if pattern is None else re.compile(fnmatch.translate(pattern), re.IGNORECASE)
        self._pattern_has_folder = pattern is not None and "/" in pattern
        self._hidden = hidden
        self._limits = limits
        self._stdin = stdin
        self._note = note
        self._seen: dict[int, set[int]] = {}  # inodes by device
        self._seen_names: set[str] = set()  # of what is missing, or has several names
        self._left_out: dict[str, tuple[int, str]] = {}  # how many, and the first of them, by the reason

    def check(self, source: _Source) -> None:
        """Raise ConfigError when nothing can come from a source."""
        label = printable(source.text)
        try:
            if source.kind == "archive":
                check_archive(Path(source.text), self._limits)
            elif source.kind == "manifest":
                next(manifest_paths(Path(source.text)), None)
        except DataError as err:
            raise ConfigError(str(err)) from err
        if source.kind in ("folder", "glob"):
            try:
                os.scandir(source.text).close()
            except OSError as err:
                raise ConfigError(f"{label}: the folder cannot be read ({err.strerror}); check the path") from err
        if source.kind == "glob" and next(self._glob_matches(source), None) is None:
            fits = joined(label, printable("/".join(source.parts)))
            raise ConfigError(f"{fits}: fits no picture, folder or archive; check the pattern")
        self._left_out.clear()

    def pictures(self) -> Iterator[SourcePicture]:
        """Yield the pictures of all sources."""
        kinds: dict[str, Callable[[_Source], Iterator[SourcePicture]]] = {
            "file": lambda source: self._file(source.text),
            "folder": lambda source: self._folder(source.text),
            "glob": self._glob,
            "archive": lambda source: self._archive(source.text),
            "manifest": self._manifest,
            "stdin": lambda _: (found for path in stream_paths(self._stdin) for found in self._file(path)),
        }
        try:
            for source in self._plan:
                yield from kinds[source.kind](source)
        finally:
            for reason, (count, first) in self._left_out.items():
                self._note(f"left out, {reason}: {count} (first: {printable(first)})")
            self._left_out.clear()

    def _leave_out(self, reason: str, name: str) -> None:
        count, first = self._left_out.get(reason, (0, name))
        self._left_out[reason] = (count + 1, first)

    # Files

    def _file(self, name: str) -> Iterator[SourcePicture]:
        found = self._stat(name)
        if self._is_new(name, found):
            is_file = found is not None and stat.S_ISREG(found.st_mode)
            yield SourcePicture(
                name=name,
                path=Path(name),
                member=None,
                size_bytes=found.st_size if found is not None and is_file else None,
                mtime_ns=found.st_mtime_ns if found is not None and is_file else None,
                relative=self._place(name),
            )

    @staticmethod
    def _stat(name: str) -> os.stat_result | None:
        try:
            return Path(name).stat()
        except (OSError, ValueError):  # a NUL, or a surrogate that stands for no byte
            return None

    def _is_new(self, name: str, found: os.stat_result | None) -> bool:
        """Remember a file; tell whether it is here for the first time. Two hard links are two files."""
        if found is not None and found.st_nlink == 1:
            seen = self._seen.setdefault(found.st_dev, set())
            new = found.st_ino not in seen
            seen.add(found.st_ino)
        else:
            place = _absolute(name) if found is None else os.path.realpath(name)
            new = place not in self._seen_names
            self._seen_names.add(place)
        if not new:
            self._leave_out("reached before", name)
        return new

    def _place(self, name: str) -> PurePosixPath:
        """Return where a file's results lie in a mirrored output."""
        path = _absolute(name)
        root = self._root.rstrip("/") + "/"
        if path.startswith(root):
            return PurePosixPath(path.removeprefix(root))
        return PurePosixPath(_OUTSIDE, path.lstrip("/"))

    # Folders and globs

    def _folder(self, folder: str) -> Iterator[SourcePicture]:
        for relative, fault in walk(folder, hidden=self._hidden, leave_out=self._leave_out):
            name = joined(folder, relative)
            if fault is not None:
                yield self._bad_folder(name, fault)
            elif not relative.endswith("/") and self._is_wanted(relative):
                yield from self._file(name)

    def _is_wanted(self, relative: str) -> bool:
        base = relative.rpartition("/")[2]
        if base.lower().endswith(FIGURE_SUFFIX):
            self._leave_out("figures that captioner drew", relative)
            return False
        if self._pattern is None:
            return is_picture_name(base)
        return self._pattern.match(relative if self._pattern_has_folder else base) is not None

    def _bad_folder(self, name: str, fault: OSError) -> SourcePicture:
        message = f"the folder cannot be read ({fault.strerror}); change its permissions"
        return SourcePicture(
            name=name,
            path=Path(name),
            member=None,
            size_bytes=None,
            mtime_ns=None,
            relative=self._place(name),
            content=NoContent(message),
        )

    def _glob_matches(self, source: _Source) -> Iterator[tuple[str, OSError | None]]:
        return glob_matches(source.text, source.parts, hidden=self._hidden, leave_out=self._leave_out)

    def _glob(self, source: _Source) -> Iterator[SourcePicture]:
        for relative, fault in self._glob_matches(source):
            name = joined(source.text, relative).rstrip("/") if relative else source.text
            if fault is not None:
                yield self._bad_folder(name, fault)
            elif not relative or relative.endswith("/"):
                yield from self._folder(name)
            elif is_archive(Path(relative)):
                yield from self._archive(name)
            elif name.lower().endswith(FIGURE_SUFFIX):
                self._leave_out("figures that captioner drew", name)
            else:
                yield from self._file(name)

    # Archives and lists

    def _archive(self, name: str) -> Iterator[SourcePicture]:
        path = Path(name)
        found = self._stat(name)
        if not self._is_new(name, found):
            return
        place = self._archive_place(name)
        met: set[str] = set()
        for member in read_members(path, self._limits, lambda inner: self._is_shown(name, inner)):
            full = f"{name}!/{member.name}"
            if member.content is None:
                self._leave_out("links within archives", full)
            elif member.name in met:
                self._leave_out("members of the same name", full)
            else:
                met.add(member.name)
                yield SourcePicture(
                    name=full,
                    path=path,
                    member=member.name,
                    size_bytes=member.size_bytes,
                    mtime_ns=None if found is None else found.st_mtime_ns,
                    relative=place / member_place(member.name),
                    content=member.content,
                )

    def _archive_place(self, name: str) -> PurePosixPath:
        return PurePosixPath() if _absolute(name) == self._root else self._place(name)

    def _is_shown(self, archive: str, inner: str) -> bool:
        # "__MACOSX" holds what a Mac packs beside each file of a zip, under the file's own name.
        if self._hidden or not any(part.startswith(".") or part == "__MACOSX" for part in member_place(inner).parts):
            return self._is_wanted(inner)
        if is_picture_name(inner):
            self._leave_out(HIDDEN, f"{archive}!/{inner}")
        return False

    def _manifest(self, source: _Source) -> Iterator[SourcePicture]:
        folder = str(Path(source.text).parent)
        for line in manifest_paths(Path(source.text)):
            yield from self._file(line if line.startswith("/") else joined(folder, line))
