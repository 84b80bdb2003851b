"""Errors for users. Every other exception is an error of the code and keeps its traceback."""


class UserError(ValueError):
    """Flags, data or a file are wrong. The message names them and the remedy; programs print it alone."""


class FileError(UserError, OSError):
    """A file is missing, or cannot be read or written."""
