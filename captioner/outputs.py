"""What a batch run writes, and where: `Outputs`, planned before anything is written.

    -o captions.jsonl                                  captions.jsonl
    -o captions.csv                                    captions.csv     (records: captions.records.jsonl)
    -o captions.jsonl --format jsonl,csv,parquet       captions.jsonl, captions.csv, captions.parquet
    -o captions.jsonl --format jsonl,txt               captions.jsonl; a.txt ... beside each picture
    -o captions.jsonl --format jsonl,txt --into PLACE  captions.jsonl; PLACE/a.txt ...
    -o FOLDER --format txt,xmp                         FOLDER/a.txt, FOLDER/a.jpg.xmp ... (and its records, likewise)
    -o FOLDER --format jsonl,txt                       FOLDER/captions.jsonl, FOLDER/a.txt ...

Tables are files of all pictures, made from the records; what is of one picture lies beside it, or in a folder that is
laid out as the source is. Beside every output lies its journal, captions.progress (`captioner.journal`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from captioner.archives import DEFAULT_ARCHIVE_LIMITS, ArchiveLimits
from captioner.caption import Caption, error_record
from captioner.errors import CaptionerError, ConfigError, DataError, ImageError
from captioner.images import DEFAULT_LIMITS, ImageLimits
from captioner.journal import Journal, disk_fault
from captioner.sources import SourcePicture
from captioner.tables import ALT_TEXT, require_parquet, table_hash, write_csv, write_parquet
from captioner.templates import Template, alt_text
from captioner.writers import FORMATS, MapsWriter, Sidecar, TextWriter, XmpWriter, check_beside

if TYPE_CHECKING:
    from captioner.engine import Result

TABLES = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
MAPS = ("npz", "figure")
STEM = "captions"
"""Name of the tables in an output that is a folder."""
ADDED_SETTINGS: Mapping[str, Any] = {"sidecar": "picture"}
"""Of `Outputs.settings`, those that an earlier version had not, as they were then."""


class PictureWriter(Protocol):
    """Writes a file of one picture."""

    def texts(self, picture: SourcePicture, result: Caption, /) -> tuple[bytes, ...]:
        """Return hashes of the texts that it will hold."""
        ...

    def write(self, picture: SourcePicture, result: Caption, ours: Collection[bytes], /) -> Path:
        """Write it at once or not at all; what it holds is replaced when its hash is among ours."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a run writes.

    Args:
        given: the output as it was named, for messages.
        stem: path of the tables, without a suffix.
        formats: of `captioner.writers.FORMATS`.
        into: folder of the files of single pictures; None: beside each picture.
        template: text of a `Template`; None is the caption itself.
        alt_text: also write alternative texts, into records, tables and XMP files.
        maps: save the maps of the words, "npz" or "figure"; None saves none.
        sidecar: how XMP files are named, see `captioner.writers.XmpWriter`.
    """

    given: str
    stem: Path
    formats: tuple[str, ...]
    into: Path | None = None
    template: str | None = None
    alt_text: bool = False
    maps: Literal["npz", "figure"] | None = None
    sidecar: Sidecar = "picture"

    @classmethod
    def plan(
        cls,
        output: str | os.PathLike[str],
        *,
        formats: Iterable[str] = (),
        into: str | os.PathLike[str] | None = None,
        template: str | None = None,
        alt_text: bool = False,
        maps: str | None = None,
        sidecar: str = "picture",
    ) -> Outputs:
        """Work out what is written where; nothing is written yet.

        Args:
            output: a file .jsonl, .csv or .parquet, or a folder.
            formats: any of `FORMATS`; default: what the output's suffix says, in a folder JSONL.
            into: folder for the files of single pictures; default: the output when it is a folder, else beside each
                picture.
            template: text of a `Template`, for txt and xmp.
            alt_text: also write alternative texts, into records, tables and XMP files.
            maps: "npz" or "figure".
            sidecar: "picture" (a.jpg.xmp) or "name" (a.xmp).

        Returns:
            The plan.

        Raises:
            ConfigError: when it does not fit together.
        """
        name = os.fsdecode(output)
        if name == "-":
            raise ConfigError("-: an output is a file, with a journal beside it to go on from; name one")
        path = Path(name)
        table = None if name.endswith(os.sep) or path.is_dir() else TABLES.get(path.suffix.lower())
        folder = table is None and (not path.suffix or path.is_dir() or name.endswith(os.sep))
        chosen = tuple(dict.fromkeys(formats)) or (table or "jsonl",)
        _check(name, chosen, table=table, folder=folder, maps=maps)
        single = bool({"txt", "xmp"}.intersection(chosen) or maps)
        place = Path(into) if into is not None else path if folder else None
        if into is not None and not single:
            raise ConfigError("--into is for files of single pictures; choose a format txt or xmp, or --maps")
        if template is not None and not {"txt", "xmp"}.intersection(chosen):
            raise ConfigError("--template is for the formats txt and xmp; choose one of them")
        if template is not None:
            Template(template)
        if alt_text and not {"jsonl", "csv", "parquet", "xmp"}.intersection(chosen):
            raise ConfigError("--alt-text is for the formats jsonl, csv, parquet and xmp; choose one of them")
        if sidecar != "picture" and "xmp" not in chosen:
            raise ConfigError("--sidecar is for the format xmp; choose it")
        if sidecar not in get_args(Sidecar):
            raise ConfigError(f"sidecar must be one of {', '.join(get_args(Sidecar))}, got {sidecar!r}")
        return cls(
            given=name,
            stem=path / STEM if folder else path.with_suffix(""),
            formats=chosen,
            into=place if single else None,
            template=template,
            alt_text=alt_text,
            maps=maps,  # type: ignore[arg-type]  # checked
            sidecar=sidecar,  # type: ignore[arg-type]  # checked
        )

    def table(self, suffix: str) -> Path:
        """Return the path of a table.

        Args:
            suffix: such as ".csv".

        Returns:
            The path.
        """
        return self.stem.with_name(self.stem.name + suffix)

    @property
    def paths(self) -> list[Path]:
        """What is made: the tables, then the folder of single files."""
        tables = [self.table(suffix) for suffix, name in TABLES.items() if name in self.formats]
        return tables + ([] if self.into is None else [self.into])

    def journal(self) -> Journal:
        """Return the journal of this output; nothing is written yet."""
        progress, apart = self.table(".progress"), self.table(".records.jsonl")
        # Records that an earlier run wrote as the output stay what they are when only a CSV of them is wanted.
        public = "jsonl" in self.formats or (progress.exists() and self.table(".jsonl").exists())
        return Journal(progress, self.table(".jsonl"), earlier=apart) if public else Journal(progress, apart)

    def check_unclaimed(self, journal: Journal) -> None:
        """Refuse to write over what no run of ours has begun.

        Args:
            journal: of this output.

        Raises:
            ConfigError: naming the file.
        """
        if journal.exists:
            return
        for path in dict.fromkeys([journal.records, *(path for path in self.paths if path != self.into)]):
            if path.exists():
                raise ConfigError(
                    f"{path}: is there already, and has no journal to go on from; name another output, or replace it "
                    "with --overwrite"
                )

    def settings(self) -> dict[str, Any]:
        """Return what of this plan a run cannot change when it goes on: the files of pictures that are done already."""
        into = None if self.into is None else os.path.relpath(self.into.absolute(), self.stem.absolute().parent)
        return {
            "txt": "txt" in self.formats,
            "xmp": "xmp" in self.formats,
            "maps": self.maps,
            "into": into,
            "template": self.template,
            "alt_text": self.alt_text,
            "sidecar": self.sidecar,
        }

    def check_place(self, picture: SourcePicture) -> None:
        """Refuse files beside a picture in an archive, before anything is begun.

        Args:
            picture: the first of the run.

        Raises:
            ConfigError: naming the picture.
        """
        if self.into is None and ({"txt", "xmp"} & set(self.formats) or self.maps is not None):
            check_beside(picture)

    def check_tables(self, journal: Journal) -> None:
        """Refuse to write over a table that does not hold what we wrote.

        Args:
            journal: of this output, begun.

        Raises:
            DataError: naming the table.
            CaptionerError: when it cannot be read.
        """
        if journal.header.get("overwriting"):
            return
        for name in ("csv", "parquet"):
            path = self.table(f".{name}")
            if name not in self.formats or not os.path.lexists(path):
                continue
            try:
                is_ours = path.is_file() and table_hash(path) in journal.tables(path.suffix)
            except OSError as err:
                raise DataError(f"{path}: is in the way, and cannot be read ({err.strerror}); move it away") from err
            if not is_ours:
                raise DataError(
                    f"{path}: was changed, or made by something else, and is kept; move it away, and it is made anew "
                    "from the records"
                )

    def writers(
        self,
        *,
        replace: bool,
        limits: ArchiveLimits = DEFAULT_ARCHIVE_LIMITS,
        keep: Collection[str] = (),
        picture_limits: ImageLimits = DEFAULT_LIMITS,
    ) -> list[PictureWriter]:
        """Return what writes the files of single pictures.

        Args:
            replace: other texts of the same pictures, whoever wrote them.
            limits: of archives.
            keep: real paths of files that are never replaced.
            picture_limits: of the pictures in figures.

        Returns:
            The writers.

        Raises:
            ConfigError: when the folder cannot be made.
        """
        template = None if self.template is None else Template(self.template)
        made: list[PictureWriter] = []
        if "txt" in self.formats:
            made.append(TextWriter(self.into, template, replace=replace, limits=limits, keep=keep))
        if "xmp" in self.formats:
            settings: dict[str, Any] = {"sidecar": self.sidecar, "replace": replace, "limits": limits}
            made.append(XmpWriter(self.into, self.alt_text, template, **settings))
        if self.maps is not None:
            made.append(MapsWriter(self.into, kind=self.maps, limits=limits, picture_limits=picture_limits))
        return made

    def record(self, picture: SourcePicture, result: Result, fault: CaptionerError | None) -> dict[str, Any]:
        """Return the record of a picture.

        Args:
            picture: which.
            result: what came of it.
            fault: its error; a caption stays in the record, whatever became of the picture's files.

        Returns:
            Plain values, ready for JSON.
        """
        error: dict[str, Any] = {} if fault is None else error_record(picture.name, fault)
        record = error
        if isinstance(result, Caption):
            record = result.to_record(picture.name) | {key: error[key] for key in error if key == "error"}
        if not self.alt_text:
            return record
        text = alt_text(result.text) if isinstance(result, Caption) else None
        return {"image": record["image"], "caption": record["caption"], ALT_TEXT: text} | record

    def write_tables(self, journal: Journal) -> None:
        """Make CSV and Parquet of the records, each at once or not at all.

        Args:
            journal: of this output.

        Raises:
            DataError: when one was changed since the run has begun.
            CaptionerError: when the disk is full or fails; the records are intact.
        """
        self.check_tables(journal)
        alt_text = bool(journal.header.get("alt_text"))
        for name, write in (("csv", write_csv), ("parquet", write_parquet)):
            if name in self.formats:
                path = self.table(f".{name}")
                claim = functools.partial(journal.claim, path.suffix)
                try:
                    write(journal.iterate_records(), path, alt_text=alt_text, claim=claim)
                except OSError as err:
                    raise disk_fault(path, err) from err


def write_files(
    picture: SourcePicture, result: Caption, writers: Iterable[PictureWriter], held: set[bytes]
) -> tuple[set[bytes], DataError | ImageError | None]:
    """Write the files of a picture, as many as can be.

    Args:
        picture: that was captioned.
        result: its caption.
        writers: of the files.
        held: hashes of what we wrote into them before.

    Returns:
        Hashes of what they hold of ours now; and the error of files that are not ours or cannot be written.

    Raises:
        CaptionerError: when the disk is full or fails.
    """
    texts, faults = held, list[DataError | ImageError]()
    for writer in writers:
        try:
            writer.write(picture, result, held)
        except (DataError, ImageError) as err:
            faults.append(err)
            continue
        except OSError as err:
            raise disk_fault(Path(err.filename or picture.name), err) from err
        new = writer.texts(picture, result)
        kinds = {text[:1] for text in new}
        texts = {text for text in texts if text[:1] not in kinds}.union(new)
    if len(faults) > 1:
        return texts, DataError("; ".join(map(str, faults)))
    return texts, faults[0] if faults else None


def _check(name: str, formats: tuple[str, ...], *, table: str | None, folder: bool, maps: str | None) -> None:
    for unknown in set(formats).difference(FORMATS):
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {unknown!r}")
    if maps is not None and maps not in MAPS:
        raise ConfigError(f"maps must be one of {', '.join(MAPS)}, got {maps!r}")
    if table is None and not folder:
        raise ConfigError(f"{name}: an output ends in {', '.join(TABLES)}, or is a folder (end its name with {os.sep})")
    if table is not None and table not in formats:
        raise ConfigError(f"{name}: is named as {table}, the formats are {', '.join(formats)}; let one of them agree")
    parent = Path(name).absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"{name}: there is no folder {parent}; make it first")
    if "parquet" in formats:
        require_parquet()
