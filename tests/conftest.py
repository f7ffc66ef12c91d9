"""Settings of all tests."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

# A deadline is a wall-clock assertion: on a busy machine it fails and says nothing.
# The same examples every time: a pass today is a pass tomorrow. To look for new ones:
# pytest --hypothesis-profile=search (fresh examples at each run).
settings.register_profile("joulesmith", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("joulesmith")


def _own_cores() -> None:
    """Workers side by side share the cores out: threads of an engine that wait for each other
    after each operation, with as many of another worker's, take ten times as long."""
    worker, of = os.environ.get("PYTEST_XDIST_WORKER"), os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if worker and of and hasattr(os, "sched_setaffinity"):
        mine = sorted(os.sched_getaffinity(0))[int(worker.removeprefix("gw")) :: int(of)]
        if mine:
            os.sched_setaffinity(0, mine)


_own_cores()


def pytest_configure() -> None:
    """A background shell hands signals on as ignored; a terminal does not, and tests send them."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual)
