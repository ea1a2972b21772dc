"""The door before a page: who is let in, and who is still inside.

`captioner.asgi` asks it before every request; `captioner.service.Service` is one.
"""

from __future__ import annotations

import time
from typing import Protocol

from captioner.errors import ServiceError
from captioner.requests import Place
from captioner.service import ServiceLimits
from captioner.telemetry import Telemetry


class Door(Protocol):
    """What the middleware asks before it lets a request in; `captioner.service.Service` has it."""

    limits: ServiceLimits
    telemetry: Telemetry

    @property
    def ready(self) -> bool:
        """Whether requests are taken and the model answers."""

    def refusal(self) -> ServiceError | None:
        """Return the error with which a request would be refused now; None when it would be taken."""

    def reserve(self, count: int) -> Place:
        """Take so many places in the queue for one who comes; raises the error with which they are refused."""


class OpenDoor:
    """Before a page without a service: lets everyone in, within the usual limits of size."""

    ready = True

    def __init__(self) -> None:
        self.limits, self.telemetry = ServiceLimits(), Telemetry()

    def refusal(self) -> None:
        """Refuse nobody."""

    def reserve(self, count: int) -> Place:
        """Give places that nobody counts."""
        return Place()


def wait_for_answers(telemetry: Telemetry, *, timeout_s: float = 5.0, quiet_s: float = 0.5) -> bool:
    """Wait until those who have been let in have their answers: after `Service.drain`, before anything is closed.

    Gradio drops the answers of its queue when it is closed; and a client asks for an answer some time after the call.

    Args:
        telemetry: of the service.
        timeout_s: how long to wait at most.
        quiet_s: for how long no request must be open.

    Returns:
        Whether it became quiet.
    """
    end_s = time.monotonic() + timeout_s
    quiet_since_s = time.monotonic()
    while (now_s := time.monotonic()) < end_s:
        if telemetry.http_open.value() > 0:
            quiet_since_s = now_s
        elif now_s - quiet_since_s >= quiet_s:
            return True
        time.sleep(0.02)
    return False
