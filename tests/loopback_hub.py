"""A Hub on the loopback interface, as far as huggingface_hub and transformers use one.

    with LoopbackHub(tokens={"secret": "user"}) as hub:
        subprocess.run(..., env={**os.environ, **hub.environment(home)})

Repositories live in memory: commits in a row, files as git blobs or LFS objects. Branches and tags point at commits.
Reading a public repository takes no token, writing and private ones take one of its namespace's user.
"""

import base64
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.parquet", "*.png", "*.onnx")
FIRST_COMMIT = "0" * 40


@dataclass(frozen=True)
class Blob:
    """A file: its bytes are under `sha256` in the store; `oid` is git's name for them."""

    oid: str
    sha256: str
    size: int
    is_lfs: bool


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repository:
    owner: str
    private: bool
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)
    references: dict[str, str] = field(default_factory=lambda: {"main": FIRST_COMMIT})

    def at(self, revision: str) -> Commit | None:
        revision = self.references.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == revision), None)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def refuse(status: int, code: str, message: str) -> Response:
    return JSONResponse({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})


class LoopbackHub:
    """Start it as a context manager. `requests` lists what was asked for; `fail` makes requests fail.

    Attributes:
        url: address of the endpoint.
        requests: (method, path) of every request.
        fail: (method, pattern of the path) → how many more of these are answered with status 500.
        cut: pattern of the path → bytes after which the next download of it breaks off.
        ranges: the parts of files that were asked for.
    """

    def __init__(self, tokens: dict[str, str] | None = None):
        self.tokens = tokens or {}
        self.repositories: dict[str, Repository] = {}
        self.store: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.fail: dict[tuple[str, str], int] = {}
        self.cut: dict[str, int] = {}
        self.ranges: list[str] = []
        self.url = ""

    def __enter__(self) -> "LoopbackHub":
        config = uvicorn.Config(self._application(), host="127.0.0.1", port=0, log_level="critical")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables for a process that is to use this Hub, to be set before it imports huggingface_hub."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return {**variables, "HF_TOKEN": token or "", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        return {name: self.store[blob.sha256] for name, blob in self.repositories[repo_id].at(revision).files.items()}

    def add(self, repo_id: str, folder: Path, private: bool = False, gated: bool = False) -> str:
        """Commits the files of a folder to a repository, made if it isn't there; returns the commit."""
        owner, files = repo_id.split("/")[0], {}
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            content, is_lfs = path.read_bytes(), any(fnmatch(path.name, pattern) for pattern in LFS_PATTERNS)
            sha256 = hashlib.sha256(content).hexdigest()
            self.store[sha256] = content
            files[path.name] = Blob(git_oid(content), sha256, len(content), is_lfs)
        repository = self.repositories.setdefault(repo_id, Repository(owner, private, gated))
        oid = hashlib.sha1(f"{len(repository.commits)} {sorted(files.items())}".encode()).hexdigest()
        repository.commits.append(Commit(oid, "files of a folder", files))
        repository.references["main"] = oid
        return oid

    def _application(self) -> Starlette:
        repo = "/api/{kind:str}s/{owner:str}/{name:str}"
        handlers = {
            ("GET", "/api/whoami-v2"): self.who_am_i,
            ("POST", "/api/validate-yaml"): self.validate_yaml,
            ("POST", "/api/repos/create"): self.create,
            ("GET", repo): self.info,
            ("GET", repo + "/revision/{revision}"): self.info,
            ("GET", repo + "/tree/{revision}"): self.tree,
            ("GET", repo + "/tree/{revision}/{path:path}"): self.tree,
            ("POST", repo + "/paths-info/{revision}"): self.paths_info,
            ("GET", repo + "/refs"): self.references,
            ("GET", repo + "/commits/{revision}"): self.commits,
            ("POST", repo + "/preupload/{revision}"): self.preupload,
            ("POST", repo + "/commit/{revision}"): self.commit,
            ("POST", repo + "/{what:str}/{reference}"): self.reference,
            ("DELETE", repo + "/{what:str}/{reference}"): self.reference,
            ("POST", "/{owner}/{name}.git/info/lfs/objects/batch"): self.lfs_batch,
            ("PUT", "/lfs/{sha256}"): self.lfs_put,
            ("POST", "/lfs/{sha256}/verify"): self.lfs_verify,
            ("GET", "/{owner}/{name}/resolve/{revision}/{path:path}"): self.resolve,
        }
        routes = [
            Route(path, self._guarded(handler), methods=[method]) for (method, path), handler in handlers.items()
        ]
        return Starlette(routes=routes)

    def _guarded(self, handler):
        """Records the request, and fails it where that is wanted."""

        async def answer(request: Request) -> Response:
            self.requests.append((request.method, request.url.path))
            for (method, pattern), left in self.fail.items():
                if left and request.method == method and fnmatch(request.url.path, pattern):
                    self.fail[method, pattern] -= 1
                    return refuse(500, "Injected", "the server is out of order")
            return await handler(request)

        return answer

    # Who may do what.

    def _user(self, request: Request) -> str | None:
        return self.tokens.get(request.headers.get("authorization", "").removeprefix("Bearer "))

    def _repository(self, request: Request, write: bool = False) -> Repository | Response:
        has_token = "authorization" in request.headers
        if has_token and self._user(request) is None:
            return refuse(401, "Unauthorized", "Invalid credentials in Authorization header")
        repository = self.repositories.get("{owner}/{name}".format(**request.path_params))
        if repository is None or (repository.private and self._user(request) != repository.owner):
            return refuse(404 if has_token else 401, "RepoNotFound", "Repository not found")
        if write and self._user(request) != repository.owner:
            return refuse(403, "Forbidden", "You don't have the rights to write to this repository")
        return repository

    def _commit_of(self, request: Request) -> tuple[Repository, Commit] | Response:
        repository = self._repository(request)
        if isinstance(repository, Response):
            return repository
        commit = repository.at(request.path_params.get("revision", "main"))
        if commit is None:
            return refuse(404, "RevisionNotFound", f"Invalid rev id: {request.path_params['revision']}")
        return repository, commit

    # The API.

    async def who_am_i(self, request: Request) -> Response:
        user = self._user(request)
        if user is None:
            return refuse(401, "Unauthorized", "Invalid credentials in Authorization header")
        return JSONResponse({"type": "user", "id": user, "name": user, "orgs": [], "auth": {"type": "access_token"}})

    async def validate_yaml(self, request: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    async def create(self, request: Request) -> Response:
        wanted, user = await request.json(), self._user(request)
        if user is None:
            return refuse(401, "Unauthorized", "Invalid credentials in Authorization header")
        owner = wanted.get("organization") or user
        repo_id = f"{owner}/{wanted['name']}"
        if owner != user:
            return refuse(403, "Forbidden", f"You don't have the rights to create a model under {owner}")
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.repositories:
            return JSONResponse({**answer, "error": "You already created this model repo"}, 409)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.repositories[repo_id] = Repository(owner, private, commits=[Commit(FIRST_COMMIT, "initial commit", {})])
        return JSONResponse(answer)

    async def info(self, request: Request) -> Response:
        found = self._commit_of(request)
        if isinstance(found, Response):
            return found
        repository, commit = found
        repo_id = "{owner}/{name}".format(**request.path_params)
        files = [{"rfilename": name} for name in sorted(commit.files)]
        answer = {"id": repo_id, "modelId": repo_id, "sha": commit.oid, "private": repository.private, "gated": False}
        return JSONResponse({**answer, "siblings": files, "tags": [], "downloads": 0, "likes": 0})

    def _entry(self, name: str, blob: Blob) -> dict:
        entry = {"type": "file", "path": name, "size": blob.size, "oid": blob.oid}
        return {**entry, "lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}} if blob.is_lfs else entry

    async def tree(self, request: Request) -> Response:
        found = self._commit_of(request)
        if isinstance(found, Response):
            return found
        files, folder = found[1].files, request.path_params.get("path", "")
        inside = {name: blob for name, blob in sorted(files.items()) if not folder or name.startswith(folder + "/")}
        if folder and not inside:
            return refuse(404, "EntryNotFound", f"{folder} does not exist")
        return JSONResponse([self._entry(name, blob) for name, blob in inside.items()])

    async def paths_info(self, request: Request) -> Response:
        found = self._commit_of(request)
        if isinstance(found, Response):
            return found
        if "json" in request.headers.get("content-type", ""):
            paths = (await request.json())["paths"]
        else:
            paths = (await request.form()).getlist("paths")
        return JSONResponse([self._entry(path, found[1].files[path]) for path in paths if path in found[1].files])

    async def references(self, request: Request) -> Response:
        repository = self._repository(request)
        if isinstance(repository, Response):
            return repository
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in repository.references.items()
        ]
        return JSONResponse({"branches": branches, "tags": [], "converts": []})

    async def commits(self, request: Request) -> Response:
        found = self._commit_of(request)
        if isinstance(found, Response):
            return found
        repository, commit = found
        history = repository.commits[repository.commits.index(commit) :: -1]
        entry = {"message": "", "authors": [], "date": "2024-01-01T00:00:00.000Z"}
        return JSONResponse([{**entry, "id": each.oid, "title": each.title} for each in history])

    async def reference(self, request: Request) -> Response:
        repository = self._repository(request, write=True)
        if isinstance(repository, Response):
            return repository
        what, name = request.path_params["what"], request.path_params["reference"]
        if what not in ("branch", "tag"):
            return refuse(404, "NotFound", f"no such route: {request.url.path}")
        body = json.loads(await request.body() or b"{}")
        if request.method == "DELETE":
            repository.references.pop(name, None)
            return JSONResponse({})
        if what == "tag":  # the path holds the revision, the body the tag
            name, start = body["tag"], name
        else:
            start = body.get("startingPoint", "main")
        if name in repository.references:
            return refuse(409, "Conflict", f"Reference already exists: {name}")
        repository.references[name] = repository.at(start).oid
        return JSONResponse({})

    # Uploads.

    async def preupload(self, request: Request) -> Response:
        found = self._commit_of(request)
        if isinstance(found, Response):
            return found
        answer = []
        for file in (await request.json())["files"]:
            is_lfs = any(fnmatch(file["path"], pattern) for pattern in LFS_PATTERNS)
            known = found[1].files.get(file["path"])
            oid = None if known is None else known.sha256 if known.is_lfs else known.oid
            mode = "lfs" if is_lfs else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return JSONResponse({"files": answer})

    async def lfs_batch(self, request: Request) -> Response:
        repository = self._repository(request, write=True)
        if isinstance(repository, Response):
            return repository
        objects = []
        for wanted in (await request.json())["objects"]:
            upload = {"href": f"{self.url}/lfs/{wanted['oid']}"}
            actions = {"upload": upload, "verify": {"href": upload["href"] + "/verify"}}
            known = wanted["oid"] in self.store
            objects.append({**wanted, "authenticated": True} | ({} if known else {"actions": actions}))
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def lfs_put(self, request: Request) -> Response:
        content = await request.body()
        if hashlib.sha256(content).hexdigest() != request.path_params["sha256"]:
            return refuse(400, "BadObject", "the content does not have this SHA-256")
        self.store[request.path_params["sha256"]] = content
        return Response()

    async def lfs_verify(self, request: Request) -> Response:
        content = self.store.get(request.path_params["sha256"])
        if content is None or len(content) != (await request.json())["size"]:
            return refuse(404, "BadObject", "no such object")
        return JSONResponse({})

    async def commit(self, request: Request) -> Response:
        repository = self._repository(request, write=True)
        if isinstance(repository, Response):
            return repository
        branch = request.path_params["revision"]
        parent = repository.at(branch)
        if parent is None or branch not in repository.references:
            return refuse(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        body = await request.body()
        operations = [json.loads(line) for line in body.splitlines() if line]
        header, files = operations[0]["value"], dict(parent.files)
        if header.get("parentCommit") not in (None, parent.oid):
            return refuse(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
        for operation in operations[1:]:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                content = base64.b64decode(value["content"])
                sha256 = hashlib.sha256(content).hexdigest()
                self.store[sha256] = content
                files[value["path"]] = Blob(git_oid(content), sha256, len(content), is_lfs=False)
            elif kind == "lfsFile":
                if value["oid"] not in self.store:
                    return refuse(400, "BadObject", f"{value['path']}: its LFS object was not uploaded")
                size = len(self.store[value["oid"]])
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {size}\n"
                files[value["path"]] = Blob(git_oid(pointer.encode()), value["oid"], size, is_lfs=True)
            elif kind == "deletedFile":
                del files[value["path"]]
            elif kind == "deletedFolder":
                files = {name: blob for name, blob in files.items() if not name.startswith(value["path"])}
        oid = hashlib.sha1(parent.oid.encode() + body).hexdigest()
        repository.commits.append(Commit(oid, header["summary"], files))
        repository.references[branch] = oid
        repo_id = "{owner}/{name}".format(**request.path_params)
        return JSONResponse({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo_id}/commit/{oid}"})

    # Downloads.

    async def resolve(self, request: Request) -> Response:
        found = self._commit_of(request)
        if isinstance(found, Response):
            return found
        if found[0].gated and self._user(request) != found[0].owner:
            status = 403 if "authorization" in request.headers else 401
            return refuse(status, "GatedRepo", "Access to this repository is restricted")
        commit, path = found[1], request.path_params["path"]
        blob = commit.files.get(path)
        if blob is None:
            missing = refuse(404, "EntryNotFound", "Entry not found")
            missing.headers["X-Repo-Commit"] = commit.oid
            return missing
        etag = f'"{blob.sha256 if blob.is_lfs else blob.oid}"'
        headers = {"X-Repo-Commit": commit.oid, "ETag": etag, "Content-Disposition": f"inline; filename={quote(path)}"}
        if blob.is_lfs:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(blob.size)}
        return self._sent(request, self.store[blob.sha256], headers)

    def _sent(self, request: Request, content: bytes, headers: dict[str, str]) -> Response:
        """The content, or what of it is asked for; broken off where that is wanted."""
        size, start, status = len(content), 0, 200
        if wanted := request.headers.get("range", "").removeprefix("bytes="):
            self.ranges.append(request.headers["range"])
            start, status = int(wanted.split("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        content, pattern = content[start:], next((p for p in self.cut if fnmatch(request.url.path, p)), None)
        if request.method == "HEAD" or pattern is None:
            return Response(content, status, headers, "application/octet-stream")
        headers["Content-Length"], kept = str(len(content)), content[: self.cut.pop(pattern)]

        async def body():
            yield kept  # and no more, though more was promised: the server closes the connection

        return StreamingResponse(body(), status, headers, "application/octet-stream")
