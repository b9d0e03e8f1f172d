"""Converts rows of preference datasets to judgements of two images: a pure function per format.

The columns are taken from the datasets' cards and loaders, and named in each function. A function raises KeyError for a
missing column, and ValueError, with the reason, for a value that its format does not allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import combinations
from typing import Any

from preparing.settings import PrepareConfig

Row = dict[str, Any]


@dataclass(frozen=True)
class Judgement:
    """Two images for a prompt, and the preference for the first: 1 first, 0 second, 0.5 neither, None unknown.

    images: each bytes, a path, or a dict of `bytes` and `path`. is_share: `preference` is a share of several votes.
    created_at: naive, UTC.
    """

    prompt: Any
    images: tuple[Any, Any]
    preference: float | None
    is_share: bool = False
    models: tuple[str | None, str | None] = (None, None)
    created_at: datetime = datetime(1970, 1, 1)


def hpdv2(row: Row, config: PrepareConfig) -> Judgement:
    """ymhao/HPDv2, train.json: `prompt`, `file_path` (two), `human_preference` (two, 1 for the preferred)."""
    first, second = pair(row, "file_path")
    votes = pair(row, "human_preference")
    if not all(v in (0, 1) for v in votes):
        raise ValueError(f"human_preference is {list(votes)}; expected a 0 or 1 for each image")
    return Judgement(row["prompt"], (first, second), 0.5 + (votes[0] - votes[1]) / 2)


def hpdv3(row: Row, config: PrepareConfig) -> Judgement:
    """MizzenAI/HPDv3: `prompt`, `path1` (the preferred), `path2`; `choice_dist` (votes, or null); `model1`, `model2`.

    The larger number of choice_dist belongs to path1: HPSv3's loader (hpsv3/dataset) sorts the two before it takes the
    share.
    """
    models = (text(row.get("model1")), text(row.get("model2")))
    images = (row["path1"], row["path2"])
    share = None if row.get("choice_dist") is None else share_of(*pair(row, "choice_dist"))
    if share is None:
        return Judgement(row["prompt"], images, 1.0, models=models)
    return Judgement(row["prompt"], images, max(share, 1 - share), True, models)


def chosen_rejected(row: Row, config: PrepareConfig) -> Judgement:
    """`prompt`, `chosen`, `rejected`: data-is-better-together/open-image-preferences-v1-binarized and many others."""
    return Judgement(row["prompt"], (row["chosen"], row["rejected"]), 1.0)


def rapidata(row: Row, config: PrepareConfig) -> Judgement:
    """Rapidata's pair sets: `prompt`, `image1`, `image2`, `model1`, `model2`, `weighted_results_image1_QUESTION`, ...2.

    The two results are shares of the votes, weighted by the annotators' reliability.
    """
    results = (row[f"weighted_results_image{i}_{config.asked}"] for i in (1, 2))
    models = (text(row.get("model1")), text(row.get("model2")))
    return Judgement(row["prompt"], (row["image1"], row["image2"]), share_of(*results), True, models)


def imagereward(rows: Sequence[Row], config: PrepareConfig) -> list[Judgement]:
    """zai-org/ImageRewardDB: the rows of one `prompt_id`, one image each, as all their pairs (as in its own loader).

    `prompt`, `image` or `image_path`, `image_amount_in_total`; `rank` (1 is best, images may share one), or a rating
    from 1 to 7 (7 is best): `overall_rating`, `image_text_alignment_rating`, `fidelity_rating`.
    """
    total = rows[0].get("image_amount_in_total")
    if total is not None and total != len(rows):
        raise ValueError(
            f"{len(rows)} rows of prompt_id {rows[0]['prompt_id']} stand together, and it has {total} images; "
            "sort the rows by prompt_id, and leave no image out"
        )
    sign = -1 if config.asked == "rank" else 1
    found = []
    for a, b in combinations(rows, 2):
        first, second = (row["image"] if "image" in row else row["image_path"] for row in (a, b))
        preference = better(number(a[str(config.asked)]), number(b[str(config.asked)]), sign)
        found.append(Judgement(a["prompt"], (first, second), preference))
    return found


def table(row: Row, config: PrepareConfig) -> Judgement:
    """Any table: prompt, two images and a preference in the columns that the options name."""
    first, second = (row[c] for c in config.image_columns)
    values = [row[c] for c in config.preference_columns]
    is_share = not config.preference_words
    if len(values) == 2:
        preference = share_of(*values)
    elif config.preference_words:
        preference = meaning(values[0], config.preference_words)
    else:
        preference = number(values[0])
        if preference is not None and not 0 <= preference <= 1:
            raise ValueError(f"{config.preference_columns[0]} is {values[0]!r}; expected a number from 0 to 1")
    models = [text(row[c]) for c in config.model_columns] or [None, None]
    created = moment(row[config.created_at_column]) if config.created_at_column else datetime(1970, 1, 1)
    return Judgement(row[config.prompt_column], (first, second), preference, is_share, (models[0], models[1]), created)


ONE_ROW: dict[str, Callable[[Row, PrepareConfig], Judgement]] = {
    "hpdv2": hpdv2,
    "hpdv3": hpdv3,
    "chosen_rejected": chosen_rejected,
    "rapidata": rapidata,
    "table": table,
}


def judgements(rows: Sequence[Row], config: PrepareConfig) -> list[Judgement]:
    """The judgements in rows that belong together: one row, or for imagereward the rows of one prompt_id."""
    if config.format == "imagereward":
        return imagereward(rows, config)
    return [ONE_ROW[config.format](row, config) for row in rows]


def columns(config: PrepareConfig) -> tuple[list[str], list[str]]:
    """(required columns of a format, optional columns that it reads if they exist)."""
    named = [config.prompt_column, *config.image_columns, *config.preference_columns, *config.model_columns]
    named += [config.created_at_column] if config.created_at_column else []
    known: dict[str, tuple[list[str], list[str]]] = {
        "hpdv2": (["prompt", "file_path", "human_preference"], []),
        "hpdv3": (["prompt", "path1", "path2"], ["choice_dist", "model1", "model2"]),
        "chosen_rejected": (["prompt", "chosen", "rejected"], []),
        "rapidata": (
            ["prompt", "image1", "image2", *(f"weighted_results_image{i}_{config.asked}" for i in (1, 2))],
            ["model1", "model2"],
        ),
        "imagereward": (
            ["prompt_id", "prompt", str(config.asked)],
            ["image", "image_path", "image_amount_in_total"],
        ),
        "table": (named, []),
    }
    return known[config.format]


# ---------------------------------------------------------------- values


def pair(row: Row, column: str) -> tuple[Any, Any]:
    """The two items in a column. Raises ValueError if there are not exactly two."""
    value = row[column]
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"{column} is {value!r}; expected two items")
    return value[0], value[1]


def number(value: Any) -> float | None:
    """The value as a number; None for a missing value or NaN. Raises ValueError for anything else."""
    if value is None or value == "":
        return None
    if isinstance(value, (list, dict)):
        raise ValueError(f"found {value!r}; expected a number")
    try:
        found = float(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"found {value!r}; expected a number") from None
    return None if math.isnan(found) else found


def share_of(first: Any, second: Any) -> float | None:
    """first / (first + second) of votes or scores; None if one is missing or both are 0. ValueError below 0."""
    scores = (number(first), number(second))
    if scores[0] is None or scores[1] is None:
        return None
    if min(scores[0], scores[1]) < 0 or math.isinf(scores[0] + scores[1]):
        raise ValueError(f"scores of the two images are {first!r} and {second!r}; expected numbers of at least 0")
    total = scores[0] + scores[1]
    return scores[0] / total if total else None


def better(first: float | None, second: float | None, sign: int) -> float | None:
    """1 if sign * first is larger, 0 if sign * second is, 0.5 if they are equal; None if one is missing."""
    if first is None or second is None:
        return None
    return 0.5 if first == second else float(sign * first > sign * second)


def meaning(value: Any, words: Sequence[str]) -> float | None:
    """1, 0 or 0.5 for the first, second or third word; None for a missing value. ValueError for another word."""
    if value is None or value == "":
        return None
    if str(value) not in words:
        raise ValueError(f"the preference is {value!r}; preference_words are {', '.join(words)}")
    return (1.0, 0.0, 0.5)[list(words).index(str(value))]


def text(value: Any) -> str | None:
    return None if value is None else str(value).encode("utf-8", "replace").decode()


def moment(value: Any) -> datetime:
    """A time as naive UTC. Raises ValueError if it is not a time."""
    try:
        found = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (ValueError, TypeError):
        raise ValueError(f"the time is {value!r}; expected an ISO date or time such as 2023-01-31T12:00:00") from None
    if not 1700 < found.year < 2200:
        raise ValueError(f"the time is {value!r}; expected one of this age")
    return found if found.tzinfo is None else found.astimezone(timezone.utc).replace(tzinfo=None)
