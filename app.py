"""The page and its API: a photo in, its caption out; choose a word and see where the model looked.

    photo ──event──▶ captioner.page: messages of plain values ──▶ the scripts in captioner/page, in the browser
    file ──call──▶ captioner.endpoints: records of plain values ──▶ a client, or a tool's user

`python app.py` serves it on this machine. Nothing else in the project imports gradio.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

from captioner import CaptionerError, ConfigError, faults, serving, tools
from captioner.answers import FAULT
from captioner.asgi import CALL, PLACE, ServiceMiddleware
from captioner.config import METHODS
from captioner.door import Door, OpenDoor
from captioner.endpoints import NAMES, Endpoints, client_name, tool_contents
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
from captioner.payloads import is_upload
from captioner.requests import PLACED, Callers, Place, Runs
from captioner.terminal import say

UPLOADS = serving.prepare_environment()  # before Gradio is imported, which reads it
import gradio as gr  # noqa: E402
import gradio.queueing  # noqa: E402
import gradio.routes  # noqa: E402
from gradio.context import LocalContext  # noqa: E402
from gradio.events import api  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.requests import cookie_parser as parse_cookies  # noqa: E402

LOG = logging.getLogger(__name__)
# An installed copy has them inside the package; a folder of this name beside it would be anybody's.
EXAMPLES = Path(serving.__file__).resolve().with_name("examples")
if not EXAMPLES.is_dir():
    EXAMPLES = Path(__file__).resolve().parent / "examples"
CALLERS = Callers()
MAX_MESSAGE = 1000
MAX_SESSIONS = 1000
"""Gradio keeps about 200 KiB for each."""

TITLE = "Captioner"
INTRODUCTION = f"""# {TITLE}
A sentence for your photo, and for every word the place where the model looked."""
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
        The examples.
    """
    return Examples(model, sorted(EXAMPLES.glob("*.jpg")), search_options(OPTION_VALUES))


def build_app(
    captioner: Model,
    *,
    others: Mapping[str, Model] | None = None,
    name: str = "This model",
    examples: Examples | None = None,
) -> gr.Blocks:
    """Build the page and its API.

    Args:
        captioner: what captions the photos: a `Captioner`, or a service in front of one.
        others: more models, by the names to show, whose captions stand beside; none by default.
        name: of `captioner` beside the others.
        examples: photos one click away; by default those of the project, with captions by `captioner`.

    Returns:
        The page; `start` serves it.

    Raises:
        ImageError: when a photo of the examples cannot be read.
        OSError: when there can be no folder for uploads.
    """
    examples = examples or find_examples(captioner)
    serving.open_uploads(UPLOADS)
    page = gr.Blocks(title=TITLE)
    with page:
        gr.Markdown(INTRODUCTION)
        # Path and name of the photo on the stage, and its run. Changed in place: Gradio keeps one for each page.
        runs = gr.State(Runs())
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                photo = gr.Image(
                    show_label=False, height=200, placeholder=PLACEHOLDER, buttons=[], elem_classes="photo"
                )
                strip = _html("strip", examples.thumbnails(), visible=bool(examples.paths))
                fields, again = _option_fields()
            with gr.Column(scale=3, min_width=300):
                stage = _html("stage")
        compare = _html("compare", visible=bool(others))
        gr.Markdown(PRIVACY, elem_classes="privacy")
        listeners = _Listeners(captioner, name=name, others=others or {}, examples=examples, options=list(fields))
        outputs = [stage, compare]
        inputs = [runs, *fields.values()]
        # "multiple": a photo that is chosen while another is being captioned is not lost, and takes its place.
        how: Any = {
            "trigger_mode": "multiple",
            "show_progress": "hidden",  # the stage says itself what goes on
            "api_visibility": "private",
        }
        # Not preprocessed: Gradio would open the photo itself, in fewer formats and with messages of its own.
        # That the file is one that was uploaded here has been checked before.
        first: Any = {"js": f"(...values) => {{ {_tell_stage('waiting')} return values; }}", **how}
        # Not when the photo was only cleared, or another source of photos was chosen.
        chosen: Any = {**first, "js": f"(...values) => {{ if (values[0]) {_tell_stage('waiting')} return values; }}"}
        captioned = [
            photo.input(
                _leavable_answers(listeners.caption_upload),
                [photo, *inputs],
                [photo, *outputs],
                preprocess=False,
                **chosen,
            ),
            again.click(_leavable_answers(listeners.caption_shown), inputs, outputs, **first),
            strip.click(_leavable_answers(listeners.caption_example), inputs, outputs, **first),
        ]
        scored = stage.score(_leavable(listeners.score_own), runs, stage, **how)
        for event, failed in (*((event, "failed") for event in captioned), (scored, "unread")):
            event.failure(None, js=f"() => {{ {_tell_stage(failed)} }}", api_visibility="private")
        for function in Endpoints(captioner, uploads=UPLOADS).functions().values():
            # Not queued: a tool's call of a queued function would come back here over HTTP, without its login.
            api(_leavable(_answering(function)), queue=False)
    # The service says how many may wait; a smaller limit of Gradio's own would keep its batches small.
    page.queue(max_size=MAX_SESSIONS, default_concurrency_limit=None)
    return page


def _answering(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Turn an endpoint's errors into those that Gradio shows, without a trace; faults of ours go into the log."""

    @functools.wraps(endpoint)
    def run(*values: Any) -> Any:
        try:
            return endpoint(*values)
        except CancelledError:
            raise
        except CaptionerError as err:
            message, kind = str(err)[:MAX_MESSAGE], type(err).__name__
        except Exception:
            LOG.exception("a request could not be answered")
            message, kind = FAULT, "Error"
        raise gr.Error(message, title=kind, print_exception=False)

    return run


def _leavable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function's work leave the queue when the client that waits for it leaves."""

    @functools.wraps(function)
    def run(*values: Any) -> Any:
        with _caller():
            return function(*values)

    return run


def _leavable_answers(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Do the same for a function that gives one answer after another, each in a thread of its own."""

    @functools.wraps(function)
    def run(*values: Any) -> Iterator[Any]:
        with contextlib.closing(function(*values)) as answers:
            while True:
                with _caller():
                    answer = next(answers, None)
                if answer is None:
                    return
                yield answer

    return run


@contextlib.contextmanager
def _caller() -> Iterator[None]:
    """Work for the client whose request Gradio answers in this thread; one who has left is told nothing."""
    request = LocalContext.request.get(None)
    scope = getattr(getattr(request, "request", request), "scope", {})
    once = [*filter(None, (LocalContext.event_id.get(None), scope.get(CALL)))]
    page = [*filter(None, (getattr(request, "session_hash", None),))]
    place: Place = scope.get(PLACE) or Place()
    token = PLACED.set(place)
    try:
        with CALLERS.waiting(*once, *page, once=once):
            yield
    except CancelledError as err:
        raise gr.Error("The client has left.", title="Cancelled", print_exception=False) from err
    finally:
        PLACED.reset(token)
        place.drop()


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

    def caption_upload(self, upload: dict[str, Any] | None, runs: Runs, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Caption a photo that was uploaded, pasted or taken, and free the box for the next."""
        if upload is None:  # the photo was cleared, or another source of photos was chosen
            yield (gr.skip(),) * 3
            return
        path = upload.get("path") if isinstance(upload, dict) else None
        # The door before the page refuses such paths too; a page may stand without a door.
        if not isinstance(path, str) or not is_upload(path, UPLOADS):
            yield None, _error("This is not an uploaded photo."), gr.skip()
            return
        name = client_name(upload.get("orig_name"), path)
        box: Any = None
        for answer in self._answers(runs, path, name, values):
            yield (box, *answer)
            box = gr.skip()

    def caption_shown(self, runs: Runs, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Caption the photo on the stage again."""
        if runs.shown is None:
            yield _error("Choose a photo first."), gr.skip()
            return
        path, name, _ = runs.shown
        yield from self._answers(runs, path, name, values, again=True)

    def caption_example(self, event: gr.EventData, runs: Runs, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Caption an example, which is named by its place alone."""
        index = _told(event, "index")
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(self._examples.paths):
            yield _error("There is no such example."), gr.skip()
            return
        path = self._examples.paths[index]
        yield from self._answers(runs, str(path), path.name, values, example=index)

    def score_own(self, runs: Runs, event: gr.EventData) -> Message:
        """Score the sentence that the user typed."""
        if runs.shown is None:
            return _error("Choose a photo first.")
        path, name, run = runs.shown
        return tell_score(self._model, path, name, str(_told(event, "sentence")), run=run)

    def _answers(
        self, runs: Runs, path: str, name: str, values: tuple[Any, ...], **how: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Give the values of (stage, compare), one after another, until a later run takes the stage."""
        run = new_run()
        answers = self._all_answers(path, name, values, run, **how)
        try:
            while runs.goes_on(run):
                answer = next(answers, None)
                if answer is None:
                    return
                # Asked again: a photo that takes long to open must not take the stage back from a later one.
                if runs.goes_on(run, (path, name, run)):
                    yield answer
        except CancelledError:
            if runs.goes_on(run):  # the client has left
                raise
        except Exception:  # a fault of ours: its trace belongs into the log, and a sentence on the page
            LOG.exception("a photo could not be captioned")
            yield {"run": run, "error": FAULT, "keep": False}, gr.skip()
            return
        yield gr.skip(), gr.skip()  # without any answer Gradio would empty the stage

    def _all_answers(
        self,
        path: str,
        name: str,
        values: tuple[Any, ...],
        run: int,
        *,
        example: int | None = None,
        again: bool = False,
    ) -> Iterator[tuple[Any, ...]]:
        compared: Any = {"run": run, "models": None}  # what stands there is of another search
        message: Message = {}
        for message in self._messages(path, name, values, example, run):
            # Of another photo nothing may stay beside an error.
            yield {**message, "keep": again and message.get("keep", False)}, compared
            compared = gr.skip()
        if message.get("phase") == "done":
            options = self._search_options(values)
            for columns in tell_compare(self._others, path, options, message, own_name=self._name):
                yield gr.skip(), columns

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
        given = dict(zip(self._options, values, strict=True))
        # Greedy search finds one caption; the page's own 3 is nobody's wish.
        if given.get("method") == "greedy" and given.get("n_best") == OPTION_VALUES["n_best"]:
            given["n_best"] = 1
        return search_options(given)


def _error(text: str) -> Message:
    return {"run": new_run(), "error": text, "keep": False}


def _told(event: gr.EventData, name: str) -> Any:
    """Return what the browser says of an event, which may be anything, or nothing."""
    data = event._data
    return data.get(name) if isinstance(data, dict) else None


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


def start(
    page: gr.Blocks,
    *,
    host: str,
    port: int,
    door: Door | None = None,
    users: Sequence[tuple[str, str]] | None = None,
    mcp: bool = False,
    trust_proxy: str = "",
) -> str:
    """Serve the page from threads of this process, until `page.close()`.

    Args:
        page: what `build_app` made.
        host: address to listen on; 127.0.0.1 is reached from this machine alone.
        port: to listen on.
        door: the service, which says who is let in and counts; by default everyone is, within the usual limits.
        users: names and passwords of those who may come in; None asks for none.
        mcp: whether the endpoints are tools of the Model Context Protocol too.
        trust_proxy: addresses of proxies, between commas, that are believed whom a request comes from.

    Returns:
        Where the page is.

    Raises:
        OSError: when the port is taken.
    """
    door = door or OpenDoor()
    guard: dict[str, Any] = {"uploads": UPLOADS, "endpoints": NAMES, "users": users}
    guard |= {"known": functools.partial(_is_known, page), "forget": functools.partial(_forget, page)}
    picture = next(iter(sorted(EXAMPLES.glob("*.jpg"))), None)
    guard["picture"] = None if picture is None else picture.read_bytes()
    if os.getenv("SPACE_ID"):  # Hugging Face shows a Space inside a page of its own
        guard["frames"] = "'self' https://huggingface.co"
    guard |= {"leave": CALLERS.leave, "give_up": functools.partial(_give_up, page), "calls": _calls(page)}
    before = Middleware(ServiceMiddleware, service=door, **guard)
    os.environ["FORWARDED_ALLOW_IPS"] = trust_proxy  # Gradio's server reads it, and believes this machine otherwise
    for module in (gradio.routes, gradio.queueing):
        module.traceback = faults.Traces()  # type: ignore[attr-defined]
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        # All that a variable could open is said here.
        share=False,
        run_history=False,
        enable_monitoring=False,
        allowed_paths=[],
        ssr_mode=False,
        num_workers=0,
        pwa=False,
        mcp_server=mcp,
        auth=None if users is None else list(users),
        max_file_size=door.limits.max_upload_bytes,
        # Whoever waits for the model holds a thread.
        max_threads=door.limits.max_queue + door.limits.max_batch + 16,
        state_session_capacity=MAX_SESSIONS,
        app_kwargs={"middleware": [before]},
        footer_links=[],
        theme=_theme(),
        css=read("page.css"),
    )
    if mcp:
        server: Any = page.mcp_server_obj
        server.postprocess_output_data = tool_contents
        handlers = server.mcp_server.request_handlers
        server.mcp_server.request_handlers = {
            kind: handle for kind, handle in handlers.items() if kind.__name__ in tools.REQUESTS
        }
    return str(url)


def _is_known(page: gr.Blocks, cookies: str) -> bool:
    """Return whether cookies are those of a login, as Gradio reads them."""
    jar = parse_cookies(cookies)
    tokens = [jar.get(f"access-token-{kind}{page.app.cookie_id}") for kind in ("", "unsecure-")]
    return next(filter(None, tokens), None) in page.app.tokens


def _calls(page: gr.Blocks) -> dict[str | int, int]:
    """Return how many values each endpoint, by its name, and each event of the page, by its number, takes."""
    found: dict[str | int, int] = {number: len(function.inputs) for number, function in page.fns.items()}
    return found | {
        str(function.api_name): len(function.inputs)
        for function in page.fns.values()
        if function.api_visibility != "private"
    }


def _give_up(page: gr.Blocks, session: str, call: str) -> None:
    """Drop a call whose answer nobody fetches, and its answer."""
    CALLERS.leave(call)
    queue = page._queue
    if (event := queue.event_ids_to_events.get(call)) is not None:
        event.alive = False  # it answers nobody any more
    calls = queue.pending_event_ids_session.get(session, set())
    calls.discard(call)
    if not calls:
        queue.pending_event_ids_session.pop(session, None)
        queue.pending_messages_per_session.pop(session, None)
    if session == call:  # a session that a client named may be a page that is being looked at
        _forget(page, session)


def _forget(page: gr.Blocks, session: str) -> None:
    """Drop what Gradio keeps of a session; a call by HTTP alone is one of its own, named like the call."""
    holder = page.app.state_holder
    holder.session_data.pop(session, None)
    holder.time_last_used.pop(session, None)
    # Gradio keeps an empty set for every call there ever was, and looks through all of them when it is asked for an
    # answer.
    queue = page._queue
    if not queue.pending_event_ids_session.get(session):
        queue.pending_event_ids_session.pop(session, None)
        queue.pending_messages_per_session.pop(session, None)


def _theme() -> gr.themes.Base:
    # System fonts: nothing to fetch. The default theme's greys for lesser text are too faint.
    return gr.themes.Default(
        primary_hue="indigo", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


def serve(settings: serving.ServeSettings) -> None:
    """Load the models and serve the page until SIGTERM or Ctrl-C; open requests are answered first.

    Args:
        settings: what to serve, where, to whom.

    Raises:
        CheckpointError: when a model cannot be loaded.
        ConfigError: for a model that is no path.
        OSError: when nothing can listen there.
        KeyboardInterrupt: after Ctrl-C, when all is closed.
    """
    port = int(settings.port)
    serving.require_free(settings.host, port)
    with serving.Stopping() as stopping, contextlib.ExitStack() as closing:
        service, others = serving.open_services(settings, closing)
        examples = find_examples(service)
        name = serving.title(settings.model, 1, service.captioner.config.decoder)
        page = build_app(service, others=others, name=name, examples=examples)
        how: Any = {"users": settings.users, "mcp": settings.mcp, "trust_proxy": settings.trust_proxy}
        url = start(page, host=settings.host, port=port, door=service, **how)
        faults.write_places_only()  # after the start, in which Gradio's server sets up its own log
        closing.callback(page.close, verbose=False)
        closing.enter_context(serving.swept(UPLOADS))
        threading.Thread(target=examples.get_ready, name="examples", daemon=True).start()
        say(f"{TITLE} is at {url} (Ctrl-C stops it)")
        interrupted = stopping.wait()
        serving.finish(service)
    if interrupted:
        raise KeyboardInterrupt


def main() -> None:
    """Serve the page as the options of the command line say; the same as `captioner serve`."""
    from captioner.cli_serve import main as run

    run()


if __name__ == "__main__":
    main()
