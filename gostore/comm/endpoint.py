"""An endpoint: calls, casts and their answers over UDP and TCP.

The protocol is in ``wire`` (bytes) and ``calls`` (at most once, retries, deadlines); this module performs their
effects on asyncio's standard transports. It holds one timer for all outstanding calls, and no task per call.

The way of a request: :meth:`Endpoint.call` -> ``Caller.start`` -> ``Outbox.send`` -> packet -> ``_on_packet`` of the
peer (tag, incarnation, replay window) -> link faults -> ``_on_frame`` -> ``Callee.request`` -> ``Dispatcher.start`` ->
handler -> ``_finish`` -> ``Outbox.send`` to the *origin*, which is the source also when another node redirected the
request. A call to oneself takes the same way but for the packet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final, Protocol, cast

from gostore.comm import calls, wire
from gostore.comm.calls import Callee, Caller, CallLimits, OutCall
from gostore.comm.dispatch import Answer, Dispatcher, Job, error_answer
from gostore.comm.links import DELAYED_FRAMES_MAX, Links
from gostore.comm.outbox import Outbox
from gostore.comm.peers import CASTS_WAITING_MAX, CASTS_WAITING_S_MAX, Peer, PeerTable
from gostore.comm.service import Call, Reply, current_call
from gostore.comm.transport import STREAM_QUEUE_SIZE_BYTES, Datagrams, Inbound
from gostore.comm.wire import (
    CAST,
    ERROR,
    HELLO,
    HELLO_ACK,
    KIND_NAMES,
    PACKET_OVERHEAD_BYTES_MAX,
    POKE,
    REFUSED,
    REQUEST,
    RESPONSE,
    UNSEEN,
    WORKING,
    Codec,
    Frame,
    Identity,
    Origin,
    Packet,
    ProtocolError,
)
from gostore.config import CommConfig
from gostore.core.address import Address
from gostore.core.errors import (
    BadRequest,
    ConfigError,
    Forgotten,
    GoStoreError,
    InternalError,
    NotOwner,
    Timeout,
    TooLarge,
    Unavailable,
    Unreachable,
    error_from_wire,
)
from gostore.core.events import EventId
from gostore.env import Env

# A request may be redirected this often; then it ends, so that two nodes cannot toss it for ever.
REDIRECTS_MAX: Final = 4
# An answer that went over a stream which is still open is on its way: this many repeated requests are ignored.
PATIENCE: Final = 2
_FOREVER: Final = float("inf")


class Resolver(Protocol):
    """Who knows the members' addresses."""

    def address(self, name: str) -> Address | None: ...


class _Pending:
    """The driver's part of an outstanding call. ``origin``: set when this node redirected it (then no future)."""

    __slots__ = ("frame", "future", "origin", "peer", "serial")

    def __init__(self, peer: Peer, frame: Frame, future: asyncio.Future[Any] | None, origin: Origin | None) -> None:
        self.peer = peer
        self.frame = frame
        self.future = future
        self.origin = origin
        self.serial = 0


class _Redirected:
    """In place of an answer: the call that forwarded the request."""

    __slots__ = ("call",)

    def __init__(self, call: OutCall) -> None:
        self.call = call


class Endpoint:
    """See the module. ``incarnation`` (at least 1) must rise with every start under the same name."""

    def __init__(
        self,
        env: Env,
        *,
        cluster: str,
        secret: str,
        host: str,
        tcp_port: int = 0,
        udp_port: int = 0,
        incarnation: int,
        resolver: Resolver,
        config: CommConfig,
    ) -> None:
        if incarnation < 1:
            raise ConfigError(f"incarnation = {incarnation}: allowed are values from 1")
        self.env = env
        self.name = env.name
        self.incarnation = incarnation
        self.epoch = 0
        """The epoch of this node's view; travels with every request (cls keeps it up to date)."""
        self.config = config
        self.address = Address(host, tcp_port, udp_port)
        self.links = Links()
        self._resolver = resolver
        self._codec = Codec(cluster, secret)
        limits = CallLimits(
            config.attempt_timeout_s, config.attempts_max, config.calls_in_flight_max, config.answers_kept_max
        )
        self._caller = Caller(limits, env.rng)
        self._callee = Callee(limits)
        self._peers = PeerTable(config.peers_max)
        self._contacts: dict[Address, str] = {}
        self._greetings: dict[int, OutCall] = {}
        self._inbound: dict[Inbound, None] = {}
        self._routes: dict[tuple[str, str], bytes] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._delayed = 0
        self._paused = False
        self._closed = False
        self._server: asyncio.Server | None = None
        self._datagrams: Datagrams | None = None
        self._outbox: Outbox
        self._loop: asyncio.AbstractEventLoop
        self._statistics: dict[str, int] = {}
        self._dispatcher = Dispatcher(
            env, config.message_size_bytes_max, self._make_call, self._finish, self._redirect, self._count
        )

    # Life

    async def start(self) -> None:
        """Bind and listen. Raises :class:`ConfigError` that names host and port when that is impossible."""
        self._loop = loop = asyncio.get_running_loop()
        host, sockets = self.address.host, self.env.sockets
        self._outbox = Outbox(
            self.env, self._codec, self.links, self.config.udp_size_bytes_max, self._address_of, self._on_local
        )
        self._outbox.statistics = self._statistics
        what, port = "tcp_port", self.address.tcp_port
        try:
            if "tcp" in sockets:
                self._server = await loop.create_server(self._accept, sock=sockets["tcp"])
            else:
                self._server = await loop.create_server(self._accept, host, port)
            what, port = "udp_port", self.address.udp_port
            if "udp" in sockets:
                transport, datagrams = await loop.create_datagram_endpoint(
                    lambda: Datagrams(self._on_packet), sock=sockets["udp"]
                )
            else:
                transport, datagrams = await loop.create_datagram_endpoint(
                    lambda: Datagrams(self._on_packet), local_addr=(host, port)
                )
        except OSError as error:
            if self._server is not None:
                self._server.close()
                await self._server.wait_closed()
            raise ConfigError(
                f"host = {host!r}, {what} = {port}: cannot listen there: {error.strerror or error}"
            ) from None
        self._datagrams = datagrams
        tcp_port = self._server.sockets[0].getsockname()[1]
        self.address = Address(host, tcp_port, transport.get_extra_info("sockname")[1])
        # A node that listens everywhere is answered where its packets come from.
        shown = "" if host in ("0.0.0.0", "::") else host  # noqa: S104
        identity = Identity(self.name, self.incarnation, Address(shown, self.address.tcp_port, self.address.udp_port))
        self._outbox.open(transport, datagrams, identity)
        self._open_local(identity)

    def _open_local(self, identity: Identity) -> None:
        """The way to oneself: a peer that is always known, in this very incarnation."""
        number = self._callee.hello(self.name, self.incarnation)
        self._self = peer = Peer(self.name, self.address)
        peer.incarnation = peer.conversation.incarnation = self.incarnation
        peer.session = self._callee.session(self.name)
        peer.conversation.session = number
        peer.conversation.heard_s = _FOREVER
        self._self_packet = Packet(peer.encoded, self.incarnation, number, 0, identity, [])

    async def stop(self) -> None:
        """Close everything; outstanding calls end as unavailable. Handlers are tasks of the env, which ends them."""
        if self._closed or self._datagrams is None:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for call in self._caller.outstanding():
            self._end(call, Unavailable(f"{self.name} has stopped", definite=not call.bound))
        self._outbox.close()
        for inbound in tuple(self._inbound):
            inbound.abort()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
        await self._datagrams.closed

    def pause(self) -> None:
        """Fall silent: nothing is read, answered or sent until :meth:`resume` (as if the process were stopped)."""
        self._paused = self._outbox.paused = True
        for inbound in self._inbound:
            inbound.pause()

    def resume(self) -> None:
        self._paused = self._outbox.paused = False
        for inbound in tuple(self._inbound):
            inbound.resume()

    def register(self, service: object) -> None:
        """Make a service's remote functions callable.

        Raises ``TypeError`` for an object without @service and ``ValueError`` when the name is taken.
        """
        self._dispatcher.register(service)

    def forget(self, name: str) -> None:
        """A member left: drop what is known of it. Calls to it end as forgotten, or unreachable if never sent."""
        peer = self._peers.remove(name)
        if peer is not None:
            for call in tuple(peer.conversation.calls.values()):
                error = Forgotten if call.bound else Unreachable
                self._end(call, error(f"{name} has left while {self._describe(call)} was under way"))
            self._dismiss(peer)

    def statistics(self) -> dict[str, int]:
        """Counters since the start, by name (``dropped_<reason>``, ``sent_...``), and what there is now."""
        found = dict(sorted(self._statistics.items()))
        found["icmp_errors"] = self._datagrams.errors if self._datagrams is not None else 0
        found["calls_in_flight"] = len(self._caller)
        found["handlers_running"] = self._dispatcher.running
        found["peers"] = len(self._peers)
        return found

    # Calling

    async def call(
        self,
        to: str | Address,
        service: str,
        function: str,
        *args: Any,
        data: bytes | memoryview = b"",
        timeout_s: float | None = None,
        attempts: int | None = None,
    ) -> Reply:
        """Ask ``to`` and wait for its answer. It runs there at most once per incarnation of the callee.

        ``timeout_s``: until the deadline; by default what remains of the request being handled, or the configured
        timeout. ``attempts``: how often the request is sent at most. Raises what the callee raised, and
        :class:`Timeout`, :class:`Forgotten` (both may have happened), :class:`Unreachable` (unknown peer),
        :class:`TooLarge`, :class:`Unavailable`.
        """
        deadline_s = self._deadline(timeout_s)
        if isinstance(to, Address):
            to = await self._contact(to, deadline_s)
        frame = Frame(REQUEST, 0, self._route(service, function), self._pack(service, function, args), data)
        size = frame.size_bytes
        if size > self.config.message_size_bytes_max:
            raise TooLarge(
                f"{service}.{function}: {size} bytes; message_size_bytes_max allows "
                f"{self.config.message_size_bytes_max}: send less at a time"
            )
        peer = self._peer_to(to)
        if size > self.config.udp_size_bytes_max:
            await self._writable(peer, deadline_s)
        call = self._start(peer, frame, deadline_s, attempts)
        try:
            return cast(Reply, await call.payload.future)
        finally:
            self._caller.end(call)

    async def call_first(
        self,
        to: Sequence[str],
        service: str,
        function: str,
        *args: Any,
        data: bytes | memoryview = b"",
        timeout_s: float | None = None,
        attempts: int | None = None,
    ) -> Reply:
        """Ask one after the other until one answers; the time is shared among those left.

        The next is asked only when the one before surely did nothing and another may do better: it is unreachable,
        unavailable or no owner. Any other error is the answer. Raises the last of these errors.
        """
        deadline_s = self._deadline(timeout_s)
        last: GoStoreError = Unreachable(f"{service}.{function}: there is nobody to ask")
        for index, name in enumerate(to):
            share_s = (deadline_s - self._loop.time()) / (len(to) - index)
            try:
                return await self.call(name, service, function, *args, data=data, timeout_s=share_s, attempts=attempts)
            except (Unreachable, Unavailable, NotOwner, Timeout) as error:
                if not error.definite:
                    raise
                last = error
        raise last

    def cast(self, to: str | Address, service: str, function: str, *args: Any, data: bytes | memoryview = b"") -> None:
        """Tell and do not wait: no answer, no retry, and nothing is raised when it does not arrive.

        Raises :class:`BadRequest` for arguments that cannot be sent and :class:`TooLarge`.
        """
        frame = Frame(CAST, 0, self._route(service, function), self._pack(service, function, args), data)
        if frame.size_bytes > self.config.message_size_bytes_max:
            raise TooLarge(f"{service}.{function}: {frame.size_bytes} bytes are too many for one message")
        name = self._contacts.get(to) if isinstance(to, Address) else to
        try:
            peer = self._peer_to(name) if name is not None else None
        except (Unreachable, Unavailable):
            peer = None
        if peer is None or self._closed:
            self._outbox.drop(str(to), "unreachable", frame.size_bytes)
        elif peer.conversation.session:
            frame.epoch = self.epoch
            self._outbox.send(peer, frame)
        else:
            self._cast_later(peer, frame)

    def _cast_later(self, peer: Peer, frame: Frame) -> None:
        if len(peer.casts) >= CASTS_WAITING_MAX:
            self._outbox.drop(peer.name, "overflow", peer.casts.pop(0)[1].size_bytes)
        peer.casts.append((self._loop.time(), frame))
        self._hello(peer)

    def _deadline(self, timeout_s: float | None) -> float:
        now_s = self._loop.time()
        if self._closed:
            raise Unavailable(f"{self.name} has stopped")
        if timeout_s is None:
            handled = current_call.get()
            if handled is None or handled.finished:
                return now_s + self.config.timeout_s
            deadline_s = handled.deadline_s
        else:
            deadline_s = now_s + timeout_s
        if deadline_s <= now_s:
            raise Timeout("no time is left for this call; it was not sent", definite=True)
        return deadline_s

    def _route(self, service: str, function: str) -> bytes:
        route = self._routes.get((service, function))
        if route is None:
            route = f"{service}.{function}".encode()
            if len(route) > 255:
                raise BadRequest(f"{service}.{function}: longer than 255 bytes")
            if len(self._routes) < self.config.peers_max:
                self._routes[service, function] = route
        return route

    def _pack(self, service: str, function: str, args: tuple[Any, ...]) -> bytes:
        try:
            return wire.pack(args)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadRequest(f"{service}.{function}: an argument cannot be sent: {error}") from None

    def _peer_to(self, name: str) -> Peer:
        """Raises :class:`Unreachable` for a name that neither the resolver nor any packet made known."""
        if name == self.name:
            return self._self
        peer = self._peers.get(name)
        if peer is None:
            address = self._resolver.address(name)
            if address is None:
                raise Unreachable(f"{self.name} knows no {name!r}")
            peer = self._add_peer(name, address)
            if peer is None:
                raise Unavailable(f"{self.name} talks to peers_max = {self.config.peers_max} peers; ask again later")
        elif peer.address is None and self._resolver.address(name) is None:
            raise Unreachable(f"{self.name} knows no {name!r}")
        return peer

    def _add_peer(self, name: str, address: Address | None) -> Peer | None:
        peer = self._peers.add(name, address)
        while self._peers.evicted:
            self._dismiss(self._peers.evicted.pop())
        return peer

    def _dismiss(self, peer: Peer) -> None:
        self._callee.forget(peer.name)
        if peer.stream is not None:
            peer.stream.abort()

    def _address_of(self, peer: Peer) -> Address | None:
        """Where to send: what the members' list says; for others, where they asked to be answered."""
        return (self._resolver.address(peer.name) if peer.name else None) or peer.address

    async def _writable(self, peer: Peer, deadline_s: float) -> None:
        """Back-pressure: wait while much is queued on the peer's stream."""
        stream = peer.stream
        if stream is not None and stream.queued_bytes > STREAM_QUEUE_SIZE_BYTES:
            try:
                async with asyncio.timeout_at(deadline_s):
                    await stream.writable()
            except TimeoutError:
                raise Timeout(f"{peer.name} takes no more data; the request was not sent", definite=True) from None

    async def _contact(self, address: Address, deadline_s: float) -> str:
        """The name of whoever listens at an address; over TCP when its UDP port is not known (0)."""
        if address == self.address:
            return self.name
        name = self._contacts.get(address)
        if name is not None and self._peers.get(name) is not None:
            return name
        call = self._start(Peer("", address), Frame(HELLO), deadline_s, None)
        try:
            name = cast(str, await call.payload.future)
        finally:
            self._caller.end(call)
            self._greetings.pop(call.conversation.hello_id, None)
            stream = call.payload.peer.stream
            if stream is not None:
                stream.abort()
        if len(self._contacts) >= self.config.peers_max:
            self._contacts.clear()
        self._contacts[address] = name
        return name

    # Outstanding calls

    def _start(
        self,
        peer: Peer,
        frame: Frame,
        deadline_s: float,
        attempts: int | None,
        origin: Origin | None = None,
    ) -> OutCall:
        call, action = self._caller.start(
            peer.conversation, self._loop.time(), deadline_s, attempts, passive=origin is not None
        )
        frame.id = call.id
        future: asyncio.Future[Any] | None = self._loop.create_future() if origin is None else None
        call.payload = _Pending(peer, frame, future, origin)
        timer = self._timer
        if timer is None or call.due_s < timer.when():
            self._arm()
        self._act(action, call)
        return call

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due_s = self._caller.next_due_s()
        self._timer = None if due_s is None else self._loop.call_at(due_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        for action, call in self._caller.due(self._loop.time()):
            self._act(action, call)
        self._arm()

    def _act(self, action: int, call: OutCall) -> None:
        if action == calls.SEND:
            self._send_request(call)
        elif action == calls.HELLO:
            self._hello(call.payload.peer, call)
        elif action == calls.TIMEOUT:
            self._count("timeouts")
            happened = "it may have happened" if call.bound else "it was never sent, as the peer did not say hello"
            self._end(
                call,
                Timeout(
                    f"{self._describe(call)}: no answer in time ({call.sends} sends); {happened}",
                    definite=not call.bound,
                ),
            )

    def _send_request(self, call: OutCall) -> None:
        pending: _Pending = call.payload
        frame, peer = pending.frame, pending.peer
        frame.acknowledged = self._caller.acknowledged_below(call.conversation)
        frame.remaining_ms = max(1, min(int((call.deadline_s - self._loop.time()) * 1000), 0xFFFFFFFF))
        frame.epoch = self.epoch
        if call.sends:
            self._count("retries")
        self._caller.sent(call)
        if pending.serial and peer.stream is not None and peer.stream.serial == pending.serial:
            poke = Frame(
                REQUEST, call.id, frame.route, flags=POKE, acknowledged=frame.acknowledged, origin=frame.origin
            )
            self._outbox.send(peer, poke, stream=True)
        else:
            pending.serial = self._outbox.send(peer, frame)

    def _hello(self, peer: Peer, contact: OutCall | None = None) -> None:
        hello_id = self._caller.greeting(peer.conversation, self._loop.time())
        if hello_id:
            self._count("hellos")
            if not peer.name and contact is not None:
                self._greetings[hello_id] = contact
            by_stream = not peer.name and peer.address is not None and peer.address.udp_port == 0
            self._outbox.send(peer, Frame(HELLO, hello_id), stream=by_stream)

    def _end(self, call: OutCall, error: GoStoreError) -> None:
        """The call has failed here."""
        self._caller.end(call)
        pending: _Pending = call.payload
        if pending.origin is not None:
            if not isinstance(error, Timeout):  # whoever asked has the same deadline
                self._send_answer(pending.origin, error_answer(error))
        elif pending.future is not None and not pending.future.done():
            pending.future.set_exception(error)

    def _lose(self, lost: list[OutCall], peer: Peer) -> None:
        for call in lost:
            self._count("forgotten")
            self._end(
                call,
                Forgotten(
                    f"{self._describe(call)}: {peer.name} restarted, or forgot this caller; "
                    "it may have happened, and it is not run again"
                ),
            )

    def _describe(self, call: OutCall) -> str:
        pending: _Pending = call.payload
        return f"{pending.frame.route.decode() or 'hello'} on {pending.peer.name or pending.peer.address}"

    # Arriving

    def _accept(self) -> Inbound:
        return Inbound(
            self._on_packet,
            self._on_accepted,
            self._on_inbound_lost,
            lambda reason, size: self._outbox.drop("", reason, size),
            self.config.message_size_bytes_max + PACKET_OVERHEAD_BYTES_MAX,
        )

    def _on_accepted(self, inbound: Inbound) -> bool:
        if self._closed:
            return False
        if len(self._inbound) >= self.config.peers_max:
            unproven = next((found for found in self._inbound if not found.proven), None)
            if unproven is None:
                self._outbox.drop("", "connections", 0)
                return False
            unproven.abort()
        self._inbound[inbound] = None
        if self._paused:
            inbound.pause()
        return True

    def _on_inbound_lost(self, inbound: Inbound) -> None:
        self._inbound.pop(inbound, None)

    def _on_packet(self, data: bytes, host: str, inbound: Inbound | None) -> bool:
        """One packet from outside; False when it was dropped."""
        if self._closed:
            return False
        if self._paused and inbound is None:
            self._outbox.drop("", "paused", len(data))
            return False
        try:
            packet = self._codec.open(data)
        except ProtocolError as error:
            self._outbox.drop("", error.reason, len(data))
            return False
        sender = packet.sender
        if packet.receiver and packet.receiver != self._self.encoded:
            self._outbox.drop(sender.name, "misdirected", len(data))
            return False
        peer = self._peers.get(sender.name)
        if peer is None or peer.incarnation != sender.incarnation:
            peer = self._meet(sender, peer, len(data))
            if peer is None:
                return False
        if not peer.accept(packet.counter):
            self._outbox.drop(sender.name, "replayed", len(data))
            return False
        self._count("received_packets_udp" if inbound is None else "received_packets_tcp")
        self._heard(peer, sender, host)
        faults = self.links.incoming.get(sender.name) if self.links.incoming else None
        for frame in packet.frames:
            if not packet.receiver and frame.kind != HELLO:
                self._outbox.drop(sender.name, "misdirected", frame.size_bytes)
            elif faults is None:
                self._on_frame(peer, packet, frame, inbound is not None)
            else:
                delays = faults.plan(self.env.rng)
                if not delays:
                    self._outbox.drop(sender.name, "fault", frame.size_bytes)
                    if inbound is not None:
                        inbound.abort()
                for delay_s in delays:
                    self._later(delay_s, peer, packet, frame, inbound is not None)
        return True

    def _later(self, delay_s: float, peer: Peer, packet: Packet, frame: Frame, stream: bool) -> None:
        if delay_s <= 0.0:
            self._on_frame(peer, packet, frame, stream)
            return
        if self._delayed >= DELAYED_FRAMES_MAX:
            self._outbox.drop(peer.name, "overflow", frame.size_bytes)
            return

        def release() -> None:
            self._delayed -= 1
            if self._closed or self._paused or packet.sender.incarnation != peer.incarnation:
                self._outbox.drop(peer.name, "stale", frame.size_bytes)
            else:
                self._on_frame(peer, packet, frame, stream)

        self._delayed += 1
        self._loop.call_later(delay_s, release)

    def _meet(self, sender: Identity, peer: Peer | None, size: int) -> Peer | None:
        """A peer that is new, or lives in a new incarnation; None (dropped) for one of the past, or without room."""
        if sender.name == self.name or (peer is not None and sender.incarnation < peer.incarnation):
            self._outbox.drop(sender.name, "stale", size)
            return None
        if peer is None:
            peer = self._add_peer(sender.name, sender.address)
            if peer is None:
                self._outbox.drop(sender.name, "peers", size)
                return None
        peer.reborn(sender.incarnation)
        self._lose(self._caller.met(peer.conversation, sender.incarnation), peer)
        return peer

    def _heard(self, peer: Peer, sender: Identity, host: str) -> None:
        peer.conversation.heard_s = self._loop.time()
        if sender.address.host:
            peer.address = sender.address
        elif peer.address is None or peer.address.host != host:
            peer.address = Address(host, sender.address.tcp_port, sender.address.udp_port)

    def _on_local(self, frame: Frame) -> None:
        if not self._closed:
            self._on_frame(self._self, self._self_packet, frame, False)

    def _on_frame(self, peer: Peer, packet: Packet, frame: Frame, stream: bool) -> None:
        env = self.env
        env.hlc.merge(frame.stamp, env.wall_ms())
        cause: EventId | None = None
        if env.events.active and peer is not self._self:
            cause = self._publish(peer, frame, "tcp" if stream else "udp")
        kind = frame.kind
        if kind == REQUEST:
            self._on_request(peer, packet, frame, cause)
        elif kind == CAST:
            self._on_cast(peer, packet, frame, cause)
        elif kind == HELLO:
            number = self._callee.hello(peer.name, peer.incarnation)
            peer.session = self._callee.session(peer.name)
            self._outbox.send(peer, Frame(HELLO_ACK, frame.id, acknowledged=number))
        elif packet.incarnation != self.incarnation:
            # An answer to an earlier life of this node, whose ids are not ours.
            self._outbox.drop(peer.name, "stale", frame.size_bytes)
        elif kind in (RESPONSE, ERROR):
            self._on_answer(peer, frame)
        elif kind == HELLO_ACK:
            self._on_hello_ack(peer, frame)
        elif kind == WORKING:
            self._caller.working(frame.id, self._loop.time())
            self._arm()
        elif kind == UNSEEN:
            call = self._caller.get(frame.id)
            if call is not None:
                call.payload.serial = self._outbox.send(call.payload.peer, call.payload.frame)
        elif kind == REFUSED:
            self._lose(self._caller.lost(peer.conversation, frame.acknowledged), peer)

    def _publish(self, peer: Peer, frame: Frame, transport: str) -> EventId:
        service, _, function = frame.route.decode(errors="replace").partition(".")
        seq = self.env.events.publish(
            "recv",
            cause=(peer.name, frame.cause) if frame.cause else None,
            service=service,
            function=function,
            frame="redirect" if frame.origin and frame.kind == REQUEST else KIND_NAMES[frame.kind],
            request=frame.id,
            bytes=frame.size_bytes,
            transport=transport,
            **{"from": peer.name},
        )
        return (self.name, seq)

    def _on_answer(self, peer: Peer, frame: Frame) -> None:
        call = self._caller.answered(frame.id)
        if call is None:
            self._count("answers_late")
            return
        future = call.payload.future
        if future.done():
            return
        try:
            value = wire.unpack(frame.body)
        except ProtocolError:
            future.set_exception(InternalError(f"{peer.name} answered {self._describe(call)} with what cannot be read"))
            return
        if frame.kind == RESPONSE:
            future.set_result(Reply(value, frame.data))
        else:
            future.set_exception(error_from_wire(value))

    def _on_hello_ack(self, peer: Peer, frame: Frame) -> None:
        now_s, conversation = self._loop.time(), peer.conversation
        contact = self._greetings.pop(frame.id, None)
        if contact is not None:
            conversation.hello_id = frame.id
            if not contact.payload.future.done():
                contact.payload.future.set_result(peer.name)
        for call in self._caller.greeted(conversation, frame.id, peer.incarnation, frame.acknowledged, now_s):
            self._send_request(call)
        if conversation.session and peer.casts:
            waiting, peer.casts = peer.casts, []
            for since_s, cast_frame in waiting:
                if now_s - since_s <= CASTS_WAITING_S_MAX:
                    cast_frame.epoch = self.epoch
                    self._outbox.send(peer, cast_frame)
                else:
                    self._outbox.drop(peer.name, "expired", cast_frame.size_bytes)

    # Answering

    def _on_cast(self, peer: Peer, packet: Packet, frame: Frame, cause: EventId | None) -> None:
        session = peer.session
        if session is None or packet.incarnation != self.incarnation or packet.session != session.number:
            self._refuse(peer, packet, frame)
            return
        origin = Origin(peer.name, peer.incarnation, peer.address or self.address, 0)
        self._dispatcher.start(Job(frame, origin, None, self._loop.time() + self.config.timeout_s, cause))

    def _refuse(self, peer: Peer, packet: Packet, frame: Frame) -> None:
        self._count("refused")
        self._outbox.send(peer, Frame(REFUSED, frame.id, acknowledged=packet.session))

    def _on_request(self, peer: Peer, packet: Packet, frame: Frame, cause: EventId | None) -> None:
        session = peer.session
        if session is None or packet.incarnation != self.incarnation:
            self._refuse(peer, packet, frame)
            return
        try:
            origin = (
                Origin.parse(frame.origin)
                if frame.origin
                else Origin(peer.name, peer.incarnation, peer.address or self.address, frame.id)
            )
        except ProtocolError as error:
            self._outbox.drop(peer.name, error.reason, frame.size_bytes)
            return
        poke = bool(frame.flags & POKE)
        verdict = self._callee.request(session, packet.session, frame.id, frame.acknowledged, poke=poke)
        if self._callee.released:
            self._release()
        if verdict == calls.RUN:
            deadline_s = self._loop.time() + frame.remaining_ms / 1000
            self._dispatcher.start(Job(frame, origin, session, deadline_s, cause))
        elif verdict == calls.REFUSE:
            self._refuse(peer, packet, frame)
        elif verdict == calls.UNSEEN:
            self._outbox.send(peer, Frame(UNSEEN, frame.id))
        else:
            self._count("duplicates")
            self._on_duplicate(verdict, origin, self._callee.kept(session, frame.id))

    def _on_duplicate(self, verdict: int, origin: Origin, kept: Any) -> None:
        if verdict == calls.WORKING:
            self._send_to(origin, Frame(WORKING, origin.id))
        elif verdict == calls.FORGOTTEN:
            self._send_answer(
                origin,
                error_answer(Forgotten(f"{self.name} has no record of this request any more; it may have happened")),
            )
        elif verdict == calls.RESEND:
            if isinstance(kept, _Redirected):
                self._act(self._caller.nudge(kept.call, self._loop.time()), kept.call)
            else:
                self._send_answer(origin, kept)

    def _release(self) -> None:
        released, self._callee.released = self._callee.released, []
        for answer in released:
            if isinstance(answer, _Redirected):
                self._caller.end(answer.call)

    def _make_call(self, job: Job) -> Call:
        origin = job.origin
        return Call(origin.name, origin.address, bytes(job.frame.data), job.deadline_s, self, job.frame.epoch)

    def _finish(self, job: Job, answer: Answer) -> None:
        if job.session is not None and self._callee.finish(job.session, job.frame.id, answer, answer.size_bytes):
            self._send_answer(job.origin, answer)

    def _send_answer(self, origin: Origin, answer: Answer) -> None:
        if answer.serial:
            peer = self._peers.get(origin.name)
            if peer is not None and peer.stream is not None and peer.stream.serial == answer.serial:
                answer.resends += 1
                if answer.resends <= PATIENCE:
                    return
        serial = self._send_to(origin, Frame(answer.kind, origin.id, b"", answer.body, answer.data))
        answer.serial, answer.resends = serial, 0

    def _send_to(self, origin: Origin, frame: Frame) -> int:
        """To whoever asked, in the incarnation that asked."""
        if self._closed:
            return 0
        peer: Peer | None
        if origin.name == self.name:
            peer = self._self
        else:
            peer = self._peers.get(origin.name) or self._add_peer(origin.name, origin.address)
        if peer is None:
            self._outbox.drop(origin.name, "peers", frame.size_bytes)
            return 0
        if peer.incarnation < origin.incarnation:
            peer.reborn(origin.incarnation)
            self._lose(self._caller.met(peer.conversation, origin.incarnation), peer)
            peer.address = origin.address
        if peer.incarnation != origin.incarnation:
            self._outbox.drop(origin.name, "stale", frame.size_bytes)
            return 0
        return self._outbox.send(peer, frame)

    def _redirect(self, job: Job, to: str) -> None:
        """The handler let ``to`` answer: forward the request; the answer goes straight to the source."""
        frame = job.frame
        error: GoStoreError | None = None
        if job.session is None:
            error = InternalError(f"{job.function.name}: a cast cannot be redirected", definite=True)
        elif to == self.name:
            error = Unavailable(f"{job.function.name}: {to} redirected to itself")
        elif frame.hops >= REDIRECTS_MAX:
            error = Unavailable(
                f"{job.function.name}: redirected more than {REDIRECTS_MAX} times; the view may be changing"
            )
        else:
            forward = Frame(
                REQUEST, 0, frame.route, frame.body, frame.data, hops=frame.hops + 1, origin=job.origin.encode()
            )
            try:
                call = self._start(self._peer_to(to), forward, job.deadline_s, None, job.origin)
            except GoStoreError as failed:
                error = failed
        if error is not None:
            self._finish(job, error_answer(error))
        elif job.session is not None:
            self._count("redirects")
            self._callee.finish(job.session, frame.id, _Redirected(call), frame.size_bytes)

    def _count(self, what: str) -> None:
        self._statistics[what] = self._statistics.get(what, 0) + 1
