"""Running remote functions: routes, bounds on concurrency, and what an exception becomes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from typing import Any, Final

from gostore.comm import wire
from gostore.comm.calls import Session
from gostore.comm.service import Call, Function, Redirect, Reply, current_call, functions_of
from gostore.comm.wire import ERROR, RESPONSE, Frame, Origin, ProtocolError
from gostore.core.errors import (
    BadRequest,
    GoStoreError,
    InternalError,
    PolicyError,
    TooLarge,
    Unavailable,
    UnknownFunction,
    UnknownService,
)
from gostore.core.events import EventId, current_cause
from gostore.env import Env

# Requests of one service that run at a time, and that wait for it; more are answered as unavailable. Running handlers
# may wait for calls to other nodes, so the first bound must be generous.
RUNNING_MAX: Final = 1024
WAITING_MAX: Final = 4096
# What the requests of one service, running and waiting, hold in memory; beyond it they are answered as unavailable.
REQUESTS_SIZE_BYTES_MAX: Final = 512 * 1024 * 1024


class Answer:
    """A response or an error, kept until the caller acknowledges it. ``serial``: the stream that it was written to."""

    __slots__ = ("body", "data", "kind", "resends", "serial")

    def __init__(self, kind: int, body: bytes, data: bytes | memoryview = b"") -> None:
        self.kind = kind
        self.body = body
        self.data = data
        self.serial = 0
        self.resends = 0

    @property
    def size_bytes(self) -> int:
        return len(self.body) + len(self.data)


def error_answer(error: GoStoreError) -> Answer:
    try:
        body = wire.pack(error.to_wire())
    except (TypeError, ValueError, OverflowError):
        body = wire.pack([error.code, error.message, error.definite, {}])
    return Answer(ERROR, body)


class Job:
    """One request to run. ``session`` is None for a cast; ``origin`` is where the answer goes."""

    __slots__ = ("cause", "deadline_s", "frame", "function", "origin", "runtime", "session", "session_number")

    def __init__(self, frame: Frame, origin: Origin, session: Session | None, deadline_s: float, cause: EventId | None):
        self.frame = frame
        self.origin = origin
        self.session = session
        self.deadline_s = deadline_s
        self.cause = cause
        self.runtime: Runtime
        self.function: Function


class Runtime:
    """A registered service: how many of its requests run, which wait, and the bytes of both."""

    __slots__ = ("functions", "name", "requests", "running", "size_bytes", "waiting")

    def __init__(self, name: str, functions: dict[str, Function]) -> None:
        self.name = name
        self.functions = functions
        self.requests = 0
        self.running = 0
        self.size_bytes = 0
        self.waiting: deque[Job] = deque()


class Dispatcher:
    """Runs jobs, those that may wait as tasks of the node, and hands their answers on (see :meth:`bind`)."""

    def __init__(self, env: Env, message_size_bytes_max: int, large_size_bytes: int) -> None:
        self._env = env
        self._size_max = message_size_bytes_max
        self._large_size_bytes = large_size_bytes
        self._runtimes: dict[str, Runtime] = {}
        self._routes: dict[bytes, tuple[Runtime, Function]] = {}
        self.casts_failed = 0

    def bind(
        self,
        make_call: Callable[[Job], Call],
        finish: Callable[[Job, Answer], None],
        redirect: Callable[[Job, str], None],
        room: Callable[[Job], Awaitable[None]],
    ) -> None:
        """``finish`` sends an answer and ``redirect`` forwards a request; ``room`` waits until a large one can go."""
        self._loop = asyncio.get_running_loop()
        self._make_call = make_call
        self._finish = finish
        self._redirect = redirect
        self._room = room

    @property
    def running(self) -> int:
        return sum(runtime.running for runtime in self._runtimes.values())

    @property
    def requests(self) -> dict[str, int]:
        """Requests that came in since the start, by service; casts are none."""
        return {name: runtime.requests for name, runtime in sorted(self._runtimes.items())}

    def register(self, service: object) -> None:
        """Raises ``TypeError`` for what is no service and ``ValueError`` when its name is taken."""
        name, functions = functions_of(service)
        if name in self._runtimes:
            raise ValueError(f"service {name!r} is registered twice at {self._env.name}")
        runtime = self._runtimes[name] = Runtime(name, functions)
        for function in functions.values():
            self._routes[function.name.encode()] = (runtime, function)

    def start(self, job: Job) -> None:
        """Run a job now or when there is room; what cannot run is answered at once."""
        found = self._routes.get(job.frame.route)
        if found is None:
            self.fail(job, self._unknown(job.frame.route))
            return
        runtime, job.function = found
        job.runtime = runtime
        if job.session is not None:
            runtime.requests += 1
        if runtime.size_bytes + job.frame.size_bytes > REQUESTS_SIZE_BYTES_MAX or len(runtime.waiting) >= WAITING_MAX:
            message = f"{self._env.name}: {runtime.name} is overloaded ({len(runtime.waiting)} requests wait)"
            self.fail(job, Unavailable(message))
            return
        runtime.size_bytes += job.frame.size_bytes
        if runtime.running < RUNNING_MAX:
            self._launch(job)
        else:
            runtime.waiting.append(job)

    def _unknown(self, route: bytes) -> GoStoreError:
        service, _, function = route.decode(errors="replace").partition(".")
        runtime = self._runtimes.get(service)
        if runtime is None:
            known = ", ".join(sorted(self._runtimes)) or "none"
            return UnknownService(f"{self._env.name} has no service {service!r}; its services: {known}")
        known = ", ".join(runtime.functions)
        return UnknownFunction(f"{service} has no remote function {function!r}; it has: {known}")

    def _launch(self, job: Job) -> None:
        job.runtime.running += 1
        if not job.function.waits:
            copy_context().run(self._run_at_once, job)
            return
        try:
            self._env.tasks.start(self._run(job), name=job.function.name)
        except RuntimeError:  # the node is stopping: no answer, the caller retries until its deadline
            job.runtime.running -= 1

    async def _run(self, job: Job) -> None:
        try:
            call = self._enter(job)
            if call is None:
                return
            answer: Answer | None
            try:
                answer = self._answer(job, await job.function.run(call, *self._arguments(job)))
            except Exception as error:
                answer = self._failed(job, error)
            finally:
                call.finished = True
            if answer is not None:
                if answer.size_bytes > self._large_size_bytes and job.session is not None:
                    await self._room(job)
                self._finish(job, answer)
        finally:
            self._leave(job)

    def _run_at_once(self, job: Job) -> None:
        """A function that never waits needs no task: it runs in the turn in which its frame came in."""
        try:
            call = self._enter(job)
            if call is None:
                return
            answer: Answer | None
            try:
                answer = self._answer(job, job.function.run(call, *self._arguments(job)))
            except Exception as error:
                answer = self._failed(job, error)
            finally:
                call.finished = True
            if answer is not None:
                self._finish(job, answer)
        finally:
            self._leave(job)

    def _enter(self, job: Job) -> Call | None:
        """What the handler gets; None when it is too late to begin."""
        if self._loop.time() >= job.deadline_s:
            self.fail(job, Unavailable(f"{job.function.name}: its deadline passed before it could start"))
            return None
        if job.cause is not None:
            current_cause.set(job.cause)
        call = self._make_call(job)
        current_call.set(call)
        return call

    def _leave(self, job: Job) -> None:
        runtime = job.runtime
        runtime.size_bytes -= job.frame.size_bytes
        runtime.running -= 1
        if runtime.waiting:
            self._launch(runtime.waiting.popleft())

    def _failed(self, job: Job, error: Exception) -> Answer | None:
        """What a handler's exception becomes; None: it was redirected, and another node answers."""
        if isinstance(error, Redirect):
            self._redirect(job, error.to)
            return None
        if isinstance(error, PolicyError):
            error.details.setdefault("node", self._env.name)  # every node has its own copy of the class
        if isinstance(error, GoStoreError):
            return self._error(job, error)
        self._env.log.error("%s failed", job.function.name, exc_info=error)
        return self._error(
            job, InternalError(f"{job.function.name} at {self._env.name}: {type(error).__name__}: {error}")
        )

    def _arguments(self, job: Job) -> list[Any]:
        try:
            arguments = wire.unpack(job.frame.body)
        except ProtocolError:
            raise BadRequest(f"{job.function.name}: the arguments cannot be read") from None
        job.function.check(arguments)
        return arguments  # type: ignore[no-any-return]

    def _answer(self, job: Job, result: Any) -> Answer:
        value, data = (result.value, result.data) if isinstance(result, Reply) else (result, b"")
        try:
            answer = Answer(RESPONSE, wire.pack(value), data)
        except (TypeError, ValueError, OverflowError) as error:
            raise InternalError(f"{job.function.name} returned what cannot be sent: {error}") from None
        if answer.size_bytes > self._size_max:
            raise TooLarge(
                f"{job.function.name}: an answer of {answer.size_bytes} bytes; message_size_bytes_max allows "
                f"{self._size_max}: ask for less at a time",
                definite=False,
            )
        return answer

    def _error(self, job: Job, error: GoStoreError) -> Answer:
        if job.session is None:
            self.casts_failed += 1
            self._env.log.warning("cast %s failed: %s", job.frame.route.decode(errors="replace"), error)
        return error_answer(error)

    def fail(self, job: Job, error: GoStoreError) -> None:
        """Answer with an error."""
        self._finish(job, self._error(job, error))
