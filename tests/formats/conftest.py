"""Makes what the files of version 1 hold importable as ``write_v1``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).with_name("write_v1.py")
_spec = importlib.util.spec_from_file_location("write_v1", _path)
assert _spec is not None
assert _spec.loader is not None
_module = sys.modules["write_v1"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
