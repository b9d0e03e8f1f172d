"""The Hugging Face hub on this machine: what huggingface_hub's client asks for, answered from memory over HTTP.

    with FakeHub() as hub:
        hub.add("models", "me/sd", folder)              # revision main; more revisions by name
        hub.faults["me/sd", "unet/config.json"] = "missing"
        launch(..., env=hub.environment(home))

Behind HF_ENDPOINT, which must be set before huggingface_hub is imported, so the scripts run in processes of their own
(`run_scripts` runs several in one). Files are served with the headers and error codes of the hub; listings, uploads and
range requests as its API has them. Left out: LFS and Xet storage (every upload is a regular file), pages of listings,
private repositories other than gated ones.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from support import ROOT

from ncp.common.processes import tied

TOKEN = "hf_" + "t" * 34


class FakeHub:
    """Repositories by kind ("models", "datasets") and name: {revision: commit}, and files by commit.

    faults: what happens to a file of a repository (name, file), or to all of them (name, "*"):
    "gated" (401), "forbidden" (403), "missing" (404), "drop" (the connection ends without an answer),
    "cut" (it ends in the middle of the content), "cut once".
    requests: (method, path) of all that was asked; unanswered: what the API of a repository has, and this has not.
    """

    def __init__(self) -> None:
        self.revisions: dict[tuple[str, str], dict[str, str]] = {}
        self.contents: dict[str, dict[str, bytes]] = {}
        self.faults: dict[tuple[str, str], str] = {}
        self.requests: list[tuple[str, str]] = []
        self.unanswered: list[tuple[str, str]] = []

    def add(self, kind: str, name: str, files: Path | dict[str, bytes], revision: str = "main") -> str:
        """A commit of a folder's files, at the head of a branch. Returns its id."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        commit = hashlib.sha1(f"{kind} {name} {revision} {len(self.contents)}".encode()).hexdigest()
        self.revisions.setdefault((kind, name), {})[revision] = commit
        self.contents[commit] = dict(files)
        return commit

    def files(self, kind: str, name: str) -> dict[str, bytes]:
        """What is at the head of main."""
        return self.contents[self.revisions[kind, name]["main"]]

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Of a process that uses this hub, with a local cache of its own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k.lower() != "http_proxy"}
        own = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        return {**kept, **own, **({"HF_TOKEN": token} if token else {})}

    def __enter__(self) -> FakeHub:
        hub = self

        class Answer(_Answer):
            pass

        Answer.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Answer(BaseHTTPRequestHandler):
    """One request."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"
    timeout = 600

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.hub, unquote(urlparse(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, path))
        if path == "/api/repos/create":
            return self.create()
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, file = found.groups()
            return self.resolve("datasets" if kind else "models", name, revision, file)
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([\w-]+)(?:/([^/]+))?(?:/(.+))?)?", path):
            kind, name, what, revision, rest = found.groups()
            return self.api(kind, name, what, revision or "main", rest or "")
        return self.error(404, "")  # such as notes of the client's authors

    # ------------------------------------------------------------ answers

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, content: Any) -> None:
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def error(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": f"{code}: refused by the fake hub"})

    def drop(self) -> None:
        self.close_connection = True
        self.connection.close()

    def fault(self, name: str, file: str) -> str | None:
        return self.hub.faults.get((name, file)) or self.hub.faults.get((name, "*"))

    def commit(self, kind: str, name: str, revision: str) -> str | None:
        """The commit of a branch or of itself; None after an error was sent."""
        revisions = self.hub.revisions.get((kind, name))
        if revisions is None:
            self.error(404, "RepoNotFound")
            return None
        commit = revision if revision in revisions.values() else revisions.get(revision)
        if commit is None:
            self.error(404, "RevisionNotFound")
        return commit

    def refuse(self, name: str, file: str) -> bool:
        """Acts out a fault before the content, if there is one."""
        fault = self.fault(name, file)
        if fault == "drop":
            self.drop()
        elif fault == "gated":
            self.error(401, "GatedRepo")
        elif fault == "forbidden":
            self.error(403, "")
        elif fault == "missing":
            self.error(404, "EntryNotFound")
        return fault in ("drop", "gated", "forbidden", "missing")

    # ------------------------------------------------------------ files

    def resolve(self, kind: str, name: str, revision: str, file: str) -> None:
        if (name, file) not in self.hub.faults and (kind, name) not in self.hub.revisions:
            return self.error(404, "RepoNotFound")
        if self.refuse(name, file) or (commit := self.commit(kind, name, revision)) is None:
            return None
        if (content := self.hub.contents[commit].get(file)) is None:
            return self.error(404, "EntryNotFound")
        etag = '"' + hashlib.sha1(content).hexdigest() + '"'
        headers = {"X-Repo-Commit": commit, "ETag": etag, "Accept-Ranges": "bytes"}
        status, part = 200, content
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(span[1]), int(span[2] or len(content) - 1) + 1
            status, part = 206, content[start:stop]
            headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        if self.command == "GET" and (fault := self.fault(name, file)) in ("cut", "cut once"):
            if fault == "cut once":
                del self.hub.faults[name, file]
            self.send_response(status)
            for key, value in {"Content-Length": str(len(part)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            return self.drop()
        return self.send(status, part, headers)

    # ------------------------------------------------------------ the API

    def api(self, kind: str, name: str, what: str | None, revision: str, rest: str) -> None:
        hub = self.hub
        if (name, "*") in hub.faults and self.refuse(name, "*"):
            return None
        if (commit := self.commit(kind, name, revision)) is None:
            return None
        files = hub.contents[commit]
        if what in (None, "revision"):
            siblings = [{"rfilename": f, "size": len(c)} for f, c in sorted(files.items())]
            about = {"id": name, "sha": commit, "siblings": siblings, "private": False, "gated": False, "tags": []}
            return self.json({**about, "modelId": name, "disabled": False, "downloads": 0, "likes": 0, "_id": commit})
        if what == "tree":
            deep = parse_qs(urlparse(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            inside = [e for e in entries(files) if not rest or e["path"].startswith(f"{rest}/")]
            depth = rest.count("/") + 1 if rest else 0
            if rest and not inside:
                return self.error(404, "EntryNotFound")
            return self.json([e for e in inside if deep or e["path"].count("/") == depth])
        if what == "paths-info":
            wanted = parse_qs(self.body.decode()).get("paths", [])
            return self.json([e for e in entries(files) if e["path"] in wanted])
        if what == "preupload":
            asked = json.loads(self.body)["files"]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return self.json({"files": [{"path": f["path"], **mode} for f in asked]})
        if what == "commit":
            changed = dict(files)
            for line in filter(None, self.body.splitlines()):
                entry = json.loads(line)
                if entry["key"] == "file":
                    changed[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            made = hub.add(kind, name, changed, revision)
            url = f"{hub.address}/{name}/commit/{made}"
            return self.json({"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""})
        hub.unanswered.append((self.command, self.path))
        return self.error(404, "")

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or "somebody"
        name = f"{owner}/{asked['name']}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.error(401, "")
        if self.refuse(name, "*"):
            return None
        if ("models", name) not in self.hub.revisions:
            self.hub.add("models", name, {".gitattributes": b""})
            self.hub.created = asked
        return self.json({"url": f"{self.hub.address}/{name}", "name": name, "id": name})


def entries(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """Files and folders as the tree listing has them."""
    folders = {"/".join(f.split("/")[:n]) for f in files for n in range(1, f.count("/") + 1)}
    found = [{"type": "directory", "path": f, "size": 0, "oid": hashlib.sha1(f.encode()).hexdigest()} for f in folders]
    for file, content in files.items():
        found.append({"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()})
    return sorted(found, key=lambda e: e["path"])


# ---------------------------------------------------------------- scripts

DRIVER = """
import contextlib, io, json, runpy, sys, time, traceback
from accelerate.state import AcceleratorState, PartialState
wait = time.sleep
time.sleep = lambda seconds: wait(min(seconds, 0.01))  # the client waits longer and longer between its attempts
for line in sys.stdin:
    script, argv = json.loads(line)
    AcceleratorState._reset_state(), PartialState._reset_state()
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = [script, *argv]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""


def run_scripts(
    jobs: dict[str, tuple[str, list]], environment: dict[str, str], before: Callable[[str], None] = lambda name: None
) -> dict[str, tuple[int, str, str]]:
    """(status, standard output, standard error) of scripts by name, each as its own main program, in one process.

    Their imports, which take longer than they do, happen once. before(name) is called before a script starts.
    """
    results = {}
    paths = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    with (
        tempfile.TemporaryFile("w+") as noise,
        subprocess.Popen(
            tied([sys.executable, "-c", DRIVER]), cwd=ROOT, env={**environment, "PYTHONPATH": paths}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise,
        ) as driver,
    ):  # fmt: skip
        try:
            for name, (script, argv) in jobs.items():
                before(name)
                driver.stdin.write(json.dumps([str(ROOT / script), [str(a) for a in argv]]) + "\n")
                driver.stdin.flush()
                line = driver.stdout.readline()
                noise.seek(0)
                assert line, f"{name} ended the process: {noise.read()}"
                results[name] = tuple(json.loads(line))
        finally:
            driver.kill()
    return results
