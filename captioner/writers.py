"""Results → files: a text, an XMP sidecar or the maps beside or mirrored from each picture; tables from records.

A file is written under another name in its folder, brought to the disk and put in place at once, so that it is whole or
not there; to write it again after a crash gives the same files. A text is ours as long as it holds what we wrote, by
its hash; one that is not, or that somebody has corrected, is never replaced.

The file of `a.jpg` is `a.txt`; where another file of its folder could claim that name (`a.png`, `A.JPG`, a file `a`),
it is `a.jpg.txt`. Sidecars are `a.jpg.xmp`, unless asked otherwise (`a.xmp`).
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from captioner import xmp
from captioner.archives import DEFAULT_ARCHIVE_LIMITS, ArchiveLimits, read_members
from captioner.atomic import replacing
from captioner.errors import ConfigError, DataError
from captioner.folders import FIGURE_SUFFIX, is_picture_name
from captioner.images import DEFAULT_LIMITS, ImageLimits, open_picture
from captioner.manifests import printable
from captioner.prepared import FIGURE_SIDE_PX
from captioner.sources import SourcePicture, member_place
from captioner.tables import require_parquet, write_csv, write_parquet
from captioner.templates import Template, alt_text

if TYPE_CHECKING:
    from captioner.caption import Caption

__all__ = [
    "FORMATS",
    "MapsWriter",
    "Template",
    "TextWriter",
    "XmpWriter",
    "alt_text",
    "require_parquet",
    "write_csv",
    "write_parquet",
]

FORMATS = ("jsonl", "csv", "parquet", "txt", "xmp")
Sidecar = Literal["picture", "name"]
MapsKind = Literal["npz", "figure"]
_NOT_A_PLACE = {errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
NOTHING: frozenset[bytes] = frozenset()


def check_beside(picture: SourcePicture) -> None:
    """Raise ConfigError when nothing can lie beside a picture, for it is in an archive."""
    if picture.member is not None:
        label = printable(picture.name)
        raise ConfigError(f"{label}: nothing can lie beside a picture in an archive; name a folder with --into")


class _PictureWriter:
    """Where the files of pictures lie.

    Args:
        folder: of the results, below which they lie as the pictures lie in their sources; None: beside each picture.
        suffix: of the files.
        full_name: keep the picture's own suffix always.
        limits: of archives, whose names are listed.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, suffix: str, *, full_name: bool, limits: ArchiveLimits
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self._suffix = suffix
        self._full_name = full_name
        self._limits = limits
        self._claimed = lru_cache(maxsize=1024)(self._read_claimed)
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as err:
                label = printable(str(folder))
                raise ConfigError(f"{label}: the folder cannot be made ({err.strerror}); give another") from err

    def path_of(self, picture: SourcePicture) -> Path:
        """Say where the file of a picture lies: the same in every run and shard.

        Args:
            picture: from `find_pictures`.

        Returns:
            The path.

        Raises:
            ConfigError: when it is to lie beside a picture in an archive.
        """
        return self._beside(picture, f"{self._base(picture, full_name=self._full_name)}{self._suffix}")

    def _beside(self, picture: SourcePicture, name: str) -> Path:
        if self.folder is not None:
            return self.folder / picture.relative.parent / name
        check_beside(picture)
        return picture.path.parent / name

    def _base(self, picture: SourcePicture, *, full_name: bool) -> str:
        name = picture.relative.name
        if full_name or not is_picture_name(name):
            return name
        stem = PurePosixPath(name).stem
        if picture.member is None:
            claimed = self._claimed(picture.path.parent, None)
            return name if _plain(stem) in claimed else stem
        inner = member_place(picture.member).parent / stem
        return name if _plain(str(inner)) in self._claimed(picture.path, picture.mtime_ns) else stem

    def _read_claimed(self, container: Path, mtime_ns: int | None) -> frozenset[str]:
        if mtime_ns is None:
            # A folder that cannot be read has pictures that cannot be read.
            with contextlib.suppress(OSError), os.scandir(container) as entries:
                return _claimed_names([entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)])
            return frozenset()
        names: list[str] = []
        with contextlib.suppress(DataError):  # The damage was said, or will be, by what reads the pictures.
            for member in read_members(container, self._limits, lambda name: True):
                names.append(str(member_place(member.name)))
        return _claimed_names(names)

    def _put(self, path: Path, data: bytes | Callable[[IO[bytes]], None]) -> Path:
        """Write a file and the folders above it."""
        with _name_faults(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                if callable(data):
                    data(file)
                else:
                    file.write(data)
        return path


def _plain(name: str) -> str:
    """Return a name as a disk compares it that knows no case, or composes accents."""
    return unicodedata.normalize("NFC", name).casefold()


def _claimed_names(names: Sequence[str]) -> frozenset[str]:
    """Return the stems that several files claim: two pictures, or one and a file of that very name."""
    stems = Counter(_plain(str(PurePosixPath(name).with_suffix(""))) for name in names if is_picture_name(name))
    full = {_plain(name) for name in names}
    return frozenset(stem for stem, count in stems.items() if count > 1 or stem in full)


@contextlib.contextmanager
def _name_faults(path: Path) -> Iterator[None]:
    """Tell a place where nothing can be written, which is a fault of one picture, from a disk that takes nothing."""
    try:
        yield
    except ValueError as err:  # a NUL, or a surrogate that stands for no byte
        raise DataError(f"{printable(str(path))}: not a possible file name; rename the picture") from err
    except OSError as err:
        if err.errno in _NOT_A_PLACE:
            remedy = "rename the picture or what is in the way"
        elif err.errno in _FORBIDDEN:
            remedy = "change the permissions there, or write to another folder with --into"
        else:  # It names the part that is moved into place, or nothing.
            raise OSError(err.errno, err.strerror, str(path)) from err
        raise DataError(f"{printable(str(path))}: cannot be written ({err.strerror}); {remedy}") from err


def _existing(path: Path, most: int = xmp.MOST_BYTES + 1) -> bytes | None:
    """Return what a file holds, at most so many bytes of it; None where there is none."""
    with _name_faults(path):
        if not path.is_file():
            if os.path.lexists(path):  # A pipe would be waited for.
                raise DataError(f"{printable(str(path))}: in the way, and no file; move it away")
            return None
        with path.open("rb") as file:
            return file.read(most)


class TextWriter(_PictureWriter):
    """Writes a text for each picture, as trainers of image models read it.

    Args:
        folder: of the results, made when it is not there; None: beside each picture.
        template: of the text.
        replace: overwrite a file that holds another text; otherwise it is kept, and its picture fails.
        limits: of archives.
        keep: real paths of files that are never overwritten: sources.

    Raises:
        ConfigError: when the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        template: Template | None = None,
        *,
        replace: bool = False,
        limits: ArchiveLimits = DEFAULT_ARCHIVE_LIMITS,
        keep: Collection[str] = (),
    ) -> None:
        super().__init__(folder, ".txt", full_name=False, limits=limits)
        self._template = template or Template()
        self._replace = replace
        self._keep = keep

    def texts(self, picture: SourcePicture, result: Caption) -> tuple[bytes, ...]:
        """Return the hashes of what the file of a picture will hold.

        Args:
            picture: from `find_pictures`.
            result: its caption.

        Returns:
            One hash.
        """
        return (xmp.text_hash(b"t", self._data(picture, result)),)

    def write(self, picture: SourcePicture, result: Caption, ours: Collection[bytes] = NOTHING) -> Path:
        """Write the text of a picture.

        Args:
            picture: from `find_pictures`.
            result: its caption.
            ours: hashes of what we have written there before, which is overwritten.

        Returns:
            The file.

        Raises:
            DataError: when a file with another text is in the way, or no file can be there.
            ConfigError: when it is to lie beside a picture in an archive.
            OSError: when the disk takes no more.
        """
        path = self.path_of(picture)
        data = self._data(picture, result)
        existing = _existing(path)
        if existing == data:
            return path
        label = printable(str(path))
        if self._keep and os.path.realpath(path) in self._keep:
            raise DataError(f"{label}: a source, which is kept; write to another folder with --into")
        if existing is not None and not self._replace and xmp.text_hash(b"t", existing) not in ours:
            raise DataError(
                f"{label}: holds another text, which is kept; move it away, write to another folder with --into, or "
                "begin anew with --overwrite, which replaces all such texts"
            )
        return self._put(path, data)

    def _data(self, picture: SourcePicture, result: Caption) -> bytes:
        return f"{self._template.fill(picture, result)}\n".encode("utf-8", "backslashreplace")


class XmpWriter(_PictureWriter):
    """Writes an XMP sidecar for each picture; one that is there keeps all that it holds besides.

    `picture` (`a.jpg.xmp`) is what digiKam and darktable write, what Immich prefers, and belongs to one picture
    alone. `name` (`a.xmp`) is Adobe's way; but Lightroom reads the sidecars of raw files only, and in a library of
    pairs, `a.xmp` is the one of `a.cr2`.

    Args:
        folder: of the results, made when it is not there; None: beside each picture.
        alt_text: write `Iptc4xmpCore:AltTextAccessibility` too.
        template: of the description.
        sidecar: "picture" or "name" (where another picture has the same stem, "picture" all the same).
        replace: overwrite another description and alt text; otherwise they are kept, and their picture fails.
        limits: of archives.

    Raises:
        ConfigError: when the folder cannot be made, or for another `sidecar`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        alt_text: bool = False,
        template: Template | None = None,
        *,
        sidecar: Sidecar = "picture",
        replace: bool = False,
        limits: ArchiveLimits = DEFAULT_ARCHIVE_LIMITS,
    ) -> None:
        if sidecar not in get_args(Sidecar):
            raise ConfigError(f"sidecar must be one of {', '.join(get_args(Sidecar))}, got {sidecar!r}")
        super().__init__(folder, ".xmp", full_name=sidecar == "picture", limits=limits)
        self._alt_text = alt_text
        self._template = template or Template()
        self._replace = replace

    def texts(self, picture: SourcePicture, result: Caption) -> tuple[bytes, ...]:
        """Return the hashes of what the sidecar of a picture will hold of ours.

        Args:
            picture: from `find_pictures`.
            result: its caption.

        Returns:
            One of the description, and one of the alt text.
        """
        return xmp.text_hashes(*self._texts(picture, result))

    def _texts(self, picture: SourcePicture, result: Caption) -> tuple[str, str | None]:
        return self._template.fill(picture, result), alt_text(result.text) if self._alt_text else None

    def write(self, picture: SourcePicture, result: Caption, ours: Collection[bytes] = NOTHING) -> Path:
        """Write the sidecar of a picture.

        Args:
            picture: from `find_pictures`.
            result: its caption.
            ours: hashes of what we have written there before, which is overwritten.

        Returns:
            The file.

        Raises:
            DataError: when a sidecar is there with another description, of a kind that cannot be changed, or under
                the other name; or when no file can be there.
            ConfigError: when it is to lie beside a picture in an archive.
            OSError: when the disk takes no more.
        """
        path = self.path_of(picture)
        texts = self._texts(picture, result)
        existing = _existing(path)
        if existing is None:
            self._check_other(picture, path)
            return self._put(path, xmp.packet(*texts))
        try:
            data = xmp.merged(existing, *texts, replace=self._replace, ours=ours)
        except DataError as err:
            raise DataError(f"{printable(str(path))}: {err}") from err.__cause__
        return path if data == existing else self._put(path, data)

    def _check_other(self, picture: SourcePicture, path: Path) -> None:
        """Raise when the picture has a sidecar under the other name: programs read only one of the two."""
        short = self._base(picture, full_name=False)
        if short == picture.relative.name:  # `a.xmp` may belong to another picture.
            return
        other = self._beside(picture, f"{short if self._full_name else picture.relative.name}.xmp")
        if os.path.lexists(other):
            way = "name" if self._full_name else "picture"
            raise DataError(
                f"{printable(str(path))}: {printable(other.name)} is there already, and programs read only one of the "
                f"two; write with --sidecar {way}, or move it away"
            )


class MapsWriter(_PictureWriter):
    """Writes each word's map for each picture: numbers (`.maps.npz`) or a figure (`.maps.png`).

    An npz holds `words` [W], `probabilities` [W], `maps` [W, rows, columns] (each over the whole upright picture, sums
    to 1), `picture_hw_px` [2] and `caption`; it is read without pickle.

    Args:
        folder: of the results, made when it is not there; None: beside each picture.
        kind: "npz" or "figure".
        limits: of archives.
        picture_limits: of the picture in a figure.

    Raises:
        ConfigError: when the folder cannot be made, or for another kind.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        kind: MapsKind = "npz",
        *,
        limits: ArchiveLimits = DEFAULT_ARCHIVE_LIMITS,
        picture_limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        if kind not in get_args(MapsKind):
            raise ConfigError(f"kind of maps must be one of {', '.join(get_args(MapsKind))}, got {kind!r}")
        suffix = ".maps.npz" if kind == "npz" else FIGURE_SUFFIX
        super().__init__(folder, suffix, full_name=False, limits=limits)
        self._kind, self._picture_limits = kind, picture_limits

    def texts(self, picture: SourcePicture, result: Caption) -> tuple[bytes, ...]:
        """Return nothing: maps are known by what is in them.

        Args:
            picture: from `find_pictures`.
            result: its caption.

        Returns:
            No hash.
        """
        return ()

    def write(self, picture: SourcePicture, result: Caption, ours: Collection[bytes] = NOTHING) -> Path:
        """Write the maps of a picture; those that were written before are replaced.

        Args:
            picture: from `find_pictures`.
            result: its caption.
            ours: likewise; it does not matter here.

        Returns:
            The file.

        Raises:
            DataError: when a file that was not written here is in the way, or no file can be there.
            ConfigError: when it is to lie beside a picture in an archive.
            ImageError: when the picture of a figure cannot be opened any more.
            OSError: when the disk takes no more.
        """
        path = self.path_of(picture)
        mark = b"Captioner" if self._kind == "figure" else b"words.npy"  # near the beginning of what was written here
        existing = _existing(path, 4096)
        if existing is not None and mark not in existing:
            raise DataError(f"{printable(str(path))}: a file that was not written here; move it away")
        if self._kind == "figure":
            drawing = io.BytesIO()
            shown = open_picture(picture.read(), limits=self._picture_limits, side_px=FIGURE_SIDE_PX)
            result.figure(shown.image).savefig(drawing, format="png", metadata={"Software": "Captioner"})
            return self._put(path, drawing.getvalue())
        rows_columns = result.geometry.grid_hw
        arrays: dict[str, Any] = {
            "words": np.array([word.text for word in result.words], dtype=np.str_),
            "probabilities": np.array([word.probability for word in result.words], dtype=np.float32),
            "maps": np.array([word.attention for word in result.words], dtype=np.float32).reshape(-1, *rows_columns),
            "picture_hw_px": np.array(result.geometry.picture_hw_px),
            "caption": np.array(result.text),
        }
        return self._put(path, lambda file: np.savez_compressed(file, **arrays))
