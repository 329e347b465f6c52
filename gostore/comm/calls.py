"""Calls that run at most once: ids, sessions, retries, deadlines. Events and the time go in, effects come out.

Theory of operation
-------------------
The classic is Birrell and Nelson, "Implementing Remote Procedure Calls" (TOCS 1984), section 3.2. A request is sent
again until it is answered, so the callee must recognise a request that it has seen, *for ever*: it keeps answers until
the caller acknowledges them, and what it no longer knows it must refuse, not run.

*Session.* Before its first request a caller says hello and learns two numbers: the callee's incarnation and a session,
which the callee counts up for each caller that it begins to remember. Requests are bound to both when they are first
sent. A callee that restarted has another incarnation; one that forgot the caller (its table is bounded) has no such
session: both refuse, and the caller's call ends as :class:`~gostore.core.errors.Forgotten`, because nobody can say any
more whether it ran. A caller that has heard nothing from the callee for ``HELLO_IDLE_S`` says hello again first, so
that a restart in between costs a round trip and not an indefinite error.

*Ids* are 64-bit, count up per caller and never wrap. With each request the caller says below which id it awaits no more
answers from this callee (*acknowledged below*): the callee drops its records below it, and drops such requests when
they come late. Answers that must be evicted earlier, for want of room, raise *evicted below*: an unknown request
below that is refused as forgotten.

*The caller* waits for ``attempt_timeout_s``, sends again, and doubles the wait up to ``BACKOFF_MAX`` times, each with
``JITTER`` to keep callers apart (the jitter's random numbers are an argument). It sends a request at most ``attempts``
times; after the last it waits for the deadline. Hellos are not counted: nothing can have happened yet, and the deadline
ends them. A callee that is still at work says so, and that attempt is not counted either.

*Redirected requests* are passive calls of the redirecting node: the answer goes from the owner straight to the source,
so they end when the source acknowledges; they are sent again only when the source asks again.

One heap of deadlines serves all calls, so the driver needs one timer.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from gostore.core.errors import Unavailable
from gostore.core.ports import Rng

# A peer unheard for this long is asked for its incarnation before it gets a request. Smaller: more round trips on idle
# links; larger: more calls end as "forgotten" after a restart. Seconds.
HELLO_IDLE_S: Final = 3.0
# Retries wait up to this many times the first wait: with 0.25 s at most 2 s.
BACKOFF_MAX: Final = 8
JITTER: Final = 0.2
# Requests that this node has redirected and whose source has not acknowledged the answer.
PASSIVE_MAX: Final = 16_384
# What these hold in memory until they are acknowledged or time out.
PASSIVE_SIZE_BYTES_MAX: Final = 256 * 1024 * 1024
# Answers kept for all callers together; beyond it the oldest are evicted.
ANSWERS_SIZE_BYTES_MAX: Final = 256 * 1024 * 1024

# What the driver is to do for a call.
WAIT: Final = 0
SEND: Final = 1
HELLO: Final = 2
TIMEOUT: Final = 3

# What the driver is to do with a request that arrived.
RUN: Final = 10
WORKING: Final = 11
RESEND: Final = 12
DROP: Final = 13
REFUSE: Final = 14
FORGOTTEN: Final = 15
UNSEEN: Final = 16


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Bounds and time constants; seconds."""

    attempt_timeout_s: float
    attempts_max: int
    calls_in_flight_max: int
    answers_kept_max: int


class Conversation:
    """What a caller knows about one callee. ``session`` is 0 while it is unknown."""

    __slots__ = ("calls", "heard_s", "hello_id", "hello_s", "incarnation", "name", "session")

    def __init__(self, name: str) -> None:
        self.name = name
        self.incarnation = 0
        self.session = 0
        self.heard_s = float("-inf")
        self.hello_id = 0
        self.hello_s = float("-inf")
        self.calls: dict[int, OutCall] = {}

    def fresh(self, now_s: float) -> bool:
        """Whether a new request may be sent at once."""
        return self.session != 0 and now_s - self.heard_s < HELLO_IDLE_S


class OutCall:
    """One call that is not answered yet. ``bound``: the request was sent, so it may have run."""

    __slots__ = (
        "attempts_left",
        "bound",
        "conversation",
        "deadline_s",
        "done",
        "due_s",
        "id",
        "passive",
        "payload",
        "sends",
        "size_bytes",
        "wait_s",
    )

    def __init__(self, request_id: int, conversation: Conversation, deadline_s: float, attempts: int) -> None:
        self.id = request_id
        self.conversation = conversation
        self.deadline_s = deadline_s
        self.attempts_left = attempts
        self.sends = 0
        self.bound = False
        self.done = False
        self.passive = False
        self.size_bytes = 0
        self.wait_s = 0.0
        self.due_s = 0.0
        self.payload: Any = None
        """The driver's: what to send and whom to tell."""


class Caller:
    """The calling side of one endpoint."""

    def __init__(self, limits: CallLimits, rng: Rng) -> None:
        self._limits = limits
        self._rng = rng
        self._next_id = 1
        self._calls: dict[int, OutCall] = {}
        self._passive = 0
        self._passive_bytes = 0
        self._due: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def outstanding(self) -> list[OutCall]:
        """All calls that have not ended, oldest first."""
        return list(self._calls.values())

    def get(self, request_id: int) -> OutCall | None:
        return self._calls.get(request_id)

    def new_id(self) -> int:
        """An id that no other message of this endpoint's incarnation has."""
        found = self._next_id
        self._next_id += 1
        return found

    def acknowledged_below(self, conversation: Conversation) -> int:
        """No answer from this callee to a request below this is awaited."""
        for first in conversation.calls:
            return first
        return self._next_id

    def start(
        self,
        conversation: Conversation,
        now_s: float,
        deadline_s: float,
        attempts: int | None = None,
        *,
        passive: bool = False,
        size_bytes: int = 0,
    ) -> tuple[OutCall, int]:
        """A new call and what to do first: SEND or HELLO. ``size_bytes``: what a passive one holds in memory.

        The driver must report each SEND that it carries out with :meth:`sent`. Raises :class:`Unavailable` when too
        many calls are in flight.
        """
        if passive:
            if self._passive >= PASSIVE_MAX or self._passive_bytes + size_bytes > PASSIVE_SIZE_BYTES_MAX:
                raise Unavailable(f"{self._passive} redirected requests await their acknowledgement: ask again later")
        elif len(self._calls) - self._passive >= self._limits.calls_in_flight_max:
            raise Unavailable(
                f"calls_in_flight_max = {self._limits.calls_in_flight_max} allows no more: await some first"
            )
        call = OutCall(self.new_id(), conversation, deadline_s, attempts or self._limits.attempts_max)
        if passive:
            call.passive, call.size_bytes = True, size_bytes
            self._passive += 1
            self._passive_bytes += size_bytes
        self._calls[call.id] = conversation.calls[call.id] = call
        self._arm(call, now_s, self._limits.attempt_timeout_s)
        return call, self._action(call, now_s)

    def sent(self, call: OutCall) -> None:
        """The request goes out now, bound to the conversation's incarnation and session."""
        call.bound = True
        call.sends += 1
        call.attempts_left -= 1

    def end(self, call: OutCall) -> None:
        """Nobody waits for this call any more."""
        if not call.done:
            call.done = True
            if call.passive:
                self._passive -= 1
                self._passive_bytes -= call.size_bytes
            self._calls.pop(call.id, None)
            call.conversation.calls.pop(call.id, None)

    def answered(self, request_id: int) -> OutCall | None:
        """The call that this answer ends; None when it has ended already (a duplicate, or too late)."""
        call = self._calls.get(request_id)
        if call is None or not call.bound or call.passive:
            return None
        self.end(call)
        return call

    def working(self, request_id: int, now_s: float) -> None:
        """The callee has the request and is at work: that attempt does not count, and the next is far."""
        call = self._calls.get(request_id)
        if call is not None and not call.passive:
            call.attempts_left += 1
            self._arm(call, now_s, self._limits.attempt_timeout_s * BACKOFF_MAX)

    def greeting(self, conversation: Conversation, now_s: float) -> int:
        """The id of the hello to send now; 0 when one went out a moment ago."""
        if now_s - conversation.hello_s < self._limits.attempt_timeout_s / 2:
            return 0
        conversation.hello_s = now_s
        # One id until it is answered: with a new one each time, a slow link would never bring the answer to the last.
        conversation.hello_id = conversation.hello_id or self.new_id()
        return conversation.hello_id

    def greeted(
        self, conversation: Conversation, hello_id: int, incarnation: int, session: int, now_s: float
    ) -> tuple[list[OutCall], list[OutCall]]:
        """A hello was answered: the calls lost with a former session, and those to SEND now.

        An answer to a hello of the past is ignored.
        """
        if hello_id != conversation.hello_id or incarnation != conversation.incarnation:
            return [], []
        lost = self.lost(conversation) if session != conversation.session else []
        conversation.hello_id = 0
        conversation.hello_s = float("-inf")
        conversation.heard_s = now_s
        conversation.session = session
        return lost, [call for call in conversation.calls.values() if not call.bound]

    def met(self, conversation: Conversation, incarnation: int) -> list[OutCall]:
        """The peer lives in this incarnation: the calls that a former one took with it (they end as Forgotten)."""
        if incarnation == conversation.incarnation:
            return []
        conversation.incarnation = incarnation
        return self.lost(conversation)

    def lost(self, conversation: Conversation) -> list[OutCall]:
        """The callee no longer knows this session: its bound calls, which end as Forgotten."""
        conversation.session = 0
        ended = [call for call in conversation.calls.values() if call.bound]
        for call in ended:
            self.end(call)
        return ended

    def nudge(self, call: OutCall, now_s: float) -> int:
        """The source of a passive call asks again: what to do."""
        return WAIT if call.done else self._action(call, now_s)

    def next_due_s(self) -> float | None:
        """When :meth:`due` wants to be called next."""
        heap = self._due
        while heap:
            when, request_id = heap[0]
            call = self._calls.get(request_id)
            if call is not None and call.due_s == when:
                return when
            heapq.heappop(heap)
        return None

    def due(self, now_s: float) -> list[tuple[int, OutCall]]:
        """What is to be done at this time: (SEND, HELLO or TIMEOUT, call). A call that timed out has ended."""
        effects = []
        while (when := self.next_due_s()) is not None and when <= now_s:
            call = self._calls[heapq.heappop(self._due)[1]]
            if now_s >= call.deadline_s:
                self.end(call)
                effects.append((TIMEOUT, call))
                continue
            if call.passive or call.attempts_left <= 0:
                self._push(call, call.deadline_s)
                continue
            self._arm(call, now_s, min(call.wait_s * 2, self._limits.attempt_timeout_s * BACKOFF_MAX))
            effects.append((self._action(call, now_s), call))
        return effects

    def _action(self, call: OutCall, now_s: float) -> int:
        # A request keeps the session it is bound to: were that lost, the call would have ended.
        return SEND if call.bound or call.conversation.fresh(now_s) else HELLO

    def _arm(self, call: OutCall, now_s: float, wait_s: float) -> None:
        call.wait_s = wait_s
        if call.passive:
            self._push(call, call.deadline_s)
            return
        jitter = 1.0 - JITTER + 2.0 * JITTER * self._rng.random()
        self._push(call, min(now_s + wait_s * jitter, call.deadline_s))

    def _push(self, call: OutCall, when: float) -> None:
        call.due_s = when
        heapq.heappush(self._due, (when, call.id))


class Shelf:
    """The kept answers of all sessions, in the order of completion, under one bound of bytes."""

    __slots__ = ("_order", "size_bytes")

    def __init__(self) -> None:
        self._order: dict[tuple[int, int], Session] = {}
        self.size_bytes = 0

    def put(self, session: Session, request_id: int, size_bytes: int) -> None:
        self._order[session.number, request_id] = session
        self.size_bytes += size_bytes

    def take(self, session: Session, request_id: int, size_bytes: int) -> None:
        del self._order[session.number, request_id]
        self.size_bytes -= size_bytes

    def shrink(self) -> None:
        """Evict the oldest while there is too much; the last one stays."""
        while self.size_bytes > ANSWERS_SIZE_BYTES_MAX and len(self._order) > 1:
            (_, request_id), session = next(iter(self._order.items()))
            session.evict(request_id)


class Session:
    """What a callee remembers of one caller's incarnation."""

    __slots__ = (
        "_ids",
        "_shelf",
        "acknowledged",
        "closed",
        "done",
        "evicted_below",
        "incarnation",
        "number",
        "running",
    )

    def __init__(self, incarnation: int, number: int, shelf: Shelf) -> None:
        self.incarnation = incarnation
        self.number = number
        self.acknowledged = 0
        self.evicted_below = 0
        self.closed = False
        self.running: dict[int, None] = {}
        self.done: dict[int, tuple[Any, int]] = {}  # id -> (answer, its size), in the order of completion
        self._ids: list[int] = []  # heap of the ids in ``done``, for acknowledgements
        self._shelf = shelf

    def acknowledge(self, below: int) -> Iterator[Any]:
        """Forget the answers that the caller has; gives them."""
        self.acknowledged = below
        while self._ids and self._ids[0] < below:
            request_id = heapq.heappop(self._ids)
            if request_id in self.done:
                yield self._remove(request_id)

    def keep(self, request_id: int, answer: Any, size_bytes: int, kept_max: int) -> None:
        """Keep an answer until it is acknowledged, and evict the oldest while there are too many."""
        if request_id < self.acknowledged or self.closed:
            return
        self.done[request_id] = (answer, size_bytes)
        self._shelf.put(self, request_id, size_bytes)
        heapq.heappush(self._ids, request_id)
        if len(self.done) > kept_max:
            self.evict(next(iter(self.done)))
        self._shelf.shrink()
        if len(self._ids) > 2 * kept_max:  # evicted ids go when they come up, or here
            self._ids = sorted(self.done)

    def evict(self, request_id: int) -> None:
        """Forget an answer that the caller may still ask for."""
        self._remove(request_id)
        self.evicted_below = max(self.evicted_below, request_id + 1)

    def close(self) -> None:
        """The caller is forgotten, or restarted."""
        self.closed = True
        for request_id in tuple(self.done):
            self._remove(request_id)

    def _remove(self, request_id: int) -> Any:
        answer, size_bytes = self.done.pop(request_id)
        self._shelf.take(self, request_id, size_bytes)
        return answer


class Callee:
    """The answering side of one endpoint: who called, what runs, what was answered."""

    def __init__(self, limits: CallLimits) -> None:
        self._kept_max = limits.answers_kept_max
        self._sessions: dict[str, Session] = {}
        self._last_session = 0
        self._shelf = Shelf()
        self.released: list[Any] = []
        """Answers that the callers have acknowledged since the driver last emptied this list."""

    @property
    def kept_bytes(self) -> int:
        """What all kept answers hold in memory."""
        return self._shelf.size_bytes

    def session(self, name: str) -> Session | None:
        return self._sessions.get(name)

    def hello(self, name: str, incarnation: int) -> int:
        """A caller says hello: the number of its session. The driver has dropped hellos of former incarnations."""
        session = self._sessions.get(name)
        if session is None or session.incarnation != incarnation:
            self.forget(name)
            self._last_session += 1
            session = self._sessions[name] = Session(incarnation, self._last_session, self._shelf)
        return session.number

    def forget(self, name: str) -> None:
        """Room is needed: this caller's requests will be refused until it says hello again."""
        session = self._sessions.pop(name, None)
        if session is not None:
            session.close()

    def request(
        self, session: Session | None, number: int, request_id: int, acknowledged_below: int, *, poke: bool = False
    ) -> int:
        """A request arrived for session ``number`` (of this incarnation): what to do with it.

        RUN (then :meth:`finish` is due), WORKING, RESEND (:meth:`kept`), DROP, REFUSE (the session is gone),
        FORGOTTEN (this request's record is), or for a poke UNSEEN.
        """
        if session is None or session.number != number:
            return REFUSE
        if acknowledged_below > session.acknowledged:
            self.released.extend(session.acknowledge(acknowledged_below))
        if request_id in session.running:
            return WORKING
        if request_id in session.done:
            return RESEND
        if request_id < session.acknowledged:
            return DROP
        if request_id < session.evicted_below:
            return FORGOTTEN
        if poke:
            return UNSEEN
        if len(session.running) >= self._kept_max:
            return DROP  # not recorded, so the caller's next attempt may run
        session.running[request_id] = None
        return RUN

    def finish(self, session: Session, request_id: int, answer: Any, size_bytes: int) -> bool:
        """The request has run. False when nobody waits for its answer."""
        del session.running[request_id]
        session.keep(request_id, answer, size_bytes, self._kept_max)
        return request_id >= session.acknowledged

    def kept(self, session: Session, request_id: int) -> Any:
        """The answer of a request that is to be answered again (RESEND); None for any other."""
        found = session.done.get(request_id)
        return None if found is None else found[0]
