"""Mistakes a user can make, told in one line; everything else is ours and stays an assertion or a traceback."""


class UserError(ValueError):
    """What was given, what is allowed, what to do, in one line. The command line prints it and exits with code 2."""


class NonFinite(UserError):
    """A loss or gradient stopped being a number; nothing was updated with it."""
