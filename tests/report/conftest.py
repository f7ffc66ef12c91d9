"""The sample pages, rendered once for all tests of the report."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import sample

from joulesmith.report.result import Result


@pytest.fixture(scope="session")
def passed() -> Result:
    return sample.passed()


@pytest.fixture(scope="session")
def none() -> Result:
    return sample.none()


@pytest.fixture(scope="session")
def passed_page(passed: Result) -> str:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    from joulesmith.report.page import render_page

    return render_page(passed)


@pytest.fixture(scope="session")
def none_page(none: Result) -> str:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    from joulesmith.report.page import render_page

    return render_page(none)
