"""A hub in this process: the few addresses that an upload needs, answered from memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"


@dataclass
class FakeHub:
    """`repositories`: org/name -> {"private", "branches": {branch: {path: bytes}}}; `log`: every request, in order."""

    url: str = ""
    repositories: dict[str, Any] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    refuse: dict[str, int] = field(default_factory=dict)
    """Part of an address -> the status that it is answered with."""

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        found: dict[str, bytes] = self.repositories[repository]["branches"][branch]
        return found


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, value: Any, status: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            data = b""
            while length := int(self.rfile.readline(), 16):
                data += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def handle_request(self) -> None:
            body = self.body()
            path = self.path.partition("?")[0]
            hub.log.append(f"{self.command} {path}")
            for part, status in hub.refuse.items():
                if part in path:
                    return self.answer({"error": f"refused with {status}"}, status)
            if path.startswith("/blobs/"):
                digest = path.removeprefix("/blobs/")
                assert hashlib.sha256(body).hexdigest() == digest
                hub.blobs[digest] = body
                return self.answer({})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer({"error": "Invalid username or password."}, 401)
            return self.api(path, body)

        do_GET = do_POST = do_PUT = handle_request  # noqa: N815 - what http.server calls them

        def api(self, path: str, body: bytes) -> None:
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                if name in hub.repositories:
                    return self.answer({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
                hub.repositories[name] = {
                    "private": asked.get("visibility") == "private" or bool(asked.get("private")),
                    "branches": {"main": {}},
                }
                return self.answer({"url": f"{hub.url}/{name}"})
            if path == "/api/validate-yaml":
                return self.answer({"warnings": [], "errors": []})
            if path.endswith("/info/lfs/objects/batch"):
                asked = json.loads(body)["objects"]
                actions = [
                    {**one, **({} if one["oid"] in hub.blobs else {"actions": {"upload": {"href": f"{hub.url}/blobs/{one['oid']}"}}})}
                    for one in asked
                ]
                return self.answer({"transfer": "basic", "objects": actions})
            _, _, _, owner, name, *rest = path.split("/")
            repository = hub.repositories.get(f"{owner}/{name}")
            if repository is None:
                return self.answer({"error": "Repository not found"}, 404)
            if not rest:
                info = {"id": f"{owner}/{name}", "private": repository["private"], "siblings": [], "tags": []}
                return self.answer(info)
            if rest[0] == "branch":
                repository["branches"].setdefault(rest[1], {})
                return self.answer({})
            branch = repository["branches"].get(rest[1])
            if branch is None:
                return self.answer({"error": "Revision not found"}, 404)
            if rest[0] == "preupload":
                files = [
                    {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular", "shouldIgnore": False}
                    for one in json.loads(body)["files"]
                ]
                return self.answer({"files": files})
            if rest[0] == "commit":
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "header":
                        hub.messages.append(value["summary"])
                    elif line["key"] == "file":
                        branch[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        branch[value["path"]] = hub.blobs[value["oid"]]
                return self.answer({"commitUrl": f"{hub.url}/{owner}/{name}/commit/c0ffee", "commitOid": "c0ffee", "hookOutput": ""})
            return self.answer({"error": f"unknown address {path}"}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
