"""``turnout audit``: what it takes, what it prints, what it exits with, and what a user gets wrong."""

import json
from pathlib import Path

import pytest

from turnout.cli.main import main
from turnout.models import LM, LMConfig, MoEConfig, checkpoint

MAKES = """
import torch
from turnout.decide.token import TopK
from turnout.layers import MoE

torch.manual_seed(0)
layer = MoE(16, 8, 4, router=TopK(16, 4, capacity_factor=1.0, priority="position", std=0.5), std=0.3)
number = 3

def safe():
    return MoE(16, 8, 4, router=TopK(16, 4, std=0.5), std=0.3)
"""


def config(**options):
    moe = MoEConfig(num_experts=4, top_k=2, hidden=8, router_options=options)
    return LMConfig(vocab_size=40, width=16, layers=2, heads=2, moe=moe, init_std=0.3, max_seq=64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    checkpoint.save(root / "a", LM(config()))
    checkpoint.save(root / "drops", LM(config(capacity_factor=1.0, priority="position")))
    checkpoint.to_hf(LM(config()), root / "hf")
    (root / "planted_code.py").write_text(MAKES)
    return root


def test_a_model_of_ours(folders, capsys):
    assert main(["audit", str(folders / "a"), "--batches", "8"]) == 0
    text = capsys.readouterr().out
    assert "overflow" in text and "not known" not in text
    assert main(["audit", str(folders / "a"), "--batches", "8", "--batch-invariant", "--bits"]) == 0
    assert "one output, to the bit" in capsys.readouterr().out


def test_one_that_drops_exits_with_1(folders, capsys):
    assert main(["audit", str(folders / "drops"), "--batches", "8", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {"overflow", "ties"} <= set(found["leaks"])
    assert main(["audit", str(folders / "drops"), "--batch-invariant"]) == 2
    assert "capacity_factor=1.0" in capsys.readouterr().err


def test_stock_and_bits(folders, capsys):
    assert main(["audit", str(folders / "hf"), "--stock", "--batches", "8", "--bits"]) == 1
    text = capsys.readouterr().out
    assert "hf in transformers" in text and "change no more than rounding" in text


def test_code(folders, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    assert main(["audit", "planted_code:layer"]) == 1
    assert main(["audit", "planted_code:safe"]) == 0
    capsys.readouterr()
    for given, said in [
        ("planted_code:none", "be there"),
        ("no_such_code:layer", "be there"),
        ("planted_code:number", "be a network"),
    ]:
        assert main(["audit", given]) == 2
        assert said in capsys.readouterr().err
    assert main(["audit", "planted_code:layer", "--stock"]) == 2


def test_mistakes(folders, capsys):
    assert main(["audit", str(folders / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["audit", str(folders / "a"), "--batches", "2"]) == 2
    assert main(["audit", str(folders / "a"), "--stock"]) == 2
    assert "load in transformers" in capsys.readouterr().err
