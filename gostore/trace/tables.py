"""Events as a pandas table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from gostore.core.errors import NotSupported
from gostore.core.events import KINDS
from gostore.trace.causality import Causality

COLUMNS: Final = ("stamp", "time_s", "node", "seq", "kind", "category", "id", "cause")
"""What every table has; behind them stand the fields of the kinds in it, in the order of the schema."""


def table(causality: Causality, chosen: Iterable[int]) -> Any:
    """The events at these places of causal stamp order, one a row, as a ``pandas.DataFrame``.

    index ``order``: the place among all events of the journal, so that two tables of one journal can be joined and
    compared; ``stamp``: hybrid logical, unsigned; ``time_s``: loop time in seconds; ``id`` and ``cause``: (node,
    number), equal where one event is the cause of another; then the fields of the kinds, empty (``None``) where a kind
    has no such field. Raises :class:`NotSupported` when pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise NotSupported("a table needs pandas; run: pip install 'gostore[notebook]'") from None
    order = list(chosen)
    events = [causality.events[place] for place in order]
    here = dict.fromkeys(event.kind for event in events)
    fields = dict.fromkeys(name for kind, (_, names) in KINDS.items() if kind in here for name in names)
    columns: dict[str, Any] = {name: [getattr(event, name) for event in events] for name in COLUMNS}
    columns["stamp"] = pd.array(columns["stamp"], dtype="uint64")
    for name in fields:
        columns[name] = pd.Series([event.data.get(name) for event in events], dtype="object", index=order)
        # Numbers stay whole numbers where a field is one in every row.
        if len(columns[name]) and not columns[name].isna().any():
            columns[name] = columns[name].infer_objects()
    return pd.DataFrame(columns, index=pd.Index(order, name="order", dtype="int64"))
