"""What a client may name in a request: files that were uploaded here, and nothing else.

Gradio passes files around as dictionaries, `{"path": ..., "url": ..., "meta": {"_type": "gradio.FileData"}}`. As of
version 6.31 it looks only at those with that `meta`: a `path` without it reaches a `gr.Image` unchecked, so that a
client could name any file of the server; and a `path` that is an address is fetched. So every body is read here first.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

NODES_LIMIT = 20_000
FILES_LIMIT = 300
_ADDRESS = re.compile(r"\s*([a-z][a-z0-9+.-]*:/|file:)", re.IGNORECASE)
_FILE_ROUTE = "/gradio_api/file="


class RefusedPayloadError(ValueError):
    """A body names what it may not name, or is no JSON; the message says so without repeating it."""


def parse(body: bytes) -> Any:
    """Read a body as JSON, with no doubt about what another reader would find in it.

    Args:
        body: as it was sent.

    Returns:
        The value.

    Raises:
        RefusedPayloadError: when it is not JSON in UTF-8, is nested too deep, or says a thing twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) != len(pairs):
            raise RefusedPayloadError("the body names a key twice")
        return found

    # Before anything is made of it: nothing else may run while a list of numbers is read.
    if sum(map(body.count, (b",", b"[", b"{"))) > 2 * NODES_LIMIT:
        raise RefusedPayloadError("the body holds too many values")
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=once)
    except RefusedPayloadError:
        raise
    except (ValueError, RecursionError) as err:
        raise RefusedPayloadError("the body is not JSON") from err


def check(value: Any, *, uploads: Path, strings: bool = False, most_files: int = FILES_LIMIT) -> bool:
    """Refuse a value that names a file which does not lie among the uploads, or an address.

    A `url` of an upload is taken out: who called this server by which name is the client's word alone.

    Args:
        value: what `parse` returned.
        uploads: the folder of uploaded files, and of those that the page made.
        strings: whether to refuse every text that is an address, as of a protocol that takes texts for files.
        most_files: that the value may name.

    Returns:
        Whether something was taken out of the value.

    Raises:
        RefusedPayloadError: when it names what it may not name, or too much.
    """
    seen, changed = 0, False
    nodes = [value]
    files: dict[str, bool] = {}  # a path is looked at once
    while nodes:
        node = nodes.pop()
        seen += 1
        if seen > NODES_LIMIT:
            raise RefusedPayloadError("the body holds too many values")
        if isinstance(node, dict):
            _check_file(node, uploads, files)
            if len(files) > most_files:
                raise RefusedPayloadError(f"more than {most_files} files; name fewer at once")
            if node.get("url") is not None:
                node["url"], changed = None, True
            nodes.extend(node.values())
        elif isinstance(node, list):
            nodes.extend(node)
        elif strings and isinstance(node, str) and _ADDRESS.match(node):
            raise RefusedPayloadError("an address is not fetched here: upload the picture")
    return changed


def _check_file(node: dict[str, Any], uploads: Path, files: dict[str, bool]) -> None:
    """Refuse a dictionary that may be taken for a file and is none that lies here."""
    path, url, meta = node.get("path"), node.get("url"), node.get("meta")
    if isinstance(meta, dict) and meta.get("_type") == "gradio.FileData" and not isinstance(path, str):
        raise RefusedPayloadError("a file without a path: upload the picture")
    if path is not None:
        if isinstance(path, str) and path not in files:
            files[path] = is_upload(path, uploads)
        if not isinstance(path, str) or not files[path]:
            raise RefusedPayloadError("a path that is not of an uploaded file: upload the picture")
        if meta is not None and not isinstance(meta, dict):
            raise RefusedPayloadError("a file's meta must be an object")
    if url is not None and not _shows(url, path):
        raise RefusedPayloadError("a url that is not of an uploaded file: upload the picture")


def is_upload(path: str, uploads: Path) -> bool:
    """Return whether a path names a plain file inside a folder, with no link on the way and no detour.

    Args:
        path: as a client gave it.
        uploads: the folder.

    Returns:
        Whether it does.
    """
    # os.path, since a Path would tidy up what is to be refused.
    if not path.startswith(os.sep) or "\0" in path or os.path.normpath(path) != path:
        return False
    try:
        root = uploads.resolve(strict=True)
        for folder in (root, uploads.absolute()):  # the folder may lie behind a link; what is in it may not
            if path.startswith(f"{folder}{os.sep}"):
                real = Path(path).resolve(strict=True)
                return real == root / path.removeprefix(f"{folder}{os.sep}") and real.is_file()
    except (OSError, RuntimeError, ValueError):
        return False
    return False


def sweep(uploads: Path, *, older_than_s: float) -> int:
    """Delete old files among the uploads, those too that an upload which broke off has left.

    Args:
        uploads: the folder of uploaded files; it stays.
        older_than_s: how long ago a file must have been changed.

    Returns:
        How many files were deleted.
    """
    deleted = 0
    latest_s = time.time() - older_than_s
    for folder, _, names in os.walk(uploads, topdown=False):
        for name in names:
            path = Path(folder, name)
            with contextlib.suppress(OSError):  # it is gone already, or not ours
                if path.lstat().st_mtime < latest_s:
                    path.unlink()
                    deleted += 1
        if Path(folder) != uploads:
            with contextlib.suppress(OSError):  # it is not empty
                if Path(folder).lstat().st_mtime < latest_s:
                    Path(folder).rmdir()
    return deleted


def _shows(url: object, path: object) -> bool:
    """Return whether a url is one under which a page like this one shows the very file of `path`."""
    if not isinstance(url, str) or not isinstance(path, str):
        return False
    if url.startswith("data:image/svg+xml"):  # so Gradio's page shows an SVG; it is taken out, and never read
        return True
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    if parts.query or parts.fragment or parts.scheme not in ("", "http", "https"):
        return False
    _, route, shown = parts.path.partition(_FILE_ROUTE)
    return bool(route) and unquote(shown) == path
