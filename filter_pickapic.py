"""Selects clean preference pairs from a dataset in Pick-a-Pic's format, and copies them out.

People's judgements of two images for one caption contradict each other: the image that won one game
lost another. A loss trained on both pulls both ways. This script reads the judgements, keeps the pairs
that a rule of the paper (README, "Filtering") selects, and writes them as parquet in the same schema:

    python filter_pickapic.py --config configs/filter_pickapic.yaml --dataset_name FOLDER --output_dir FOLDER

A *game* is a labeled row on two different images; an image is a pair (caption, uid). The rules:

    no_ties             every decisive game
    contradiction_free  decisive games neither of whose images is both a winner and a loser
    absolute_winners    games won by an image with `min_wins` wins, no loss and no tie; the latest of each
                        winner or (pairs_per_winner: all) every one
    x_y                 x > y: x an absolute winner with two wins or more, y the loser of x's latest win
    x_y_xz              and x > z, z the loser of y's latest win, if y has one
    x_y_yz              and y > z

The work has two parts. The *decision* needs nine metadata columns, 200 MB for Pick-a-Pic v2's 959,040
rows, and no image: a few NumPy operations on integer codes of captions and uids, seconds on one machine.
The *copy* streams the surviving images in output order. It holds a row group of the input, one of the output,
and up to 256 MB of images that were read before their turn; beyond that they wait in an anonymous temporary
file in the output folder. Several machines share it by output files (`--shard`). Output order is (created_at,
ranking_id), so it does not depend on how the input is cut into files. JPEG bytes are copied, never decoded.

x > z need not have been judged. If it was not, the row is made up: the columns of the row x > y, with x as
image 0 and z, from the row that holds it, as image 1; labels 1 and 0; user_id null; ranking_id ~r (negative)
for x > y's r.

What cannot be right is dropped and counted by kind (`decide`), before wins are counted. Two rows that agree in
all nine columns are one judgement: the first is used, in order of file name. The authors of the method do not
look at `best_image_uid`; `best_image_uid: ignore` does as they do. The counts in `manifest.json` add up to the input;
`report.html` shows them, and samples of what was kept and removed, to a person. docs/filtering.md has figures.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

import ncp
from ncp import filter_report
from ncp.common import hub
from ncp.common.config import option, parse
from ncp.common.errors import UserError, run_program
from ncp.common.files import sha256
from ncp.common.judgements import read_judgements
from ncp.common.lock import is_empty, one_writer
from ncp.common.splits import files_of_split, local_files

T = TypeVar("T")

RULES = ("no_ties", "contradiction_free", "absolute_winners", "x_y", "x_y_xz", "x_y_yz")
IMAGES = ("jpg_0", "jpg_1")
DECISION = {
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
ROWS_PER_GROUP = 100  # of an output file with images: about 35 MB of Pick-a-Pic
READ_ROWS = 8  # of images at a time
LOOK_AHEAD = 64  # such reads, so that the writer has something to do while the next pages are decoded
HOLD_BYTES = 256 << 20  # images waiting for their turn in memory; more wait on disk
UNFINISHED = ".unfinished.json"


@dataclass
class Config:
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


# ---------------------------------------------------------------- decision


@dataclass
class Decision:
    """Pair p = the winner of input row `row[p]` over the loser of input row `loser_row[p]`, in output order.

    The two rows are the same unless the pair was never judged. row, loser_row (P,) int64; first_wins (rows,) bool;
    why (rows,) int8: 0 for a kept row, else 1 + the position of its reason in `dropped`, which counts rows by reason.
    contradicting: valid games whose best_image_uid is not the winner's, dropped or used.
    """

    games: Games
    row: np.ndarray
    loser_row: np.ndarray
    first_wins: np.ndarray
    why: np.ndarray
    dropped: dict[str, int]
    contradicting: int
    prompts: int
    images: int
    digest: str

    @property
    def made_up(self) -> np.ndarray:
        """Pairs that are no row of the input, (P,) bool."""
        return self.row != self.loser_row

    def image_sources(self) -> tuple[np.ndarray, np.ndarray]:
        """(input row, side 0 or 1), both (2P,): where images 0 and 1 of each pair in turn come from."""
        row = np.stack([self.row, self.loser_row], axis=1)
        of_rows = np.tile([0, 1], (len(row), 1))
        winner_first = np.stack([~self.first_wins[self.row], self.first_wins[self.loser_row]], axis=1)
        return row.ravel(), np.where(self.made_up[:, None], winner_first, of_rows).ravel()


@dataclass
class Funnel:
    """Which rows are still in, and the first reason why each of the others is not."""

    why: np.ndarray
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, mask: np.ndarray, reason: str) -> None:
        hit = mask & (self.why == 0)
        self.dropped[reason] = int(hit.sum())
        self.why[hit] = len(self.dropped)

    def kept(self) -> np.ndarray:
        return self.why == 0


def decide(table: pa.Table, config: Config) -> Decision:
    """Which pairs to write, from the metadata columns of every row (`DECISION`; model_0, model_1 if asked for).

    Every dropped row has one reason, the first that applies of: duplicate_ranking_id (again, with other content: none
    of them is used), duplicate_row, missing_caption, missing_uid, missing_ranking_id, missing_created_at,
    outside_created_at, other_model, unlabeled (has_label is not true), malformed_labels (no 1/0, 0/1 or 0.5/0.5),
    same_image, contradictory_best_image_uid (a decisive row; an empty one or 'none' says nothing; not if the config
    says ignore), too_few_games_for_prompt, tie, and the rule's own. Raises UserError for text that is no UTF-8.
    """
    try:
        said = read_judgements(table)
    except pa.ArrowInvalid:
        raise UserError(f"{config.dataset_name}: a caption or uid is not valid UTF-8") from None
    caption, uid_0, uid_1 = said.caption, said.uid_0, said.uid_1
    first_wins, tie, faults = said.first_wins, said.tie, said.faults
    created, no_time = integers(table["created_at"].cast(pa.timestamp("ns")))
    ranking, no_ranking = integers(table["ranking_id"])

    funnel = Funnel(np.zeros(table.num_rows, np.int8))
    labels = [np.nan_to_num(label, nan=-1) for label in (said.label_0, said.label_1)]
    best = [said.best] if config.best_image_uid == "check" else []
    content = [ranking, caption, created, no_time, said.labeled, uid_0, uid_1, *best, *labels]
    conflict, again = duplicates(content, ~no_ranking)
    funnel.drop(conflict, "duplicate_ranking_id")
    funnel.drop(again, "duplicate_row")
    funnel.drop(faults["missing_caption"], "missing_caption")
    funnel.drop(faults["missing_uid"], "missing_uid")
    funnel.drop(no_ranking, "missing_ranking_id")
    funnel.drop(no_time, "missing_created_at")
    lowest, highest = time_ns(config.created_from, "created_from"), time_ns(config.created_before, "created_before")
    too_early = created < lowest if lowest is not None else np.False_
    too_late = created >= highest if highest is not None else np.False_
    funnel.drop(too_early | too_late, "outside_created_at")
    if config.models is not None:
        known = pa.array(config.models, pa.string())
        both = [pc.is_in(table[c].cast(pa.string()), value_set=known).to_numpy() for c in ("model_0", "model_1")]
        funnel.drop(~(both[0] & both[1]), "other_model")
    for reason in ("unlabeled", "malformed_labels", "same_image"):
        funnel.drop(faults[reason], reason)
    contradicts = faults["contradictory_best_image_uid"] & funnel.kept()
    if config.best_image_uid == "check":
        funnel.drop(contradicts, "contradictory_best_image_uid")
    per_prompt = np.bincount(caption[funnel.kept()], minlength=len(said.captions))
    funnel.drop(per_prompt[caption] < config.min_games_per_prompt, "too_few_games_for_prompt")

    key = np.concatenate([caption, caption]).astype(np.int64) * len(said.uids) + np.concatenate([uid_0, uid_1])
    encoded = pc.dictionary_encode(pa.array(key))
    image_0, image_1 = encoded.indices.to_numpy().astype(np.int64).reshape(2, -1)
    winner, loser = np.where(first_wins, image_0, image_1), np.where(first_wins, image_1, image_0)
    games = Games(caption, winner, loser, funnel.kept(), tie, created, ranking, len(encoded.dictionary))
    row, loser_row = select(games, funnel, config)

    order = np.lexsort((row != loser_row, ranking[row], created[row]))
    row, loser_row = row[order], loser_row[order]
    digest = hashlib.sha256(np.stack([ranking[row], ranking[loser_row], first_wins[row], created[row]]).tobytes())
    written = np.concatenate([np.where(first_wins, uid_0, uid_1)[row], np.where(first_wins, uid_1, uid_0)[loser_row]])
    prompts, images = (int((np.bincount(found) > 0).sum()) for found in (caption[row], written))
    return Decision(
        games, row, loser_row, first_wins, funnel.why, funnel.dropped, int(contradicts.sum()), prompts, images,
        digest.hexdigest(),
    )  # fmt: skip


@dataclass
class Games:
    """Who beat whom and when, one entry per input row, of which only those that are `valid` count.

    prompt, winner, loser (rows,): numbers of caption and images (below `images`), in a tie just of its two images;
    valid, tie (rows,) bool; created, ranking (rows,) int64. wins, losses, ties: (images,) int64, counted from these.
    """

    prompt: np.ndarray
    winner: np.ndarray
    loser: np.ndarray
    valid: np.ndarray
    tie: np.ndarray
    created: np.ndarray
    ranking: np.ndarray
    images: int

    def __post_init__(self) -> None:
        decisive, tied = self.valid & ~self.tie, self.valid & self.tie
        self.wins = np.bincount(self.winner[decisive], minlength=self.images)
        self.losses = np.bincount(self.loser[decisive], minlength=self.images)
        self.ties = np.bincount(np.concatenate([self.winner[tied], self.loser[tied]]), minlength=self.images)


def select(games: Games, funnel: Funnel, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """(row, loser_row) of the pairs that the rule keeps of the rows left in `funnel`, which drops the others."""
    winner, loser, wins, losses = games.winner, games.loser, games.wins, games.losses
    funnel.drop(games.tie, "tie")
    if config.rule == "no_ties":
        return (np.flatnonzero(funnel.kept()),) * 2
    if config.rule == "contradiction_free":
        both = (wins > 0) & (losses > 0)
        funnel.drop(both[winner] | both[loser], "contradictory")
        return (np.flatnonzero(funnel.kept()),) * 2

    decisive = np.flatnonzero(funnel.kept())
    by_time = decisive[np.lexsort((games.ranking[decisive], games.created[decisive]))]
    latest_win = np.full(games.images, -1)
    latest_win[winner[by_time]] = by_time  # of several rows of one winner, the assignment keeps the last
    unbeaten = (losses == 0) & (games.ties == 0)
    enough = wins >= (config.min_wins if config.rule == "absolute_winners" else max(config.min_wins, 2))
    if config.rule == "absolute_winners" and config.pairs_per_winner == "all":
        row = decisive[(unbeaten & enough)[winner[decisive]]]
    else:
        row = latest_win[unbeaten & enough & (wins > 0)]
    loser_row = row
    if config.rule in ("x_y_xz", "x_y_yz"):
        y_win = latest_win[loser[row]]  # y's latest win, over z; -1 if y has none
        x_row, y_win = row[y_win >= 0], y_win[y_win >= 0]
        if config.rule == "x_y_xz":
            judged = latest_row_of_pair(games, by_time, winner[x_row], loser[y_win])
            more, more_loser = np.where(judged >= 0, judged, x_row), np.where(judged >= 0, judged, y_win)
        else:
            more = more_loser = np.unique(y_win)  # two winners may have beaten the same y
        row, loser_row = np.concatenate([row, more]), np.concatenate([loser_row, more_loser])

    unused = np.ones(len(winner), bool)
    unused[row] = False
    funnel.drop(unused & ~unbeaten[winner], "not_an_absolute_winner")
    funnel.drop(unused & ~enough[winner], "too_few_wins")
    funnel.drop(unused, "not_the_winners_latest")
    return row, loser_row


def latest_row_of_pair(games: Games, by_time: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The last row of `by_time` in which image first[i] beat image second[i], or -1; (len(first),) int64."""
    pair = games.winner[by_time] * games.images + games.loser[by_time]
    by_pair = np.argsort(pair, kind="stable")
    wanted = first * games.images + second
    at = np.searchsorted(pair[by_pair], wanted, side="right") - 1
    found = (at >= 0) & (pair[by_pair[at]] == wanted)
    return np.where(found, by_time[by_pair[at]], -1)


def duplicates(content: list[np.ndarray], comparable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(conflict, again), both (rows,) bool, of rows whose key content[0] occurs more than once.

    conflict: rows of a key whose rows do not all agree. again: rows after the first of their key.
    """
    conflict, again = np.zeros(len(comparable), bool), np.zeros(len(comparable), bool)
    rows = np.flatnonzero(comparable)
    rows = rows[np.argsort(content[0][rows], kind="stable")]
    repeats = content[0][rows[1:]] == content[0][rows[:-1]]  # the row before
    rows = rows[np.concatenate([repeats, [False]]) | np.concatenate([[False], repeats])] if len(rows) else rows
    first = np.ones(len(rows), bool)  # of its key
    first[1:] = content[0][rows[1:]] != content[0][rows[:-1]]
    differs = np.zeros(len(rows), bool)
    for values in content[1:]:
        differs[1:] |= values[rows[1:]] != values[rows[:-1]]
    key = np.cumsum(first) - 1
    conflict[rows] = np.isin(key, key[differs & ~first])
    again[rows] = ~first
    return conflict, again


def integers(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """(values (rows,) int64 with 0 for null, whether null (rows,) bool)."""
    return pc.fill_null(column.cast(pa.int64()), 0).to_numpy(), column.is_null().to_numpy()


def time_ns(text: str | None, name: str) -> int | None:
    """An ISO date or time (without a zone: UTC) as nanoseconds since 1970. Raises UserError if it is none."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{name} is {text!r}; expected an ISO date or time such as 2023-01-31T12:00:00") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return round(moment.timestamp()) * 10**9 + moment.microsecond * 1000


def part_of(shard: str, files: int) -> range:
    """The file numbers of part i of n ('i/n', from 1), neighbours together. Raises UserError if it is none."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    i, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= n:
        raise UserError(f"shard is {shard!r}; expected i/n with 1 <= i <= n, such as 2/8")
    return range((i - 1) * files // n, i * files // n)


# ---------------------------------------------------------------- input


@dataclass(frozen=True)
class Shard:
    """One parquet file of the input; `open` gives what pyarrow reads from, `first_row` its place in the dataset."""

    name: str
    size: int
    open: Callable[[], Any]
    metadata: pq.FileMetaData
    schema: pa.Schema
    first_row: int = 0

    def parquet(self, dictionaries: Sequence[str] = ()) -> pq.ParquetFile:
        file = self.open()
        # From a hub few and large requests; from a disk a little at a time, since a row group has 340 MB of images.
        how = {"buffer_size": 1 << 20} if isinstance(file, str) else {"pre_buffer": True}
        return pq.ParquetFile(file, metadata=self.metadata, read_dictionary=list(dictionaries), **how)


def list_files(config: Config) -> tuple[list[tuple[str, int, Callable[[], Any]]], str | None]:
    """((name, size, opener) of the split's parquet files by name, commit of a hub dataset or None).

    Raises UserError if there is nothing to read.
    """
    local = local_files(config.dataset_name, config.dataset_split)
    if local is not None:
        return [(name, path.stat().st_size, partial(str, path)) for name, path in local.items()], None

    from huggingface_hub import HfApi, HfFileSystem

    try:
        info = HfApi().dataset_info(config.dataset_name, revision=config.revision, files_metadata=True)
    except Exception as error:  # the hub's client raises many kinds, offline more still
        reason = hub.reason(error)
        raise UserError(
            f"dataset_name: '{config.dataset_name}' is no local path, and the hub gave no such dataset ({reason})"
        ) from None
    remote, root = HfFileSystem(), f"datasets/{config.dataset_name}@{info.sha}"
    sizes = {f.rfilename: f.size or 0 for f in info.siblings or [] if f.rfilename.endswith(".parquet")}
    names = files_of_split(sizes, config.dataset_split, config.dataset_name)
    # No read-ahead: pyarrow asks for the byte ranges it needs, and image columns lie between them.
    open_name = partial(remote.open, mode="rb", cache_type="none")
    return [(n, sizes[n], partial(open_name, f"{root}/{n}")) for n in names], info.sha


def open_shards(config: Config) -> tuple[list[Shard], str | None]:
    """(the input files with their footers read, commit of a hub dataset or None).

    Raises UserError naming the file that is no parquet, lacks a column or differs in schema from the first.
    """
    files, commit = list_files(config)

    def footer(file: tuple[str, int, Callable[[], Any]]) -> Shard:
        name, size, opener = file
        with reading(config, name):
            parquet = pq.ParquetFile(opener())
        return Shard(name, size, opener, parquet.metadata, parquet.schema_arrow.remove_metadata())

    with ThreadPoolExecutor(threads(config)) as pool:
        shards = list(pool.map(footer, files))
    first_row = 0
    for index, shard in enumerate(shards):
        check_schema(shard, config)
        if not shard.schema.equals(shards[0].schema):
            odd = set(map(str, shard.schema)) ^ set(map(str, shards[0].schema))
            detail = "; ".join(sorted(odd)) or "columns in another order"
            raise UserError(f"{where(config, shard.name)}: schema differs from {shards[0].name}'s ({detail})")
        shards[index] = replace(shard, first_row=first_row)
        first_row += shard.metadata.num_rows
    return shards, commit


def check_schema(shard: Shard, config: Config) -> None:
    """Raises UserError if a needed column is missing or of a wrong type."""
    needed = dict(DECISION) | ({"model_0": "text", "model_1": "text"} if config.models is not None else {})
    if config.best_image_uid == "ignore" and "best_image_uid" not in shard.schema.names:
        del needed["best_image_uid"]
    if not config.metadata_only:
        needed |= dict.fromkeys(IMAGES, "binary")
    kinds = {
        "text": (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        "a timestamp": (pa.types.is_timestamp,),
        "true or false": (pa.types.is_boolean,),
        "a number": (pa.types.is_floating, pa.types.is_integer),
        "an integer": (pa.types.is_integer,),
        "binary": (pa.types.is_binary, pa.types.is_large_binary),
    }
    missing = [c for c in needed if c not in shard.schema.names]
    if missing:
        hint = "; --metadata_only needs no images" if set(missing) <= set(IMAGES) else ""
        raise UserError(f"{where(config, shard.name)}: column {', '.join(missing)} is missing{hint}")
    for column, kind in needed.items():
        found = shard.schema.field(column).type
        if not any(is_kind(found) for is_kind in kinds[kind]):
            raise UserError(f"{where(config, shard.name)}: column {column} is {found}; expected {kind}")


def read_columns(
    shards: list[Shard],
    columns: list[str],
    config: Config,
    rows: np.ndarray | None = None,
    dictionaries: Sequence[str] = (),
) -> pa.Table:
    """These columns of the whole input, or of its `rows` (sorted, distinct) only; no other column is read.

    dictionaries: text columns to leave as files store them, each distinct value of a row group once.
    """

    def read(shard: Shard) -> pa.Table:
        begin, end = shard.first_row, shard.first_row + shard.metadata.num_rows
        mine = None if rows is None else rows[slice(*np.searchsorted(rows, [begin, end]))] - begin
        if mine is not None and not len(mine):
            return shard.schema.empty_table().select(columns)
        with reading(config, shard.name):
            table = shard.parquet(dictionaries).read(columns=columns, use_threads=False).replace_schema_metadata(None)
        return (table if mine is None else table.take(mine)).select(columns)

    with ThreadPoolExecutor(threads(config)) as pool:
        return pa.concat_tables(pool.map(read, shards))


def threads(config: Config) -> int:
    """To read files with: one per core locally; a hub answers slowly, but many at once."""
    return min(os.cpu_count() or 1, 8) if os.path.exists(config.dataset_name) else 16


def where(config: Config, name: str) -> str:
    path = Path(config.dataset_name)
    return config.dataset_name if path.is_file() else f"{config.dataset_name.rstrip('/')}/{name}"


@contextmanager
def reading(config: Config, name: str) -> Iterator[None]:
    """Turns a failure to read file `name` into a UserError."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (pa.ArrowException, OSError)) and not hub.is_lost_connection(error):
            raise
        raise UserError(f"{where(config, name)}: not a readable parquet file ({hub.reason(error)})") from None


# ---------------------------------------------------------------- output


def metadata_of_pairs(shards: list[Shard], decision: Decision, config: Config) -> pa.Table:
    """Every column but the images of the pairs, in output order: (P,) rows in the input's schema."""
    columns = [c for c in shards[0].schema.names if c not in IMAGES]
    rows = np.unique(np.concatenate([decision.row, decision.loser_row]))
    source = read_columns(shards, columns, config, rows).combine_chunks()
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
    new |= {"user_id": pa.nulls(count), "ranking_id": pc.bit_wise_not(base["ranking_id"])}
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


def by_row_group(shards: list[Shard], rows: np.ndarray) -> Iterator[tuple[Shard, int, np.ndarray, np.ndarray]]:
    """(shard, row group, positions in `rows` in order of row, these rows within the group) where there are any."""
    places, first = [], 0
    for shard in shards:
        for number in range(shard.metadata.num_row_groups):
            places.append((shard, number, first))
            first += shard.metadata.row_group(number).num_rows
    group = np.searchsorted([first for _, _, first in places], rows, side="right") - 1
    order = np.lexsort((rows, group))
    for part in np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(rows) else []:
        shard, number, first = places[group[part[0]]]
        yield shard, number, part, rows[part] - first


def images_in_order(
    shards: list[Shard],
    rows: np.ndarray,
    sides: np.ndarray,
    spill_dir: Path,
    config: Config,
    hold_bytes: int = HOLD_BYTES,
) -> Iterator[pa.Array]:
    """Yields image sides[k] of input row rows[k], for k = 0, 1, ..., as an array of one; each row group is read once.

    Groups come in the order in which their first image is due. Images that are read before they are due wait in
    memory up to `hold_bytes`, and beyond it in a temporary file in `spill_dir` that has no name.
    """
    parts = sorted(by_row_group(shards, rows), key=lambda part: part[2].min())

    def read() -> Iterator[list[tuple[int, pa.Array]]]:
        for shard, number, keys, inside in parts:
            yield from read_images(shard, number, keys, inside, sides[keys], config)

    waiting: dict[int, bytes | tuple[int, int] | None] = {}
    held = due = 0
    with tempfile.TemporaryFile(dir=spill_dir) as spill, tqdm(total=len(rows), desc="copy", unit="image") as bar:
        for k, image in chain.from_iterable(ahead(read())):
            if k != due:
                content = image[0].as_py()  # the array would keep all that was read with it
                size = len(content or b"")
                if held + size > hold_bytes and size:
                    waiting[k] = (spill.seek(0, os.SEEK_END), size)
                    spill.write(content)
                else:
                    waiting[k] = content
                    held += size
                continue
            yield image
            due += 1
            while due in waiting:
                content = waiting.pop(due)
                if isinstance(content, tuple):
                    spill.seek(content[0])
                    content = spill.read(content[1])
                else:
                    held -= len(content or b"")
                yield pa.array([content], image.type)
                due += 1
            bar.update(due - bar.n)


def read_images(
    shard: Shard, group: int, keys: np.ndarray, rows: np.ndarray, sides: np.ndarray, config: Config
) -> Iterator[list[tuple[int, pa.Array]]]:
    """(keys[i], image sides[i] of row rows[i] of the row group), rows ascending, in lists of a few rows' images."""
    first = 0
    with reading(config, shard.name):
        parquet, columns = shard.parquet(), list(IMAGES)
        for batch in parquet.iter_batches(READ_ROWS, row_groups=[group], columns=columns, use_threads=False):
            here = slice(*np.searchsorted(rows, [first, first + len(batch)]))
            found, at = np.unique(rows[here] - first, return_inverse=True)
            batch = batch if len(found) == len(batch) else batch.take(found)
            yield [
                (key, batch[IMAGES[side]].slice(row, 1))
                for key, row, side in zip(keys[here].tolist(), at.tolist(), sides[here].tolist(), strict=True)
            ]
            first += READ_ROWS
            if here.stop == len(rows):
                return


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, made by a thread of their own that is up to LOOK_AHEAD of them ahead."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(next, items, end) for _ in range(LOOK_AHEAD))
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, items, end))
            yield item


def write_file(path: Path, schema: pa.Schema, tables: Iterator[pa.Table], images_repeat: bool) -> Path:
    """Writes row groups to a temporary name beside `path`, and returns that; `finish` gives the file its own."""
    temporary = path.with_name(f".{path.name}.tmp")
    columns = [name for name in schema.names if name not in IMAGES]
    # JPEGs do not compress, and nobody asks for the smallest. A dictionary stores an image of several games once per
    # row group, but where few repeat it only costs time.
    options = {
        "compression": {name: "none" if name in IMAGES else "zstd" for name in schema.names},
        "use_dictionary": schema.names if images_repeat else columns,
        "dictionary_pagesize_limit": 1 << 30,
        "write_statistics": columns,
        "write_batch_size": 8,  # a page is looked at after so many values: 1 MB pages, not one for all images
    }
    try:
        with pq.ParquetWriter(temporary, schema, **options) as writer:
            for table in tables:
                writer.write_table(table)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def finish(temporary: Path, path: Path) -> str:
    """Names a file that is written, once the disk has it: it is there whole or not at all. Returns its sha256."""
    try:
        digest = sha256(temporary)
        with open(temporary, "rb+") as file:  # Windows waits for no file that is open for reading only
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return digest
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def row_groups(table: pa.Table, size: int, images: Iterator[pa.Array] | None, schema: pa.Schema) -> Iterator[pa.Table]:
    """`table` in pieces of `size` rows; their image columns, if any, are the next of `images` (0, 1, 0, 1, ...)."""
    for start in range(0, table.num_rows, size):
        piece = table.slice(start, size)
        columns = {name: piece[name] for name in piece.column_names}
        if images is not None:
            jpgs = list(islice(images, 2 * len(piece)))
            columns |= {name: pa.chunked_array(jpgs[i::2]) for i, name in enumerate(IMAGES)}
        yield pa.table([columns[name] for name in schema.names], schema=schema)


def copy(
    shards: list[Shard], decision: Decision, pairs: pa.Table, names: list[str], folder: Path, config: Config
) -> dict[str, str]:
    """Writes this machine's part of the output files `names`, except those that an earlier run has finished.

    Returns the sha256 of each file written. Reading ahead, putting files together, and hashing and waiting for the disk
    go on at the same time, a thread each.
    """
    schema = pa.schema([f for f in shards[0].schema if not (config.metadata_only and f.name in IMAGES)])
    per_file = len(pairs) if config.metadata_only else config.rows_per_file
    todo = [k for k in part_of(config.shard, len(names)) if not (folder / names[k]).exists()]
    images = None
    if not config.metadata_only:
        rows, sides = decision.image_sources()
        due = np.flatnonzero(np.isin(np.arange(len(rows)) // (2 * per_file), todo))
        images = images_in_order(shards, rows[due], sides[due], folder, config)
    hashes: dict[str, Future[str]] = {}
    with ThreadPoolExecutor(1) as thread:
        for k in todo:
            tables = row_groups(
                pairs.slice(k * per_file, per_file), 10**6 if images is None else ROWS_PER_GROUP, images, schema
            )
            path = folder / names[k]
            temporary = write_file(path, schema, tables, images_repeat=4 * len(pairs) >= 3 * decision.images)
            for before in hashes.values():
                before.result()  # at most one file waits for the disk; a full one is noticed here
            hashes[names[k]] = thread.submit(finish, temporary, path)
    for _ in images or ():  # every image is written by now; this ends the progress bar
        pass
    return {name: future.result() for name, future in hashes.items()}


def write_report(
    shards: list[Shard], manifest: dict[str, Any], findings: filter_report.Findings, config: Config
) -> None:
    """report.html, with the images that it shows read from the input if removed, from the output if kept."""
    print("writing the report ...", flush=True)
    folder, removed, kept = Path(config.output_dir), None, None
    if not config.metadata_only:
        written = replace(config, dataset_name=str(folder))
        removed = images_of(shards, [pair.row for pair in findings.removed], config)
        kept = images_of(open_shards(written)[0], [pair.row for pair in findings.kept], written)
    write_text(folder / "report.html", filter_report.page(manifest, findings, removed, kept))


def images_of(shards: list[Shard], rows: list[int], config: Config) -> filter_report.Jpegs:
    """Both JPEGs of these rows, from the row groups that hold them; without those that cannot be read."""
    found: filter_report.Jpegs = {}
    for shard, number, keys, inside in by_row_group(shards, np.repeat(rows, 2).astype(np.int64)):
        with suppress(UserError):
            for part in read_images(shard, number, keys, inside, keys % 2, config):
                found |= {(rows[k // 2], k % 2): image[0].as_py() for k, image in part}
    return found


def request(shards: list[Shard], decision: Decision, commit: str | None, config: Config) -> dict[str, Any]:
    """What the output is a function of, and the counts: the manifest without the output's hashes."""
    options = {k: v for k, v in asdict(config).items() if k not in ("dataset_name", "output_dir", "revision", "shard")}
    used = [(shard, number) for shard, number, _, _ in by_row_group(shards, decision.image_sources()[0])]
    inputs = []
    for shard in shards:
        schema = hashlib.sha256(str(shard.schema).encode()).hexdigest()[:16]
        entry = {"file": shard.name, "size": shard.size, "rows": shard.metadata.num_rows, "schema": schema}
        if config.metadata_only:
            entry["row_groups_with_pairs"] = [number for s, number in used if s is shard]
        inputs.append(entry)
    made_up = int(decision.made_up.sum())
    return {
        "tool": "filter_pickapic",
        "version": ncp.__version__,
        "commit": commit,
        "options": options,
        "inputs": inputs,
        "rows": {
            "input": len(decision.why),
            "dropped": decision.dropped,
            "kept": len(decision.row) - made_up,
            "contradictory_best_image_uid": decision.contradicting,
        },
        "pairs": {
            "total": len(decision.row),
            "made_up": made_up,
            "unique_prompts": decision.prompts,
            "images": decision.images,
            "sha256": decision.digest,
        },
    }


def is_finished(folder: Path, dataset_name: str, wanted: dict[str, Any]) -> bool:
    """Whether `folder` holds the finished output of this very run; False if it is new or holds part of it.

    Raises UserError if it holds anything else.
    """
    if Path(dataset_name).is_dir() and folder.resolve().is_relative_to(Path(dataset_name).resolve()):
        raise UserError(f"output_dir: {folder} lies inside the dataset; choose a folder outside {dataset_name}")
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file")
    for name in ("manifest.json", UNFINISHED):
        if not (folder / name).exists():
            continue
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            differs = sorted(k for k in wanted if found.get(k) != wanted[k])
        except (ValueError, AttributeError, OSError):
            raise UserError(f"output_dir: {folder / name} is not this script's; choose another folder") from None
        if differs:
            raise UserError(
                f"output_dir: {folder} holds another run's output (other {', '.join(differs)}); choose another folder"
            )
        for output in found.get("outputs", []):
            file = folder / output["file"]
            if not file.is_file() or file.stat().st_size != output["size"]:
                raise UserError(f"output_dir: {file} has changed since it was written; delete {folder} and run again")
        return name == "manifest.json"
    if not is_empty(folder):
        raise UserError(f"output_dir: {folder} holds something else; choose a new or empty folder")
    return False


def summary(wanted: dict[str, Any]) -> str:
    rows, pairs = wanted["rows"], wanted["pairs"]
    lines = [("input rows", rows["input"])]
    lines += [("- " + reason.replace("_", " "), count) for reason, count in rows["dropped"].items() if count]
    lines += [("= rows kept", rows["kept"])] + [("+ made up", pairs["made_up"])] * bool(pairs["made_up"])
    lines += [("= pairs", pairs["total"]), ("prompts", pairs["unique_prompts"]), ("images", pairs["images"])]
    if wanted["options"]["best_image_uid"] == "ignore":
        lines.append(("! used despite best image uid", rows["contradictory_best_image_uid"]))
    return "\n".join(f"{name:34} {count:>11,}" for name, count in lines)


@contextmanager
def saying_what_cannot_be_written(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {folder} ({error.strerror or error})") from None


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(Config, argv, description=__doc__)
    shards, commit = open_shards(config)
    columns = [c for c in DECISION if c in shards[0].schema.names]
    columns += ["model_0", "model_1"] if config.models is not None else []
    table = read_columns(shards, columns, config, dictionaries=[c for c in columns if DECISION.get(c) == "text"])
    decision = decide(table, config)
    wanted = request(shards, decision, commit, config)
    if not len(decision.row):
        reasons = ", ".join(f"{count} {reason}" for reason, count in decision.dropped.items() if count)
        raise UserError(
            f"{config.dataset_name}: rule {config.rule} leaves no pair of {len(decision.why)} rows ({reasons})"
        )
    print(summary(wanted), flush=True)

    folder = Path(config.output_dir)
    if is_finished(folder, config.dataset_name, wanted):
        print(f"{folder} already holds these pairs; nothing to do")
        return
    findings = filter_report.gather(table, decision)
    del table  # 250 MB that the copy can use
    count = 1 if config.metadata_only else -(-len(decision.row) // config.rows_per_file)
    names = [f"data/{config.dataset_split}-{k:05d}-of-{count:05d}.parquet" for k in range(count)]
    with saying_what_cannot_be_written(folder), one_writer(folder, config.shard):
        if is_finished(folder, config.dataset_name, wanted):
            raise UserError(f"output_dir: another run has just finished {folder}")
        if not (folder / UNFINISHED).exists():
            write_text(folder / UNFINISHED, json.dumps(wanted))
        (folder / "data").mkdir(exist_ok=True)
        hashes = copy(shards, decision, metadata_of_pairs(shards, decision, config), names, folder, config)
        missing = [n for n in names if not (folder / n).exists()]
        if missing:
            print(f"wrote part {config.shard}; {len(missing)} of {count} files are still to come")
            print(f"with all of them in {folder}, run once without --shard to write manifest.json")
            return
        outputs = []
        for name in tqdm(names, desc="hash", unit="file", disable=len(hashes) == count):
            digest = hashes.get(name) or sha256(folder / name)  # of a file that an earlier run or another machine wrote
            outputs.append({"file": name, "size": (folder / name).stat().st_size, "sha256": digest})
        manifest = {"dataset_name": config.dataset_name, "revision": config.revision} | wanted | {"outputs": outputs}
        write_report(shards, manifest, findings, config)
        write_text(folder / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        (folder / UNFINISHED).unlink(missing_ok=True)
    print(f"wrote {len(decision.row):,} pairs to {folder}; what was kept and removed: {folder / 'report.html'}")


if __name__ == "__main__":
    run_program(main)
