"""What the page shows, as plain values, and the files that draw them in the browser. Knows nothing of Gradio.

    photo ──tell──▶ messages: the photo, words as they are found, captions with all their maps ──▶ *.js in the browser

A message is a dictionary ready for JSON and holds all that there is to see so far, so that a browser which misses one
loses nothing. Maps travel as bytes in base64, each scaled to a peak of 255: enough for the 256 colours that draw it.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import importlib.resources
import inspect
import io
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from captioner.caption import Caption, Word
from captioner.config import SearchOptions
from captioner.errors import CaptionerError, ConfigError, ImageError, ImageTooLargeError, SearchError
from captioner.images import Picture
from captioner.templates import alt_text

DISPLAY_SIDE_PX = 1024
MAX_BEAM_SIZE = 10
MAX_SENTENCE = 500
MAX_PHRASES = 50
COLOUR_MAPS = ("viridis", "cividis", "magma", "inferno")
"""Perceptually even, and read the same way by people who are colour-blind (Nuñez et al. 2018)."""

# What a greedy preview can heed; the rest belongs to beams and to sampling.
_PREVIEW_OPTIONS = ("min_words", "max_words", "no_repeat_ngram", "ban")

Message = dict[str, Any]


class Model(Protocol):
    """What the page and its API need of a model; `captioner.Captioner` and `captioner.service.Service` have it."""

    def open(self, picture: Any, *, name: str | None = ..., side_px: int | None = ...) -> Picture:
        """Return the picture itself, as `captioner.images.open_picture` does, within the model's own limits."""

    def caption(self, picture: Any, **options: Any) -> Caption:
        """Return the best caption, with its alternatives."""

    def caption_batch(
        self, pictures: Any, *, on_error: Literal["raise", "return"] = ..., **options: Any
    ) -> Iterable[Caption | ImageError | SearchError]:
        """Return for each picture its caption, or why it has none."""

    def stream(self, picture: Any, **options: Any) -> Iterator[Word]:
        """Give each word of a greedy caption as it is found."""

    def score(self, picture: Any, sentence: str) -> Caption:
        """Read a given sentence as the picture's caption."""


def read(name: str) -> str:
    """Return one of the files that the browser gets, such as "stage.js".

    Args:
        name: of a file in this folder.

    Returns:
        Its text.
    """
    return importlib.resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def new_run() -> int:
    """Return a number for a new run, larger than all before: of two runs the browser shows the later.

    Returns:
        Microseconds since 1970: it grows over restarts too, and is exact in JavaScript.
    """
    return time.time_ns() // 1000


# --- Options ---


def option_help() -> dict[str, str]:
    """Return the name of every search option and its line of help, as the settings class has them."""
    # `getdoc`, since compilers from Python 3.13 on take the indentation out of docstrings.
    docstring = inspect.getdoc(SearchOptions) or ""
    found = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", docstring, re.MULTILINE))
    texts = {f.name: " ".join(found[f.name].split()).replace("`", "") for f in dataclasses.fields(SearchOptions)}
    return {name: text[:1].upper() + text[1:] for name, text in texts.items()}


def search_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn what the fields of the page hold into search options.

    Args:
        values: of every field; an empty one leaves its option to the model. Phrases stand between commas.

    Returns:
        The options that were set.

    Raises:
        ConfigError: for options that are impossible, or larger than this page allows.
    """
    options: dict[str, Any] = {}
    for name, value in values.items():
        given = _phrases(value) if name in ("must_include", "ban") else _number(value)
        if given not in (None, "", []):
            options[name] = given
    SearchOptions.from_dict(options)
    for name in ("beam_size", "n_best"):
        if options.get(name, 1) > MAX_BEAM_SIZE:
            raise ConfigError(f"{name} must be at most {MAX_BEAM_SIZE} on this page, got {options[name]}")
    for name in ("must_include", "ban"):
        phrases = options.get(name, ())
        if len(phrases) > MAX_PHRASES or any(len(phrase) > MAX_SENTENCE for phrase in phrases):
            raise ConfigError(f"{name} must be at most {MAX_PHRASES} phrases of {MAX_SENTENCE} characters on this page")
    return options


def _phrases(value: Any) -> Any:
    return [phrase.strip() for phrase in value.split(",") if phrase.strip()] if isinstance(value, str) else value


def _number(value: Any) -> Any:
    """Return the number that a text is; any other value as it is: the settings say what is wrong with it."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value.strip()


# --- Captions ---


def caption_values(caption: Caption, name: str) -> Message:
    """Say one caption in plain values.

    Args:
        caption: without its alternatives, which are captions of their own.
        name: of the photo, for the record.

    Returns:
        {"text", "score", "finished", "confidence", "sure", "alt", "record", and what `_words` says}.
    """
    return {
        "text": caption.text,
        "score": caption.score,
        "finished": caption.finished,
        "confidence": caption.confidence,
        "sure": sure(caption.confidence),
        "alt": alt_text(caption.text),
        "record": caption.to_record(name),
        **_words(caption.words),
    }


def _words(words: Sequence[Word]) -> Message:
    """Return words, their probabilities and maps: {"words", "grid", "heads", "maps", "head_maps"}."""
    if not words:
        return {"words": [], "grid": [1, 1], "heads": [1, 1], "maps": "", "head_maps": ""}
    maps_THW = np.stack([word.attention for word in words])
    heads_TLHHW = np.stack([word.attention_heads for word in words])
    layers, heads = heads_TLHHW.shape[1:3]
    return {
        "words": [{"text": word.text, "probability": round(word.probability, 4)} for word in words],
        "grid": list(maps_THW.shape[1:]),
        "heads": [layers, heads],
        "maps": _packed(maps_THW),
        "head_maps": _packed(heads_TLHHW) if layers * heads > 1 else "",  # one head is its own summary
    }


def _packed(maps: npt.NDArray[np.float32]) -> str:
    """Return maps [..., rows, columns], each scaled to a peak of 255, as base64 of their bytes."""
    peaks = maps.max(axis=(-2, -1), keepdims=True)
    scaled = maps / np.maximum(peaks, np.finfo(np.float32).tiny)
    return base64.b64encode(np.rint(scaled * 255).astype(np.uint8).tobytes()).decode()


def sure(confidence: float | None) -> str:
    """Say a confidence in words; of dev captions the bundled model's mean is 0.49, of other worlds 0.10.

    Args:
        confidence: of a caption, in [0, 1]; None when its model gives none.

    Returns:
        A sentence or two; nothing for None.
    """
    if confidence is None:
        return ""
    percent = f"Confidence {confidence:.0%}"
    if confidence < 0.15:
        return f"{percent}: this caption is probably wrong. The picture may be unlike those the model has seen."
    if confidence < 0.35:
        return f"{percent}: the model is unsure of this caption; look at the photo before you use it."
    return f"{percent}: the chance that this is one of the model's better captions."


# --- Messages ---


def tell(model: Model, path: str, name: str, options: Mapping[str, Any], *, run: int) -> Iterator[Message]:
    """Caption a photo, and say what there is to see while that goes on.

    Args:
        model: that captions it.
        path: of the photo on this machine; never part of a message.
        name: what the user calls the photo.
        options: of the search.
        run: from `new_run`.

    Yields:
        {"run", "phase", "name", "picture", "width", "height", "captions"}: the picture as a data URI, the size of the
        upright original in pixels; while the phase is "looking" one caption that grows, of the words alone; when it
        is "done" all captions, best first. Instead of it, {"run", "error", "keep"} ends the messages; what the page
        showed before is worth keeping where the photo is not to blame.
    """
    try:
        picture = model.open(path, name=name, side_px=DISPLAY_SIDE_PX)
        height_px, width_px = picture.full_hw_px
        message = {
            "run": run,
            "phase": "looking",
            "name": name,
            "picture": data_uri(picture.image, DISPLAY_SIDE_PX),
            "width": width_px,
            "height": height_px,
            "captions": [_words([])],
        }
        yield message
        # The same prepared square would do for both, but not every model can prepare: a service may not.
        for words in _preview(model, path, options):
            yield {**message, "captions": [_words(words)]}
        captions = _captions(model, path, name, options)
    except CaptionerError as err:
        keep = _is_gone(err, path) or not isinstance(err, ImageError)
        yield {"run": run, "error": _said_here(err, path, name), "keep": keep}
    else:
        yield {**message, "phase": "done", "captions": captions}


def _preview(model: Model, path: str, options: Mapping[str, Any]) -> Iterator[list[Word]]:
    """Give the words of the greedy caption so far, each time that there is one more."""
    words: list[Word] = []
    heeded = {name: options[name] for name in _PREVIEW_OPTIONS if name in options}
    # A greedy search can end where a beam finds a way; the search proper says what there is to say.
    with contextlib.suppress(SearchError):
        for word in model.stream(path, method="greedy", **heeded):
            words.append(word)
            yield words


def _captions(model: Model, path: str, name: str, options: Mapping[str, Any]) -> list[Message]:
    best = model.caption(path, **options)
    return [
        caption_values(best, name),
        *(caption_values(dataclasses.replace(other, alternatives=()), name) for other in best.alternatives),
    ]


def tell_score(model: Model, path: str, name: str, sentence: str, *, run: int) -> Message:
    """Score the user's own sentence about a photo.

    Args:
        model: that reads it.
        path: of the photo on this machine.
        name: what the user calls the photo.
        sentence: as typed.
        run: that of the photo on the stage.

    Returns:
        {"run", "at", "scored"} or {"run", "at", "score_error"}: the caption, or why there is none; "at" makes two
        answers alike two messages.
    """
    answer: Message = {"run": run, "at": new_run()}
    if len(sentence) > MAX_SENTENCE:
        return {**answer, "score_error": f"The sentence is too long; write at most {MAX_SENTENCE} characters."}
    try:
        return {**answer, "scored": caption_values(model.score(path, sentence), name)}
    except CaptionerError as err:
        return {**answer, "score_error": _said_here(err, path, name)}


def tell_compare(
    others: Mapping[str, Model], path: str, options: Mapping[str, Any], told: Message, *, own_name: str
) -> Iterator[Message]:
    """Caption a photo with other models, one after another.

    Args:
        others: models by the names that the page shows; without any there is nothing to tell.
        path: of the photo on this machine.
        options: of the search, the same for all.
        told: the "done" message of the page's own model.
        own_name: of that model.

    Yields:
        `told` without its captions, with {"models": [{"name"} and "captions", "error" or "waiting"]}, the page's own
        first, each time that there is one more.
    """
    message = {key: told[key] for key in ("run", "name", "picture", "width", "height")}
    columns: list[Message] = [{"name": own_name, "captions": told["captions"]}]
    for index, (name, model) in enumerate(others.items()):
        yield {**message, "models": [*columns, *({"name": each, "waiting": True} for each in list(others)[index:])]}
        try:
            columns.append({"name": name, "captions": _captions(model, path, told["name"], options)})
        except CaptionerError as err:
            columns.append({"name": name, "error": _said_here(err, path, told["name"])})
    if others:
        yield {**message, "models": columns}


def said(err: Exception, source: str | bytes, name: str) -> str:
    """Return what an error says, with the photo called what its owner calls it: no path of this machine is shown.

    Args:
        err: of the photo at `source`.
        source: path of the photo on this machine, or its bytes.
        name: what the user calls the photo.

    Returns:
        The message.
    """
    shown = source if isinstance(source, str) else "<bytes>"
    text = str(err).replace(shown, name)
    # A very long path is shortened in messages, and would not be found.
    return f"{name}: cannot be used; try another picture" if shown[:100] in text else text


def _said_here(err: CaptionerError, path: str, name: str) -> str:
    """Say an error to who uses the page, and can neither raise a limit nor look at a path."""
    if _is_gone(err, path):
        return "The photo was deleted after an hour; choose it again."
    if not isinstance(err, ImageTooLargeError):
        return said(err, path, name)
    limit = re.search(r"the limit of (\d+) (pixels|bytes)", str(err))  # a frame may be larger than its file says
    units = {"pixels": (1e6, "megapixels"), "bytes": (2**20, "MB")}
    size, unit = units[limit[2]] if limit else (1, "")
    most = f" (at most {int(limit[1]) / size:g} {unit})" if limit else ""
    return f"This picture is too large for this page{most}; choose a smaller one."


def _is_gone(err: CaptionerError, path: str) -> bool:
    return isinstance(err, ImageError) and not Path(path).exists()


# --- Pictures and colours ---


def data_uri(image: Image.Image, side_px: int) -> str:
    """Return a picture as a JPEG in a data URI.

    Args:
        image: RGB.
        side_px: the most pixels a side; a larger picture is made smaller.

    Returns:
        The URI.
    """
    small = image.copy()
    small.thumbnail((side_px, side_px))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def palettes() -> dict[str, str]:
    """Return each colour map, from weak to strong: base64 of 256 times red, green, blue."""
    import matplotlib

    colours = {name: matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3] for name in COLOUR_MAPS}
    return {name: base64.b64encode(table.tobytes()).decode() for name, table in colours.items()}
