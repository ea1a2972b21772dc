"""Who may come in: the page that asks for name and password, keys of tools, and how many guesses there are.

wrong password or key ──▶ counted for its address and its name ──▶ the next one over a limit: 429 with Retry-After
"""

from __future__ import annotations

import base64
import hmac
import math
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from urllib.parse import parse_qs

from captioner.exchange import Exchange, Refusal, neighbourhood
from captioner.page import read

GUESSES = 10
"""Wrong passwords that an address may send within the window."""
NAME_GUESSES = 100
"""Wrong passwords for one name, from all addresses together: more, so that one address keeps nobody out."""
WINDOW_S = 300.0
ADDRESSES_LIMIT = 10_000
"""Addresses, and names, that are remembered at a time; the one that guessed longest ago goes first."""

_USERNAME = re.compile(r'name="username"\r\n\r\n(.*?)\r\n', re.IGNORECASE)


class Guesses:
    """Counts the guesses of each address within a window of time that moves along. For one event loop, no threads.

    Args:
        most: guesses within the window.
        window_s: its length, seconds.
        clock: seconds that never run backwards.
    """

    def __init__(
        self, *, most: int = GUESSES, window_s: float = WINDOW_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._window_s, self._clock = most, window_s, clock
        self._times_s: OrderedDict[str, deque[float]] = OrderedDict()

    def enter(self, address: str) -> int | None:
        """Count a guess before it is looked at, so that many at once are no way around the limit.

        Args:
            address: where it comes from.

        Returns:
            None when it may be looked at; otherwise the seconds until the next one may.
        """
        now_s, name = self._clock(), neighbourhood(address)
        times_s = self._times_s.setdefault(name, deque())
        while times_s and times_s[0] <= now_s - self._window_s:
            times_s.popleft()
        if len(times_s) >= self._most:
            return max(1, math.ceil(times_s[0] + self._window_s - now_s))
        times_s.append(now_s)
        self._times_s.move_to_end(name)
        if len(self._times_s) > ADDRESSES_LIMIT:
            self._times_s.popitem(last=False)
        return None

    def forgive(self, address: str) -> None:
        """Take back the last guess, which was right, or none at all; those before it still count.

        Args:
            address: where it came from.
        """
        name = neighbourhood(address)
        if times_s := self._times_s.get(name):
            times_s.pop()
            if not times_s:
                del self._times_s[name]


class Logins:
    """Asks for a login where there are users.

    Args:
        users: names and passwords; None lets everyone in.
        known: tells from the cookies of a request whether its sender has logged in. None leaves it to what is behind
            to show a page that asks for a login.
        guesses: counts wrong ones.
    """

    def __init__(
        self,
        users: Iterable[tuple[str, str]] | None,
        *,
        known: Callable[[str], bool] | None = None,
        guesses: Guesses | None = None,
    ) -> None:
        self._keys = None if users is None else [base64.b64encode(":".join(user).encode()) for user in users]
        self._known = known
        self._guesses, self._names = guesses or Guesses(), Guesses(most=NAME_GUESSES)

    def asks(self, exchange: Exchange) -> bool:
        """Return whether the page that asks for a login stands in the place of the one that was asked for."""
        if self._keys is None or self._known is None or exchange.path != "/":
            return False
        return exchange.method in ("GET", "HEAD") and not self._known(exchange.header("cookie"))

    def require_known(self, exchange: Exchange) -> None:
        """Ask for a login before anything is read of what a stranger sends.

        Args:
            exchange: that brings it.

        Raises:
            Refusal: 401.
        """
        if self._keys is not None and self._known is not None and not self._known(exchange.header("cookie")):
            raise Refusal(401, "NotAuthenticated", "log in first")

    async def show(self, exchange: Exchange) -> None:
        """Answer with the page that asks for a login."""
        await exchange.respond(200, read("login.html").encode(), "text/html; charset=utf-8")

    def begin(self, exchange: Exchange, user: str) -> None:
        """Count a guess.

        Args:
            exchange: that brings it.
            user: whose password is guessed.

        Raises:
            Refusal: 429, when the address had too many, or the name.
        """
        if self._keys is None:
            return
        seconds = self._guesses.enter(exchange.address())
        if seconds is None:
            seconds = self._names.enter(user)
        if seconds is not None:
            wait = f"{math.ceil(seconds / 60)} minutes" if seconds > 100 else f"{seconds} s"
            raise Refusal(429, "TooManyGuesses", f"Too many wrong passwords; try again in {wait}.", seconds)

    def forgive(self, exchange: Exchange, user: str) -> None:
        """Take a guess back that was right, or none.

        Args:
            exchange: that brought it.
            user: whose password it was.
        """
        self._guesses.forgive(exchange.address())
        self._names.forgive(user)

    def require_key(self, exchange: Exchange) -> None:
        """Ask a tool for name and password by HTTP Basic authentication (RFC 7617).

        Args:
            exchange: of the tool.

        Raises:
            Refusal: 401 without a right one, 429 after too many wrong ones.
        """
        if self._keys is None:
            return
        scheme, _, given = exchange.header("authorization").partition(" ")
        if scheme.lower() == "basic" and given.strip():
            user = _user_of_key(given.strip())
            self.begin(exchange, user)
            # Every key is compared, in a time that does not depend on what was given.
            right = [hmac.compare_digest(key, given.strip().encode()) for key in self._keys]
            if any(right):
                self.forgive(exchange, user)
                return
        raise Refusal(401, "NotAuthenticated", "send user and password by HTTP Basic authentication")


def user_of(form: bytes) -> str:
    """Return the name in a login.

    Args:
        form: as browsers and clients send it.

    Returns:
        The name; nothing where it is not said once, and plainly: all such logins count as one name's.
    """
    text = form.decode("utf-8", errors="replace")
    found = [*_USERNAME.findall(text), *parse_qs(text).get("username", [])]
    return found[0].strip() if len(found) == 1 else ""


def _user_of_key(given: str) -> str:
    try:
        return base64.b64decode(given, validate=True).partition(b":")[0].decode(errors="replace")
    except ValueError:
        return ""
