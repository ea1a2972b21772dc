"""XMP sidecars: made anew, or an existing one with its description replaced and every other byte kept.

Properties: `dc:description` (what photo programs show as the caption) and `Iptc4xmpCore:AltTextAccessibility` (IPTC
Photo Metadata Standard 2021.1), each as `rdf:Alt` with `x-default` (ISO 16684-1, 8.2.2.4).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

from captioner.errors import DataError

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_DC = "http://purl.org/dc/elements/1.1/"
_IPTC = "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/"
_XML = "http://www.w3.org/XML/1998/namespace"
_DESCRIPTION = f"{_DC} description"
_ALT_TEXT = f"{_IPTC} AltTextAccessibility"
_PREFIXED = {_DESCRIPTION: "dc:description", _ALT_TEXT: "Iptc4xmpCore:AltTextAccessibility"}
MOST_BYTES = 16 * 2**20
"""Of a sidecar."""

_TAG = re.compile(rb"<(?:[^>\"']|\"[^\"]*\"|'[^']*')*>")
# XML 1.0, 2.2: what a document may not hold, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def packet(description: str, alt_text: str | None) -> bytes:
    """Return a whole sidecar.

    Args:
        description: what the picture shows.
        alt_text: likewise, for those who cannot see it; None writes none.

    Returns:
        UTF-8.
    """
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Captioner">\n'
        f'<rdf:RDF xmlns:rdf="{_RDF}">\n{_block(_wanted(description, alt_text), about="")}</rdf:RDF>\n'
        '</x:xmpmeta>\n<?xpacket end="w"?>\n'
    ).encode()


def text_hash(kind: bytes, text: bytes) -> bytes:
    """Return a hash by which a text that we wrote is known again.

    Args:
        kind: one byte, so that equal texts of two kinds are not taken for each other.
        text: as it lies in the file, without what surrounds it.

    Returns:
        Nine bytes: the kind, and a BLAKE2b of eight.
    """
    return kind + hashlib.blake2b(text, digest_size=8).digest()


def text_hashes(description: str, alt_text: str | None) -> tuple[bytes, ...]:
    """Return the hashes of what a sidecar is given.

    Args:
        description: as of `packet`.
        alt_text: likewise.

    Returns:
        A `text_hash` for each.
    """
    return tuple(_hash(name, text) for name, text in _wanted(description, alt_text).items())


def _hash(name: str, text: str) -> bytes:
    return text_hash(b"d" if name == _DESCRIPTION else b"a", text.encode("utf-8", "surrogatepass"))


def merged(
    existing: bytes, description: str, alt_text: str | None, *, replace: bool, ours: Collection[bytes] = ()
) -> bytes:
    """Put a description, and an alt text, into a sidecar that is there; all else stays as it is, byte for byte.

    Args:
        existing: the sidecar.
        description: as of `packet`.
        alt_text: likewise; None leaves the alt text alone.
        replace: overwrite texts that are there and differ, in all their languages.
        ours: hashes of texts that we wrote (`text_hashes`): they are overwritten without `replace`.

    Returns:
        The new sidecar; the same bytes when it says all that already.

    Raises:
        DataError: without `replace`, when the sidecar has another text that is not ours; when it is no XMP, or of a
            kind that cannot be changed without a loss. Messages lack the name of the file.
    """
    found = _parse(existing)
    wanted = {
        name: text for name, text in _wanted(description, alt_text).items() if found.texts(name) != {"x-default": text}
    }
    if not wanted:
        return existing
    for name in wanted:
        held = found.texts(name)
        others = [text for text in held.values() if text.strip()]
        # A text in a second language beside ours is somebody's work.
        is_ours = held.keys() == {"x-default"} and _hash(name, held["x-default"]) in ours
        if others and not (replace or is_ours):
            raise DataError(
                f"it has another {_PREFIXED[name]} already ({others[0]!r:.60}), which is kept; remove that, write to "
                "another folder with --into, or begin anew with --overwrite, which replaces all such texts"
            )
        if name in found.attributes:
            raise DataError(f"it holds {_PREFIXED[name]} as an attribute; remove that with exiftool first")
    if found.rdf_end is None:
        raise DataError("it holds no rdf:RDF with an end tag, so it is no XMP sidecar; move it away")
    cuts = sorted(prop.span for prop in found.properties if prop.name in wanted)
    parts, at = [], 0
    for start, end in cuts:
        parts.append(existing[at:start])
        at = end
    block = _block(wanted, found.about).encode()
    return b"".join([*parts, existing[at : found.rdf_end], block, existing[found.rdf_end :]])


def _wanted(description: str, alt_text: str | None) -> dict[str, str]:
    texts = {_DESCRIPTION: description} | ({} if alt_text is None else {_ALT_TEXT: alt_text})
    # A carriage return would come back as a line feed (XML 1.0, 2.11).
    return {name: _NOT_XML.sub("\ufffd", re.sub(r"\r\n?", "\n", text)) for name, text in texts.items()}


def _block(texts: dict[str, str], about: str) -> str:
    properties = "".join(
        f'  <{_PREFIXED[name]}><rdf:Alt><rdf:li xml:lang="x-default">{escape(text)}</rdf:li></rdf:Alt>'
        f"</{_PREFIXED[name]}>\n"
        for name, text in texts.items()
    )
    spaces = f'xmlns:rdf="{_RDF}" xmlns:dc="{_DC}" xmlns:Iptc4xmpCore="{_IPTC}"'
    return f" <rdf:Description rdf:about={quoteattr(about)} {spaces}>\n{properties} </rdf:Description>\n"


@dataclass
class _Property:
    """A property of ours in a sidecar.

    Args:
        name: with its namespace.
        span: first byte, and the one after the last.
        texts: by language.
    """

    name: str
    span: tuple[int, int]
    texts: dict[str, str] = field(default_factory=dict)


@dataclass
class _Found:
    """What a sidecar holds.

    Args:
        properties: of ours, as elements.
        attributes: of ours, as attributes.
        about: what the XMP is about, as its first description says.
        rdf_end: first byte of the end tag of rdf:RDF.
    """

    properties: list[_Property] = field(default_factory=list)
    attributes: dict[str, str] = field(default_factory=dict)
    about: str = ""
    rdf_end: int | None = None

    def texts(self, name: str) -> dict[str, str]:
        """Return the texts of a property by language."""
        found = {"": self.attributes[name]} if name in self.attributes else {}
        for prop in self.properties:
            if prop.name == name:
                found |= prop.texts
        return found


def _parse(data: bytes) -> _Found:
    if len(data) > MOST_BYTES:
        raise DataError(f"more than {MOST_BYTES} bytes, which no sidecar has; move it away")
    reader = _Reader(data)
    try:
        if "\0" in data.decode():  # UTF-16 without a mark; the parser would take it, but not count its bytes as we do
            raise DataError("not in UTF-8; save it as UTF-8")
        reader.parser.Parse(data, True)
    except UnicodeDecodeError as err:
        raise DataError("not in UTF-8; save it as UTF-8") from err
    except (expat.ExpatError, LookupError) as err:
        raise DataError(f"not the XML of a sidecar ({err}); repair it or move it away") from err
    return reader.found


class _Reader:
    """Finds our properties and their places. No DTD is read, so no entity is expanded and nothing is fetched.

    Args:
        data: the sidecar.
    """

    def __init__(self, data: bytes) -> None:
        self.found = _Found()
        self._data = data
        self._path: list[str] = []
        self._language = ""
        self._property: _Property | None = None
        self._rdf_is_empty = True
        self.parser = expat.ParserCreate(namespace_separator=" ")
        self.parser.buffer_text = True
        self.parser.XmlDeclHandler = self._declaration
        self.parser.StartDoctypeDeclHandler = self._doctype
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text

    def _declaration(self, version: str, encoding: str | None, standalone: int) -> None:
        if encoding is not None and encoding.lower() not in ("utf-8", "us-ascii"):
            raise DataError(f"in {encoding}, not in UTF-8; save it as UTF-8")

    def _doctype(self, *_: Any) -> None:
        raise DataError("it has a DOCTYPE, which no XMP has and which may be an attack; move it away")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        parents = self._path[-2:]
        self._path.append(name)
        at = self.parser.CurrentByteIndex
        if name == f"{_RDF} RDF":
            self._rdf_is_empty = self._tag(at).endswith(b"/>")
        if parents[-1:] == [f"{_RDF} RDF"] and name == f"{_RDF} Description":
            self.found.about = self.found.about or attributes.get(f"{_RDF} about", attributes.get("about", ""))
            self.found.attributes |= {key: text for key, text in attributes.items() if key in _PREFIXED}
        elif parents == [f"{_RDF} RDF", f"{_RDF} Description"] and name in _PREFIXED:
            self._property = _Property(name, (at, at + len(self._tag(at))))
        elif self._property is not None and name == f"{_RDF} li":
            self._language = attributes.get(f"{_XML} lang", "x-default")
            self._property.texts.setdefault(self._language, "")

    def _text(self, text: str) -> None:
        if self._property is not None and (text.strip() or self._path[-1] == f"{_RDF} li"):
            # A property may also hold its text itself, without a list.
            language = self._language if self._path[-1] == f"{_RDF} li" else ""
            self._property.texts[language] = self._property.texts.get(language, "") + text

    def _end(self, name: str) -> None:
        at = self.parser.CurrentByteIndex
        depth = len(self._path)
        self._path.pop()
        if self._property is not None and name == self._property.name and self._path[-1:] == [f"{_RDF} Description"]:
            start, end = self._property.span
            if not self._data[start:end].endswith(b"/>"):  # An empty element has one tag for both ends.
                self._property.span = (start, at + len(self._tag(at)))
            self.found.properties.append(self._property)
            self._property = None
        elif name == f"{_RDF} RDF" and depth <= 2 and not self._rdf_is_empty:
            self.found.rdf_end = at

    def _tag(self, at: int) -> bytes:
        """Return the tag that begins at a byte."""
        tag = _TAG.match(self._data, at)
        if tag is None:
            raise DataError("not in UTF-8; save it as UTF-8")
        return tag[0]
