from __future__ import annotations

import asyncio
import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from gostore.core.errors import (
    AlreadyExists,
    BadRequest,
    Conflict,
    GoStoreError,
    IsADirectory,
    NotADirectory,
    NotEmpty,
    NotFound,
    Timeout,
    Unavailable,
)
from gostore.services.fs.directory import REMOVE_PAGE, Tree
from gostore.services.fs.header import Content
from gostore.services.fs.transactions import Transactions


def content(text: str) -> Content:
    data = text.encode()
    return Content(len(data), hashlib.sha256(data).hexdigest(), data)


def tree_on(kit: SimpleNamespace, kv: Any, name: str = "n1", seed: int = 0) -> Tree:
    return Tree(kv, Transactions(kit.make_env(name, seed), kv, name), path_size_bytes_max=4096)


async def put(tree: Tree, path: str, text: str = "x") -> Any:
    return (await tree.put(path, "text/plain", content(text)))[0]


async def names(tree: Tree, path: str) -> list[str]:
    found: list[str] = []
    start: str | None = ""
    while start is not None:
        page = await tree.children(path, start, 2)
        found += [child.name for child in page.children]
        start = page.next_start
    return found


def test_missing_parents_appear_up_to_the_root(kit: SimpleNamespace) -> None:
    async def main() -> None:
        kv = kit.FakeKeyValue()
        here, there = tree_on(kit, kv, "n1"), tree_on(kit, kv, "n2")
        header = await put(here, "/a/b/c", "hello")
        assert (header.version, header.size) == (1, 5)
        # What one node wrote, any other sees at once.
        assert [(c.name, c.size, c.type) for c in (await there.children("/a/b")).children] == [("c", 5, "text/plain")]
        assert await names(there, "/a") == ["b"]
        assert await names(there, "/") == ["a"]
        assert (await there.find("/a/b/c")).etag == header.etag
        assert (await there.find("/a")).is_directory
        assert (await there.find("/")).is_directory
        assert kit.tree_problems(kv) == []

    asyncio.run(main())


def test_versions_count_and_a_new_file_is_another_one(kit: SimpleNamespace) -> None:
    async def main() -> None:
        tree = tree_on(kit, kit.FakeKeyValue())
        first, second = await put(tree, "/f", "1"), await put(tree, "/f", "2")
        assert (first.version, second.version) == (1, 2)
        await tree.remove("/f")
        third = await put(tree, "/f", "1")
        assert third.version == 1
        assert third.etag != first.etag

    asyncio.run(main())


def test_files_and_directories_are_not_mixed_up(kit: SimpleNamespace) -> None:
    async def main() -> None:
        tree = tree_on(kit, kit.FakeKeyValue())
        await put(tree, "/d/f")
        for wrong, error in [
            (put(tree, "/d"), IsADirectory),
            (put(tree, "/"), IsADirectory),
            (put(tree, "/d/f/g"), NotADirectory),
            (tree.mkdir("/d/f"), AlreadyExists),
            (tree.mkdir("/d", exist_ok=False), AlreadyExists),
            (tree.mkdir("/", exist_ok=False), AlreadyExists),
            (tree.mkdir("/d/f/g"), NotADirectory),
            (tree.children("/d/f"), NotADirectory),
            (tree.children("/e"), NotFound),
            (tree.find("/d/f/g"), NotADirectory),
            (tree.find("/d/e"), NotFound),
            (tree.find("/e/e"), NotFound),
            (tree.remove("/"), BadRequest),
            (tree.remove("/e"), NotFound),
            (tree.remove("/d"), NotEmpty),
            (tree.children("/d", limit=0), BadRequest),
        ]:
            with pytest.raises(error):
                await wrong
        assert (await tree.mkdir("/d")).directory_id == (await tree.find("/d")).directory_id
        assert await names(tree, "/d") == ["f"]

    asyncio.run(main())


def test_recursive_removal_takes_pages_and_levels(kit: SimpleNamespace) -> None:
    async def main() -> None:
        kv = kit.FakeKeyValue()
        tree = tree_on(kit, kv)
        for number in range(REMOVE_PAGE + 5):
            await put(tree, f"/top/d{number % 3}/e/f{number}")
            await put(tree, f"/top/g{number}")
        await put(tree, "/keep")
        removed = await tree.remove("/top", recursive=True)
        assert removed.entries == 2 * (REMOVE_PAGE + 5) + 7
        assert await names(tree, "/") == ["keep"]
        assert sorted(kv.values("fs")) == ["root/", "root/keep"]

    asyncio.run(main())


def test_a_deep_tree_is_removed_without_recursion(kit: SimpleNamespace) -> None:
    async def main() -> None:
        kv = kit.FakeKeyValue()
        tree = tree_on(kit, kv)
        await put(tree, "/d" * 1500 + "/f")
        await tree.remove("/d", recursive=True)
        assert list(kv.values("fs")) == ["root/"]

    asyncio.run(main())


def test_the_cache_of_another_node_never_misleads(kit: SimpleNamespace) -> None:
    async def main() -> None:
        kv = kit.FakeKeyValue()
        old, other = tree_on(kit, kv, "n1"), tree_on(kit, kv, "n2")
        await put(old, "/a/b/f", "old")
        await other.remove("/a", recursive=True)
        with pytest.raises(NotFound):
            await old.find("/a/b/f")
        await put(other, "/a/b/f", "new")
        assert (await old.find("/a/b/f")).content == content("new")
        await other.remove("/a", recursive=True)
        await put(old, "/a/b/g", "again")  # old still remembers the ids that are gone
        assert await names(other, "/a/b") == ["g"]
        await other.remove("/a", recursive=True)
        await put(other, "/a", "now a file")
        with pytest.raises(NotADirectory):
            await old.find("/a/b/g")
        with pytest.raises(NotADirectory):
            await put(old, "/a/b/g")
        assert kit.tree_problems(kv) == []

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(40))
def test_creates_in_a_directory_that_is_being_removed(kit: SimpleNamespace, seed: int) -> None:
    async def main() -> None:
        kv = kit.FakeKeyValue(seed)
        trees = [tree_on(kit, kv, f"n{number}", seed) for number in range(4)]
        await put(trees[0], "/d/e/f0")
        for tree in trees:
            await tree.find("/d/e/f0")

        async def create(number: int) -> str:
            await put(trees[number], f"/d/e/f{number}")
            return f"f{number}"

        done = await asyncio.gather(
            create(1), trees[0].remove("/d", recursive=True), create(2), create(3), return_exceptions=True
        )
        assert not [one for one in done if isinstance(one, BaseException)]
        assert kit.tree_problems(kv) == []
        try:
            left = await names(trees[1], "/d/e")
        except NotFound:
            left = []
        assert "f0" not in left

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(40))
def test_directories_made_in_a_directory_that_is_being_removed(kit: SimpleNamespace, seed: int) -> None:
    async def main() -> None:
        kv = kit.FakeKeyValue(seed)
        trees = [tree_on(kit, kv, f"n{number}", seed) for number in range(3)]
        await trees[0].mkdir("/d")
        for number, tree in enumerate(trees):
            await put(tree, f"/d/known{number}")  # it knows the way, and the version of the directory
            await tree.remove(f"/d/known{number}")
        done = await asyncio.gather(
            trees[0].mkdir("/d/x"),
            trees[1].remove("/d", recursive=True),
            trees[2].mkdir("/d/y"),
            return_exceptions=True,
        )
        assert not [one for one in done if isinstance(one, BaseException)]
        assert kit.tree_problems(kv) == []

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(40))
def test_a_plain_removal_never_takes_an_acknowledged_file(kit: SimpleNamespace, seed: int) -> None:
    async def main() -> None:
        kv = kit.FakeKeyValue(seed)
        trees = [tree_on(kit, kv, f"n{number}", seed) for number in range(2)]
        await trees[0].mkdir("/d")
        await trees[1].children("/d")

        async def remove() -> bool:
            try:
                await trees[0].remove("/d")
            except NotEmpty:
                return False
            return True

        await asyncio.gather(put(trees[1], "/d/f"), remove())
        assert await names(trees[0], "/d") == ["f"]
        assert kit.tree_problems(kv) == []

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(20))
def test_two_writers_of_one_file_make_two_versions(kit: SimpleNamespace, seed: int) -> None:
    async def main() -> None:
        kv = kit.FakeKeyValue(seed)
        trees = [tree_on(kit, kv, f"n{number}", seed) for number in range(5)]
        headers = await asyncio.gather(*[put(tree, "/d/f", str(n)) for n, tree in enumerate(trees)])
        assert sorted(header.version for header in headers) == [1, 2, 3, 4, 5]
        last = max(headers, key=lambda header: header.version)
        assert await trees[0].find("/d/f") == last
        assert kit.tree_problems(kv) == []

    asyncio.run(main())


def test_a_name_that_never_rests_ends_in_a_conflict(kit: SimpleNamespace) -> None:
    async def main() -> None:
        kv = kit.FakeKeyValue()
        tree = tree_on(kit, kv)
        await put(tree, "/f")

        def disturb(operation: str, writes: Any) -> None:
            if operation == "commit":
                raise Conflict("somebody was quicker")

        kv.before = disturb
        with pytest.raises(Conflict, match="somebody was quicker"):
            await put(tree, "/f")

    asyncio.run(main())


@pytest.mark.parametrize("applied", [True, False])
def test_an_unknown_outcome_is_repeated_and_applied_once(kit: SimpleNamespace, applied: bool) -> None:
    async def main() -> None:
        kv = kit.FakeKeyValue()
        tree = tree_on(kit, kv)
        await put(tree, "/f", "1")
        lost = iter([True, True])

        def lose(*_: Any) -> None:
            if next(lost, False):
                raise Timeout("no answer")

        if applied:
            kv.after = lose
        else:
            kv.before = lambda operation, _: lose() if operation == "commit" else None
        assert (await put(tree, "/f", "2")).version == 2
        assert (await tree.find("/f")).version == 2

    asyncio.run(main())


def test_a_repeat_that_did_nothing_leaves_the_doubt(kit: SimpleNamespace) -> None:
    async def main() -> None:
        kv = kit.FakeKeyValue()
        tree = tree_on(kit, kv)
        await put(tree, "/f", "1")

        def lose(*_: Any) -> None:
            kv.before = refuse
            raise Timeout("no answer")

        def refuse(operation: str, _: Any) -> None:
            raise Unavailable("no primary")

        kv.after = lose
        with pytest.raises(Timeout) as raised:
            await put(tree, "/f", "2")
        assert not raised.value.definite
        kv.before = lambda *_: None
        assert (await tree.find("/f")).version == 2

    asyncio.run(main())


def test_a_crash_between_any_two_transactions_leaves_a_whole_tree(kit: SimpleNamespace) -> None:
    class Crash(BaseException):
        pass

    async def run(steps: int) -> bool:
        kv = kit.FakeKeyValue()
        tree = tree_on(kit, kv)
        await put(tree, "/old/a/f")
        await put(tree, "/old/b")
        left = steps

        def crash(operation: str, _: Any) -> None:
            nonlocal left
            left -= operation == "commit"
            if left < 0:
                raise Crash

        kv.before = crash
        finished = True
        try:
            await put(tree, "/new/x/y/f")
            await tree.remove("/old", recursive=True)
        except Crash:
            finished = False
        kv.before = lambda *_: None
        assert kit.tree_problems(kv) == []
        # Another node goes on where the first one fell.
        other = tree_on(kit, kv, "n2")
        await put(other, "/new/x/y/f", "again")
        try:
            await other.remove("/old", recursive=True)
        except NotFound:
            pass
        assert await names(other, "/") == ["new"]
        assert kit.tree_problems(kv) == []
        return finished

    steps = 0
    while not asyncio.run(run(steps)):
        steps += 1
    assert steps == 8  # three directories and a file made; a file, a directory, a file and a directory removed


NAMES = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(NAMES, max_size=3).map(lambda names: "/" + "/".join(names))


def parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


class Model:
    """A tree as a dictionary: path -> text of a file, None for a directory."""

    def __init__(self) -> None:
        self.nodes: dict[str, str | None] = {"/": None}

    def ancestors(self, path: str) -> list[str]:
        pieces = path.split("/")[1:]
        return ["/" + "/".join(pieces[:n]) for n in range(len(pieces))]

    def make_parents(self, path: str) -> None:
        for above in self.ancestors(path):
            if self.nodes.setdefault(above, None) is not None:
                raise NotADirectory(above)

    def need(self, path: str) -> None:
        for above in self.ancestors(path):
            if above not in self.nodes:
                raise NotFound(above)
            if self.nodes[above] is not None:
                raise NotADirectory(above)
        if path not in self.nodes:
            raise NotFound(path)

    def write(self, path: str, text: str) -> None:
        if path == "/":
            raise IsADirectory(path)
        self.make_parents(path)
        if path in self.nodes and self.nodes[path] is None:
            raise IsADirectory(path)
        self.nodes[path] = text

    def mkdir(self, path: str) -> None:
        if path == "/":
            return
        self.make_parents(path)
        if self.nodes.setdefault(path, None) is not None:
            raise AlreadyExists(path)

    def children(self, path: str) -> list[str]:
        self.need(path)
        if self.nodes[path] is not None:
            raise NotADirectory(path)
        return sorted(p.rpartition("/")[2] for p in self.nodes if p != "/" and parent(p) == path)

    def remove(self, path: str, recursive: bool) -> None:
        if path == "/":
            raise BadRequest(path)
        self.need(path)
        below = [p for p in self.nodes if p.startswith(path + "/")]
        if below and not recursive:
            raise NotEmpty(path)
        for gone in [path, *below]:
            del self.nodes[gone]


def test_behaves_like_a_dictionary(kit: SimpleNamespace) -> None:
    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.kv = kit.FakeKeyValue()
            self.model = Model()
            self.trees = [tree_on(kit, self.kv, f"n{number}") for number in range(3)]
            self.loop = asyncio.new_event_loop()

        def teardown(self) -> None:
            self.loop.close()

        def both(self, expected: Any, got: Any) -> None:
            """Run both; they agree on the result or on the class of the error."""
            outcomes = []
            for run in (expected, lambda: self.loop.run_until_complete(got())):
                try:
                    outcomes.append(run())
                except GoStoreError as error:
                    outcomes.append(type(error))
            assert outcomes[0] == outcomes[1]

        @rule(node=st.integers(0, 2), path=PATHS, text=st.text(max_size=3))
        def write(self, node: int, path: str, text: str) -> None:
            async def got() -> None:
                await put(self.trees[node], path, text)

            self.both(lambda: self.model.write(path, text), got)

        @rule(node=st.integers(0, 2), path=PATHS)
        def mkdir(self, node: int, path: str) -> None:
            async def got() -> None:
                await self.trees[node].mkdir(path)

            self.both(lambda: self.model.mkdir(path), got)

        @rule(node=st.integers(0, 2), path=PATHS, recursive=st.booleans())
        def remove(self, node: int, path: str, recursive: bool) -> None:
            async def got() -> None:
                await self.trees[node].remove(path, recursive=recursive)

            self.both(lambda: self.model.remove(path, recursive), got)

        @rule(node=st.integers(0, 2), path=PATHS)
        def list_(self, node: int, path: str) -> None:
            self.both(lambda: self.model.children(path), lambda: names(self.trees[node], path))

        @rule(node=st.integers(0, 2), path=PATHS)
        def find(self, node: int, path: str) -> None:
            def expected() -> str | None:
                self.model.need(path)
                return self.model.nodes[path]

            async def got() -> str | None:
                header = await self.trees[node].find(path)
                return header.content.inline.decode() if header.content and header.content.inline is not None else None

            self.both(expected, got)

        @invariant()
        def whole(self) -> None:
            assert kit.tree_problems(self.kv) == []

    run_state_machine_as_test(Machine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))
