"""The files of a log's segments: their names, their open handles, how one comes and how one goes."""

from __future__ import annotations

import re
from typing import Final

from gostore.core.ports import Disk, File
from gostore.storage import segments
from gostore.storage.segments import RECORD_SIZE_BYTES, Head, RawRecord

# Files kept open, the newest segment's included.
HANDLES_MAX: Final = 8

_NAME: Final = re.compile(r"(\d{10})\.wal")
_TEMPORARY: Final = "next.tmp"


class SegmentFiles:
    """The segments of one log in one directory."""

    def __init__(self, disk: Disk, directory: str) -> None:
        self._disk = disk
        self._directory = directory
        self._handles: dict[int, File] = {}  # the most recently used is last
        self._newest = 0

    def name(self, number: int) -> str:
        return f"{self._directory}/{number:010d}.wal"

    async def find(self) -> list[int]:
        """The numbers of the segments that are there, ascending; an unfinished one is dropped."""
        self._disk.mkdir(self._directory)
        names = self._disk.listdir(self._directory)
        if _TEMPORARY in names:
            self._disk.remove(f"{self._directory}/{_TEMPORARY}")
        # A node that was killed may have left names that only the page cache knows: nobody may rely on them before
        # they are on the medium.
        await self._disk.sync_dir(self._directory.rpartition("/")[0])
        await self._disk.sync_dir(self._directory)
        numbers = [int(match[1]) for name in names if (match := _NAME.fullmatch(name)) is not None]
        self._newest = max(numbers, default=0)
        return numbers

    def open(self, number: int) -> File:
        """The shared handle of a segment; it may be closed when others are asked for."""
        file = self._handles.pop(number, None) or self._disk.open(self.name(number))
        self._keep(number, file)
        return file

    def open_own(self, number: int) -> File:
        """A handle that the caller closes."""
        return self._disk.open(self.name(number))

    async def create(self, number: int, mark: int, outlines: list[RawRecord]) -> Head:
        """Make the next segment; it gets its name when its head is on the medium. Raises ``OSError``."""
        temporary = f"{self._directory}/{_TEMPORARY}"
        start = segments.HEAD_SIZE_BYTES + sum(RECORD_SIZE_BYTES + len(record.payload) for record in outlines)
        head = Head(number, mark, start)
        parts: list[bytes | memoryview] = [segments.encode_head(head)]
        offset = segments.HEAD_SIZE_BYTES
        for record in outlines:
            parts += (segments.record_header(mark, offset, 0, record), record.payload)
            offset += RECORD_SIZE_BYTES + len(record.payload)
        file = self._disk.open(temporary, create=True)
        try:
            file.append(b"".join(parts))
            await file.sync()
            self._disk.rename(temporary, self.name(number))
            await self._disk.sync_dir(self._directory)
        except BaseException:
            file.close()
            raise
        # Not before: whoever reads old segments meanwhile may make room in the handles.
        self._newest = number
        self._keep(number, file)
        return head

    async def remove(self, number: int) -> None:
        """Delete a segment, on the medium too. Raises ``OSError``."""
        if number in self._handles:
            self._handles.pop(number).close()
        self._disk.remove(self.name(number))
        await self._disk.sync_dir(self._directory)

    def close(self) -> None:
        for file in self._handles.values():
            file.close()
        self._handles.clear()

    def _keep(self, number: int, file: File) -> None:
        self._handles[number] = file
        while len(self._handles) > HANDLES_MAX:
            oldest = next(other for other in self._handles if other not in (number, self._newest))
            self._handles.pop(oldest).close()
