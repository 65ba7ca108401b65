"""The bases of the errors that commands print as one line: bad input, and a run that cannot go on."""

from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """An error in the user's input. Its one-line message names fault, place and fix; commands exit with code 2."""


class RunError(RuntimeError):
    """A run that cannot go on: a model that does not answer, a budget that is spent, training that diverged.

    The message is one line that says what happened and what to do; commands exit with code 2.
    """


def check_known(what: str, value: Any, known: Iterable[str]) -> None:
    """Raises :class:`InputError`, whose message lists the known values, if ``value`` is none of them.

    Args:
        what: what the value is, for the message, e.g. ``split``.
        value: the value.
        known: the values that exist.
    """
    *most, last = known
    if value not in (*most, last):
        raise InputError(f"unknown {what} {value!r}: use {', '.join(most)}{' or ' * bool(most)}{last}")


def check_at_least(minimum: int, **values: float) -> None:
    """Raises :class:`InputError` with the name of the first value that is below the minimum or NaN."""
    for name, value in values.items():
        if not value >= minimum:  # not "<", which NaN would pass
            raise InputError(f"{name} must be at least {minimum}, got {value}")


def check_choice(settings: Any, name: str, values: tuple[str, ...]) -> None:
    """Raises :class:`InputError` if the setting ``name`` is none of ``values``."""
    if getattr(settings, name) not in values:
        raise InputError(f"{name} must be one of {', '.join(values)}, got {getattr(settings, name)!r}")


def check_at_least_zero(settings: Any, *names: str) -> None:
    """Raises :class:`InputError` if one of the settings ``names`` is below 0 or NaN."""
    for name in names:
        if not getattr(settings, name) >= 0:  # not "< 0", which NaN would pass
            raise InputError(f"{name} must be at least 0, got {getattr(settings, name)}")
