"""The vocabulary of faults, one for both worlds.

Network faults act on links, the ordered pairs of nodes; several may lie on one link at once, so the vocabulary keeps
the list of what is in force and works out what each link suffers. A world performs it with a few primitives (the
methods that start with an underscore) and raises :class:`NotSupported` for what it cannot do. Every fault is an event
of the kind ``fault``, published before it takes effect.

Asymmetric partitions and stalled disks are what kills real clusters (Alfatafta et al., "Toward a generic fault
tolerance technique for partial network partitioning", OSDI 2020; Ganesan et al., "Redundancy does not imply fault
tolerance", FAST 2017), so they are words of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Final, Protocol

from gostore.core.errors import BadRequest, NotSupported
from gostore.core.twins import Runner, SyncTwins, sync_twin

DELAY_S_MAX: Final = 60.0
FAULTS_MAX: Final = 1_000
"""Network faults in force at a time."""

WORDS: Final = (
    "partition", "isolate", "delay", "loss", "duplicate", "reorder", "heal",
    "kill", "restart", "pause", "resume",
    "power_cut", "skew", "slow_disk", "full_disk", "corrupt",
)  # fmt: skip
"""The whole vocabulary; each is a method of :class:`Faults`."""

Link = tuple[str, str]
"""(from, to)."""


class Named(Protocol):
    @property
    def name(self) -> str: ...


NodeLike = str | Named
"""A node by its name or its handle."""


@dataclass(frozen=True, slots=True)
class LinkFault:
    """What a link suffers: probabilities from 0 to 1, times in seconds."""

    drop: float = 0.0
    delay_s: float = 0.0
    jitter_s: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0

    def __add__(self, other: LinkFault) -> LinkFault:
        """Both at once: independent chances, delays one after the other."""
        return LinkFault(
            _either(self.drop, other.drop),
            min(self.delay_s + other.delay_s, DELAY_S_MAX),
            min(self.jitter_s + other.jitter_s, DELAY_S_MAX),
            _either(self.duplicate, other.duplicate),
            _either(self.reorder, other.reorder),
        )


def _either(a: float, b: float) -> float:
    return a + b - a * b


NO_FAULT: Final = LinkFault()


@dataclass(frozen=True, slots=True, eq=False)
class Fault:
    """A fault that was injected; give it to ``heal`` to end this one alone."""

    kind: str
    arguments: Mapping[str, Any]
    links: Mapping[Link, LinkFault] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"{self.kind}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


class UnknownFault(BadRequest, AttributeError):
    """A word that the vocabulary lacks; an ``AttributeError``, so that ``hasattr`` and completion work as usual."""

    code = "unknown_fault"


def unknown_fault(word: str) -> UnknownFault:
    """The error for such a word; it names the one that was meant, or all there are."""
    meant = get_close_matches(word, WORDS, 1)
    hint = f"did you mean {meant[0]}? " if meant else ""
    return UnknownFault(f"there is no fault {word!r}; {hint}there are {', '.join(WORDS)}")


class Faults(SyncTwins, ABC):
    """The words. ``names`` gives the nodes there are; ``publish(kind, arguments)`` puts a fault into the journal."""

    def __init__(
        self, runner: Runner, names: Callable[[], Sequence[str]], publish: Callable[[str, Mapping[str, Any]], None]
    ) -> None:
        self._runner = runner
        self._names = names
        self._publish = publish
        self._active: list[Fault] = []

    def __getattr__(self, word: str) -> Any:
        # Only for what is no attribute. Names with an underscore in front are asked for by machinery (copy, IPython).
        if word.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {word!r}")
        raise self._explain(unknown_fault(word.removesuffix("_sync")))

    def _explain(self, error: UnknownFault) -> UnknownFault:
        """A world that can be replayed adds which run it was."""
        return error

    @property
    def active(self) -> tuple[Fault, ...]:
        """The network faults in force."""
        return tuple(self._active)

    def links(self) -> dict[Link, LinkFault]:
        """What each link suffers now; healthy links are left out."""
        total: dict[Link, LinkFault] = {}
        for fault in self._active:
            for link, effect in fault.links.items():
                total[link] = total.get(link, NO_FAULT) + effect
        return dict(sorted(total.items()))

    # the network

    async def partition(self, *groups: Iterable[NodeLike] | NodeLike, one_way: bool = False) -> Fault:
        """Cut the network into groups: ``partition(["n1", "n2"], ["n3", "n4", "n5"])``.

        With one group the others are the second. ``one_way``: only what the first group sends to the others is lost;
        what they send arrives. Nodes that are named nowhere keep all their links. Raises :class:`BadRequest`.
        """
        named = [self._group(group) for group in groups]
        if not named:
            raise BadRequest('partition needs groups of nodes, e.g. partition(["n1", "n2"]) against all others')
        if len(named) == 1:
            named.append([name for name in self._names() if name not in named[0]])
        seen: dict[str, None] = {}
        for name in (name for group in named for name in group):
            if name in seen:
                raise BadRequest(f"partition: {name} is in two groups; a node is on one side")
            seen[name] = None
        if not all(named):
            raise BadRequest(f"partition: a group is empty; there are {', '.join(self._names())}")
        links: list[Link] = []
        for index, group in enumerate(named):
            others = [name for other, names in enumerate(named) if other != index for name in names]
            if index == 0 or not one_way:
                links += [(source, target) for source in group for target in others]
        arguments: dict[str, Any] = {"groups": named}
        return await self._add("partition", arguments | ({"one_way": True} if one_way else {}), links, LinkFault(1.0))

    partition_sync = sync_twin(partition)

    async def isolate(self, node: NodeLike, *, direction: str = "both") -> Fault:
        """Cut one node off from all others; ``direction``: ``"out"`` (it is not heard), ``"in"`` (it is deaf), both."""
        name = self._node(node)
        if direction not in ("out", "in", "both"):
            raise BadRequest(f"direction = {direction!r}: allowed are out, in, both")
        others = [other for other in self._names() if other != name]
        links = [(name, other) for other in others if direction != "in"]
        links += [(other, name) for other in others if direction != "out"]
        arguments = {"node": name} | ({"direction": direction} if direction != "both" else {})
        return await self._add("isolate", arguments, links, LinkFault(1.0))

    isolate_sync = sync_twin(isolate)

    async def delay(
        self,
        delay_s: float,
        jitter_s: float = 0.0,
        *,
        source: Iterable[NodeLike] | NodeLike | None = None,
        target: Iterable[NodeLike] | NodeLike | None = None,
    ) -> Fault:
        """Let messages take ``delay_s`` longer, and up to ``jitter_s`` more at random.

        ``source``, ``target``: from and to which nodes; None is every node. A round trip pays in both directions when
        both are None.
        """
        effect = LinkFault(delay_s=_seconds("delay_s", delay_s), jitter_s=_seconds("jitter_s", jitter_s))
        arguments = {"delay_s": delay_s} | ({"jitter_s": jitter_s} if jitter_s else {})
        return await self._between("delay", arguments, source, target, effect)

    delay_sync = sync_twin(delay)

    async def loss(
        self,
        probability: float,
        *,
        source: Iterable[NodeLike] | NodeLike | None = None,
        target: Iterable[NodeLike] | NodeLike | None = None,
    ) -> Fault:
        """Lose messages with a probability. ``source``, ``target`` as in :meth:`delay`."""
        effect = LinkFault(drop=_probability(probability))
        return await self._between("loss", {"probability": probability}, source, target, effect)

    loss_sync = sync_twin(loss)

    async def duplicate(
        self,
        probability: float,
        *,
        source: Iterable[NodeLike] | NodeLike | None = None,
        target: Iterable[NodeLike] | NodeLike | None = None,
    ) -> Fault:
        """Deliver messages twice with a probability. ``source``, ``target`` as in :meth:`delay`."""
        effect = LinkFault(duplicate=_probability(probability))
        return await self._between("duplicate", {"probability": probability}, source, target, effect)

    duplicate_sync = sync_twin(duplicate)

    async def reorder(
        self,
        probability: float,
        *,
        source: Iterable[NodeLike] | NodeLike | None = None,
        target: Iterable[NodeLike] | NodeLike | None = None,
    ) -> Fault:
        """Let later messages overtake with a probability. ``source``, ``target`` as in :meth:`delay`."""
        effect = LinkFault(reorder=_probability(probability))
        return await self._between("reorder", {"probability": probability}, source, target, effect)

    reorder_sync = sync_twin(reorder)

    async def heal(self, fault: Fault | None = None) -> None:
        """End one network fault, or all of them; killed and paused nodes stay as they are."""
        if fault is not None and fault not in self._active:
            return
        before = self.links()
        self._active = [other for other in self._active if fault is not None and other is not fault]
        self._publish("heal", {"fault": fault.kind} if fault is not None else {})
        await self._change(before)

    heal_sync = sync_twin(heal)

    # processes

    async def kill(self, node: NodeLike) -> None:
        """End a node at once, as a crash would; what it had synced stays on its disk."""
        name = self._node(node)
        self._check("kill", name)
        self._publish("kill", {"node": name})
        await self._kill(name)

    kill_sync = sync_twin(kill)

    async def restart(self, node: NodeLike) -> None:
        """Start a node again on its data (killing it first when it runs); returns when it answers."""
        name = self._node(node)
        self._check("restart", name)
        self._publish("restart", {"node": name})
        await self._restart(name)

    restart_sync = sync_twin(restart)

    async def pause(self, node: NodeLike) -> None:
        """Stop a node where it stands, as a long garbage collection or a suspended machine would."""
        name = self._node(node)
        self._check("pause", name)
        self._publish("pause", {"node": name})
        await self._pause(name)

    pause_sync = sync_twin(pause)

    async def resume(self, node: NodeLike) -> None:
        """Let a paused node go on; it does not know that time has passed."""
        name = self._node(node)
        self._check("resume", name)
        self._publish("resume", {"node": name})
        await self._resume(name)

    resume_sync = sync_twin(resume)

    # machines and disks

    async def power_cut(self, node: NodeLike) -> None:
        """Kill a node so that everything that was not synced is lost."""
        await self._machine("power_cut", node, {})

    power_cut_sync = sync_twin(power_cut)

    async def skew(self, node: NodeLike, offset_s: float, drift: float = 0.0) -> None:
        """Move a node's wall clock by ``offset_s``, and let it run ``drift`` faster (0.01: one percent)."""
        await self._machine("skew", node, {"offset_s": offset_s, "drift": drift})

    skew_sync = sync_twin(skew)

    async def slow_disk(self, node: NodeLike, sync_s: float) -> None:
        """Let every sync of a node's disk take ``sync_s`` seconds; 0 ends it."""
        await self._machine("slow_disk", node, {"sync_s": _seconds("sync_s", sync_s)})

    slow_disk_sync = sync_twin(slow_disk)

    async def full_disk(self, node: NodeLike, free_bytes: int = 0) -> None:
        """Let a node's disk be full after ``free_bytes`` more; negative ends it."""
        await self._machine("full_disk", node, {"free_bytes": free_bytes})

    full_disk_sync = sync_twin(full_disk)

    async def corrupt(self, node: NodeLike, file: str, offset: int | None = None) -> None:
        """Flip a bit in a file of a node's disk, at ``offset`` or anywhere."""
        await self._machine("corrupt", node, {"file": file, "offset": offset})

    corrupt_sync = sync_twin(corrupt)

    async def _machine(self, kind: str, node: NodeLike, arguments: dict[str, Any]) -> None:
        name = self._node(node)
        perform = getattr(self, f"_{kind}", None)
        if perform is None:
            raise NotSupported(f"faults.{kind}: {self._why_not(kind)}")
        self._publish(kind, {"node": name, **arguments})
        await perform(name, **arguments)

    def _why_not(self, kind: str) -> str:
        """What to do instead; a world that lacks a word says so here."""
        return "this world cannot do that"

    # what a world supplies; _power_cut, _skew, _slow_disk, _full_disk, _corrupt where it can

    @abstractmethod
    async def _set_links(self, changed: Mapping[Link, LinkFault]) -> None:
        """Let these links suffer exactly this from now on (``NO_FAULT``: healthy)."""

    def _check(self, word: str, name: str) -> None:
        """Raise :class:`BadRequest` when the node is in no state for this word (killed already, say)."""

    @abstractmethod
    async def _kill(self, name: str) -> None: ...

    @abstractmethod
    async def _restart(self, name: str) -> None: ...

    @abstractmethod
    async def _pause(self, name: str) -> None: ...

    @abstractmethod
    async def _resume(self, name: str) -> None: ...

    # shared

    async def _between(
        self,
        kind: str,
        arguments: dict[str, Any],
        source: Iterable[NodeLike] | NodeLike | None,
        target: Iterable[NodeLike] | NodeLike | None,
        effect: LinkFault,
    ) -> Fault:
        sources = list(self._names()) if source is None else self._group(source)
        targets = list(self._names()) if target is None else self._group(target)
        if source is not None:
            arguments["source"] = sources
        if target is not None:
            arguments["target"] = targets
        return await self._add(kind, arguments, [(a, b) for a in sources for b in targets if a != b], effect)

    async def _add(self, kind: str, arguments: dict[str, Any], links: list[Link], effect: LinkFault) -> Fault:
        if len(self._active) >= FAULTS_MAX:
            raise BadRequest(f"{FAULTS_MAX} network faults are in force already; heal some")
        before = self.links()
        fault = Fault(kind, arguments, dict.fromkeys(links, effect))
        self._active.append(fault)
        self._publish(kind, arguments)
        await self._change(before)
        return fault

    async def _change(self, before: Mapping[Link, LinkFault]) -> None:
        after = self.links()
        changed = {
            link: after.get(link, NO_FAULT)
            for link in sorted({**before, **after})
            if before.get(link, NO_FAULT) != after.get(link, NO_FAULT)
        }
        if changed:
            await self._set_links(changed)

    def _node(self, node: NodeLike) -> str:
        name = node if isinstance(node, str) else getattr(node, "name", None)
        if name not in self._names():
            raise BadRequest(f"there is no node {node!r}; there are {', '.join(self._names())}")
        return str(name)

    def _group(self, group: Iterable[NodeLike] | NodeLike) -> list[str]:
        if isinstance(group, str) or not isinstance(group, Iterable):
            return [self._node(group)]
        return [self._node(node) for node in group]


def _probability(value: float) -> float:
    if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise BadRequest(f"probability = {value!r}: allowed are values from 0 to 1")
    return float(value)


def _seconds(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or not 0.0 <= value <= DELAY_S_MAX:
        raise BadRequest(f"{name} = {value!r}: allowed are 0 to {DELAY_S_MAX:g} seconds")
    return float(value)
