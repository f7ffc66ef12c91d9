"""Errors that a user can act on. The command line prints them as one line.

Knows nothing of what went wrong elsewhere: each caller writes the message as
"what is wrong: where: what to do".
"""

from __future__ import annotations


class JoulesmithError(Exception):
    """Bad input or a state the user can mend. One line, exit code 2."""

    exit_code = 2


class FloorNotMetError(JoulesmithError):
    """No plan keeps the quality asked for. Exit code 3; the nearest miss is named."""

    exit_code = 3


class EngineError(JoulesmithError):
    """An engine refused, crashed or did not answer."""


class MissingExtraError(JoulesmithError):
    """A package of an optional extra is absent."""

    def __init__(self, package: str, extra: str = "optimize") -> None:
        super().__init__(f"{package} is not installed: run  pip install 'joulesmith[{extra}]'")
