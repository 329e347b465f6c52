"""Settings of a node and of a cluster: validated, from TOML, the environment or keywords.

Every setting is a field declared with :func:`setting`, which carries what is allowed; every mistake is one
:class:`~gostore.core.errors.ConfigError` that names the field, its value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, TypeVar

from gostore.core.errors import ConfigError
from gostore.core.slots import PolicySource

T = TypeVar("T")

KIB = 1024
MIB = 1024 * KIB
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")

OBJECT_OVERHEAD_BYTES_MAX = 16 * KIB
"""Of a message or a record beside the value of an object and keys: its frame, names, the path."""


def setting(
    default: Any = dataclasses.MISSING,
    doc: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    matches: re.Pattern[str] | None = None,
    factory: Callable[[], Any] | None = None,
) -> Any:
    """A dataclass field with what is allowed: bounds (inclusive), a set of choices or a pattern."""
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices, "matches": matches}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


class Section:
    """Base of all settings: checks its fields when it is made, and reads and writes plain dictionaries."""

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for f in fields(typing.cast(Any, self)):
            if not isinstance(getattr(self, f.name), Section):
                _check(f.name, getattr(self, f.name), hints[f.name], f.metadata)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Build from nested mappings. Raises :class:`ConfigError`, also for an unknown field."""
        hints = _hints(cls)
        known = {f.name for f in fields(typing.cast(Any, cls))}
        arguments: dict[str, Any] = {}
        for name, value in values.items():
            path = f"{where}{name}"
            if name not in known:
                raise ConfigError(f"{path}: there is no such setting; here are {', '.join(sorted(known))}")
            hint = hints[name]
            if isinstance(hint, type) and issubclass(hint, Section):
                if not isinstance(value, Mapping):
                    raise ConfigError(f"{path} = {value!r}: expected a table of settings")
                arguments[name] = hint.from_dict(value, f"{path}.")
            elif typing.get_origin(hint) is tuple and isinstance(value, list):
                arguments[name] = tuple(value)
            else:
                arguments[name] = value
        for f in fields(typing.cast(Any, cls)):
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and f.name not in arguments:
                raise ConfigError(f"{where}{f.name}: missing; expected: {f.metadata['doc']}")
        try:
            return cls(**arguments)
        except ConfigError as error:
            raise ConfigError(f"{where}{error.message}") from None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(typing.cast(Any, self))

    def replace(self, **changes: Any) -> Self:
        return typing.cast(Self, dataclasses.replace(typing.cast(Any, self), **changes))


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    """Resolved annotations; cached, because resolving costs more than everything else here together."""
    found = _HINTS.get(cls)
    if found is None:
        found = _HINTS[cls] = typing.get_type_hints(cls)
    return found


def _check(name: str, value: Any, hint: Any, allowed: Mapping[str, Any]) -> None:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return
    kinds = tuple(typing.get_origin(o) or o for o in options if o is not type(None))
    # bool is an int to Python, and no number to anybody who writes a config; an int is a fine float.
    fits = any(
        (isinstance(value, kind) and (kind is bool or not isinstance(value, bool)))
        or (kind is float and isinstance(value, int) and not isinstance(value, bool))
        for kind in kinds
    )
    wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    if not fits:
        raise ConfigError(f"{name} = {value!r}: expected {wanted}")
    low, high = allowed.get("low"), allowed.get("high")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ConfigError(f"{name} = {value!r}: allowed are values from {low} to {high}")
    choices = allowed.get("choices")
    if choices and value not in choices:
        raise ConfigError(f"{name} = {value!r}: allowed are {', '.join(choices)}")
    matches = allowed.get("matches")
    if matches is not None and not matches.fullmatch(value):
        raise ConfigError(f"{name} = {value!r}: allowed is what matches {matches.pattern}")


@dataclass(frozen=True, kw_only=True)
class CommConfig(Section):
    """The RPC core. Sizes in bytes, times in seconds."""

    udp_size_bytes_max: int = setting(
        8_000, "larger messages go over TCP (8,000 in the original)", low=512, high=60_000
    )
    message_size_bytes_max: int = setting(
        8 * MIB, "refused above this, before memory is taken", low=64 * KIB, high=256 * MIB
    )
    timeout_s: float = setting(5.0, "deadline of a call that names none", low=0.01, high=3600.0)
    attempt_timeout_s: float = setting(
        0.25,
        "first wait for an answer before the request is sent again; doubles up to 8 x, with 20 % jitter",
        low=0.005,
        high=60.0,
    )
    attempts_max: int = setting(8, "sends of one request, the first included", low=1, high=64)
    calls_in_flight_max: int = setting(
        4096, "calls one endpoint may await; more are refused as unavailable", low=16, high=1_000_000
    )
    answers_kept_max: int = setting(
        4096, "answers kept per caller for duplicates until acknowledged", low=16, high=1_000_000
    )
    peers_max: int = setting(4096, "peers remembered; the longest unheard is forgotten", low=16, high=1_000_000)


@dataclass(frozen=True, kw_only=True)
class ClsConfig(Section):
    """Membership. ``fast`` suits loopback and labs, ``lan`` real networks."""

    profile: str = setting("fast", "time constants of failure detection", choices=("fast", "lan"))
    expect: int = setting(1, "the first master brings nobody online before this many have joined", low=1, high=1000)
    expect_timeout_s: float = setting(10.0, "after this long it goes on with those who came", low=0.0, high=600.0)
    masters_max: int = setting(
        5, "members of the masters ring, which decide by majority; an even number leaves one seat empty", low=1, high=5
    )
    seat_timeout_s: float = setting(
        10.0, "a master that is offline for so long gives its seat to another member", low=0.1, high=86_400.0
    )


@dataclass(frozen=True, kw_only=True)
class RingConfig(Section):
    replicas: int = setting(3, "copies of everything", low=1, high=7)
    tokens_per_node: int = setting(32, "virtual nodes; more: evener shares, slower changes", low=1, high=1024)


@dataclass(frozen=True, kw_only=True)
class StorageConfig(Section):
    segment_size_bytes_max: int = setting(
        16 * MIB, "the log starts a new segment above this", low=4 * KIB, high=1024 * MIB
    )
    record_size_bytes_max: int = setting(
        16 * MIB, "a longer length in the log means damage", low=4 * KIB, high=256 * MIB
    )


@dataclass(frozen=True, kw_only=True)
class DbConfig(Section):
    shards: int = setting(16, "fixed when the cluster is born", low=1, high=1024)
    replication: str = setting(
        "raft",
        "how the replicas of a shard hold the same log; all but raft are lessons in what can go wrong",
        choices=("raft", "primary_backup", "quorum"),
    )
    snapshot_entries: int = setting(
        20_000, "so many entries of a shard's log are followed by a snapshot, at the latest", low=16, high=10_000_000
    )
    key_size_bytes_max: int = setting(1 * KIB, "UTF-8", low=16, high=64 * KIB)
    value_size_bytes_max: int = setting(1 * MIB, "packed", low=1 * KIB, high=16 * MIB)
    transaction_operations_max: int = setting(1024, "reads and writes of one transaction", low=1, high=100_000)
    in_sync_min: int = setting(
        2, "copies without which a write is refused (never more than the members online at birth)", low=1, high=7
    )
    read_quorum: int = setting(
        2, "R of the lesson quorum: replicas that answer a read; with R + W > ring.replicas it meets every write",
        low=1, high=7,
    )  # fmt: skip
    write_quorum: int = setting(
        2, "W of the lesson quorum: replicas that sync a write before it is acknowledged", low=1, high=7
    )


@dataclass(frozen=True, kw_only=True)
class FsConfig(Section):
    inline_size_bytes_max: int = setting(4 * KIB, "files up to this live in their header", low=0, high=256 * KIB)
    chunk_size_bytes: int = setting(1 * MIB, "larger files are cut into chunks of this size", low=4 * KIB, high=4 * MIB)
    path_size_bytes_max: int = setting(4 * KIB, "UTF-8", low=64, high=64 * KIB)
    repairs_in_flight_max: int = setting(8, "chunks copied at a time after a loss", low=1, high=256)
    intent_lease_s: float = setting(
        60.0, "a writer that was silent for this long has given up its intent", low=1.0, high=86_400.0
    )


@dataclass(frozen=True, kw_only=True)
class RestConfig(Section):
    port: int = setting(0, "0: any free port; -1: no REST on this node", low=-1, high=65_535)
    body_size_bytes_max: int = setting(1024 * MIB, "larger uploads are refused", low=1, high=1 << 40)


@dataclass(frozen=True, kw_only=True)
class NodeConfig(Section):
    """Everything one node needs to know."""

    name: str = setting(doc="unique in the cluster", matches=_NAME)
    secret: str = setting(doc="shared by the cluster; at least 16 characters")
    data_dir: str = setting(doc="directory of this node alone")
    cluster: str = setting("gostore", "packets of another cluster are dropped", matches=_NAME)
    host: str = setting("127.0.0.1", "address to bind; loopback unless told otherwise")
    tcp_port: int = setting(0, "0: any free port", low=0, high=65_535)
    udp_port: int = setting(0, "0: any free port", low=0, high=65_535)
    join: tuple[str, ...] = setting((), "HOST:TCP_PORT of members to join through; empty: this node starts the cluster")
    comm: CommConfig = field(default_factory=CommConfig)
    cls: ClsConfig = field(default_factory=ClsConfig)
    ring: RingConfig = field(default_factory=RingConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    db: DbConfig = field(default_factory=DbConfig)
    fs: FsConfig = field(default_factory=FsConfig)
    rest: RestConfig = field(default_factory=RestConfig)
    policies: dict[str, dict[str, Any]] = setting(doc="slot -> {name, source}", factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.secret) < 16:
            raise ConfigError(
                f"secret: {len(self.secret)} characters; at least 16 are needed "
                "(make one with: python -c 'import secrets; print(secrets.token_hex(16))')"
            )
        for entry in self.join:
            split_host_port("join", entry)
        if self.db.replication == "quorum":
            for name in ("read_quorum", "write_quorum"):
                if getattr(self.db, name) > self.ring.replicas:
                    raise ConfigError(
                        f"db.{name} = {getattr(self.db, name)}: allowed are values from 1 to {self.ring.replicas}, as "
                        f"ring.replicas = {self.ring.replicas}"
                    )
        self._check_sizes()
        for slot, policy in self.policies.items():
            try:
                PolicySource.from_wire(policy)
            except ValueError as error:
                raise ConfigError(f"policies.{slot}: {error}") from None

    def _check_sizes(self) -> None:
        """An object that fits no message or no record could never be read or copied again."""
        db = self.db
        scanned = 2 * db.shards + 2  # keys beside the object: the range that was read of each shard, and where to go on
        for name, size_max, keys in (
            ("comm.message_size_bytes_max", self.comm.message_size_bytes_max, scanned),
            ("storage.record_size_bytes_max", self.storage.record_size_bytes_max, 1),
        ):
            room = OBJECT_OVERHEAD_BYTES_MAX + keys * db.key_size_bytes_max
            if db.value_size_bytes_max + room > size_max:
                raise ConfigError(
                    f"db.value_size_bytes_max = {db.value_size_bytes_max}, {name} = {size_max}: an object must fit, "
                    f"with {room} bytes beside it; set {name} to at least {db.value_size_bytes_max + room}, or "
                    f"db.value_size_bytes_max to at most {size_max - room}"
                )

    @classmethod
    def load(
        cls, path: str | Path | None = None, environ: Mapping[str, str] | None = None, **keywords: Any
    ) -> NodeConfig:
        """Settings from a TOML file, then ``GOSTORE_*`` variables (``GOSTORE_DB__SHARDS=8``), then keywords.

        A later source wins. Raises :class:`ConfigError`.
        """
        values: dict[str, Any] = {}
        if path is not None:
            try:
                values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path}: not a TOML file: {error}") from None
        _merge(values, _from_environment(cls, os.environ if environ is None else environ))
        _merge(values, keywords)
        return cls.from_dict(values)


def _from_environment(cls: type[Section], environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable in sorted(environ):
        if not variable.startswith("GOSTORE_"):
            continue
        *sections, name = variable.removeprefix("GOSTORE_").lower().split("__")
        owner, target = cls, values
        for section in sections:
            owner = _hints(owner).get(section, Section)
            target = target.setdefault(section, {})
        hint = _hints(owner).get(name)
        if hint is None:
            raise ConfigError(f"{variable}: there is no such setting")
        target[name] = _parse(variable, environ[variable], hint)
    return values


def _parse(variable: str, text: str, hint: Any) -> Any:
    try:
        if hint in (int, float):
            return hint(text)
    except ValueError:
        raise ConfigError(f"{variable} = {text!r}: expected {hint.__name__}") from None
    if typing.get_origin(hint) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    for name, value in over.items():
        if isinstance(value, Mapping) and isinstance(base.get(name), dict):
            _merge(base[name], value)
        else:
            base[name] = dict(value) if isinstance(value, Mapping) else value


def split_host_port(name: str, text: str) -> tuple[str, int]:
    """``HOST:PORT`` as (host, port). Raises :class:`ConfigError` that names the setting ``name``."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ConfigError(f"{name} = {text!r}: expected HOST:PORT with a port from 1 to 65535")
    return host.strip("[]"), int(port)
