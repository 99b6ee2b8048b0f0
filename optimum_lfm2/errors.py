"""The error for bad input, and a reader of JSON files that raises it for a broken file."""

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
    """Read a JSON file that holds an object.

    Raises:
        Lfm2Error: the file is no JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of the JSON, of its encoding, or of lists within lists
        raise Lfm2Error(f"{path} cannot be read as JSON ({error}). Download or copy it again.") from None
    if not isinstance(value, dict):
        raise Lfm2Error(f"{path} holds no JSON object. Download or copy it again.")
    return value
