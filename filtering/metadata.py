"""The metadata of the output pairs: rows of the input, and synthesised rows for pairs that nobody judged."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filtering.rules import Decision
from filtering.settings import IMAGES
from filtering.source import Shard, read_columns


def metadata_of_pairs(shards: list[Shard], decision: Decision) -> pa.Table:
    """All columns of the pairs except the images, in output order: (P,) rows in the input's schema."""
    columns = [c for c in shards[0].schema.names if c not in IMAGES]
    rows = np.unique(np.concatenate([decision.row, decision.loser_row]))
    source = read_columns(shards, columns, rows).combine_chunks()
    table = source.take(np.searchsorted(rows, decision.row))
    made_up = np.flatnonzero(decision.made_up)
    if not len(made_up):
        return table
    losers = source.take(np.searchsorted(rows, decision.loser_row[made_up]))
    x_side, z_side = decision.image_sources()[1].reshape(-1, 2)[made_up].T
    base, new = table.take(made_up), {}
    for part in ("image_{}_uid", "image_{}_url", "model_{}"):
        if part.format(0) in columns and part.format(1) in columns:
            new[part.format(0)] = pick_side(base, part, x_side)
            new[part.format(1)] = pick_side(losers, part, z_side)
    count = len(made_up)
    new |= {"best_image_uid": new["image_0_uid"], "label_0": np.ones(count), "label_1": np.zeros(count)}
    new |= {"has_label": np.ones(count, bool), "are_different": np.ones(count, bool)}
    # Nobody's votes: not those on x and y, which the base row would give.
    new |= {"share_0": pa.nulls(count), "user_id": pa.nulls(count), "ranking_id": pc.bit_wise_not(base["ranking_id"])}
    arrays = []
    for name in columns:
        values = new.get(name, base[name])
        values = pa.array(values) if isinstance(values, np.ndarray) else values
        arrays.append(values.cast(base.schema.field(name).type))
    both = pa.concat_tables([table, pa.table(arrays, schema=base.schema)])
    at = np.arange(len(table))
    at[made_up] = len(table) + np.arange(count)
    return both.take(at)


def pick_side(table: pa.Table, part: str, side: np.ndarray) -> pa.Array:
    """Column `part` of image side[i] (0 or 1) in row i."""
    return pc.if_else(pa.array(side == 0), table[part.format(0)], table[part.format(1)])
