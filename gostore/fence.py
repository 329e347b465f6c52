"""What keeps those apart who took part in a recovery from a lost majority, and those who did not.

After an unsafe recovery (:mod:`gostore.recover`) a single replica decides where a majority had to. If the others came
back, with their logs and votes, they could be that majority again, without it: two leaders, two histories. So the
recovery makes a *new secret*, which no packet of theirs carries: neither side hears the other. And should somebody give
an old data directory the new secret, it does not start: the secret names the recovery it belongs to, and a data
directory that was in use has to name the same one, in the file ``recovered``. A new node has an empty one and takes it
over from its secret.

Without a recovery there is neither a file nor such a secret, and nothing happens here.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Final

from gostore.core.errors import ConfigError, Corrupt, NotSupported, Unavailable
from gostore.core.ports import Disk, Rng
from gostore.env import Env

FILE: Final = "recovered"
FORMAT_VERSION: Final = 1
USED: Final = ("incarnation", "wal")
"""A data directory with one of these was in use."""

_SECRET: Final = re.compile(r"recovered-([0-9a-f]{16})-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Fence:
    """``id`` of the recovery; ``groups`` in which it let one replica decide, and whom it took for ``lost``."""

    id: str
    groups: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def new_id(rng: Rng) -> str:
    return f"{rng.getrandbits(64):016x}"


def new_secret(identity: str, token: str) -> str:
    """A secret for a cluster that went through this recovery. ``token``: 32 hexadecimal digits, not to be guessed."""
    return f"recovered-{identity}-{token}"


def id_of(secret: str) -> str | None:
    """The recovery that a secret names."""
    match = _SECRET.fullmatch(secret)
    return match[1] if match else None


def read(disk: Disk) -> Fence | None:
    """The fence of a data directory. Raises ``Corrupt``, and ``NotSupported`` for another format version."""
    if not disk.exists(FILE):
        return None
    try:
        match json.loads(disk.read_bytes(FILE)):
            case {"version": int(version)} if version != FORMAT_VERSION:
                raise NotSupported(
                    f"{FILE} has format version {version}; this release reads version {FORMAT_VERSION}: run the "
                    "release that wrote it"
                )
            case {"version": int(), "id": str(identity), "groups": [*groups], "lost": [*lost]}:
                return Fence(identity, tuple(map(str, groups)), tuple(map(str, lost)))
    except ValueError:
        pass
    raise Corrupt(f"{FILE} cannot be read: move this data directory away and let the node join with an empty one")


async def write(env: Env, fence: Fence) -> None:
    """Durable at return. Raises ``Unavailable`` when the disk fails."""
    temporary = f"{FILE}.tmp"
    try:
        file = env.disk.open(temporary, create=True)
        try:
            file.truncate(0)
            file.append(json.dumps({"version": FORMAT_VERSION, **asdict(fence)}).encode())
            await file.sync()
        finally:
            file.close()
        env.disk.rename(temporary, FILE)
        await env.disk.sync_dir("")
    except OSError as error:
        raise Unavailable(f"{FILE} could not be written: {error.strerror}", definite=False) from error


async def pass_fence(env: Env, secret: str) -> Fence | None:
    """The fence of this node's data directory, if it has one, before anything of it is used.

    Raises ``ConfigError`` when directory and secret are not of the same recovery, and as :func:`read`.
    """
    wanted, found = id_of(secret), read(env.disk)
    if found is None and wanted is not None:
        if any(env.disk.exists(name) for name in USED):
            raise ConfigError(
                f"the data of {env.name} are of before the recovery {wanted} from a lost majority, which went on "
                "without them: they may contradict what the cluster holds now. Start with an empty data_dir, under "
                "another name"
            )
        found = Fence(wanted)
        await write(env, found)
    if found is not None and found.id != wanted:
        raise ConfigError(
            f"the data of {env.name} went through the recovery {found.id} from a lost majority, and the secret is of "
            f"{'the recovery ' + wanted if wanted else 'before'}: set the secret that `gostore recover` printed"
        )
    return found
