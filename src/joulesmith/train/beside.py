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
from joulesmith.ranks import added, gathered, rank
from joulesmith.train.rank_energy import meter_of_machine


class Beside:
    """meter: an `EnergyMeter`; None counts nothing. path: of the file, None for none. Raises
    `JoulesmithError` for a file that is another's."""

    def __init__(self, meter: Any = None, path: Path | None = None) -> None:
        self.meter, self.path = meter, path
        self.joules: dict[str, float | None] = {}
        """What for -> joules; None where those of a part are unknown."""
        self.pedigree: Pedigree | None = None
        if path is not None and path.is_file():
            try:
                kept = json.loads(path.read_bytes())
                self.joules = {str(k): None if v is None else float(v) for k, v in kept[0].items()}
                self.pedigree = worst([kept[1]])
            except (ValueError, LookupError, TypeError, AttributeError) as e:
                raise JoulesmithError(f"{path} is damaged: delete the folder it is in") from e

    @contextmanager
    def of(self, what: str, together: bool = True) -> Iterator[None]:
        """Adds the joules of what runs inside, unless it raises. together: all ranks come here, and
        their machines' joules are added up; else one rank does it by itself."""
        if self.meter is None:
            yield
            return
        whose = meter_of_machine(self.meter) if together else nullcontext(self.meter)
        with whose as meter, meter.window(what) as window:
            yield
        found, pedigree = window.reading.joules, window.reading.pedigree
        if together:
            total, unknown = added([found or 0.0, float(found is None)])
            found = None if unknown else total
            pedigree = worst(gathered(pedigree))
        self.joules[what] = plus(self.joules.get(what, 0.0), found)
        self.pedigree = worst((self.pedigree, pedigree))
        if self.path is not None and rank() == 0:
            with atomic_path(self.path) as part:
                part.write_text(json.dumps([self.joules, self.pedigree]))
