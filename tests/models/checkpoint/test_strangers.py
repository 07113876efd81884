"""Folders of strangers: nothing is read or written outside them, nothing hangs, and nothing large is built."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from turnout.errors import CheckpointError, StorageError, TurnoutError
from turnout.models import LM, LMConfig, MoEConfig, checkpoint
from turnout.models.checkpoint import PeftAdapter, write_adapter
from turnout.reshape import attach_folder, save_adapters
from turnout.storage import write_whole
from turnout.train.data import load_tokenizer, train_tokenizer
from turnout.train.folder import locked
from turnout.train.metrics import Metrics
from turnout.types import TraceWriter

INDEX = "model.safetensors.index.json"


def model() -> LM:
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=4, top_k=2, hidden=8, router_options={"renormalize": True})
    return LM(LMConfig(vocab_size=32, width=16, layers=2, heads=2, hidden=24, max_seq=64, moe=moe))


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A folder of transformers in several shards, in a folder of its own."""
    folder = tmp_path / "home" / "model"
    checkpoint.to_hf(model(), folder, shard_bytes=8_000)
    train_tokenizer(["a cat, a cat"], vocab_size=258).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def own(tmp_path) -> Path:
    folder = tmp_path / "home" / "own"
    checkpoint.save(folder, model())
    return folder


def keys(path: Path, **changed: object) -> None:
    body = json.loads((path / "config.json").read_text()) | changed
    (path / "config.json").write_text(json.dumps(body))


def elsewhere(folder: Path, name: str) -> None:
    """The index names a file of another place, and that file is a readable twin of the shard."""
    index = json.loads((folder / INDEX).read_text())
    shard = sorted(set(index["weight_map"].values()))[0]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / shard, folder / name)
    index["weight_map"] = {key: name if file == shard else file for key, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("place", ["../victim.safetensors", "{absolute}", "sub/victim.safetensors", ".", "..", ""])
def test_an_index_that_names_another_place_is_refused(place, sharded, tmp_path) -> None:
    place = place.replace("{absolute}", str(tmp_path / "victim.safetensors"))
    if "victim" in place:
        elsewhere(sharded, place)
    else:
        index = json.loads((sharded / INDEX).read_text())
        index["weight_map"] = dict.fromkeys(index["weight_map"], place)
        (sharded / INDEX).write_text(json.dumps(index))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for use in (checkpoint.peek, checkpoint.from_hf):
        with pytest.raises(CheckpointError, match="where the plain name of a file belongs"):
            use(sharded)
    # Nor is it taken over when a model is written like that folder.
    written = tmp_path / "written"
    checkpoint.to_hf(model(), written, like=sharded, shard_bytes=8_000)
    assert {file: file.read_bytes() for file in before} == before
    assert all("/" not in name for name in json.loads((written / INDEX).read_text())["weight_map"].values())


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00001-of-*.safetensors", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused_and_not_copied(name, sharded, tmp_path) -> None:
    lm = checkpoint.from_hf(sharded)
    file = next(sharded.glob(name))
    secret = tmp_path / "secret"
    file.rename(secret)
    file.symlink_to(secret)
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_tokenizer(file) if name == "tokenizer.json" else checkpoint.from_hf(sharded)
    if name == "tokenizer.json":
        for write in (lambda: checkpoint.to_hf(lm, tmp_path / "out"), lambda: checkpoint.save(tmp_path / "out", lm)):
            with pytest.raises(CheckpointError, match="outside its folder"):
                write()
            assert not list((tmp_path / "out").rglob("tokenizer*"))


def test_the_layout_of_the_hubs_cache_works(sharded, tmp_path) -> None:
    want = checkpoint.from_hf(sharded)
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "0a1b", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    lm = checkpoint.from_hf(snapshot)
    assert torch.equal(lm.embedding, want.embedding)
    checkpoint.to_hf(lm, tmp_path / "out")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert load_tokenizer(tmp_path / "out").get_vocab_size() == load_tokenizer(snapshot).get_vocab_size() == 258


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


HUGE: dict[str, Callable[[Path], None]] = {
    "layers": lambda path: keys(path, num_hidden_layers=100_000),
    "more layers": lambda path: keys(path, num_hidden_layers=2**31 - 1),
    "experts": lambda path: keys(path, num_local_experts=10_000_000),
    "experts beyond all": lambda path: keys(path, num_local_experts=2**62),
    "vocabulary": lambda path: keys(path, vocab_size=10**9),
    "width": lambda path: keys(path, hidden_size=2**30, num_attention_heads=2**10),
    "heads": lambda path: keys(path, num_attention_heads=2**30 + 7, num_key_value_heads=3, head_dim=2),
    "a factor to be found": lambda path: keys(path, num_attention_heads=3, hidden_size=2**31 - 1),
    "a negative size": lambda path: keys(path, num_hidden_layers=-(10**18)),
    "words": lambda path: keys(path, hidden_size="16"),
    "a fraction": lambda path: keys(path, num_local_experts=4.5),
    "true": lambda path: keys(path, num_hidden_layers=True),
    "a list of architectures that is none": lambda path: keys(path, architectures="MixtralForCausalLM"),
    "rope of another type": lambda path: keys(path, rope_parameters=[1]),
    "a theta of another type": lambda path: keys(path, rope_parameters={"rope_theta": "1e4", "rope_type": "default"}),
    "quantised by a word": lambda path: keys(path, quantization_config="mxfp4"),
    "a zero device": lambda path: ((path / "config.json").unlink(), (path / "config.json").symlink_to("/dev/zero"))[1],
    "a pipe": lambda path: pipe(path / "config.json"),
    "weights that are a pipe": lambda path: pipe(max(path.glob("model-*.safetensors"))),
    "an index that is a list": lambda path: (path / INDEX).write_text("[]") and None,
    "a weight map that is a list": lambda path: (path / INDEX).write_text('{"weight_map": []}') and None,
    "a shard that is a number": lambda path: (
        (path / INDEX).write_text('{"weight_map": {"lm_head.weight": 1}}') and None
    ),
    "deep": lambda path: (path / "config.json").write_text('{"a":' * 100_000) and None,
}


@pytest.mark.parametrize("name", HUGE)
def test_a_configuration_beyond_its_weights_is_refused_at_once(name, sharded) -> None:
    HUGE[name](sharded)
    begin = time.process_time()
    with pytest.raises(TurnoutError):
        checkpoint.from_hf(sharded)
    assert time.process_time() - begin < 5, "of the processor's time, not a clock's"


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 10**6},
        {"layers": 2**40},
        {"vocab_size": 10**9},
        {"width": 2**20},
        {"moe": {"num_experts": 10**7}},
        {"moe": {"hidden": 10**9}},
        {"moe": {"shared_hidden": 10**9}},
        {"hidden": 10**9, "moe": {"layers": [0]}},
        {"heads": 2**20, "head_dim": 2},
    ],
    ids=str,
)
def test_own_configurations_beyond_their_weights_are_refused_at_once(change, own) -> None:
    body = json.loads((own / "config.json").read_text())
    del body["sha256"]
    moe = body["model"]["moe"] | change.pop("moe", {})
    body["model"] |= change | {"moe": moe}
    (own / "config.json").write_text(json.dumps(body))
    begin = time.process_time()
    for use in (checkpoint.load, checkpoint.peek):
        with pytest.raises(CheckpointError, match=r"be of these weights|be below 2,147,483,648"):
            use(own)
    assert time.process_time() - begin < 5, "of the processor's time, not a clock's"


def header(path: Path, change: Callable[[bytes], bytes]) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + size])
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def test_headers_are_read_with_bounds(tmp_path) -> None:
    folder, file = tmp_path / "a", tmp_path / "a" / "model.safetensors"
    checkpoint.to_hf(model(), folder)
    good = file.read_bytes()
    name = b'"model.norm.weight"'
    entry = good[good.index(name) :].split(b"}")[0] + b"}"
    cases: dict[str, Callable[[], object]] = {
        "the key 'model.norm.weight' twice": lambda: header(
            file, lambda text: text.rstrip()[:-1] + b"," + entry + b"}"
        ),
        "a header of 9,223,372,036,854,775,807 bytes": lambda: file.write_bytes(
            (2**63 - 1).to_bytes(8, "little") + good[8:]
        ),
        "a header of 0 bytes": lambda: file.write_bytes(b""),
        "nested deeper": lambda: header(file, lambda text: b'{"a":' * 5000),
        "'a' is 3, which must be dict": lambda: header(file, lambda text: b'{"a":3}'),
    }
    for says, harm in cases.items():
        file.write_bytes(good)
        harm()
        with pytest.raises(CheckpointError, match=says):
            checkpoint.from_hf(folder)


def test_a_token_with_a_huge_id_is_refused(sharded) -> None:
    body = json.loads((sharded / "tokenizer.json").read_text())
    for change in ({"vocab": body["model"]["vocab"] | {"a cat": 2**31}}, {"vocab": body["model"]["vocab"] | {"x": -1}}):
        (sharded / "tokenizer.json").write_text(json.dumps(body | {"model": body["model"] | change}))
        with pytest.raises(CheckpointError, match="the token id"):
            load_tokenizer(sharded)
    added = [body["added_tokens"][0] | {"id": 2**31}]
    (sharded / "tokenizer.json").write_text(json.dumps(body | {"added_tokens": added}))
    with pytest.raises(CheckpointError, match="the token id 2147483648"):
        load_tokenizer(sharded)


@pytest.mark.parametrize("name", ["..", "../a", "/tmp", "", 3, "a\0b"])
def test_a_choice_of_adapters_names_its_own_folders(name, tmp_path) -> None:
    write_adapter(tmp_path / "a", PeftAdapter("a", None, {"0": (torch.ones(2, 8), torch.ones(4, 2), 1.0)}))
    save_adapters(tmp_path / "out", [tmp_path / "a"], router="arrow")
    body = json.loads((tmp_path / "out" / "adapters.json").read_text())
    (tmp_path / "out" / "adapters.json").write_text(json.dumps(body | {"adapters": [name]}))
    with pytest.raises(CheckpointError):
        attach_folder(torch.nn.Sequential(torch.nn.Linear(8, 4)), tmp_path / "out")


def test_an_adapter_behind_a_link_is_not_copied(tmp_path) -> None:
    write_adapter(tmp_path / "a", PeftAdapter("a", None, {"0": (torch.ones(2, 8), torch.ones(4, 2), 1.0)}))
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "a" / "notes.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="outside its folder"):
        save_adapters(tmp_path / "out", [tmp_path / "a"], router="arrow")


def test_nothing_is_written_through_a_link(tmp_path) -> None:
    victim, out = tmp_path / "victim", tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "config.json.part", "model.safetensors", "model.safetensors.part"):
        (out / name).symlink_to(victim)
    checkpoint.save(out, model())
    assert not victim.exists() and not (out / "config.json").is_symlink()
    checkpoint.load(out)
    (tmp_path / "note.part").symlink_to(victim)
    for content in ("text", b"bytes", lambda aside: save_file({"a": torch.ones(1)}, aside)):
        write_whole(tmp_path / "note", content)
        (tmp_path / "note.part").symlink_to(victim)
    assert not victim.exists()
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(StorageError, match="not a link"):
        Metrics(run / "metrics.jsonl")
    (run / ".lock").symlink_to(victim)
    with pytest.raises(StorageError, match="not a link"), locked(run):
        pass
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "document.bin").symlink_to(victim)
    with TraceWriter(tmp_path / "trace", num_experts_L=[2], domains=["a"]):
        pass
    assert not victim.exists()


def test_a_link_within_the_folder_is_what_it_leads_to(own) -> None:
    (own / "model.safetensors").rename(own / "weights")
    (own / "model.safetensors").symlink_to("weights")
    assert torch.equal(checkpoint.load(own).embedding, model().embedding)
    assert load_file(own / "weights")
