"""A picture in, a sentence out, and for every word the place in the picture that it came from.

from captioner import Captioner

caption = Captioner.load().caption("photo.jpg")
print(caption.text)
caption.figure().savefig("figure.png")
"""

from captioner.api import Captioner
from captioner.caption import Caption, Word
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
)

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
    "Word",
    "__version__",
]
