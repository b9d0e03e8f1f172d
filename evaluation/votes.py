"""The questions to human judges on the blinded page, and the count of their answers. Writes no files."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.protocol import EvaluationConfig
from evaluation.statistics import fleiss_kappa, majority, sign_test, win_rate_interval
from ncp.common.errors import UserError

# The paper's Q2, Q1, Q3: appeal comes first, because afterwards the judge has seen the prompt.
QUESTIONS = {
    "appeal": "Which image is more visually appealing?",
    "overall": "Which image do you prefer, given the prompt?",
    "alignment": "Which image better fits the text of the prompt?",
}
ANSWERS = ("left", "right", "tie", "abstain")


@dataclass
class Tally:
    """`model` against `reference` on one question: pairs decided by majority, and the judges' agreement."""

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
class VoteCount:
    """judges: their names. tallies: one per comparison and question."""

    judges: list[str]
    tallies: list[Tally]


def read_key(path: Path) -> dict[str, Any]:
    """Page id, and each pair's prompt, left model and right model. Raises UserError if it is missing or damaged."""
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        if all({"prompt", "left", "right"} <= pair.keys() for pair in key["pairs"]) and key["page"]:
            return key
        reason = "a key is missing"
    except FileNotFoundError:
        raise UserError(f"{path} is missing; evaluate.py annotate writes it beside the page") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error)
    raise UserError(f"{path}: not the key of a page ({reason})")


def count_votes(config: EvaluationConfig) -> VoteCount:
    """Reads the vote files and unblinds them.

    Raises UserError if there are none, and for a file that belongs to another page or is given twice.
    """
    if not config.votes:
        raise UserError("count: no votes; expected --votes A.json B.json, the files that the page exports")
    key = read_key(Path(config.output_dir) / "annotation" / "key.json")
    ballots: dict[str, list[dict[str, str]]] = {}
    for file in config.votes:
        judge, votes = read_votes(Path(file), key)
        if judge in ballots:
            raise UserError(f"{file}: votes of '{judge}' are given twice")
        ballots[judge] = votes
    return VoteCount(list(ballots), tally_all(config, key, list(ballots.values())))


def read_votes(file: Path, key: dict[str, Any]) -> tuple[str, list[dict[str, str]]]:
    """(judge, [{question: answer} per pair]) from one exported file."""
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


def tally_all(config: EvaluationConfig, key: dict[str, Any], ballots: list[list[dict[str, str]]]) -> list[Tally]:
    """One tally per comparison and question. The reference is the model that comes first in the config."""
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
    question: str,
    reference: str,
    model: str,
    pairs: list[dict[str, str]],
    ballots: list[list[dict]],
    config: EvaluationConfig,
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
    low, high = win_rate_interval(values, config.bootstrap_samples)
    wins, losses, cast = outcomes.count("win"), outcomes.count("loss"), int(np.sum(counts))
    return Tally(
        question, reference, model,
        pairs=len(outcomes), wins=wins, ties=outcomes.count("tie"), losses=losses,
        win_rate=float(values.mean()) if len(values) else math.nan, low=low, high=high,
        p_value=sign_test(wins, losses), kappa=fleiss_kappa(np.array(counts)),
        votes=cast, abstentions=given - cast, missing=len(pairs) * len(ballots) - given,
    )  # fmt: skip
