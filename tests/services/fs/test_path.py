from __future__ import annotations

import posixpath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gostore.core.errors import BadRequest
from gostore.services.fs import path as paths

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), max_size=12)
PIECES = st.lists(st.one_of(NAMES, st.sampled_from(["", ".", "..", " ", "a", " a ", " ..", "é"])), max_size=12)
PATHS = PIECES.map(lambda pieces: "/" + "/".join(pieces))


@given(PATHS)
@example("/x /.")
@example("/a/ .. /b")
def test_the_written_form_is_absolute_clean_and_stable(path: str) -> None:
    try:
        written = paths.normalise(path)
    except BadRequest:
        return
    assert written.startswith("/")
    assert paths.normalise(written) == written
    names = paths.parts(written)
    assert paths.join(names) == written
    assert all(name and name == name.strip(" ") and name not in {".", ".."} and "/" not in name for name in names)


@given(st.lists(st.sampled_from(["", ".", "..", "a", "b", "c d"]), max_size=10))
def test_agrees_with_posix_where_it_stays_below_the_root(pieces: list[str]) -> None:
    path = "/" + "/".join(pieces)
    depth, lowest = 0, 0
    for piece in pieces:
        depth += {"": 0, ".": 0, "..": -1}.get(piece, 1)
        lowest = min(lowest, depth)
    if lowest < 0:
        with pytest.raises(BadRequest, match="above the root"):
            paths.normalise(path)
    else:
        assert paths.normalise(path) == "/" + posixpath.normpath(path).lstrip("/").replace("//", "/")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "absolute"),
        ("a/b", "absolute"),
        ("..", "absolute"),
        ("/..", "above the root"),
        ("/a/../..", "above the root"),
        ("/a\0b", "NUL"),
        ("/\ud800", "UTF-8"),
        ("/" + "é" * 128, "256 bytes; allowed are 255"),
        ("/" + "/".join(["x" * 99] * 50), "5000 bytes; allowed are 4096"),
        ("/" * 20_000, "allowed are 4096 bytes"),
        (7, "expected a string"),
    ],
)
def test_what_is_refused_says_why(path: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        paths.normalise(path)


def test_the_limits_themselves_are_allowed() -> None:
    assert paths.parts("/" + "x" * 255) == ("x" * 255,)
    longest = "/" + "/".join(["x" * 255] * 16)
    assert len(longest) == 4096
    assert paths.normalise(longest) == longest


def test_blanks_around_names_disappear_and_inside_they_stay() -> None:
    assert paths.normalise("  / a // b c /. ") == "/a/b c"


def test_bytes_must_be_utf8() -> None:
    assert paths.from_bytes("/ä/ö".encode()) == "/ä/ö"
    with pytest.raises(BadRequest, match="not UTF-8"):
        paths.from_bytes(b"/\xff")


def test_child_of_the_root_and_of_others() -> None:
    assert paths.child("/", "a") == "/a"
    assert paths.child("/a", "b") == "/a/b"
