"""One check in one process: the task comes as JSON on standard input, the answer is the last line of the output."""

from __future__ import annotations

import contextlib
import json
import random
import sys
from pathlib import Path
from typing import Any

from gostore.core.errors import GoStoreError
from gostore.core.slots import PolicySource, describe_failure, load_policy
from gostore.lab.grader import load_lab


def run(task: dict[str, Any]) -> str:
    """Why the check failed; empty when it passed."""
    import gostore.cluster.ring  # noqa: F401  (declares the slot `placement`)

    folder = Path(task["folder"])
    lab = load_lab(folder.parent, folder.name)
    policy = PolicySource(lab.class_name, task["source"])
    check = next(check for check in lab.checks if check.name == task["check"])
    try:
        check.function(load_policy(lab.slot, policy), random.Random(task["seed"]))
    except GoStoreError as error:
        return error.message
    except AssertionError as error:
        return str(error) or "a check failed without a message"
    except Exception as error:
        return describe_failure(error, policy)
    return ""


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        message = run(json.load(sys.stdin))
    print(json.dumps({"message": message}))
