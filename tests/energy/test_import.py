from __future__ import annotations

import subprocess
import sys

import pytest


def test_import_pulls_in_nothing_heavy() -> None:
    code = (
        "import sys, joulesmith.energy as e\n"
        "e.EnergyMeter, e.grid\n"
        "bad = {'torch', 'numpy', 'scipy', 'psutil', 'pynvml', 'pydantic'} & set(sys.modules)\n"
        "print(sorted(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_name() -> None:
    import joulesmith.energy as e

    with pytest.raises(AttributeError, match="nonsense"):
        _ = e.nonsense  # type: ignore[attr-defined]
    for name in e.__all__:
        assert getattr(e, name) is not None
