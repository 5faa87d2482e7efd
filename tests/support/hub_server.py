"""A Hugging Face hub on this machine: models and data sets by name, downloads, and uploads."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

import pytest
from huggingface_hub import constants

from pjrlhf.models import hub


class Hub:
    """Repositories in memory.

    Attributes:
      repos: (kind, name) -> {"commits": {commit: {file: bytes}}, "branches": {branch: commit}, "gated", "private"};
        kinds are "models" and "datasets".
      seen: (method, path) of all requests.
      token: the only one that may write; None allows everybody.
    """

    def __init__(self, token=None):
        self.repos, self.seen, self.token = {}, [], token
        self._blobs = {}

    def add(self, name, files, branch="main", kind="models", gated=False):
        """Adds a commit with `files`, a folder or {file: bytes}; returns it."""
        if not isinstance(files, dict):
            files = {str(f.relative_to(files)): f.read_bytes() for f in sorted(files.rglob("*")) if f.is_file()}
        repo = self.repos.setdefault((kind, name), {"commits": {}, "branches": {}, "gated": gated, "private": False})
        content = repr((name, len(repo["commits"]), sorted((path, _oid(data)) for path, data in files.items())))
        commit = hashlib.sha1(content.encode()).hexdigest()
        repo["commits"][commit], repo["branches"][branch] = dict(files), commit
        return commit

    def files(self, name, kind="models", branch="main"):
        """The files of a branch."""
        repo = self.repos[kind, name]
        return repo["commits"][repo["branches"][branch]]

    def downloads(self):
        """The files that were sent, in order."""
        found = (re.fullmatch(r"/.+?/resolve/[^/]+/(.+)", path) for method, path in self.seen if method == "GET")
        return [match[1] for match in found if match]

    @contextlib.contextmanager
    def running(self, cache):
        """Makes this the hub of the process, with an empty cache in the folder `cache`."""
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def handle_one(self):
                path, _, query = self.path.partition("?")
                path = urllib.parse.unquote(path)
                outer.seen.append((self.command, path))
                size = int(self.headers.get("Content-Length") or 0)
                status, body, headers = outer._answer(self, path, query, self.rfile.read(size))
                if not isinstance(body, bytes):
                    body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
                self.send_response(status)
                for key, value in {"Content-Length": len(body), **headers}.items():
                    self.send_header(key, str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_POST = do_PUT = handle_one

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            with pytest.MonkeyPatch.context() as patch:
                use(patch, self.url, cache)
                yield self
        finally:
            server.shutdown()
            server.server_close()

    def _answer(self, request, path, query, body):
        """(status, body, headers)."""
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree|preupload|commit)/(.+)", path):
            return self._api(request, *found.groups(), query, body)
        if path == "/api/repos/create":
            return self._create(request, json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/whoami-v2":
            return self._allowed(request) or (200, {"name": "me", "type": "user", "orgs": []}, {})
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._lfs(json.loads(body))
        if path.startswith("/lfs/"):
            self._blobs[path.removeprefix("/lfs/")] = body
            return 200, {}, {}
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind = "datasets" if found[1] else "models"
            return self._resolve(request, kind, found[2], found[3], found[4])
        return _error(404, "RepoNotFound", "no such page")

    def _allowed(self, request):
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return _error(401, "", "Invalid credentials in Authorization header")
        return None

    def _commit(self, kind, name, revision):
        """(repository, commit) or an answer."""
        repo = self.repos.get((kind, name))
        if repo is None:
            return None, _error(401, "RepoNotFound", "Repository not found")
        commit = repo["branches"].get(revision, revision)
        if commit not in repo["commits"]:
            return None, _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit

    def _api(self, request, kind, name, what, rest, query, body):
        if what == "preupload":
            files = [{"path": f["path"], "uploadMode": _mode(f["path"])} for f in json.loads(body)["files"]]
            return 200, {"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]}, {}
        if what == "commit":
            return self._allowed(request) or self._push(kind, name, rest, body)
        revision, _, folder = rest.partition("/") if what == "tree" else (rest, "", "")
        repo, commit = self._commit(kind, name, revision)
        if repo is None:
            return commit
        files = repo["commits"][commit]
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            found = {"id": name, "sha": commit, "private": repo["private"], "gated": repo["gated"], "tags": []}
            return 200, {**found, "siblings": siblings, "downloads": 0, "likes": 0}, {}
        inside = {path: data for path, data in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            return _error(404, "EntryNotFound", "no such folder")
        entries = [{"type": "file", "path": path, "size": len(x), "oid": _oid(x)} for path, x in inside.items()]
        return 200, entries, {}

    def _resolve(self, request, kind, name, revision, path):
        repo, commit = self._commit(kind, name, revision)
        if repo is None:
            return commit
        if repo["gated"] and not request.headers.get("Authorization"):
            return _error(403, "GatedRepo", "Access to this model is restricted")
        data = repo["commits"][commit].get(path)
        if data is None:
            return _error(404, "EntryNotFound", "Entry not found")
        return 200, data, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "none"}

    # ---- uploads

    def _create(self, request, body):
        if answer := self._allowed(request):
            return answer
        owner = body.get("organization") or "me"
        if owner == "others":
            return _error(403, "", "You don't have the rights to create a model under the namespace others")
        kind, name = f"{body.get('type') or 'model'}s", f"{owner}/{body['name']}"
        if (kind, name) in self.repos:
            return 409, {"error": "exists", "url": f"{self.url}/{name}"}, {}
        self.add(name, {}, kind=kind)
        self.repos[kind, name]["private"] = body.get("private", body.get("visibility") == "private")
        return 200, {"url": f"{self.url}/{name}", "name": name}, {}

    def _lfs(self, body):
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}", "header": {}}}}
            for one in body["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def _push(self, kind, name, branch, body):
        files = dict(self.files(name, kind, branch))
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self._blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = self.add(name, files, branch, kind)
        return 200, {"commitOid": commit, "commitUrl": f"{self.url}/{name}/commit/{commit}", "hookOutput": ""}, {}


@contextlib.contextmanager
def serving(files, cache):
    """A hub with the model ann/small of `files`, see `Hub.add`, for this process, which has pinned no commit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "_pinned", {})
        server = Hub()
        server.add("ann/small", files)
        with server.running(cache):
            yield server


def use(patch, url, cache):
    """Makes `url` the hub of this process."""
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache) + "/token")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)


def _oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _mode(path):
    return "lfs" if path.endswith(".safetensors") else "regular"


def _error(status, code, message):
    return status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message}
