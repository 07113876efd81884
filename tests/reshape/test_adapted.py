"""A choice of adapters goes to disk and comes back; each adapter in it is still a folder of PEFT."""

import json

import pytest
import torch
from torch import nn

from turnout.errors import CheckpointError, StorageError, UsageError
from turnout.models.checkpoint import PeftAdapter, read_adapter, write_adapter
from turnout.reshape import (
    attach,
    attach_folder,
    attach_shards,
    save_adapters,
    save_attached,
    save_routers,
    save_shards,
)


def folders(tmp_path):
    chance = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        factor = {"0": (torch.randn(2, 8, generator=chance), torch.randn(4, 2, generator=chance), 0.5)}
        write_adapter(tmp_path / name, PeftAdapter(name, "tiny", factor))
    return [tmp_path / "a", tmp_path / "b"]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 4))


def test_what_comes_back_computes_the_same(tmp_path):
    options = {"top_k": 2, "temperature": 0.5}
    save_adapters(tmp_path / "out", folders(tmp_path), router="arrow", router_options=options)
    wanted, _ = attach(model(), folders(tmp_path), router="arrow", router_options=options)
    got, report = attach_folder(model(), tmp_path / "out")
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(got(x), wanted(x)) and report["adapters"] == ["a", "b"]
    assert read_adapter(tmp_path / "out" / "adapters" / "a").base == "tiny"


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    save_adapters(tmp_path / "out", folders(tmp_path), router="arrow")
    body = json.loads((tmp_path / "out" / "adapters.json").read_text())
    wrongs = [{"format": "else"}, {**body, "router": 3}, {**body, "router_options": [1]}]
    wrongs += [{**body, "adapters": names} for names in (["../../a"], "a", [3], [None], [""], None, {"a": 1})]
    for wrong in wrongs:
        (tmp_path / "out" / "adapters.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="adapters"):
            attach_folder(model(), tmp_path / "out")
    (tmp_path / "out" / "adapters.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapters\.json"):
        attach_folder(model(), tmp_path / "out")


def test_nothing_is_written_over_and_nothing_half(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        write_adapter(path, PeftAdapter(path.name, None, {"0": (torch.ones(2, 8), torch.ones(4, 2), 1.0)}))
    save_adapters(tmp_path / "out", paths, router="arrow")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    live, _ = attach(nn.Sequential(nn.Linear(8, 4)), paths)
    for taken in ("out", "a", "file", "link"):
        with pytest.raises(UsageError, match="be new or empty"):
            save_adapters(tmp_path / taken, paths, router="arrow")
        with pytest.raises(UsageError, match="be new or empty"):
            save_attached(tmp_path / taken, live)
    for wrong in (live, str(paths[0]), [live]):
        with pytest.raises(UsageError, match=r"adapters must be a list of folders of PEFT.*save_attached"):
            save_adapters(tmp_path / "new", wrong, router="arrow")
    (tmp_path / "empty").mkdir()
    save_attached(tmp_path / "empty", live)
    attach_folder(nn.Sequential(nn.Linear(8, 4)), tmp_path / "empty")
    for wrong, said in (
        ({"router": "arow"}, "Did you mean 'arrow'"),
        ({"router": "arrow", "router_options": {"topk": 1}}, "Did you mean 'top_k'"),
        ({"router": "arrow", "router_options": {"top_k": 3}}, "number of adapters, 2"),
    ):
        with pytest.raises(UsageError, match=said):
            save_adapters(tmp_path / "new", paths, **wrong)
    with pytest.raises(UsageError, match="each of its own name"):
        save_adapters(tmp_path / "new", [paths[0], paths[0]], router="arrow")
    with pytest.raises(CheckpointError):
        save_adapters(tmp_path / "new", [paths[0], tmp_path / "out"], router="arrow")
    assert not (tmp_path / "new").exists()
    odd, _ = attach(nn.Sequential(nn.Linear(8, 4)), [PeftAdapter("../odd", None, read_adapter(paths[0]).factor)])
    with pytest.raises(UsageError, match="may be a folder's"):
        save_attached(tmp_path / "new", odd)
    assert not (tmp_path / "new").exists()


def test_files_into_what_is_no_folder_are_refused_in_words(tmp_path):
    live, _ = attach(
        nn.Sequential(nn.Linear(8, 4)), [PeftAdapter("a", None, {"0": (torch.ones(2, 8), torch.ones(4, 2), 1.0)})]
    )
    pooled, _ = attach_shards(nn.Sequential(nn.Linear(8, 4)), ["0"], budget=1, rank=1, shards=1, private=0)
    (tmp_path / "file").write_text("")
    for save, changed in ((save_routers, live), (save_shards, pooled)):
        with pytest.raises(StorageError):
            save(tmp_path / "file", changed)
        save(tmp_path / "folder", changed)
        save(tmp_path / "folder", changed)  # one whole file, in the place of the one before


def test_a_link_out_of_an_adapters_folder_is_not_copied(tmp_path):
    write_adapter(tmp_path / "a", PeftAdapter("a", None, {"0": (torch.ones(2, 8), torch.ones(4, 2), 1.0)}))
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "a" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside its folder"):
        save_adapters(tmp_path / "out", [tmp_path / "a"], router="arrow")


def test_a_folder_that_is_none_is_called_what_it_is(tmp_path):
    one, _ = folders(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"hold adapters\.json.*is one adapter of PEFT.*attach\(model, \['.*a'\]\)"
    ):
        attach_folder(model(), one)
    with pytest.raises(CheckpointError, match="none, which does not exist"):
        attach_folder(model(), tmp_path / "none")
    with pytest.raises(UsageError, match=r"got none\. Nearest fix: name the folders that PEFT wrote"):
        attach(model(), [])
