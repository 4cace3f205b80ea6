"""The one exception for what a user did wrong."""

__all__ = ["UserError"]


class UserError(Exception):
    """A mistake in data, options or files that the user can fix.

    The message is one line that names the file or option and the fix. The command line prints that line alone and
    exits with code 1 (``--debug`` adds the traceback); every other exception keeps its traceback.
    """
