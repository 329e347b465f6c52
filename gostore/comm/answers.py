"""The answering side of an endpoint: performs what ``calls.Callee`` decides, redirects, and sends answers again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from gostore.comm import calls
from gostore.comm.calls import Callee, CallLimits, OutCall
from gostore.comm.directory import Directory
from gostore.comm.dispatch import Answer, Dispatcher, Job, error_answer
from gostore.comm.outbox import Outbox
from gostore.comm.peers import Peer
from gostore.comm.requests import Requests
from gostore.comm.service import Call
from gostore.comm.wire import HELLO_ACK, POKE, REFUSED, REQUEST, UNSEEN, WORKING, Frame, Identity, Origin, Packet
from gostore.core.address import Address
from gostore.core.errors import Forgotten, GoStoreError, InternalError, Unavailable
from gostore.core.events import EventId
from gostore.env import Env

# A request may be redirected this often; then it ends, so that nodes cannot toss it for ever.
REDIRECTS_MAX: Final = 4
# An answer that went over a stream which is still open is on its way: this many repeated requests are ignored.
PATIENCE: Final = 2
# What a record of a redirected request weighs among the kept answers.
_REDIRECTED_SIZE_BYTES: Final = 128


class _Redirected:
    """In place of an answer: the call that forwarded the request."""

    __slots__ = ("call",)

    def __init__(self, call: OutCall) -> None:
        self.call = call


class Answers:
    """Requests and casts that arrived at one endpoint of this ``incarnation``."""

    def __init__(
        self,
        env: Env,
        incarnation: int,
        limits: CallLimits,
        outbox: Outbox,
        directory: Directory,
        requests: Requests,
        dispatcher: Dispatcher,
        cast_timeout_s: float,
        make_call: Callable[[Job], Call],
    ) -> None:
        self.callee = Callee(limits)
        self._name = env.name
        self._incarnation = incarnation
        self._outbox = outbox
        self._directory = directory
        self._requests = requests
        self._dispatcher = dispatcher
        self._cast_timeout_s = cast_timeout_s
        self._loop = asyncio.get_running_loop()
        dispatcher.bind(make_call, self._finish, self._redirect, self._room)

    def on_hello(self, peer: Peer, frame: Frame) -> None:
        number = self.callee.hello(peer.name, peer.incarnation)
        peer.session = self.callee.session(peer.name)
        self._outbox.send(peer, Frame(HELLO_ACK, frame.id, acknowledged=number))

    def on_cast(self, peer: Peer, packet: Packet, frame: Frame, cause: EventId | None) -> None:
        session = peer.session
        if session is None or packet.incarnation != self._incarnation or packet.session != session.number:
            self._refuse(peer, packet, frame)
            return
        self._dispatcher.start(Job(frame, self._sender(peer, 0), None, self._loop.time() + self._cast_timeout_s, cause))

    def on_request(self, peer: Peer, packet: Packet, frame: Frame, cause: EventId | None) -> None:
        """Raises :class:`ProtocolError` when the origin cannot be read."""
        session = peer.session
        if session is None or packet.incarnation != self._incarnation:
            self._refuse(peer, packet, frame)
            return
        origin = Origin.parse(frame.origin) if frame.origin else self._sender(peer, frame.id)
        poke = bool(frame.flags & POKE)
        verdict = self.callee.request(session, packet.session, frame.id, frame.acknowledged, poke=poke)
        if self.callee.released:
            self._release()
        if verdict == calls.RUN:
            self._outbox.count("requests")
            deadline_s = self._loop.time() + frame.remaining_ms / 1000
            self._dispatcher.start(Job(frame, origin, session, deadline_s, cause))
        elif verdict == calls.REFUSE:
            self._refuse(peer, packet, frame)
        elif verdict == calls.UNSEEN:
            self._outbox.send(peer, Frame(UNSEEN, frame.id))
        else:
            self._outbox.count("duplicates")
            self._on_duplicate(verdict, origin, self.callee.kept(session, frame.id))

    def refer(self, origin: Origin, error: GoStoreError) -> None:
        """A request that was redirected from here has failed: tell whoever asked first."""
        self._send_answer(origin, error_answer(error))

    def _sender(self, peer: Peer, request_id: int) -> Origin:
        return Origin(peer.name, peer.incarnation, peer.address or Address("", 0, 0), request_id)

    def _refuse(self, peer: Peer, packet: Packet, frame: Frame) -> None:
        self._outbox.count("refused")
        self._outbox.send(peer, Frame(REFUSED, frame.id, acknowledged=packet.session))

    def _on_duplicate(self, verdict: int, origin: Origin, kept: Any) -> None:
        if verdict == calls.WORKING:
            self._send_to(origin, Frame(WORKING, origin.id))
        elif verdict == calls.FORGOTTEN:
            message = f"{self._name} has no record of this request any more; it may have happened"
            self._send_answer(origin, error_answer(Forgotten(message)))
        elif verdict == calls.RESEND:
            if isinstance(kept, _Redirected):
                self._requests.act(self._requests.caller.nudge(kept.call, self._loop.time()), kept.call)
            else:
                self._send_answer(origin, kept)

    def _release(self) -> None:
        released, self.callee.released = self.callee.released, []
        for answer in released:
            if isinstance(answer, _Redirected):
                self._requests.end(answer.call)

    async def _room(self, job: Job) -> None:
        """Back-pressure: return when the stream to the source has room, or its deadline has passed."""
        peer = self._directory.get(job.origin.name)
        if peer is not None and peer.stream is not None:
            try:
                async with asyncio.timeout_at(job.deadline_s):
                    await peer.stream.writable()
            except TimeoutError:
                pass

    def _finish(self, job: Job, answer: Answer) -> None:
        if job.session is not None and self.callee.finish(job.session, job.frame.id, answer, answer.size_bytes):
            self._send_answer(job.origin, answer)

    def _send_answer(self, origin: Origin, answer: Answer) -> None:
        if answer.serial:
            peer = self._directory.get(origin.name)
            if peer is not None and peer.stream is not None and peer.stream.serial == answer.serial:
                answer.resends += 1
                if answer.resends <= PATIENCE:
                    return
        answer.serial = self._send_to(origin, Frame(answer.kind, origin.id, b"", answer.body, answer.data))
        answer.resends = 0

    def _send_to(self, origin: Origin, frame: Frame) -> int:
        """To whoever asked, in the incarnation that asked; the serial of the stream, if it goes over one."""
        peer: Peer | None
        if origin.name == self._name:
            peer = self._directory.me
        else:
            peer = self._directory.get(origin.name)
            if peer is None or peer.incarnation != origin.incarnation:
                peer = self._directory.meet(Identity(origin.name, origin.incarnation, origin.address))
        if peer is None or peer.incarnation != origin.incarnation:
            self._outbox.drop(origin.name, "stale", frame.size_bytes)
            return 0
        return self._outbox.send(peer, frame)

    def _redirect(self, job: Job, to: str) -> None:
        """The handler let ``to`` answer: forward the request; the answer goes straight to the source."""
        frame = job.frame
        if job.session is None:
            self._dispatcher.fail(
                job, InternalError(f"{job.function.name}: a cast cannot be redirected", definite=True)
            )
        elif to == self._name:
            self._dispatcher.fail(job, Unavailable(f"{job.function.name}: {to} redirected to itself"))
        elif frame.hops >= REDIRECTS_MAX:
            message = (
                f"{job.function.name}: redirected more than {REDIRECTS_MAX} times; ask again when the view is settled"
            )
            self._dispatcher.fail(job, Unavailable(message))
        else:
            origin = job.origin.encode()
            forward = Frame(REQUEST, 0, frame.route, frame.body, frame.data, hops=frame.hops + 1, origin=origin)
            try:
                call = self._requests.start(self._directory.find(to), forward, job.deadline_s, None, job.origin)
            except GoStoreError as error:
                self._dispatcher.fail(job, error)
                return
            self._outbox.count("redirects")
            self.callee.finish(job.session, frame.id, _Redirected(call), _REDIRECTED_SIZE_BYTES)
