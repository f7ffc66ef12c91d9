"""`published`, for the tests in folders below."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
