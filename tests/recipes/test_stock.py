"""Every family: transformers saves, turnout reshapes, transformers loads, generates, and computes what turnout does."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hf_folders as folders
import pytest
import torch

from turnout.errors import CheckpointError, UsageError
from turnout.models import LM, checkpoint
from turnout.models.families import FAMILIES
from turnout.recipes import stock
from turnout.recipes.certify import certify_folders
from turnout.recipes.convert import convert
from turnout.recipes.steps import Compress, Densify, Drop, Latent, Merge, Quantize, Split, Step, Upcycle
from turnout.recipes.tied import tied

MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = MLA | {
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
}
FEW = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
ROUTED: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": FEW | {"head_dim": 8, "norm_topk_prob": True, "mlp_only_layers": [0]},
    "qwen2_moe": FEW | {"shared_expert_intermediate_size": 18, "decoder_sparse_step": 2},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 12},
    "deepseek_v3": DEEPSEEK | {"n_group": 2, "topk_group": 1},
    "deepseek_v2": DEEPSEEK | {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 8,
    },
    "granitemoe": {"num_local_experts": 8, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 12, "head_dim": 8},
}
# What each becomes with experts.
DENSE: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, "MixtralForCausalLM"),
    "mistral": ({"sliding_window": 6}, "MixtralForCausalLM"),
    "qwen2": ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, "Qwen2MoeForCausalLM"),
    "qwen3": ({"head_dim": 8}, "Qwen3MoeForCausalLM"),
    "granite": ({"attention_multiplier": 0.3, "logits_scaling": 2.0}, "GraniteMoeForCausalLM"),
    "phi3": ({"sliding_window": 6}, "MixtralForCausalLM"),
}
# What no published architecture says with experts, and the reason that is given.
ALONE: dict[str, tuple[dict[str, Any], str]] = {
    "smollm3": ({"no_rope_layers": [1, 0]}, "rope_layers is"),
    "olmo2": ({}, "norm_place is 'after'"),
    "phi3 long": (
        {
            "original_max_position_embeddings": 20,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.5],
                "long_factor": [1.0, 2.5, 7.0],
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
            },
        },
        "rope",
    ),
    "gemma": ({"head_dim": 8}, "norm is 'rms_plus_one'"),
    "gemma2": (
        {"head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 6, "attn_logit_softcapping": 2.0},
        "attention_softcap is 2.0",
    ),
    "gemma3_text": (
        {"head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 6, "sliding_window_pattern": 2},
        "norm_place is 'both'",
    ),
    "gpt2": ({}, "learned_positions is True"),
}
STEPS: dict[str, list[Step]] = {
    "drop": [Drop(count=2, by="random")],
    "merge": [Merge(4), Densify()],
    "compress": [Compress(rank=4, rows=0.1, by="magnitude"), Densify()],
    "latent": [Latent(rank=6), Densify()],
}
GROW: dict[str, list[Step]] = {
    "upcycle": [Upcycle(4, 2)],
    "upcycle to one": [Upcycle(4, 1)],
    "upcycle and drop": [Upcycle(4, 2), Drop(count=1, by="random")],
    "split": [Split(4, 2)],
}


def turns(ways: Iterable[str], kinds: Iterable[str]) -> list[tuple[str, str]]:
    """The first way for every kind, and of the others one for each in turn: every way, every kind, half of the time."""
    first, *others = ways
    return [pair for at, kind in enumerate(kinds) for pair in ((first, kind), (others[at % len(others)], kind))]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text(folders.TEXT)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of each family, made when asked for."""
    return tmp_path_factory.mktemp("hf")


def folder_of(made: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    path = made / f"{kind}-{dtype}"
    keys = ROUTED.get(kind) or (DENSE | ALONE)[kind][0]
    return path if path.exists() else folders.make(path, kind.split(maxsplit=1)[0], dtype, **keys)


@torch.no_grad()
def assert_stock(out: Path, architecture: str) -> None:
    """transformers loads it whole, generates as turnout does, and its logits are turnout's."""
    library = folders.transformers()
    model, notes = library.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(notes.values()), notes
    assert type(model).__name__ == architecture
    lm, model = checkpoint.from_hf(out), model.eval()
    id_BS = torch.randint(300, (3, 40), generator=torch.Generator().manual_seed(5))
    want = model(id_BS).logits
    assert want.std() > 0.05
    torch.testing.assert_close(lm(id_BS).logits_BSV, want, rtol=0, atol=1e-4)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "temperature": None}
    got = model.generate(id_BS[:1, :5], attention_mask=torch.ones(1, 5), **options)
    assert got.tolist() == lm.generate(id_BS[:1, :5], tokens=4, temperature=0).tolist()


def test_every_family_has_its_case() -> None:
    assert {family.model_type for family in FAMILIES} == {*ROUTED, *DENSE, *(kind.split()[0] for kind in ALONE)}


@pytest.mark.parametrize(("way", "kind"), turns(STEPS, ROUTED))
def test_experts_of_every_family(kind: str, way: str, made: Path, text: Path, tmp_path: Path) -> None:
    path = folder_of(made, kind)
    steps, architecture = STEPS[way], json.loads((path / "config.json").read_text())["architectures"][0]
    done = convert(path, steps, tmp_path / "out", text=text)
    assert_stock(tmp_path / "out", architecture)
    assert done.record["stock"]["dtypes"]["float32"]["max_abs"] < 1e-4


@pytest.mark.parametrize(("way", "kind"), [*turns(GROW, DENSE), ("upcycle to one", "granite")])
def test_dense_families_become_sparse(kind: str, way: str, made: Path, tmp_path: Path) -> None:
    path, architecture = folder_of(made, kind), DENSE[kind][1]
    if way == "upcycle to one" and architecture == "MixtralForCausalLM":
        architecture = "Qwen2MoeForCausalLM"  # which leaves the weight of one expert as it is
    if way == "upcycle to one" and kind == "granite":  # and there nothing is scaled
        with pytest.raises(UsageError, match=r"weights of a token sum to 1.*\n(.*\n)?.*--as model"):
            convert(path, GROW[way], tmp_path / "out")
        return
    convert(path, GROW[way], tmp_path / "out")
    assert_stock(tmp_path / "out", architecture)
    if way.startswith("upcycle"):
        torch.testing.assert_close(folders.logits(tmp_path / "out"), folders.logits(path), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("way", "kind"), turns(GROW, ALONE))
def test_dense_families_without_a_sparse_one_become_our_own(kind: str, way: str, made: Path, tmp_path: Path) -> None:
    path, why = folder_of(made, kind), ALONE[kind][1]
    with pytest.raises(UsageError, match="--as model") as caught:
        convert(path, GROW[way], tmp_path / "out")
    assert why in str(caught.value) and not (tmp_path / "out").exists()
    convert(path, GROW[way], tmp_path / "out", as_format="model")
    lm = checkpoint.load(tmp_path / "out").eval()
    assert lm.config.moe is not None
    if way.startswith("upcycle"):
        id_BS = torch.randint(300, (3, 40), generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(lm(id_BS).logits_BSV, folders.logits(path), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [*DENSE, *ALONE])
def test_dense_families_come_back_from_our_own_format(kind: str, made: Path, tmp_path: Path) -> None:
    path, architecture = folder_of(made, kind), json.loads((folder_of(made, kind) / "config.json").read_text())
    convert(path, [], tmp_path / "own", as_format="model")
    done = convert(tmp_path / "own", [], tmp_path / "back", as_format="transformers")
    assert done.record["stock"]["dtypes"]["float32"]["max_abs"] < 1e-4 and done.certificate.verdict == "bit-equal"
    assert_stock(tmp_path / "back", architecture["architectures"][0])
    before, after = checkpoint.from_hf(path).state_dict(), checkpoint.from_hf(tmp_path / "back").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    certificate, _ = certify_folders(path, tmp_path / "back")
    assert certificate.verdict == "bit-equal"


@pytest.mark.parametrize("kind", [*ROUTED, *[*DENSE, *ALONE][::2]])
def test_bf16_of_families(kind: str, made: Path, tmp_path: Path) -> None:
    path = folder_of(made, kind, torch.bfloat16)
    if kind in ALONE:
        convert(path, [], tmp_path / "own", as_format="model")
        done = convert(tmp_path / "own", [], tmp_path / "out", as_format="transformers")
    else:
        done = convert(path, STEPS["drop"] if kind in ROUTED else GROW["upcycle"], tmp_path / "out")
    found = done.record["stock"]["dtypes"]
    assert found["bfloat16"]["relative"] < 0.06 and found["float32"]["max_abs"] < 1e-4, found
    assert "bfloat16 logits" in done.summary() and "float32 logits" in done.summary()


def test_what_transformers_reads_otherwise_is_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect of ours, planted in what is written: the folder never takes its place."""
    path, write = folder_of(made, "mixtral"), checkpoint.to_hf

    def wrong(lm: LM, out: Path) -> None:
        write(lm, out)
        change(out, rms_norm_eps=0.5)

    monkeypatch.setattr(checkpoint, "to_hf", wrong)
    monkeypatch.setattr(
        stock, "_ours", lambda folder, id_BS, dtype: checkpoint.from_hf(path)(id_BS).logits_BSV.detach()
    )
    with pytest.raises(CheckpointError, match="compute the same in transformers"):
        convert(path, STEPS["drop"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_transformers_does_not_find_whole_is_refused(made: Path, tmp_path: Path) -> None:
    path, id_BS = shutil.copytree(folder_of(made, "llama"), tmp_path / "a"), torch.zeros(1, 4, dtype=torch.int64)
    change(path, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="missing_keys"):
        stock._theirs(path, id_BS, torch.float32)
    change(path, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match="unexpected_keys"):
        stock._theirs(path, id_BS, torch.float32)
    change(path, num_hidden_layers=2, intermediate_size=40)
    with pytest.raises(CheckpointError, match="load in transformers"):
        stock._theirs(path, id_BS, torch.float32)


def change(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_without_transformers_it_says_so(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock.importlib.util, "find_spec", lambda name: None)
    done = convert(folder_of(made, "llama"), GROW["upcycle"], tmp_path / "out")
    assert "not checked with transformers: it is not installed" in done.summary()
    assert done.record["stock"]["version"] is None


def test_bars_of_compressed_tensors_stay_away(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("compressed_tensors", reason="the library compressed-tensors is not installed")
    done = convert(folder_of(made, "llama"), [Quantize(8, None)], tmp_path / "out")
    assert "float32 logits" in done.summary() and not done.record["stock"]["skipped"]
    assert capfd.readouterr().err == ""


def test_without_memory_it_says_so(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "free_memory", lambda: 1000)
    done = convert(folder_of(made, "llama"), GROW["upcycle"], tmp_path / "out")
    assert "not checked with transformers: float32, for want of memory" in done.summary()


def routed_to_one_of_two(path: Path, tie_at: int | None) -> Path:
    """A model with one of two experts a token; at this place of the first row of the batch the two are tied."""
    folder = folders.make(
        path, "olmoe", num_experts=2, num_experts_per_tok=1, intermediate_size=12, num_hidden_layers=1
    )
    if tie_at is None:
        return folder
    lm, seen = checkpoint.from_hf(folder), []
    handle = lm.routers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    lm(stock.batch(lm.config))
    handle.remove()
    with torch.no_grad():
        weight_ED, x_D = lm.routers[0].weight, seen[0][tie_at]
        weight_ED[1] = weight_ED[0] + (off_D := torch.randn(x_D.shape, generator=torch.Generator().manual_seed(3)))
        weight_ED[1] -= (off_D @ x_D) / (x_D @ x_D) * x_D
    shutil.rmtree(folder)
    checkpoint.to_hf(lm, folder)
    return folder


def test_tokens_whose_experts_are_tied_are_left_out_and_nothing_else(tmp_path, monkeypatch) -> None:
    folder = routed_to_one_of_two(tmp_path / "tied", tie_at=20)
    theirs = stock._theirs

    def other(*args: Any, at: int) -> torch.Tensor:
        logits_BSV = theirs(*args)
        logits_BSV[0, at:] += 1
        return logits_BSV

    monkeypatch.setattr(stock, "_theirs", lambda *args: other(*args, at=20))
    found = stock.check_with_transformers(folder, params=1000)
    assert found["dtypes"]["float32"]["tied_tokens"] == 12
    assert "12 tokens left out" in stock.said(found)
    monkeypatch.setattr(stock, "_theirs", lambda *args: other(*args, at=19))
    with pytest.raises(CheckpointError, match="compute the same"):
        stock.check_with_transformers(folder, params=1000)
    with pytest.raises(CheckpointError, match="compute the same"):
        stock.check_with_transformers(routed_to_one_of_two(tmp_path / "clear", None), params=1000)


def test_a_token_that_takes_all_experts_is_tied_with_none(tmp_path) -> None:
    folder = folders.make(tmp_path / "all", "olmoe", num_experts=2, num_experts_per_tok=2, intermediate_size=12)
    lm = checkpoint.from_hf(folder)
    assert not tied(lm, stock.batch(lm.config)).any()
