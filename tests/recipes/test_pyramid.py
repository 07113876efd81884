"""The pyramid-residual mixture and its student: counts and function, what refuses it, and a teacher in training."""

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F
from variants import TINY, ids

import turnout
from turnout.cli.main import main
from turnout.errors import CheckpointError, ShapeError, UsageError
from turnout.models import LM, LMConfig, MoEConfig, checkpoint
from turnout.models.decoding import Decoder
from turnout.models.families.express import architecture_of
from turnout.recipes import pyramid, pyramid_student, tiny
from turnout.recipes.execute import execute
from turnout.recipes.models import evaluate_model
from turnout.recipes.run import Run
from turnout.recipes.teach import read_teacher, taught
from turnout.train import TrainConfig
from turnout.train.step import Step
from turnout.train.taught import divergence, taught_until
from turnout.types import Packed

PYRAMID = MoEConfig(num_experts=5, top_k=1, hidden=24, shared_hidden=24, per_layer=(3, 5))
SMALL = (
    "width=16 heads=2 kv_heads=1 vocab_size=300 max_seq=64 seq=32 batch=4 steps=4 warmup=1 eval_every=2 "
    "checkpoint_every=2 log_every=1 eval_tokens=null moe.hidden=8 moe.shared_hidden=8"
).split()


def small(**more) -> LM:
    return LM(dataclasses.replace(TINY, moe=PYRAMID, init_std=0.2, **more), seed=1).eval()


@torch.no_grad()
def test_it_is_a_fixed_mlp_and_one_expert_in_every_layer() -> None:
    lm = small()
    assert [block.ff.bank.num_experts for block in lm.blocks] == [3, 5]
    assert [router.num_experts for router in lm.routers] == [3, 5]
    moe, x_TD = lm.blocks[0].ff, torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    share_TE = F.linear(x_TD, moe.router.weight).softmax(1)

    def mlp(up_HD, down_DF, x_D):
        gate_F, value_F = F.linear(x_D, up_HD).chunk(2)
        return F.linear(F.silu(gate_F) * value_F, down_DF)

    for x_D, share_E, y_D in zip(x_TD, share_TE, moe(x_TD).output, strict=True):
        e = int(share_E.argmax())
        one_D = mlp(moe.bank.up_EDH[e].t(), moe.bank.down_EFD[e].t(), x_D)
        fixed_D = mlp(moe.shared.up, moe.shared.down, x_D)
        torch.testing.assert_close(y_D, share_E[e] * one_D + fixed_D, rtol=1e-5, atol=1e-6)


def test_parameters_and_cost_are_those_of_the_layers() -> None:
    lm = small()
    expert, router = 3 * 32 * 24, 32
    dense = small_params(lm, lambda name: ".ff.bank" not in name and ".ff.router" not in name)
    cost = lm.cost()
    assert cost.params == dense + 8 * (expert + router)
    assert cost.params_active == cost.params - (3 - 1 + 5 - 1) * expert


def small_params(lm: LM, wanted) -> int:
    return sum(p.numel() for name, p in lm.named_parameters() if wanted(name))


def test_a_recipe_has_fewer_parameters_than_its_even_twin_and_as_many_active_products() -> None:
    ours, even = (LM(recipe().model).cost(seq=64) for recipe in (pyramid, tiny))
    assert ours.params < 0.91 * even.params and ours.flops == pytest.approx(even.flops, rel=0.01)
    student = LM(pyramid_student().model).cost(seq=64)
    assert student.params < 0.85 * ours.params


@torch.no_grad()
def test_it_is_decoded_saved_and_packed(tmp_path) -> None:
    lm, id_BS = small(), ids(2, 12)
    want_BSV = lm(id_BS).logits_BSV
    checkpoint.save(tmp_path, lm)
    assert torch.equal(checkpoint.load(tmp_path)(id_BS).logits_BSV, want_BSV)
    assert checkpoint.load(tmp_path).config == lm.config
    packed = turnout.reshape.quantize(lm, bits=8, group=8)[0]
    assert isinstance(packed.blocks[0].ff.bank.up.packed, Packed)
    for model, wanted in ((lm, want_BSV), (packed, packed(id_BS).logits_BSV)):
        decoder = Decoder(model, 2, 4)
        found = [decoder.prefill(id_BS[:, :5]).clone(), *(decoder.step(id_B).clone() for id_B in id_BS[:, 5:].T)]
        torch.testing.assert_close(torch.stack(found, 1), wanted[:, 4:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"per_layer": (5, 5)},
        {"per_layer": (3, 4)},
        {"per_layer": (0, 5)},
        {"per_layer": (1, 5), "top_k": 2},
        {"per_layer": (3, 5), "distinct": (2, 2)},
        {"per_layer": (3, 5), "router": "PreGate"},
        {"per_layer": ()},
    ],
)
def test_counts_that_are_none_are_named(wrong: dict) -> None:
    with pytest.raises(UsageError, match="per_layer must"):
        MoEConfig(**{"num_experts": 5, "top_k": 1, "hidden": 8, **wrong})


def test_as_many_counts_as_routed_layers() -> None:
    with pytest.raises(UsageError, match=r"moe.per_layer must give each of the 3 routed layers"):
        dataclasses.replace(TINY, layers=3, moe=PYRAMID)
    one = dataclasses.replace(PYRAMID, layers=(0, 2))
    config = dataclasses.replace(TINY, layers=3, moe=one)
    assert [config.experts_of(layer) for layer in range(3)] == [3, 0, 5]
    assert LMConfig.from_json_dict(json.loads(json.dumps(config.to_json_dict()))) == config


def test_no_architecture_has_it_and_each_says_so() -> None:
    with pytest.raises(UsageError, match=r"moe\.per_layer is \[3, 5\].*per_layer=None"):
        architecture_of(small().config)
    even = dataclasses.replace(PYRAMID, per_layer=None, router="LossFree", router_options={"rate": 0.0})
    assert architecture_of(dataclasses.replace(TINY, moe=dataclasses.replace(even, layers=(1,))))[0].architecture
    with pytest.raises(UsageError, match="cannot be written"):
        checkpoint.to_hf(small(), "nowhere")


@pytest.mark.parametrize("how", ["drop_experts", "merge_experts", "compress_experts", "latent_experts"])
def test_what_takes_every_layer_for_alike_refuses_it(how: str) -> None:
    keywords = {"drop_experts": {"keep": 2}, "merge_experts": {"keep": 2}}.get(how, {"rank": 4})
    with pytest.raises(UsageError, match="as many in each layer"):
        getattr(turnout.reshape, how)(small(), batches=[ids(2, 12)], **keywords)


# ---- the student


def test_the_divergence_is_that_of_torch_and_of_counted_positions_alone() -> None:
    ours, theirs = (torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    target_BS = torch.tensor([[1, 2, -100, 3, 4], [-100, 0, 0, 6, -100]])
    counts = target_BS != -100
    want = F.kl_div(ours.log_softmax(2)[counts], theirs.softmax(2)[counts], reduction="sum")
    torch.testing.assert_close(divergence(ours.requires_grad_(), theirs, target_BS), want)
    with pytest.raises(ShapeError, match="same vocabulary"):
        divergence(ours, theirs[..., :3], target_BS)


class _Stream:
    def batch(self, index: int):
        id_BS = ids(2, 9, seed=index)
        return type("Batch", (), {"id_BS": id_BS[:, :-1], "target_BS": id_BS[:, 1:]})()


def stepped(config: TrainConfig, teacher: LM | None, steps: int) -> LM:
    student = LM(TINY, seed=5)
    step = Step(student.train(), config, _Stream(), **({} if teacher is None else {"teacher": teacher}))
    for number in range(steps):
        step.run(number, 1e-3)
    return student


def test_a_step_descends_the_loss_and_the_divergence_until_the_teacher_goes() -> None:
    teacher = small()
    config = TrainConfig(steps=4, batch=2, seq=8, kd_weight=2.0, kd_share=0.5, clip=None)
    assert taught_until(config) == 2
    student, batch = LM(TINY, seed=5), _Stream().batch(0)
    logits = student(batch.id_BS).logits_BSV
    kd = divergence(logits, teacher(batch.id_BS).logits_BSV, batch.target_BS)
    nats = F.cross_entropy(logits.flatten(0, 1), batch.target_BS.flatten(), reduction="sum")
    ((nats + 2 * kd) / 16).backward()
    held: list[torch.Tensor] = []
    step = Step(LM(TINY, seed=5).train(), config, _Stream(), teacher=teacher)
    step.optimizer.register_step_pre_hook(lambda *_: held.append(step.model.head.weight.grad.clone()))
    for number in range(3):
        step.run(number, 0.0)  # the weights stay, so that every gradient is of the first ones
    torch.testing.assert_close(held[0], student.head.weight.grad, rtol=1e-4, atol=1e-7)
    alone = LM(TINY, seed=5).train()
    batch = _Stream().batch(2)
    (alone.loss(batch.id_BS, batch.target_BS).nats / 16).backward()
    torch.testing.assert_close(held[2], alone.head.weight.grad, rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_and_its_weight_go_together() -> None:
    plain, weighed = TrainConfig(steps=2, batch=2, seq=8), TrainConfig(steps=2, batch=2, seq=8, kd_weight=1.0)
    for config, teacher, said in ((plain, small(), "kd_weight=0"), (weighed, None, "none with kd_weight=1.0")):
        with pytest.raises(UsageError, match=f"the teacher must.*{said}"):
            Step(LM(TINY), config, _Stream(), teacher=teacher)
    with pytest.raises(UsageError, match="kd_share must"):
        TrainConfig(steps=2, batch=2, seq=8, kd_share=0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for n in range(40):
        (folder / f"{n}.txt").write_text(f"document {n}: " + " ".join(str(n * k) for k in range(60)))
    return folder


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory, text):
    out = tmp_path_factory.mktemp("runs") / "teacher"
    assert main(["train", "pyramid", *SMALL, "--data", str(text), "--out", str(out), "--quiet"]) == 0
    return out


def test_the_student_of_a_run(teacher_folder, text, tmp_path, capsys) -> None:
    out = tmp_path / "student"
    given = ["train", "pyramid_student", *(word for word in SMALL if "vocab" not in word), "--data", str(text)]
    assert main([*given, "--out", str(out), "--quiet"]) == 2
    assert "the teacher must be named with kd_weight=1.0" in capsys.readouterr().err
    assert not out.exists()
    assert main([*given, "--teacher", str(teacher_folder), "--out", str(out), "--quiet"]) == 0
    run = Run.open(out)
    assert (
        run.teacher is not None and run.model.vocab_size == checkpoint.load(teacher_folder / "model").config.vocab_size
    )
    assert (out / "model" / "tokenizer.json").read_text() == (teacher_folder / "model" / "tokenizer.json").read_text()
    report = evaluate_model(out, domains={"text": [str(text)]}, limit=500)
    assert 0 < report.values["max_vio"] < 8
    with pytest.raises(UsageError, match="vocab_size must stay"):
        run.override(["vocab_size=400"])
    assert main(["train", "--resume", "--out", str(out), "--quiet", "steps=5"]) == 0
    weights = next((teacher_folder / "model").glob("*.safetensors"))
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        with pytest.raises(CheckpointError, match="must be the recorded teacher"):
            execute(run.override(["steps=6"]), out, resume="latest", quiet=True)
    finally:
        weights.write_bytes(before)
    with pytest.raises(UsageError, match="start and teacher"):
        dataclasses.replace(run, start=run.teacher)


def test_any_recipe_may_be_taught(teacher_folder) -> None:
    run = taught(tiny().override(["seq=32", "max_seq=64"]), teacher_folder)
    assert run.train.kd_weight == 1.0 and taught(run.override(["kd_weight=3"]), teacher_folder).train.kd_weight == 3
    with pytest.raises(UsageError, match="one that reads 64"):
        read_teacher(taught(tiny(), teacher_folder))
    assert main(["train", "--teacher", str(teacher_folder), "--out", "x"]) == 2
