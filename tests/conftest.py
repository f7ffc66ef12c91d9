"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# A deadline is a wall-clock assertion: on a busy machine it fails and says nothing.
settings.register_profile("joulesmith", deadline=None)
settings.load_profile("joulesmith")
