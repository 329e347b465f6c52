"""The commits of fs: repeated under one request id while nobody knows what became of them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from gostore.core.errors import GoStoreError, Timeout, Unavailable
from gostore.core.keyvalue import Committed, RequestId
from gostore.services.fs.transactions import COMMIT_REPEATS_MAX, Transactions


class Doubtful:
    """A db that answers with what the test lists, in this order, and then commits."""

    def __init__(self, *errors: GoStoreError) -> None:
        self.errors = list(errors)
        self.asked: list[tuple[RequestId, bool]] = []

    async def commit(self, _reads: Any, _writes: Any, *, request_id: RequestId, repeated: bool) -> Committed:
        self.asked.append((request_id, repeated))
        if self.errors:
            raise self.errors.pop(0)
        return Committed({0: 7})


def test_a_repeat_says_that_it_is_one(kit: SimpleNamespace) -> None:
    """So that db refuses it for nothing but what stands in its log."""

    async def main() -> None:
        kv: Any = Doubtful(Timeout("nobody knows"), Unavailable("nobody leads"))
        committed = await Transactions(kit.make_env("n1"), kv, "me").commit([], [])
        assert committed.version == 7
        assert [repeated for _, repeated in kv.asked] == [False, True, True]
        assert len({request for request, _ in kv.asked}) == 1

    asyncio.run(main())


def test_a_doubt_outlives_what_comes_after_it(kit: SimpleNamespace) -> None:
    async def main() -> None:
        kv: Any = Doubtful(Timeout("the first"), *(Unavailable("nobody leads") for _ in range(COMMIT_REPEATS_MAX)))
        with pytest.raises(Timeout, match="the first"):
            await Transactions(kit.make_env("n1"), kv, "me").commit([], [])
        kv = Doubtful(Unavailable("nobody leads"))
        with pytest.raises(Unavailable):
            await Transactions(kit.make_env("n1"), kv, "me").commit([], [])
        assert len(kv.asked) == 1, "what surely did not happen is for the caller to repeat"

    asyncio.run(main())
