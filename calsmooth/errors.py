"""The two kinds of error that reach a user as one line: what was given, what was expected, what to do."""


class CalsmoothError(Exception):
    """The work could not be done: bad data, no network, a full disk, a loss that is not a number. Exit code 1."""

    exit_code = 1


class UsageError(CalsmoothError):
    """The command line or the configuration asks for something that can't be: exit code 2, before any work starts."""

    exit_code = 2
