"""Mistakes a user can make, told in one line; everything else is ours and stays an assertion or a
traceback."""

from rapm.text import one_line


class UserError(ValueError):
    """What was given, what is allowed, what to do, in one line. The command line prints it and
    exits with code 2."""

    def __str__(self) -> str:
        return one_line(super().__str__())  # names of others' files and tensors are in it


class NonFinite(UserError):
    """A loss or gradient stopped being a number; nothing was updated with it."""


def first_line(error: BaseException) -> str:
    """Of what began it all; torch's "Error(s) in loading ...:" says nothing before its second
    line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).split("\n") if line.strip()] or [
        type(error).__name__
    ]
    if "ignore_mismatched_sizes" in lines[0]:
        return "tensors have other shapes than its layers"
    return lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]
