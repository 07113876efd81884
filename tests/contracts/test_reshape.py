"""Every reshape gives a new model and a report, changes nothing when asked to change nothing, and reports truly."""

import inspect
import sys
from pathlib import Path

import pytest
import torch

from turnout import reshape
from turnout.models import LM
from turnout.types import Report

sys.path.insert(0, str(Path(__file__).parents[1] / "reshape"))
from small import ids, make, sparse

# How each is asked to change nothing, and how to change something. What is listed for live transformers models is
# tested in tests/reshape/test_adopt.py and test_attach.py.
LIVE = (
    "add_low_rank",  # these three in tests/reshape/test_low_rank.py
    "fold_low_rank",
    "low_rank_adapter",
    "adapters_of",
    "add_tasks",
    "adopt",
    "attach",
    "attach_folder",
    "attach_shards",
    "detach",
    "train_gates",
    "fold_adapters",
    "fresh_adapters",
    "load_routers",
    "load_shards",
    "register_backend",
    "release",
    "save_adapters",
    "save_attached",
    "save_routers",
    "save_shards",
    "scale_and_shift",
)
# What takes several models has its own contract, test_reshape_many.py.
MANY = (
    "Soup",
    "average",
    "fisher",
    "fisher_information",
    "interpolate",
    "interpolate_sparse",
    "interpolation_path",
    "soup",
    "stragglers",
    "task_vectors",
)
# What changes how numbers are held, and never how many there are, nor can be asked to change nothing.
HELD = ("quantize",)  # in tests/reshape/test_quantize.py
NOTHING = {
    "compress_experts": lambda text: (sparse(), {"rank": 3, "rows": 1.0, "batches": text}),
    "densify": lambda text: (sparse(), {"batches": text}),
    "diversify": lambda text: (sparse(), {"masked": 0.0, "batches": text}),
    "drop_experts": lambda text: (sparse(), {"keep": 6, "batches": text}),
    "latent_experts": lambda text: (sparse(), {"rank": 16, "batches": text}),
    "merge_experts": lambda text: (sparse(), {"keep": 6, "batches": text}),
    "read_me": lambda text: (make(), {"domains": {"a": text[:1], "b": text[1:]}, "keep": 1.0}),
    "split": lambda text: (make(), {"num_experts": 1, "top_k": 1, "batches": text}),
    "upcycle": lambda text: (make(), {"num_experts": 8, "top_k": 2, "layers": (), "batches": text}),
}
SOMETHING = {
    "compress_experts": lambda text: (sparse(), {"rank": 2, "rows": 0.2, "batches": text}),
    "densify": lambda text: (factored(), {"batches": text}),
    "diversify": lambda text: (
        make(),
        {"num_experts": 4, "top_k": 2, "masked": 0.3, "router": "DenseToSparse", "batches": text},
    ),
    "drop_experts": lambda text: (sparse(), {"keep": 3, "batches": text}),
    "latent_experts": lambda text: (sparse(), {"rank": 5, "share": 3, "batches": text}),
    "merge_experts": lambda text: (sparse(), {"keep": 2, "batches": text}),
    "read_me": lambda text: (
        make(),
        {
            "domains": {"a": text[:1], "b": text[1:]},
            "gate": {"width": 8, "layers": 1},
            "router_steps": 2,
            "backbone_steps": 2,
        },
    ),
    "split": lambda text: (make(), {"num_experts": 4, "top_k": 2, "batches": text}),
    "upcycle": lambda text: (make(), {"num_experts": 8, "top_k": 4, "granularity": 2, "batches": text}),
}
every_reshape = pytest.mark.parametrize("name", [name for name in reshape.__all__ if name not in LIVE + MANY + HELD])


def text() -> list[torch.Tensor]:
    return [ids(seed=3), ids(seed=4)]


def factored() -> LM:
    """Merged, then compressed."""
    merged = reshape.merge_experts(sparse(), keep=3, batches=text())[0]
    return reshape.compress_experts(merged, rank=2, rows=0.2, batches=text())[0]


@pytest.mark.parametrize("name", reshape.__all__)
def test_it_says_where_it_comes_from_and_shows_itself(name: str) -> None:
    doc = inspect.getdoc(getattr(reshape, name)) or ""
    assert "Source:" in doc and ">>>" in doc


@every_reshape
@torch.no_grad()
def test_asked_to_change_nothing_it_changes_no_output(name: str) -> None:
    lm, options = NOTHING[name](text())
    new, report = getattr(reshape, name)(lm, **options)
    assert isinstance(new, LM) and isinstance(report, Report)
    assert all(torch.equal(new(id_BS).logits_BSV, lm(id_BS).logits_BSV) for id_BS in text())
    assert report["relative_difference"] == 0
    assert report["params_before"] == report["params_after"]


@every_reshape
@torch.no_grad()
def test_the_report_is_true_and_the_model_given_stays_as_it_was(name: str) -> None:
    lm, options = SOMETHING[name](text())
    before = {key: tensor.clone() for key, tensor in lm.state_dict().items()}
    new, report = getattr(reshape, name)(lm, **options)
    assert Report.from_json(report.to_json()).values == report.values
    assert report["params_before"] == sum(p.numel() for p in lm.parameters())
    assert report["params_after"] == sum(p.numel() for p in new.parameters()) != report["params_before"]
    assert report["params_active_after"] == new.cost().params_active
    gaps = [(new(id_BS).logits_BSV - lm(id_BS).logits_BSV).double() for id_BS in text()]
    sizes = [lm(id_BS).logits_BSV.double().norm() for id_BS in text()]
    worst = max(float(gap.norm() / size) for gap, size in zip(gaps, sizes, strict=True))
    assert report["relative_difference"] == pytest.approx(worst, rel=1e-3, abs=1e-12)
    assert report["largest_difference"] == pytest.approx(max(float(gap.abs().max()) for gap in gaps), rel=1e-3)
    assert all(torch.equal(tensor, before[key]) for key, tensor in lm.state_dict().items())
    for parameter in new.parameters():
        parameter.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in lm.state_dict().items()), "storage is shared"


@every_reshape
@torch.no_grad()
def test_the_same_call_gives_the_same_model_and_the_mode_and_dtype_stay(name: str) -> None:
    lm, options = SOMETHING[name](text())
    lm.train()
    first, second = (getattr(reshape, name)(lm, **options)[0] for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert first.training and lm.training
    half = getattr(reshape, name)(lm.bfloat16(), **options)[0]
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@every_reshape
@torch.no_grad()
def test_the_new_model_goes_to_disk_and_back(name: str, tmp_path) -> None:
    from turnout.models.checkpoint import load, save

    lm, options = SOMETHING[name](text())
    new = getattr(reshape, name)(lm, **options)[0]
    save(tmp_path / "model", new)
    assert torch.equal(load(tmp_path / "model")(text()[0]).logits_BSV, new(text()[0]).logits_BSV)
