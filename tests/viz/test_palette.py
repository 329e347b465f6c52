from __future__ import annotations

import re

import pytest

from gostore.viz.palette import OKABE_ITO, colors


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 12, 20, 40, 100])
def test_every_node_has_a_colour_of_its_own(count: int) -> None:
    found = colors(count)
    assert len(found) == count
    assert len({*found}) == count
    assert all(re.fullmatch(r"#[0-9a-fA-F]{6}", color) for color in found)


def test_few_nodes_take_the_palette_for_all_eyes() -> None:
    assert colors(6) == list(OKABE_ITO)
    assert colors(3) == list(OKABE_ITO[:3])


def test_many_colours_are_about_equally_light() -> None:
    def luminance(color: str) -> float:
        red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2

    found = [luminance(color) for color in colors(40)]
    assert min(found) > 0.12, "too dark for the dark theme"
    assert max(found) < 0.5, "too light for the light theme"
