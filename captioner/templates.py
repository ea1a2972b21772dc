"""Texts made of a caption: a template's, and an alternative text for those who cannot see the picture."""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING

from captioner.errors import ConfigError
from captioner.manifests import printable
from captioner.sources import SourcePicture

if TYPE_CHECKING:
    from captioner.caption import Caption

ALT_TEXT_LIMIT = 125
"""Characters; where several screen readers break a text in two."""

_KINDS = r"image|picture|photo|photograph|snapshot|drawing|close[- ]?up|view"
_LEAD = re.compile(
    rf"(?:(?:this|here|it) is\s+)?(?:(?:an?|the|this)\s+(?:[\w-]+\s+){{0,2}}?)?(?:{_KINDS})\s+(?:of|showing)\s+(?=\w)",
    re.IGNORECASE,
)


class Template:
    """A text with fields in braces: `"{caption}"`, `"photo of {caption} ({stem})"`; `{{` and `}}` are braces.

    Fields are replaced by their values and nothing else: no format, no index, no attribute.

    Args:
        text: with any of the fields caption, phrase (the caption as part of a longer text: "a dog on a rug", without
            capital and full stop), image (the record's name), stem (the file's name without its suffix),
            score (four decimals) and confidence (two decimals; empty when the model was not calibrated).

    Raises:
        ConfigError: for an unknown field or broken braces.
    """

    FIELDS = ("caption", "phrase", "image", "stem", "score", "confidence")

    def __init__(self, text: str = "{caption}") -> None:
        self.text = text
        self._parts: list[tuple[str, str | None]] = []
        remedy = f"fields are {', '.join(f'{{{name}}}' for name in self.FIELDS)}; {{{{ and }}}} stand for braces"
        label = printable(repr(text))
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as err:
            raise ConfigError(f"template {label}: {err}; {remedy}") from err
        for literal, name, form, conversion in parts:
            if name is not None and (name not in self.FIELDS or form or conversion):
                raise ConfigError(f"template {label}: unknown field {printable(repr(name))}; {remedy}")
            self._parts.append((literal, name))

    def fill(self, picture: SourcePicture, result: Caption) -> str:
        """Put the values of one picture in.

        Args:
            picture: from `find_pictures`.
            result: its caption.

        Returns:
            The text.
        """
        values = {
            "caption": result.text,
            "phrase": _phrase(result.text),
            "image": picture.name,
            "stem": picture.relative.stem,
            "score": f"{result.score:.4f}",
            "confidence": "" if result.confidence is None else f"{result.confidence:.2f}",
        }
        return "".join(literal + ("" if name is None else values[name]) for literal, name in self._parts)


def _phrase(sentence: str) -> str:
    text = sentence.removesuffix(".")
    # Of "T-shirt" and "TV" the capitals stay.
    return text[:1].lower() + text[1:] if text[1:2].islower() or text[1:2] in ("", " ") else text


def alt_text(caption_text: str, limit: int = ALT_TEXT_LIMIT) -> str:
    """Make an alternative text: without "a picture of", which a screen reader says itself, and not too long.

    Args:
        caption_text: the sentence.
        limit: the most characters; a longer text is cut at a word and ends in "…".

    Returns:
        The text, on one line.

    Raises:
        ConfigError: for a limit below 2.
    """
    if limit < 2:
        raise ConfigError(f"limit of an alt text must be at least 2, got {limit!r}")
    text = " ".join(caption_text.split())
    while lead := _LEAD.match(text):
        rest = text[lead.end() :]
        text = rest[0].upper() + rest[1:] if text[0].isupper() else rest
    if len(text) <= limit:
        return text
    cut = text[:limit]  # one more than is kept: a space there ends a whole word
    kept, space, _ = cut.rpartition(" ")
    kept = (kept if space else cut[:-1]).rstrip(" ,;:-.…")
    return f"{kept or cut[:-1]}…"
