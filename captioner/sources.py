"""Where pictures come from: files, folders, globs, manifests, archives and standard input → `SourcePicture`s.

A source that turns out to be damaged, a bad line of a list and a folder that cannot be read are pictures too, ones that
fail: what comes after them is found all the same. Nothing is opened but lists and archives; of what was met a number is
held, and of folders the names of one at a time. The same sources give the same pictures in the same order: sources as
given, a folder by the code points of the paths, an archive as it is.

Where a result lies in a mirrored output, `SourcePicture.relative`, is below the nearest folder that holds all sources
(an archive counts as a folder), so that no two pictures share a place.
"""

from __future__ import annotations

import fnmatch
import io
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
from captioner.folders import (
    FIGURE_SUFFIX,
    HIDDEN,
    NO_PICTURES,
    glob_matches,
    is_ours,
    is_picture_name,
    joined,
    names_suffix,
    walk,
)
from captioner.manifests import BadLine, manifest_paths, printable, stream_paths
from captioner.places import Source, absolute, member_place, plain_name, resolve, spelled

__all__ = ["SourcePicture", "find_pictures", "ignore", "member_place", "spelled"]

_OUTSIDE = "_outside"
_AGAIN = "reached before"


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
        pattern: which pictures of folders and archives to take: "*.jpg" goes by the name, "2024/*.jpg" by the path
            below the source; upper and lower case are the same, and `*` stands for slashes too. One that names a suffix
            itself, "*.dat", takes files of that suffix too.
        hidden: take files and folders too whose names begin with a dot.
        limits: of archives.
        stdin: read for "-"; default: standard input.
        note: called with one line about what was left out (hidden files, links in a circle, files reached twice, files
            that are no pictures by their names), and about a source that gives no picture or is damaged.

    Returns:
        An iterator over the pictures. A file that was there before is left out; so a file is captioned once. A list
        or archive that turns out to be damaged is, after what comes before, a picture of its own name that cannot be
        read.

    Raises:
        ConfigError: at once, when there is no source, or one cannot be understood: no such folder, a glob that fits
            nothing, a list in UTF-16; or when every source is a damaged archive, or a list without a fitting column.
    """
    if isinstance(sources, str | os.PathLike) or not sources:
        raise ConfigError(f"sources must be a list of at least one file, folder or archive, got {sources!r}")
    texts = [text for source in sources for text in spelled(os.fspath(source))]
    if texts.count("-") > 1:
        raise ConfigError("'-' is given twice, but standard input can be read only once; give it once")
    plan = [resolve(text) for text in texts]
    stdin = sys.stdin if stdin is None else stdin
    if "-" in texts and (stdin is None or stdin.closed):
        raise ConfigError("-: standard input is closed; give it a list of paths, or name the sources")
    finder = _Finder(plan, pattern, hidden, limits, stdin or io.StringIO(), note)
    faults = [fault for source in plan if (fault := finder.check(source)) is not None]
    if len(faults) == len(plan):
        raise ConfigError(str(faults[0])) from faults[0]
    for fault in faults:
        note(str(fault))
    return finder.pictures()


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
        plan: Sequence[Source],
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
        self._any_suffix = pattern is not None and names_suffix(pattern)
        self._hidden = hidden
        self._limits = limits
        self._stdin = stdin
        self._note = note
        self._seen: dict[int, set[int]] = {}  # inodes by device
        self._seen_names: set[str] = set()  # of what is missing, or has several names
        self._left_out: dict[str, tuple[int, str]] = {}  # how many, and the first of them, by the reason

    def check(self, source: Source) -> DataError | None:
        """Raise ConfigError when a source cannot be meant, and return its fault when it is damaged at its beginning."""
        label = printable(source.text)
        try:
            if source.kind == "archive":
                check_archive(Path(source.text), self._limits)
            elif source.kind == "manifest":
                first = next(manifest_paths(Path(source.text)), None)
                if isinstance(first, BadLine):
                    return DataError(f"{label}:{first.number}: {first.message}")
        except DataError as err:
            return err
        if source.kind in ("folder", "glob"):
            try:
                os.scandir(source.text).close()
            except OSError as err:
                raise ConfigError(f"{label}: the folder cannot be read ({err.strerror}); check the path") from err
        if source.kind == "glob" and next(self._glob_matches(source), None) is None:
            fits = joined(label, printable("/".join(source.parts)))
            raise ConfigError(f"{fits}: fits no picture, folder or archive; check the pattern")
        self._left_out.clear()
        return None

    def pictures(self) -> Iterator[SourcePicture]:
        """Yield the pictures of all sources."""
        kinds: dict[str, Callable[[Source], Iterator[SourcePicture]]] = {
            "file": lambda source: self._file(source.text),
            "folder": lambda source: self._folder(source.text),
            "glob": self._glob,
            "archive": lambda source: self._archive(source.text),
            "manifest": self._manifest,
            "stdin": self._standard_input,
        }
        try:
            for source in self._plan:
                count, again = 0, self._left_out.get(_AGAIN)
                for picture in kinds[source.kind](source):
                    count += 1
                    yield picture
                if not count and self._left_out.get(_AGAIN) == again:
                    name = joined(source.text, "/".join(source.parts)) if source.parts else source.text
                    self._note(f"{printable(name)}: gives no picture")
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
            place = absolute(name) if found is None else os.path.realpath(name)
            new = place not in self._seen_names
            self._seen_names.add(place)
        if not new:
            self._leave_out(_AGAIN, name)
        return new

    def _place(self, name: str) -> PurePosixPath:
        """Return where a file's results lie in a mirrored output."""
        path = absolute(name)
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
            elif not relative.endswith("/") and self._is_wanted(relative, name):
                yield from self._file(name)

    def _is_wanted(self, relative: str, name: str) -> bool:
        """Tell whether a file of a folder or archive is taken, by its path below that; `name` is for the note."""
        base = relative.rpartition("/")[2]
        if base.lower().endswith(FIGURE_SUFFIX):
            self._leave_out("figures that captioner drew", name)
            return False
        if is_ours(base):
            return False
        if self._pattern is not None and not self._pattern.match(relative if self._pattern_has_folder else base):
            return False
        if is_picture_name(base) or self._any_suffix:
            return True
        if is_archive(Path(base)):
            self._leave_out("archives in folders, which are opened only when they are named", name)
        else:
            self._leave_out(NO_PICTURES, name)
        return False

    def _bad_folder(self, name: str, fault: OSError) -> SourcePicture:
        return self._bad(name, f"the folder cannot be read ({fault.strerror}); change its permissions")

    def _bad(self, name: str, message: str) -> SourcePicture:
        """Return what stands for pictures that cannot be found."""
        return SourcePicture(
            name=name,
            path=Path(name),
            member=None,
            size_bytes=None,
            mtime_ns=None,
            relative=self._place(name),
            content=NoContent(message),
        )

    def _glob_matches(self, source: Source) -> Iterator[tuple[str, OSError | None]]:
        return glob_matches(source.text, source.parts, hidden=self._hidden, leave_out=self._leave_out)

    def _glob(self, source: Source) -> Iterator[SourcePicture]:
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

    # Standard input

    def _standard_input(self, source: Source) -> Iterator[SourcePicture]:
        try:
            for path in stream_paths(self._stdin):
                yield from self._file(plain_name(path))
        except DataError as err:
            yield self._bad_source(source.text, err)

    def _bad_source(self, name: str, err: DataError) -> SourcePicture:
        return self._bad(name, str(err).removeprefix(f"{printable(name)}: "))

    # Archives and lists

    def _archive(self, name: str) -> Iterator[SourcePicture]:
        path = Path(name)
        found = self._stat(name)
        if not self._is_new(name, found):
            return
        try:
            yield from self._members(name, path, None if found is None else found.st_mtime_ns)
        except DataError as err:
            yield self._bad_source(name, err)

    def _members(self, name: str, path: Path, mtime_ns: int | None) -> Iterator[SourcePicture]:
        folder = self._archive_place(name)
        met: set[PurePosixPath] = set()  # "a.jpg" and "/a.jpg" are two names of one place
        for member in read_members(path, self._limits, lambda inner: self._is_shown(name, inner)):
            full = f"{name}!/{member.name}"
            place = member_place(member.name)
            if member.content is None:
                self._leave_out("links within archives", full)
            elif place in met:
                self._leave_out("members of the same name as one before", full)
            else:
                met.add(place)
                yield SourcePicture(
                    name=full,
                    path=path,
                    member=member.name,
                    size_bytes=member.size_bytes,
                    mtime_ns=mtime_ns,
                    relative=folder / place,
                    content=member.content,
                )

    def _archive_place(self, name: str) -> PurePosixPath:
        return PurePosixPath() if absolute(name) == self._root else self._place(name)

    def _is_shown(self, archive: str, inner: str) -> bool:
        # "__MACOSX" holds what a Mac packs beside each file of a zip, under the file's own name.
        if self._hidden or not any(part.startswith(".") or part == "__MACOSX" for part in member_place(inner).parts):
            return self._is_wanted(inner, f"{archive}!/{inner}")
        if is_picture_name(inner):
            self._leave_out(HIDDEN, f"{archive}!/{inner}")
        return False

    def _manifest(self, source: Source) -> Iterator[SourcePicture]:
        folder = str(Path(source.text).parent)
        try:
            for line in manifest_paths(Path(source.text)):
                if isinstance(line, BadLine):
                    yield self._bad(f"{source.text}:{line.number}", line.message)
                else:
                    yield from self._file(plain_name(line if line.startswith("/") else joined(folder, line)))
        except DataError as err:
            yield self._bad_source(source.text, err)
