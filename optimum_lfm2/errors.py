"""Errors that a user can act on."""


class Lfm2Error(ValueError):
    """Bad input: one line that names the thing and the remedy. The command line prints it alone and exits with 1."""


def first_line(error: Exception) -> str:
    """What another library's error says, without what it says after that."""
    return str(error).strip().split("\n")[0]
