"""A small hub that runs here and speaks the Hugging Face hub's own interface, for reading and for writing.

Written from what the client sends: revisions, trees and files; creating a repository or a branch, the question how a
file is to be sent, git LFS's batch interface, and commits as lines of JSON.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlparse

import huggingface_hub.constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_a_test"
LARGE = 2000  # bytes from which on a file goes by LFS


class Hub(http.server.BaseHTTPRequestHandler):
    """Just enough of the hub's interface.

    Attributes:
        repositories: folders that stand for what others published.
        pushed: what came in, repository -> branch -> commit and files; None where a branch is empty.
        objects: large files that were uploaded, by their SHA-256.
        closed, tags, fetched, asked: closed repositories, tags, files and revisions that were asked for.
        looked_into: bytes that were fetched of files of which only a part was asked for.
        private: repositories that only their owner sees.
        posts: paths that something was posted to.
    """

    repositories: dict[str, Path]
    closed: set[str]
    fetched: list[str]
    looked_into: dict[str, int]
    tags: set[str]
    asked: list[str]  # revisions
    pushed: dict[str, dict[str, tuple[str, dict[str, bytes]]]]
    objects: dict[str, bytes]
    private: set[str]
    posts: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = urlparse(self.path).path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        name, rest = "/".join(parts[:2]), [unquote(part) for part in parts[2:]]
        if name in self.closed:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if name not in self.repositories and name not in self.pushed:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        found = self.revision(name, rest[1] if len(rest) > 1 else "main")
        if found is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        if api and rest[0] == "revision":
            self.asked.append(rest[1])
            siblings = [{"rfilename": path} for path in sorted(files)]
            return self.answer(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())
        if api and rest[0] == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": etag(content)}
                for path, content in sorted(files.items())
            ]
            return self.answer(200, json.dumps(entries).encode())
        path = "/".join(rest[2:])  # resolve/COMMIT/path
        if path not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET" and (part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
            piece = files[path][int(part[1]) : int(part[2]) + 1]
            self.looked_into[path] = self.looked_into.get(path, 0) + len(piece)
            return self.answer(206, piece, {"ETag": f'"{etag(files[path])}"', "X-Repo-Commit": commit})
        if self.command == "GET":
            self.fetched.append(path)
        return self.answer(200, files[path], {"ETag": f'"{etag(files[path])}"', "X-Repo-Commit": commit})

    def revision(self, name, revision):
        """Commit and files of a revision; None where there is none."""
        if name in self.pushed:
            heads = self.pushed[name]
            return heads.get(revision) or next((head for head in heads.values() if head[0] == revision), None)
        if revision not in ("main", COMMIT, *self.tags):
            return None
        directory = self.repositories[name]
        files = [p for p in sorted(directory.rglob("*")) if p.is_file()]
        return COMMIT, {p.relative_to(directory).as_posix(): p.read_bytes() for p in files}

    def do_POST(self):
        path, body = urlparse(self.path).path, self.body()
        self.posts.append(path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, b'{"error": "Invalid token"}')
        if path == "/api/validate-yaml":  # of a model card
            return self.say({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/branch/(.+)", path):
            self.pushed[found[1]].setdefault(unquote(found[2]), self.pushed[found[1]]["main"])
            return self.say({})
        if found := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/preupload/(.+)", path):
            return self.preupload(json.loads(body)["files"])
        if found := re.fullmatch(r"/(\w+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body)["objects"])
        if path == "/verify":
            return self.say({})
        if found := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/commit/(.+)", path):
            return self.commit(found[1], unquote(found[2]), [json.loads(line) for line in body.splitlines()])
        return self.answer(404, b"")

    def create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "me":
            return self.answer(403, b'{"error": "You cannot create repositories there"}')
        if name in self.pushed:
            return self.answer(409, json.dumps({"url": f"{self.endpoint}/{name}"}).encode())
        if asked.get("visibility") == "private":
            self.private.add(name)
        self.pushed[name] = {"main": ("f" * 40, {".gitattributes": b"*.safetensors filter=lfs\n"})}
        return self.say({"url": f"{self.endpoint}/{name}"})

    def preupload(self, files):
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] > LARGE else "regular", "shouldIgnore": False}
            for f in files
        ]
        self.say({"files": modes})

    def batch(self, objects):
        actions = [
            {
                **o,
                "actions": {
                    "upload": {"href": f"{self.endpoint}/objects/{o['oid']}"},
                    "verify": {"href": f"{self.endpoint}/verify"},
                },
            }
            for o in objects
        ]
        self.say({"transfer": "basic", "objects": actions})

    def do_PUT(self):
        content = self.body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.objects[oid] = content
        self.answer(200, b"")

    def commit(self, name, branch, lines):
        commit, files = self.pushed[name][branch]
        header, *operations = lines
        if header["value"].get("parentCommit") not in (None, commit):
            return self.answer(412, b'{"error": "the branch has moved"}')
        files = dict(files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.objects[value["oid"]]
        new = hashlib.sha1(json.dumps([commit, *lines]).encode()).hexdigest()
        self.pushed[name][branch] = (new, files)
        self.say({"commitUrl": f"{self.endpoint}/{name}/commit/{new}", "commitOid": new})

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def say(self, content):
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status, content, headers=None):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def etag(content):
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serving(tmp_path, monkeypatch):
    """A hub with nothing in it, an empty cache, and the client pointed at both."""
    empty = {"repositories": {}, "closed": set(), "fetched": [], "looked_into": {}, "tags": set(), "asked": []}
    empty |= {"pushed": {}, "objects": {}, "private": set(), "posts": []}
    handler = type("Handler", (Hub,), empty)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    handler.close = lambda: (server.shutdown(), server.server_close())
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    try:
        yield handler
    finally:
        handler.close()
