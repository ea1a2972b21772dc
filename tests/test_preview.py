"""Laws of the page's head: what others see of a link to it is ours, and nothing in it lies elsewhere."""

import re
from html import unescape

import pytest
from messages import END

from captioner import preview

pytest_plugins = ("asked",)
PAGE = b"""<!doctype html><html><head lang="en">
<meta charset="utf-8" />
<meta property="og:title" content="Gradio" />
<meta
    property="og:image"
    content="https://raw.githubusercontent.com/x.jpg"
/>
<meta name="twitter:image" content="https://raw.githubusercontent.com/x.jpg"/>
<link rel="preconnect" href="https://fonts.example" crossorigin="anonymous" />
<link rel="stylesheet" href="./theme.css" />
</head><body>a page</body></html>"""


def metas(page):
    """Return what the metas of a page say, by their names."""
    found = re.findall(r'<meta\s+(?:property|name)="([^"]+)"\s+content="([^"]*)"', page)
    return {name: unescape(value) for name, value in found}


def foreign(page, own):
    """Return the addresses in a page's tags that are not its own."""
    found = re.findall(r'(?:content|href|src)\s*=\s*"((?:https?:)?//[^"]*)"', page)
    return [address for address in found if not address.startswith(own)]


@pytest.fixture
def see(ask):
    """Ask for the page as somebody does who knows this server by some name."""

    def see(*headers, root="", picture=b"a jpeg", host=b"here:7860"):
        ask.middleware.picture = picture

        async def page(scope, receive, send):
            length = (b"content-length", str(len(PAGE)).encode())
            await send({"type": "http.response.start", "status": 200, "headers": [length]})
            await send({"type": "http.response.body", "body": PAGE[:100], "more_body": True})
            await send({"type": "http.response.body", "body": PAGE[100:], "more_body": True})
            await send(END)

        answer = ask("GET", "/", headers=headers, inner=page, root=root, host=host)
        assert answer.headers[b"content-length"] == str(len(answer.body)).encode()
        return answer.body.decode()

    return see


def test_a_link_to_the_page_is_shown_with_a_title_a_sentence_and_a_picture_of_ours(see):
    page = see()
    said = metas(page)
    assert (said["og:title"], said["og:description"]) == (preview.TITLE, preview.DESCRIPTION)
    assert said["og:image"] == "http://here:7860/preview.jpg"
    assert said["twitter:card"] == "summary_large_image"
    assert foreign(page, "http://here:7860") == []
    assert "./theme.css" in page
    assert page.endswith("</head><body>a page</body></html>")
    assert (
        metas(see((b"x-forwarded-proto", b"https"), root="/demo"))["og:image"] == "https://here:7860/demo/preview.jpg"
    )


@pytest.mark.parametrize("host", [b"", b"a b", b'"><script>', b"x/y", b"user@x"])
def test_a_name_that_is_none_is_repeated_nowhere(see, host):
    page = see(host=host)
    assert "og:image" not in metas(page)
    assert "<script" not in page
    assert metas(page)["twitter:card"] == "summary"


def test_without_a_picture_none_is_named(see, ask):
    assert "og:image" not in metas(see(picture=None))
    assert ask("GET", "/preview.jpg").body == b""  # what is behind says so
    ask.middleware.picture = b"a jpeg"
    answer = ask("GET", "/preview.jpg")
    assert (answer.status, answer.headers[b"content-type"], answer.body) == (200, b"image/jpeg", b"a jpeg")


def test_the_page_is_shown_inside_no_other_site(ask):
    assert ask("GET", "/").headers[b"content-security-policy"] == b"frame-ancestors 'self'"
