"""Models of the hub: ``org/name`` in the cache of huggingface_hub, which transformers shares, or downloaded there."""

import dataclasses
import glob
import re
from pathlib import Path

from turnout import reading
from turnout.errors import CheckpointError, StorageError, TurnoutError, UsageError, word

__all__ = ["Located", "is_hub_id", "located", "offline"]

# As the hub allows names, and git those of branches: refs/pr/1.
_ID = re.compile(r"(?P<repo>\w[\w.-]{0,95}/\w[\w.-]{0,95})(?:@(?P<revision>\w[\w.-]*(?:/[\w.-]+)*))?", re.ASCII)
# The small files: configurations, tokenizers and what they name, templates, licences. Nothing that is a pickle.
_SMALL = [f"*{kind}" for kind in (".json", ".txt", ".model", ".jinja", ".md", ".vocab", ".codes", ".tiktoken", ".spm")]
_SMALL += ["*.py", "LICENSE", "NOTICE"]  # code that a tokenizer brings is carried along, and never run
_SINGLE, _INDEX, _ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
_OPTIONAL = ["phatgoose.safetensors"]  # gates beside an adapter
_ZIPPED = ".zipnn"  # behind the name of a file of weights that turnout convert --zip wrote
_CACHED = "models--"


@dataclasses.dataclass(frozen=True)
class Located:
    """Where a model is.

    Args:
        folder: that holds it.
        given: what was asked for.
        repo: its name on the hub, "org/name"; None for a folder outside the cache.
        revision: the hash of the commit.
        by_id: whether it was asked for by its name on the hub.

    >>> Located(Path("cache/snapshots/0a1b"), "org/name", "org/name", "0a1b", True).source
    'org/name@0a1b'

    Source: none; plain bookkeeping.
    """

    folder: Path
    given: str
    repo: str | None = None
    revision: str | None = None
    by_id: bool = False

    @property
    def name(self) -> str:
        """What to call it: the path as it was given, or the name on the hub with the commit that was found."""
        return f"{self.repo}@{self.revision}" if self.by_id else self.given

    @property
    def source(self) -> str:
        """What names it again, from any working folder and also when a newer commit is there."""
        return self.name if self.by_id else str(Path(self.given).resolve())


def is_hub_id(text: str | Path) -> bool:
    """Whether it reads as ``org/name`` or ``org/name@revision``, which may also be a path.

    >>> is_hub_id("org/name@main"), is_hub_id("./org/name"), is_hub_id("models/x/y")
    (True, False, False)

    Source: the names that the hub allows.
    """
    found = _ID.fullmatch(text if isinstance(text, str) else text.as_posix())
    return found is not None and ".." not in found[0] and "--" not in found["repo"]


def offline() -> bool:
    """Whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) keeps everyone from asking the hub.

    >>> isinstance(offline(), bool)
    True

    Source: the environment variables of huggingface_hub.
    """
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def located(path: str | Path, *, where: str = "turnout") -> Located:
    """The folder of a model: the path itself where there is one, else a snapshot in the cache of the hub.

    ``org/name`` is the commit that the branch main is at, ``org/name@revision`` that of another branch, a tag or a
    commit. A name without an owner, ``gpt2`` as it was once called, is looked for in the cache alone. Unless
    HF_HUB_OFFLINE is set the hub is asked, and what the cache lacks is downloaded: configurations, the
    tokenizer's files and safetensors, zipped ones where there are no others, never pickles. A folder
    ``models--org--name`` of a cache is its snapshot.

    Args:
        path: a folder, or a name on the hub; what is neither is given back as it is, for the reader to refuse.
        where: the function or command that asks.

    Raises:
        UsageError: a name that is not in the cache, offline, or not on the hub; or a folder of several snapshots.
        CheckpointError: a snapshot without all of its weights.
        StorageError: it cannot be downloaded.

    >>> located("no/such/folder").repo is None
    True

    Source: the layout of huggingface_hub's cache.
    """
    folder, given = Path(path), str(path)
    if folder.exists() or folder.is_symlink():
        folder = _snapshot(folder, where)
        cached = folder.resolve()
        home = cached.parent.parent
        if cached.parent.name == "snapshots" and home.name.startswith(_CACHED):
            return Located(folder, given, home.name.removeprefix(_CACHED).replace("--", "/"), cached.name)
        return Located(folder, given)
    if not is_hub_id(path):
        old = _of_nobody(given)
        return Located(folder, given) if old is None else located(_snapshot(old, where), where=where)
    found = _ID.fullmatch(Path(path).as_posix())
    assert found is not None
    repo, revision = found["repo"], found["revision"]
    folder = _cached(repo, revision, where) if offline() else _fetched(repo, revision, where)
    _check_whole(folder, repo, where)
    return Located(folder, given, repo, folder.name, by_id=True)


def _snapshot(folder: Path, where: str) -> Path:
    """The snapshot in a folder of the cache: that of main, or the only one; any other folder as it is."""
    home = folder.parent if folder.name == "snapshots" else folder
    if not home.resolve().name.startswith(_CACHED) or not (home / "snapshots").is_dir():
        return folder
    there = sorted(place.name for place in (home / "snapshots").iterdir() if place.is_dir())
    main = reading.read_text(home / "refs" / "main", limit=200).strip() if (home / "refs" / "main").is_file() else ""
    if main in there or len(there) == 1:
        return home / "snapshots" / (main if main in there else there[0])
    got = f"{folder}, which holds " + (f"{len(there)}: {', '.join(there[:4])}" if there else "none")
    fix = f"name {home / 'snapshots' / there[0]}" if there else f"download it: hf download {_repo_of(home)}"
    raise UsageError(word("the folder of the cache", got=got, allowed="have one snapshot", where=where, fix=fix))


def _of_nobody(name: str) -> Path | None:
    """The folder of the cache for a name without an owner, as the first models of the hub had; None where none is."""
    if re.fullmatch(r"\w[\w.-]{0,95}", name, re.ASCII) is None or "--" in name:
        return None
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / f"{_CACHED}{name}"
    return home if (home / "snapshots").is_dir() else None


def _repo_of(home: Path) -> str:
    return home.resolve().name.removeprefix(_CACHED).replace("--", "/")


def _cached(repo: str, revision: str | None, where: str) -> Path:
    """The snapshot of a revision in the cache; nothing is asked of the hub."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        # Of what was cached with it, the snapshot must have these; whether its weights are there is seen later.
        small = ["config.json", "adapter_config.json"]
        found = snapshot_download(repo, revision=revision, allow_patterns=small, local_files_only=True)
    except errors.LocalEntryNotFoundError as error:
        if (folder := _of_ref(repo, revision)) is not None:
            return folder
        wanted = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
        got = f"{_shown(repo, revision)}, which is not in the cache at {constants.HF_HUB_CACHE}, and no folder"
        allowed, fix = "be a folder, or in the cache while HF_HUB_OFFLINE is set", f"unset it and run: {wanted}"
        if not offline():
            allowed, fix = "be a folder, in the cache, or on a hub that can be reached", f"online, run: {wanted}"
        raise UsageError(word("the model", got=got, allowed=allowed, where=where, fix=fix)) from error
    return Path(found)


def _of_ref(repo: str, revision: str | None) -> Path | None:
    """The snapshot of a branch whose file was written by hand, and so ends in a newline: transformers finds it too."""
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / f"{_CACHED}{repo.replace('/', '--')}"
    ref = home / "refs" / (revision or "main")
    commit = reading.read_text(ref, limit=200).strip() if ref.is_file() else ""
    folder = home / "snapshots" / commit
    return folder if re.fullmatch(r"[0-9a-f]{40}", commit) and folder.is_dir() else None


def _fetched(repo: str, revision: str | None, where: str) -> Path:
    """The snapshot of a revision as the hub has it now, with what it lacks downloaded; progress is shown."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_SMALL))
        if (folder / "adapters.json").is_file():
            snapshot_download(repo, revision=folder.name, allow_patterns=["*.safetensors"])
        elif _lacking(folder):
            exactly = [glob.escape(name) for names in (*_weights(folder), _OPTIONAL) for name in names]
            snapshot_download(repo, revision=folder.name, allow_patterns=exactly)
            if _lacking(folder):  # zipped ones only where there are no others
                zipped = [name + _ZIPPED for name in exactly]
                snapshot_download(repo, revision=folder.name, allow_patterns=zipped)
        return folder
    except errors.LocalEntryNotFoundError:  # the hub is out of reach: as transformers, take what is there
        return _cached(repo, revision, where)
    except TurnoutError:
        raise
    except Exception as error:  # of the hub, of HTTP, of the disk: whichever library it comes from
        raise _refused(error, repo, revision, where) from error


def _refused(error: Exception, repo: str, revision: str | None, where: str) -> TurnoutError:
    """The error for what the hub said, or the disk."""
    from huggingface_hub import errors

    from turnout.storage import read_error  # not at the top: it loads torch

    shown, first = _shown(repo, revision), (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    allowed = "be a folder, or a model on the hub"
    if isinstance(error, errors.GatedRepoError):
        fix = f"accept its terms at https://huggingface.co/{repo}, and log in: hf auth login"
        return UsageError(word("the model", got=f"{shown}, which is gated", allowed=allowed, where=where, fix=fix))
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError | errors.HFValidationError):
        fix = "check the spelling; where it is private, log in: hf auth login"
        return UsageError(word("the model", got=f"{shown}, which is neither", allowed=allowed, where=where, fix=fix))
    if isinstance(error, OSError) and error.errno is not None:
        return read_error(error, error.filename or shown, where)
    fix = "try again: what is there is not downloaded twice"
    return StorageError(word("the download", got=f"{shown}: {first}", allowed="succeed", where=where, fix=fix))


def _weights(folder: Path) -> list[list[str]]:
    """The files of weights, as the small files name them: any of these lists will do, and the first is preferred."""
    if not (folder / "config.json").is_file():
        return [[_ADAPTER]] if (folder / "adapter_config.json").is_file() else []

    def refuse(problem: str) -> CheckpointError:
        fix = "download the repository again; if it comes so, do not trust the model"
        return CheckpointError(word("the snapshot", got=problem, allowed="be sound", where=str(folder), fix=fix))

    asked = reading.read_json(folder / "config.json", refuse=refuse).get("transformers_weights")
    index = folder / (_INDEX if asked is None else reading.plain_name(asked, refuse))
    single = [[_SINGLE]] if asked is None else []
    if index.suffix != ".json":
        return [[index.name]]
    if not index.is_file():
        return single
    body = reading.read_json(index, refuse=refuse)
    reading.check_fields(body, {"weight_map": dict[str, str]}, refuse)
    return [*single, sorted({reading.plain_name(name, refuse) for name in body["weight_map"].values()})]


def _lacking(folder: Path) -> list[str]:
    """The files of weights that are not there, as they are or zipped; none where one way to hold them is whole."""

    def there(name: str) -> bool:
        return (folder / name).is_file() or (folder / f"{name}{_ZIPPED}").is_file()

    missing = [[name for name in names if not there(name)] for names in _weights(folder)]
    return missing[-1] if missing and all(missing) else []


def _check_whole(folder: Path, repo: str, where: str) -> None:
    """Refuses a snapshot that holds no model or adapter, or lacks some of its weights."""
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json", "adapters.json")):
        got, fix = f"{repo} in {folder}, which has neither", "name a repository that holds a model or an adapter"
        allowed = "hold config.json or adapter_config.json"
        raise CheckpointError(word("the snapshot", got=got, allowed=allowed, where=where, fix=fix))
    if lacks := _lacking(folder):
        got = f"{repo} in {folder}, which lacks {len(lacks)}: {', '.join(lacks[:3])}"
        fix = f"download them: hf download {repo} --revision {folder.name}; where it has no safetensors, "
        fix += "save it again with transformers: pickles are never read"
        raise CheckpointError(word("the snapshot", got=got, allowed="hold all weights", where=where, fix=fix))


def _shown(repo: str, revision: str | None) -> str:
    return f"{repo}@{revision}" if revision else repo
