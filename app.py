"""The page: a photo in, its caption out; choose a word and see where the model looked.

    photo ──event──▶ captioner.page: messages of plain values ──▶ the scripts in captioner/page, in the browser

`python app.py` serves it on this machine. Nothing else in the project imports gradio.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from captioner import Captioner, CaptionerError, ConfigError
from captioner.config import METHODS
from captioner.page import (
    MAX_BEAM_SIZE,
    Message,
    Model,
    new_run,
    option_help,
    palettes,
    read,
    search_options,
    tell,
    tell_compare,
    tell_score,
)
from captioner.page.examples import Examples

# Gradio reads it when it is imported: it reports nothing about this page to anyone.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
import gradio as gr

LOG = logging.getLogger(__name__)
EXAMPLES = Path(__file__).resolve().parent / "examples"
MAX_UPLOAD = "20mb"
CONCURRENCY = 16
"""Requests that run at once; the model may join them into one batch."""

TITLE = "Captioner"
INTRODUCTION = f"""# {TITLE}
A sentence for your photo, and for every word the place where the model looked."""
FAULT = "Something went wrong on the computer that runs this page; please try again."
PLACEHOLDER = "Drop a photo here\nor click to choose one"
PRIVACY = "Your photo goes to the computer that runs this page, and nowhere else."
OPTION_ROWS = (
    ("method",),
    ("beam_size", "n_best"),
    ("min_words", "max_words"),
    ("must_include", "ban"),
    ("length_penalty", "no_repeat_ngram"),
    ("groups", "diversity"),
    ("temperature", "top_k"),
    ("top_p", "seed"),
)
OPTION_VALUES = {"method": "beam", "beam_size": 3, "n_best": 3}
"""Where the page has a value of its own; elsewhere an empty field leaves the option to the model."""
EMPTY = {"must_include": "dog, red ball", "ban": "man, young boy", "seed": "another each time"}


def find_examples(model: Model) -> Examples:
    """Return the project's photos with captions by a model.

    Args:
        model: that captions them.

    Returns:
        The examples; none beside an installed copy, where there are no photos.
    """
    return Examples(model, sorted(EXAMPLES.glob("*.jpg")), search_options(OPTION_VALUES))


def build_app(
    captioner: Model,
    *,
    others: Mapping[str, Model] | None = None,
    name: str = "This model",
    examples: Examples | None = None,
) -> gr.Blocks:
    """Build the page.

    Args:
        captioner: what captions the photos: a `Captioner`, or a service in front of one.
        others: more models, by the names to show, whose captions stand beside; none by default.
        name: of `captioner` beside the others.
        examples: photos one click away; by default those of the project, with captions by `captioner`.

    Returns:
        The page; `start` serves it.

    Raises:
        ImageError: when a photo of the examples cannot be read.
    """
    examples = examples or find_examples(captioner)
    page = gr.Blocks(title=TITLE)
    with page:
        gr.Markdown(INTRODUCTION)
        shown = gr.State(None)  # path and name of the photo on the stage, and its run
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                photo = gr.Image(show_label=False, height=200, placeholder=PLACEHOLDER, buttons=[])
                strip = _html("strip", examples.thumbnails(), visible=bool(examples.paths))
                fields, again = _option_fields()
            with gr.Column(scale=3, min_width=300):
                stage = _html("stage")
        compare = _html("compare", visible=bool(others))
        gr.Markdown(PRIVACY, elem_classes="privacy")
        listeners = _Listeners(captioner, name=name, others=others or {}, examples=examples, options=list(fields))
        outputs = [shown, stage, compare]
        inputs = list(fields.values())
        # "multiple": a photo that is chosen while another is being captioned is not lost; the browser shows the later.
        how: Any = {
            "trigger_mode": "multiple",
            "show_progress": "hidden",  # the stage says itself what goes on
            "api_visibility": "private",
            "concurrency_limit": CONCURRENCY,
            "concurrency_id": "model",
        }
        # Not preprocessed: Gradio would open the photo itself, in fewer formats and with messages of its own.
        # That the file is one that was uploaded here has been checked before.
        first: Any = {"js": f"(...values) => {{ {_tell_stage('waiting')} return values; }}", **how}
        # Not when the photo was only cleared, or another source of photos was chosen.
        chosen: Any = {**first, "js": f"(...values) => {{ if (values[0]) {_tell_stage('waiting')} return values; }}"}
        events = [
            photo.input(listeners.caption_upload, [photo, *inputs], [photo, *outputs], preprocess=False, **chosen),
            again.click(listeners.caption_shown, [shown, *inputs], outputs, **first),
            strip.click(listeners.caption_example, inputs, outputs, **first),
            stage.score(listeners.score_own, shown, stage, **how),
        ]
        for event in events:
            event.failure(None, js=f"() => {{ {_tell_stage('failed')} }}", api_visibility="private")
    return page


def _tell_stage(what: str) -> str:
    return f'document.dispatchEvent(new CustomEvent("captioner:{what}"));'


class _Listeners:
    """What the page does when its user does something; the options come as the fields hold them.

    Args:
        model: that captions.
        name: of the model, beside others.
        others: models to compare with, by name; may be none.
        examples: the photos of the strip.
        options: names of the search options, in the order of their fields.
    """

    def __init__(
        self, model: Model, *, name: str, others: Mapping[str, Model], examples: Examples, options: list[str]
    ) -> None:
        self._model = model
        self._name = name
        self._others = others
        self._examples = examples
        self._options = options

    def caption_upload(self, upload: dict[str, Any] | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Caption a photo that was uploaded, pasted or taken, and free the box for the next."""
        if upload is None:  # the photo was cleared, or another source of photos was chosen
            yield (gr.skip(),) * 4
            return
        path, name = str(upload["path"]), str(upload["orig_name"])
        box: Any = None
        for answer in self._answers(path, name, values):
            yield (box, *answer)
            box = gr.skip()

    def caption_shown(self, shown: tuple[str, str, int] | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Caption the photo on the stage again."""
        if shown is None:
            yield gr.skip(), {"run": new_run(), "error": "Choose a photo first.", "keep": False}, gr.skip()
            return
        path, name, _ = shown
        yield from self._answers(path, name, values, again=True)

    def caption_example(self, event: gr.EventData, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Caption an example, which is named by its place alone."""
        path = self._examples.paths[event.index]
        yield from self._answers(str(path), path.name, values, example=event.index)

    def score_own(self, shown: tuple[str, str, int] | None, event: gr.EventData) -> Message:
        """Score the sentence that the user typed."""
        if shown is None:
            return {"run": new_run(), "error": "Choose a photo first.", "keep": False}
        path, name, run = shown
        return tell_score(self._model, path, name, str(event.sentence), run=run)

    def _answers(
        self, path: str, name: str, values: tuple[Any, ...], *, example: int | None = None, again: bool = False
    ) -> Iterator[tuple[Any, ...]]:
        """Give the values of (shown, stage, compare), one after another."""
        run = new_run()
        shown: Any = (path, name, run)
        compared: Any = {"run": run, "models": None}  # what stands there is of another search
        message: Message = {}
        try:
            for message in self._messages(path, name, values, example, run):
                # Of another photo nothing may stay beside an error.
                yield shown, {**message, "keep": again and message.get("keep", False)}, compared
                shown = compared = gr.skip()
            if message.get("phase") == "done":
                for columns in tell_compare(
                    self._others, path, self._search_options(values), message, own_name=self._name
                ):
                    yield gr.skip(), gr.skip(), columns
        except Exception:  # a fault of ours: its trace belongs into the log, and a sentence on the page
            LOG.exception("a photo could not be captioned")
            yield gr.skip(), {"run": run, "error": FAULT, "keep": False}, gr.skip()

    def _messages(
        self, path: str, name: str, values: tuple[Any, ...], example: int | None, run: int
    ) -> Iterator[Message]:
        try:
            options = self._search_options(values)
        except ConfigError as err:
            yield {"run": run, "error": str(err), "keep": True}
            return
        if example is None:
            yield from tell(self._model, path, name, options, run=run)
        else:
            yield from self._examples.tell(example, options, run=run)

    def _search_options(self, values: tuple[Any, ...]) -> dict[str, Any]:
        return search_options(dict(zip(self._options, values, strict=True)))


def _option_fields() -> tuple[dict[str, Any], gr.Button]:
    """Return a field for every search option, by its name, and the button that captions again."""
    help_of = option_help()
    fields: dict[str, Any] = {}
    with gr.Accordion("Search options", open=False):
        for names in OPTION_ROWS:
            with gr.Row():
                for name in names:
                    how: Any = {"label": name.replace("_", " ").capitalize(), "info": help_of[name], "min_width": 150}
                    how["value"] = OPTION_VALUES.get(name)
                    if name == "method":
                        fields[name] = gr.Radio(list(METHODS), **how)
                    elif name in OPTION_VALUES:
                        fields[name] = gr.Slider(1, MAX_BEAM_SIZE, step=1, buttons=[], **how)
                    else:  # a `gr.Number` cannot stay empty
                        fields[name] = gr.Textbox(placeholder=EMPTY.get(name, "as the model has it"), **how)
        return fields, gr.Button("Caption again")


def _html(name: str, value: Any = None, *, visible: bool = True) -> gr.HTML:
    """Return a part of the page that the browser draws from its files in captioner/page."""
    viewer = name != "strip"
    parts: Any = {
        "html_template": read(f"{name}.html"),
        "css_template": (read("viewer.css") if viewer else "") + read(f"{name}.css"),
        "js_on_load": (read("viewer.js") if viewer else "") + read(f"{name}.js"),
        "apply_default_css": False,
    }
    drawing: Any = {"palettes": palettes()} if viewer else {}
    return gr.HTML(value, **parts, visible=visible, **drawing)


def start(page: gr.Blocks, *, host: str, port: int) -> str:
    """Serve the page from threads of this process, until `page.close()`.

    Args:
        page: what `build_app` made.
        host: address to listen on; 127.0.0.1 is reached from this machine alone.
        port: to listen on.

    Returns:
        Where the page is.

    Raises:
        OSError: when the port is taken.
    """
    # System fonts: nothing to fetch. The default theme's greys for lesser text are too faint.
    theme = gr.themes.Default(
        primary_hue="indigo", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        run_history=False,
        enable_monitoring=False,
        max_file_size=MAX_UPLOAD,
        footer_links=[],
        theme=theme,
        css=read("page.css"),
    )
    return str(url)


def main() -> None:
    """Load the model and serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve the page: a photo in, its caption out.")
    parser.add_argument("--model", help="model folder or hub id 'user/name' (default: the bundled model)")
    parser.add_argument(
        "--compare", action="append", default=[], metavar="MODEL", help="show this model beside it; may be repeated"
    )
    # A platform that runs this file says by these variables where it expects the page.
    host, port = os.getenv("GRADIO_SERVER_NAME", "127.0.0.1"), os.getenv("GRADIO_SERVER_PORT", "7860")
    parser.add_argument("--host", default=host, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", default=port, help="port to listen on, 1 to 65535 (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        _serve(arguments.model, arguments.compare, arguments.host, _port(arguments.port))
    except KeyboardInterrupt:
        parser.exit(130, "error: interrupted\n")
    except ConfigError as err:
        parser.exit(2, f"error: {' '.join(str(err).splitlines())}\n")
    except (CaptionerError, OSError) as err:
        parser.exit(1, f"error: {' '.join(str(err).splitlines())}\n")


def _title(model: str | None) -> str:
    """Return the name of a model on the page: no path of this machine belongs there."""
    return "The bundled model" if model is None else Path(model).name


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:6]) <= 65535):
        raise ConfigError(f"--port (or GRADIO_SERVER_PORT) must be a whole number from 1 to 65535, got {text!r}")
    return int(text)


def _require_free(host: str, port: int) -> None:
    """Say in one line what Gradio would say in the traceback of a thread."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server((str(address[0]), port), family=family).close()
    except (OSError, UnicodeError) as err:  # a host name with an impossible part is a UnicodeError
        reason = err.strerror if isinstance(err, OSError) else "not a possible name"
        raise OSError(
            f"cannot listen on {host[:200]!r}, port {port}: {reason}; choose others with --host, --port"
        ) from err


def _serve(model: str | None, compare: list[str], host: str, port: int) -> None:
    """Serve the page until it is interrupted."""
    _require_free(host, port)
    captioner = Captioner.load(model)
    others = {f"{_title(each)} ({number})": Captioner.load(each) for number, each in enumerate(compare, 2)}
    examples = find_examples(captioner)
    page = build_app(captioner, others=others, name=f"{_title(model)} (1)", examples=examples)
    url = start(page, host=host, port=port)
    threading.Thread(target=examples.get_ready, name="examples", daemon=True).start()
    try:
        sys.stdout.write(f"{TITLE} is at {url} (Ctrl-C stops it)\n")
        sys.stdout.flush()
        _wait()
    finally:
        page.close(verbose=False)


def _wait() -> None:
    """Wait for Ctrl-C; Gradio's own waiting would end in status 0."""
    threading.Event().wait()


if __name__ == "__main__":
    main()
