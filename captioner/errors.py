"""The errors of Captioner. Each message names the thing, the fault and the remedy.

    CaptionerError
    ├── ImageError            a picture that cannot be used
    │   ├── ImageReadError        not a picture, damaged, missing or unreadable
    │   └── ImageTooLargeError    more pixels or bytes than the limit
    ├── ConfigError           a setting out of its range, or two settings that exclude each other
    ├── CheckpointError       a model folder that is missing, foreign, damaged or of another shape
    ├── SearchError           a search that cannot give what was asked of it
    ├── DataError             data that cannot be used, or that would be written over
    ├── MetricError           predictions and references that cannot be compared
    └── ServiceError          a service that could not answer a request
        ├── ServiceBusyError      its queue is full; try again
        ├── ServiceTimeoutError   the request took longer than its time limit
        └── ServiceClosedError    the service is closing or closed

Every error of the library is one of these: `except CaptionerError` catches all of them.
"""


class CaptionerError(Exception):
    """Base of every error that Captioner raises on purpose."""


class ImageError(CaptionerError):
    """A picture that cannot be used."""


class ImageReadError(ImageError):
    """The input is not a picture, is damaged, is missing, or cannot be read."""


class ImageTooLargeError(ImageError):
    """The picture has more pixels or bytes than the limit allows."""


class ConfigError(CaptionerError):
    """A setting is out of its range, or excludes another setting."""


class CheckpointError(CaptionerError):
    """A model folder is missing, foreign, damaged, or its weights have other names or shapes."""


class SearchError(CaptionerError):
    """The search cannot give what was asked of it.

    Args:
        message: names thing, fault and remedy.
        picture: which picture of the batch is to blame; None when the search fails for every picture.
    """

    def __init__(self, message: str, *, picture: int | None = None) -> None:
        super().__init__(message)
        self.picture = picture


class DataError(CaptionerError):
    """Data is missing, damaged or not of the stated format, or a file would be written over."""


class MetricError(CaptionerError):
    """Predictions and references cannot be compared."""


class ServiceError(CaptionerError):
    """The service could not answer a request, though the request may be sound."""


class ServiceBusyError(ServiceError):
    """The queue of the service is full.

    Args:
        message: names thing, fault and remedy.
        retry_after_s: when to try again, whole seconds, at least 1.
    """

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServiceTimeoutError(ServiceError):
    """The request was not answered within the service's time limit."""


class ServiceClosedError(ServiceError):
    """The service is closing or closed and takes no more requests."""
