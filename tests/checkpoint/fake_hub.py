"""A hub of our own on this machine: repositories in memory, behind the few addresses that the hub's library asks."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


class FakeHub:
    """`repositories`: id -> branch or tag -> file -> bytes. `asked` holds (verb, file, range) of every file asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.tokens: set[str | None] = set()
        self.asked: list[tuple[str, str, str | None]] = []
        self.ranges = True

    def add(self, repository: str, files: dict[str, bytes], revision: str = "main") -> None:
        self.repositories.setdefault(repository, {})[revision] = files

    def fetched(self) -> list[str]:
        """Files whose bytes were asked for, whole, in the order of their names."""
        return sorted({file for verb, file, part in self.asked if verb == "GET" and part is None})


def commit_of(repository: str, revision: str) -> str:
    return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()


@contextmanager
def serving(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it, the hub's library in this process asks `hub`, and keeps what it gets in `cache`."""
    from huggingface_hub import constants

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            parts = [unquote(part) for part in urlsplit(self.path).path.split("/")[1:]]
            hub.tokens.add(self.headers.get("authorization"))
            if parts[:2] == ["api", "models"]:
                repository = "/".join(parts[2:4])
                revision = parts[5] if len(parts) > 5 else "main"
            else:
                repository, revision = "/".join(parts[:2]), parts[3]
            if repository not in hub.repositories:
                return self.refuse(404, "RepoNotFound")
            if repository in hub.gated:
                return self.refuse(403, "GatedRepo")
            revisions = hub.repositories[repository]
            revision = next((known for known in revisions if revision in (known, commit_of(repository, known))), "")
            if not revision:
                return self.refuse(404, "RevisionNotFound")
            files, sha = revisions[revision], commit_of(repository, revision)
            if parts[0] == "api" and "tree" in parts[4:5]:
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for name, data in files.items()
                ]
                return self.send(json.dumps(tree).encode(), {"content-type": "application/json"})
            if parts[0] == "api":
                info = {"id": repository, "sha": sha, "siblings": [{"rfilename": name} for name in files]}
                return self.send(json.dumps(info).encode(), {"content-type": "application/json"})
            return self.file(files, "/".join(parts[4:]), sha)

        def file(self, files: dict[str, bytes], name: str, sha: str) -> None:
            part = self.headers.get("range")
            hub.asked.append((self.command, name, part))
            if name not in files:
                return self.refuse(404, "EntryNotFound")
            data = files[name]
            headers = {"etag": f'"{hashlib.sha1(data).hexdigest()}"', "x-repo-commit": sha}
            if part is None or not hub.ranges:
                return self.send(data, headers)
            first, last = part.removeprefix("bytes=").split("-")
            headers["content-range"] = f"bytes {first}-{min(int(last), len(data) - 1)}/{len(data)}"
            return self.send(data[int(first) : int(last) + 1], headers, 206)

        def send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
            self.send_response(status)
            for key, value in {**headers, "content-length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def refuse(self, status: int, code: str) -> None:
            self.send(b"{}", {"x-error-code": code, "x-error-message": code}, status)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", "hf_of_a_test")
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
