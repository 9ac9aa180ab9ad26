"""The tree that says what to do next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightning_bus import errors
from lightning_bus.errors import (
    BusyError,
    ConfigError,
    FencedError,
    LightningBusError,
    StorageError,
    VersionError,
    first_error,
)


def tree(kind: type[LightningBusError], depth: int = 0) -> Iterator[tuple[int, str]]:
    yield depth, kind.__name__
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child, depth + 1)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        name = line.lstrip(" │├└─").split(" ")[0]
        if name.isidentifier() and isinstance(getattr(errors, name, None), type) and line.startswith("    "):
            drawn.append(((len(line) - len(line.lstrip(" │├└─")) - 4) // 4, name))
    assert drawn == list(tree(LightningBusError))


@pytest.mark.parametrize(
    ("kind", "code"),
    [(ConfigError, 2), (FencedError, 1), (StorageError, 74), (VersionError, 76), (errors.BrokenError, 1)],
)
def test_exit_codes_are_what_the_docstring_says(kind: type[LightningBusError], code: int) -> None:
    assert kind.exit_code == code


def test_busy_says_when_to_come_back() -> None:
    assert BusyError("full", 2.5).retry_after_s == 2.5


def test_our_error_is_found_among_others() -> None:
    ours = StorageError("disk full")
    group = BaseExceptionGroup("g", [KeyError("x"), BaseExceptionGroup("h", [ValueError("y"), ours])])
    assert first_error(group) is ours
    alone = KeyError("z")
    assert first_error(ExceptionGroup("g", [ExceptionGroup("h", [alone])])) is alone
    assert first_error(alone) is alone
