"""A Hugging Face Hub on the loopback interface, in memory, for the real huggingface_hub client.

It answers what an upload, a pull request and a download of a model repository ask, as the Hub does: who am I,
create, validate a card, preupload, Git LFS (basic transfer), commit, model info, tree, resolve. The client
finds it by HF_ENDPOINT (read when huggingface_hub is imported) or `endpoint=`; with HF_HUB_DISABLE_XET=1 it
uses LFS.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_aliceAliceAliceAliceAliceAlice"
READ_TOKEN = "hf_readReadReadReadReadReadReadRea"


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".png", ".model"))


def object_id(path: str, content: bytes) -> str:
    """Return the hash by which the Hub finds changed files: SHA-256 for LFS files, else git's SHA-1."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """A model repository: `commits` maps a hash to the files {path: content}, `refs` a branch to a hash."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: list[dict] = field(default_factory=list)

    def __post_init__(self):
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs -text\n"}, "start")

    def commit(self, ref: str, files: dict[str, bytes], message: str) -> str:
        self.messages.append(message)
        commit = hashlib.sha1(repr((ref, files, len(self.messages))).encode()).hexdigest()
        self.commits[commit] = files
        self.refs[ref] = commit
        return commit

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs.get(revision, revision)]


@dataclass
class Fault:
    """Answers the next `times` requests of `method` whose path matches `path` with `status`.

    Attributes:
        body: is answered as it is, in place of an error with `message`.
        stalled: no answer is given, and nothing is done.
        lost: what was asked for is done, but the answer is `status`; none arrives if that is 0.
        reset: the connection is reset, and nothing is done.
        truncated: what was asked for is done, but only half of the answer arrives.
        slow: what was asked for is done, and the answer arrives in small parts.
    """

    method: str
    path: str
    status: int = 0
    times: int = 1
    message: str = "injected fault"
    body: bytes | None = None
    stalled: bool = False
    lost: bool = False
    reset: bool = False
    truncated: bool = False
    slow: bool = False


class LoopbackHub(ThreadingHTTPServer):
    """A context manager that serves while it is open.

    Args:
        tokens: user name by token. A user may write below their own name, and see private repositories there.
        read_only: the tokens that may only read.
    """

    daemon_threads = True

    def __init__(self, tokens: dict[str, str], read_only: tuple[str, ...] = ()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.tokens, self.read_only = tokens, read_only
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock, self.closed = threading.Lock(), threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closed.set()
        self.shutdown()
        self.server_close()


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message, "X-Error-Code": code}


ROUTES = []


def route(methods: str, pattern: str):
    """Calls the handler with the groups of `pattern`; REPO is a repository's name, REV a revision."""
    pattern = pattern.replace("REPO", r"([\w.-]+/[\w.-]+)").replace("REV", r"(refs/pr/\d+|[^/]+)")

    def register(function):
        ROUTES.append((methods.split(), re.compile(pattern), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self):
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        self.body, self.lost, self.fault = self.read_body(), None, None
        fault = self.take_fault(path)
        if fault and fault.stalled:
            self.server.requests.append((self.command, path))
            self.close_connection = self.server.closed.wait()
            return
        if fault and fault.reset:
            linger = struct.pack("ii", 1, 0)  # close with RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return
        if fault and (fault.truncated or fault.slow):
            self.fault, fault = fault, None
        with self.server.lock:
            self.server.requests.append((self.command, path))
            try:
                if fault and fault.body is not None:
                    return self.reply(fault.body, fault.status)
                if fault and not fault.lost:
                    raise Refusal(fault.status, fault.message)
                self.lost = fault
                self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                self.user = self.server.tokens.get(self.token)
                if self.token and not self.user:
                    raise Refusal(401, "Invalid credentials in Authorization header")
                for methods, pattern, function in ROUTES:
                    if self.command in methods and (match := pattern.fullmatch(path)):
                        return function(self, *match.groups())
                raise Refusal(404, f"no route for {self.command} {path}")
            except Refusal as refusal:
                self.reply({"error": str(refusal)}, refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def take_fault(self, path: str) -> Fault | None:
        for fault in self.server.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def reply(self, content, status: int = 200, headers: dict | None = None):
        """`content`: bytes as they are, anything else as JSON."""
        if self.lost and not self.lost.status:
            self.close_connection = True
            return
        if self.lost:
            content, status = {"error": self.lost.message}, self.lost.status
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.truncated:
            self.close_connection, body = True, body[: len(body) // 2]
        parts = 4 if self.fault and self.fault.slow else 1
        step = max(1, -(-len(body) // parts))
        for first in range(0, len(body), step):
            self.wfile.write(body[first : first + step])
            self.wfile.flush()
            if parts > 1:
                self.server.closed.wait(0.02)

    def repo(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and name.split("/")[0] != self.user):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def require_access(self, name: str, repo: Repo):
        if repo.gated and name.split("/")[0] != self.user:
            raise Refusal(403 if self.user else 401, f"Access to model {name} is restricted", "GatedRepo")

    def require_write(self, namespace: str):
        if not self.user:
            raise Refusal(401, "Invalid username or password.")
        if namespace != self.user or self.token in self.server.read_only:
            raise Refusal(403, f"you have no write access to {namespace}")

    def revision(self, name: str, revision: str) -> tuple[Repo, str]:
        """The repository and the hash that `revision` (a branch, a pull request or a hash) stands for."""
        repo = self.repo(name)
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, commit

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        if not self.user:
            raise Refusal(401, "Invalid username or password.")
        self.reply({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    @route("POST", "/api/repos/create")
    def create(self):
        wish = json.loads(self.body)
        namespace = wish.get("organization") or self.user
        self.require_write(namespace)
        name = f"{namespace}/{wish['name']}"
        url = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repos:
            return self.reply({"error": "You already created this model repo", **url}, 409)
        self.server.repos[name] = Repo(private=wish.get("visibility") == "private")
        self.reply(url)

    @route("POST", "/api/validate-yaml")
    def validate_card(self):
        if not self.user:
            raise Refusal(401, "Invalid username or password.")
        self.reply({"errors": [], "warnings": []})

    @route("POST", "/api/models/REPO/preupload/REV")
    def preupload(self, name, revision):
        """How each file is to be sent, and the id of the one that is there."""
        repo, commit = self.revision(name, revision)
        self.require_access(name, repo)
        if "create_pr" not in self.query and not revision.startswith("refs/pr/"):
            self.require_write(name.split("/")[0])
        there = {path: object_id(path, content) for path, content in repo.commits[commit].items()}
        files = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            mode = "lfs" if is_lfs(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": there.get(path)})
        self.reply({"files": files, "commitOid": commit})

    @route("POST", r"/REPO\.git/info/lfs/objects/batch")
    def lfs_batch(self, name):
        self.repo(name)
        objects = json.loads(self.body)["objects"]
        for wish in objects:
            if wish["oid"] not in self.server.objects:
                wish["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wish['oid']}"}}
        self.reply({"transfer": "basic", "objects": objects})

    @route("PUT", r"/lfs/(\w{64})")
    def lfs_upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content does not have this SHA-256")
        self.server.objects[oid] = self.body
        self.reply({})

    @route("POST", "/api/models/REPO/commit/REV")
    def commit(self, name, revision):
        repo, parent = self.revision(name, revision)
        as_pull_request = "create_pr" in self.query
        if not as_pull_request and not revision.startswith("refs/pr/"):
            self.require_write(name.split("/")[0])
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        files = dict(repo.commits[parent])
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refusal(422, f"there is no LFS object {value['oid']}")
                files[value["path"]] = self.server.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"unknown operation {kind}")
        answer = {"success": True}
        if as_pull_request:
            number = len(repo.pull_requests) + 1
            revision, title = f"refs/pr/{number}", header["value"]["summary"]
            request = {"num": number, "title": title, "author": {"name": self.user}, "status": "open"}
            where = {"repo": {"name": name, "type": "model"}, "createdAt": "2026-01-01T00:00:00.000Z"}
            repo.pull_requests.append({**request, **where, "isPullRequest": True})
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{number}"
        commit = repo.commit(revision, files, header["value"]["summary"])
        self.reply(answer | {"commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"})

    @route("GET", "/api/models/REPO/discussions")
    def discussions(self, name):
        found = self.repo(name).pull_requests
        self.reply({"discussions": found, "count": len(found), "start": 0})

    @route("GET", "/api/models/REPO")
    @route("GET", "/api/models/REPO/revision/REV")
    def info(self, name, revision="main"):
        repo, commit = self.revision(name, revision)
        siblings = [{"rfilename": path} for path in repo.commits[commit]]
        gated = "manual" if repo.gated else False
        self.reply({"id": name, "sha": commit, "private": repo.private, "gated": gated, "siblings": siblings})

    @route("GET", "/api/models/REPO/tree/REV")
    def tree(self, name, revision):
        repo, commit = self.revision(name, revision)
        listing = []
        for path, content in sorted(repo.commits[commit].items()):
            entry = {"type": "file", "path": path, "oid": object_id(path, content), "size": len(content)}
            if is_lfs(path):
                entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 134}
            listing.append(entry)
        self.reply(listing)

    @route("GET HEAD", "/REPO/resolve/REV/(.+)")
    def resolve(self, name, revision, path):
        repo, commit = self.revision(name, revision)
        self.require_access(name, repo)
        if path not in repo.commits[commit]:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        content = repo.commits[commit][path]
        self.reply(content, headers={"X-Repo-Commit": commit, "ETag": f'"{object_id(path, content)}"'})
