"""The error for bad input, whose message a user can act on."""


class Lfm2Error(ValueError):
    """Bad input. The message is one line: it names the cause and says what to do.

    The command line prints this line without a traceback and exits with 1.
    """


def first_line(error: Exception) -> str:
    """Return the first line of the message of another library's error."""
    return str(error).strip().split("\n")[0]
