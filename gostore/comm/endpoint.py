"""An endpoint: calls, casts and their answers over UDP and TCP.

The protocol is in ``wire`` (bytes) and ``calls`` (at most once, retries, deadlines); the modules here perform their
effects on asyncio's standard transports, with one timer for all outstanding calls and no task per call.

The way of a request::

    Endpoint.call -> Requests -> Outbox -> packet -> Receiver (tag, incarnation, replay window, faults)
        -> Answers (at most once) -> Dispatcher -> handler -> Answers -> Outbox -> packet -> Receiver -> Requests

The answer goes to the *origin*, which is the source also when another node redirected the request. A call to oneself
takes the same way, but for the packet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final, cast

from gostore.comm import wire
from gostore.comm.answers import Answers
from gostore.comm.calls import CallLimits
from gostore.comm.directory import Directory, Resolver
from gostore.comm.dispatch import Dispatcher, Job
from gostore.comm.links import Links
from gostore.comm.outbox import Outbox, look_up
from gostore.comm.peers import Peer
from gostore.comm.receiver import Receiver
from gostore.comm.requests import Requests
from gostore.comm.service import Call, Reply, current_call
from gostore.comm.transport import Datagrams
from gostore.comm.wire import (
    CAST,
    ERROR,
    HELLO,
    HELLO_ACK,
    KIND_NAMES,
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
    NotOwner,
    Timeout,
    TooLarge,
    Unavailable,
    Unreachable,
)
from gostore.core.events import EventId, current_cause
from gostore.env import Env

ROUTES_CACHED_MAX: Final = 4096
CONTACTS_CACHED_MAX: Final = 4096


class Endpoint:
    """See the module. ``incarnation`` (at least 1) must rise with every start under the same name.

    ``epoch`` is the epoch of this node's view; it travels with every request (cls keeps it up to date).
    """

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
        self.config = config
        self.address = Address(host, tcp_port, udp_port)
        self.links = Links()
        self._codec = Codec(cluster, secret)
        self._limits = CallLimits(
            config.attempt_timeout_s, config.attempts_max, config.calls_in_flight_max, config.answers_kept_max
        )
        self._directory = Directory(self.name, resolver, config.peers_max, self._on_reborn, self._on_dismissed)
        self._dispatcher = Dispatcher(env, config.message_size_bytes_max, config.udp_size_bytes_max)
        self._contacts: dict[Address, str] = {}
        self._routes: dict[tuple[str, str], bytes] = {}
        self._closed = False
        self._server: asyncio.Server | None = None
        self._datagrams: Datagrams | None = None
        # Made by start(), on the running loop.
        self._loop: asyncio.AbstractEventLoop
        self._outbox: Outbox
        self._requests: Requests
        self._answers: Answers
        self._receiver: Receiver
        self._my_packet: Packet

    # Life

    async def start(self) -> None:
        """Bind and listen. Raises :class:`ConfigError` that names host and port when that is impossible."""
        self._loop = asyncio.get_running_loop()
        self._assemble()
        transport, datagrams = await self._listen()
        self._datagrams = datagrams
        host = self.address.host
        # A node that listens everywhere is answered where its packets come from.
        shown = "" if host in ("0.0.0.0", "::") else host  # noqa: S104
        identity = Identity(self.name, self.incarnation, Address(shown, self.address.tcp_port, self.address.udp_port))
        self._outbox.open(transport, datagrams, identity)
        self._open_local(identity)
        self._receiver.resume()
        # Only now: a connection is not to be accepted before there is anything to answer it with.
        assert self._server is not None
        await self._server.start_serving()

    def _assemble(self) -> None:
        config, env = self.config, self.env
        self._outbox = Outbox(
            env, self._codec, self.links, config.udp_size_bytes_max, self._directory.address_of, self._on_local
        )
        self._requests = Requests(
            env,
            self._limits,
            self._outbox,
            epoch=lambda: self.epoch,
            refer=self._refer,
        )
        self._answers = Answers(
            env,
            self.incarnation,
            self._limits,
            self._outbox,
            self._directory,
            self._requests,
            self._dispatcher,
            config.timeout_s,
            self._make_call,
        )
        self._receiver = Receiver(
            env,
            self._codec,
            self.links,
            self._directory,
            self._outbox,
            self._on_frame,
            config.message_size_bytes_max,
            config.peers_max,
        )

    async def _listen(self) -> tuple[asyncio.DatagramTransport, Datagrams]:
        loop, host, sockets, receiver = self._loop, self.address.host, self.env.sockets, self._receiver
        what, port = "tcp_port", self.address.tcp_port
        try:
            ip = await look_up(host)  # a name may have several, and both sockets must be at the same
            if "tcp" in sockets:
                where: dict[str, Any] = {"sock": sockets["tcp"]}
            else:
                where = {"host": ip, "port": port}
            server = await loop.create_server(receiver.make_inbound, start_serving=False, **where)
            self._server = server
            what, port = "udp_port", self.address.udp_port
            at: dict[str, Any] = {"sock": sockets["udp"]} if "udp" in sockets else {"local_addr": (ip, port)}
            transport, datagrams = await loop.create_datagram_endpoint(lambda: Datagrams(receiver.on_packet), **at)
        except OSError as error:
            if self._server is not None:
                self._server.close()
                await self._server.wait_closed()
            why = error.strerror or str(error)
            raise ConfigError(f"host = {host!r}, {what} = {port}: cannot listen there: {why}") from None
        tcp_port = server.sockets[0].getsockname()[1]
        self.address = Address(host, tcp_port, transport.get_extra_info("sockname")[1])
        return transport, datagrams

    def _open_local(self, identity: Identity) -> None:
        """The way to oneself: a peer that is always known, in this very incarnation."""
        me, callee = self._directory.me, self._answers.callee
        number = callee.hello(self.name, self.incarnation)
        me.address = self.address
        me.incarnation = me.conversation.incarnation = self.incarnation
        me.session = callee.session(self.name)
        me.conversation.session = number
        me.conversation.heard_s = float("inf")
        self._my_packet = Packet(me.encoded, self.incarnation, number, 0, identity, [])

    async def stop(self) -> None:
        """Close everything; outstanding calls end as unavailable. Handlers are tasks of the env, which ends them."""
        if self._closed or self._datagrams is None:
            return
        self._closed = True
        self._requests.close(lambda call: Unavailable(f"{self.name} has stopped", definite=not call.bound))
        self._outbox.close()
        self._receiver.close()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
        await self._datagrams.closed

    def pause(self) -> None:
        """Fall silent: nothing is read, answered or sent until :meth:`resume` (as if the process were stopped)."""
        self._outbox.paused = True
        self._receiver.pause()

    def resume(self) -> None:
        self._outbox.paused = False
        self._receiver.resume()

    def register(self, service: object) -> None:
        """Make a service's remote functions callable.

        Raises ``TypeError`` for an object without @service and ``ValueError`` when the name is taken.
        """
        self._dispatcher.register(service)

    def forget(self, name: str) -> None:
        """A member left: drop what is known of it. Calls to it end as forgotten, or unreachable if never sent."""
        peer = self._directory.forget(name)
        if peer is not None:
            for call in tuple(peer.conversation.calls.values()):
                error = Forgotten if call.bound else Unreachable
                self._requests.fail(call, error(f"{name} has left while {self._requests.describe(call)} was under way"))

    def statistics(self) -> dict[str, int]:
        """Counters since the start, by name (``dropped_<reason>``, ``sent_...``), and what there is now."""
        found = dict(sorted(self._outbox.statistics.items()))
        found["icmp_errors"] = self._datagrams.errors if self._datagrams is not None else 0
        found["casts_failed"] = self._dispatcher.casts_failed
        found.update({f"requests_{name}": count for name, count in self._dispatcher.requests.items()})
        found["calls_in_flight"] = len(self._requests.caller)
        found["handlers_running"] = self._dispatcher.running
        found["peers"] = len(self._directory)
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
            return await self._call_at(to, service, function, args, data, deadline_s, attempts)
        frame = Frame(REQUEST, 0, self._route(service, function), self._pack(service, function, args), data)
        size = frame.size_bytes
        if size > self.config.message_size_bytes_max:
            raise TooLarge(
                f"{service}.{function}: {size} bytes; message_size_bytes_max allows "
                f"{self.config.message_size_bytes_max}: send less at a time"
            )
        peer = self._directory.find(to)
        if size > self.config.udp_size_bytes_max:
            await self._writable(peer, deadline_s)
        call = self._requests.start(peer, frame, deadline_s, attempts)
        try:
            return cast(Reply, await call.payload.future)
        finally:
            self._requests.end(call)

    async def _call_at(
        self,
        address: Address,
        service: str,
        function: str,
        args: tuple[Any, ...],
        data: bytes | memoryview,
        deadline_s: float,
        attempts: int | None,
    ) -> Reply:
        name = await self._contact(address, deadline_s)
        left_s = deadline_s - self._loop.time()
        try:
            return await self.call(name, service, function, *args, data=data, timeout_s=left_s, attempts=attempts)
        except Timeout:
            self._contacts.pop(address, None)  # somebody else may listen there by now
            raise

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

        An address is good for a cast only after a call to it, which found out who listens there. Raises
        :class:`BadRequest` for arguments that cannot be sent and :class:`TooLarge`.
        """
        frame = Frame(CAST, 0, self._route(service, function), self._pack(service, function, args), data)
        if frame.size_bytes > self.config.message_size_bytes_max:
            raise TooLarge(f"{service}.{function}: {frame.size_bytes} bytes are too many for one message")
        name = self._contacts.get(to) if isinstance(to, Address) else to
        try:
            peer = self._directory.find(name) if name is not None else None
        except (Unreachable, Unavailable):
            peer = None
        if peer is None or self._closed:
            self._outbox.drop(str(to), "unreachable", frame.size_bytes)
        elif peer.conversation.session:
            frame.epoch = self.epoch
            self._outbox.send(peer, frame)
        else:
            self._requests.cast_later(peer, frame)

    def flush(self) -> None:
        """Send what was said in this turn of the loop; by itself that happens when the turn ends."""
        self._outbox.flush()

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
            if len(self._routes) < ROUTES_CACHED_MAX:
                self._routes[service, function] = route
        return route

    def _pack(self, service: str, function: str, args: tuple[Any, ...]) -> bytes:
        try:
            return wire.pack(args)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadRequest(f"{service}.{function}: an argument cannot be sent: {error}") from None

    async def _writable(self, peer: Peer, deadline_s: float) -> None:
        """Back-pressure: wait while much is queued on the peer's stream."""
        if peer.stream is not None and peer.stream.congested:
            try:
                async with asyncio.timeout_at(deadline_s):
                    await peer.stream.writable()
            except TimeoutError:
                raise Timeout(f"{peer.name} takes no more data; the request was not sent", definite=True) from None

    async def _contact(self, address: Address, deadline_s: float) -> str:
        """The name of whoever listens at an address; over TCP when its UDP port is not known (0)."""
        if address == self.address:
            return self.name
        name = self._contacts.get(address)
        if name is not None and self._directory.get(name) is not None:
            return name
        call = self._requests.start(Peer("", address), Frame(HELLO), deadline_s, None)
        try:
            name = cast(str, await call.payload.future)
        finally:
            self._requests.end(call)
            stream = call.payload.peer.stream
            if stream is not None:
                stream.abort()
        if len(self._contacts) >= CONTACTS_CACHED_MAX:
            self._contacts.clear()
        self._contacts[address] = name
        return name

    def _refer(self, origin: Origin, error: GoStoreError) -> None:
        self._answers.refer(origin, error)

    def _make_call(self, job: Job) -> Call:
        origin = job.origin
        return Call(origin.name, origin.address, bytes(job.frame.data), job.deadline_s, self, job.frame.epoch)

    # Arriving

    def _on_reborn(self, peer: Peer) -> None:
        """The peer lives in a later incarnation; what the former one had is lost."""
        if peer.conversation.incarnation:  # else it was just met
            self._outbox.discard(peer)
        self._requests.lose(self._requests.caller.met(peer.conversation, peer.incarnation), peer)

    def _on_dismissed(self, peer: Peer) -> None:
        self._answers.callee.forget(peer.name)
        self._outbox.discard(peer)

    def _on_local(self, frame: Frame) -> None:
        if not self._closed:
            self._on_frame(self._directory.me, self._my_packet, frame, False)

    def _on_frame(self, peer: Peer, packet: Packet, frame: Frame, stream: bool) -> None:
        env = self.env
        stamp = env.hlc.merge(frame.stamp, env.wall_ms())
        if not env.events.messages or packet is self._my_packet:
            self._handle(peer, packet, frame, None)
            return
        cause = self._publish(peer, frame, stamp, "tcp" if stream else "udp")
        token = current_cause.set(cause)  # for what is sent at once in reaction to it
        try:
            self._handle(peer, packet, frame, cause)
        finally:
            current_cause.reset(token)

    def _handle(self, peer: Peer, packet: Packet, frame: Frame, cause: EventId | None) -> None:
        kind = frame.kind
        if kind == REQUEST:
            try:
                self._answers.on_request(peer, packet, frame, cause)
            except ProtocolError as error:
                self._outbox.drop(peer.name, error.reason, frame.size_bytes)
        elif kind == CAST:
            self._answers.on_cast(peer, packet, frame, cause)
        elif kind == HELLO:
            self._answers.on_hello(peer, frame)
        elif packet.incarnation != self.incarnation:
            # An answer to an earlier life of this node, whose ids are not ours.
            self._outbox.drop(peer.name, "stale", frame.size_bytes)
        elif kind in (RESPONSE, ERROR):
            self._requests.on_answer(peer, frame)
        elif kind == HELLO_ACK:
            self._requests.on_hello_ack(peer, frame)
        elif kind == WORKING:
            self._requests.on_working(frame)
        elif kind == UNSEEN:
            self._requests.on_unseen(frame)
        elif kind == REFUSED:
            self._requests.on_refused(peer, frame)

    def _publish(self, peer: Peer, frame: Frame, stamp: int, transport: str) -> EventId:
        service, _, function = frame.route.decode(errors="replace").partition(".")
        seq = self.env.events.publish(
            "recv",
            cause=(peer.name, -frame.cause),
            stamp=stamp,
            message=frame.cause,
            service=service,
            function=function,
            frame="redirect" if frame.origin and frame.kind == REQUEST else KIND_NAMES[frame.kind],
            request=frame.id,
            bytes=frame.size_bytes,
            transport=transport,
            **{"from": peer.name},
        )
        return (self.name, seq)
