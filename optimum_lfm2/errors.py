"""The error for bad input, whose message a user can act on, and how a JSON file that may be broken is read."""

import json
from pathlib import Path
from typing import Any


class Lfm2Error(ValueError):
    """Bad input. The message is one line: it names the cause and says what to do.

    The command line prints this line without a traceback and exits with 1.
    """


def first_line(error: Exception) -> str:
    """Return the first line of the message of another library's error."""
    return str(error).strip().split("\n")[0]


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        Lfm2Error: where it is no JSON, or something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of the JSON, of its encoding, or of lists within lists
        raise Lfm2Error(f"{path} cannot be read as JSON ({error}). Download or copy it again.") from None
    if not isinstance(value, dict):
        raise Lfm2Error(f"{path} holds no JSON object. Download or copy it again.")
    return value
