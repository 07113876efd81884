"""Every probe sees the fault that it is for, planted, and nothing where there is none; what cannot run is no pass."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from turnout.decide.token import ExpertChoice, TopK
from turnout.errors import UsageError
from turnout.layers import MoE
from turnout.measure.isolation import Finding, Isolation, audit
from turnout.measure.isolation.seen import Seen
from turnout.models import LM, LMConfig, MoEConfig
from turnout.types import batch_invariant

WIDTH, HIDDEN, EXPERTS = 32, 16, 8


def ours(router=TopK, **options):
    chance = torch.Generator().manual_seed(0)
    gate = router(WIDTH, EXPERTS, top_k=2, std=0.3, generator=chance, **options)
    return MoE(WIDTH, HIDDEN, EXPERTS, router=gate, std=0.2, generator=chance)


class Rows(nn.Module):
    """Each token by itself, without a product of matrices: no probe finds fault but with what is added."""

    def __init__(self, fault=lambda y: y):
        super().__init__()
        self.weight, self.fault = nn.Parameter(torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))), fault

    def forward(self, x):
        return self.fault(torch.relu(x) * self.weight + x)


class Quantised(nn.Module):
    """Dynamic int8 inputs of a map, with one scale for all tokens or one for each."""

    def __init__(self, whole):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))
        self.whole = whole

    def forward(self, x):
        most = x.abs().amax() if self.whole else x.abs().amax(-1, keepdim=True)
        step = most / 127
        code = (x / step).round()
        return (code.double() @ self.weight.double()).float() * step


class DeepSpeedLike(nn.Module):
    """The published algorithm of DeepSpeed's layer: top-1, positions by cumulative sum, capacity, drop, combine.

    It takes (B, S, D) or (T, D), and gives the output, the auxiliary loss and the counts.
    """

    def __init__(self, capacity_factor=1.0, drop_tokens=True):
        super().__init__()
        chance = torch.Generator().manual_seed(0)
        self.wg = nn.Parameter(torch.randn(EXPERTS, WIDTH, generator=chance) * 0.3)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH, generator=chance) * 0.2)
        self.hidden_size, self.capacity_factor, self.drop_tokens = WIDTH, capacity_factor, drop_tokens

    def forward(self, hidden_states, used_token=None):
        x = hidden_states.reshape(-1, WIDTH)
        gates = F.softmax(x @ self.wg.t(), dim=1)
        mask = F.one_hot(gates.argmax(1), EXPERTS)
        place = (mask.cumsum(0) - 1) * mask
        capacity = max(4, -(-len(x) * self.capacity_factor // EXPERTS)) if self.drop_tokens else len(x)
        kept = mask * (place < capacity)
        y = torch.einsum("te,td,edf->tf", kept * gates, x, self.experts)
        return y.view_as(hidden_states), gates.mean(0).sum(), mask.sum(0)


def test_a_layer_of_ours_leaks_no_number_and_within_the_mode_no_bit():
    layer = ours()
    layer.train()
    assert audit(layer).leaks() == ()
    assert layer.training and layer.router.training
    with batch_invariant():
        found = audit(layer)
    assert (found.leaks(bits=True), found.not_run) == ((), ())
    assert found["shape"].outputs == 1 and found["shape"].batches == 40
    assert "one output, to the bit" in str(found)


@pytest.mark.parametrize(
    ("layer", "probes"),
    [
        (ours(capacity_factor=2.0, priority="position"), {"overflow", "ties", "position"}),
        (ours(capacity_factor=1.0), {"overflow", "ties"}),
        (ours(ExpertChoice), {"overflow", "ties", "shape"}),
        (DeepSpeedLike(), {"overflow", "ties", "position"}),
        (Quantised(whole=True), {"scale"}),
        (Rows(lambda y: y + torch.randn_like(y)), {"repeat"}),
        (Rows(lambda y: y * torch.get_num_threads()), {"threads"}),
        (Rows(lambda y: y + 0.01 * len(y)), {"shape", "padding"}),
        (Rows(lambda y: y + 0.01 * torch.arange(len(y)).view(-1, *[1] * (y.ndim - 1))), {"position", "ties"}),
    ],
)
def test_each_planted_fault_is_seen(layer, probes):
    found = audit(layer, width=WIDTH)
    assert probes <= set(found.leaks()), str(found)
    assert all(found[name].fix and found[name].difference > 1e-4 for name in probes)


@pytest.mark.parametrize("layer", [Rows(), Quantised(whole=False)])
def test_without_a_fault_nothing_is_seen(layer):
    found = audit(layer, width=WIDTH)
    assert found.leaks() == () and found.not_run == (), str(found)


def test_deepspeed_without_drops_leaks_bits_at_most():
    found = audit(DeepSpeedLike(drop_tokens=False))
    assert found.leaks() == (), str(found)
    assert found.context["dtype"] == "float32"


def test_bits_are_told_from_numbers():
    """A kernel that is chosen by how many rows there are: the last bit, no more."""
    layer = Rows(lambda y: torch.nextafter(y, y + 1) if len(y) > 20 else y)
    found = audit(layer, width=WIDTH)
    assert (found.leaks(), found.leaks(bits=True)) == ((), ("shape",))
    assert "batch_invariant" in found["shape"].fix


def parity(shift):
    """One of two answers by the parity of a score in fine steps: rounding that a batch's size changes takes another."""

    class Parity(Rows):
        def forward(self, x):
            y = super().forward(x)
            score = y.mean(-1, keepdim=True) + shift(x)
            return y * (1 + 0.2 * ((30 * score).floor() % 2))

    return Parity().bfloat16()


def test_rounding_that_takes_another_expert_is_no_leak():
    def rounding(x):  # in the last bit of what adds up, as another order of sums has it
        return 4 * torch.finfo(x.dtype).eps * (len(x) % 2)

    found = audit(parity(rounding), width=WIDTH, length=1)
    assert found["shape"].difference > 0.03 and found.leaks() == (), str(found)
    assert "in float32" in found["shape"].what and "shape" in found.leaks(bits=True)
    assert "shape" in audit(parity(rounding), width=WIDTH, length=1, bound=0.03).leaks()


def test_a_leak_of_rounding_s_size_stays_one():
    """The same two answers, and taken by the batch's size in every dtype."""
    assert "shape" in audit(parity(lambda x: len(x) % 2 / 30), width=WIDTH, length=1).leaks()


def test_a_leak_of_one_dtype_alone_stays_one():
    """A kernel that is wrong in bf16: beyond what rounding does to other rows."""
    layer = Rows(lambda y: y * (1 + 0.2 * (len(y) % 2 if y.dtype == torch.bfloat16 and len(y) > 9 else 0))).bfloat16()
    assert "shape" in audit(layer, width=WIDTH).leaks()


def test_chance_leaves_the_rest_unknown():
    found = audit(Rows(lambda y: y + torch.randn_like(y)), width=WIDTH)
    assert found.leaks() == ("repeat",) and len(found.not_run) == 7
    assert "not known: overflow" in str(found)


def test_nothing_compared_is_a_fault():
    with pytest.raises(UsageError, match="depend on the input"):
        audit(Rows(torch.zeros_like), width=WIDTH)
    with pytest.raises(UsageError, match="finite"):
        audit(Rows(lambda y: y / 0), width=WIDTH)
    with pytest.raises(UsageError, match="at least two"):
        Seen(1e-4).finding("overflow", "", "")
    with pytest.raises(UsageError, match="how wide its input is"):
        audit(Rows())
    with pytest.raises(UsageError, match="4 or more"):
        audit(Rows(), width=WIDTH, batches=1)
    with pytest.raises(UsageError, match="a number for each token"):
        audit(Rows(lambda y: y.sum()), width=WIDTH)


def test_json_and_report():
    found = Isolation("a layer", (Finding("shape", "numbers", 3, 40, 0.5, "rows", "none"),), 1e-4, {"torch": "2"})
    assert json.loads(found.to_json())["leaks"] == ["shape"]
    assert "3 of 40" in str(found) and "change the answer: shape" in str(found)


# ---- models


def lm(**moe):
    options = {"num_experts": 4, "top_k": 2, "hidden": 16, **moe}
    config = LMConfig(vocab_size=40, width=32, layers=2, heads=2, max_seq=64, moe=MoEConfig(**options))
    model, chance = LM(config), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=chance)
    return model


def test_a_model_of_ours():
    model = lm()
    found = audit(model, batches=8)
    assert found.leaks() == () and found.not_run == (), str(found)
    with batch_invariant():
        found = audit(model, batches=8)
    assert found.leaks(bits=True) == () and found.not_run == (), str(found)


def test_a_model_with_capacity():
    found = audit(lm(router_options={"capacity_factor": 1.0, "priority": "position"}), batches=8)
    assert {"overflow", "ties"} <= set(found.leaks()), str(found)


class Blind(nn.Module):
    """A model that takes a mask and looks at what lies under it, or takes none."""

    def __init__(self, mask=True):
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        if mask:
            self.forward = self._masked

    def _masked(self, input_ids, attention_mask=None):
        return self.embedding(input_ids) + self.embedding(input_ids).mean(1, keepdim=True)

    def forward(self, input_ids):
        return self._masked(input_ids)


def test_padding_that_is_looked_at():
    assert "padding" in audit(Blind(), vocabulary=40, batches=4).leaks()
    found = audit(Blind(mask=False), vocabulary=40, batches=4)
    assert {"padding", "scale"} == set(found.not_run)


def stock(name):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64,
    }  # fmt: skip
    more = {
        "Mixtral": {"num_local_experts": 4},
        "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 16},
        "Jamba": {"num_experts": 4, "mamba_d_state": 4, "attn_layer_offset": 1, "attn_layer_period": 2,
                  "expert_layer_period": 1, "expert_layer_offset": 0},
    }  # fmt: skip
    torch.manual_seed(0)
    if name == "SwitchTransformers":
        config = transformers.SwitchTransformersConfig(
            vocab_size=40, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2,
            num_experts=4, expert_capacity=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
            decoder_start_token_id=0, pad_token_id=0,
        )  # fmt: skip
        return transformers.SwitchTransformersForConditionalGeneration(config)
    config = getattr(transformers, f"{name}Config")(**sizes, **more[name])
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.slow
def test_a_stock_model_in_bf16_that_rounding_routes_otherwise():
    """0.05 of padding, with a bound of 0.03: an expert that rounding takes."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, max_position_embeddings=256, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(2)
    model = transformers.MixtralForCausalLM(config).bfloat16()
    found = audit(model, batches=8)
    assert found["padding"].difference > 0.03 and found.leaks() == (), str(found)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "SwitchTransformers", "Jamba"])
def test_stock_models(name):
    model = stock(name)
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.ndim > 1 else 1
    found = audit(model, batches=8)
    assert found["scale"].leak != "not run" and found["repeat"].leak == "none"
    assert found["overflow"].leak in ("none", "bits")  # dropless, or limited within each text by itself
