"""Adapters from PEFT folders on a transformers model: judged by PEFT itself, put on and taken off again."""

import copy

import pytest
import torch
from torch import nn

from turnout.errors import CheckpointError, ShapeError, UnknownNameError, UsageError
from turnout.layers import Adapter, given
from turnout.models.checkpoint import PeftAdapter, read_adapter, write_adapter
from turnout.reshape import attach, detach
from turnout.reshape.adapters.routers import ROUTERS
from turnout.types import Routing

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config).eval()


def folder(tmp_path, name: str, seed: int, **settings):
    """A folder that PEFT wrote, of an adapter with random factors."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]} | settings)
    )
    wrapped = peft.get_peft_model(model(), config)
    for key, parameter in wrapped.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, 0, 0.2)
    wrapped.save_pretrained(tmp_path / name)
    return tmp_path / name


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(seed))


class Fixed(nn.Module):
    """Every token takes these adapters with these weights."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.num_experts, self.weights = len(weights), weights

    def forward(self, x_TD: torch.Tensor) -> Routing:
        return Routing.from_dense(torch.tensor(self.weights).expand(len(x_TD), -1))


MIXED = [
    {"r": 4, "lora_alpha": 8},
    {"r": 7, "lora_alpha": 3, "use_rslora": True},
    {"r": 2, "lora_alpha": 2, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.self_attn.v_proj": 9}},
]


@pytest.mark.parametrize("settings", MIXED)
@torch.no_grad()
def test_one_adapter_is_what_peft_makes_of_it(tmp_path, settings):
    path = folder(tmp_path, "one", 1, **settings)
    wanted = peft.PeftModel.from_pretrained(model(), path)(ids()).logits
    ours, report = attach(model(), [path], router=lambda site: Fixed(1.0))
    assert float((ours(ids()).logits - wanted).abs().max()) <= 1e-5
    assert len(report["modules"]) == 6 and report["adapters"] == ["one"]


@torch.no_grad()
def test_any_mix_of_ranks_adds_up_as_peft_adds_adapters(tmp_path):
    paths = [folder(tmp_path, f"a{n}", n, **settings) for n, settings in enumerate(MIXED)]
    judge = peft.PeftModel.from_pretrained(model(), paths[0], adapter_name="a0")
    for n in (1, 2):
        judge.load_adapter(paths[n], adapter_name=f"a{n}")
    judge.base_model.set_adapter(["a0", "a1", "a2"])
    ours, _ = attach(model(), paths, router=lambda site: Fixed(1.0, 1.0, 1.0))
    assert float((ours(ids()).logits - judge(ids()).logits).abs().max()) <= 1e-5


@torch.no_grad()
def test_detach_gives_the_very_model_back(tmp_path):
    ours = model()
    before, modules = ours(ids()).logits, dict(ours.named_modules())
    attach(ours, [folder(tmp_path, "a", 1), folder(tmp_path, "b", 2)])
    assert any(isinstance(module, Adapter) for module in ours.modules())
    assert not torch.equal(ours(ids()).logits, before)
    _, report = detach(ours)
    assert torch.equal(ours(ids()).logits, before) and len(report["modules"]) == 6
    assert all(ours.get_submodule(name) is module for name, module in modules.items())
    attach(ours, [folder(tmp_path, "a", 1)])  # and again


@torch.no_grad()
def test_maps_that_some_adapters_change_choose_among_those(tmp_path):
    paths = [folder(tmp_path, "a", 1), folder(tmp_path, "b", 2, target_modules=["q_proj"])]
    ours, report = attach(model(), paths)
    layer = ours.model.layers[0]
    assert layer.self_attn.q_proj.router.num_experts == 2 and layer.mlp.down_proj.router.num_experts == 1
    assert report.notes == ("4 maps are changed by some of the adapters only",)
    assert ours.generate(ids(), max_new_tokens=3, do_sample=False).shape == (2, 12)


class Heard(nn.Module):
    """A router of sequences that remembers what it was told, and takes the first adapter."""

    parts = 1

    def __init__(self) -> None:
        super().__init__()
        self.heard: list = []

    def forward(self, x_TD, *, given):
        self.heard.append(given)
        return Routing.from_dense(torch.tensor([[1.0, 0.0]]).expand(given.num_sequences, -1))


@torch.no_grad()
def test_padding_and_what_was_given_reach_the_routers_and_are_forgotten(tmp_path):
    paths = [folder(tmp_path, "a", 1), folder(tmp_path, "b", 2)]
    heard = Heard()
    ours, _ = attach(model(), paths, router=lambda site: heard)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    with given(task_B=torch.tensor([5, 6])):
        logits = ours(input_ids=ids(), attention_mask=mask).logits
    about = heard.heard[0]
    assert about.num_sequences == 2 and about.keep_T.tolist() == mask.bool().flatten().tolist()
    assert about.task_B.tolist() == [5, 6]
    alone, _ = attach(model(), paths[:1], router=lambda site: Fixed(1.0))
    assert torch.allclose(logits, alone(input_ids=ids(), attention_mask=mask).logits, atol=1e-5)
    heard.heard.clear()
    ours(ids())
    assert heard.heard[0].keep_T is None and heard.heard[0].task_B is None
    with pytest.raises(IndexError):
        ours(input_ids=ids() + 1000, attention_mask=mask)
    heard.heard.clear()
    ours(ids())
    assert heard.heard[0].keep_T is None, "an error inside a call must not leave its mask behind"


def test_what_cannot_be_attached_is_refused_and_leaves_the_model_alone(tmp_path):
    ours, good = model(), folder(tmp_path, "good", 1)
    with pytest.raises(UnknownNameError, match="Did you mean 'arrow'"):
        attach(ours, [good], router="arow")
    with pytest.raises(UsageError, match="at least one"):
        attach(ours, [])
    for name, settings, match in [
        ("dora", {"use_dora": True}, "DoRA"),
        ("bias", {"bias": "lora_only"}, "trained biases"),
        ("head", {"modules_to_save": ["lm_head"]}, "whole modules"),
    ]:
        with pytest.raises(CheckpointError, match=match):
            attach(ours, [good, folder(tmp_path, name, 1, **settings)])
    wide = read_adapter(good)
    wide = PeftAdapter("wide", None, {k: (torch.zeros(2, 99), b[:, :2], s) for k, (_, b, s) in wide.factor.items()})
    with pytest.raises(CheckpointError, match="99"):
        attach(ours, [good, wide])
    first, second = read_adapter(good), read_adapter(good)
    elsewhere = PeftAdapter("other", "org/another-model", second.factor)
    with pytest.raises(ShapeError, match="another-model"):
        attach(ours, [PeftAdapter("here", "org/this-model", first.factor), elsewhere])
    assert not any(isinstance(module, Adapter) for module in ours.modules())
    attach(ours, [PeftAdapter("here", "org/this-model", first.factor), elsewhere], any_base=True)
    with pytest.raises(UsageError, match="adapters already"):
        attach(ours, [good])


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    good = folder(tmp_path, "good", 1)
    weights = good / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="whole safetensors"):
        read_adapter(good)
    weights.rename(good / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        read_adapter(good)
    (good / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        read_adapter(good)


@torch.no_grad()
def test_what_is_written_peft_loads(tmp_path):
    one = read_adapter(folder(tmp_path, "one", 1, **MIXED[2]))
    write_adapter(tmp_path / "copy", one)
    wanted = peft.PeftModel.from_pretrained(model(), tmp_path / "one")(ids()).logits
    assert torch.equal(peft.PeftModel.from_pretrained(model(), tmp_path / "copy")(ids()).logits, wanted)
    again = read_adapter(tmp_path / "copy")
    assert again.factor.keys() == one.factor.keys() and copy.copy(again).params == one.params


@torch.no_grad()
def test_smear_routes_the_same_with_padding_and_by_a_query_the_same_in_every_call(tmp_path):
    paths = [folder(tmp_path, "a", 1), folder(tmp_path, "b", 2)]
    options = {"gain": 1.0, "std": 1.0}
    torch.manual_seed(0)
    ours, report = attach(model(), paths, router="smear", router_options=options)
    assert report["params_router"] == sum(2 * width + width + 2 for width in 2 * [32, 32, 48])
    long, short = ids()[:1], ids()[1:, :5]
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    both = torch.cat((long, torch.nn.functional.pad(short, (4, 0))))
    position = (mask.cumsum(1) - 1).clamp(min=0)
    padded = ours(input_ids=both, attention_mask=mask, position_ids=position).logits
    assert torch.allclose(padded[1, 4:], ours(short).logits[0], atol=1e-5)
    torch.manual_seed(0)
    asked, _ = attach(model(), paths, router="smear", router_options=options | {"query_width": 3})
    with given(query_BQ=torch.tensor([[1.0, 0.0, 3.0]])):
        whole = asked(long).logits
        first = asked(long[:, :6], use_cache=True)
        later = asked(long[:, 6:], past_key_values=first.past_key_values).logits
        assert torch.allclose(torch.cat((first.logits, later), 1), whole, atol=1e-5)
        assert asked.generate(long, max_new_tokens=2, do_sample=False).shape == (1, 11)


def factors(*modules: str, seed: int = 0, size: float = 0.2) -> dict:
    chance, maps = torch.Generator().manual_seed(seed), dict(model().named_modules())
    return {
        name: (
            size * torch.randn(2, maps[name].in_features, generator=chance),
            size * torch.randn(maps[name].out_features, 2, generator=chance),
            0.5,
        )
        for name in modules
    }


Q, V, K = (f"model.layers.0.self_attn.{part}_proj" for part in "qvk")


@torch.no_grad()
def test_even_is_the_mean_of_all_adapters_also_where_some_change_nothing(tmp_path):
    targets = (["q_proj", "v_proj"], ["q_proj"], ["q_proj", "down_proj"])
    paths = [folder(tmp_path, f"a{n}", n, target_modules=names) for n, names in enumerate(targets)]
    judge = peft.PeftModel.from_pretrained(model(), paths[0], adapter_name="a0")
    for n in (1, 2):
        judge.load_adapter(paths[n], adapter_name=f"a{n}")
    judge.add_weighted_adapter(["a0", "a1", "a2"], [1 / 3] * 3, "mean", combination_type="cat")
    judge.set_adapter("mean")
    ours, _ = attach(model(), paths, router="even")
    assert float((ours(ids()).logits - judge(ids()).logits).abs().max()) <= 1e-5


MAPS = [(Q, V), (Q,), (Q, K)]
OPTIONS = {
    "arrow": {"top_k": 3},
    "phatgoose": {"top_k": 3},
    "glider": {"top_k": 3, "embeddings": {f"a{n}": torch.eye(3)[n] for n in range(3)}},
    "poly": {"share": True},
    "scalearn": {"share": True, "dropout": 0.0},
    "smear": {},
    "even": {},
}


@pytest.mark.parametrize("router", sorted(ROUTERS))
@torch.no_grad()
def test_every_router_takes_adapters_of_different_maps(router):
    found = [
        PeftAdapter(f"a{n}", None, factors(*maps, seed=n), dict.fromkeys(maps, torch.ones(32)))
        for n, maps in enumerate(MAPS)
    ]
    ours, _ = attach(model(), found, router=router, router_options=OPTIONS[router])
    with given(task_B=torch.zeros(2, dtype=torch.long), query_BQ=torch.eye(3)[:2]):
        logits = ours(ids()).logits
    assert logits.isfinite().all()
    alone, all_of_it = ours.get_submodule(V), ours.get_submodule(Q)
    assert (alone.names, all_of_it.names) == (("a0",), ("a0", "a1", "a2"))
    x = torch.randn(1, 5, 32)
    with given(task_B=torch.tensor([0]), query_BQ=torch.eye(3)[:1]):
        routing = alone.decide(x)[0].dense()
    wanted = 1 / 3 if router == "even" else 1.0  # who chooses has one to choose; the mean is of all
    assert torch.allclose(routing, torch.full_like(routing, wanted))


@pytest.mark.parametrize(
    ("router", "options", "error", "said"),
    [
        ("arrow", {"topk": 2}, UnknownNameError, "Did you mean 'top_k'"),
        ("smear", {"gian": 2.0}, UnknownNameError, "Did you mean 'gain'"),
        ("poly", {"tasks": 2}, UnknownNameError, "num_tasks"),
        ("glider", {"embedding": {}}, UnknownNameError, "Did you mean 'embeddings'"),
        ("even", {"top_k": 1}, UsageError, "be none"),
        ("arrow", {"top_k": 3}, ShapeError, "number of adapters, 2"),
        ("arrow", {"top_k": 0}, ShapeError, "number of adapters, 2"),
        ("arrow", {"top_k": "2"}, UsageError, "top_k must be a int"),
        ("arrow", {"top_k": True}, UsageError, "top_k"),
        ("arrow", {"temperature": float("nan")}, UsageError, "temperature"),
        ("smear", {"gain": float("inf")}, UsageError, "gain"),
        ("smear", {"query_width": "8"}, UsageError, "query_width"),
        ("scalearn", {"share": 1}, UsageError, "share"),
        ("poly", {"num_tasks": 2.5}, UsageError, "num_tasks"),
        ("glider", {"embeddings": {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}}, UsageError, "finite"),
    ],
)
def test_options_that_a_router_does_not_take_are_refused_by_name(router, options, error, said):
    found = [PeftAdapter(name, None, factors(Q, V), dict.fromkeys((Q, V), torch.ones(32))) for name in "ab"]
    ours = model()
    with pytest.raises(error, match=said):
        attach(ours, found, router=router, router_options=options)
    assert not any(isinstance(module, Adapter) for module in ours.modules())


def test_what_is_no_base_model_is_named(tmp_path):
    path = folder(tmp_path, "a", 1)
    with pytest.raises(UsageError, match=r"PeftModel\w* with layers of PEFT.*unload"):
        attach(peft.PeftModel.from_pretrained(model(), path), [path])
    injected = model()
    injected.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="LlamaForCausalLM with layers of PEFT"):
        attach(injected, [path])
    with pytest.raises(UsageError, match=r"model must be a model.*load the model first"):
        attach(str(path), [path])
    for wrong in (str(path), path, read_adapter(path)):
        with pytest.raises(UsageError, match="be a list of adapters"):
            attach(model(), wrong)


def test_factors_that_the_models_type_cannot_hold_are_refused_by_name():
    large = {Q: (torch.full((2, 32), 1e5), torch.ones(32, 2), 1.0)}
    attach(model(), [PeftAdapter("a", None, large)])
    for bad, kind in (
        (large, torch.float16),
        ({Q: (torch.full((2, 32), float("nan")), torch.ones(32, 2), 1.0)}, torch.float32),
        ({Q: (torch.ones(2, 32), torch.ones(32, 2), float("inf"))}, torch.float32),
    ):
        with pytest.raises(CheckpointError, match=rf"q_proj, in adapter 'bad'.*{kind}"):
            attach(model().to(kind), [PeftAdapter("good", None, factors(Q)), PeftAdapter("bad", None, bad)])
