"""A page that is served, and a browser that visits it: fixtures shared by the tests of the page.

A plugin of pytest: the test files name it in `pytest_plugins`. One browser serves them all, and one server those that
hold nothing back.
"""

import contextlib
import threading
from types import SimpleNamespace

import pytest
from browser import TIMEOUT_MS, Watch, chromium, save_photo, serve
from pointing import PointingCaptioner

import app

WAIT_S = TIMEOUT_MS / 1000


class Gate:
    """Holds back what a model finds, one thing after another, until it is opened."""

    def __init__(self):
        self._tickets = threading.Semaphore(0)
        self._opened = False

    def __call__(self, picture):
        if not self._opened and not self._tickets.acquire(timeout=WAIT_S):
            raise TimeoutError("the test has let nothing through")

    def let_through(self, things):
        self._tickets.release(things)

    def open(self):
        self._opened = True
        self._tickets.release(1000)  # whoever still waits


@contextlib.contextmanager
def opened(examples, captioner):
    """Serve a page with two models; yield its url."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "EXAMPLES", examples)
        page, url = serve(captioner, others={"another model": PointingCaptioner()}, name="this model")
    try:
        yield url
    finally:
        page.close(verbose=False)


@pytest.fixture(scope="session")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    for shape in ("wide", "tall"):
        save_photo(folder / f"a_{shape}-one.jpg", shape)
    return folder


@pytest.fixture(scope="session")
def url(browser, examples):
    with opened(examples, PointingCaptioner(confidence=0.08)) as url:
        yield url


@pytest.fixture
def gated(browser, examples):
    """A page whose model waits at a gate: its url and the gate.

    Each test has a page of its own. At a gate that tests share, a run that one of them left behind goes on, and would
    take what the next one lets through. It is to be asked for before `visit`, so that the browser leaves first.
    """
    gate = Gate()
    with opened(examples, PointingCaptioner(confidence=0.08, gate=gate)) as url:
        try:
            yield SimpleNamespace(url=url, gate=gate)
        finally:
            gate.open()


@pytest.fixture(scope="session")
def context(browser):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write", "camera"], accept_downloads=True)
    context.set_default_timeout(TIMEOUT_MS)
    yield context
    context.close()


@pytest.fixture
def visit(context):
    """Open a page that is watched: no request may leave the machine, no error may reach the console."""
    pages, watches = [], []

    def open_page(url, *, width=1280, height=900, colours="light", motion="reduce"):
        page = context.new_page()
        pages.append(page)
        watches.append(Watch(page))
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=colours, reduced_motion=motion)
        page.goto(url)
        page.wait_for_selector(".stage .start")
        return page

    yield open_page
    for page in pages:
        page.close()
    for watch in watches:
        assert watch.requests
        assert watch.strangers() == []
        assert watch.errors == []
