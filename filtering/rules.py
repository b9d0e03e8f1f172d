"""The rules: which pairs to keep, given the metadata of every row. Pure functions; no file is read or written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filtering.settings import MODELS, FilterConfig, time_ns
from ncp.common.errors import UserError
from ncp.common.judgements import Judgements, read_judgements


@dataclass
class Decision:
    """The pairs in output order: pair p is the winner of input row `row[p]` and the loser of input row `loser_row[p]`.

    The two rows are the same unless the pair was never judged. row, loser_row (P,) int64; first_wins (rows,) bool;
    why (rows,) int8: 0 for a kept row, else 1 + the position of its reason in `dropped`, which counts rows by reason.
    contradicting: number of valid games whose best_image_uid is not the winner's, dropped or used. prompts, images:
    number of distinct ones in the pairs. digest: sha256 of the pairs' ranking ids, winners and times, in hexadecimal.
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
        """The pairs that are not a row of the input, (P,) bool."""
        return self.row != self.loser_row

    def image_sources(self) -> tuple[np.ndarray, np.ndarray]:
        """(input row, side 0 or 1), both (2P,): the source of image 0, then image 1, of each pair."""
        row = np.stack([self.row, self.loser_row], axis=1)
        of_rows = np.tile([0, 1], (len(row), 1))
        winner_first = np.stack([~self.first_wins[self.row], self.first_wins[self.loser_row]], axis=1)
        return row.ravel(), np.where(self.made_up[:, None], winner_first, of_rows).ravel()


@dataclass
class Games:
    """Which image beat which and when: one entry per input row. Only `valid` rows count.

    prompt, winner, loser (rows,): numbers of caption and images (below `images`); in a tie winner and loser are simply
    the two images. valid, tie (rows,) bool; created, ranking (rows,) int64. wins, losses, ties: (images,) int64,
    counted from the valid rows.
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


@dataclass
class Funnel:
    """Which rows are still kept, and for each other row the first reason: `Decision`'s `why` and `dropped`."""

    why: np.ndarray
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, mask: np.ndarray, reason: str) -> None:
        """Drops the rows of `mask` (rows,) bool that are still kept, and counts them under `reason`."""
        hit = mask & (self.why == 0)
        self.dropped[reason] = int(hit.sum())
        self.why[hit] = len(self.dropped)

    def kept(self) -> np.ndarray:
        return self.why == 0


def decide(table: pa.Table, config: FilterConfig) -> Decision:
    """Which pairs to write, from the metadata columns of every row (`DECISION`; `MODELS` if the config names models).

    Every dropped row has one reason, the first that applies of: duplicate_ranking_id (rows with one id but different
    content: none is used), duplicate_row, missing_caption, missing_uid, missing_ranking_id, missing_created_at,
    outside_created_at, other_model, unlabeled (has_label is not true), malformed_labels (not 1/0, 0/1 or 0.5/0.5),
    same_image, contradictory_best_image_uid (decisive rows only; an empty one or 'none' is accepted; not used if the
    config says ignore), too_few_games_for_prompt, tie, and the rule's own. Raises UserError for text that is not UTF-8.
    """
    try:
        said = read_judgements(table)
    except pa.ArrowInvalid:
        raise UserError(f"{config.dataset_name}: a caption or uid is not valid UTF-8") from None
    created, no_time = integers(table["created_at"].cast(pa.timestamp("ns")))
    ranking, no_ranking = integers(table["ranking_id"])

    funnel = Funnel(np.zeros(table.num_rows, np.int8))
    labels = [np.nan_to_num(label, nan=-1) for label in (said.label_0, said.label_1)]
    best = [said.best] if config.best_image_uid == "check" else []
    content = [ranking, said.caption, created, no_time, said.labeled, said.uid_0, said.uid_1, *best, *labels]
    conflict, again = duplicates(content, ~no_ranking)
    funnel.drop(conflict, "duplicate_ranking_id")
    funnel.drop(again, "duplicate_row")
    funnel.drop(said.faults["missing_caption"], "missing_caption")
    funnel.drop(said.faults["missing_uid"], "missing_uid")
    funnel.drop(no_ranking, "missing_ranking_id")
    funnel.drop(no_time, "missing_created_at")
    funnel.drop(outside(created, config), "outside_created_at")
    if config.models is not None:
        funnel.drop(of_other_models(table, config.models), "other_model")
    for reason in ("unlabeled", "malformed_labels", "same_image"):
        funnel.drop(said.faults[reason], reason)
    contradicts = said.faults["contradictory_best_image_uid"] & funnel.kept()
    if config.best_image_uid == "check":
        funnel.drop(contradicts, "contradictory_best_image_uid")
    per_prompt = np.bincount(said.caption[funnel.kept()], minlength=len(said.captions))
    funnel.drop(per_prompt[said.caption] < config.min_games_per_prompt, "too_few_games_for_prompt")

    first_wins = said.first_wins
    image_0, image_1, images = number_images(said)
    winner, loser = np.where(first_wins, image_0, image_1), np.where(first_wins, image_1, image_0)
    games = Games(said.caption, winner, loser, funnel.kept(), said.tie, created, ranking, images)
    row, loser_row = select(games, funnel, config)

    order = np.lexsort((row != loser_row, ranking[row], created[row]))
    row, loser_row = row[order], loser_row[order]
    digest = hashlib.sha256(np.stack([ranking[row], ranking[loser_row], first_wins[row], created[row]]).tobytes())
    return Decision(
        games=games,
        row=row,
        loser_row=loser_row,
        first_wins=first_wins,
        why=funnel.why,
        dropped=funnel.dropped,
        contradicting=int(contradicts.sum()),
        prompts=distinct(said.caption[row]),
        images=distinct(
            np.where(first_wins, said.uid_0, said.uid_1)[row], np.where(first_wins, said.uid_1, said.uid_0)[loser_row]
        ),
        digest=digest.hexdigest(),
    )


def outside(created: np.ndarray, config: FilterConfig) -> np.ndarray:
    """Which judgements are before created_from, or at or after created_before; created (rows,) int64 ns since 1970."""
    lowest, highest = time_ns(config.created_from, "created_from"), time_ns(config.created_before, "created_before")
    hit = np.zeros(len(created), bool)
    if lowest is not None:
        hit |= created < lowest
    if highest is not None:
        hit |= created >= highest
    return hit


def of_other_models(table: pa.Table, models: list[str]) -> np.ndarray:
    """Rows with an image that comes from none of the models, (rows,) bool."""
    known = pa.array(models, pa.string())
    both = [pc.is_in(table[column].cast(pa.string()), value_set=known).to_numpy() for column in MODELS]
    return ~(both[0] & both[1])


def number_images(said: Judgements) -> tuple[np.ndarray, np.ndarray, int]:
    """(image 0, image 1, number of images), (rows,) int64: a number for each distinct pair (caption, uid)."""
    caption, uid = np.concatenate([said.caption, said.caption]), np.concatenate([said.uid_0, said.uid_1])
    encoded = pc.dictionary_encode(pa.array(caption.astype(np.int64) * len(said.uids) + uid))
    image_0, image_1 = encoded.indices.to_numpy().astype(np.int64).reshape(2, -1)
    return image_0, image_1, len(encoded.dictionary)


def distinct(*codes: np.ndarray) -> int:
    """The number of distinct values among codes, which are small non-negative integers."""
    return int((np.bincount(np.concatenate(codes)) > 0).sum())


def select(games: Games, funnel: Funnel, config: FilterConfig) -> tuple[np.ndarray, np.ndarray]:
    """(row, loser_row), (P,) int64 each, of the pairs that the rule keeps; drops the other rows from `funnel`."""
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
    latest_win[winner[by_time]] = by_time  # for several rows of one winner the last assignment stays
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
    """(conflict, again), both (rows,) bool, for rows whose key content[0] occurs more than once.

    conflict: rows whose key has rows that do not all agree. again: rows that are not the first of their key.
    """
    conflict, again = np.zeros(len(comparable), bool), np.zeros(len(comparable), bool)
    rows = np.flatnonzero(comparable)
    rows = rows[np.argsort(content[0][rows], kind="stable")]
    repeats = content[0][rows[1:]] == content[0][rows[:-1]]  # as in the previous row
    rows = rows[np.concatenate([repeats, [False]]) | np.concatenate([[False], repeats])] if len(rows) else rows
    first = np.ones(len(rows), bool)  # whether it is the first row of its key
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
