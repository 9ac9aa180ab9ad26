"""Every error this project raises on purpose, sorted by what the caller does next.

    LightningBusError
    ├── CallError                 fix the call (exit code 2)
    │   ├── ConfigError           RUN.toml or a command line is wrong; names the key's path
    │   ├── ClosedError           the client was used after it was closed
    │   ├── MessageTooLarge       the message exceeds the limit; checked before it is sent
    │   ├── NotFound              no such rollout, resource or cursor
    │   ├── RetiredError          the records asked for were dropped by retention
    │   ├── AccessDenied          the key is unknown or revoked, or its role may not do this
    │   ├── Conflict              a published version or a submitted id exists with other content
    │   └── AgentError            the agent cannot be imported or returned what no agent may return
    ├── TryAgain                  the same call may succeed later
    │   ├── BusyError             the peer is full; carries `retry_after_s`
    │   └── BrokenError           the peer is gone or silent
    ├── GiveUp                    the work is no longer wanted
    │   └── FencedError           the attempt, or the producer, has a successor
    └── StopProcess               a promise can no longer be kept, so stop and say so (exit code 70)
        ├── StorageError          the disk refused acknowledged data (exit code 74)
        ├── VersionError          the peer speaks another protocol version (exit code 76)
        ├── RemoteProtocolError   the peer broke the protocol
        └── LocalProtocolError    we did: a bug here

A message holds the values, the limit and the way out. Library errors are translated once, at the edge, with
`raise … from exc`.
"""

from __future__ import annotations

from typing import cast


class LightningBusError(Exception):
    """Base of all errors of this project; never raised itself."""

    exit_code = 1


class CallError(LightningBusError):
    """The call is wrong and will stay wrong until it is changed."""

    exit_code = 2


class ConfigError(CallError):
    """A configuration value is missing, unknown or of the wrong type."""


class ClosedError(CallError):
    """The object was closed by its owner before this call."""


class MessageTooLarge(CallError):
    """A message exceeds what the protocol carries in one piece."""


class NotFound(CallError):
    """The broker knows nothing by that name."""


class RetiredError(CallError):
    """The records asked for were dropped by retention; the message says where the log begins now."""


class AccessDenied(CallError):
    """The key is unknown or revoked, or its role may not do this."""


class Conflict(CallError):
    """Something immutable exists under that name with other content."""


class AgentError(CallError):
    """The user's agent cannot be loaded, or broke the agent contract."""


class TryAgain(LightningBusError):
    """Nothing is wrong with the call; the same call may succeed later."""


class BusyError(TryAgain):
    """The peer is full. `retry_after_s` says when to come back."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BrokenError(TryAgain):
    """The peer is gone, or did not answer within the limit."""


class GiveUp(LightningBusError):
    """The work this call belongs to is no longer wanted."""


class FencedError(GiveUp):
    """A newer attempt, or a newer session of this producer, has taken over."""


class StopProcess(LightningBusError):
    """A promise can no longer be kept; the process must stop and say why."""

    exit_code = 70


class StorageError(StopProcess):
    """The disk refused data that had to become durable."""

    exit_code = 74


class VersionError(StopProcess):
    """The peer speaks another version of the protocol."""

    exit_code = 76


class RemoteProtocolError(StopProcess):
    """The peer sent what the protocol does not allow."""


class LocalProtocolError(StopProcess):
    """We were about to send what the protocol does not allow: a bug here."""


def first_error(exc: BaseException) -> BaseException:
    """Return the error that matters out of what a task group raised: ours before others, the first before the rest."""
    if not isinstance(exc, BaseExceptionGroup):
        return exc
    leaves = [first_error(inner) for inner in cast("BaseExceptionGroup[BaseException]", exc).exceptions]
    return next((leaf for leaf in leaves if isinstance(leaf, LightningBusError)), leaves[0])
