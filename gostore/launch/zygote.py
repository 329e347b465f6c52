"""The zygote: one small process that forks the nodes of a cluster.

Theory of operation
-------------------
Starting an interpreter and importing what a node needs takes longer than everything else at start-up together, so it is
done once: ``python -m gostore.launch.zygote`` imports the node and then forks a child for each one that is asked for,
which takes milliseconds and shares the imported memory. (The standard library's forkserver keeps its caller's process
group and standard input, so an interrupt in a notebook would reach the nodes; hence our own.)

Who tells it what. Its owner, the client process, writes one JSON object per line to its standard input; answers and
events are lines on its standard output:

    {"id": 1, "do": "bind", "node": "n1", "host": "127.0.0.1", "tcp": 0, "udp": 0, "rest": 0}
                                                                ->  {"id": 1, "ports": {"tcp": 40123, ...}}
    {"id": 2, "do": "start", "node": "n1", "config": {...}}     ->  {"id": 2, "pid": 4711}
    {"id": 3, "do": "signal", "node": "n1", "signal": 9}        ->  {"id": 3}
    {"id": 4, "do": "release", "node": "n1"}                    ->  {"id": 4}      (bound sockets that are not wanted)
    {"event": "hello"}   {"event": "ready", "node": "n1", ...}   {"event": "failed", "node": "n1", "error": [...]}
    {"event": "exit", "node": "n1", "pid": 4711, "status": -9}   (negative: the signal that ended it)

Ports. ``bind`` comes before ``start``: the real ports are known before any node runs, and no other process can take one
in between. The child inherits its sockets; the zygote and the other children close theirs, so that a killed node's port
refuses connections as it should.

Who ends when. Nothing may outlive the owner, however it ends:
  * the zygote's standard input reaches its end, or the owner's process is gone (a pidfd tells; a fork of the owner may
    hold the pipe open for ever): the zygote kills its children (SIGKILL ends a stopped one too), waits for them, and
    exits;
  * the zygote itself is killed: the kernel kills the children (PR_SET_PDEATHSIG; the race with a parent that is already
    dead is closed by looking at the parent afterwards). Where there is no such call, each child has a thread that waits
    for the end of a pipe whose other end only the zygote holds.
The zygote sits in a session of its own, so no terminal or notebook interrupt reaches it or the nodes.

It has one thread and no event loop: forking with either would copy their broken remains into the children.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from gostore.config import NodeConfig
from gostore.core.errors import BadRequest, ConfigError, GoStoreError, InternalError
from gostore.launch.lifeline import die_with_parent

LINE_SIZE_BYTES_MAX = 16 * 1024 * 1024
"""A longer command means that the stream is broken."""

REAP_TIMEOUT_S = 10.0
"""How long killed children may take to vanish; one that is stuck in the kernel (a dead disk) can take longer."""

OWNER_POLL_S = 1.0
"""How often the owner is looked for where the kernel has no pidfd."""

STATUS_CRASHED = 70

Entry = Callable[[NodeConfig, dict[str, socket.socket], int], int]


@dataclass
class Child:
    node: str
    pid: int
    ready_fd: int
    unread: bytearray = field(default_factory=bytearray)


class Zygote:
    """The process that forks. ``commands`` and ``answers`` are descriptors; ``owner``: the process never to outlive."""

    def __init__(self, entry: Entry, commands: int, answers: int, owner: int) -> None:
        self._entry = entry
        self._commands = commands
        self._answers = answers
        self._owner = owner
        self._pid = os.getpid()
        self._owner_fd = -1
        self._bound: dict[str, dict[str, socket.socket]] = {}
        self._children: dict[str, Child] = {}
        self._selector = selectors.DefaultSelector()
        self._unread = bytearray()
        self._ended = False
        self._wake_read, self._wake_write = os.pipe()
        self._life_read, self._life_write = os.pipe()
        self._do: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "bind": self._bind,
            "start": self._start,
            "signal": self._signal,
            "release": self._release,
        }

    def run(self) -> None:
        """Serve until the owner is gone; then nothing is left of the children."""
        self._listen()
        try:
            self._tell({"event": "hello", "pid": os.getpid()})
            while not self._ended:
                for key, _ in self._selector.select(OWNER_POLL_S if self._owner_fd < 0 else None):
                    key.data()
                if self._owner_fd < 0 and os.getppid() != self._owner:
                    self._end()
        except BrokenPipeError:
            pass  # the owner closed its end
        finally:
            self._kill_all()

    def _listen(self) -> None:
        for descriptor in (self._commands, self._wake_read, self._wake_write):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._selector.register(self._commands, selectors.EVENT_READ, self._on_commands)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._on_wake)
        if hasattr(os, "pidfd_open"):
            try:
                self._owner_fd = os.pidfd_open(self._owner)
                self._selector.register(self._owner_fd, selectors.EVENT_READ, self._end)
            except OSError:  # gone already, or an old kernel: looking at the parent decides
                self._owner_fd = -1
        if os.getppid() != self._owner:
            self._end()

    def _end(self) -> None:
        self._ended = True

    # commands and answers

    def _on_commands(self) -> None:
        try:
            data = os.read(self._commands, 1 << 16)
        except BlockingIOError:
            return
        self._unread += data
        if not data or len(self._unread) > LINE_SIZE_BYTES_MAX:
            self._end()
            return
        *lines, rest = self._unread.split(b"\n")
        self._unread = bytearray(rest)
        for line in lines:
            self._command(bytes(line))

    def _command(self, line: bytes) -> None:
        request = json.loads(line)
        try:
            do = self._do.get(request["do"])
            if do is None:
                raise BadRequest(f"do = {request['do']!r}: known are {', '.join(self._do)}")
            answer = do(request)
        except GoStoreError as error:
            answer = {"error": error.to_wire()}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": InternalError(f"{type(error).__name__}: {error}").to_wire()}
        self._tell({"id": request.get("id"), **answer})

    def _tell(self, message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[os.write(self._answers, data) :]

    def _bind(self, request: dict[str, Any]) -> dict[str, Any]:
        node, host = request["node"], request["host"]
        if node in self._bound or node in self._children:
            raise BadRequest(f"{node} has its sockets already")
        sockets: dict[str, socket.socket] = {}
        try:
            for name in ("tcp", "udp", "rest"):
                if request[name] >= 0:
                    sockets[name] = _bind_one(node, name, host, request[name])
        except BaseException:
            for bound in sockets.values():
                bound.close()
            raise
        self._bound[node] = sockets
        return {"ports": {name: bound.getsockname()[1] for name, bound in sockets.items()}}

    def _release(self, request: dict[str, Any]) -> dict[str, Any]:
        for bound in self._bound.pop(request["node"], {}).values():
            bound.close()
        return {}

    def _signal(self, request: dict[str, Any]) -> dict[str, Any]:
        child = self._children.get(request["node"])
        if child is None:
            raise BadRequest(f"{request['node']} is not running")
        # No other process can have its number: the child is a zombie until we wait for it.
        os.kill(child.pid, request["signal"])
        return {}

    # children

    def _start(self, request: dict[str, Any]) -> dict[str, Any]:
        node, config = request["node"], request["config"]
        sockets = self._bound.pop(node, None)
        if sockets is None:
            raise BadRequest(f"{node} has no sockets: bind them first")
        try:
            log = _open_log(node, config["data_dir"])
            ready_read, ready_write = os.pipe()
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                self._child(config, sockets, log, ready_write)
        finally:
            for bound in sockets.values():
                bound.close()
        os.close(log)
        os.close(ready_write)
        os.set_blocking(ready_read, False)
        child = self._children[node] = Child(node, pid, ready_read)
        self._selector.register(ready_read, selectors.EVENT_READ, lambda: self._on_report(child))
        return {"pid": pid}

    def _child(self, config: dict[str, Any], sockets: dict[str, socket.socket], log: int, ready_fd: int) -> NoReturn:
        """In the child: become a process of its own, run the node, never return."""
        status = STATUS_CRASHED
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            os.dup2(log, 1)
            os.dup2(log, 2)
            keep = [0, 1, 2, ready_fd, self._life_read, *(bound.fileno() for bound in sockets.values())]
            _close_all_but(keep)
            die_with_parent(self._pid, self._life_read)
            gc.enable()
            status = self._entry(NodeConfig.from_dict(config), sockets, ready_fd)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else STATUS_CRASHED
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _on_report(self, child: Child) -> None:
        """A line on the pipe of a child: it is ready, or why it cannot be."""
        if child.ready_fd < 0:
            return  # its end was noticed in the same turn, and its pipe was read then
        try:
            data = os.read(child.ready_fd, 1 << 16)
        except BlockingIOError:
            return
        child.unread += data
        *lines, rest = child.unread.split(b"\n")
        child.unread = bytearray(rest)
        for line in lines:
            report = json.loads(line)
            if "error" in report:
                self._tell({"event": "failed", "node": child.node, "error": report["error"]})
            else:
                self._tell({"event": "ready", "node": child.node, **report.get("ready", {})})
        if not data:
            self._forget_pipe(child)

    def _forget_pipe(self, child: Child) -> None:
        if child.ready_fd >= 0:
            self._selector.unregister(child.ready_fd)
            os.close(child.ready_fd)
            child.ready_fd = -1

    def _on_wake(self) -> None:
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            return
        self._reap()

    def _reap(self) -> None:
        for child in list(self._children.values()):
            pid, wait_status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                # Its last words may still be in the pipe; they come before the news of its end.
                if child.ready_fd >= 0:
                    self._on_report(child)
                self._forget_pipe(child)
                del self._children[child.node]
                status = os.waitstatus_to_exitcode(wait_status)
                self._tell({"event": "exit", "node": child.node, "pid": child.pid, "status": status})

    def _kill_all(self) -> None:
        for child in self._children.values():
            os.kill(child.pid, signal.SIGKILL)
        deadline = time.monotonic() + REAP_TIMEOUT_S
        for child in self._children.values():
            while os.waitpid(child.pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
                select.select([self._wake_read], [], [], 0.01)
                try:
                    os.read(self._wake_read, 4096)
                except BlockingIOError:
                    pass


def _bind_one(node: str, name: str, host: str, port: int) -> socket.socket:
    kind = socket.SOCK_DGRAM if name == "udp" else socket.SOCK_STREAM
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        what = error.strerror or error
        raise ConfigError(f"{node}: host = {host!r}: {what}; expected an address of this machine") from None
    bound = socket.socket(family, kind)
    try:
        if kind is socket.SOCK_STREAM:
            # The remains of closed connections must not keep a restarted node from its port.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        if kind is socket.SOCK_STREAM:
            # Peers that are quicker wait in the queue instead of being refused.
            bound.listen(128)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        setting = {"tcp": "tcp_port", "udp": "udp_port", "rest": "rest.port"}[name]
        raise ConfigError(
            f"{node}: {setting} = {port}: cannot be bound on {host}: {error.strerror}; "
            f"free the port, name another, or take {setting} = 0 for any free one"
        ) from None
    return bound


def _open_log(node: str, data_dir: str) -> int:
    try:
        os.makedirs(data_dir, exist_ok=True)
        os.listdir(data_dir)
        return os.open(os.path.join(data_dir, "node.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{node}: data_dir = {data_dir!r}: {error.strerror}; expected a directory that can be read and written"
        ) from None


def _close_all_but(keep: list[int]) -> None:
    """Close what was inherited: the sockets of other nodes, the pipes of the zygote."""
    for name in os.listdir("/dev/fd"):
        descriptor = int(name)
        if descriptor not in keep:
            try:
                os.close(descriptor)
            except OSError:  # the one of the listing itself
                pass


def _load(entry: str) -> Entry:
    module, _, name = entry.partition(":")
    function: Entry = getattr(importlib.import_module(module), name)
    return function


def _private_streams() -> tuple[int, int]:
    """Descriptors of commands and answers; whatever prints or reads by accident cannot touch them any more."""
    commands, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return commands, answers


def main() -> None:
    """``gostore.launch.zygote OPTIONS``, where OPTIONS is one JSON object (see ``gostore.launch.spawn``):

    ``owner``: the process that must not be outlived; ``entry``: ``MODULE:FUNCTION`` that runs a node in the child;
    ``remove``: a directory to remove at the end, or null; ``path``: where modules are found, after all other places.
    """
    gc.disable()  # what is imported stays, so looking for garbage now is only work
    options = json.loads(sys.argv[1])
    commands, answers = _private_streams()
    sys.path.extend(place for place in options["path"] if place not in sys.path)
    entry = _load(options["entry"])
    gc.collect()
    gc.freeze()
    # Not after an error: the log of what went wrong is in there, and the owner wants to read it.
    Zygote(entry, commands, answers, options["owner"]).run()
    if options["remove"]:
        import shutil

        shutil.rmtree(options["remove"], ignore_errors=True)


if __name__ == "__main__":
    main()
