"""A picture in, a sentence out, and for every word the place in the picture that it came from.

from captioner import Captioner

caption = Captioner.load().caption("photo.jpg")
print(caption.text)
caption.figure().savefig("figure.png")
"""

from typing import TYPE_CHECKING, Any

from captioner.config import SearchOptions
from captioner.errors import (
    CaptionerError,
    CheckpointError,
    ConfigError,
    DataError,
    ImageError,
    ImageReadError,
    ImageTooLargeError,
    MetricError,
    SearchError,
    ServiceBusyError,
    ServiceClosedError,
    ServiceError,
    ServiceTimeoutError,
)

if TYPE_CHECKING:
    from captioner.api import Captioner
    from captioner.caption import Caption, Word

__version__ = "0.1.0"

__all__ = [
    "Caption",
    "Captioner",
    "CaptionerError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ImageError",
    "ImageReadError",
    "ImageTooLargeError",
    "MetricError",
    "SearchError",
    "SearchOptions",
    "ServiceBusyError",
    "ServiceClosedError",
    "ServiceError",
    "ServiceTimeoutError",
    "Word",
    "__version__",
]

# What needs torch comes in when it is first asked for: torch takes seconds to import.
_LATER = {"Captioner": "captioner.api", "Caption": "captioner.caption", "Word": "captioner.caption"}
_MODULES = ("batch",)


def __getattr__(name: str) -> Any:
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LATER[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
