"""A small Hugging Face Hub on the loopback interface, in memory, which the real `huggingface_hub` client talks to.

It serves what a push and a pull of models and data sets need: repositories (public, private), branches, commits of
regular and LFS files, trees, range requests. It refuses what the Hub refuses, with the Hub's error codes, and it can
cut connections. Give clients `HubServer.environment(...)`; they have to be processes of their own, as `huggingface_hub`
reads its environment when it is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_dummy"
USER = "somebody"
LFS_SUFFIXES = (".safetensors", ".parquet")
CHUNK = 2**14


@dataclass
class Repository:
    """Every commit's files; a branch is the name of a commit."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], title: str, branch: str = "main") -> str:
        """Add a commit; its name, 40 hexadecimal digits."""
        listing = [str(len(self.commits)), *(f"{name} {etag(data)}" for name, data in sorted(files.items()))]
        name = hashlib.sha1("\n".join(listing).encode()).hexdigest()
        self.commits[name], self.titles[name], self.branches[branch] = files, title, name
        return name

    def find(self, revision: str) -> str | None:
        """The commit of a branch's or a commit's name."""
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content."""
        return self.commits[self.find(revision)]


class HubServer:
    """Start with `with HubServer() as hub:`.

    Attributes:
        repositories: (kind, id) -> repository; kind is "models" or "datasets".
        requests: (method, path, Range header or None) of every request, oldest first.
        cuts: "OWNER/NAME/FILE" -> bytes after which its next downloads are cut off, one entry a download.
        cut_commits: "OWNER/NAME" -> how many of the next commits are cut off before anything is done.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cuts: dict[str, list[int]] = {}
        self.cut_commits: dict[str, int] = {}
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def model(self, repo_id: str) -> Repository:
        """A model repository."""
        return self.repositories["models", repo_id]

    def dataset(self, repo_id: str) -> Repository:
        """A data set repository."""
        return self.repositories["datasets", repo_id]

    def downloads(self, repo_id: str, file: str) -> list[str | None]:
        """The Range headers (None: from the start) of all downloads of a file so far."""
        pattern = re.compile(rf"/(datasets/)?{repo_id}/resolve/[^/]+/{file}")
        return [span for method, path, span in self.requests if method == "GET" and pattern.fullmatch(path)]

    def environment(self, home: Path, token: str | None = TOKEN, offline: bool = False) -> dict[str, str]:
        """A process's environment: this Hub, and caches in `home`."""
        root = Path(__file__).resolve().parents[1]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
        return {
            **kept,
            "PYTHONPATH": f"{root / 'src'}:{root}",
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",  # hf_xet speaks a protocol of its own with servers of its own
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            **({} if token is None else {"HF_TOKEN": token}),
        }


def etag(data: bytes) -> str:
    """What names a blob."""
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Nothing: the tests read `HubServer.requests`."""

    # ------------------------------------------------------------------ answers

    def _send(self, status: int, content: Any = None, **headers: str) -> None:
        body = b"" if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str | None, message: str, **headers: str) -> None:
        named = {} if code is None else {"X_Error_Code": code}
        self._send(status, {"error": message}, X_Error_Message=message, **named, **headers)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # ------------------------------------------------------------------ requests

    def _handle(self) -> None:
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        body = self._body()
        self.authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        with self.hub.lock:
            self.hub.requests.append((self.command, path, self.headers.get("Range")))
        for method, pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                with self.hub.lock:
                    reply = answer(self, found.groupdict(), query, body)
                if reply is not None:  # outside the lock: a download may be slow
                    reply()
                return
        self._refuse(404, None, f"{self.command} {path} is not part of this small Hub")

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815 - http.server's names

    def _repository(self, place: dict[str, str], writes: bool = False) -> Repository | None:
        """The repository of a request, or None after a refusal."""
        kind = (place.get("kind") or "models").strip("/")
        repository = self.hub.repositories.get((kind, place["repo"]))
        if repository is None or (repository.private and not self.authorized):
            self._refuse(401, "RepoNotFound", "Repository not found")
        elif writes and not self.authorized:
            self._refuse(401, None, "Invalid username or password.")
        else:
            return repository
        return None

    def _commit_of(self, repository: Repository, revision: str) -> str | None:
        name = repository.find(revision)
        if name is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return name

    def _who(self, place: Any, query: Any, body: bytes) -> None:
        if self.authorized:
            return self._send(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {}}})
        return self._refuse(401, None, "Invalid username or password.")

    def _create(self, place: Any, query: Any, body: bytes) -> None:
        asked = json.loads(body)
        if not self.authorized:
            return self._refuse(401, None, "Invalid username or password.")
        owner = asked.get("organization") or USER
        if owner != USER:
            return self._refuse(
                403, None, f'You don\'t have the rights to create a model under the namespace "{owner}".'
            )
        kind, repo = f"{asked.get('type') or 'model'}s", f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{repo}"
        if (kind, repo) in self.hub.repositories:
            return self._send(409, {"error": "You already created this repo", "url": url})
        created = Repository(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        created.commit({}, "initial commit")
        self.hub.repositories[kind, repo] = created
        return self._send(200, {"url": url, "name": repo})

    def _validate_yaml(self, place: Any, query: Any, body: bytes) -> None:
        import yaml

        try:
            header = re.match(r"\s*---\n(.*?)\n---", json.loads(body)["content"], re.DOTALL)
            yaml.safe_load(header.group(1) if header else "")
        except yaml.YAMLError as error:
            return self._send(200, {"errors": [{"message": str(error)}], "warnings": []})
        return self._send(200, {"errors": [], "warnings": []})

    def _info(self, place: dict[str, str], query: Any, body: bytes) -> None:
        if (repository := self._repository(place)) is None:
            return
        if (commit := self._commit_of(repository, place.get("revision") or "main")) is None:
            return
        files = [{"rfilename": name} for name in sorted(repository.commits[commit])]
        about = {"id": place["repo"], "modelId": place["repo"], "sha": commit, "private": repository.private}
        self._send(200, {**about, "siblings": files, "tags": [], "downloads": 0, "disabled": False, "gated": False})

    def _refs(self, place: dict[str, str], query: Any, body: bytes) -> None:
        if (repository := self._repository(place)) is None:
            return
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in repository.branches.items()
        ]
        self._send(200, {"branches": branches, "converts": [], "tags": []})

    def _branch(self, place: dict[str, str], query: Any, body: bytes) -> None:
        if (repository := self._repository(place, writes=True)) is None:
            return
        if place["revision"] in repository.branches:
            return self._refuse(409, None, "Reference already exists")
        repository.branches[place["revision"]] = repository.branches["main"]
        self._send(200, {})

    def _entries(self, files: dict[str, bytes]) -> list[dict[str, Any]]:
        entries = []
        for name, data in sorted(files.items()):
            entry = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
            if name.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": etag(data), "size": len(data), "pointerSize": 127}
            entries.append(entry)
        return entries

    def _tree(self, place: dict[str, str], query: dict[str, list[str]], body: bytes) -> None:
        if (repository := self._repository(place)) is None:
            return
        if (commit := self._commit_of(repository, place["revision"])) is None:
            return
        prefix = f"{place['path']}/" if place.get("path") else ""
        inside = {name: data for name, data in repository.commits[commit].items() if name.startswith(prefix)}
        if prefix and not inside:
            return self._refuse(404, "EntryNotFound", f"{place['path']} does not exist on {place['revision']}")
        if query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            folders = sorted({name[len(prefix) :].split("/")[0] for name in inside if "/" in name[len(prefix) :]})
            inside = {name: data for name, data in inside.items() if "/" not in name[len(prefix) :]}
        else:
            folders = sorted({name.rpartition("/")[0][len(prefix) :] for name in inside} - {""})
        listed = [{"type": "directory", "path": prefix + name, "size": 0, "oid": "0" * 40} for name in folders]
        self._send(200, listed + self._entries(inside))

    def _paths_info(self, place: dict[str, str], query: Any, body: bytes) -> None:
        if (repository := self._repository(place)) is None:
            return
        if (commit := self._commit_of(repository, place["revision"])) is None:
            return
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(body)["paths"]
        else:
            paths = parse_qs(body.decode())["paths"]
        files = repository.commits[commit]
        self._send(200, self._entries({name: files[name] for name in paths if name in files}))

    def _preupload(self, place: dict[str, str], query: Any, body: bytes) -> None:
        if (repository := self._repository(place, writes=True)) is None:
            return
        if (commit := self._commit_of(repository, place["revision"])) is None:
            return
        present, answers = repository.commits[commit], []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in present:
                data = present[file["path"]]
                answer["oid"] = etag(data) if mode == "lfs" else git_oid(data)
            answers.append(answer)
        self._send(200, {"files": answers})

    def _lfs_batch(self, place: dict[str, str], query: Any, body: bytes) -> None:
        if self._repository(place, writes=True) is None:
            return
        objects = []
        for item in json.loads(body)["objects"]:
            if item["oid"] not in self.hub.blobs:
                address = f"{self.hub.url}/lfs/{item['oid']}"
                item["actions"] = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
            objects.append(item)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _lfs_put(self, place: dict[str, str], query: Any, body: bytes) -> None:
        if etag(body) != place["oid"]:
            return self._refuse(400, None, "content does not have this oid")
        self.hub.blobs[place["oid"]] = body
        self._send(200)

    def _lfs_verify(self, place: dict[str, str], query: Any, body: bytes) -> None:
        self._send(200 if place["oid"] in self.hub.blobs else 404, {})

    def _commit(self, place: dict[str, str], query: Any, body: bytes) -> None:
        if (repository := self._repository(place, writes=True)) is None:
            return
        if (parent := self._commit_of(repository, place["revision"])) is None:
            return
        if self.hub.cut_commits.get(place["repo"], 0):
            self.hub.cut_commits[place["repo"]] -= 1
            return self._cut()
        files, title = dict(repository.commits[parent]), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
            else:
                return self._refuse(400, None, f"unknown operation {line['key']}")
        name = repository.commit(files, title, place["revision"])
        url = f"{self.hub.url}/{'datasets/' if place['kind'] == 'datasets' else ''}{place['repo']}/commit/{name}"
        self._send(200, {"success": True, "commitOid": name, "commitUrl": url})

    def _resolve(self, place: dict[str, str], query: Any, body: bytes) -> Any:
        if (repository := self._repository(place)) is None:
            return None
        if (commit := self._commit_of(repository, place["revision"])) is None:
            return None
        data = repository.commits[commit].get(place["path"])
        if data is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        cuts = self.hub.cuts.get(f"{place['repo']}/{place['path']}")
        cut = cuts.pop(0) if cuts and self.command == "GET" else None
        return lambda: self._download(data, commit, cut)

    def _download(self, data: bytes, commit: str, cut: int | None) -> None:
        headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first, last = 0, len(data) - 1
        if span:
            first, last = int(span.group(1)), min(int(span.group(2) or last), last)
            if first > last:
                return self._send(416, None, Content_Range=f"bytes */{len(data)}")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        part = data[first : last + 1]
        self.send_response(206 if span else 200)
        for name, value in {"Content-Length": str(len(part)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        self.wfile.write(part if cut is None else part[:cut])
        return None if cut is None else self._cut()

    def _cut(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)


_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_API = rf"/api/(?P<kind>models|datasets)/{_REPO}"
_ROUTES = (
    ("GET", "/api/whoami-v2", _Handler._who),
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate_yaml),
    ("GET", rf"{_API}/refs", _Handler._refs),
    ("GET", rf"{_API}(/revision/(?P<revision>.+))?", _Handler._info),
    ("POST", rf"{_API}/branch/(?P<revision>.+)", _Handler._branch),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<path>.+?))?/?", _Handler._tree),
    ("POST", rf"{_API}/paths-info/(?P<revision>.+)", _Handler._paths_info),
    ("POST", rf"{_API}/preupload/(?P<revision>.+)", _Handler._preupload),
    ("POST", rf"{_API}/commit/(?P<revision>.+)", _Handler._commit),
    ("POST", rf"/(?P<kind>datasets/)?{_REPO}[.]git/info/lfs/objects/batch", _Handler._lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler._lfs_put),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", _Handler._lfs_verify),
    ("GET HEAD", rf"/(?P<kind>datasets/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler._resolve),
)
