"""Joules of what a training takes beside its steps: text that is drawn, a teacher that is asked,
judging. Kept in a file, so that a run that goes on adds to what was spent before.

Knows meters; not what is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from joulesmith.atomic import atomic_path
from joulesmith.energy.reading import Pedigree, worst
from joulesmith.energy.totals import plus
from joulesmith.errors import JoulesmithError
from joulesmith.ranks import added, gathered, rank, world
from joulesmith.train.rank_energy import meter_of_machine


class Beside:
    """meter: an `EnergyMeter`; None counts nothing. path: of the file, None for none. Raises
    `JoulesmithError` for a file that is another's."""

    def __init__(self, meter: Any = None, path: Path | None = None) -> None:
        self.meter, self.path = meter, path
        self.joules: dict[str, float | None] = {}
        """What for -> joules; None where those of a part are unknown."""
        self.pedigree: Pedigree | None = None
        self.lost: list[str] = []
        """What for joules were spent that nobody counted: a run was killed there."""
        self._begun: str | None = None
        if path is not None and path.is_file():
            self._read(path)

    @property
    def notes(self) -> list[str]:
        """Of what is missing."""
        if not self.lost:
            return []
        return [f"a run was killed during: {', '.join(self.lost)}; its joules are not counted"]

    @contextmanager
    def of(self, what: str, together: bool = True) -> Iterator[None]:
        """Adds the joules of what runs inside. together: all ranks come here, and their machines'
        joules are added up; else one rank does it by itself. After an error ranks no longer meet,
        and only one that is alone adds."""
        if self.meter is None:
            yield
            return
        before = bool(self.joules)  # else nothing is kept yet, and an error leaves no trace
        if before:
            self._begun = what
            self._write()
        whose = meter_of_machine(self.meter) if together else nullcontext(self.meter)
        meet = together and world() > 1
        window: Any = None
        try:
            with whose as meter, meter.window(what) as window:
                yield
        except BaseException:
            if before and not meet and window is not None:
                self._add(what, window.reading.joules, window.reading.pedigree)
            raise
        found, pedigree = window.reading.joules, window.reading.pedigree
        if meet:
            total, unknown = added([found or 0.0, float(found is None)])
            found = None if unknown else total
            pedigree = worst(gathered(pedigree))
        self._add(what, found, pedigree)

    def _add(self, what: str, joules: float | None, pedigree: Pedigree | None) -> None:
        self.joules[what] = plus(self.joules.get(what, 0.0), joules)
        self.pedigree = worst((self.pedigree, pedigree))
        self._begun = None
        self._write()

    def _write(self) -> None:
        if self.path is None or rank() != 0:
            return
        kept = {
            "joules": self.joules, "pedigree": self.pedigree, "lost": self.lost,
            "begun": self._begun,
        }  # fmt: skip
        with atomic_path(self.path) as part:
            part.write_text(json.dumps(kept))

    def _read(self, path: Path) -> None:
        try:
            kept = json.loads(path.read_bytes())
            found = kept["joules"].items()
            self.joules = {str(k): None if v is None else float(v) for k, v in found}
            self.pedigree = worst([kept["pedigree"]])
            lost = [str(x) for x in kept["lost"]]
            self.lost = list(dict.fromkeys([*lost, *([kept["begun"]] if kept["begun"] else [])]))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise JoulesmithError(
                f"{path} is damaged: delete it, and its joules are not counted"
            ) from e
