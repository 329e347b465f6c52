"""The calling side of an endpoint: performs what ``calls.Caller`` decides, with one timer for all calls."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from typing import Any

from gostore.comm import calls, wire
from gostore.comm.calls import Caller, CallLimits, OutCall
from gostore.comm.outbox import Outbox
from gostore.comm.peers import CASTS_WAITING_MAX, CASTS_WAITING_S_MAX, Peer
from gostore.comm.service import Reply
from gostore.comm.wire import HELLO, POKE, REQUEST, RESPONSE, Frame, Origin, ProtocolError
from gostore.core.errors import Forgotten, GoStoreError, InternalError, Timeout, error_from_wire
from gostore.core.events import current_cause
from gostore.env import Env


class Pending:
    """What to send for an outstanding call and whom to tell: ``future``, or the ``origin`` of a redirected request.

    ``serial``: the stream that carries the request.
    """

    __slots__ = ("frame", "future", "origin", "peer", "serial")

    def __init__(self, peer: Peer, frame: Frame, future: asyncio.Future[Any] | None, origin: Origin | None) -> None:
        self.peer = peer
        self.frame = frame
        self.future = future
        self.origin = origin
        self.serial = 0


class Requests:
    """Outstanding calls of one endpoint. ``epoch()`` is the view's; ``refer`` tells an origin of a failed redirect."""

    def __init__(
        self,
        env: Env,
        limits: CallLimits,
        outbox: Outbox,
        epoch: Callable[[], int],
        refer: Callable[[Origin, GoStoreError], None],
    ) -> None:
        self.caller = Caller(limits, env.rng)
        self._outbox = outbox
        self._epoch = epoch
        self._refer = refer
        self._loop = asyncio.get_running_loop()
        # Timers fire for all calls: they must not carry the context (cause, deadline) of the one that armed them.
        self._context = contextvars.copy_context()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = 0.0  # uvloop gives a handle without `when()` for a time that has passed
        self._greetings: dict[int, OutCall] = {}

    def start(
        self, peer: Peer, frame: Frame, deadline_s: float, attempts: int | None, origin: Origin | None = None
    ) -> OutCall:
        """Begin a call; await ``call.payload.future`` and end it. Raises :class:`Unavailable`: too many in flight."""
        now_s, size = self._loop.time(), 0 if origin is None else frame.size_bytes
        call, action = self.caller.start(
            peer.conversation, now_s, deadline_s, attempts, passive=origin is not None, size_bytes=size
        )
        frame.id, frame.parent = call.id, current_cause.get()
        future: asyncio.Future[Any] | None = self._loop.create_future() if origin is None else None
        call.payload = Pending(peer, frame, future, origin)
        if self._timer is None or call.due_s < self._timer_due_s:
            self._arm()
        self.act(action, call)
        return call

    def end(self, call: OutCall) -> None:
        """Nobody waits for this call any more."""
        self.caller.end(call)
        if call.conversation.hello_id in self._greetings:
            del self._greetings[call.conversation.hello_id]

    def close(self, error: Callable[[OutCall], GoStoreError]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for call in self.caller.outstanding():
            self.fail(call, error(call))

    def act(self, action: int, call: OutCall) -> None:
        """Carry out what the caller core decided."""
        if action == calls.SEND:
            self._send(call)
        elif action == calls.HELLO:
            self._hello(call.payload.peer, call)
        elif action == calls.TIMEOUT:
            happened = "it may have happened" if call.bound else "it was never sent, as the peer did not say hello"
            message = f"{self.describe(call)}: no answer in time ({call.sends} sends); {happened}"
            self.fail(call, Timeout(message, definite=not call.bound))

    def fail(self, call: OutCall, error: GoStoreError) -> None:
        """The call ends here, with an error."""
        self.caller.end(call)
        pending: Pending = call.payload
        if pending.origin is not None:
            if not isinstance(error, Timeout):  # whoever asked has the same deadline
                self._refer(pending.origin, error)
        elif pending.future is not None and not pending.future.done():
            self._outbox.count(f"failed_{error.code}")
            pending.future.set_exception(error)

    def lose(self, lost: list[OutCall], peer: Peer) -> None:
        """The callee no longer knows these calls."""
        for call in lost:
            self.fail(
                call,
                Forgotten(
                    f"{self.describe(call)}: {peer.name} restarted, or forgot this caller; "
                    "it may have happened, and it is not run again"
                ),
            )

    def describe(self, call: OutCall) -> str:
        pending: Pending = call.payload
        return f"{pending.frame.route.decode() or 'hello'} on {pending.peer.name or pending.peer.address}"

    def cast_later(self, peer: Peer, frame: Frame) -> None:
        """A cast to a peer that must say hello first."""
        if len(peer.casts) >= CASTS_WAITING_MAX:
            self._outbox.drop(peer.name, "overflow", peer.casts.pop(0)[1].size_bytes)
        frame.parent = current_cause.get()
        peer.casts.append((self._loop.time(), frame))
        self._hello(peer)

    # What arrived

    def on_answer(self, peer: Peer, frame: Frame) -> None:
        call = self.caller.answered(frame.id)
        if call is None:
            self._outbox.count("answers_late")
            return
        future = call.payload.future
        if future.done():
            return
        try:
            value = wire.unpack(frame.body)
        except ProtocolError:
            future.set_exception(InternalError(f"{peer.name} answered {self.describe(call)} with what cannot be read"))
            return
        if frame.kind == RESPONSE:
            future.set_result(Reply(value, frame.data))
        else:
            future.set_exception(error_from_wire(value))

    def on_hello_ack(self, peer: Peer, frame: Frame) -> None:
        now_s, conversation = self._loop.time(), peer.conversation
        contact = self._greetings.pop(frame.id, None)
        if contact is not None:
            conversation.hello_id = frame.id
            if not contact.payload.future.done():
                contact.payload.future.set_result(peer.name)
        before = conversation.session
        lost, waiting_calls = self.caller.greeted(conversation, frame.id, peer.incarnation, frame.acknowledged, now_s)
        if before not in (0, conversation.session):
            peer.outbox.clear()
        self.lose(lost, peer)
        for call in waiting_calls:
            self._send(call)
        if conversation.session and peer.casts:
            waiting, peer.casts = peer.casts, []
            for since_s, cast_frame in waiting:
                if now_s - since_s <= CASTS_WAITING_S_MAX:
                    self._outbox.send(peer, cast_frame)
                else:
                    self._outbox.drop(peer.name, "expired", cast_frame.size_bytes)

    def on_working(self, frame: Frame) -> None:
        self.caller.working(frame.id, self._loop.time())
        self._arm()

    def on_unseen(self, frame: Frame) -> None:
        """The callee has not got what the stream should have brought."""
        call = self.caller.get(frame.id)
        if call is not None and call.bound:
            call.payload.serial = self._outbox.send(call.payload.peer, call.payload.frame)

    def on_refused(self, peer: Peer, frame: Frame) -> None:
        if frame.acknowledged == peer.conversation.session:
            peer.outbox.clear()  # bound to the session that is gone
            self.lose(self.caller.lost(peer.conversation), peer)

    # Sending

    def _send(self, call: OutCall) -> None:
        pending: Pending = call.payload
        frame, peer = pending.frame, pending.peer
        frame.acknowledged = self.caller.acknowledged_below(call.conversation)
        frame.remaining_ms = max(1, min(int((call.deadline_s - self._loop.time()) * 1000), 0xFFFFFFFF))
        frame.epoch = self._epoch()
        if call.sends:
            self._outbox.count("retries")
        self.caller.sent(call)
        if pending.serial and peer.stream is not None and peer.stream.serial == pending.serial:
            poke = Frame(
                REQUEST, call.id, frame.route, flags=POKE, acknowledged=frame.acknowledged, origin=frame.origin
            )
            self._outbox.send(peer, poke, stream=True)
        else:
            pending.serial = self._outbox.send(peer, frame)

    def _hello(self, peer: Peer, call: OutCall | None = None) -> None:
        hello_id = self.caller.greeting(peer.conversation, self._loop.time())
        if hello_id:
            self._outbox.count("hellos")
            if not peer.name and call is not None:
                self._greetings[hello_id] = call
            # A contact may know the TCP port only.
            by_stream = peer.address is not None and peer.address.udp_port == 0
            self._outbox.send(peer, Frame(HELLO, hello_id), stream=by_stream)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due_s = self.caller.next_due_s()
        if due_s is None:
            self._timer = None
            return
        self._timer = self._loop.call_at(due_s, self._on_timer, context=self._context)
        self._timer_due_s = due_s

    def _on_timer(self) -> None:
        self._timer = None
        for action, call in self.caller.due(self._loop.time()):
            self.act(action, call)
        self._arm()
