"""Settings of all tests."""

from __future__ import annotations

import signal

from hypothesis import settings

# A deadline is a wall-clock assertion: on a busy machine it fails and says nothing.
# The same examples every time: a pass today is a pass tomorrow. To look for new ones:
# pytest --hypothesis-profile=search (fresh examples at each run).
settings.register_profile("joulesmith", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("joulesmith")


def pytest_configure() -> None:
    """A background shell hands signals on as ignored; a terminal does not, and tests send them."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual)
