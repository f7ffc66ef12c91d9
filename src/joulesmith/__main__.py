"""``python -m joulesmith``."""

from joulesmith.cli import main

main()
