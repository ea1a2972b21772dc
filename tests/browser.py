"""A real headless Chromium, what a page did in it, and what a user does there."""

import base64
import contextlib
import io
import os
import shutil
import socket
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

import app

# Generous: a machine may be busy with other work. Nothing waits longer than it must.
TIMEOUT_MS = 180_000
LOCAL_SCHEMES = ("data", "blob")
WIDE, TALL, TURNED = "wide", "tall", "turned by EXIF"
# Stored width and height, EXIF orientation.
SHAPES = {WIDE: ((600, 200), 1), TALL: ((200, 600), 1), TURNED: ((640, 480), 6)}
FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@contextlib.contextmanager
def chromium():
    """Yield a running browser; skip the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        except playwright.Error as err:
            pytest.skip(f"no Chromium to drive: {str(err).splitlines()[0]}")
        yield browser
        browser.close()


def free_port():
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(captioner, **options):
    """Serve a page; return it, to be closed, and its url."""
    page = app.build_app(captioner, **options)
    return page, app.start(page, host="127.0.0.1", port=free_port())


class Watch:
    """Notes every request, error and exception of a page.

    Args:
        page: a Playwright page that has loaded nothing yet.
    """

    def __init__(self, page):
        self.requests, self.errors = [], []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note(self, message):
        if message.type == "error":
            self.errors.append(message.text)

    def strangers(self):
        """Return the requests that went anywhere but to this machine."""
        urls = map(urlsplit, self.requests)
        return [
            url.geturl()
            for url in urls
            if url.scheme not in LOCAL_SCHEMES and url.hostname not in ("127.0.0.1", "localhost")
        ]


# --- What a user does ---


def upright_hw(shape):
    """Return the height and width of a photo as a person sees it."""
    (width, height), orientation = SHAPES[shape]
    return (width, height) if orientation == 6 else (height, width)


def save_photo(path, shape, *, grey=False):
    """Write a photo of noise, or of one grey, and return its path."""
    size_wh_px, orientation = SHAPES[shape]
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(np.full_like(noise, 128) if grey else noise).resize(size_wh_px).save(path, exif=exif)
    return path


def upload(page, path):
    page.set_input_files("input[type=file]", path)


def wait_for_captions(page):
    page.wait_for_selector("[data-part=rest]:not(.waiting) .captions button")


def upload_photo(page, path):
    upload(page, path)
    wait_for_captions(page)


def word(page, text):
    return page.locator(".stage .words button", has_text=text)


def pressed(page, group=".stage .words"):
    return [button.get_attribute("aria-pressed") == "true" for button in page.locator(f"{group} button").all()]


def decoded(data_uri):
    """Return the pixels of a picture in a data URI, [height, width, red green blue alpha]."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data_uri.partition(",")[2]))).convert("RGBA"))


def screenshot(page, name):
    if folder := os.environ.get("CAPTIONER_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
