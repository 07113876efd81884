"""Everything that computes keeps to the device of its model, found out without a GPU: see pretend.py."""

import copy
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from turnout import reshape
from turnout.measure import bits_per_byte, certify
from turnout.models import LM, LMConfig
from turnout.run import execute
from turnout.types import ExpertWeights, Routing, TraceWriter
from turnout.wrappers import takes

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "train")]
from pretend import CUDA, Mixed, Pretend, pretending
from tables import cases

models, routers, reshapes = (
    cases("models/test_lm.py"),
    cases("contracts/test_decide_token.py"),
    cases("contracts/test_reshape.py"),
)
sequences, many = cases("contracts/test_decide_sequence.py"), cases("contracts/test_reshape_many.py")


def moved(model: nn.Module) -> nn.Module:
    """A copy on the device."""
    return copy.deepcopy(model).to(CUDA)


# ---- the pretence itself


def test_devices_do_not_mix() -> None:
    with pretending():
        there, here = torch.ones(3, device="cuda", requires_grad=True), torch.arange(3.0)
        assert (there.device, here.device, there.cpu().device) == (CUDA, torch.device("cpu"), torch.device("cpu"))
        assert type(there * 2 + 1) is Pretend and type(torch.zeros_like(there)) is Pretend
        assert type(there[torch.tensor([0, 2])]) is Pretend, "an index may be on the CPU"
        assert type(there * torch.tensor(2.0)) is Pretend, "so may a scalar"
        for mix in (lambda: there + here, lambda: here[torch.zeros(1, dtype=torch.long, device="cuda")]):
            with pytest.raises(Mixed):
                mix()
        for reads in (lambda: there.detach().numpy(), lambda: list(map(float, memoryview(there.detach())))):
            with pytest.raises(TypeError):
                reads()
        (there.to("cpu") * here).sum().backward()
        assert type(there.grad) is Pretend and there.grad.tolist() == [0, 1, 2]


def test_a_backward_pass_is_looked_at_too() -> None:
    class Slips(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, slope):
            return slope * torch.ones(3)

    with pretending():
        x = torch.ones(3, device="cuda", requires_grad=True)
        with pytest.raises(Mixed):
            Slips.apply(x).sum().backward()


# ---- models


@pytest.mark.parametrize("name", models.VARIANTS)
def test_a_model_computes_there_what_it_does_here(name: str) -> None:
    lm = models.make(name)
    id_BS = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(0))
    mask_BS = torch.ones_like(id_BS)
    mask_BS[0, :4] = 0
    want, loss = lm(id_BS, attention_mask=mask_BS), lm.train().loss(id_BS, id_BS)
    loss.nats.backward()
    drawn = lm.eval().generate(id_BS, tokens=5, attention_mask=mask_BS, generator=torch.Generator().manual_seed(0))
    with pretending():
        there, id_there = moved(lm), id_BS.to(CUDA)
        there.zero_grad()
        got = there(id_there, attention_mask=mask_BS.to(CUDA))
        torch.testing.assert_close(got.logits_BSV.cpu()[mask_BS.bool()], want.logits_BSV[mask_BS.bool()])
        assert all(type(routing.weight_R) is Pretend for routing in got.routings)
        made = there.train().loss(id_there, id_there)
        made.nats.backward()
        torch.testing.assert_close(made.nats.cpu(), loss.nats)
        for (which, p), q in zip(there.named_parameters(), lm.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), which
            if q.grad is not None:
                torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=1e-4, atol=1e-4)
        chance = torch.Generator().manual_seed(0)
        again = there.eval().generate(id_there, tokens=5, attention_mask=mask_BS, generator=chance)
        assert torch.equal(again.cpu(), drawn), "the same draw on every device"


def test_ids_elsewhere_are_refused_by_name() -> None:
    with pretending():
        lm = moved(LM(LMConfig(vocab_size=8, width=8, layers=1, heads=2)))
        with pytest.raises(ValueError, match=r"id_BS must be on the model's cuda:0 .*cpu.*id_BS.to\('cuda:0'\)"):
            lm(torch.zeros(1, 2, dtype=torch.long))


# ---- routers and executors


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", routers.NAMES)
def test_a_router_decides_there_what_it_does_here(name: str, training: bool) -> None:
    router, x_TD = routers.build(name, 6).train(training), routers.tokens(17)
    want = routers.call(router, x_TD)
    with pretending():
        there = moved(router)
        chance, said = torch.Generator().manual_seed(0), routers.known(router, 17)
        if (given := said.get("given")) is not None:
            known = {
                name: there_.to(CUDA)
                for name in ("sequence_T", "kind_T")
                if (there_ := getattr(given, name)) is not None
            }
            said["given"] = dataclasses.replace(given, **known)
        if "carry_TX" in said:
            said["carry_TX"] = said["carry_TX"].to(CUDA)
        got = there(x_TD.to(CUDA), token_id_T=routers.ids(17), generator=chance, **said)
        assert torch.equal(got.token_R.cpu(), want.token_R) and torch.equal(got.offset_E.cpu(), want.offset_E)
        torch.testing.assert_close(got.weight_R.cpu(), want.weight_R)
        if training and hasattr(router, "after_step"):
            more = {"num_tokens": 17} if takes(router.after_step, "num_tokens") else {}
            there.after_step(got.load_E, **more)
            router.after_step(want.load_E, **more)
            for p, q in zip(there.buffers(), router.buffers(), strict=True):
                torch.testing.assert_close(p.cpu(), q)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", sequences.NAMES)
def test_a_router_of_sequences_decides_there_what_it_does_here(name: str, training: bool) -> None:
    router, x_TD, given = sequences.build(name).train(training), sequences.tokens(7), sequences.about([3, 4])
    want = sequences.call(router, x_TD, given)
    with pretending():
        # What is known of a sequence may lie where the caller has it; the layers above put ``sequence_T`` beside x.
        there = dataclasses.replace(given, sequence_T=given.sequence_T.to(CUDA))
        got = sequences.call(moved(router), x_TD.to(CUDA), there)
        assert torch.equal(got.token_R.cpu(), want.token_R) and torch.equal(got.offset_E.cpu(), want.offset_E)
        torch.testing.assert_close(got.weight_R.cpu(), want.weight_R)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "sort", "grouped", "auto"])
def test_an_executor_runs_there(backend: str, dtype: torch.dtype) -> None:
    seeded = torch.Generator().manual_seed(0)
    index_TK, weight_TK = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0]]), torch.rand(4, 2, generator=seeded)
    tensors = [torch.randn(*shape, generator=seeded).to(dtype) for shape in ((4, 8), (4, 8, 32), (4, 16, 8))]
    routing = Routing.from_topk(index_TK, weight_TK, num_experts=4)
    want = execute(tensors[0], routing, ExpertWeights(*tensors[1:]), backend="reference")
    with pretending():
        there = [each.to(CUDA).requires_grad_() for each in tensors]
        routing = Routing.from_topk(index_TK.to(CUDA), weight_TK.to(CUDA), num_experts=4)
        got = execute(there[0], routing, ExpertWeights(*there[1:]), backend=backend)
        got.sum().backward()
        assert all(type(each.grad) is Pretend for each in there)
        torch.testing.assert_close(got.detach().cpu(), want, rtol=2e-2, atol=2e-1 if dtype == torch.bfloat16 else 1e-4)


# ---- measuring


def test_text_is_measured_and_traced_there(tmp_path) -> None:
    held_out = cases("train/test_held_out.py")
    from turnout.train.data import Document, prepare, windows

    texts = [Document(str(n), f"text number {n} and so on " + "word " * (n % 7)) for n in range(24)]
    tokens = prepare({"d": texts}, tmp_path / "t", vocab_size=265, held_out=0.5, quiet=True)
    for router in held_out.OPTIONS:
        lm = held_out.model(router)
        of = {"domains": tokens.domains}
        want = bits_per_byte(lm, windows(tokens.held_out, batch=4, seq=96), tokens.byte_length_V, **of)
        with pretending():
            there = moved(lm)
            traced = {"num_experts_L": [4, 4], "domains": tokens.domains, "token_ids": True}
            with TraceWriter(tmp_path / router, **traced) as trace:
                batches = windows(tokens.held_out, batch=4, seq=96)
                got = bits_per_byte(there, batches, tokens.byte_length_V, **of, trace=trace)
        assert got.bits_per_byte == pytest.approx(want.bits_per_byte, rel=1e-5) and got.load_LE == want.load_LE


def test_a_model_here_is_certified_against_itself_there() -> None:
    lm = models.make("moe")
    id_BS = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))
    with pretending():
        there = moved(lm)
        found = certify(lm, there, id_BS)
        assert found.equal and found.a.weights_sha256 == found.b.weights_sha256
        with torch.no_grad():
            there.blocks[1].attention.out.weight[0] += 1
        assert certify(there, lm, id_BS).parted.layer == "blocks.1"


# ---- reshaping


@pytest.mark.parametrize("name", many.MANY)
def test_several_models_become_one_there(name: str) -> None:
    lms = [many.sparse(seed) for seed in range(3)]
    want, _ = many.MANY[name](lms)
    with pytest.MonkeyPatch.context() as patch, pretending():
        patch.setattr(many, "ids", lambda: cases("reshape/small.py").ids().to(CUDA))
        new, _ = many.MANY[name]([moved(lm) for lm in lms])
        assert {type(p.data) for p in new.parameters()} == {Pretend}
        if name != "fisher":  # its information is drawn from the very weights
            for p, q in zip(new.parameters(), want.parameters(), strict=True):
                torch.testing.assert_close(p.cpu(), q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", reshapes.SOMETHING)
def test_a_reshape_works_there(name: str) -> None:
    lm, options = reshapes.SOMETHING[name](reshapes.text())
    want, _ = getattr(reshape, name)(lm, **options)
    with pretending():
        new, report = getattr(reshape, name)(moved(lm), **options)
        assert {type(p.data) for p in new.parameters()} == {Pretend}
        assert report["params_after"] == sum(p.numel() for p in want.parameters())
        for id_BS in reshapes.text():
            torch.testing.assert_close(
                new(id_BS.to(CUDA)).logits_BSV.detach().cpu(), want(id_BS).logits_BSV.detach(), rtol=1e-3, atol=1e-3
            )
