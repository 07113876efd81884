"""Models of the hub: found in a cache as huggingface_hub lays it out, downloaded by a stand-in; the network is off."""

import fnmatch
import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from turnout import hub
from turnout.cli.early import check_there
from turnout.errors import CheckpointError, StorageError, UsageError
from turnout.hub import is_hub_id, located

HASH, OTHER = "a" * 40, "b" * 40
FILES: dict[str, object] = {
    "config.json": {"model_type": "llama"},
    "tokenizer.json": {},
    "model.safetensors.index.json": {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}},
    "model-1.safetensors": None,
    "model-2.safetensors": None,
    "pytorch_model.bin": None,
    "original/consolidated.safetensors": None,
    "model.fp16.safetensors": None,
}


def put(place: Path, content: object) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.suffix == ".safetensors":
        save_file({"x": torch.ones(1)}, place)
    else:
        place.write_text(json.dumps(content))


def snapshot(cache: Path, repo: str, commit: str, names: list[str], *, ref: str | None = "main") -> Path:
    """A commit in the cache: links of blobs, and the branch that names it."""
    home = cache / f"models--{repo.replace('/', '--')}"
    folder = home / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        blob = home / "blobs" / f"{commit[:4]}-{name.replace('/', '-')}"
        put(blob, FILES.get(name, {}))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(blob)
    if ref is not None:
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / ref).write_text(commit)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, the network off, and a working folder with nothing in it."""
    place, here = tmp_path / "cache", tmp_path / "here"
    place.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return place


WHOLE = ["config.json", "tokenizer.json", "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"]


def test_what_reads_as_a_name() -> None:
    assert all(map(is_hub_id, ("org/name", "a/b@main", "a/b@refs/pr/1", "Qwen/Qwen3-0.6B", f"a/b@{HASH}")))
    wrong = ("name", "./a/b", "/a/b", "a/b/c", "a/b@", "a/b@../../x", "a/..", "a/b--c", "a/b c", "", "~/a", "a/b@-x")
    assert not any(map(is_hub_id, wrong)), [one for one in wrong if is_hub_id(one)]


def test_a_name_is_the_commit_of_main_and_a_revision_its_own(cache: Path) -> None:
    main = snapshot(cache, "org/name", HASH, WHOLE)
    other = snapshot(cache, "org/name", OTHER, WHOLE, ref="v2")
    for given, folder, commit in (
        ("org/name", main, HASH),
        ("org/name@main", main, HASH),
        ("org/name@v2", other, OTHER),
        (f"org/name@{OTHER}", other, OTHER),
    ):
        found = located(given)
        assert (found.folder, found.repo, found.revision) == (folder, "org/name", commit)
        assert found.name == found.source == f"org/name@{commit}"
        assert located(found.source).folder == folder


def test_transformers_finds_the_same_commit(cache: Path) -> None:
    library = pytest.importorskip("transformers")
    snapshot(cache, "org/name", OTHER, WHOLE, ref="v2")
    snapshot(cache, "org/name", HASH, WHOLE)
    for revision in ("main", "v2", OTHER):
        theirs = library.utils.cached_file("org/name", "config.json", revision=revision, cache_dir=cache)
        assert Path(theirs).parent == located(f"org/name@{revision}").folder


def test_a_branch_whose_file_ends_in_a_newline_is_found_as_transformers_finds_it(cache: Path) -> None:
    folder = snapshot(cache, "org/name", HASH, WHOLE)
    (cache / "models--org--name" / "refs" / "main").write_text(f"{HASH}\n")  # as echo writes it, not huggingface_hub
    assert located("org/name").folder == located("org/name@main").folder == folder
    assert located("org/name").source == f"org/name@{HASH}"
    (cache / "models--org--name" / "refs" / "main").write_text("../../elsewhere\n")
    with pytest.raises(UsageError, match="not in the cache"):
        located("org/name")


def test_a_name_without_an_owner_is_found_in_the_cache(cache: Path) -> None:
    folder = snapshot(cache, "gpt2", HASH, WHOLE)
    found = located("gpt2")
    assert found.folder == folder and found.repo == "gpt2" and found.revision == HASH
    assert found.source == str(folder), "which names the same commit from any working folder"
    check_there("PATH", ["gpt2"], "turnout convert", hub=True)
    assert located("gpt3").repo is None
    with pytest.raises(UsageError, match=r"gpt3, which does not exist.*ORG/gpt3"):
        check_there("PATH", ["gpt3"], "turnout convert", hub=True)
    Path("gpt2").mkdir()
    assert located("gpt2").repo is None, "a folder comes first"


def test_a_folder_of_that_name_wins(cache: Path) -> None:
    snapshot(cache, "org/name", HASH, WHOLE)
    Path("org/name").mkdir(parents=True)
    found = located("org/name")
    assert (found.folder, found.repo, found.name) == (Path("org/name"), None, "org/name")
    assert found.source == str(Path("org/name").resolve())
    assert located("neither/a/name").folder == Path("neither/a/name")


@pytest.mark.parametrize("below", ["", "snapshots", f"snapshots/{HASH}"])
def test_a_folder_of_the_cache_is_its_snapshot(below: str, cache: Path) -> None:
    want = snapshot(cache, "org/name", HASH, WHOLE)
    snapshot(cache, "org/name", OTHER, WHOLE, ref=None)
    found = located(cache / "models--org--name" / below)
    assert (found.folder.resolve(), found.repo, found.revision) == (want.resolve(), "org/name", HASH)
    assert found.name == str(cache / "models--org--name" / below)


def test_of_several_snapshots_without_main_one_is_to_be_named(cache: Path) -> None:
    snapshot(cache, "org/name", HASH, WHOLE, ref=None)
    assert located(cache / "models--org--name").revision == HASH
    snapshot(cache, "org/name", OTHER, WHOLE, ref="v2")
    with pytest.raises(UsageError, match=rf"one snapshot.*2: {HASH}, {OTHER}.*name .*snapshots/{HASH}"):
        located(cache / "models--org--name")


def test_offline_what_is_not_there_is_refused_with_the_way_to_get_it(cache: Path) -> None:
    with pytest.raises(UsageError, match=r"org/name@v2, which is not in the cache at .*cache.*--revision v2") as error:
        located("org/name@v2", where="turnout eval")
    assert "turnout eval" in str(error.value) and "HF_HUB_OFFLINE" in str(error.value)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (WHOLE[:-1], r"lacks 1: model-2\.safetensors.*hf download org/name --revision a{40}"),
        (["config.json", "pytorch_model.bin"], r"lacks 1: model\.safetensors.*pickles are never read"),
        (["adapter_config.json"], r"lacks 1: adapter_model\.safetensors"),
        (["README.md"], "hold config.json or adapter_config.json"),
    ],
)
def test_a_snapshot_that_is_not_whole_is_refused(names: list[str], said: str, cache: Path) -> None:
    snapshot(cache, "org/name", HASH, names)
    with pytest.raises(CheckpointError, match=said):
        located("org/name")


@pytest.mark.parametrize("asked", ["../../secret.json", "a/b.safetensors", ""])
def test_a_config_does_not_lead_out_of_its_folder(asked: str, cache: Path) -> None:
    folder = snapshot(cache, "org/name", HASH, ["config.json"])
    (folder / "config.json").write_text(json.dumps({"transformers_weights": asked}))
    with pytest.raises(CheckpointError, match="plain name"):
        located("org/name")


@pytest.fixture
def online(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """A hub with one repository, whose files are fetched into the cache; every call is noted."""
    calls: list[dict[str, object]] = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool = False) -> str:
        assert repo == "org/name" and not local_files_only
        names = [name for name in FILES if any(fnmatch.fnmatchcase(name, one) for one in allow_patterns)]
        folder = cache / "models--org--name" / "snapshots" / HASH
        new = [name for name in names if not (folder / name).exists()]
        calls.append({"revision": revision, "new": new})
        return str(snapshot(cache, "org/name", HASH, new))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_online_what_is_needed_is_downloaded_and_no_more(online: list[dict[str, object]]) -> None:
    found = located("org/name")
    assert found.name == f"org/name@{HASH}"
    assert [call["revision"] for call in online] == [None, HASH]  # the weights are of the very commit
    assert set(online[0]["new"]) == {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert set(online[1]["new"]) == {"model-1.safetensors", "model-2.safetensors"}
    located("org/name")
    assert len(online) == 3 and not online[2]["new"]


def test_zipped_weights_are_downloaded_where_there_are_no_others(
    online: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    zipped = {f"{name}.zipnn": FILES[name] for name in WHOLE if name.endswith(".safetensors")}
    for name, body in zipped.items():
        monkeypatch.setitem(FILES, name, body)
        monkeypatch.delitem(FILES, name.removesuffix(".zipnn"))
    found = located("org/name")
    assert {name for call in online for name in call["new"] if "model-" in name} == set(zipped)
    assert [call["revision"] for call in online] == [None, HASH, HASH]
    located("org/name")
    assert len(online) == 4 and not online[3]["new"]
    (found.folder / "model-2.safetensors.zipnn").unlink()
    monkeypatch.delitem(FILES, "model-2.safetensors.zipnn")
    with pytest.raises(CheckpointError, match=r"lacks 1: model-2\.safetensors"):
        located("org/name")


def fail(error: Callable[[], Exception]) -> Callable[..., str]:
    def download(repo: str, *, local_files_only: bool = False, **_: object) -> str:
        raise error()

    return download


def response(kind: type) -> Exception:
    made = kind.__new__(kind)
    Exception.__init__(made, "no")
    return made


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (lambda: response(errors.RepositoryNotFoundError), UsageError, "neither.*check the spelling"),
        (lambda: response(errors.RevisionNotFoundError), UsageError, "neither.*check the spelling"),
        (lambda: response(errors.GatedRepoError), UsageError, "gated.*accept its terms"),
        (lambda: errors.LocalEntryNotFoundError("away"), UsageError, "a hub that can be reached"),
        (lambda: OSError(28, "No space left on device"), StorageError, "on a disk with room"),
        (lambda: ConnectionResetError("reset by peer"), StorageError, "the download must succeed.*reset by peer"),
    ],
)
def test_what_the_hub_refuses_is_said_in_our_words(
    error: Callable[[], Exception], kind: type, said: str, online: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail(error))
    with pytest.raises(kind, match=said):
        located("org/name")


def test_where_the_hub_is_out_of_reach_the_cache_will_do(
    cache: Path, online: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = snapshot(cache, "org/name", HASH, WHOLE)

    def download(repo: str, *, local_files_only: bool = False, **_: object) -> str:
        if not local_files_only:
            raise errors.LocalEntryNotFoundError("away")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert located("org/name").folder == folder


def test_the_command_line_knows_a_name_from_a_typo(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot(cache, "org/name", HASH, WHOLE)
    check_there("PATH", ["org/name"], "turnout convert", hub=True)
    with pytest.raises(UsageError, match="org/name, which does not exist"):
        check_there("--prompts", ["org/name"], "turnout certify")
    Path("models/mixtral").mkdir(parents=True)
    with pytest.raises(UsageError, match="did you mean models/mixtral"):
        check_there("PATH", ["models/mixtrl"], "turnout convert", hub=True)
    with pytest.raises(UsageError, match="not in the cache"):
        check_there("PATH", ["org/other"], "turnout convert", hub=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "located", None)
    check_there("PATH", ["org/other"], "turnout convert", hub=True)  # the hub is asked later
