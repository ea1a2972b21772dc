"""Tables of all records: CSV and Parquet, written as they are read, and put in place whole."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from captioner.atomic import replacing
from captioner.errors import ConfigError
from captioner.folders import is_picture_name
from captioner.manifests import printable

CSV_COLUMNS = ("image", "caption", "score", "confidence", "alternatives", "error_type", "error_message")
ROW_GROUP = 10_000
"""Records that a Parquet writer holds at once, and a reader reads at once."""

# What makes a spreadsheet take a text for a formula (OWASP, "CSV Injection").
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_csv(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    r"""Write records as comma-separated values (RFC 4180, UTF-8), with `CSV_COLUMNS` in the first line.

    A file's name may be made to run as a formula where a spreadsheet opens the table: the name of a picture that
    begins like one gets "./" before it, and names the same file still; any other text gets an apostrophe. Bytes of a
    name that are no UTF-8 are written as an escape, such as `\udcff`.

    Args:
        records: as `Caption.to_record` makes them.
        path: of the table; one that is there is replaced when all is written.

    Raises:
        ConfigError: when the path is one of a picture.
        OSError: when the disk takes no more; nothing is left then.
    """
    _check_path(path)
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="", write_through=True)
        rows = csv.writer(text, lineterminator="\r\n")
        rows.writerow(CSV_COLUMNS)
        for record in records:
            error = record.get("error") or {}
            image = str(record["image"])
            alternatives = record.get("alternatives") or []
            rows.writerow(
                [
                    f"./{image}" if image.startswith(_FORMULA) else image,
                    _harmless(record.get("caption")),
                    record.get("score"),
                    record.get("confidence"),
                    json.dumps(alternatives, ensure_ascii=False) if alternatives else "",
                    error.get("type"),
                    _harmless(error.get("message")),
                ]
            )
        text.flush()
        text.detach()


def _harmless(text: str | None) -> str | None:
    return f"'{text}" if text is not None and text.startswith(_FORMULA) else text


def _check_path(path: Path) -> None:
    if is_picture_name(path.name):
        raise ConfigError(
            f"{printable(str(path))}: the name of a picture, which a table must not replace; give another"
        )


def require_parquet() -> None:
    """Check that Parquet can be written.

    Raises:
        ConfigError: when pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as err:
        raise ConfigError("Parquet needs pyarrow: pip install captioner[parquet]") from err


def write_parquet(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    r"""Write records as Parquet, with all that they hold, in groups of `ROW_GROUP` rows.

    Columns: image, caption (string), score, confidence (double), words (list of word, probability), alternatives (list
    of caption, score), error (type, message; null when there was none). Bytes of a name that are no UTF-8 are written
    as an escape, such as `\udcff`.

    Args:
        records: as `Caption.to_record` makes them.
        path: of the table; one that is there is replaced when all is written.

    Raises:
        ConfigError: when pyarrow is not installed, or the path is one of a picture.
        OSError: when the disk takes no more; nothing is left then.
    """
    require_parquet()
    _check_path(path)
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema(
        [
            pa.field("image", pa.string(), nullable=False),
            pa.field("caption", pa.string()),
            pa.field("score", pa.float64()),
            pa.field("confidence", pa.float64()),
            pa.field("words", pa.list_(pa.struct([("word", pa.string()), ("probability", pa.float64())]))),
            pa.field("alternatives", pa.list_(pa.struct([("caption", pa.string()), ("score", pa.float64())]))),
            pa.field("error", pa.struct([("type", pa.string()), ("message", pa.string())])),
        ]
    )
    with replacing(path) as file, parquet.ParquetWriter(file, schema) as table:
        stream = iter(records)
        while group := list(islice(stream, ROW_GROUP)):
            rows = [{name: _utf8(record.get(name)) for name in schema.names} for record in group]
            table.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema), row_group_size=ROW_GROUP)


def _utf8(value: Any) -> Any:
    """Return a value whose texts are all UTF-8."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, list):
        return [_utf8(item) for item in value]
    if isinstance(value, dict):
        return {key: _utf8(item) for key, item in value.items()}
    return value
