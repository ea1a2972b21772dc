"""The page: a photo in, its caption out; choose a word and see where the model looked.

    photo ──event──▶ describe() ──▶ plain values, sent once ──▶ STAGE_JS in the browser: words, maps, keys

`python app.py` serves it on this machine. Nothing else in the project imports gradio.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioner import Caption, Captioner, CaptionerError, ConfigError
from captioner.images import open_picture
from captioner.overlay import COLOUR_MAP, OPACITY

# Gradio reads it when it is imported: it reports nothing about this page to anyone.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
import gradio as gr

EXAMPLES = Path(__file__).resolve().parent / "examples"
DISPLAY_SIDE_PX = 1024
THUMBNAIL_SIDE_PX = 192
MAX_UPLOAD = "20mb"
MAX_BEAM_SIZE = 10

TITLE = "Captioner"
INTRODUCTION = f"""# {TITLE}
A sentence for your photo, and for every word the place where the model looked."""
PLACEHOLDER = "Drop a photo here\nor click to choose one"
BEAM_SIZE_HELP = "How many sentences the search follows at once."
N_BEST_HELP = "How many captions to show; at most the beam size."
PRIVACY = "Your photo goes to the computer that runs this page, and nowhere else."

# --- What the browser draws. `gr.HTML` reads {{...}} and ${...} as templates; neither may occur here. ---

STRIP_HTML = '<h2 id="examples">Or one of these</h2><div class="strip" role="group" aria-labelledby="examples"></div>'

STRIP_CSS = """
h2 { margin: 0 0 .5rem; font-size: .9rem; font-weight: 400; color: var(--body-text-color-subdued); }
.strip { display: flex; flex-wrap: wrap; gap: .5rem; }
.strip button { width: 4.5rem; height: 4.5rem; padding: 0; border: 0; border-radius: 10px; overflow: hidden;
  cursor: pointer; background: var(--background-fill-secondary); }
.strip button:hover img { transform: scale(1.08); }
.strip button:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 2px; }
.strip img { display: block; width: 100%; height: 100%; object-fit: cover; transition: transform .2s; }
"""

STRIP_JS = """
element.querySelector(".strip").append(...props.value.map((example, index) => {
  const button = Object.assign(document.createElement("button"), { type: "button", title: example.name });
  button.append(Object.assign(document.createElement("img"), { src: example.picture, alt: example.name }));
  button.addEventListener("click", () => trigger("click", { index }));
  return button;
}));
"""

STAGE_HTML = """
<section class="stage" aria-label="Result">
  <p data-part="start" class="start">Choose a photo, and its caption appears here.</p>
  <p data-part="error" class="error" role="alert" hidden></p>
  <div data-part="result" hidden>
    <div data-part="frame" class="frame">
      <img data-part="picture" alt="">
      <canvas data-part="map" aria-hidden="true" hidden></canvas>
    </div>
    <div data-part="words" class="words" role="group" aria-label="The caption, word by word"></div>
    <div class="line">
      <span data-part="note" role="status"></span>
      <span class="legend" aria-hidden="true">less <i data-part="scale"></i> more</span>
    </div>
    <p data-part="sure" class="sure" role="note" hidden></p>
    <div class="captions">
      <h2>Captions found, best first</h2>
      <ol data-part="captions"></ol>
      <p>The number is the mean log-probability of a word: the closer to 0, the surer the model.</p>
    </div>
  </div>
</section>
"""

STAGE_CSS = """
[hidden] { display: none !important; }
.stage { color: var(--body-text-color); }
.start { display: grid; place-items: center; min-height: 22rem; padding: 2rem; text-align: center;
  border: 1px dashed var(--border-color-primary); color: var(--body-text-color-subdued); }
.error { padding: 1rem 1.25rem; border: 1px solid var(--error-border-color); overflow-wrap: anywhere;
  background: var(--error-background-fill); color: var(--error-text-color); }
.start, .error, .frame { border-radius: 12px; }
.frame { position: relative; margin: 0 auto; overflow: hidden;
  width: min(100%, 68vh * var(--aspect)); aspect-ratio: var(--aspect); }
.frame img, .frame canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
.words { display: flex; flex-wrap: wrap; justify-content: center; gap: .4rem .3rem; margin: 1.25rem 0 .75rem;
  scroll-margin: 1rem; }
.words button { padding: .3rem .6rem; border: 1px solid var(--border-color-primary); border-radius: 10px;
  cursor: pointer; background: var(--background-fill-secondary); color: inherit; line-height: 1.25; }
.words button b { display: block; font-size: 1.35rem; font-weight: 600; }
.words button small { font-size: .75rem; color: var(--body-text-color-subdued); }
.words button:hover { border-color: var(--color-accent); }
.words button:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 2px; }
.words button[aria-pressed=true] { background: #4338ca; border-color: #4338ca; }
.words button[aria-pressed=true], .words button[aria-pressed=true] small { color: #fff; }
.line { display: flex; flex-wrap: wrap; justify-content: center; align-items: start; gap: .25rem 1.5rem;
  min-height: 3.2em; font-size: .9rem; color: var(--body-text-color-subdued); text-align: center; }
.legend { white-space: nowrap; }
.legend i { display: inline-block; width: 6rem; height: .6rem; margin: 0 .25rem; border-radius: .3rem; }
.sure { max-width: 42rem; margin: .5rem auto 0; font-size: .9rem; text-align: center; }
.captions { margin-top: .75rem; padding-top: 1rem; border-top: 1px solid var(--border-color-primary); }
.captions h2 { margin-bottom: .5rem; font-size: 1rem; font-weight: 600; }
.captions ol { padding: 0; list-style: none; }
.captions li { display: flex; justify-content: space-between; gap: 1.5rem; padding: .3rem 0; }
.captions p { margin-top: .5rem; font-size: .8rem; }
.captions p, .captions li span:last-child { color: var(--body-text-color-subdued); }
"""

STAGE_JS = """
const MAP_SIDE_PX = 640;
const part = (name) => element.querySelector("[data-part=" + name + "]");
const make = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
const percent = (p) => (p < 0.01 ? "<1%" : Math.round(100 * p) + "%");
const buttons = () => Array.from(part("words").children);

// As captioner.geometry.grid_to_picture: bilinear between the centres of the cells, constant beyond them.
function taps(cells, pixels) {
  return Array.from({ length: pixels }, (_, pixel) => {
    const position = ((pixel + 0.5) * cells) / pixels - 0.5;
    const low = Math.min(Math.max(Math.floor(position), 0), cells - 1);
    return [low, Math.min(low + 1, cells - 1), Math.min(Math.max(position - low, 0), 1)];
  });
}

// As captioner.overlay.tint; here the browser does the blending.
function draw(map) {
  const canvas = part("map");
  const { width, height } = props.value;
  const scale = MAP_SIDE_PX / Math.max(width, height);
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  const columns = taps(map[0].length, canvas.width);
  let at = 0;
  for (const [top, bottom, down] of taps(map.length, canvas.height)) {
    for (const [left, right, across] of columns) {
      const upper = map[top][left] * (1 - across) + map[top][right] * across;
      const lower = map[bottom][left] * (1 - across) + map[bottom][right] * across;
      const strength = upper * (1 - down) + lower * down;
      pixels.data.set(props.palette[Math.min(Math.floor(strength * 256), 255)], at);
      pixels.data[at + 3] = Math.round(255 * props.opacity * (0.35 + 0.65 * strength));
      at += 4;
    }
  }
  context.putImageData(pixels, 0, 0);
}

function choose(index) {
  buttons().forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
  part("map").hidden = index < 0;
  element.querySelector(".legend").hidden = index < 0;
  if (index < 0) {
    part("note").textContent = "Choose a word to see where the model looked when it wrote it.";
    return;
  }
  const word = props.value.words[index];
  draw(word.map);
  part("note").textContent =
    "Where the model looked for \\u201c" + word.text + "\\u201d (" + percent(word.probability) + " sure)";
}

function render() {
  const value = props.value || {};
  part("start").hidden = Boolean(value.error || value.picture);
  part("error").hidden = !value.error;
  part("error").textContent = value.error || "";
  part("result").hidden = !value.picture;
  if (!value.picture) return;
  part("frame").style.setProperty("--aspect", value.width / value.height);
  Object.assign(part("picture"), { src: value.picture, alt: value.captions[0].text });
  part("words").replaceChildren(...value.words.map((word) => {
    const button = make("button", "");
    button.type = "button";
    button.append(make("b", word.text), make("small", percent(word.probability)));
    return button;
  }));
  part("captions").replaceChildren(...value.captions.map((caption) => {
    const item = make("li", "");
    item.append(make("span", caption.text), make("span", caption.score.toFixed(2).replace("-", "\\u2212")));
    return item;
  }));
  part("sure").hidden = value.confidence === null;
  part("sure").textContent = value.sure;
  choose(-1);
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  part("words").scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
}

part("scale").style.background = "linear-gradient(90deg," + props.palette.map((c) => "rgb(" + c + ")") + ")";
part("words").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) choose(button.getAttribute("aria-pressed") === "true" ? -1 : buttons().indexOf(button));
});
part("words").addEventListener("keydown", (event) => {
  const all = buttons();
  const here = all.indexOf(event.target.closest("button"));
  const to = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: all.length - 1 }[event.key];
  if (event.key === "Escape") choose(-1);
  if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const index = (to + all.length) % all.length;
  all[index].focus();
  choose(index);
});
watch("value", render);
render();
"""

PAGE_CSS = """
.gradio-container { width: 100%; max-width: 1200px !important; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
.privacy p { font-size: .85rem; color: var(--body-text-color-subdued); }
"""


# --- What the server says ---


def describe(captioner: Captioner, path: str, name: str, *, beam_size: int, n_best: int) -> dict[str, Any]:
    """Caption a photo and say it in the plain values that `STAGE_JS` draws.

    Args:
        captioner: the model.
        path: of the photo on this machine; never part of the answer.
        name: what the user calls the photo.
        beam_size: hypotheses kept at every step of the search.
        n_best: captions to find.

    Returns:
        {"error": message} when the photo or an option is of no use, otherwise {"picture", "width", "height",
        "words", "captions", "confidence", "sure"}: a data URI; the size of the upright original in pixels; each word
        with its probability and its map, [rows, columns], scaled to a peak of 1; captions and scores, best first; the
        confidence, and what it means.
    """
    if isinstance(beam_size, int) and beam_size > MAX_BEAM_SIZE:
        return {"error": f"beam_size must be at most {MAX_BEAM_SIZE} on this page, got {beam_size}"}
    try:
        picture = open_picture(path, name=name, side_px=DISPLAY_SIDE_PX)
        caption = captioner.caption(path, beam_size=beam_size, n_best=n_best)
    except CaptionerError as err:
        return {"error": str(err).replace(path, name)}
    height_px, width_px = picture.full_hw_px
    return {
        "picture": _data_uri(picture.image, DISPLAY_SIDE_PX),
        "width": width_px,
        "height": height_px,
        "words": _words(caption),
        "captions": [{"text": found.text, "score": found.score} for found in (caption, *caption.alternatives)],
        "confidence": caption.confidence,
        "sure": _sure(caption.confidence),
    }


def _sure(confidence: float | None) -> str:
    """Say a confidence in words; of dev captions the bundled model's mean is 0.49, of other worlds 0.10."""
    if confidence is None:
        return ""
    percent = f"Confidence {confidence:.0%}"
    if confidence < 0.15:
        return f"{percent}: this caption is probably wrong. The picture may be unlike those the model has seen."
    if confidence < 0.35:
        return f"{percent}: the model is unsure of this caption; look at the photo before you use it."
    return f"{percent}: the chance that this is one of the model's better captions."


def _words(caption: Caption) -> list[dict[str, Any]]:
    return [
        {
            "text": word.text,
            "probability": round(word.probability, 4),
            "map": (word.attention.astype(np.float64) / float(word.attention.max())).round(4).tolist(),
        }
        for word in caption.words
    ]


def _data_uri(image: Image.Image, side_px: int) -> str:
    small = image.copy()
    small.thumbnail((side_px, side_px))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _palette() -> list[list[int]]:
    """Return the colours of the maps, from weak to strong: 256 times red, green, blue."""
    import matplotlib

    colours = matplotlib.colormaps[COLOUR_MAP](np.arange(256))[:, :3] * 255
    return [[round(float(value)) for value in colour] for colour in colours]


# --- The page ---


def build_app(captioner: Captioner) -> gr.Blocks:
    """Build the page.

    Args:
        captioner: what captions the photos.

    Returns:
        The page; `start` serves it.

    Raises:
        ImageError: when a photo of the examples cannot be read.
    """
    examples = sorted(EXAMPLES.glob("*.jpg"))  # none lie beside an installed copy

    def caption_shown(shown: tuple[str, str] | None, beam_size: int, n_best: int) -> dict[str, Any]:
        if shown is None:
            return {"error": "Choose a photo first."}
        path, name = shown
        return describe(captioner, path, name, beam_size=beam_size, n_best=n_best)

    def caption_upload(upload: dict[str, Any] | None, *options: int) -> tuple[Any, Any, Any]:
        if upload is None:  # the photo was cleared, or another source of photos was chosen
            return gr.skip(), gr.skip(), gr.skip()
        shown = (str(upload["path"]), str(upload["orig_name"]))
        return None, shown, caption_shown(shown, *options)

    def caption_example(beam_size: int, n_best: int, event: gr.EventData) -> tuple[Any, Any]:
        path = examples[event.index]
        shown = (str(path), path.name)
        return shown, caption_shown(shown, beam_size, n_best)

    page = gr.Blocks(title=TITLE)
    with page:
        gr.Markdown(INTRODUCTION)
        shown = gr.State(None)  # path and name of the photo on the stage
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                photo = gr.Image(show_label=False, height=200, placeholder=PLACEHOLDER, buttons=[])
                strip = _strip(examples)
                options, again = _search_options()
            with gr.Column(scale=3, min_width=300):
                stage = _stage()
        gr.Markdown(PRIVACY, elem_classes="privacy")
        # "multiple": a photo that is chosen while another is being captioned waits its turn and is not lost.
        how: Any = {"trigger_mode": "multiple", "show_progress_on": stage, "api_visibility": "private"}
        # Not preprocessed: Gradio would open the photo itself, in fewer formats and with messages of its own.
        # That the file is one that was uploaded here has been checked before.
        photo.input(caption_upload, [photo, *options], [photo, shown, stage], preprocess=False, **how)
        again.click(caption_shown, [shown, *options], stage, **how)
        strip.click(caption_example, options, [shown, stage], **how)
    return page


def _search_options() -> tuple[list[gr.Slider], gr.Button]:
    with gr.Accordion("Search options", open=False):
        beam_size = gr.Slider(1, MAX_BEAM_SIZE, 3, step=1, label="Beam size", info=BEAM_SIZE_HELP)
        n_best = gr.Slider(1, MAX_BEAM_SIZE, 3, step=1, label="Captions", info=N_BEST_HELP)
        return [beam_size, n_best], gr.Button("Caption again")


def _strip(examples: list[Path]) -> gr.HTML:
    thumbnails = [
        {
            "name": path.stem.replace("-", " ").replace("_", " "),
            "picture": _data_uri(open_picture(path, side_px=THUMBNAIL_SIDE_PX).image, THUMBNAIL_SIDE_PX),
        }
        for path in examples
    ]
    parts: Any = {"html_template": STRIP_HTML, "css_template": STRIP_CSS, "js_on_load": STRIP_JS}
    return gr.HTML(thumbnails, **parts, apply_default_css=False, visible=bool(examples))


def _stage() -> gr.HTML:
    parts: Any = {"html_template": STAGE_HTML, "css_template": STAGE_CSS, "js_on_load": STAGE_JS}
    return gr.HTML(None, **parts, apply_default_css=False, palette=_palette(), opacity=OPACITY)


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
    # System fonts: nothing to fetch. The default theme's grey for lesser text is too faint.
    theme = gr.themes.Default(
        primary_hue="indigo", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    ).set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300")
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
        css=PAGE_CSS,
    )
    return str(url)


def main() -> None:
    """Load the model and serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve the page: a photo in, its caption out.")
    parser.add_argument("--model", help="model folder or hub id 'user/name' (default: the bundled model)")
    # A platform that runs this file says by these variables where it expects the page.
    host, port = os.getenv("GRADIO_SERVER_NAME", "127.0.0.1"), os.getenv("GRADIO_SERVER_PORT", "7860")
    parser.add_argument("--host", default=host, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", default=port, help="port to listen on, 1 to 65535 (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        _serve(arguments.model, arguments.host, _port(arguments.port))
    except KeyboardInterrupt:
        parser.exit(130, "error: interrupted\n")
    except ConfigError as err:
        parser.exit(2, f"error: {' '.join(str(err).splitlines())}\n")
    except (CaptionerError, OSError) as err:
        parser.exit(1, f"error: {' '.join(str(err).splitlines())}\n")


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


def _serve(model: str | None, host: str, port: int) -> None:
    """Serve the page until it is interrupted."""
    _require_free(host, port)
    page = build_app(Captioner.load(model))
    url = start(page, host=host, port=port)
    try:
        sys.stdout.write(f"{TITLE} is at {url} (Ctrl-C stops it)\n")
        sys.stdout.flush()
        threading.Event().wait()  # Gradio's own waiting would end in status 0
    finally:
        page.close(verbose=False)


if __name__ == "__main__":
    main()
