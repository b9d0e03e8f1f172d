"""The filter's options, and the columns that it knows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from ncp.common.config import option
from ncp.common.errors import UserError

RULES = ("no_ties", "contradiction_free", "absolute_winners", "x_y", "x_y_xz", "x_y_yz")
IMAGES = ("jpg_0", "jpg_1")
DECISION = {  # columns that the decision needs, and what they must hold
    "caption": "text",
    "created_at": "a timestamp",
    "has_label": "true or false",
    "best_image_uid": "text",
    "image_0_uid": "text",
    "image_1_uid": "text",
    "label_0": "a number",
    "label_1": "a number",
    "ranking_id": "an integer",
}
MODELS = {"model_0": "text", "model_1": "text"}  # with the option `models` these too


@dataclass
class FilterConfig:
    """What to read, which pairs to keep, where to write."""

    dataset_name: str = option(doc="Folder of parquet files, one parquet file, or a hub dataset id")
    output_dir: str = option(doc="Folder to write; new, empty, or from the same run")
    dataset_split: str = option("train", doc="Split to read; files named for it if there are any")
    revision: str | None = option(None, doc="Branch, tag or commit of a hub dataset; null: its main branch")
    rule: str = option("absolute_winners", choices=RULES, doc="Which pairs to keep")
    min_wins: int = option(1, low=1, doc="Wins that an absolute winner needs (x_y rules: at least 2 in any case)")
    pairs_per_winner: str = option(
        "latest", choices=("latest", "all"), doc="absolute_winners: each winner's latest pair, or all of them"
    )
    best_image_uid: str = option(
        "check",
        choices=("check", "ignore"),
        doc="Rows whose best_image_uid is not the winner's: drop them before wins are counted, or go by the labels",
    )
    min_games_per_prompt: int = option(1, low=1, doc="Drop prompts with fewer games, ties included")
    created_from: str | None = option(None, doc="Drop judgements before this ISO date or time (UTC)")
    created_before: str | None = option(None, doc="Drop judgements at or after this ISO date or time (UTC)")
    models: list[str] | None = option(None, doc="Keep games whose two images both come from these models; null: any")
    metadata_only: bool = option(False, doc="Write no images; list the row groups that hold them in the manifest")
    rows_per_file: int = option(
        1500, low=1, doc="Rows per output file with images: 1500 are about 500 MB of Pick-a-Pic"
    )
    shard: str = option("1/1", doc="i/n: write only the i-th of n parts of the output files, for several machines")

    def check(self) -> None:
        time_ns(self.created_from, "created_from")
        time_ns(self.created_before, "created_before")
        part_of(self.shard, 1)
        if not re.fullmatch(r"\w[\w.]*", self.dataset_split):
            raise UserError(f"dataset_split is {self.dataset_split!r}; expected a name such as train")


def time_ns(text: str | None, name: str) -> int | None:
    """An ISO date or time (without a zone: UTC) as nanoseconds since 1970. Raises UserError if it is none."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{name} is {text!r}; expected an ISO date or time such as 2023-01-31T12:00:00") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return (moment - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(microseconds=1) * 1000


def part_of(shard: str, files: int) -> range:
    """The file numbers of part i of n ('i/n', from 1), neighbours together. Raises UserError if it is none."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    i, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= n:
        raise UserError(f"shard is {shard!r}; expected i/n with 1 <= i <= n, such as 2/8")
    return range((i - 1) * files // n, i * files // n)
