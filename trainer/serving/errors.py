"""What can go wrong in serving, sorted by what the caller does next.

ServingError
├── BadRequestError      fix the call: a value out of range, a prompt that does not fit
├── QueueFullError       try again after retry_after_s
├── EngineFailedError    the forward pass failed or the engine closed: this request is lost, another may work
└── WeightUpdateError    a weight update was refused or failed; `served` says whether the old weights still answer
    ├── WeightsRefusedError   the weights do not fit: sending them again will not help
    ├── EngineAnsweredError   the engine said that it did not do it
    └── EngineSilentError     the engine is gone or hangs: ask again when it is back
"""

from __future__ import annotations


class ServingError(Exception):
    """Base of everything this package raises on purpose."""


class BadRequestError(ServingError):
    """The request cannot be carried out as it is; `param` names the offending field."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class QueueFullError(ServingError):
    """As many requests wait as may; nothing was queued."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(
            f"{waiting} requests already wait (waiting_max={waiting}). Try again in {retry_after_s} s, "
            "send fewer at once, or raise waiting_max."
        )
        self.retry_after_s = retry_after_s


class EngineFailedError(ServingError):
    """The engine could not finish this request."""


class WeightUpdateError(ServingError):
    """A weight update did not happen as asked.

    served   True when the server still answers under its old weights; False when a failure after the start of the
             update leaves open which weights it holds, so that it must be restarted before its tokens are trained on
    """

    def __init__(self, message: str, *, served: bool = True) -> None:
        super().__init__(message)
        self.served = served


class WeightsRefusedError(WeightUpdateError):
    """The weights offered were checked and found not to fit; nothing was overwritten."""


class EngineAnsweredError(WeightUpdateError):
    """The engine answered that it did not do what it was asked; its own words are in the message."""

    def __init__(self, message: str, *, status: int, served: bool = True) -> None:
        super().__init__(message, served=served)
        self.status = status


class EngineSilentError(WeightUpdateError):
    """The engine did not answer: it is gone, or it hangs."""
