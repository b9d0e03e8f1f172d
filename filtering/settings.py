"""The filter's options, and the columns that it reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from ncp.common.config import option
from ncp.common.errors import UserError

RULES = ("no_ties", "contradiction_free", "absolute_winners", "x_y", "x_y_xz", "x_y_yz")
IMAGES = ("jpg_0", "jpg_1")
DECISION = {  # columns that the decision needs, and their kinds
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
MODELS = {"model_0": "text", "model_1": "text"}  # also needed with the option `models`


@dataclass
class FilterConfig:
    """What to read, which pairs to keep, where to write."""

    dataset_name: str = option(
        group="data",
        doc="judgements in Pick-a-Pic's format: folder of parquet files, one parquet file, or hub dataset id",
    )
    output_dir: str = option(
        doc="folder to write data/*.parquet, manifest.json and report.html to; new, empty, or of the same run, which "
        "then continues"
    )
    dataset_split: str = option(
        "train",
        doc="split to read: in a folder the files named for it (all are train if no file is named for any split), on "
        "the hub the same of its files",
    )
    revision: str | None = option(None, doc="branch, tag or commit of a hub dataset; null: its main branch")
    rule: str = option(
        "absolute_winners",
        choices=RULES,
        group="selection",
        doc="which pairs are kept. no_ties: every decisive judgement. contradiction_free: those neither of whose "
        "images is, within its caption, both a winner and a loser. absolute_winners: those won by an image that never "
        "lost and never tied. x_y: an absolute winner x with 2 wins or more over y, the loser of its latest win. "
        "x_y_xz: also x over z, the loser of y's latest win. x_y_yz: also y over z",
    )
    min_wins: int = option(
        1, low=1, doc="wins that an image needs to be an absolute winner; the x_y rules ask for 2 in any case"
    )
    pairs_per_winner: str = option(
        "latest",
        choices=("latest", "all"),
        doc="for the rule absolute_winners. latest: one pair per winner, the last judged. all: every pair that it won",
    )
    best_image_uid: str = option(
        "check",
        choices=("check", "ignore"),
        doc="rows whose best_image_uid is not that of the image that the labels prefer. check: dropped and counted, "
        "before wins are counted. ignore: the labels decide",
    )
    min_games_per_prompt: int = option(
        1, low=1, doc="valid games, ties included, that a prompt needs; prompts with fewer are dropped"
    )
    created_from: str | None = option(
        None, doc="first moment of the judgements to use, an ISO date or time in UTC; null: no bound"
    )
    created_before: str | None = option(
        None, doc="moment before which the judgements to use were made, an ISO date or time in UTC; null: no bound"
    )
    models: list[str] | None = option(
        None, doc="names of models: only games whose two images both come from them are used; null: from any"
    )
    metadata_only: bool = option(
        False,
        group="output",
        doc="write the pairs without images, and list in the manifest the row groups of the input that hold them",
    )
    rows_per_file: int = option(
        1500, low=1, doc="rows per output file with images; 1500 of Pick-a-Pic are about 500 MB"
    )
    shard: str = option(
        "1/1",
        doc="i/n: write only the i-th of n parts of the output files, so that n machines share the copying; 1/1: all",
    )

    def check(self) -> None:
        time_ns(self.created_from, "created_from")
        time_ns(self.created_before, "created_before")
        part_of(self.shard, 1)
        if not re.fullmatch(r"\w[\w.]*", self.dataset_split):
            raise UserError(f"dataset_split is {self.dataset_split!r}; expected a name such as train")


def time_ns(text: str | None, name: str) -> int | None:
    """An ISO date or time (without a zone: UTC) as nanoseconds since 1970. Raises UserError if it is not valid."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{name} is {text!r}; expected an ISO date or time such as 2023-01-31T12:00:00") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return (moment - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(microseconds=1) * 1000


def part_of(shard: str, files: int) -> range:
    """The contiguous file numbers of part i of n ('i/n', counted from 1). Raises UserError if it is not valid."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    i, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= n:
        raise UserError(f"shard is {shard!r}; expected i/n with 1 <= i <= n, such as 2/8")
    return range((i - 1) * files // n, i * files // n)
