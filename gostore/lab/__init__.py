"""Labs and their graders.

A lab is a folder ``labs/NN_name``: ``README.md`` (what to write, how long the reference is, how it is graded),
``lab.toml`` (title, slot, name of the class), ``NN_name.ipynb`` (the notebook in which the student writes the class),
``checks.py`` (the public checks, functions marked with :func:`check`) and ``reference.py`` (a solution).
"""

from gostore.lab.checks import Check, check
from gostore.lab.grader import CheckResult, Grade, Lab, find_labs, grade, load_lab, read_submission

__all__ = ["Check", "CheckResult", "Grade", "Lab", "check", "find_labs", "grade", "load_lab", "read_submission"]
