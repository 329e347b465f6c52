"""Colours that everybody can tell apart.

The first six are Okabe and Ito's ("Color Universal Design", 2008). More nodes take hues around the circle at even
lightness; there the colour says "another one", and the name says which.
"""

from __future__ import annotations

import colorsys
from typing import Final

OKABE_ITO: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")

INK: Final = "#1f2933"
MUTED: Final = "#5d6975"
LINE: Final = "#d9dfe5"
PAPER: Final = "#ffffff"
GONE: Final = "#9aa5b1"

CALL: Final = "#0072B2"
GOSSIP: Final = "#009E73"
DROP: Final = "#D55E00"
COPY: Final = "#CC79A7"


def colors(count: int) -> list[str]:
    """``count`` colours as ``#rrggbb``; the i-th node, in launch order, takes the i-th."""
    if count <= len(OKABE_ITO):
        return list(OKABE_ITO[:count])
    return [_hue(i / count) for i in range(count)]


def _hue(hue: float) -> str:
    """A colour of this hue (0..1) at about the same luminance as the others: yellow and green are made darker."""
    value = 0.86
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.78, value)
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    # Towards 0.26, half of the way: equal luminance would turn yellow into brown.
    value *= (0.26 / max(luminance, 0.02)) ** (0.5 / 2.2)
    saturation = 0.78 if value <= 1 else max(0.45, 0.78 / value)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, min(value, 1.0))
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
