"""A small Hub on the loopback interface that real clients of huggingface_hub talk to, with faults on demand.

It keeps what it is sent, checks every object's size and sha256, and speaks HTTP with LFS, not Xet: clients need
HF_HUB_DISABLE_XET=1. In another process, `environment()` has all that a client needs. To run it by hand:

    python -m tests.loopback_hub --port 8123
"""

import argparse
import base64
import hashlib
import json
import os
import re
import secrets
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

# What the Hub's own .gitattributes sends to LFS, besides whatever is large or not text.
_LARGE = {".safetensors", ".bin", ".pt", ".pth", ".gz", ".zip", ".npz", ".parquet", ".onnx", ".png", ".jpg"}
_NAME = re.compile(r"^(?!.*(--|\.\.))[A-Za-z0-9_.-]{1,96}$")
_TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass(frozen=True)
class Blob:
    """One file of a commit: the sha256 of its content, its size, its git number, and whether LFS keeps it."""

    sha256: str
    size: int
    git: str
    lfs: bool


@dataclass
class Repo:
    """A repository: its files by revision, and its commits.

    Attributes:
        branches: revision to the number of its newest commit.
        commits: number of a commit to its title and its files.
    """

    name: str
    kind: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, tuple[str, dict[str, Blob]]] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, Blob]) -> str:
        """Put `files` on a branch; returns the commit's number."""
        number = hashlib.sha1(f"{self.name} {branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[number] = (title, files)
        self.branches[branch] = number
        return number

    def at(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        """The number and the files of a branch or commit."""
        number = self.branches.get(revision, revision)
        return (number, self.commits[number][1]) if number in self.commits else None


@dataclass
class Fault:
    """What goes wrong with the next requests whose "METHOD /path" the pattern finds."""

    match: re.Pattern[str]
    times: int
    status: int | None
    headers: Mapping[str, str]
    message: str
    cut_after: int | None
    stall_after: int | None


class LoopbackHub:
    """The server, as a context manager.

    Args:
        users: token to the name of its owner; one whose name ends in ":read" may not write.
        multipart_from: objects of at least so many bytes are taken in parts of that size.
        port: 0 takes a free one.

    Attributes:
        private_by_default: what becomes of a new repository of which nothing is said.
        repos: by "owner/name" (datasets: "datasets/owner/name").
        requests: "METHOD /path" of every request, in order.
        uploads: sha256 to the number of times that the object's bytes arrived whole.
        uploaded_bytes: of all objects that arrived whole.
        stalled: set while a request is being stalled.

    Example:
        with LoopbackHub() as hub:
            HfApi(endpoint=hub.url, token=hub.token).create_repo("me/model")
    """

    token = "hf_loopback_token_of_me"

    def __init__(
        self, users: Mapping[str, str] | None = None, multipart_from: int | None = None, port: int = 0
    ) -> None:
        self.users = dict(users or {self.token: "me"})
        self.multipart_from = multipart_from
        self.private_by_default = False
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.uploads: Counter[str] = Counter()
        self.uploaded_bytes = 0
        self.stalled = threading.Event()
        self._release = threading.Event()
        self._faults: list[Fault] = []
        self._secret = secrets.token_hex(8)  # what a storage address carries in place of a token
        self._lock = threading.RLock()
        self._folder = tempfile.TemporaryDirectory(prefix="loopback-hub-")
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._release.set()
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()

    def environment(self, cache: str | Path, token: str | None = None) -> dict[str, str]:
        """Variables for a client in another process; `token` is the first user's unless given, "" for none."""
        given = next(iter(self.users)) if token is None else token
        kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        kept |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return kept | ({"HF_TOKEN": given} if given else {})

    def add_repo(self, name: str, private: bool = False, kind: str = "model") -> Repo:
        """Make a repository as somebody made it before."""
        repo = Repo(name, kind, private)
        repo.commit("main", "initial commit", {".gitattributes": self._keep(b"*.safetensors filter=lfs\n", False)})
        self.repos[name if kind == "model" else f"{kind}s/{name}"] = repo
        return repo

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Content by path, without .gitattributes."""
        found = self.repos[repo].at(revision)
        assert found is not None, f"{repo} has no {revision}"
        return {path: self.content(blob) for path, blob in found[1].items() if path != ".gitattributes"}

    def content(self, blob: Blob) -> bytes:
        """The bytes of a file."""
        return (Path(self._folder.name) / blob.sha256).read_bytes()

    def fail_next(
        self,
        match: str = "",
        times: int = 1,
        status: int | None = 500,
        headers: Mapping[str, str] | None = None,
        message: str = "told to fail",
        cut_after: int | None = None,
        stall_after: int | None = None,
    ) -> None:
        """Let the next requests go wrong.

        Args:
            match: pattern that "METHOD /path" must contain.
            times: how many requests.
            status: what is answered.
            headers: of the answer, such as {"Retry-After": "0"}.
            message: of the answer.
            cut_after: close the connection after so many bytes of the body, without an answer.
            stall_after: stop reading after so many bytes, until the server ends or `release` is called.
        """
        with self._lock:
            self._faults.append(Fault(re.compile(match), times, status, headers or {}, message, cut_after, stall_after))

    def heal(self) -> None:
        """Forget all faults that have not happened yet."""
        with self._lock:
            self._faults.clear()

    def release(self) -> None:
        """Let stalled requests go on."""
        self._release.set()

    def _fault_for(self, request: str) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.times and fault.match.search(request):
                    fault.times -= 1
                    return fault
        return None

    def _keep(self, content: bytes, lfs: bool) -> Blob:
        sha256 = hashlib.sha256(content).hexdigest()
        (Path(self._folder.name) / sha256).write_bytes(content)
        return Blob(sha256, len(content), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), lfs)

    def _held(self, sha256: str) -> Path | None:
        path = Path(self._folder.name) / sha256
        return path if path.is_file() else None


class _Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class _Cut(Exception):
    """The connection is to be closed without an answer."""


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        server_hub = hub

    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.place, self.query = split.path, parse_qs(split.query)
        self.fault = self.server_hub._fault_for(f"{self.command} {self.path}")
        try:
            body = self._body()
            if self.fault is not None and self.fault.status is not None:
                raise _Refused(self.fault.status, self.fault.message, headers=self.fault.headers)
            self._route(body)
        except _Refused as refused:
            self._send(refused.status, {"error": refused.message}, refused.headers)
        except _Cut:
            self.close_connection = True
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _body(self) -> bytes:
        """The request's body; a fault may cut it off or hold it up."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        if self.fault is not None and self.fault.cut_after is not None:
            self.rfile.read(min(length, self.fault.cut_after))
            raise _Cut
        if self.fault is not None and self.fault.stall_after is not None:
            first = self.rfile.read(min(length, self.fault.stall_after))
            self.server_hub.stalled.set()
            self.server_hub._release.wait()
            self.fault = None
            return self._whole(first + self.rfile.read(length - len(first)), length)
        return self._whole(self.rfile.read(length), length)

    def _whole(self, body: bytes, length: int) -> bytes:
        if len(body) < length:
            raise _Cut  # the client died
        return body

    def _send(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        merged = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        for name, value in merged.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, body: bytes) -> None:
        for method, pattern, serve in _ROUTES:
            found = re.fullmatch(pattern, self.place)
            if found and self.command in method.split("|"):
                return serve(self, body, **{key: unquote(value or "") for key, value in found.groupdict().items()})
        raise _Refused(404, f"this Hub knows no {self.command} {self.place}")

    # Who asks

    def _user(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        user = self.server_hub.users.get(given.removeprefix("Bearer "))
        if user is None:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return user

    def _repo(self, kind: str, repo: str, write: bool = False) -> Repo:
        user = self._user()
        found = self.server_hub.repos.get(repo if kind == "model" else f"{kind}s/{repo}")
        if found is None or (found.private and (user is None or user.removesuffix(":read") != repo.split("/")[0])):
            if user is None:
                raise _Refused(401, "Invalid username or password.", "RepoNotFound")
            raise _Refused(404, "Repository not found", "RepoNotFound")
        if write and user != repo.split("/")[0]:
            raise _Refused(403, f"you do not have the rights to write to {repo}")
        return found

    def _at(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]]:
        found = repo.at(revision or "main")
        if found is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    # What the Hub is asked

    def who(self, _: bytes) -> None:
        user = self._user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        self._send(200, {"type": "user", "name": user.removesuffix(":read"), "orgs": [], "auth": {"type": "token"}})

    def create(self, body: bytes) -> None:
        asked, user = json.loads(body), self._user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        owner, kind = asked.get("organization") or user.removesuffix(":read"), asked.get("type") or "model"
        if not _NAME.match(asked["name"]):
            raise _Refused(400, f"Invalid repo name: {asked['name']}")
        if owner != user:
            raise _Refused(403, f"You don't have the rights to create a {kind} under the namespace {owner!r}")
        name = f"{owner}/{asked['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        url = f"{self.server_hub.url}/{prefix}{name}"
        with self.server_hub._lock:
            if f"{prefix}{name}" in self.server_hub.repos:
                return self._send(409, {"error": "You already created this repo", "url": url})
            wish = asked.get("visibility") or ("private" if asked.get("private") else None)
            private = self.server_hub.private_by_default if wish is None else wish == "private"
            self.server_hub.add_repo(name, private, kind)
        return self._send(200, {"url": url, "name": name})

    def info(self, _: bytes, kind: str, repo: str, revision: str = "") -> None:
        found = self._repo(_TYPES[kind], repo)
        number, files = self._at(found, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        content = {"_id": number[:24], "id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": number}
        self._send(200, content | {"private": found.private, "siblings": siblings, "tags": [], "downloads": 0})

    def may_write(self, _: bytes, kind: str, repo: str) -> None:
        self._repo(_TYPES[kind], repo, write=True)
        self._send(200, {})

    def refs(self, _: bytes, kind: str, repo: str) -> None:
        found = self._repo(_TYPES[kind], repo)
        names = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": number}
            for name, number in found.branches.items()
            if not name.startswith("refs/")
        ]
        self._send(200, {"branches": names, "tags": [], "converts": []})

    def branch(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        found = self._repo(_TYPES[kind], repo, write=True)
        if revision in found.branches:
            raise _Refused(409, f"Reference already exists: {revision}")
        found.branches[revision] = self._at(found, json.loads(body or b"{}").get("startingPoint", "main"))[0]
        self._send(200, {})

    def tree(self, _: bytes, kind: str, repo: str, revision: str, path: str = "") -> None:
        number, files = self._at(self._repo(_TYPES[kind], repo), revision)
        inside = {name: blob for name, blob in files.items() if name.startswith(f"{path}/" if path else "")}
        if path and not inside:
            raise _Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for name, blob in sorted(inside.items()):
            below = name[len(path) + 1 if path else 0 :].split("/")
            parents = ["/".join([path, *below[:n]] if path else below[:n]) for n in range(1, len(below))]
            for folder in parents if deep else parents[:1]:
                if folder not in folders:
                    folders.add(folder)
                    entries.append({"type": "directory", "oid": number, "size": 0, "path": folder})
            if deep or len(below) == 1:
                entries.append(_entry(name, blob))
        self._send(200, entries)

    def paths(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        _, files = self._at(self._repo(_TYPES[kind], repo), revision)
        asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
        asked = [asked] if isinstance(asked, str) else asked
        self._send(200, [_entry(path, files[path]) for path in asked if path in files])

    def resolve(self, _: bytes, repo: str, revision: str, path: str, kind: str = "") -> None:
        number, files = self._at(self._repo(_TYPES.get(kind.strip("/"), "model"), repo), revision)
        if path not in files:
            raise _Refused(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": number})
        blob = files[path]
        tag = f'"{blob.sha256 if blob.lfs else blob.git}"'
        headers = {"ETag": tag, "X-Repo-Commit": number, "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        content = self.server_hub.content(blob)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self._send(200, content, headers)
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        if first >= len(content):
            raise _Refused(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._send(206, content[first : last + 1], headers)

    def validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        errors = [] if re.match(r"^---\n.*?\n---\n", text, re.S) else [{"message": "no metadata"}]
        self._send(200, {"errors": [], "warnings": errors})

    # Writing

    def preupload(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        # Who opens a pull request needs no right to write.
        found = self._repo(_TYPES[kind], repo, write="create_pr" not in self.query)
        _, files = self._at(found, revision)
        answers = []
        for asked in json.loads(body)["files"]:
            path, sample = asked["path"], base64.b64decode(asked["sample"])
            lfs = Path(path).suffix in _LARGE or asked["size"] > 10 * 2**20 or b"\0" in sample
            old = files.get(path)
            oid = None if old is None else old.sha256 if old.lfs else old.git
            mode = "lfs" if lfs else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": answers, "commitOid": found.branches["main"]})

    def batch(self, body: bytes, repo: str, kind: str = "") -> None:
        self._repo(_TYPES.get(kind.strip("/"), "model"), repo)
        if self._user() is None:
            raise _Refused(401, "Invalid username or password.")
        answers = []
        for asked in json.loads(body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if self.server_hub._held(oid) is None:
                base = f"{self.server_hub.url}/storage/{self.server_hub._secret}/{oid}"
                upload: dict[str, Any] = {"href": f"{base}?size={size}"}
                part = self.server_hub.multipart_from
                if part is not None and size >= part:
                    parts = {str(n + 1): f"{base}/part/{n}" for n in range(-(-size // part))}
                    upload = {"href": f"{base}/complete?size={size}", "header": {"chunk_size": str(part), **parts}}
                verify = {"href": f"{self.server_hub.url}/{kind}{repo}/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        self._send(200, {"transfer": "basic", "objects": answers})

    def storage(self, body: bytes, oid: str) -> None:
        self._store(body, oid)
        self._send(200, b"")

    def part(self, body: bytes, oid: str, number: str) -> None:
        (Path(self.server_hub._folder.name) / f"{oid}.{number}").write_bytes(body)
        self._send(200, b"", {"ETag": f'"{number}"'})

    def complete(self, body: bytes, oid: str) -> None:
        numbers = [entry["partNumber"] - 1 for entry in json.loads(body)["parts"]]
        folder = Path(self.server_hub._folder.name)
        self._store(b"".join((folder / f"{oid}.{number}").read_bytes() for number in numbers), oid)
        self._send(200, {})

    def _store(self, content: bytes, oid: str) -> None:
        size = int(self.query["size"][0])
        if len(content) != size or hashlib.sha256(content).hexdigest() != oid:
            raise _Refused(400, f"{oid}: {len(content)} of {size} bytes, or another content")
        with self.server_hub._lock:
            self.server_hub._keep(content, True)
            self.server_hub.uploads[oid] += 1
            self.server_hub.uploaded_bytes += size

    def verify(self, body: bytes, repo: str, kind: str = "") -> None:
        asked = json.loads(body)
        held = self.server_hub._held(asked["oid"])
        if held is None or held.stat().st_size != asked["size"]:
            raise _Refused(404, "object is not there")
        self._send(200, {})

    def commit(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        proposed = "create_pr" in self.query
        found = self._repo(_TYPES[kind], repo, write=not proposed)
        if self._user() is None:
            raise _Refused(401, "Invalid username or password.")
        with self.server_hub._lock:
            _, old = self._at(found, revision)
            files, title = dict(old), ""
            for line in map(json.loads, body.splitlines()):
                key, value = line["key"], line["value"]
                if key == "header":
                    title = value["summary"]
                elif key == "file":
                    files[value["path"]] = self.server_hub._keep(base64.b64decode(value["content"]), False)
                elif key == "lfsFile":
                    held = self.server_hub._held(value["oid"])
                    if held is None or held.stat().st_size != value["size"]:
                        raise _Refused(400, f"{value['path']}: its object was not uploaded")
                    files[value["path"]] = self.server_hub._keep(held.read_bytes(), True)
                elif key == "deletedFile":
                    del files[value["path"]]
                elif key == "deletedFolder":
                    files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
                else:
                    raise _Refused(400, f"unknown operation {key}")
            requests = sum(name.startswith("refs/pr/") for name in found.branches)
            branch = f"refs/pr/{requests + 1}" if proposed else revision
            number = found.commit(branch, title, files)
        answer: dict[str, Any] = {"success": True, "commitOid": number}
        answer["commitUrl"] = f"{self.server_hub.url}/{repo}/commit/{number}"
        if proposed:
            answer["pullRequestUrl"] = f"{self.server_hub.url}/{repo}/discussions/{requests + 1}"
        self._send(200, answer)


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": blob.git, "size": blob.size, "path": path}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
    return entry


_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
_GIT = r"/(?P<kind>datasets/|spaces/)?(?P<repo>[^/]+/[^/]+)"
_STORED = r"/storage/[0-9a-f]{16}/(?P<oid>[0-9a-f]{64})"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Handler.who),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", _API, _Handler.info),
    ("GET", _API + r"/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", _API + r"/auth-check/write", _Handler.may_write),
    ("GET", _API + r"/refs", _Handler.refs),
    ("POST", _API + r"/branch/(?P<revision>[^/]+)", _Handler.branch),
    ("GET", _API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", _Handler.tree),
    ("POST", _API + r"/paths-info/(?P<revision>[^/]+)", _Handler.paths),
    ("POST", _API + r"/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", _API + r"/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", _GIT + r"\.git/info/lfs/objects/batch", _Handler.batch),
    ("POST", _GIT + r"/verify", _Handler.verify),
    ("PUT", _STORED, _Handler.storage),
    ("PUT", _STORED + r"/part/(?P<number>\d+)", _Handler.part),
    ("POST", _STORED + r"/complete", _Handler.complete),
    ("GET|HEAD", _GIT + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]


def main() -> None:
    """Serve until interrupted, and say how to reach it."""
    parser = argparse.ArgumentParser(description="A small Hub on the loopback interface.")
    parser.add_argument("--port", type=int, default=8123)
    with LoopbackHub(port=parser.parse_args().port) as hub:
        print(f"HF_ENDPOINT={hub.url} HF_TOKEN={hub.token} HF_HUB_DISABLE_XET=1", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
