"""Faults in the log: their kind and their place. What they say may repeat what a user sent, and is left out.

Python's own traces, and those that Gradio and its server print, hold the message of every error.
"""

from __future__ import annotations

import logging
import sys
import traceback
from types import ModuleType, TracebackType
from typing import Any

from captioner.batching import where

LOG = logging.getLogger(__name__)
LOGGERS = ("uvicorn", "gradio", "mcp", "asyncio", "captioner", "captioner_app", "app", "__main__")
"""Of all who run a page: its server, what it is made with, and ourselves under the names that `app.py` may have."""


class PlaceFormatter(logging.Formatter):
    """Writes a line for a record; of an error its kind and place alone."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatException(  # the name is that of logging
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        """Return kind and place of an error, and of those that led to it."""
        said: list[str] = []
        error = ei[1]
        while error is not None and len(said) < 5:
            said.append(f"{type(error).__name__} at {where(error)}")
            error = error.__cause__ or error.__context__
        return "    " + ", after ".join(said)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a trace that another formatter has made already is not used."""
        record.exc_text = record.stack_info = None
        return super().format(record)


def write_places_only() -> None:
    """Give all loggers of a page one handler, which writes to standard error, with the formatter of this module."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlaceFormatter())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False


class Traces(ModuleType):
    """Stands for the module `traceback` in modules that print a fault as a whole."""

    def __init__(self) -> None:
        super().__init__("traceback")

    def __getattr__(self, name: str) -> Any:
        return getattr(traceback, name)

    @staticmethod
    def print_exc(*values: Any, **named: Any) -> None:
        """Log kind and place of the error that is being handled."""
        error = sys.exc_info()[1]
        if error is not None:
            LOG.error("a request failed: %s at %s", type(error).__name__, where(error))
