"""The bases of the errors that commands print as one line: bad input, and a run that cannot go on."""

from typing import Any


class InputError(ValueError):
    """Bad input. The message is one line that says what is wrong, where, and what to do; commands exit with code 2."""


class RunError(RuntimeError):
    """A run that cannot go on: a model that does not answer, a budget that is spent, training that diverged.

    The message is one line that says what happened and what to do; commands exit with code 2.
    """


def check_choice(settings: Any, name: str, values: tuple[str, ...]) -> None:
    """Refuses a setting that is none of ``values``."""
    if getattr(settings, name) not in values:
        raise InputError(f"{name} must be one of {', '.join(values)}, got {getattr(settings, name)!r}")


def check_at_least_zero(settings: Any, *names: str) -> None:
    """Refuses settings below 0, NaN among them."""
    for name in names:
        if not getattr(settings, name) >= 0:
            raise InputError(f"{name} must be at least 0, got {getattr(settings, name)}")
