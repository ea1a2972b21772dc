"""A page with a login, in a real headless Chromium: who has logged in uses it, and who guesses is stopped."""

import pytest
from browser import TIMEOUT_MS, WIDE, Watch, free_port, save_photo, screenshot, upload_photo
from pointing import CELLS, PointingCaptioner

import app
from captioner import logins

pytestmark = pytest.mark.browser
pytest_plugins = ("app_pages",)
USERS = [("me", "secret"), ("you", "geheim")]


@pytest.fixture
def guarded(browser, examples):
    """The url of a page with a login; each test has its own, since the guesses of one would keep the next out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "EXAMPLES", examples)
        page = app.build_app(PointingCaptioner(confidence=0.08))
    yield app.start(page, host="127.0.0.1", port=free_port(), users=USERS)
    page.close(verbose=False)


@pytest.fixture
def stranger(browser):
    """A page of a browser that has never been here, and the watch over it."""
    context = browser.new_context()
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    page.emulate_media(reduced_motion="reduce")
    watch = Watch(page)
    yield page, watch
    context.close()
    assert watch.requests
    assert watch.strangers() == []


def log_in(page, user, password):
    page.get_by_label("Name").fill(user)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Log in").click()


def refusal(page):
    page.wait_for_function("() => document.querySelector('[role=alert]').textContent")
    return page.text_content("[role=alert]")


def test_after_the_login_photos_are_captioned_and_sentences_scored(guarded, stranger, tmp_path):
    page, watch = stranger
    page.goto(guarded)
    assert page.locator(".stage").count() == 0
    log_in(page, *USERS[1])
    page.wait_for_selector(".stage .start")
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    assert [each.text_content() for each in page.locator(".stage .words button b").all()] == list(CELLS)
    page.locator(".stage .words button", has_text="east").click()
    assert page.is_visible(".stage .frame canvas")
    page.get_by_label("Your own sentence").fill("a red dog")
    page.get_by_label("Your own sentence").press("Enter")
    page.wait_for_selector(".captions li:nth-child(4)")
    page.get_by_role("button", name="a tall one").click()
    page.wait_for_selector(".stage .frame[style*='--aspect: 0.333']")
    again = page.context.new_page()  # it is remembered; a reload would cut off what the first page still reads
    second = Watch(again)
    again.goto(guarded)
    again.wait_for_selector(".stage .start")
    assert watch.errors == second.errors == []
    assert second.strangers() == []


def test_the_login_is_done_by_keyboard_alone(guarded, stranger):
    page, watch = stranger
    page.goto(guarded)
    page.wait_for_selector("#username:focus")
    page.keyboard.type("me")
    page.keyboard.press("Tab")
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    page.wait_for_selector(".stage .start")
    assert watch.errors == []


def test_a_wrong_password_is_said_and_too_many_are_refused_with_the_time_to_wait(guarded, stranger):
    page, _ = stranger  # the browser itself notes every refusal as an error
    page.goto(guarded)
    for _ in range(logins.GUESSES):
        with page.expect_response("**/login") as answer:
            log_in(page, "me", "guess")
        assert answer.value.status == 400
        assert refusal(page) == "Name or password is wrong."
        page.wait_for_selector("#password:focus")
        assert page.input_value("#password") == ""
    with page.expect_response("**/login") as answer:
        log_in(page, *USERS[0])
    assert answer.value.status == 429
    assert int(answer.value.headers["retry-after"]) <= logins.WINDOW_S
    assert refusal(page) == "Too many wrong passwords; try again in 5 minutes."
    screenshot(page, "login-refused")
    page.reload()
    assert page.locator(".stage").count() == 0


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_login_fits_its_window_and_axe_finds_no_fault(guarded, stranger, width, colours):
    page, watch = stranger
    page.set_viewport_size({"width": width, "height": 844})
    page.emulate_media(color_scheme=colours)
    page.goto(guarded)
    assert page.title() == "Captioner: log in"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    screenshot(page, f"login-{width}-{colours}")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    assert [fault["id"] for fault in axe.Axe().run(page).response["violations"]] == []
    assert watch.errors == []
