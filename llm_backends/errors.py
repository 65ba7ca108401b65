"""The bases of the errors that commands print as one line: bad input, and a run that cannot go on."""

import operator
from collections.abc import Iterable
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

BOUNDS = (
    ("ge", operator.ge, "at least"),
    ("gt", operator.gt, "above"),
    ("le", operator.le, "at most"),
    ("lt", operator.lt, "below"),
)
"""Attributes of the bounds of annotated-types, which is not imported here, with their comparisons and words."""


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


def requirement(hint: Any, value: Any) -> str:
    """Returns what a value fails to be by its type, e.g. ``at least 1``; empty if it fits.

    Args:
        hint: the type: a ``Literal``, whose values are the only ones; a number with bounds (an ``Annotated`` type with
            those of annotated-types); one of these or None; any other type fits every value.
        value: the value.
    """
    if get_origin(hint) in (Union, UnionType):
        if value is None:
            return ""
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal and value not in get_args(hint):
        *most, last = (str(choice) or "empty" for choice in get_args(hint))
        return f"{', '.join(most)} or {last}"
    for metadata in getattr(hint, "__metadata__", ()):
        for name, holds, words in BOUNDS:
            bound = getattr(metadata, name, None)
            if bound is not None and not holds(value, bound):  # NaN is in no range
                return f"{words} {bound}"
    return ""


def check_fields(settings: Any) -> None:
    """Raises :class:`InputError` if a field of a dataclass does not fit its type, see :func:`requirement`."""
    hints = get_type_hints(type(settings), include_extras=True)
    for field in fields(settings):
        value = getattr(settings, field.name)
        if wanted := requirement(hints[field.name], value):
            raise InputError(f"{field.name} must be {wanted}, got {value!r}")


def check_choice(settings: Any, name: str, values: tuple[str, ...]) -> None:
    """Raises :class:`InputError` if the setting ``name`` is none of ``values``."""
    if getattr(settings, name) not in values:
        raise InputError(f"{name} must be one of {', '.join(values)}, got {getattr(settings, name)!r}")


def check_at_least_zero(settings: Any, *names: str) -> None:
    """Raises :class:`InputError` if one of the settings ``names`` is below 0 or NaN."""
    for name in names:
        if not getattr(settings, name) >= 0:  # not "< 0", which NaN would pass
            raise InputError(f"{name} must be at least 0, got {getattr(settings, name)}")
