"""Quantizing: what it says is so, GPTQ does what it promises, and what comes out is a model like any other."""

import dataclasses

import pytest
import torch
from small import ids, make, sparse

from turnout.errors import CheckpointError, ShapeError, UnknownNameError, UsageError
from turnout.models import LM, LMConfig, MLAConfig, MoEConfig, checkpoint
from turnout.models.gguf import to_gguf
from turnout.paths import PackedWeight
from turnout.reshape import add_low_rank, average, densify, drop_experts, latent_experts, merge_experts, quantize
from turnout.reshape.quantize.codebooks import CODES, Codebook, codebook, float_levels, nf4_levels, quantile_levels
from turnout.reshape.quantize.gptq import gptq
from turnout.reshape.quantize.nearest import nearest
from turnout.reshape.resumable import Nowhere, keeping
from turnout.train.frozen import training

ALL = ("experts", "shared", "dense", "attention", "head")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text() -> list[torch.Tensor]:
    return [ids(seed=3), ids(seed=4)]


def shared() -> LM:
    """Experts in one layer of two, a shared expert, biases, latent attention, an output layer of its own."""
    moe = MoEConfig(4, 2, hidden=8, shared_hidden=16, bias=True, layers=(1,), activation="gelu")
    mla = MLAConfig(kv_rank=8, rope_dim=4, nope_dim=4, v_dim=4, q_rank=8)
    config = LMConfig(
        vocab_size=64, width=16, layers=2, heads=4, hidden=24, ff_bias=True, attention="mla", mla=mla, moe=moe
    )
    lm = LM(config, seed=1)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.2 * drawn(*parameter.shape, seed=parameter.numel()))
    return lm.eval()


# ---- data types


def test_levels_are_those_that_are_published():
    published = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                 -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                 0.7229568362236023, 1.0]  # fmt: skip
    assert torch.allclose(nf4_levels(), torch.tensor(published), atol=1e-6)
    assert (float_levels(4)[8:] * 6).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert (float_levels(8, exponent=4) * 480).abs().unique().numel() == 128


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("bits", range(3, 9))
def test_every_weight_goes_to_its_nearest_level(codes: str, bits: int):
    if codes == "nf4" and bits != 4:
        with pytest.raises(UsageError, match=r"bits must be 4 with codes='nf4'.*or codes='int'"):
            codebook(codes, bits)
        return
    weight = drawn(6, 32, seed=bits)
    book = codebook(codes, bits, weight=weight, group=16)
    assert len(book.level_N) == 2**bits and book.bits == bits and torch.equal(book.level_N, book.level_N.sort().values)
    coded = nearest(weight, book, 16)
    all_N = coded.scale.repeat_interleave(16, -1).unsqueeze(-1) * book.level_N
    best = (all_N - weight.unsqueeze(-1)).abs().amin(-1)
    assert torch.allclose((coded.written_out() - weight).abs(), best, atol=1e-6)
    most = weight.unflatten(-1, (-1, 16)).abs().amax(-1)
    at = weight.unflatten(-1, (-1, 16)).abs().argmax(-1, keepdim=True)
    kept = coded.written_out().unflatten(-1, (-1, 16)).gather(-1, at).squeeze(-1).abs()
    assert torch.allclose(kept, most, atol=1e-6), "the greatest of each group is exact"


@pytest.mark.parametrize("codes", CODES)
def test_what_is_packed_is_what_was_rounded(codes: str):
    weight = drawn(3, 6, 32)
    for bits in (4, 8) if codes == "int" else (4,):
        coded = nearest(weight, codebook(codes, bits, weight=weight, group=8), 8, dtype=torch.bfloat16)
        packed = coded.packed(torch.bfloat16)
        assert packed.bits == bits and torch.equal(packed.dequantised(), coded.written_out())


def test_groups_of_zeros_stay_zero_and_quantiles_of_few_values_are_levels():
    weight = torch.zeros(2, 8)
    weight[1, 4:] = 1.0
    for codes in CODES:
        book = codebook(codes, 4, weight=weight, group=4)
        assert torch.equal(nearest(weight, book, 4).written_out(), weight), codes
    assert torch.isfinite(quantile_levels(torch.zeros(5), 3)).all()


@pytest.mark.parametrize(
    ("weight", "group", "error", "said"),
    [
        (torch.full((1, 4), torch.nan), 4, UsageError, "every weight must be finite"),
        (torch.ones(1, 4), 3, ShapeError, "group must divide the 4 inputs.*group=2"),
        (torch.full((1, 4), 1e6), 4, UsageError, "every scale must be finite.*float16"),
    ],
)
def test_what_cannot_be_rounded_is_refused(weight, group, error, said):
    with pytest.raises(error, match=said):
        nearest(weight, codebook("int", 4), group, dtype=torch.float16)


@pytest.mark.parametrize("act_order", [True, False])
def test_what_cannot_be_rounded_is_refused_with_errors_made_good_too(act_order):
    weight_NOI, moment_NII = torch.full((1, 2, 4), 1e6), torch.eye(4)[None]
    with pytest.raises(UsageError, match=r"every scale must be finite.*float16"):
        gptq(weight_NOI, moment_NII, codebook("int", 4), 4, act_order=act_order, dtype=torch.float16)


# ---- GPTQ


def plainly(weight_OI: torch.Tensor, moment_II: torch.Tensor, book: Codebook, damping: float) -> torch.Tensor:
    """The paper's recursion without a factor: each input's best correction, the inverse shrunk by Gauss's step."""
    size, weight_OI = len(moment_II), weight_OI.double().clone()
    inverse = torch.linalg.inv(moment_II.double() + damping * moment_II.diagonal().double().mean() * torch.eye(size))
    scale_O1 = book.scale(weight_OI, size).double()
    done = torch.empty_like(weight_OI)
    for i in range(size):
        place_O = book.index(weight_OI[:, i].float(), scale_O1[:, 0].float())
        done[:, i] = book.value(place_O, scale_O1[:, 0].float()).double()
        error_O = (weight_OI[:, i] - done[:, i]) / inverse[i, i]
        weight_OI[:, i + 1 :] -= error_O[:, None] * inverse[i, i + 1 :]
        inverse = inverse - inverse[:, i, None] * inverse[i] / inverse[i, i]
    return done


@pytest.mark.parametrize("inner", [16, 150])
def test_it_is_the_papers_recursion(inner: int):
    weight_NOI, x_TI = drawn(2, 5, inner, seed=1), drawn(400, inner, seed=2) @ drawn(inner, inner, seed=3)
    moment_NII = torch.stack((x_TI.t() @ x_TI, torch.eye(inner)))
    book = codebook("int", 4)
    found = gptq(weight_NOI, moment_NII, book, inner, damping=0.1).written_out()
    assert torch.allclose(found[0].double(), plainly(weight_NOI[0], moment_NII[0], book, 0.1), atol=1e-5)
    assert torch.equal(found[1], nearest(weight_NOI[1], book, inner).written_out()), "nothing to make good"


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [8, 48, 192])
@pytest.mark.parametrize("codes", CODES)
def test_outputs_move_less_than_by_rounding_to_nearest(act_order: bool, group: int, codes: str):
    inner = 192  # groups that end within a block of inputs, and beyond it
    weight_NOI, x_TI = drawn(1, 12, inner, seed=4), drawn(300, inner, seed=5) @ drawn(inner, inner, seed=6)
    moment_NII, book = (x_TI.t() @ x_TI)[None], codebook(codes, 4, weight=weight_NOI, group=group)
    coded = gptq(weight_NOI, moment_NII, book, group, act_order=act_order, dtype=torch.bfloat16)
    moved, plain = (
        float(((weight_NOI - each.written_out())[0] @ x_TI.t()).norm())
        for each in (coded, nearest(weight_NOI, book, group, dtype=torch.bfloat16))
    )
    assert moved < 0.75 * plain
    assert torch.equal(coded.packed(torch.bfloat16).dequantised(), coded.written_out())


def test_inputs_that_were_never_seen_keep_their_weights():
    weight_NOI, x_TI = drawn(2, 4, 16), drawn(64, 16)
    x_TI[:, 3] = 0
    moment_NII = torch.stack((x_TI.t() @ x_TI, torch.zeros(16, 16)))
    book = codebook("int", 4)
    found, plain = (
        each.written_out() for each in (gptq(weight_NOI, moment_NII, book, 4), nearest(weight_NOI, book, 4))
    )
    assert torch.equal(found[1], plain[1])
    assert (found[0, :, 3] - weight_NOI[0, :, 3]).abs().max() < 0.3 and found[0, :, 3].any()


@pytest.mark.parametrize(
    ("moment", "damping", "error", "said"),
    [
        (torch.eye(8), 0.01, ShapeError, r"be \(N, O, I\) and \(N, I, I\)"),
        (torch.eye(4)[None], 0.01, ShapeError, "weight and moment"),
        (torch.eye(8)[None], 0.0, UsageError, "damping must be above 0"),
        (torch.full((1, 8, 8), torch.inf), 0.01, UsageError, "moments of inputs must be finite"),
    ],
)
def test_moments_that_do_not_fit_are_refused(moment, damping, error, said):
    with pytest.raises(error, match=said):
        gptq(drawn(1, 2, 8), moment, codebook("int", 4), 8, damping=damping)


# ---- models


@pytest.mark.parametrize("model", [make, sparse, shared])
@pytest.mark.parametrize("method", ["nearest", "gptq"])
@pytest.mark.parametrize(("bits", "codes"), [(4, "int"), (8, "int"), (4, "nf4"), (4, "quantile"), (4, "float")])
@torch.no_grad()
def test_packed_or_rounded_it_computes_the_same(model, method: str, bits: int, codes: str):
    lm = model()
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    options = {"bits": bits, "codes": codes, "group": 4, "method": method, "batches": text()}
    parts = ALL if lm.head is not None else ALL[:-1]
    (small, report), (rounded, other) = (quantize(lm, **options, parts=parts, packed=held) for held in (True, False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())
    id_BS = ids(seed=9)
    assert torch.allclose(small(id_BS).logits_BSV, rounded(id_BS).logits_BSV, atol=2e-5)
    assert torch.allclose(small.loss(id_BS, id_BS).nats, rounded.loss(id_BS, id_BS).nats, rtol=1e-5)
    again = densify(small)[0]
    assert again.config == lm.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), rounded.parameters(), strict=True))
    assert report["params_after"] == report["params_before"] == small.cost().params == lm.cost().params
    assert small.cost() == lm.cost()
    assert report["weight_bytes_after"] == sum(tensor.nbytes for tensor in small.state_dict().values())
    assert 0 <= report["kl_nats"] == pytest.approx(other["kl_nats"], rel=0.05, abs=1e-6)
    assert report["relative_difference"] > 0 and 0 < report["top1"] <= 1


@pytest.mark.parametrize("model", [make, sparse])
def test_gptq_moves_the_output_less(model):
    options = {"group": 4, "bits": 3, "packed": False, "batches": text()}
    nats = [quantize(model(), method=how, **options)[1]["kl_nats"] for how in ("nearest", "gptq")]
    assert nats[1] < nats[0]


@torch.no_grad()
def test_it_is_saved_and_read_to_the_bit_in_any_dtype(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        lm = quantize(shared().to(dtype), bits=4, group=8, codes="nf4", parts=ALL)[0]
        checkpoint.save(tmp_path / str(dtype), lm)
        again = checkpoint.load(tmp_path / str(dtype))
        assert again.config == lm.config
        for (name, a), b in zip(lm.state_dict().items(), again.state_dict().values(), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), name
        id_BS = ids(seed=9)
        assert torch.equal(again(id_BS).logits_BSV, lm(id_BS).logits_BSV)
        assert torch.equal(lm.generate(id_BS, tokens=3, temperature=0), again.generate(id_BS, tokens=3, temperature=0))


def test_a_folder_that_lacks_scales_is_refused(tmp_path):
    import json

    from safetensors.torch import load_file, save_file

    from turnout.storage import digest, sealed

    checkpoint.save(tmp_path, quantize(make(), group=8)[0])
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: part for name, part in tensors.items() if "qkv.weight.scale" not in name}
    save_file(kept, tmp_path / "model.safetensors")
    body = json.loads((tmp_path / "config.json").read_text())
    weights = tmp_path / "model.safetensors"
    body["files"] = {weights.name: {"bytes": weights.stat().st_size, "sha256": digest(weights)}}
    body.pop("seal", None)
    kept = {name: body[name] for name in ("format", "model", "dtype", "files")}
    (tmp_path / "config.json").write_text(json.dumps(sealed(kept)))
    with pytest.raises(CheckpointError, match=r"missing \(blocks.0.attention.qkv.weight.scale"):
        checkpoint.load(tmp_path)


def test_scales_keep_their_dtype_and_memory_is_a_quarter():
    lm = quantize(make(), group=8)[0]
    weight = lm.to(torch.float64).blocks[0].attention.qkv.weight
    assert isinstance(weight, PackedWeight) and weight.packed.scale.dtype == torch.bfloat16
    assert lm.embedding.dtype == torch.float64 and lm(ids()).logits_BSV.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 5}, "bits must be 4 or 8, which are stored.*got 5.*bits=8, or packed=False"),
        ({"bits": 3}, "got 3.*bits=4"),
        ({"bits": 2}, "bits must be from 3 to 8"),
        ({"bits": 9, "packed": False}, "bits must be from 3 to 8"),
        ({"group": 7}, r"quantized.group must divide the \d+ inputs of the maps that make .*group=4"),
        ({"group": 0}, "group"),
        ({"bits": 8, "codes": "float"}, "codes must be 'int' with bits=8"),
        ({"codes": "flaot"}, "Did you mean 'float'"),
        ({"method": "gtpq"}, "Did you mean 'gptq'"),
        ({"method": "gptq"}, "batches must be given"),
        ({"parts": ("head",)}, "output layer is the embedding"),
        ({"parts": ()}, "parts"),
    ],
)
def test_what_cannot_be_done_is_refused(options, said):
    lm = LM(dataclasses.replace(make().config, tie_embeddings=True))
    with pytest.raises(UsageError, match=said):
        quantize(lm, **{"group": 4, **options})


def test_what_would_pass_over_weights_in_few_bits_is_refused(tmp_path):
    lm = quantize(sparse(), group=4)[0]
    refused = [
        lambda: quantize(lm),
        lambda: add_low_rank(lm, rank=2),
        lambda: drop_experts(lm, keep=3, by="random"),
        lambda: merge_experts(lm, keep=3, batches=text()),
        lambda: latent_experts(lm, rank=4),
        lambda: average([lm, lm]),
        lambda: training(lm, "all").__enter__(),
        lambda: training(lm, "router").__enter__(),
        lambda: checkpoint.to_hf(quantize(sparse(), group=4, codes="nf4")[0], tmp_path / "hf"),
    ]
    for number, call in enumerate(refused):
        with pytest.raises(UsageError, match=r"few bits|quantized"):
            call()
            pytest.fail(f"number {number} was let through")
    assert not (tmp_path / "hf").exists()


def test_gguf_refuses_them_by_name(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(UsageError, match="few bits"):
        to_gguf(quantize(make(), group=8)[0], tmp_path / "x.gguf")


class _Memory(Nowhere):
    """Keeps everything, and stops after so many pieces."""

    def __init__(self, stop: int) -> None:
        self.kept, self.stop = dict[str, dict[str, torch.Tensor]](), stop

    def get(self, name):
        return self.kept.get(name)

    def put(self, name, piece):
        self.kept[name] = {key: tensor.clone() for key, tensor in piece.items()}
        if len(self.kept) == self.stop:
            raise KeyboardInterrupt


def test_stopped_in_between_it_ends_with_the_same_bits():
    lm, options = sparse(), {"group": 4, "method": "gptq", "batches": text()}
    whole = quantize(lm, **options)[0]
    memory = _Memory(stop=1)
    with pytest.raises(KeyboardInterrupt), keeping(memory):
        quantize(lm, **options)
    memory.stop = 0
    with keeping(memory):
        again = quantize(lm, **options)[0]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_part_that_nobody_has_is_not_passed_over() -> None:
    lm = LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2))
    with pytest.raises(UnknownNameError, match=r"atention.*Did you mean 'attention'"):
        quantize(lm, group=8, parts=("dense", "atention"))
    with pytest.raises(UsageError, match=r"parts must be several words.*pass parts=\('dense',\)"):
        quantize(lm, group=8, parts="dense")
