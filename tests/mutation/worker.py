"""Runs the mutants of one module in a process of its own: ``worker.py JOB``, where JOB is a file that ``run.py`` wrote.

Theory of operation. A mutant costs what its tests cost, and little else:

1. A forked child imports and runs the unchanged tests once. It learns which test executes which lines of the module
   (coverage with one context a test), how long each takes, what was loaded, and what of the module ran while it was
   imported.
2. Most mutants change the inside of a function. For them one child imports everything with the original module,
   collects the tests, and forks once a mutant; the fork replaces the code objects that differ and runs the tests that
   reach their lines, the quickest first, until one fails.
3. What differs when a module is imported (constants, defaults, decorators, functions that run at import) needs an
   import of its own: a child forked from this process, which loaded what does not depend on the module beforehand,
   imports the mutated source under the module's name, collects and runs all tests.

Every fork has a limit of processor time, of memory and of wall time. Properties draw the same examples in every run
and do not shrink what they find. Results are appended to a file, a line each: a run that was interrupted goes on.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import coverage
import pytest
from hypothesis import HealthCheck, Phase, settings
from mutants import Mutant, mutants_of

EXAMPLES = 30
CPU_FACTOR = 4.0
CPU_EXTRA_S = 1.5
WALL_FACTOR = 8.0
WALL_EXTRA_S = 20.0
MEMORY_BYTES_MAX = 2 << 30
NEEDS_IMPORT = "needs an import"

Outcome = tuple[str, str]
"""``killed``, ``timeout``, ``survived``, ``unreached`` or ``invalid``; and the test that killed it, if one did."""


class Job:
    """What one worker is told, and where it writes."""

    def __init__(self, file: Path) -> None:
        told = json.loads(file.read_text())
        self.root = Path(told["root"])
        self.module: str = told["module"]
        self.path = self.root / told["path"]
        self.tests: list[str] = told["tests"]
        self.results = Path(told["results"])
        self.profile = Path(told["profile"])
        self.names: set[str] | None = None if told["names"] is None else set(told["names"])
        self.killers: dict[str, str] = told["killers"]
        self.source = self.path.read_text()

    def record(self, mutant: Mutant, outcome: Outcome) -> None:
        with self.results.open("a") as file:
            file.write(json.dumps([mutant.name, *outcome]) + "\n")


def main() -> None:
    job = Job(Path(sys.argv[1]))
    os.chdir(job.root)
    sys.path.insert(0, str(job.root))
    settings.register_profile(
        "mutation",
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow],  # a busy machine kills no mutant
    )
    settings.load_profile("mutation")
    status = wait(fork(lambda: measure(job)))
    if status != 0:
        raise SystemExit(f"{job.module}: the tests fail before anything is mutated; see {job.profile}.log")
    profile = json.loads(job.profile.read_text())
    mutants = [m for m in mutants_of(job.source) if not m.annotation and (job.names is None or m.name in job.names)]
    wait(fork(lambda: serve(job, profile, mutants)))
    done = {json.loads(line)[0] for line in job.results.read_text().splitlines()}
    rest = [mutant for mutant in mutants if mutant.name not in done]
    preload(job, profile["loaded"])
    gc.freeze()
    for mutant in rest:
        job.record(mutant, import_and_run(job, profile, mutant))


# ------------------------------------------------------------------------------------------------------------ processes


def fork(body: Callable[[], int | None]) -> int:
    """A child that runs ``body`` and ends with its answer; nothing of the parent's runs on its way out."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            status = body() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def judge(body: Callable[[Callable[[str], None]], None], cpu_s: float) -> Outcome:
    """Run the tests of one mutant in a fork; ``body`` is given what to call when a test fails."""
    reader, writer = os.pipe()

    def child() -> None:
        os.close(reader)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        limit(cpu_s)

        def killed(by: str) -> None:
            os.write(writer, by.encode())
            os._exit(1)

        try:
            body(killed)
        except BaseException as error:
            killed(f"{type(error).__name__} outside of any test")

    pid = fork(child)
    os.close(writer)
    try:
        if not select.select([reader], [], [], WALL_FACTOR * cpu_s + WALL_EXTRA_S)[0]:
            os.kill(pid, signal.SIGKILL)
        said = os.read(reader, 4096).decode()
    finally:
        os.close(reader)
    status = wait(pid)
    if status == 0:
        return "survived", ""
    return ("timeout", "") if status in (-signal.SIGPROF, -signal.SIGKILL) else ("killed", said or f"exit {status}")


def limit(cpu_s: float) -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))


def cpu_limit_s(profile: dict[str, Any], tests: Iterable[str]) -> float:
    return CPU_FACTOR * sum(profile["seconds"][test] for test in tests) + CPU_EXTRA_S


# ------------------------------------------------------------------------------------------------- the first, whole run


def arguments(job: Job) -> list[str]:
    """No limits of wall time, as forks have their own; nothing is left behind; asserts as they are written."""
    return [*job.tests, "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "timeout=0", "--assert=plain"]


class Measuring:
    """A pytest plugin: lines and processor time of every test."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.coverage = coverage.Coverage(data_file=None, include=[str(job.path)], config_file=False)
        self.seconds: dict[str, float] = {}
        self.imported: dict[str, None] = {}

    def note_import(self, frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename == str(self.job.path):
            self.imported[name_of(frame.f_code)] = None

    def pytest_collection_finish(self) -> None:
        sys.setprofile(None)
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        began = time.process_time()
        answer = yield
        self.seconds[item.nodeid] = time.process_time() - began
        return answer

    def profile(self) -> dict[str, Any]:
        self.coverage.stop()
        lines: dict[str, list[str]] = {}
        data = self.coverage.get_data()
        for file in data.measured_files():
            for line, tests in data.contexts_by_lineno(file).items():
                lines[str(line)] = sorted(test for test in tests if test)
        return {
            "seconds": self.seconds,
            "lines": lines,
            "imported": list(self.imported),
            "loaded": [name for name in sys.modules if not name.startswith(("tests", "conftest"))],
        }


def measure(job: Job) -> int:
    log = os.open(f"{job.profile}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    plugin = Measuring(job)
    sys.setprofile(plugin.note_import)
    status = int(pytest.main(arguments(job), plugins=[plugin]))
    if status == 0:
        job.profile.write_text(json.dumps(plugin.profile()))
    return status


# ------------------------------------------------------------------------------------------ mutants inside of functions


class Failing:
    """A pytest plugin: ends the fork at the first failure."""

    def __init__(self, killed: Callable[[str], None]) -> None:
        self.killed = killed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.killed(report.nodeid)


class Serving:
    """A pytest plugin that takes the place of pytest's loop over the tests."""

    def __init__(self, job: Job, profile: dict[str, Any], mutants: list[Mutant]) -> None:
        self.job = job
        self.profile = profile
        self.mutants = mutants
        self.code = compiled(job.source, job.path)
        self.imported = set(profile["imported"])
        self.spans = spans_of(job.source)
        self.functions: dict[str, list[FunctionType]] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        for found in gc.get_objects():
            if type(found) is FunctionType and found.__code__.co_filename == str(self.job.path):
                self.functions.setdefault(name_of(found.__code__), []).append(found)
        gc.freeze()  # a fork shares what its collector does not touch
        for mutant in self.mutants:
            outcome = self.run(mutant)
            if outcome[1] != NEEDS_IMPORT:
                self.job.record(mutant, outcome)
        return True

    def run(self, mutant: Mutant) -> Outcome:
        try:
            mutated = compiled(mutant.apply(self.job.source), self.job.path)
        except (SyntaxError, AttributeError):
            return "invalid", ""
        changes = differences(self.code, mutated)
        if changes is None or any(name_of(code) in self.imported for code in changes):
            return "", NEEDS_IMPORT
        tests = self.tests_of(mutant)
        if not tests:
            return "unreached", ""
        return judge(lambda killed: self.run_tests(changes, tests, killed), cpu_limit_s(self.profile, tests))

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Those that reach the mutant's statement: the one that killed it the last time first, then the quickest."""
        lines = self.spans.get(mutant.line, range(mutant.line, mutant.line + 1))
        tests = {test: None for line in lines for test in self.profile["lines"].get(str(line), [])}
        killer = self.job.killers.get(mutant.name, "")
        return sorted(tests, key=lambda test: (test != killer, self.profile["seconds"][test]))

    def run_tests(self, changes: dict[CodeType, CodeType], tests: list[str], killed: Callable[[str], None]) -> None:
        for old, new in changes.items():
            for function in self.functions.get(name_of(old), []):
                function.__code__ = new
        items = [self.items[test] for test in tests]
        config = items[0].config
        config.pluginmanager.register(Failing(killed))
        for item, following in zip(items, [*items[1:], None], strict=True):
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)


def serve(job: Job, profile: dict[str, Any], mutants: list[Mutant]) -> int:
    with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null):
        return int(pytest.main(arguments(job), plugins=[Serving(job, profile, mutants)]))


def spans_of(source: str) -> dict[int, range]:
    """For each line the lines of its statement, or of its head if it has a body: a tracer may see only one of them."""
    spans: dict[int, range] = {}
    for node in ast.walk(ast.parse(source)):  # the outer before the inner
        if isinstance(node, ast.stmt):
            body: list[ast.stmt] = getattr(node, "body", [])
            end = body[0].lineno if body else (node.end_lineno or node.lineno) + 1
            lines = range(node.lineno, max(end, node.lineno + 1))
            spans |= dict.fromkeys(lines, lines)
    return spans


def compiled(source: str, path: Path) -> CodeType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ``1 is n`` is a fair mutant
        return compile(source, str(path), "exec", dont_inherit=True)


def name_of(code: CodeType) -> str:
    """Unique within a module: two lambdas of one line are told apart by where their code begins."""
    return f"{code.co_qualname}:{code.co_firstlineno}:{next(iter(code.co_positions()), None)}"


def differences(old: CodeType, new: CodeType) -> dict[CodeType, CodeType] | None:
    """Which functions differ; None where the body of the module or of a class does, that is, what importing runs."""
    if own(old) != own(new):
        return None
    changes: dict[CodeType, CodeType] = {}
    for left, right in zip(nested(old), nested(new), strict=True):
        if left.co_flags & inspect.CO_OPTIMIZED and (not left.co_name.startswith("<") or left.co_name == "<lambda>"):
            if own(left, deep=True) != own(right, deep=True):
                changes[left] = right
        else:
            inner = differences(left, right)
            if inner is None:
                return None
            changes.update(inner)
    return changes


def nested(code: CodeType) -> list[CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def own(code: CodeType, *, deep: bool = False) -> tuple[Any, ...]:
    """What a code object does, without where it stands in its file."""
    inner = tuple(own(constant, deep=True) for constant in nested(code)) if deep else len(nested(code))
    constants = tuple(
        (type(constant), repr(constant)) for constant in code.co_consts if not isinstance(constant, CodeType)
    )
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, code.co_exceptiontable, inner


# ------------------------------------------------------------------------------------------ mutants that need an import


class MutantFinder(importlib.abc.MetaPathFinder):
    """Imports the mutated source under the name of the module; with no code, refuses to import it at all."""

    def __init__(self, job: Job, code: CodeType | None) -> None:
        self.job = job
        self.code = code

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.job.module:
            return None
        if self.code is None:
            raise ImportError(f"{name} is to be mutated")
        return importlib.util.spec_from_file_location(name, self.job.path, loader=MutantLoader(self, name))


class MutantLoader(importlib.machinery.SourceFileLoader):
    def __init__(self, finder: MutantFinder, name: str) -> None:
        super().__init__(name, str(finder.job.path))
        self.mutated = finder.code

    def get_code(self, fullname: str) -> CodeType | None:
        return self.mutated


def preload(job: Job, names: list[str]) -> None:
    """Import what does not depend on the module. A failed try leaves modules half imported, so it is made in a fork."""

    def independent(name: str) -> bool:
        def attempt() -> None:
            sys.meta_path.insert(0, MutantFinder(job, None))
            try:
                importlib.import_module(name)
            except BaseException:
                os._exit(1)

        return wait(fork(attempt)) == 0

    for name in names:
        if name in sys.modules or name == "__main__":
            continue
        if not name.startswith("gostore") or independent(name):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def import_and_run(job: Job, profile: dict[str, Any], mutant: Mutant) -> Outcome:
    code = compiled(mutant.apply(job.source), job.path)
    killer = job.killers.get(mutant.name, "")

    def body(killed: Callable[[str], None]) -> None:
        sys.meta_path.insert(0, MutantFinder(job, code))
        status = pytest.main(arguments(job), plugins=[Ordering(profile["seconds"], killer), Failing(killed)])
        if status != 0:
            killed("import or collection")

    return judge(body, cpu_limit_s(profile, profile["seconds"]) + CPU_EXTRA_S)


class Ordering:
    """A pytest plugin: the test that killed this mutant the last time first, then the quickest."""

    def __init__(self, seconds: dict[str, float], killer: str) -> None:
        self.seconds = seconds
        self.killer = killer

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: (item.nodeid != self.killer, self.seconds.get(item.nodeid, 0.0)))


if __name__ == "__main__":
    main()
