"""Make the screenshots of the README again: `python docs/screenshots.py` (needs the dev packages and a Chromium)."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))
# Example, which of the captions found, word of it, whether on a phone.
SHOTS = {
    "page.jpg": ("photographer", "with a camera", "camera", False),
    "page-phone.jpg": ("photographer", "with a camera", "camera", True),
}


def main() -> None:
    """Serve the page with the bundled model, and photograph it."""
    import app
    from captioner import Captioner

    page = app.build_app(Captioner.load())
    url = app.start(page, host="127.0.0.1", port=7861)
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for name, shot in SHOTS.items():
                _photograph(browser, url, FOLDER / name, *shot)
            browser.close()
    finally:
        page.close(verbose=False)


def _photograph(browser: Browser, url: str, path: Path, example: str, caption: str, word: str, phone: bool) -> None:
    size = {"width": 390, "height": 844} if phone else {"width": 1100, "height": 868}
    page = browser.new_page(viewport=size, color_scheme="dark" if phone else "light")  # type: ignore[arg-type]
    page.goto(url)
    page.get_by_role("button", name=example).click()
    page.wait_for_selector("[data-part=rest]:not(.waiting) .captions button")
    page.locator(".captions button", has_text=caption).click()
    page.locator(".stage .words button", has_text=word).click()
    page.locator(".stage" if phone else "body").first.evaluate("element => element.scrollIntoView()")
    page.wait_for_function("Array.from(document.images).every(image => image.complete)")
    picture = path.with_suffix(".png")
    page.screenshot(path=picture)
    with Image.open(picture) as shot:
        shot.convert("RGB").save(path, quality=88)
    picture.unlink()
    page.close()


if __name__ == "__main__":
    main()
