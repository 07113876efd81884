"""Poly and MHR on a live model of transformers: judged by PEFT, trained, saved, adapted, and one adapter again."""

import pytest
import torch
from torch import nn

from turnout.errors import ShapeError, StorageError, UnknownNameError, UsageError
from turnout.layers import given
from turnout.models.checkpoint import PeftAdapter, read_adapter, write_adapter
from turnout.reshape import (
    adapters_of,
    add_tasks,
    attach,
    attach_folder,
    detach,
    fold_adapters,
    fresh_adapters,
    save_attached,
)
from turnout.train import train_routers

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
MAPS = ("q_proj", "down_proj")


def model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64)).eval()


def inventory(parts: int, *, filled: bool = True, **options) -> nn.Module:
    """Three adapters of rank 4, four tasks."""
    generator = torch.Generator().manual_seed(1)
    made = model()
    skills = fresh_adapters(made, MAPS, count=3, rank=4, scale=0.25, generator=generator)
    options = {"num_tasks": 4, "parts": parts} | options
    torch.manual_seed(2)
    attach(made, skills, router="poly", router_options=options)
    for name, parameter in made.named_parameters():
        if filled and ("paths.up" in name or "logit" in name):
            nn.init.normal_(parameter, 0, 3.0 if "logit" in name else 2.0, generator=generator)
    return made


def batches(count: int = 4) -> list:
    ids = torch.randint(64, (count, 2, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": one, "labels": one, "task_B": torch.tensor([3, 1])} for one in ids]


def logits(made: nn.Module, *tasks: int) -> torch.Tensor:
    with torch.no_grad(), given(task_B=torch.tensor(tasks)):
        return made(batches()[0]["input_ids"]).logits


def loss(made: nn.Module, batch: dict) -> float:
    with torch.no_grad(), given(task_B=batch["task_B"]):
        return float(made(batch["input_ids"], labels=batch["labels"]).loss)


@pytest.mark.parametrize("parts", [1, 4])
def test_peft_computes_the_same_poly(parts):
    ours = inventory(parts)
    sizes = {"r": 4, "n_tasks": 4, "n_skills": 3, "n_splits": parts}
    config = peft.PolyConfig(target_modules=list(MAPS), task_type="CAUSAL_LM", **sizes)
    judge = peft.get_peft_model(model(), config).eval()
    for name, module in judge.named_modules():
        if hasattr(module, "poly_router") and "default" in module.poly_router:
            layer = ours.get_submodule(name.removeprefix("base_model.model."))
            down, up = (one.detach().view(3, 4, -1) for one in (layer.paths.down, layer.paths.up))
            with torch.no_grad():  # (parts, skills, D / parts, r) and (parts, skills, r, O / parts)
                module.poly_lora_A["default"].copy_(down.unflatten(2, (parts, -1)).permute(2, 0, 3, 1))
                module.poly_lora_B["default"].copy_(up.unflatten(2, (parts, -1)).permute(2, 0, 1, 3))
                module.poly_router["default"].module_logits.copy_(layer.router.logit.flatten(1))
    with torch.no_grad():
        wanted = judge(input_ids=batches()[0]["input_ids"], task_ids=torch.tensor([3, 1])).logits
    assert torch.allclose(logits(ours, 3, 1), wanted, atol=1e-5)
    assert not torch.allclose(logits(ours, 1, 1), wanted, atol=1e-2)


@torch.no_grad()
def test_adapters_that_have_learned_nothing_change_nothing():
    plain = model()
    assert torch.equal(logits(inventory(2, filled=False), 0, 3), plain(batches()[0]["input_ids"]).logits)
    skills = fresh_adapters(plain, ["*.1.*.v_proj", "o_proj"], count=2, rank=3)
    attention = "model.layers.{}.self_attn.{}"
    assert list(skills[0].factor) == [attention.format(0, "o_proj")] + [
        attention.format(1, x) for x in ("v_proj", "o_proj")
    ]
    assert float(skills[0].factor[attention.format(1, "v_proj")][0].abs().max()) <= 32**-0.5
    with pytest.raises(UnknownNameError, match="q_proj"):
        fresh_adapters(plain, ["q_prj"], count=2, rank=3)
    with pytest.raises(UsageError, match="LlamaMLP"):
        fresh_adapters(plain, ["mlp"], count=2, rank=3)
    with pytest.raises(ShapeError, match="rank"):
        fresh_adapters(plain, MAPS, count=2, rank=0)


@pytest.mark.parametrize("share", [False, True])
def test_trained_together_saved_and_loaded(tmp_path, share):
    ours = inventory(2, share=share)
    assert len({id(one.router) for one in ours.modules() if hasattr(one, "router")}) == (1 if share else 4)
    torch.manual_seed(3)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    losses = train_routers(ours, batches(2) * 6, rate=0.1, adapters=True, adapter_rate=5e-3)
    assert losses[-1] < losses[0]
    changed = {name for name, value in ours.state_dict().items() if not torch.equal(value, before[name])}
    added = {name for name in before if "paths" in name or "router" in name}
    assert changed == {name for name in added if not name.endswith("signature_N3")}  # which says whose they are
    tables = [value - before[name] for name, value in ours.state_dict().items() if "logit" in name]
    assert all(float(table[[0, 2]].abs().max()) == 0 for table in tables), "tasks that were not seen stay"
    report = save_attached(tmp_path / "out", ours)
    assert report["params_router"] == (4 * 4 * 2 * 3)  # written for each map, shared or not
    again, _ = attach_folder(model(), tmp_path / "out")
    assert torch.equal(logits(again, 3, 0), logits(ours, 3, 0))
    assert read_adapter(tmp_path / "out" / "adapters" / "skill-1").factor.keys() == adapters_of(ours)[1].factor.keys()
    with pytest.raises(UsageError, match="exist"):
        save_attached(tmp_path / "out", ours)


@pytest.mark.parametrize("parts", [1, 4])
def test_a_task_is_one_ordinary_adapter_that_peft_loads(tmp_path, parts):
    ours = inventory(parts, unknown="average")
    for task in (2, "average"):
        write_adapter(tmp_path / str(task), fold_adapters(ours, "one", task=task))
        judge = peft.PeftModel.from_pretrained(model(), tmp_path / str(task)).eval()
        with torch.no_grad():
            found = judge(batches()[0]["input_ids"]).logits
        number = 99 if task == "average" else task
        assert torch.allclose(found, logits(ours, number, number), atol=1e-5)
    with pytest.raises(UsageError, match="task=0"):
        fold_adapters(ours, "one")
    with pytest.raises(UsageError, match="got 4"):
        fold_adapters(ours, "one", task=4)


def test_a_new_task_by_the_table_alone_and_by_one_averaged_adapter(tmp_path):
    ours = inventory(2)
    old = logits(ours, 1, 3)
    _, report = add_tasks(ours)
    assert report.values == {"tasks": [4], "params_added": 4 * 2 * 3}
    new = [batch | {"task_B": torch.tensor([4, 4])} for batch in batches(1)] * 8
    torch.manual_seed(4)
    before = loss(ours, new[0])
    train_routers(ours, new * 4, rate=0.1)
    assert loss(ours, new[0]) < before
    assert torch.equal(logits(ours, 1, 3), old), "MHR-z leaves the other tasks alone"
    save_attached(tmp_path / "z", ours)
    again, _ = attach_folder(model(), tmp_path / "z")
    assert torch.equal(logits(again, 4, 4), logits(ours, 4, 4))

    one = fold_adapters(ours, "mu", task="average")  # MHR-mu
    detach(ours)
    attach(ours, [one], router="even")
    plain = [{key: value for key, value in batch.items() if key != "task_B"} for batch in new]
    losses = train_routers(ours, plain, adapters=True, rate=1e-2)
    assert losses[-1] < losses[0]
    write_adapter(tmp_path / "mu", adapters_of(ours)[0])
    judge = peft.PeftModel.from_pretrained(model(), tmp_path / "mu").eval()
    with torch.no_grad():
        ids = batches()[0]["input_ids"]
        assert torch.allclose(judge(ids).logits, ours(ids).logits, atol=1e-5)


def test_generation_and_unknown_tasks():
    ours = inventory(2)
    ids = batches()[0]["input_ids"]
    with given(task_B=torch.tensor([0, 3])):
        assert ours.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)
    with pytest.raises(UsageError, match="given"):
        ours(ids)
    with pytest.raises(UsageError, match="got 7"):
        logits(ours, 0, 7)


def test_what_does_not_fit_is_refused_and_nothing_half_written_stays(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="0 of 0"):
        add_tasks(model())
    with pytest.raises(UsageError, match="no adapters"):
        adapters_of(model())
    ours = model()
    attach(ours, fresh_adapters(ours, MAPS, count=2, rank=2), router=lambda site: nn.Identity())
    save_attached(tmp_path / "made", ours)
    with pytest.raises(UsageError, match="built by a function"):
        attach_folder(model(), tmp_path / "made")
    attach_folder(model(), tmp_path / "made", router=lambda site: nn.Identity())
    with pytest.raises(ShapeError, match="parts"):
        inventory(5)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        save_attached(tmp_path / "file" / "out", inventory(1))
    monkeypatch.setattr("turnout.reshape.adapters.save.write_routers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_attached(tmp_path / "out", inventory(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "made"]


def test_ranks_may_differ_in_the_average():
    chance = torch.Generator().manual_seed(0)
    pair = [
        PeftAdapter(f"a{r}", None, {"0": (torch.randn(r, 8, generator=chance), torch.randn(4, r, generator=chance), r)})
        for r in (1, 3)
    ]
    ours, _ = attach(nn.Sequential(nn.Linear(8, 4)).eval(), pair, router="poly", router_options={"num_tasks": 2})
    a, b, scale = fold_adapters(ours, "one", task=1).factor["0"]
    with torch.no_grad(), given(task_B=torch.tensor([1])):
        x = torch.randn(1, 5, 8, generator=chance)
        assert torch.allclose(ours(x), ours[0].base(x) + scale * x @ a.t() @ b.t(), atol=1e-5)
