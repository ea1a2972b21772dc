"""The four endpoints of the API: plain values in, the records of the contract out. Knows nothing of Gradio.

    {"path": of an uploaded file} or "data:image/png;base64,..." ──▶ model ──▶ record, maps, figure

What the endpoints say of themselves, types, defaults and help, is what clients and tools are told.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import inspect
import io
import json
import re
import threading
import time
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, cast

import PIL.Image

from captioner.caption import Caption, error_record
from captioner.config import METHODS, SearchOptions
from captioner.errors import (
    CaptionerError,
    ConfigError,
    ImageReadError,
    SearchError,
    ServiceBusyError,
    ServiceTimeoutError,
)
from captioner.page import MAX_SENTENCE, Model, option_help, said, search_options
from captioner.payloads import is_upload
from captioner.prepared import FIGURE_SIDE_PX
from captioner.requests import Turnstile, require_present

MAX_NAME = 200
NAMES = ("caption", "caption_batch", "score", "explain")
_DATA = re.compile(r"data:[\w.+/;=-]{0,100}?;base64,", re.ASCII)

FIGURES = 8
"""Figures that are asked for at a time; each keeps its place from before its caption until it is drawn."""
FIGURE_TIMEOUT_S = 60.0
_RETRY_S = 5

# Matplotlib is not made for threads.
_DRAWING = Turnstile(1)

Image = dict[str, Any] | str
"""An uploaded file as a dictionary with its "path", or the bytes of a picture as a `data:` text."""


def typed(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Give an endpoint a parameter for every search option in place of its `**options`, and a docstring that says so.

    Names, types and help are read from the settings class, so that they are the same in Python, on the command line
    and here. None leaves an option to the model.

    Args:
        endpoint: its docstring has "Args" and "Returns".

    Returns:
        A function that takes its arguments by place too, with one line of help per parameter.
    """
    signature = inspect.signature(endpoint, eval_str=True)
    kinds = inspect.Parameter
    parameters = [each for each in signature.parameters.values() if each.kind is not kinds.VAR_KEYWORD]
    help_of = {name: f"{text} Default: as the model has it." for name, text in option_help().items()}
    searches = len(parameters) < len(signature.parameters)
    if searches:
        parameters += [kinds(name, kinds.KEYWORD_ONLY, default=None, annotation=_hint(name)) for name in help_of]
    full = signature.replace(
        parameters=[each.replace(kind=kinds.POSITIONAL_OR_KEYWORD) for each in parameters],
    )

    @functools.wraps(endpoint)
    def run(*values: Any, **named: Any) -> Any:
        return endpoint(**full.bind(*values, **named).arguments)

    summary, own, returns = _documented(endpoint)
    lines = [f"    {name}: {text}" for name, text in (own | (help_of if searches else {})).items()]
    run.__doc__ = "\n".join([summary, "", "Args:", *lines, "", "Returns:", f"    {returns}"])
    run.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": signature.return_annotation}
    cast(Any, run).__signature__ = full
    return run


def _hint(name: str) -> Any:
    """Return the type of a search option, None included."""
    if name == "method":
        return Literal[METHODS] | None
    hint = typing.get_type_hints(SearchOptions)[name]
    if typing.get_origin(hint) is tuple:
        hint = list[str]
    return hint if isinstance(hint, types.UnionType) else hint | None


def _documented(endpoint: Callable[..., Any]) -> tuple[str, dict[str, str], str]:
    """Return the summary, the help of every parameter and of what is returned, each in one line."""
    head, _, rest = (inspect.getdoc(endpoint) or "").partition("\nArgs:\n")
    arguments, _, rest = rest.partition("\nReturns:\n")
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", arguments, re.MULTILINE)
    own = {name: " ".join(text.split()) for name, text in found}
    return " ".join(head.split()), own, " ".join(rest.partition("\nRaises:\n")[0].split())


def tool_contents(values: Sequence[Any], root_url: str) -> list[Any]:
    """Return what an endpoint answered as a tool's contents, in JSON; Gradio's own are the text of Python's values.

    Args:
        values: one per output of the endpoint.
        root_url: of the page; nothing here is an address.

    Returns:
        `mcp.types.TextContent` for each.
    """
    from mcp.types import TextContent

    del root_url
    return [TextContent(type="text", text=json.dumps(value)) for value in values]


class Endpoints:
    """The functions behind the endpoints. Safe to call from many threads, as the model is.

    Args:
        model: a `Captioner`, or a service in front of one.
        uploads: folder of the uploaded files; no other file can be named.
    """

    def __init__(self, model: Model, *, uploads: Path) -> None:
        self._model = model
        self._uploads = uploads
        self._figures = threading.BoundedSemaphore(FIGURES)

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Return each endpoint by its name, typed and documented."""
        return {name: typed(getattr(self, name)) for name in NAMES}

    def caption(self, image: Image, **options: Any) -> dict[str, Any]:
        """Write a sentence about a picture, and say how probable each of its words is.

        Args:
            image: the picture: an uploaded file, or its bytes as a text that begins with "data:image/jpeg;base64,".
                Addresses are not fetched.
            **options: search options.

        Returns:
            A record: image (name of the file), caption, score (mean log-probability per token), confidence, words
            (word and probability), alternatives (with n_best above 1), error (null).

        Raises:
            ImageError: when it is no picture, or over a limit.
            ConfigError: for an impossible option.
            SearchError: when no caption can be as the options ask.
        """
        source, name = self._take(image)
        with _named(source, name):
            return self._model.caption(source, **search_options(options)).to_record(name)

    def caption_batch(self, images: list[Image], **options: Any) -> list[dict[str, Any]]:
        """Write a sentence about each of many pictures; those that cannot be captioned say why in their error.

        Args:
            images: the pictures, each as for caption.
            **options: search options.

        Returns:
            A record for each picture, in order, as for caption; one that failed has an error with type and message.

        Raises:
            ConfigError: for an impossible option, or too many pictures.
            SearchError: for a word that the model does not know.
        """
        if not isinstance(images, list):
            raise ConfigError("images must be a list of pictures; for one picture use caption")
        found = search_options(options)
        taken = [self._take(image) for image in images]
        results = self._model.caption_batch([source for source, _ in taken], on_error="return", **found)
        return [
            result.to_record(name) if isinstance(result, Caption) else _failed(result, source, name)
            for (source, name), result in zip(taken, results, strict=True)
        ]

    def score(self, image: Image, sentence: str) -> dict[str, Any]:
        """Say how probable a given sentence is as the caption of a picture, word by word.

        Args:
            image: the picture, as for caption.
            sentence: words that the model knows; capitals and punctuation do not matter.

        Returns:
            A record as for caption, of this sentence.

        Raises:
            ImageError: when it is no picture, or over a limit.
            SearchError: when the sentence is empty, too long, or has a word that the model does not know.
        """
        source, name = self._take(image)
        with _named(source, name):
            return self._model.score(source, _sentence(sentence)).to_record(name)

    def explain(
        self, image: Image, sentence: str | None = None, figure: bool = False, **options: Any
    ) -> dict[str, Any]:
        """Show where in the picture the model looked for each word of its caption, or of a given sentence.

        Args:
            image: the picture, as for caption.
            sentence: explain this sentence instead of searching for one; the search options stay empty then.
            figure: whether to draw the picture under each word's map.
            **options: search options.

        Returns:
            record (as for caption), words (word, probability, and attention: rows of a grid laid over the whole
            upright picture, not negative, sum 1), grid_hw (rows and columns), picture_hw_px (height and width), figure
            (a PNG as a data: text, or null).

        Raises:
            ImageError: when it is no picture, or over a limit.
            ConfigError: for an impossible option, or one beside a sentence.
            SearchError: when no caption can be as was asked.
        """
        source, name = self._take(image)
        found = search_options(options)
        if not isinstance(figure, bool):
            raise ConfigError(f"figure must be true or false, got {figure!r:.50}")
        if sentence is not None and found:
            raise ConfigError(f"a sentence needs no search; leave out {', '.join(sorted(found))}")
        with _named(source, name), self._figure(source) if figure else contextlib.nullcontext(_nothing) as draw:
            if sentence is None:
                caption = self._model.caption(source, **found)
            else:
                caption = self._model.score(source, _sentence(sentence))
            drawn = draw(caption)
        return {
            "record": caption.to_record(name),
            "words": [
                {"word": word.text, "probability": word.probability, "attention": word.attention.tolist()}
                for word in caption.words
            ],
            "grid_hw": list(caption.geometry.grid_hw),
            "picture_hw_px": list(caption.geometry.picture_hw_px),
            "figure": drawn,
        }

    @contextlib.contextmanager
    def _figure(self, source: str | bytes) -> Iterator[Callable[[Caption], str | None]]:
        """Keep a place for a figure until it is drawn; yield what draws it."""
        deadline_s = time.monotonic() + FIGURE_TIMEOUT_S
        if not self._figures.acquire(blocking=False):
            message = f"{FIGURES} figures are being drawn already; try again in {_RETRY_S} s"
            raise ServiceBusyError(message, retry_after_s=_RETRY_S)

        def draw(caption: Caption) -> str:
            # Opened by the model: within its limits, and in its turn.
            picture = self._model.open(source, side_px=FIGURE_SIDE_PX).image
            return _drawn(caption, picture, deadline_s)

        try:
            yield draw
        finally:
            self._figures.release()

    def _take(self, image: Any) -> tuple[str | bytes, str]:
        """Return what a client handed over as a source of the library, and its name."""
        if isinstance(image, str):
            return _decoded(image), "picture"
        path = image.get("path") if isinstance(image, dict) else None
        # The door before the page refuses such paths too; a page may stand without a door.
        if not isinstance(path, str) or not is_upload(path, self._uploads):
            raise ImageReadError('no picture: upload a file and name it as {"path": ...}, or send a data: text')
        return path, client_name(image.get("orig_name"), path)


def client_name(given: object, path: str) -> str:
    """Return the name of an uploaded file as its owner knows it: no folder of theirs or ours, and valid text.

    Args:
        given: what the client says that the file was called.
        path: of the file here.

    Returns:
        The name; it is for people and no path.
    """
    name = PureWindowsPath(given).name if isinstance(given, str) else ""  # parts both kinds of slashes
    name = (name or PurePosixPath(path).name)[:MAX_NAME].encode(errors="replace").decode()
    return "".join(letter if letter.isprintable() else "?" for letter in name) or "picture"


def _decoded(text: str) -> bytes:
    """Return the bytes in a data: text."""
    head = _DATA.match(text)
    if head is None:
        raise ImageReadError("a picture given as text must begin with data:image/jpeg;base64, or the like")
    try:
        return binascii.a2b_base64(text[head.end() :], strict_mode=True)
    except ValueError as err:  # not ASCII, or no base64
        raise ImageReadError("the data: text of the picture is not valid base64") from err


def _sentence(text: object) -> str:
    if not isinstance(text, str):
        raise SearchError(f"sentence must be a text, got {type(text).__name__}")
    if len(text) > MAX_SENTENCE:
        raise SearchError(f"the sentence is too long; write at most {MAX_SENTENCE} characters")
    return text


def _failed(error: Exception, source: str | bytes, name: str) -> dict[str, Any]:
    return error_record(name, type(error)(said(error, source, name)))


@contextlib.contextmanager
def _named(source: str | bytes, name: str) -> Iterator[None]:
    """Name the picture in errors as its owner knows it."""
    try:
        yield
    except CaptionerError as err:
        err.args = (said(err, source, name), *err.args[1:])
        raise


def _nothing(caption: Caption) -> None:
    """Draw no figure."""


def _drawn(caption: Caption, picture: PIL.Image.Image, deadline_s: float) -> str:
    """Return the figure as a PNG in a data: text."""
    file = io.BytesIO()
    if not _DRAWING.enter(deadline_s):
        raise ServiceTimeoutError("the figure was not drawn within the time limit; try again when fewer are drawn")
    try:
        require_present()
        caption.figure(picture).savefig(file, format="png")
    finally:
        _DRAWING.leave()
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
