"""What the user did wrong, apart from what is wrong with the program."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user's: one sentence that names the value, what was expected, and how to mend it.

    The command line prints it without a traceback; any other exception is taken for a bug.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file that an earlier command should have left is not there."""
