"""Numbers of a stranger's config, checked when they are read.

Knows no architectures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from joulesmith.errors import JoulesmithError
from joulesmith.formats.files import quoted

MOST = 1 << 24
"""Above any width, vocabulary or context of a model there is."""
MAX_LAYERS = 4096


class Keys:
    """The values of a config. Of several names the first that is given counts; null is
    not given; then ``defaults``."""

    def __init__(self, values: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> None:
        self.values, self.where, self.defaults = values, where, defaults

    def bad(self, name: str, value: object, wanted: str) -> JoulesmithError:
        shown = quoted(value) if isinstance(value, str) else quoted(repr(value))[1:-1]
        return JoulesmithError(f"{name} is {shown}: {self.where}: give {wanted}")

    def find(self, *names: str) -> tuple[str, Any]:
        """The first name that has a value, and the value; (first name, None) if none has."""
        for given in (self.values, self.defaults):
            for name in names:
                if given.get(name) is not None:
                    return name, given[name]
        return names[0], None

    def maybe(self, *names: str, least: int = 1, most: int = MOST) -> int | None:
        """A whole number, or None where none is given."""
        name, value = self.find(*names)
        if value is None:
            return None
        # bool is an int to Python, and no count to anyone
        if type(value) is not int or not least <= value <= most:
            raise self.bad(name, value, f"a whole number from {least} to {most}")
        return value

    def count(
        self, *names: str, default: int | None = None, least: int = 1, most: int = MOST
    ) -> int:
        """As `maybe`; without a default a missing one is an error."""
        found = self.maybe(*names, least=least, most=most)
        if found is None:
            found = default
        if found is None:
            raise JoulesmithError(
                f"no {names[0]}: {self.where}: give the config.json of a decoder-only language "
                "model, or plain numbers"
            )
        return found

    def each(self, names: tuple[str, ...], layers: int, default: int | None = None) -> list[int]:
        """A number for each layer, from one number or a list of as many."""
        name, value = self.find(*names)
        if not isinstance(value, list):
            return [self.count(*names, default=default)] * layers
        if len(value) != layers:
            raise self.bad(name, f"a list of {len(value)}", f"one number or {layers}")
        for v in value:
            if type(v) is not int or not 0 <= v <= MOST:
                raise self.bad(name, v, f"whole numbers from 0 to {MOST}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        _, value = self.find(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.bad(name, value, "true or false")
        return value

    def switch(self, told: bool | str) -> bool:
        """``told``, or the flag of that name."""
        return told if isinstance(told, bool) else self.flag(told)

    def text(self, *names: str) -> str | None:
        name, value = self.find(*names)
        if value is not None and not isinstance(value, str):
            raise self.bad(name, value, "a word")
        return value

    def words(self, name: str, layers: int) -> list[str] | None:
        """A word for each layer, or None."""
        _, value = self.find(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.bad(name, value, "a list of words")
        if len(value) < layers:
            raise self.bad(name, f"a list of {len(value)}", f"{layers} words")
        return value[:layers]

    def numbers(self, name: str) -> list[int] | None:
        """A list of whole numbers from 0, or None."""
        _, value = self.find(name)
        if value is None:
            return None
        good = isinstance(value, list) and len(value) <= MAX_LAYERS
        if not good or not all(type(v) is int and 0 <= v <= MOST for v in value):
            raise self.bad(name, value, "a list of whole numbers")
        return list(value)
