"""Judgements, read the same way by the filter and the training scripts: winner, tie, or why a row is not valid."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Judgements:
    """The n rows of a table as integer codes. A code is the text's position in `captions` or `uids`; null counts as ''.

    caption, uid_0, uid_1, best (n,) int32; label_0, label_1 (n,) float64, NaN for null; labeled, first_wins, tie (n,)
    bool. faults: the reasons why a row is not a valid game, (n,) bool each, in the order of the checks.
    """

    caption: np.ndarray
    captions: pa.Array
    uid_0: np.ndarray
    uid_1: np.ndarray
    best: np.ndarray
    uids: pa.Array
    label_0: np.ndarray
    label_1: np.ndarray
    labeled: np.ndarray
    first_wins: np.ndarray
    tie: np.ndarray
    faults: dict[str, np.ndarray]


def read_judgements(table: pa.Table) -> Judgements:
    """The judgements of a table with Pick-a-Pic's columns. has_label and best_image_uid may be missing.

    Without has_label a row counts as labeled if it has both labels. A best_image_uid that is empty or 'none' is
    ignored. Raises ArrowInvalid for text that is not UTF-8.
    """
    with ThreadPoolExecutor(1) as thread:
        of_captions = thread.submit(codes, table["caption"])
        has_best = "best_image_uid" in table.column_names
        uid, uids = codes(*(table[c] for c in ("image_0_uid", "image_1_uid", "best_image_uid")[: 2 + has_best]))
        caption, captions = of_captions.result()
    uid_0, uid_1, *given = uid.reshape(2 + has_best, -1)
    best = given[0] if given else np.zeros_like(uid_0)
    label_0, label_1 = (pc.cast(table[c], pa.float64()).to_numpy() for c in ("label_0", "label_1"))
    if "has_label" in table.column_names:
        labeled = pc.fill_null(table["has_label"], False).to_numpy()
    else:
        labeled = ~(np.isnan(label_0) | np.isnan(label_1))
    first_wins, second_wins = (label_0 == 1) & (label_1 == 0), (label_0 == 0) & (label_1 == 1)
    tie = (label_0 == 0.5) & (label_1 == 0.5)
    blank_caption, blank_uid = blank(captions), blank(uids)
    says_nothing = blank_uid | pc.equal(pc.utf8_lower(uids), "none").to_numpy(zero_copy_only=False)
    faults = {
        "missing_caption": blank_caption[caption],
        "missing_uid": blank_uid[uid_0] | blank_uid[uid_1],
        "unlabeled": ~labeled,
        "malformed_labels": ~(first_wins | second_wins | tie),
        "same_image": uid_0 == uid_1,
        "contradictory_best_image_uid": ~tie & ~says_nothing[best] & (best != np.where(first_wins, uid_0, uid_1)),
    }
    return Judgements(caption, captions, uid_0, uid_1, best, uids, label_0, label_1, labeled, first_wins, tie, faults)


def codes(*columns: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """(codes (rows of all columns,) int32, values): each text as its position in the distinct values. Null is ''."""
    kind = pa.dictionary(pa.int32(), pa.string())
    chunks = [pa.array([""]).dictionary_encode(), *(c.cast(kind) for column in columns for c in column.chunks)]
    chunks = pa.chunked_array(chunks, kind).unify_dictionaries().chunks  # '' has code 0
    return np.concatenate([c.indices.fill_null(0).to_numpy() for c in chunks])[1:], chunks[0].dictionary


def blank(values: pa.Array) -> np.ndarray:
    return pc.equal(pc.utf8_trim_whitespace(values), "").to_numpy(zero_copy_only=False)
