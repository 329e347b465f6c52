"""``cluster.fs`` on real nodes."""

from __future__ import annotations

import asyncio
import io
import os
from pathlib import Path

import pytest

from gostore.client.files import PIECE_SIZE_BYTES, READ_SIZE_BYTES
from gostore.core.errors import (
    BadRequest,
    Conflict,
    GoStoreError,
    IsADirectory,
    NotEmpty,
    NotFound,
    Unavailable,
    Unreachable,
)
from gostore.testbed import Testbed

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("size", [0, 1, PIECE_SIZE_BYTES, PIECE_SIZE_BYTES + 1, READ_SIZE_BYTES + PIECE_SIZE_BYTES + 7])
def test_what_is_written_through_one_is_read_through_all(cluster: Testbed, size: int) -> None:
    content = os.urandom(size)
    path = f"/sizes/{size}"
    header = cluster.fs.write_sync(path, content, via="n1")
    assert (header["path"], header["size"], header["version"]) == (path, size, 1)
    for node in cluster.nodes:
        assert cluster.fs.read_sync(path, via=node) == content
    assert b"".join(cluster.fs.stream_sync(path)) == content
    assert cluster.fs.read_sync(path, max(size - 3, 0), 100) == content[-3:]
    assert cluster.fs.read_sync(path, size + 5, 3) == b""


def test_a_range_spans_pieces(cluster: Testbed) -> None:
    content = os.urandom(2 * READ_SIZE_BYTES)
    cluster.fs.write_sync("/ranges", content)
    low, size = 123, READ_SIZE_BYTES + 4567
    assert cluster.fs.read_sync("/ranges", low, size) == content[low : low + size]


def test_content_may_be_text_a_path_or_a_file(cluster: Testbed, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(b"from a path")
    cluster.fs.write_sync("/kinds/text", "süß")
    cluster.fs.write_sync("/kinds/path", tmp_path / "local")
    cluster.fs.write_sync("/kinds/file", io.BytesIO(b"from a file"))
    cluster.fs.write_sync("/kinds/view", memoryview(b"from a view"), type="text/plain")
    assert cluster.fs.read_sync("/kinds/text").decode() == "süß"
    assert [cluster.fs.read_sync(f"/kinds/{kind}") for kind in ("path", "file", "view")] == [
        b"from a path", b"from a file", b"from a view"
    ]  # fmt: skip
    assert cluster.fs.header_sync("/kinds/view")["type"] == "text/plain"
    with pytest.raises(BadRequest, match="cannot be read: No such file"):
        cluster.fs.write_sync("/kinds/absent", tmp_path / "absent")
    with pytest.raises(BadRequest, match="content is int; expected bytes, text"):
        cluster.fs.write_sync("/kinds/wrong", 3)  # type: ignore[arg-type]


def test_directories(cluster: Testbed) -> None:
    cluster.fs.mkdir_sync("/dir/below")
    cluster.fs.write_sync("/dir/file", b"12345")
    assert [(e["name"], e["directory"], e["size"]) for e in cluster.fs.list_sync("/dir")] == [
        ("below", True, 0), ("file", False, 5)
    ]  # fmt: skip
    assert cluster.fs.exists_sync("/dir/file")
    assert not cluster.fs.exists_sync("/dir/none")
    assert cluster.fs.stat_sync("/dir/file")["place"]["owners"]
    with pytest.raises(IsADirectory):
        cluster.fs.read_sync("/dir")
    with pytest.raises(NotEmpty):
        cluster.fs.delete_sync("/dir")
    assert cluster.fs.delete_sync("/dir", recursive=True) == 3
    with pytest.raises(NotFound):
        cluster.fs.header_sync("/dir")


def test_a_version_can_be_asked_for(cluster: Testbed) -> None:
    cluster.fs.write_sync("/versions", b"1")
    cluster.fs.write_sync("/versions", b"2")
    assert cluster.fs.read_sync("/versions", version=2) == b"2"
    with pytest.raises(Conflict, match="has version 2 now, not 1"):
        cluster.fs.read_sync("/versions", version=1)


def test_trees_go_there_and_back(cluster: Testbed, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for number in range(30):
        file = source / f"d{number % 3}" / f"f{number}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes([number]) * number * 1000)
    (source / "link").symlink_to("nowhere")
    size = sum(number * 1000 for number in range(30))
    assert cluster.fs.put_tree_sync(source, "/tree", in_flight=4) == {"files": 30, "bytes": size}
    assert cluster.fs.get_tree_sync("/tree", target, in_flight=4) == {"files": 30, "bytes": size}
    for file in source.rglob("f*"):
        assert (target / file.relative_to(source)).read_bytes() == file.read_bytes()
    with pytest.raises(BadRequest, match="is not a directory; use write"):
        cluster.fs.put_tree_sync(source / "d0" / "f0", "/tree")


def test_many_are_written_and_read_with_their_errors(cluster: Testbed) -> None:
    async def main() -> None:
        files = ((f"/many/{number}", b"x" * number) for number in range(40))
        assert await cluster.fs.write_many(files, in_flight=8) == {"files": 40, "bytes": sum(range(40))}
        paths = [f"/many/{number}" for number in range(41)]
        found = {path: outcome async for path, outcome in cluster.fs.read_many(paths, in_flight=8)}
        assert isinstance(found.pop("/many/40"), NotFound)
        assert {path: len(data) for path, data in found.items() if isinstance(data, bytes)} == {
            f"/many/{number}": number for number in range(40)
        }

    asyncio.run(main())


def test_one_error_among_many_is_raised_and_ends_the_rest(cluster: Testbed) -> None:
    drawn = []

    def files() -> object:
        for number in range(1000):
            drawn.append(number)
            yield ("not absolute" if number == 5 else f"/some/{number}"), b""

    with pytest.raises(GoStoreError, match="not absolute"):
        cluster.fs.write_many_sync(files(), in_flight=2)  # type: ignore[arg-type]
    assert len(drawn) < 20


def test_wrong_paths_and_nodes_are_named(cluster: Testbed) -> None:
    with pytest.raises(BadRequest, match="relative"):
        cluster.fs.write_sync("relative", b"")
    with pytest.raises(BadRequest, match="there is no node 'n9'; known are n1, n2, n3"):
        cluster.fs.read_sync("/x", via="n9")
    with pytest.raises(BadRequest, match="size = -2"):
        cluster.fs.read_sync("/x", size=-2)


def test_an_upload_goes_on_elsewhere_when_its_node_is_lost(cluster: Testbed) -> None:
    """The node dies in the middle; before the commit nothing has happened, so another one takes the whole file."""
    content = os.urandom(3 * PIECE_SIZE_BYTES)
    killed: list[str] = []
    connection = cluster._connected()
    send = connection.call_node

    async def lossy(node: str, service: str, function: str, *args: object, **keywords: object) -> object:
        if function == "append" and not killed:
            killed.append(node)
            raise Unreachable(f"{node} does not run")
        return await send(node, service, function, *args, **keywords)  # type: ignore[arg-type]

    connection.call_node = lossy  # type: ignore[method-assign, assignment]
    try:
        cluster.fs.write_sync("/uploads/moved", content)
        assert killed
        assert cluster.fs.read_sync("/uploads/moved") == content

        class Pipe(io.BytesIO):
            def seekable(self) -> bool:
                return False

        killed.clear()
        with pytest.raises(Unavailable, match="/uploads/pipe was not written"):
            cluster.fs.write_sync("/uploads/pipe", Pipe(content))
        assert not cluster.fs.exists_sync("/uploads/pipe")
    finally:
        connection.call_node = send  # type: ignore[method-assign]
