"""The base of every error that a user can mend by changing what was passed in."""


class InputError(ValueError):
    """Bad input. The message is one line that says what is wrong, where, and what to do; commands exit with code 2."""
