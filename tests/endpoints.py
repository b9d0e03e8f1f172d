"""A vision-language model's server on this machine, over HTTP, with the answers of vLLM's OpenAI-compatible one.

with FakeEndpoint("a-model") as server:
    server.reply = lambda question, image: "Final Score: 3"       # or probabilities of the first token
    ...  # server.url, server.requests
"""

from __future__ import annotations

import base64
import io
import json
import math
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


class FakeEndpoint:
    """reply(question, image): the reply's text, or {token: probability} of its first token.

    faults: what happens to the next chat completions, one each: a status, (status, headers, body), "drop" (the
    connection ends without an answer), "cut" (in the middle of it), "hang" (no answer for `hang` seconds) or the body
    of an answer with status 200. always: what happens to all of them.
    requests: the bodies of all chat completions that were asked for; keys: the Authorization header of each request.
    """

    def __init__(self, *models: str) -> None:
        self.models = models
        self.reply: Callable[[str, Image.Image], Any] = lambda question, image: "1"
        self.faults: list[Any] = []
        self.always: Any = None
        self.hang = 5.0
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lists_models = True
        self.logprobs = True

    def __enter__(self) -> FakeEndpoint:
        endpoint, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def send(self, status: int, content: Any, headers: dict[str, str] | None = None, cut: bool = False) -> None:
                body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if cut else body)
                self.close_connection = self.close_connection or cut

            def do_GET(self) -> None:
                with lock:
                    endpoint.keys.append(self.headers.get("Authorization"))
                if self.path != "/v1/models" or not endpoint.lists_models:
                    return self.send(404, {"detail": "Not Found"})
                self.send(200, {"object": "list", "data": [{"id": m, "object": "model"} for m in endpoint.models]})

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/chat/completions":
                    return self.send(404, {"detail": "Not Found"})
                with lock:
                    endpoint.requests.append(asked)
                    endpoint.keys.append(self.headers.get("Authorization"))
                    fault = endpoint.always if not endpoint.faults else endpoint.faults.pop(0)
                if fault == "drop":
                    self.close_connection = True
                elif fault == "hang":
                    time.sleep(endpoint.hang)
                    self.close_connection = True
                elif isinstance(fault, int):
                    self.send(fault, {"error": {"message": f"the server says {fault}", "code": fault}})
                elif isinstance(fault, tuple):
                    self.send(fault[0], fault[2], fault[1])
                elif fault is None or fault == "cut":
                    self.send(200, endpoint.completion(asked), cut=fault == "cut")
                else:
                    self.send(200, fault)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:  # a client that went away
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def completion(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What vLLM answers, its fields of no interest here left out."""
        picture, text = asked["messages"][0]["content"]
        assert [picture["type"], text["type"]] == ["image_url", "text"]
        head, _, data = picture["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        said = self.reply(text["text"], Image.open(io.BytesIO(base64.b64decode(data))))
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
        if isinstance(said, dict):
            likely = sorted(said.items(), key=lambda item: -item[1])
            tokens = [{"token": t, "logprob": math.log(p), "bytes": list(t.encode())} for t, p in likely]
            if self.logprobs and asked.get("logprobs"):
                choice["logprobs"] = {"content": [{**tokens[0], "top_logprobs": tokens[: asked["top_logprobs"]]}]}
            said = likely[0][0]
        choice["message"] = {"role": "assistant", "content": said}
        return {"id": "chatcmpl-1", "object": "chat.completion", "model": asked["model"], "choices": [choice]}
