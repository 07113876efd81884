"""Certificates: every planted fault is caught and named, and nothing that computes the same is called different."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn

from turnout.errors import CheckpointError, DataError, ShapeError, UnknownNameError, UsageError
from turnout.measure import Certificate, certify, weights_digest
from turnout.models import LM, LMConfig, MoEConfig, checkpoint
from turnout.paths import Bank
from turnout.reshape import adopt, quantize, upcycle
from turnout.types import Routing

EXPERTS = 6
MOE = MoEConfig(
    num_experts=EXPERTS, top_k=2, hidden=12, router="LossFree", shared_hidden=10, shared_gate=True, layers=(1, 2)
)
CONFIG = LMConfig(
    vocab_size=53,
    width=24,
    layers=3,
    heads=4,
    kv_heads=2,
    hidden=20,
    qkv_bias=True,
    out_bias=True,
    qk_norm="head",
    moe=MOE,
    init_std=0.25,
    max_seq=64,
)


def make(config: LMConfig = CONFIG, seed: int = 0) -> LM:
    """A model in which nothing is zero, one or equal that could be otherwise."""
    lm = LM(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in lm.state_dict().items():
            if "bias" in name:
                tensor.normal_(0, 0.05 if name.endswith("bias_E") else 0.25, generator=generator)
            elif "norm" in name:
                tensor.normal_(1, 0.25, generator=generator)
    return lm.eval()


def ids(rows: int = 4, length: int = 24, seed: int = 7) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def without(config: LMConfig, a: LM, **changes: object) -> LM:
    """Another configuration, with all the weights of ``a`` that it has."""
    new = make(dataclasses.replace(config, **changes), seed=5)
    new.load_state_dict({name: t for name, t in a.state_dict().items() if name in new.state_dict()}, strict=False)
    return new


# ---- planted faults


def swap_experts(b: LM) -> None:
    bank = b.blocks[2].ff.bank
    for tensor in (bank.up, bank.down):
        tensor[[1, 4]] = tensor[[4, 1]]


def scale_gate_row(b: LM) -> None:
    b.blocks[1].ff.router.weight[3] *= 1.5


def renormalise(b: LM) -> None:
    b.blocks[1].ff.router.renormalize = not b.blocks[1].ff.router.renormalize


def lose_shared(b: LM) -> None:
    b.blocks[2].ff.shared = b.blocks[2].ff.shared_gate = None


def lose_shared_gate(b: LM) -> None:
    b.blocks[2].ff.shared_gate = None


def silence_shared(b: LM) -> None:
    b.blocks[1].ff.shared.down.zero_()


def scale_experts(b: LM) -> None:
    b.blocks[1].ff.bank.down *= MOE.top_k


def drop_attention_bias(b: LM) -> None:
    b.blocks[1].attention.qkv.bias.zero_()


def drop_attention_out_bias(b: LM) -> None:
    b.blocks[0].attention.out.bias = None


def scale_attention(b: LM) -> None:
    b.blocks[2].attention.scale *= 2


def lose_router_bias(b: LM) -> None:
    b.blocks[2].ff.router.bias_E.zero_()


def reset_norm(b: LM) -> None:
    b.blocks[1].ff_norm.weight.fill_(1)


def reset_last_norm(b: LM) -> None:
    b.norm.weight.fill_(1)


def change_dense(b: LM) -> None:
    b.blocks[0].ff.down[3] *= 2


def change_embedding(b: LM) -> None:
    b.embedding[int(ids()[0, 3])] += 0.1


def change_head(b: LM) -> None:
    b.head.weight[5] *= 1.01


def scale_residual(b: LM) -> None:
    b.blocks[1].scale = 0.5


def not_a_number(b: LM) -> None:
    b.blocks[1].ff.bank.up[2] = torch.nan


FAULTS = [
    (swap_experts, "blocks.2", "experts", "blocks.2.ff.bank", (1, 4)),
    (scale_gate_row, "blocks.1", "router", "blocks.1.ff.router", ()),
    (renormalise, "blocks.1", "router", "blocks.1.ff.router", ()),
    (lose_shared, "blocks.2", "shared expert", "blocks.2.ff", ()),
    (lose_shared_gate, "blocks.2", "shared expert", "blocks.2.ff", ()),
    (silence_shared, "blocks.1", "shared expert", "blocks.1.ff.shared", ()),
    (scale_experts, "blocks.1", "experts", "blocks.1.ff.bank", tuple(range(EXPERTS))),
    (drop_attention_bias, "blocks.1", "attention", "blocks.1.attention.qkv", ()),
    (drop_attention_out_bias, "blocks.0", "attention", "blocks.0.attention.out", ()),
    (scale_attention, "blocks.2", "attention", "blocks.2.attention", ()),
    (lose_router_bias, "blocks.2", "router", "blocks.2.ff.router", ()),
    (reset_norm, "blocks.1", "norm", "blocks.1.ff_norm", ()),
    (reset_last_norm, "norm", "norm", "norm", ()),
    (change_dense, "blocks.0", "feed-forward", "blocks.0.ff", ()),
    (change_embedding, "embedding", "embedding", "blocks.0", ()),
    (change_head, "head", "head", "logits", ()),
    (scale_residual, "blocks.1", "residual", "blocks.1.ff_norm", ()),
    (not_a_number, "blocks.1", "experts", "blocks.1.ff.bank", (2,)),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("fault", "layer", "part", "module", "experts"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS]
)
def test_a_planted_fault_is_caught_and_located(fault, layer, part, module, experts, seed) -> None:
    a = make(seed=seed)
    b = copy.deepcopy(a)
    with torch.no_grad():
        fault(b)
    certificate = certify(a, b, ids())
    assert not certificate.equal
    assert (certificate.verdict, certificate.parted.layer, certificate.parted.part) == ("different", layer, part)
    assert certificate.parted.module == module
    assert certificate.parted.experts == experts
    assert f"{layer}" in str(certificate) and certificate.parted.module in str(certificate)


class Replicated(nn.Module):
    """A bank in more slots than experts: the tokens of an expert take turns among its replicas."""

    def __init__(self, bank: Bank, expert_of: list[int]) -> None:
        super().__init__()
        self.slots = Bank(len(expert_of), bank.width, bank.hidden, activation=bank.activation)
        self.slots.up.data, self.slots.down.data = bank.up.data[expert_of], bank.down.data[expert_of]
        self.expert_of = torch.tensor(expert_of)

    def forward(self, x_TD: Tensor, routing: Routing, *, backend: str = "auto") -> Tensor:
        slot_R = torch.empty_like(routing.expert_R)
        for entry, (token, expert) in enumerate(zip(routing.token_R, routing.expert_R, strict=True)):
            replicas = (self.expert_of == expert).nonzero().flatten()
            slot_R[entry] = replicas[int(token) % len(replicas)]
        placed = Routing.from_entries(
            routing.token_R,
            slot_R,
            routing.weight_R,
            num_tokens=routing.num_tokens,
            num_experts=len(self.expert_of),
        )
        return self.slots(x_TD, placed, backend=backend)


def test_a_replica_of_the_wrong_expert_is_caught_and_located() -> None:
    a = make()
    for copies, wrong in (((0, 1, 2, 3, 4, 5, 2), False), ((0, 1, 2, 3, 4, 5, 2), True)):
        b = copy.deepcopy(a)
        b.blocks[1].ff.bank = Replicated(a.blocks[1].ff.bank, list(copies))
        if wrong:
            for tensor in (b.blocks[1].ff.bank.slots.up, b.blocks[1].ff.bank.slots.down):
                tensor.data[6] = tensor.data[3]
        certificate = certify(a, b, ids())
        assert certificate.equal is not wrong
        if wrong:
            parted = certificate.parted
            assert (parted.layer, parted.part, parted.module) == ("blocks.1", "experts", "blocks.1.ff.bank")
            assert parted.experts == (2,)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_lost_correction_bias_of_grouped_experts_is_the_routers(seed: int) -> None:
    options = {"num_groups": 3, "top_groups": 2, "scale": 2.5}
    moe = MoEConfig(num_experts=6, top_k=2, hidden=12, router="GroupLimited", router_options=options)
    a = make(dataclasses.replace(CONFIG, moe=moe), seed=seed)
    b = copy.deepcopy(a)
    b.blocks[1].ff.router.bias_E.zero_()
    parted = certify(a, b, ids()).parted
    assert (parted.layer, parted.part, parted.module) == ("blocks.1", "router", "blocks.1.ff.router")
    assert parted.changed > 0
    b = copy.deepcopy(a)
    b.blocks[0].ff.router.scale = 1.0
    parted = certify(a, b, ids()).parted
    assert (parted.layer, parted.part, parted.changed) == ("blocks.0", "router", 0)


def test_a_broken_tie_is_the_heads() -> None:
    a = make(dataclasses.replace(CONFIG, tie_embeddings=True))
    b = without(CONFIG, a, tie_embeddings=False)
    certificate = certify(a, b, ids())
    assert (certificate.verdict, certificate.parted.layer, certificate.parted.part) == ("different", "head", "head")
    b.head.weight.data = a.embedding.data.clone()
    assert certify(a, b, ids()).verdict == "bit-equal"


def test_a_missing_shared_expert_in_the_architecture() -> None:
    a = make()
    b = without(CONFIG, a, moe=dataclasses.replace(MOE, shared_hidden=None, shared_gate=False))
    certificate = certify(a, b, ids())
    assert (certificate.parted.layer, certificate.parted.part) == ("blocks.1", "shared expert")
    assert any("blocks.1.ff.shared" in note for note in certificate.notes)


def test_the_tokens_that_changed_experts_are_named() -> None:
    a, item = make(), ids()
    b = copy.deepcopy(a)
    with torch.no_grad():
        lose_router_bias(b)
        one, other = a(item).routings[1], b(item).routings[1]
    changed_T = (one.dense() > 0).ne(other.dense() > 0).any(1)
    certificate = certify(a, b, item)
    (routing,) = [its for its in certificate.routings if its.module == "blocks.2.ff.router"]
    assert routing.changed == certificate.parted.changed == int(changed_T.sum()) > 0
    assert routing.first == tuple(divmod(int(token), item.shape[1]) for token in changed_T.nonzero()[:8])
    assert [its.changed for its in certificate.routings if its.module == "blocks.1.ff.router"] == [0]


# ---- what computes the same


def permute(lm: LM, order: list[int], layer: int) -> LM:
    lm = copy.deepcopy(lm)
    ff = lm.blocks[layer].ff
    for tensor in (ff.bank.up, ff.bank.down, ff.router.weight, ff.router.bias_E):
        tensor.data = tensor.data[order].clone()
    return lm


def test_a_model_is_bit_equal_to_itself_and_to_its_copy() -> None:
    a = make()
    certificate = certify(a, copy.deepcopy(a), ids())
    assert certificate.verdict == "bit-equal"
    assert certificate.logits.relative == certificate.logits.max_abs == certificate.logits.kl_max == 0
    assert certificate.logits.top1 == 1 and certificate.parted is None
    assert certificate.a.weights_sha256 == certificate.b.weights_sha256


def test_weights_in_few_bits_are_counted_as_weights() -> None:
    lm = make()
    few, _ = quantize(lm, bits=8, group=None)
    found = certify(lm, few, ids(1))
    assert found.b.params == found.a.params == few.cost().params


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_permuted_experts_are_the_same_experts(seed: int) -> None:
    a = make(seed=seed)
    order = [3, 0, 1, 2, 5, 4]
    certificate = certify(a, permute(a, order, layer=1), ids())
    assert certificate.equal
    (routing,) = [its for its in certificate.routings if its.module == "blocks.1.ff.router"]
    assert routing.changed == 0
    assert dict(routing.renamed) == {e: order.index(e) for e in range(EXPERTS)}


def test_a_fault_among_permuted_experts_is_still_found() -> None:
    a = make()
    b = permute(a, [3, 0, 1, 2, 5, 4], layer=1)
    b.blocks[1].ff.bank.down.data[0] *= 2  # expert 3 of A
    parted = certify(a, b, ids()).parted
    assert (parted.layer, parted.part, parted.experts) == ("blocks.1", "experts", (3,))


def test_a_resaved_checkpoint_is_bit_equal(tmp_path) -> None:
    a = make()
    checkpoint.save(tmp_path, a)
    assert certify(a, checkpoint.load(tmp_path), ids()).verdict == "bit-equal"


def test_an_export_is_bit_equal(tmp_path) -> None:
    moe = MoEConfig(num_experts=4, top_k=2, hidden=12)
    a = make(LMConfig(vocab_size=53, width=24, layers=2, heads=4, moe=moe, init_std=0.25))
    assert checkpoint.to_hf(a, tmp_path / "hf") == "MixtralForCausalLM"
    assert certify(a, checkpoint.from_hf(tmp_path / "hf"), ids()).verdict == "bit-equal"


@pytest.mark.parametrize(("seed", "granularity"), [(0, 1), (1, 2)])
def test_an_upcycled_model_equals_the_dense_one_and_a_wrong_scale_does_not(seed: int, granularity: int) -> None:
    dense = make(dataclasses.replace(CONFIG, moe=None), seed=seed)
    sparse, _ = upcycle(dense, num_experts=8, top_k=4, granularity=granularity)
    certificate = certify(dense, sparse, ids())
    assert certificate.equal
    sparse.blocks[1].ff.bank.down.data *= 4
    parted = certify(dense, sparse, ids()).parted
    assert (parted.layer, parted.part, parted.module) == ("blocks.1", "experts", "blocks.1.ff")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bf16_is_within_its_own_bound_of_fp32_and_not_within_that_of_fp32(seed: int) -> None:
    a = make(dataclasses.replace(CONFIG, moe=None, init_std=0.1), seed=seed)
    b = copy.deepcopy(a).to(torch.bfloat16)
    assert certify(a, b, ids()).verdict == "within bound"
    assert certify(a, b, ids()).bound == 0.05
    assert certify(a, b, ids(), bound=1e-4).verdict == "different"


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.08), (torch.float16, 0.015)])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_ties_that_rounding_decides_are_told_from_faults(seed: int, dtype: torch.dtype, bound: float) -> None:
    moe = MoEConfig(num_experts=8, top_k=2, hidden=12, shared_hidden=10)
    a = make(dataclasses.replace(CONFIG, moe=moe, init_std=0.1, qkv_bias=False, out_bias=False), seed=seed)
    b = copy.deepcopy(a).to(dtype)
    text = ids(8 if dtype == torch.bfloat16 else 32)  # float16 turns one token in hundreds
    rounded = certify(a, b, text, bound=bound)
    assert sum(routing.changed for routing in rounded.routings) > 0
    assert any("tied to the bound" in note for note in rounded.notes)
    assert rounded.verdict == "within bound" or rounded.parted.part == "router"
    for tensor in (b.blocks[1].ff.bank.up, b.blocks[1].ff.bank.down):
        tensor.data[[3, 6]] = tensor.data[[6, 3]]
    parted = certify(a, b, text, bound=bound).parted
    assert (parted.layer, parted.part, parted.experts) == ("blocks.1", "experts", (3, 6))


# ---- live models of transformers


@pytest.fixture(scope="module")
def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 53, "initializer_range": 0.25}
    return MixtralForCausalLM(MixtralConfig(**sizes, **more)).eval()


def test_an_adopted_model_equals_the_one_before(mixtral: nn.Module) -> None:
    adopted, _ = adopt(copy.deepcopy(mixtral))
    certificate = certify(mixtral, adopted, ids())
    assert certificate.equal
    assert [its.module for its in certificate.routings] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def test_a_loaded_model_equals_that_of_transformers_layer_by_layer(mixtral: nn.Module, tmp_path) -> None:
    mixtral.save_pretrained(tmp_path)
    ours = checkpoint.from_hf(tmp_path)
    certificate = certify(mixtral, ours, ids())
    assert certificate.equal
    assert {"model.layers.0", "model.layers.1.self_attn", "model.layers.1.mlp.experts"} <= set(certificate.layers)
    ours.blocks[1].ff.router.weight.data[2] *= 1.5
    parted = certify(mixtral, ours, ids()).parted
    assert (parted.layer, parted.part, parted.module) == ("model.layers.1", "router", "model.layers.1.mlp.gate")


@pytest.mark.parametrize("kind", ["olmo2", "phi3", "smollm3", "granite"])
def test_dense_models_and_faults_in_their_norms(kind: str, tmp_path) -> None:
    """Where the norms stand after, the one that is called post_attention_layernorm is another than elsewhere."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 53, "initializer_range": 0.25, "pad_token_id": None}
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    hf.save_pretrained(tmp_path)
    ours = checkpoint.from_hf(tmp_path)
    certificate = certify(hf, ours, ids())
    seen = {"model.layers.0", "model.layers.1.self_attn", "model.layers.1.mlp"}
    assert certificate.verdict == "bit-equal" or (certificate.equal and seen <= set(certificate.layers))
    norm = ours.blocks[1].ff_norm if kind != "olmo2" else ours.blocks[1].attention_out_norm
    norm.weight.data[3] *= 3
    parted = certify(hf, ours, ids()).parted
    assert (parted.layer, parted.part) == ("model.layers.1", "norm")
    assert parted.module == "model.layers.1.post_attention_layernorm"


def test_gpt_oss_and_faults_in_its_biases_and_sinks(tmp_path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "num_local_experts": 4, "vocab_size": 53, "initializer_range": 0.25}
    model = GptOssForCausalLM(GptOssConfig(**sizes, **more, num_experts_per_tok=2, sliding_window=5)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    good = checkpoint.from_hf(tmp_path)
    assert certify(model, good, ids()).equal
    faults = {
        ("model.layers.1", "experts"): lambda lm: lm.blocks[1].ff.bank.down_bias[2].add_(0.5),
        ("model.layers.1", "router"): lambda lm: lm.blocks[1].ff.router.bias[2].add_(2),
        ("model.layers.0", "attention"): lambda lm: lm.blocks[0].attention.sinks[1].add_(3),
    }
    for (layer, part), plant in faults.items():
        bad = copy.deepcopy(good)
        with torch.no_grad():
            plant(bad)
        parted = certify(model, bad, ids()).parted
        assert (parted.layer, parted.part) == (layer, part)
        assert part != "experts" or 2 in parted.experts


def test_faults_in_a_live_model_are_located(mixtral: nn.Module) -> None:
    b = copy.deepcopy(mixtral)
    experts = b.model.layers[1].mlp.experts
    for tensor in (experts.gate_up_proj, experts.down_proj):
        tensor.data[[0, 3]] = tensor.data[[3, 0]]
    parted = certify(mixtral, b, ids()).parted
    assert (parted.layer, parted.part, parted.experts) == ("model.layers.1", "experts", (0, 3))


def test_permuted_experts_of_a_live_model_are_the_same_experts(mixtral: nn.Module) -> None:
    b, order = copy.deepcopy(mixtral), [2, 0, 3, 1]
    mlp = b.model.layers[0].mlp
    for tensor in (mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight):
        tensor.data = tensor.data[order].clone()
    certificate = certify(mixtral, b, ids())
    assert certificate.equal and certificate.routings[0].changed == 0
    assert dict(certificate.routings[0].renamed) == {e: order.index(e) for e in range(4)}
    b.model.layers[1].self_attn.q_proj.weight.data[3] *= 2
    parted = certify(mixtral, b, ids()).parted
    assert (parted.layer, parted.part) == ("model.layers.1", "attention")


# ---- functions, maps, numbers


def test_functions_are_compared_by_their_logits() -> None:
    a = make()
    certificate = certify(lambda id_BS: a(id_BS).logits_BSV, lambda id_BS: a(id_BS).logits_BSV * 1.001, ids())
    assert certificate.verdict == "different"
    assert certificate.parted is None and certificate.a.weights_sha256 is None
    assert "layers were not compared" in certificate.notes[0]


def test_a_map_says_which_modules_are_the_same() -> None:
    a = make(dataclasses.replace(CONFIG, moe=None))
    b = copy.deepcopy(a)
    b.blocks = nn.ModuleList([b.blocks[0], nn.Identity(), *b.blocks[1:]])
    b.blocks[1].forward = lambda x, *args, **more: (x, None)
    names = {"blocks.1": "blocks.2", "blocks.2": "blocks.3"}
    assert certify(a, b, ids(), names=names).verdict == "bit-equal"
    b.blocks[3].ff.down.data *= 2
    parted = certify(a, b, ids(), names=names).parted
    assert (parted.layer, parted.part) == ("blocks.2", "feed-forward")
    with pytest.raises(UnknownNameError, match=r"module of B .blocks\.7"):
        certify(a, b, ids(), names={"blocks.1": "blocks.7"})


def test_the_numbers_are_those_of_their_definitions() -> None:
    generator = torch.Generator().manual_seed(3)
    a_BSV = torch.randn(2, 5, 11, generator=generator)
    b_BSV = a_BSV + 0.05 * torch.randn(2, 5, 11, generator=generator)
    gap = certify(lambda _: a_BSV, lambda _: b_BSV, ids(2, 5), bound=1.0).logits
    size = (a_BSV - a_BSV.mean(-1, keepdim=True)).norm(dim=-1).double()
    relative = (b_BSV - a_BSV).norm(dim=-1) / torch.maximum(size, size.flatten().median())
    kl = torch.nn.functional.kl_div(b_BSV.log_softmax(-1), a_BSV.log_softmax(-1), log_target=True, reduction="none")
    assert gap.relative == pytest.approx(float(relative.max()), rel=1e-5)
    assert divmod(int(relative.argmax()), 5) == (gap.prompt, gap.position)
    assert gap.max_abs == pytest.approx(float((b_BSV - a_BSV).abs().max()), rel=1e-5)
    assert gap.kl_mean == pytest.approx(float(kl.sum(-1).mean()), rel=1e-3)
    assert gap.kl_max == pytest.approx(float(kl.sum(-1).max()), rel=1e-3)
    assert gap.top1 == float((a_BSV.argmax(-1) == b_BSV.argmax(-1)).double().mean())


def test_prompts_of_any_length_are_counted_through() -> None:
    lengths, a = (3, 9, 5), make()
    items = [ids(1, length, seed=length) for length in lengths]

    def late(id_BS: Tensor) -> Tensor:
        logits_BSV = a(id_BS).logits_BSV.clone()
        if id_BS.shape[1] == 9:
            logits_BSV[0, 4] += torch.arange(53.0)
        return logits_BSV

    certificate = certify(lambda id_BS: a(id_BS).logits_BSV, late, items)
    assert (certificate.logits.prompt, certificate.logits.position) == (1, 4)
    assert (certificate.inputs.prompts, certificate.inputs.tokens) == (3, sum(lengths))


def test_masked_logits_are_equal_and_a_nan_is_not() -> None:
    a_BSV = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    a_BSV[..., 7] = -torch.inf
    b_BSV = a_BSV.clone()
    b_BSV[0, 1, 2] += 1e-6
    close = certify(lambda _: a_BSV, lambda _: b_BSV, ids(1, 4))
    assert close.verdict == "within bound" and close.logits.kl_max < 1e-6
    b_BSV[0, 3, 0] = torch.nan
    broken = certify(lambda _: a_BSV, lambda _: b_BSV, ids(1, 4))
    assert broken.verdict == "different" and broken.logits.relative is None and broken.logits.position == 3
    assert "not finite" in str(broken) and Certificate.from_json(broken.to_json()) == broken


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["all", "row", "one"])
@pytest.mark.parametrize("sides", ["a", "b", "both"])
def test_what_is_no_number_is_never_certified(value: float, where: str, sides: str) -> None:
    good_BSV = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    bad_BSV = good_BSV.clone()
    bad_BSV[{"all": (slice(None),), "row": (0, 2), "one": (0, 2, 3)}[where]] = value
    a_BSV, b_BSV = (bad_BSV if side in sides or sides == "both" else good_BSV for side in "ab")
    found = certify(lambda _: a_BSV, lambda _: b_BSV, ids(1, 4), bound=1e6)
    if sides == "both" and where == "one" and value == -torch.inf:
        assert found.verdict == "bit-equal", "a token that both rule out, as a padded vocabulary does"
        return
    assert found.verdict == "different" and not found.equal and found.logits.relative is None
    lost = {"all": 4, "row": 1, "one": 0 if value == -torch.inf else 1}[where]
    assert found.logits.lost_a == (lost if sides != "b" else 0)
    assert found.logits.lost_b == (lost if sides != "a" else 0)
    assert ("not finite" in str(found)) and Certificate.from_json(found.to_json()) == found
    assert found.logits.top1 <= 1 - lost / 4


def test_two_models_that_give_nothing_but_nan_are_not_equal() -> None:
    a, b = make(), make()
    with torch.no_grad():
        for model in (a, b):
            model.norm.weight[0] = torch.nan
    for one, other in ((a, b), (a, a)):
        found = certify(one, other, ids())
        assert found.verdict == "different"
        assert "nothing is certified, logits are not finite: those of A at" in str(found)


def test_a_bound_that_lets_everything_through_says_so() -> None:
    a = make()
    assert "lets through logits that are all zero" in str(certify(a, a, ids(), bound=1.0))
    assert "lets through" not in str(certify(a, a, ids(), bound=0.5))


def test_experts_that_no_token_took_are_named() -> None:
    a = make()
    a.blocks[1].ff.router.bias_E[4] = -100.0
    b = copy.deepcopy(a)
    b.blocks[1].ff.bank.up.data[4] += 1
    certificate = certify(a, b, ids())
    assert certificate.verdict == "bit-equal"
    assert certificate.routings[0].unused == (4,)
    assert "nothing is said of 1 experts" in str(certificate)


def test_numbers_that_the_inputs_do_not_reach_are_named() -> None:
    a, seen = make(), ids(1, 8)
    unseen = next(token for token in range(CONFIG.vocab_size) if not bool((seen == token).any()))
    b = copy.deepcopy(a)
    b.embedding.data[unseen] += 1
    certificate = certify(a, b, seen)
    assert certificate.verdict == "bit-equal"
    assert "other in B all the same: embedding, in numbers that these inputs do not reach" in str(certificate)
    assert "all the same" not in str(certify(a, copy.deepcopy(a), seen))
    rounded = copy.deepcopy(a).bfloat16()
    assert "all the same" not in str(certify(a, rounded, seen)), "bf16 is no other number"
    rounded.embedding.data[unseen] += 1
    found = certify(a, rounded, seen)
    assert found.verdict == "within bound"
    assert "other in B all the same: embedding, in" in str(found)


def test_models_are_left_as_they_were() -> None:
    a, b = make(), make()
    a.train()
    a.blocks[1].eval()
    before = [module.training for module in a.modules()]
    certify(a, b, ids())
    assert [module.training for module in a.modules()] == before and not b.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for m in (a, b) for module in m.modules())


# ---- hashes, files, mistakes


def test_the_hash_is_of_names_dtypes_shapes_and_bytes() -> None:
    a = make()
    b = copy.deepcopy(a)
    assert weights_digest(a) == weights_digest(b)
    b.blocks[2].ff.bank.down.data[5, 0, 0] += 1e-6
    digests = {weights_digest(a), weights_digest(b), weights_digest(copy.deepcopy(a).to(torch.bfloat16))}
    assert len(digests) == 3
    with torch.device("meta"), pytest.raises(UsageError, match="without data"):
        weights_digest(nn.Linear(2, 2))


def test_a_certificate_goes_to_disk_and_says_what_broke_it(tmp_path) -> None:
    a = make()
    b = copy.deepcopy(a)
    certificate = certify(a, b, ids())
    certificate.save(tmp_path / "c.json")
    again = Certificate.from_json((tmp_path / "c.json").read_text())
    assert again == certificate
    assert again.broken(certificate.a, certificate.b, certificate.inputs) == ()
    b.norm.weight.data[0] += 1
    other = certify(a, b, ids(seed=9))
    said = again.broken(other.a, other.b, other.inputs)
    assert len(said) == 2 and "weights of B" in said[0] and "inputs" in said[1]


def test_an_altered_certificate_is_refused() -> None:
    certificate = certify(make(), make(seed=1), ids())
    text = certificate.to_json()
    body = json.loads(text) | {"verdict": "bit-equal"}
    for altered in (json.dumps(body), text[: len(text) // 2], "[]", "{}"):
        with pytest.raises(CheckpointError, match="certify the two models again"):
            Certificate.from_json(altered)


def test_mistakes_say_what_to_do() -> None:
    a = make()
    with pytest.raises(DataError, match="no tokens"):
        certify(a, a, [])
    with pytest.raises(DataError, match="whole numbers"):
        certify(a, a, torch.zeros(2, 2))
    for bound in (-1.0, 0, 0.0, torch.nan, torch.inf, True):
        with pytest.raises(UsageError, match="bound must be a number above 0"):
            certify(a, a, ids(), bound=bound)
    with pytest.raises(ShapeError, match="at least one token"):
        certify(lambda id_BS: torch.empty(*id_BS.shape, 0), lambda id_BS: torch.empty(*id_BS.shape, 0), ids())
    with pytest.raises(UsageError, match="give logits"):
        certify(a, lambda id_BS: id_BS, ids())
    with pytest.raises(ShapeError, match="score the same tokens"):
        certify(a, make(dataclasses.replace(CONFIG, vocab_size=60)), ids())
