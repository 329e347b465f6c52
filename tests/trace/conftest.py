from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# Test modules are imported by path, so their common part is too.
_path = Path(__file__).with_name("journals.py")
_spec = importlib.util.spec_from_file_location("trace_journals", _path)
assert _spec is not None
assert _spec.loader is not None
_module = sys.modules["trace_journals"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
