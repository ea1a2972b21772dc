"""What others see of a link to the page: a title, a sentence and a picture of ours, served here.

Gradio's template names its own, by addresses elsewhere.
"""

from __future__ import annotations

import html
import re

from captioner.exchange import Exchange, Message

PATH = "/preview.jpg"
TITLE = "Captioner"
DESCRIPTION = "A sentence for your photo, and for every word the place where the model looked."

_METAS = re.compile(rb"""<meta\s+(?:property="og:|name="twitter:)[^>]*>\s*""")
_LINKS = re.compile(rb"""<link\s[^>]*href="(?:https?:)?//[^>]*>\s*""")
_HEAD = re.compile(rb"<head[^>]*>")
_HOST = re.compile(r"[\w.-]+(:\d+)?|\[[0-9a-fA-F:.]+\](:\d+)?", re.ASCII)


class PageAnswer:
    """Passes the page on with a preview of its own.

    Args:
        exchange: that asks for the page.
        picture: whether there is a picture at `PATH`.
    """

    def __init__(self, exchange: Exchange, *, picture: bool) -> None:
        self._exchange, self._picture = exchange, picture
        self._start: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        """Send a part of the answer, or keep it until the page is complete."""
        if message["type"] == "http.response.start" and message["status"] == 200:
            self._start = message
            return
        if self._start is None:
            await self._exchange.send(message)
            return
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        body = with_preview(self._body, self._address() if self._picture else None)
        kept = [(name, value) for name, value in self._start["headers"] if name.lower() != b"content-length"]
        length = (b"content-length", str(len(body)).encode())
        await self._exchange.send({**self._start, "headers": [*kept, length]})
        await self._exchange.send({"type": "http.response.body", "body": body})

    def _address(self) -> str | None:
        """Return where the picture is, as whoever asks knows this server: previews take no other address."""
        host, scope = self._exchange.header("host"), self._exchange.scope
        if not _HOST.fullmatch(host):
            return None
        given = self._exchange.header("x-forwarded-proto")
        scheme = given if given in ("http", "https") else str(scope.get("scheme", "http"))
        return f"{scheme}://{host}{str(scope.get('root_path', '')).rstrip('/')}{PATH}"


def with_preview(page: bytes, picture: str | None) -> bytes:
    """Return a page with a preview of ours in the place of its own, and without links to elsewhere.

    Args:
        page: HTML.
        picture: its address; None for none.

    Returns:
        The page.
    """
    said = {"og:type": "website", "og:title": TITLE, "og:description": DESCRIPTION}
    if picture is not None:
        said |= {"og:image": picture}
    card = "summary" if picture is None else "summary_large_image"
    metas = [f'<meta property="{name}" content="{html.escape(value)}">' for name, value in said.items()]
    metas += [f'<meta name="description" content="{DESCRIPTION}">', f'<meta name="twitter:card" content="{card}">']
    page = _LINKS.sub(b"", _METAS.sub(b"", page))
    return _HEAD.sub(lambda head: head[0] + "".join(metas).encode(), page, count=1)
