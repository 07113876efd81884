"""In place: transformers' own models compute, train, generate and save as before, through turnout's executors."""

import contextlib
import copy
import functools
import subprocess
import sys

import pytest
import torch

import turnout
from turnout.errors import MissingExtraError, UnknownNameError, UsageError
from turnout.reshape import adopt, register_backend, release
from turnout.reshape.live.adopt import _routing, _weights

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "Qwen3Moe": {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "head_dim": 8, "norm_topk_prob": True,
    },
    "Qwen2Moe": {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 16,
    },
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "DeepseekV3": {
        "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 12,
        "first_k_dense_replace": 1, "n_shared_experts": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "GptOss": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6},
    "GraniteMoe": {"num_local_experts": 5, "num_experts_per_tok": 2, "hidden_act": "gelu"},
    "Aria": None,  # weights stored (in, out); built in make()
}  # fmt: skip
TEXT = [name for name in FAMILIES if name != "Aria"]


def make(family: str, seed: int = 0, **changes):
    """A tiny model of the family with random weights, as transformers builds it."""
    torch.manual_seed(seed)
    if family == "Aria":
        config = transformers.AriaTextConfig(
            **SIZES, moe_num_experts=5, moe_topk=2, moe_num_shared_experts=1, head_dim=8, **changes
        )
        model = transformers.AriaTextForCausalLM(config)
    else:
        config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | changes)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if parameter.isnan().any() or name.endswith(("experts.fc1.weight", "gate.weight", "router.weight")):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tokens(rows: int = 3, length: int = 11, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def outcome(model, ids):
    """The logits, the loss and every gradient."""
    model.zero_grad()
    output = model(ids, labels=ids)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), output.loss.detach(), gradients


def far(tensor, other) -> float:
    """The distance, relative to the size of the other."""
    return float((tensor.double() - other.double()).norm() / other.double().norm())


def implementations(model) -> set[str]:
    """What the experts' modules themselves would dispatch to."""
    return {m.config._experts_implementation for m in model.modules() if hasattr(m, "is_transposed")}


@pytest.mark.parametrize("backend", ["auto", "sort", "grouped", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_logits_and_gradients_are_those_of_eager(family, backend):
    model, ids = make(family), tokens()
    model.set_experts_implementation("eager")
    logits, loss, gradients = outcome(model, ids)
    same, report = adopt(model, backend=backend)
    assert same is model and report["left"] == 0
    routed = 2 if family == "DeepseekV3" else 3
    assert report["adopted"] == len(report["modules"]) == routed
    name = "turnout" if backend == "auto" else f"turnout:{backend}"
    assert implementations(model) == {name} and report["before"] == ["eager"]
    new_logits, new_loss, new_gradients = outcome(model, ids)
    torch.testing.assert_close(new_logits, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(new_loss, loss, rtol=0, atol=1e-6)
    assert new_gradients.keys() == gradients.keys() and any("experts" in name for name in gradients)
    # In fp32 rounding grows with depth: no implementation, eager included, is closer than about 1e-6 to the exact
    # gradients of a whole model. So: as close to them as eager is; one block alone is held to 3e-7 below.
    double = make(family).double()
    double.set_experts_implementation("eager")
    exact = outcome(double, ids)[2]
    for name, gradient in gradients.items():
        if gradient.norm() > 1e-6:
            ours, theirs = far(new_gradients[name], exact[name]), far(gradient, exact[name])
            assert ours <= 2 * theirs + 3e-7, (name, ours, theirs)
            # The gradients of sinks are small sums of large terms.
            assert far(new_gradients[name], gradient) <= (1e-5 if name.endswith("sinks") else 3e-6), name


@pytest.mark.parametrize("backend", ["auto", "sort", "grouped", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_block_are_eagers_within_3e_7(family, backend):
    model = make(family)
    name, experts = next((n, m) for n, m in model.named_modules() if hasattr(m, "is_transposed"))
    g = torch.Generator().manual_seed(5)
    x, slope = torch.randn(40, 24, generator=g), torch.randn(40, 24, generator=g)
    weight = torch.rand(40, 2, generator=g)
    index = torch.rand(40, experts.num_experts, generator=g).topk(2).indices

    def block():
        leaves = {"x": x.clone().requires_grad_(), "weight": weight.clone().requires_grad_()}
        y = experts(leaves["x"], index, leaves["weight"])
        leaves |= dict(experts.named_parameters())
        return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, [*leaves.values()], slope), strict=True))

    model.set_experts_implementation("eager")
    expected = block()
    assert name in adopt(model, backend=backend)[1]["modules"]
    for what, tensor in block().items():
        assert far(tensor, expected[what]) <= 3e-7, (what, far(tensor, expected[what]))


@pytest.mark.parametrize("family", FAMILIES)
def test_in_double_precision_the_gradients_agree_to_the_last_digits(family):
    """So that nothing hides behind the rounding of fp32."""
    model, ids = make(family, seed=3).double(), tokens(seed=3)
    model.set_experts_implementation("eager")
    logits, _, gradients = outcome(model, ids)
    new_logits, _, new_gradients = outcome(adopt(model)[0], ids)
    # Some routers round to fp32 on the way whatever the model's dtype.
    torch.testing.assert_close(new_logits, logits, rtol=1e-9, atol=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(new_gradients[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("family", TEXT)
def test_generate_gives_the_same_tokens(family):
    model, ids = make(family, seed=2), tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ask = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **ask)
    adopt(model)
    assert torch.equal(model.generate(ids, **ask), expected)
    assert implementations(model) == {"turnout"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("before", ["grouped_mm", "eager", "batched_mm"])
def test_release_puts_back_what_was_there(family, before):
    model, ids = make(family), tokens()
    model.set_experts_implementation(before)
    states = {name: value.clone() for name, value in model.state_dict().items()}
    logits, _, gradients = outcome(model, ids)
    was = model.get_experts_implementation()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    config, forwards = model.config.to_json_string(), [type(module).forward for module in model.modules()]
    adopt(model)
    adopt(model, backend="sort")  # a second time changes the backend, and not what is put back
    assert implementations(model) == {"turnout:sort"}
    outcome(model, ids)
    _, report = release(model)
    assert report["released"] == (2 if family == "DeepseekV3" else 3) and not report.notes
    assert model.get_experts_implementation() == was and implementations(model) == {before}
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.config.to_json_string() == config
    assert [type(module).forward for module in model.modules()] == forwards
    assert model.state_dict().keys() == states.keys()
    assert all(torch.equal(value, states[name]) for name, value in model.state_dict().items())
    again, _, gradients_again = outcome(model, ids)
    assert torch.equal(again, logits)
    assert all(torch.equal(gradients_again[name], gradient) for name, gradient in gradients.items())
    assert release(model)[1]["released"] == 0


@pytest.mark.parametrize("family", TEXT)
def test_save_and_reload_do_not_know_about_it(family, tmp_path):
    model, ids = make(family), tokens()
    model.save_pretrained(tmp_path / "plain")
    adopt(model)
    model.save_pretrained(tmp_path / "adopted")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "adopted" / file).read_bytes()
    kind = type(model)
    again = kind.from_pretrained(tmp_path / "adopted").eval()
    assert implementations(again) == {"grouped_mm"}
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-5)
        hooked = kind.from_pretrained(tmp_path / "adopted", experts_implementation="turnout").eval()
        assert torch.equal(hooked(ids).logits, expected)


@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3"])
def test_bf16_and_autocast(family):
    """As close to the fp32 model as transformers' own implementation is; a token whose experts nearly tie may go either
    way in both, which puts one text in eight further off in one of them, or in the other.
    """
    model = make(family)
    model.set_experts_implementation("eager")  # the default refuses bf16 widths that are not multiples of 8
    half, texts = copy.deepcopy(model).bfloat16(), [tokens(seed=seed) for seed in range(16)]
    cast = functools.partial(torch.autocast, "cpu", torch.bfloat16)

    def off(model, about=contextlib.nullcontext):
        with torch.no_grad(), about():
            return torch.stack([(model(ids).logits.float() - logits).norm() for ids, logits in exact])

    with torch.no_grad():
        exact = [(ids, model(ids).logits) for ids in texts]
        assert adopt(copy.deepcopy(half))[0](texts[0]).logits.dtype == torch.bfloat16
    theirs, theirs_cast = off(half), off(model, cast)
    ours, ours_cast = off(adopt(half)[0]), off(adopt(model)[0], cast)
    for mine, its in ((ours, theirs), (ours_cast, theirs_cast)):
        assert float((mine / its).median()) <= 1.05 and float(mine.sum() / its.sum()) <= 1.25
    with cast():
        model(texts[0], labels=texts[0]).loss.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_weights_of_another_dtype_than_the_tokens():
    """The default implementation casts the tokens to the weights' dtype; so do we."""
    model, x = make("Mixtral"), torch.randn(7, 24, generator=torch.Generator().manual_seed(0))
    experts = adopt(model)[0].model.layers[0].mlp.experts.bfloat16()
    index, weight = torch.tensor([[0, 1]]).expand(7, 2), torch.full((7, 2), 0.5)
    y = experts(x, index, weight)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, experts(x.bfloat16(), index, weight).float(), rtol=1e-2, atol=1e-2)


def test_without_gradients_and_with_frozen_experts():
    model, ids = make("Mixtral"), tokens()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    model.set_experts_implementation("eager")
    logits, _, gradients = outcome(model, ids)
    adopt(model)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-5)
    _, _, new = outcome(model, ids)
    assert new.keys() == gradients.keys() and not any("experts" in name for name in new)
    for name, gradient in gradients.items():
        torch.testing.assert_close(new[name], gradient, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_recomputes_through_the_executors():
    model, ids = make("Qwen3Moe").train(), tokens()
    adopt(model)
    _, _, gradients = outcome(model, ids)
    model.activation_checkpointing_enable()
    _, _, again = outcome(model, ids)
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile itself asks after every break
def test_a_compiled_block_leaves_the_experts_out():
    block = adopt(make("Mixtral"))[0].model.layers[0].mlp
    x, slope = (torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = []
    for call in (block, torch.compile(block, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        found.append([y, *torch.autograd.grad(y, [leaf, *block.parameters()], slope)])
    for new, old in zip(*found, strict=True):
        torch.testing.assert_close(new, old)


@pytest.mark.slow
def test_trainer_trains_to_the_same_weights(tmp_path):
    def trained(model):
        ids = tokens(24, 12)
        rows = [{"input_ids": row, "labels": row} for row in ids]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[],
            save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=1, seed=0, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model.state_dict()

    losses, weights = trained(make("Mixtral"))
    new_losses, new_weights = trained(adopt(make("Mixtral"))[0])
    assert len(losses) == 3 and losses[2] != losses[0]
    assert new_losses == pytest.approx(losses, abs=2e-4)
    assert new_weights.keys() == weights.keys()
    for name, weight in weights.items():
        # Adam's first steps turn a rounding difference in a gradient near zero into one of up to the learning rate.
        assert (new_weights[name] - weight).norm() <= 1e-3 * weight.norm(), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT asks by the old name
def test_peft_trains_adapters_around_an_adopted_model():
    peft = pytest.importorskip("peft")
    model, ids = make("Qwen3Moe"), tokens()
    lora = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(model, lora)
    model.set_experts_implementation("eager")
    logits, _, gradients = outcome(model, ids)
    assert adopt(model)[1]["adopted"] == 3
    new_logits, _, new_gradients = outcome(model, ids)
    torch.testing.assert_close(new_logits, logits, rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(new_gradients[name], gradient, rtol=1e-4, atol=1e-6)
    assert release(model)[1]["released"] == 3


# ---- the weights are views


@pytest.mark.parametrize("family", ["Mixtral", "Aria"])
def test_weights_are_views(family):
    experts = next(module for module in make(family).modules() if hasattr(module, "is_transposed"))
    weights = _weights(experts)
    assert weights.up_EDH.data_ptr() == experts.gate_up_proj.data_ptr()
    assert weights.down_EFD.data_ptr() == experts.down_proj.data_ptr()
    assert weights.up_EDH.shape[:2] == weights.down_EFD.shape[::2] == (5, 24)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("gated", [False, True])
def test_every_layout_of_the_hook(transposed, act, gated):
    """Biases, plain activations and both storage orders, against transformers' batched implementation."""
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import use_experts_implementation

    E, D, F = 4, 8, 6

    class ToyExperts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            g = torch.Generator().manual_seed(0)
            H = 2 * F if gated else F
            shapes = {"up": (E, D, H), "down": (E, F, D)}
            self.num_experts, self.act_fn = E, ACT2FN[act]
            for name, stem in (("up", "gate_up_proj" if gated else "up_proj"), ("down", "down_proj")):
                weight = torch.randn(shapes[name], generator=g)
                weight = weight if transposed else weight.transpose(1, 2).contiguous()
                setattr(self, stem, torch.nn.Parameter(weight))
                setattr(self, f"{stem}_bias", torch.nn.Parameter(torch.randn(E, shapes[name][2], generator=g)))

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise AssertionError("the hook dispatches elsewhere")

    kind = use_experts_implementation(is_transposed=transposed, has_bias=True, has_gate=gated)(ToyExperts)
    config = transformers.PreTrainedConfig()
    config._experts_implementation = "batched_mm"
    experts, found = kind(config), {}
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(9, D, generator=g), torch.rand(9, 2, generator=g)
    index = torch.rand(9, E, generator=g).topk(2).indices
    for when in ("before", "after"):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_(), *experts.parameters()]
        y = experts(leaves[0], index, leaves[1])
        found[when] = [y, *torch.autograd.grad(y.square().sum(), leaves)]
        assert (adopt if when == "before" else release)(experts)[1].values
    for new, old in zip(found["after"], found["before"], strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)
    assert config._experts_implementation == "batched_mm"


# ---- expert parallelism


@pytest.mark.parametrize("num_experts", [5, 256])
def test_entries_of_other_ranks_are_dropped_as_transformers_drops_them(num_experts):
    """Index E stands for an expert on another rank. 256 would wrap around in a byte."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = transformers.MixtralConfig(hidden_size=8, intermediate_size=6, num_local_experts=num_experts)
    experts = MixtralExperts(config)
    experts._is_expert_parallel = True
    g = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=g)
    x, weight = torch.randn(10, 8, generator=g), torch.rand(10, 3, generator=g)
    index = torch.rand(10, num_experts, generator=g).topk(3).indices
    index[torch.rand(10, 3, generator=g) < 0.4] = num_experts
    index[0] = num_experts  # a token with nothing here
    weight = weight.masked_fill(index == num_experts, 0)
    found = {}
    for name in ("eager", *register_backend()):
        if name.endswith(("auto", "kernels")):
            continue
        config._experts_implementation = name
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_(), *experts.parameters()]
        y = experts(leaves[0], index, leaves[1])
        assert not y[0].any()
        found[name] = [y, *torch.autograd.grad(y.square().sum(), leaves)]
    for name, tensors in found.items():
        for new, old in zip(tensors, found["eager"], strict=True):
            torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("wrong", [-1, 5, 300])
def test_an_index_that_transformers_does_not_know_either_is_refused(wrong, sharded):
    index, weight = torch.tensor([[0, 4], [wrong, 1]]), torch.ones(2, 2)
    with pytest.raises(UsageError, match=f"got {wrong}"):
        _routing(index, weight, 4, sharded)
    assert _routing(index[:1], weight[:1], 4, sharded).validate().num_entries == 1


def test_routing_of_nothing():
    empty = torch.zeros(0, 2)
    assert _routing(empty.long(), empty, 4, True).num_entries == 0
    all_elsewhere = _routing(torch.full((3, 2), 4), torch.zeros(3, 2), 4, True)
    assert (all_elsewhere.num_entries, all_elsewhere.num_tokens) == (0, 3)


# ---- what is not adopted


def test_clamps_that_were_not_published_are_left_alone_and_the_report_says_why():
    model, ids = make("GptOss", swiglu_limit=5.0), tokens()
    before = model(ids).logits
    with pytest.warns(UserWarning, match=r"changed nothing; 3 left as they were: gate and value alternate"):
        _, report = adopt(model)
    assert (report["adopted"], report["left"]) == (0, 3)
    assert report["left_because"]["model.layers.1.mlp.experts"] == (
        "gate and value alternate, under a gate that turnout does not know"
    )
    assert torch.equal(model(ids).logits, before) and implementations(model) == {"grouped_mm"}
    model.set_experts_implementation("turnout")
    with pytest.raises(UsageError, match="alternate"):
        model(ids)


def test_gpt_oss_beyond_its_clamps():
    """Biases so large that gates and values are clamped, where the gradients must stop as they do there."""
    model, ids = make("GptOss"), tokens()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate_up_proj_bias"):
                parameter.normal_(std=7, generator=torch.Generator().manual_seed(4))
    model.set_experts_implementation("eager")
    logits, loss, gradients = outcome(model, ids)
    adopt(model)
    new_logits, new_loss, new_gradients = outcome(model, ids)
    torch.testing.assert_close(new_logits, logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(new_loss, loss, rtol=0, atol=1e-5)
    assert all(far(new_gradients[name], gradient) < 1e-4 for name, gradient in gradients.items())


def post_norm(experts) -> None:
    experts.has_post_expert_norm = True
    experts.post_expert_norm = torch.nn.LayerNorm(24)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda experts: setattr(experts, "act_fn", torch.nn.Hardswish()), "no activation Hardswish"),
        (lambda experts: setattr(experts, "act_fn", torch.nn.Tanh()), "no activation Tanh"),
        (post_norm, "a norm of its own"),
        (lambda experts: experts.down_proj.__setattr__("data", experts.down_proj.to(torch.float8_e4m3fn)), "quantised"),
    ],
)
def test_one_layer_that_cannot_be_adopted_keeps_its_own(change, reason):
    """The others are adopted although they share its configuration."""
    model, ids = make("Mixtral"), tokens()
    experts = model.model.layers[1].mlp.experts
    change(experts)
    quantised = experts.down_proj.dtype == torch.float8_e4m3fn
    before = None if quantised else outcome(model, ids)
    config = model.config
    _, report = adopt(model)
    assert report["modules"] == ["model.layers.0.mlp.experts", "model.layers.2.mlp.experts"]
    assert reason in report["left_because"]["model.layers.1.mlp.experts"] and reason in report.notes[0]
    assert experts.config._experts_implementation == "grouped_mm" and config._experts_implementation == "turnout"
    adopt(model)  # again, with two configurations now
    if before:
        torch.testing.assert_close(outcome(model, ids)[0], before[0], rtol=0, atol=1e-5)
    assert release(model)[1]["released"] == 2
    assert experts.config is config and config._experts_implementation == "grouped_mm"
    if before:
        assert torch.equal(outcome(model, ids)[0], before[0])


def test_experts_without_the_hook_are_named():
    model = transformers.DbrxForCausalLM(
        transformers.DbrxConfig(
            d_model=16, n_heads=2, n_layers=2, max_seq_len=32, vocab_size=61,
            ffn_config={"ffn_hidden_size": 8, "moe_num_experts": 2, "moe_top_k": 1},
            attn_config={"kv_n_heads": 1, "rope_theta": 1e4},
        )
    )  # fmt: skip
    with pytest.warns(UserWarning, match="DbrxExperts does not use the experts hook"):
        _, report = adopt(model)
    assert report["adopted"] == 0 and set(report["left_because"].values()) == {
        "DbrxExperts does not use the experts hook of transformers"
    }


def test_a_gate_of_its_own_is_left_alone():
    model = make("Mixtral")
    kind = type(
        "OwnGate", (type(model.model.layers[0].mlp.experts),), {"_apply_gate": lambda self, h: h.chunk(2, -1)[0]}
    )
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = kind
    with pytest.warns(UserWarning, match="OwnGate has a gate of its own"):
        adopt(model)


def test_a_copy_and_a_wrapper_can_be_released_too():
    model = make("Mixtral")
    adopt(model)
    twin = copy.deepcopy(model)
    assert release(torch.nn.Sequential(twin))[1]["modules"][0] == "0.model.layers.0.mlp.experts"
    assert implementations(twin) == {"grouped_mm"} and implementations(model) == {"turnout"}


def test_release_leaves_what_the_user_set_since():
    model = make("Mixtral")
    adopt(model)
    model.set_experts_implementation("eager")
    _, report = release(model)
    assert report["released"] == 0 and len(report.notes) == 3 and implementations(model) == {"eager"}
    adopt(model)
    release(model)
    assert implementations(model) == {"eager"}


# ---- mistakes


def test_user_mistakes():
    with pytest.raises(UsageError, match="which has no experts"):
        adopt(torch.nn.Linear(2, 2))
    with pytest.raises(UnknownNameError, match="Did you mean 'sort'"):
        adopt(make("Mixtral"), backend="sorted")


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'turnout\[hf\]'"):
        adopt(torch.nn.Linear(2, 2))


def test_registering_twice_is_registering_once():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    names = register_backend()
    before = {name: ALL_EXPERTS_FUNCTIONS[name] for name in names}
    assert register_backend() == names
    assert all(ALL_EXPERTS_FUNCTIONS[name] is function for name, function in before.items())


def test_the_package_offers_both_without_loading_anything():
    assert turnout.adopt is adopt and turnout.release is release
    code = "import turnout.reshape, sys; assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
