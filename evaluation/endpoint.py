"""Scores by a vision-language model behind an OpenAI-compatible HTTP endpoint, for example of vLLM or sglang.

One request per image: POST URL/chat/completions with the image as a PNG and the judge's question, temperature 0. If the
server requires a key, it is read from the environment variable ENDPOINT_API_KEY only.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from typing import Any

from tqdm import tqdm

from evaluation.protocol import EvaluationConfig
from evaluation.questions import TOP, Endpoint, Question, find_endpoints, question_of, read_reply
from ncp.common.errors import UserError

KEY = "ENDPOINT_API_KEY"
BUSY = (408, 425, 429, 500, 502, 503, 504)  # temporary HTTP statuses: worth another attempt
BACK_OFF, LONGEST_WAIT = 1.0, 60.0  # seconds before the second attempt, then doubled; and the maximum
GIVE_UP_AFTER = 16  # replies without a score from the start: the model is no judge


class Unanswered(Exception):
    """An attempt failed for a reason that may be temporary. after: seconds to wait, if the server named a time."""

    def __init__(self, reason: str, after: float | None = None):
        super().__init__(reason)
        self.after = after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: they would send the key to another server, and turn the POST into a GET."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def check_endpoint(judge: str, config: EvaluationConfig) -> None:
    """Raises UserError if the judge's server does not answer, refuses the key, or does not list the model."""
    endpoint = find_endpoints(config.endpoints)[judge]
    try:
        content = _request(f"{endpoint.url}/models", None, config.endpoint_timeout)
    except Unanswered as failure:
        raise UserError(f"scorer '{judge}': {endpoint.url} does not answer: {failure}") from None
    except UserError as error:
        if str(error).startswith("HTTP status 404"):  # not every server lists its models
            return
        raise UserError(f"scorer '{judge}': {endpoint.url}: {error}") from None
    listed = content.get("data") if isinstance(content, dict) else None
    names = [str(m.get("id")) for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
    if names and endpoint.model not in names:
        raise UserError(
            f"scorer '{judge}': {endpoint.url} serves {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}; "
            f"the config asks for {endpoint.model}"
        )


def endpoint_scorer(judge: str, config: EvaluationConfig) -> Callable[[list[Any], list[str]], list[float]]:
    """The judge as a function of N PIL images and N prompts: N scores, NaN for a reply without a score.

    It sends all N requests at the same time. It raises UserError if the server refuses one, or does not answer within
    `endpoint_attempts`.
    """
    endpoint, question = find_endpoints(config.endpoints)[judge], question_of(judge, config.vlm_question)
    counts = {"read": 0, "unread": 0}

    def score(images: list[Any], prompts: list[str]) -> list[float]:
        pairs = zip(images, prompts, strict=True)
        replies = at_once([partial(ask, judge, endpoint, question, i, p, config) for i, p in pairs])
        for prompt, (value, said) in zip(prompts, replies, strict=True):
            counts["unread" if math.isnan(value) else "read"] += 1
            if math.isnan(value) and counts["unread"] == 1:
                tqdm.write(f"{judge}: no score in the reply {said!r} on '{prompt[:60]}'; such images are left out")
        if not counts["read"] and counts["unread"] >= GIVE_UP_AFTER:
            raise UserError(
                f"scorer '{judge}': none of the first {counts['unread']} replies of {endpoint.model} holds a score; "
                f"the last is {replies[-1][1]!r}"
            )
        return [value for value, _ in replies]

    return score


def at_once(calls: list[Callable[[threading.Event], Any]]) -> list[Any]:
    """The results of all calls, each run in its own thread. The first error sets the event of the others and is raised.

    The threads are daemons, so that an interrupted program does not wait for a server that does not answer.
    """
    stop = threading.Event()
    results: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

    def work(number: int) -> None:
        try:
            results.put((number, calls[number](stop), None))
        except BaseException as error:  # passed on to the waiting thread
            results.put((number, None, error))

    for number in range(len(calls)):
        threading.Thread(target=work, args=(number,), daemon=True).start()
    done: dict[int, Any] = {}
    try:
        while len(done) < len(calls):
            number, result, error = results.get()
            if error:
                raise error
            done[number] = result
    finally:
        stop.set()
    return [done[number] for number in range(len(calls))]


def ask(
    judge: str,
    endpoint: Endpoint,
    question: Question,
    image: Any,
    prompt: str,
    config: EvaluationConfig,
    stop: threading.Event,
) -> tuple[float, str]:
    """(score, beginning of the reply) for one image, with at most as many attempts as the config allows."""
    body = request_body(endpoint.model, question, image, prompt)
    for attempt in range(1, config.endpoint_attempts + 1):
        try:
            content = _request(f"{endpoint.url}/chat/completions", body, config.endpoint_timeout)
            try:
                choice = content["choices"][0]
                said = str((choice.get("message") or {}).get("content"))
            except (KeyError, IndexError, TypeError, AttributeError):
                raise UserError("the reply is no chat completion: " + _short(json.dumps(content))) from None
            return read_reply(question, choice), _short(said)
        except UserError as error:
            raise UserError(f"scorer '{judge}': {endpoint.url}: {error}") from None
        except Unanswered as failure:
            if attempt == config.endpoint_attempts or stop.is_set():
                raise UserError(
                    f"scorer '{judge}': {endpoint.url} did not answer in {attempt} attempts: {failure}; "
                    "run evaluate.py score again, which goes on from here"
                ) from None
            wait = failure.after if failure.after is not None else BACK_OFF * 2 ** (attempt - 1)
            stop.wait(min(wait, LONGEST_WAIT))  # not time.sleep: another image's failure ends the wait
    raise AssertionError("endpoint_attempts is at least 1")


def request_body(model: str, question: Question, image: Any, prompt: str) -> bytes:
    """The JSON of a chat completion about one image. Temperature 0: as deterministic as the server."""
    png = io.BytesIO()
    image.save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question.text.replace("{prompt}", prompt)},
    ]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": question.max_tokens,
        "temperature": 0,
    }
    return json.dumps(body | ({"logprobs": True, "top_logprobs": TOP} if question.kind == "yes" else {})).encode()


def _request(url: str, body: bytes | None, timeout: float) -> Any:
    """The JSON in the server's answer: to a POST of `body`, or to a GET without a body.

    Raises Unanswered for temporary failures, UserError for others.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    try:
        with _OPENER.open(urllib.request.Request(url, body, headers), timeout=timeout) as response:
            text = response.read()
    except urllib.error.HTTPError as error:
        reason = f"HTTP status {error.code} ({_without_key(_message(error))})"
        if error.code in BUSY:
            raise Unanswered(reason, _seconds(error.headers.get("Retry-After"))) from None
        hint = f"; set {KEY} in the environment" if error.code in (401, 403) else ""
        raise UserError(reason + hint) from None
    except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
        cause = getattr(error, "reason", error)
        words = f"no answer in {timeout:g} s" if isinstance(cause, TimeoutError) else str(cause) or type(cause).__name__
        raise Unanswered(_without_key(_short(words))) from None
    except ValueError:  # its message would contain the key
        raise UserError(f"{KEY} holds a character that no HTTP header can, such as the end of a line") from None
    try:
        return json.loads(text)
    except ValueError:
        shown = _short(text.decode(errors="replace"))
        raise UserError(f"the reply is no JSON but {_without_key(shown)!r}") from None


def _message(error: urllib.error.HTTPError) -> str:
    """The server's error message: the `message` of OpenAI's and vLLM's errors, else the beginning of the text."""
    try:
        text = error.read(10_000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        content = json.loads(text)
        inner = content.get("error", content)
        text = inner["message"] if isinstance(inner, dict) else str(inner)
    except (ValueError, KeyError, AttributeError):
        pass
    return _short(str(text)) or error.reason


def _seconds(header: str | None) -> float | None:
    try:
        return max(0.0, float(header)) if header else None
    except ValueError:  # Retry-After as a date
        return None


def _short(text: str) -> str:
    return " ".join(text.split())[:200]


def _without_key(text: str) -> str:
    """The text without the key: servers quote a key that they refuse."""
    key = os.environ.get(KEY)
    return text.replace(key, "***") if key else text
