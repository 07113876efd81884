"""``turnout convert`` of folders whose weights are in few bits already: kept, written out, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from turnout.cli.main import main
from turnout.errors import CheckpointError
from turnout.models import LM, LMConfig, MoEConfig, checkpoint
from turnout.recipes.certify import open_model
from turnout.reshape import quantize

SIZES: dict[str, Any] = {"vocab_size": 67, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "max_seq": 64}
CONFIGS = {"dense": LMConfig(**SIZES, hidden=32), "experts": LMConfig(**SIZES, moe=MoEConfig(4, 2, 32))}


@pytest.fixture(params=CONFIGS)
def few(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of transformers in four bits."""
    lm, _ = quantize(LM(CONFIGS[request.param], seed=1), bits=4, group=8)
    checkpoint.to_hf(lm, tmp_path / "few")
    return tmp_path / "few"


def convert(source: Path, *options: str, out: str = "out") -> int:
    return main(["convert", str(source), *options, "--out", str(source.parent / out), "--quiet"])


def test_it_is_written_out_or_kept_to_the_bit(few: Path) -> None:
    assert convert(few, "--densify", out="whole") == 0 and convert(few, "--as", "model", out="own") == 0
    whole, own, held = (open_model(few.parent / name)[0] for name in ("whole", "own", "few"))
    assert "quantization_config" not in json.loads((few.parent / "whole" / "config.json").read_text())
    assert whole.config.quantized is None and own.config == held.config and own.config.quantized is not None
    for name, tensor in held.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor), name
    for name, tensor in checkpoint.from_hf(few).state_dict().items():
        assert torch.equal(whole.state_dict()[name], tensor), name
    assert convert(few.parent / "own", "--as", "transformers", out="again") == 0
    again, before = (load_file(few.parent / name / "model.safetensors") for name in ("again", "few"))
    assert again.keys() == before.keys() and all(torch.equal(again[name], before[name]) for name in before)


def test_what_it_is_already_is_refused_with_what_is_allowed(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--as", "transformers"]):
        assert convert(few, *options) == 2
        assert "add --densify to write its weights (compressed-tensors) out whole" in capsys.readouterr().err
    assert [file.name for file in few.parent.iterdir()] == ["few"]


def test_nothing_is_rounded_a_second_time_unasked(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bits = ["--bits", "4", "--group", "16"]
    sparse = json.loads((few / "config.json").read_text())["model_type"] == "mixtral"
    dropped = ["--drop-experts", "1", "--by", "random"] if sparse else []
    for options in (bits, [*dropped, *bits]):
        assert convert(few, *options) == 2
        assert "whose weights are stored in few bits (compressed-tensors)" in capsys.readouterr().err
    assert [file.name for file in few.parent.iterdir()] == ["few"]
    assert convert(few, "--densify", *bits) == 0
    assert open_model(few.parent / "out")[0].config.quantized.group == 16
    if dropped:
        assert convert(few, *dropped, "--densify", *bits, out="fewer") == 0
        assert convert(few, *dropped, out="smaller") == 0
        assert checkpoint.peek(few.parent / "smaller").stored_as is None


def test_eight_bits_of_deepseek_take_the_same_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.to_hf(LM(CONFIGS["dense"]).bfloat16(), tmp_path / "fp8")
    file, keys = tmp_path / "fp8" / "model.safetensors", tmp_path / "fp8" / "config.json"
    tensors = load_file(file)
    for name in [name for name in tensors if "proj" in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1)
    save_file(tensors, file)
    body = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": None}
    keys.write_text(json.dumps(json.loads(keys.read_text()) | {"quantization_config": body}))
    for options in (["--as", "transformers"], ["--bits", "4", "--group", "8"]):
        assert convert(tmp_path / "fp8", *options) == 2
        said = capsys.readouterr().err
        assert "--densify" in said and "(fp8)" in said
    assert convert(tmp_path / "fp8", "--gguf", "q4_0", "--no-tokenizer", out="x.gguf") == 2
    assert "weights stored as fp8" in capsys.readouterr().err
    assert convert(tmp_path / "fp8", "--densify", out="whole") == 0
    assert checkpoint.peek(tmp_path / "whole").stored_as is None
    assert convert(tmp_path / "fp8", "--densify", "--bits", "4", "--group", "8", out="four") == 0


def test_commands_hold_it_in_few_bits(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(few, "--densify", out="whole") == 0
    assert main(["certify", str(few), str(few.parent / "whole")]) == 0
    said = capsys.readouterr().out
    assert "within bound" in said or "bit-equal" in said
    assert open_model(few)[0].config.quantized is not None
    assert open_model(few, packed=False)[0].config.quantized is None
    with pytest.raises(CheckpointError, match="none that are packed"):
        checkpoint.from_hf(few.parent / "whole", packed=True)
