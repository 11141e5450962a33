"""A small hub on loopback: repositories in memory, to which files are committed and from which they are downloaded."""

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
from urllib.parse import unquote, urlparse

TOKEN = "hf_fake"


@dataclass
class Repository:
    """Files by path, and whether only its owner sees it; a commit for each change."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: ["0" * 40])


@dataclass
class Hub:
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a process talks to this hub."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """Run a hub on loopback."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, value: Any = None, *, status: int = 200, body: bytes | None = None, **headers: str) -> None:
        data = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
            self.send_header(name, headers.pop(name, text))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        body, path = self.read(), unquote(urlparse(self.path).path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply({"error": "Invalid username or password."}, status=401)
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.repositories[name] = Repository(
                asked.get("visibility") == "private" or asked.get("private", False)
            )
            return self.reply({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}} for o in asked]
            return self.reply({"transfer": "basic", "objects": upload}, Content_Type="application/vnd.git-lfs+json")
        owner, name, what = path.removeprefix("/api/models/").split("/")[:3]
        repository = self.hub.repositories.get(f"{owner}/{name}")
        if repository is None:
            return self.reply({"error": "Repository not found"}, status=404, X_Error_Code="RepoNotFound")
        if what == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            found = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            return self.reply({"files": found})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commits.append(hashlib.sha1(body).hexdigest())
        commit = repository.commits[-1]
        return self.reply(
            {"commitUrl": f"{self.hub.url}/{owner}/{name}/commit/{commit}", "commitOid": commit, "success": True}
        )

    def do_PUT(self) -> None:
        data = self.read()
        self.hub.objects[hashlib.sha256(data).hexdigest()] = data
        self.reply({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlparse(self.path).path).strip("/").removeprefix("api/models/").split("/")
        repository = self.hub.repositories.get("/".join(parts[:2]))
        if repository is None or len(parts) < 2:
            return self.reply({"error": "Repository not found"}, status=404, X_Error_Code="RepoNotFound")
        name, commit = "/".join(parts[:2]), repository.commits[-1]
        if parts[2:3] == ["tree"]:
            return self.reply(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in repository.files.items()
                ]
            )
        if parts[2:3] != ["resolve"]:
            siblings = [{"rfilename": path} for path in repository.files]
            return self.reply(
                {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": [], "downloads": 0}
            )
        if parts[3] not in ("main", commit):
            return self.reply({"error": "Invalid rev id"}, status=404, X_Error_Code="RevisionNotFound")
        data = repository.files.get("/".join(parts[4:]))
        if data is None:
            return self.reply(
                {"error": "Entry not found"}, status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit
            )
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self.reply(body=data, ETag=etag, X_Repo_Commit=commit, Content_Type="application/octet-stream")
