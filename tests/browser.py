"""A real headless Chromium, and what a page did in it."""

import contextlib
import shutil
import socket
from urllib.parse import urlsplit

import pytest

# Generous: a machine may be busy with other work. Nothing waits longer than it must.
TIMEOUT_MS = 180_000
LOCAL_SCHEMES = ("data", "blob")
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


class Watch:
    """Notes every request, error and exception of a page.

    Args:
        page: a Playwright page that has loaded nothing yet.
    """

    def __init__(self, page):
        self.requests, self.errors = [], []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def strangers(self):
        """Return the requests that went anywhere but to this machine."""
        urls = map(urlsplit, self.requests)
        return [
            url.geturl()
            for url in urls
            if url.scheme not in LOCAL_SCHEMES and url.hostname not in ("127.0.0.1", "localhost")
        ]
