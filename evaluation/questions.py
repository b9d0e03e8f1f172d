"""Judges behind an HTTP endpoint: the question about an image, how a score is read from the reply, and the endpoint.

| judge | question | score |
|---|---|---|
| vqascore | whether the image shows the prompt | probability of "Yes" as the first token, 0 to 1 |
| unifiedreward | alignment and quality, together | the number after "Final Score:", 1 to 5 |
| hpsv3 | nothing but the prompt | the reply, which is a number |
| vlm | the text in `vlm_question` | the number in the reply |

`vqascore` uses the question and the answer of VQAScore for models behind an API (`gpt4v_model.py` in
linzhiqiu/t2v_metrics). UnifiedReward does not require a fixed wording (README of CodeGoat24/UnifiedReward); the wording
is ours, with the criteria, the scale and the "Final Score:" of its pointwise questions. HPSv3 is not a chat model: its
score is the output of a head on Qwen2-VL's last layer, and its server must return that number as the reply.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ncp.common.config import one_item_each
from ncp.common.errors import UserError

TOP = 20  # most likely tokens requested: the most that vLLM returns by default
NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)"


@dataclass(frozen=True)
class Question:
    """text: the question, with `{prompt}` in place of the prompt. kind: how the reply is read, a key of READERS."""

    text: str
    kind: str
    max_tokens: int


VLM_QUESTION = (
    'Rate from 0 to 10 how well this image shows "{prompt}", and how good it looks. 0: not at all; 10: perfectly. '
    "Answer with a number only."
)
QUESTIONS = {
    "vqascore": Question('Does this figure show "{prompt}"? Please answer yes or no.', "yes", 1),
    "unifiedreward": Question(
        "You are given a text caption and an image that was generated from it. Judge two things. "
        "Alignment with the caption: are the objects, their attributes and their relations as the caption says? "
        "Overall image quality: is it clear, detailed, right in its colours and pleasing to look at? "
        "Give one score from 1 to 5 for both together, after 'Final Score:'.\nText Caption: [{prompt}]",
        "final score",
        1024,
    ),
    "hpsv3": Question("{prompt}", "bare number", 64),
    "vlm": Question(VLM_QUESTION, "number", 1024),
}


@dataclass(frozen=True)
class Endpoint:
    """The server of a judge: `url` up to but without "/chat/completions", and the model's name on it."""

    model: str
    url: str


def find_endpoints(entries: list[str]) -> dict[str, Endpoint]:
    """Judge to endpoint, from JUDGE=MODEL@URL entries. Raises UserError for another form, or a secret in an entry."""
    found: dict[str, Endpoint] = {}
    one_item_each("endpoints", [hidden(entry) for entry in entries])
    for entry in entries:
        match = re.fullmatch(r"(\w+)=(\S+?)@(https?://\S+)", entry)
        if not match:
            raise UserError(
                f"endpoints: '{hidden(entry)}'; expected JUDGE=MODEL@URL, such as "
                "vqascore=Qwen/Qwen2.5-VL-7B-Instruct@http://localhost:8000/v1"
            )
        judge, model, url = match.groups()
        if judge not in QUESTIONS:
            raise UserError(f"endpoints: '{judge}' is no judge behind an endpoint; these are: {', '.join(QUESTIONS)}")
        if judge in found:
            raise UserError(f"endpoints: '{judge}' is given twice")
        if re.search(r"[@?#]", url):  # a password or a key would end up in saved configs
            raise UserError(
                f"endpoints: the URL of '{judge}' holds one of @ ? #; expected scheme, host, port and path only; "
                "a key is read from the environment (ENDPOINT_API_KEY)"
            )
        try:
            host = urlsplit(url).port != 0 and urlsplit(url).hostname
        except ValueError:
            host = None
        if not host:
            raise UserError(f"endpoints: '{url}' is no URL: it lacks a host, or its port is no number up to 65535")
        found[judge] = Endpoint(model, url.rstrip("/").removesuffix("/chat/completions"))
    return found


def hidden(entry: str) -> str:
    """An entry that is safe to print: without the text between :// and @ in a URL."""
    return re.sub(r"://[^/\s,]*@", "://***@", entry)


def question_of(judge: str, vlm_question: str) -> Question:
    """The question to a judge. vlm_question: the text for the judge `vlm`."""
    question = QUESTIONS[judge]
    return Question(vlm_question, question.kind, question.max_tokens) if judge == "vlm" else question


def read_reply(question: Question, choice: dict[str, Any]) -> float:
    """The score in a reply, which is `choices[0]` of a chat completion; NaN if it contains none.

    Raises UserError (without the judge's name) if probabilities were requested and the server sent none.
    """
    if question.kind == "yes":
        return probability_of_yes(choice)
    text = (choice.get("message") or {}).get("content")
    return READERS[question.kind](re.sub(r"(?s)<think>.*?</think>", "", text)) if isinstance(text, str) else math.nan


def probability_of_yes(choice: dict[str, Any]) -> float:
    """The probability that the first token is "Yes" in any spelling; NaN if no likely token is yes or no.

    It is not normalised by the probability of "no". VQAScore does not do this either.
    """
    try:
        first = choice["logprobs"]["content"][0]
        likely = [(str(t["token"]), float(t["logprob"])) for t in first["top_logprobs"]]
    except (KeyError, IndexError, TypeError, ValueError):
        raise UserError(
            "the server sent no probabilities of tokens (logprobs); VQAScore is one, so choose a server that sends "
            "them, or the judge vlm, which reads a number"
        ) from None
    words = [(token.strip(" \n▁Ġ").lower(), math.exp(logprob)) for token, logprob in likely]
    if not any(word in ("yes", "no") for word, _ in words):
        return math.nan
    return sum(p for word, p in words if word == "yes")


def final_score(text: str) -> float:
    """The number after the last "Final Score:"; NaN if there is none from 1 to 5."""
    found = re.findall(rf"final\s+score\W*({NUMBER})", text, re.IGNORECASE)
    value = float(found[-1]) if found else math.nan
    return value if 1 <= value <= 5 else math.nan


def bare_number(text: str) -> float:
    """The whole reply as a number; NaN if it is not a number."""
    return float(text) if re.fullmatch(rf"\s*{NUMBER}(?:[eE][-+]?\d+)?\s*", text) else math.nan


def single_number(text: str) -> float:
    """The only number in the reply, or of several the one after "score" or "rating". NaN if that is not clear.

    A number after a slash or "out of" is the scale, and is ignored.
    """
    text = re.sub(rf"(?:/|\bout of\b)\s*{NUMBER}", "", text)
    found = re.findall(rf"(?<![\w.]){NUMBER}(?![\w])", text)
    if len(found) != 1:
        found = re.findall(rf"(?:score|rating)\W*(?:is\W*)?({NUMBER})", text, re.IGNORECASE)
    return float(found[0]) if len(found) == 1 else math.nan


READERS = {"final score": final_score, "bare number": bare_number, "number": single_number}
