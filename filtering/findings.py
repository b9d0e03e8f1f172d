"""What the report adds to the manifest: wins and losses per image, games per prompt, and sample pairs.

All of it is computed from the decision and the metadata, before any image is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from filtering.rules import Decision

SEED = 0x9E3779B97F4A7C15
REMOVED, KEPT = 12, 24  # pairs on the two contact sheets
CAP = 6  # higher counts of wins or losses are shown as CAP
BINS = (1, 2, 3, 5, 9, 17, 33, 65)  # games of a prompt: 1, 2, 3-4, 5-8, ..., 65 or more


@dataclass(frozen=True)
class Side:
    """One image of a pair in the report."""

    uid: str
    won: bool
    record: str


@dataclass(frozen=True)
class Shown:
    """A pair on a contact sheet: a row of the input if it was removed, of the output if it was kept."""

    row: int
    caption: str
    note: str
    sides: tuple[Side, Side]


@dataclass(frozen=True)
class Findings:
    """Counts and samples. games: (prompts, prompts with a kept pair) for each of BINS."""

    records: np.ndarray  # (CAP + 1, CAP + 1) images by wins, losses
    contradictory_images: int
    contradictory_games: tuple[int, int]  # removed, kept
    both_ways: int  # pairs of images that have each beaten the other
    games: list[tuple[int, int]]
    removed: list[Shown]
    kept: list[Shown]


def gather(table: pa.Table, decision: Decision) -> Findings:
    """Counts and samples. table: the metadata columns that `decide` saw."""
    games, count = decision.games, np.bincount
    played = np.zeros(games.images, bool)
    played[games.winner[games.valid]] = played[games.loser[games.valid]] = True
    cell = np.minimum(games.wins, CAP) * (CAP + 1) + np.minimum(games.losses, CAP)
    records = count(cell[played], minlength=(CAP + 1) ** 2).reshape(CAP + 1, CAP + 1)

    both = (games.wins > 0) & (games.losses > 0)
    decisive = games.valid & ~games.tie
    contradictory = decisive & (both[games.winner] | both[games.loser])
    kept = decision.why == 0
    mutual = np.flatnonzero(decisive & both[games.winner] & both[games.loser])  # few; some were won both ways
    forward = games.winner[mutual] * games.images + games.loser[mutual]
    backward = games.loser[mutual] * games.images + games.winner[mutual]
    both_ways = np.isin(forward, backward)
    per_prompt = count(games.prompt[games.valid], minlength=1 + games.prompt.max(initial=0))
    survives = np.zeros(len(per_prompt), bool)
    survives[games.prompt[decision.row]] = True
    bins = [np.searchsorted(BINS, n[n > 0], side="right") - 1 for n in (per_prompt, per_prompt * survives)]

    reasons = [reason.replace("_", " ") for reason in decision.dropped]
    removed = np.flatnonzero(contradictory & ~kept)
    removed = removed[sample(games.ranking[removed], REMOVED)].tolist()
    names = np.where(decision.made_up, ~games.ranking[decision.row], games.ranking[decision.row])
    shown = sample(names, KEPT).tolist()
    sources = np.stack(decision.image_sources(), axis=1).reshape(-1, 2, 2)[shown].tolist()
    used = {*removed, *(row for pair in sources for row, _ in pair)}
    texts = {row: table.slice(row, 1).to_pylist()[0] for row in used}
    other_way = set(mutual[both_ways].tolist())

    def show(at: int, name: int, images: list[tuple[int, int]], why: str) -> Shown:
        """images: (input row, side 0 or 1) of images 0 and 1."""
        sides = []
        for row, side in images:
            won = (side == 0) == bool(decision.first_wins[row])
            image = games.winner[row] if won else games.loser[row]
            record = f"{plural(games.wins[image], 'win')}, {plural(games.losses[image], 'loss', 'losses')}"
            record += f", {plural(games.ties[image], 'tie')}" if games.ties[image] else ""
            sides.append(Side(texts[row][f"image_{side}_uid"], won, record))
        first, second = images[0][0], images[1][0]
        also = "also judged the other way round" if first == second and first in other_way else ""
        notes = [f"ranking {name}", f"{texts[first]['created_at']:%Y-%m-%d %H:%M}", why, also]
        return Shown(at, texts[first]["caption"], " · ".join(filter(None, notes)), (sides[0], sides[1]))

    made_up = {True: "made up: nobody judged these two", False: ""}
    return Findings(
        records,
        int(both.sum()),
        (int((contradictory & ~kept).sum()), int((contradictory & kept).sum())),
        len(np.unique(forward[both_ways])) // 2,
        list(zip(*(count(b, minlength=len(BINS)).tolist() for b in bins), strict=True)),
        [show(r, games.ranking[r], [(r, 0), (r, 1)], reasons[decision.why[r] - 1]) for r in removed],
        [show(p, names[p], pair, made_up[decision.made_up[p]]) for p, pair in zip(shown, sources, strict=True)],
    )


def sample(ids: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` ids with the smallest hash; ids (n,) int64. The hash depends on SEED and the id only."""
    x = ids.astype(np.uint64) + np.uint64(SEED)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64 (Steele et al. 2014)
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")[:count]


def plural(count: int, one: str, more: str | None = None) -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"
