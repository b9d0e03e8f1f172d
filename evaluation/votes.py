"""Counting what human judges answered on the blinded page."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.annotate import ANSWERS, QUESTIONS, read_key
from evaluation.compare import p_text, rate
from evaluation.protocol import Config
from evaluation.statistics import bootstrap_interval, fleiss_kappa, majority, sign_test
from ncp.common.errors import UserError


@dataclass
class Tally:
    """`model` against `reference` on one question: pairs decided by majority, and how far the judges agreed."""

    question: str
    reference: str
    model: str
    pairs: int
    wins: int
    ties: int
    losses: int
    win_rate: float
    low: float
    high: float
    p_value: float
    kappa: float
    votes: int
    abstentions: int
    missing: int


@dataclass
class Ballots:
    judges: list[str]
    tallies: list[Tally]

    HEAD = ("question", "comparison", "pairs", "wins / ties / losses", "win-rate [95% interval]", "sign test p",
            "Fleiss' kappa", "votes / cannot say / missing")  # fmt: skip

    def rows(self) -> list[list[str]]:
        """One per tally, under HEAD."""
        return [
            [
                t.question,
                f"{t.model} over {t.reference}",
                str(t.pairs),
                f"{t.wins} / {t.ties} / {t.losses}",
                rate(t),
                p_text(t.p_value),
                "undefined" if math.isnan(t.kappa) else f"{t.kappa:.3f}",
                f"{t.votes} / {t.abstentions} / {t.missing}",
            ]
            for t in self.tallies
        ]

    def note(self) -> str:
        return (
            f"Judges: {', '.join(self.judges)}. A pair is won if more than half of the votes cast say so, else it is a "
            'tie; "cannot say" and missing votes are not votes, and a pair without votes is left out. Win-rate: ties '
            "count half, interval by bootstrap over pairs. Kappa: agreement beyond chance on win, tie or loss, 0 none, "
            "1 perfect, over pairs with two votes or more."
        )


def label(tally: Tally) -> str:
    return f"{tally.question}: {tally.model} over {tally.reference}"


def count_votes(config: Config) -> Ballots:
    """Reads the vote files and unblinds them. Raises UserError for a file that is not of this page, or given twice."""
    key = read_key(Path(config.output_dir) / "annotation" / "key.json")
    ballots = {}
    for file in config.votes:
        judge, votes = read_votes(Path(file), key)
        if judge in ballots:
            raise UserError(f"{file}: votes of '{judge}' are given twice")
        ballots[judge] = votes
    return Ballots(list(ballots), tally_all(config, key, list(ballots.values())))


def read_votes(file: Path, key: dict[str, Any]) -> tuple[str, list[dict[str, str]]]:
    """(judge, {question: answer} for each pair) of one exported file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        page, judge, votes = content["page"], content["annotator"], content["votes"]
        answers = {(question, answer) for vote in votes for question, answer in vote.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a file of votes as the page exports it ({error})") from None
    if page != key["page"]:
        raise UserError(f"{file}: votes for page {page}; this output_dir's page is {key['page']}")
    if len(votes) != len(key["pairs"]):
        raise UserError(f"{file}: {len(votes)} pairs; the page has {len(key['pairs'])}")
    if strange := sorted(f"{q}: {a}" for q, a in answers if q not in QUESTIONS or a not in ANSWERS):
        raise UserError(f"{file}: '{strange[0]}' is no vote; expected {', '.join(ANSWERS)} on {', '.join(QUESTIONS)}")
    return str(judge), votes


def tally_all(config: Config, key: dict[str, Any], ballots: list[list[dict[str, str]]]) -> list[Tally]:
    """One tally per comparison and question, the reference being the model that the config names first."""
    pairs = key["pairs"]
    if strange := {pair[side] for pair in pairs for side in ("left", "right")} - set(config.model_names):
        raise UserError(f"models: the page compares {', '.join(sorted(strange))}, which the config does not name")
    tallies = []
    for models in itertools.combinations(config.model_names, 2):
        numbers = [n for n, pair in enumerate(pairs) if {pair["left"], pair["right"]} == set(models)]
        if numbers:
            own = [pairs[n] for n in numbers], [[ballot[n] for n in numbers] for ballot in ballots]
            tallies += [tally(question, *models, *own, config) for question in ("overall", "appeal", "alignment")]
    return tallies


def tally(
    question: str, reference: str, model: str, pairs: list[dict[str, str]], ballots: list[list[dict]], config: Config
) -> Tally:
    outcomes, counts, given = [], [], 0
    for number, pair in enumerate(pairs):
        said = [ballot[number][question] for ballot in ballots if question in ballot[number]]
        given += len(said)
        votes = ["tie" if v == "tie" else "win" if pair[v] == model else "loss" for v in said if v != "abstain"]
        counts.append([votes.count(outcome) for outcome in ("win", "tie", "loss")])
        if votes:
            outcomes.append(majority(votes))
    values = np.array([{"win": 1.0, "tie": 0.5, "loss": 0.0}[o] for o in outcomes])
    low, high = bootstrap_interval(values, config.bootstrap_samples)
    wins, losses, cast = outcomes.count("win"), outcomes.count("loss"), int(np.sum(counts))
    return Tally(
        question, reference, model,
        pairs=len(outcomes), wins=wins, ties=outcomes.count("tie"), losses=losses,
        win_rate=float(values.mean()) if len(values) else math.nan, low=low, high=high,
        p_value=sign_test(wins, losses), kappa=fleiss_kappa(np.array(counts)),
        votes=cast, abstentions=given - cast, missing=len(pairs) * len(ballots) - given,
    )  # fmt: skip
