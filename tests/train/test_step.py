"""One optimizer step against the same thing written out."""

import dataclasses
import json
import types
import warnings

import pytest
import torch
from stand_in import EXPERTS, Tiny, tiny_config
from torch.nn import functional as F

from turnout.errors import TrainingError
from turnout.models import LM, LMConfig, MoEConfig
from turnout.train.balance import load_balance_loss, router_z_loss
from turnout.train.step import Step, Window, adamw, derived_seed


class Fixed:
    """A stream of given batches."""

    def __init__(self, *batches):
        self.batches = batches

    def batch(self, index):
        return self.batches[index]


def batch(seed, *, masked=0):
    generator = torch.Generator().manual_seed(seed)
    id_BS, target_BS = torch.randint(32, (2, 2, 16), generator=generator)
    target_BS.view(-1)[:masked] = -100
    return types.SimpleNamespace(id_BS=id_BS, target_BS=target_BS)


def stepped(model, config, *batches, steps=1):
    work = Step(model.train(), config, Fixed(*batches))
    for step in range(steps):
        work.run(step, config.lr_at(step))
    return work


def test_accumulation_equals_one_large_batch_even_when_targets_are_missing():
    """The mean is over tokens, not over micro-batches."""
    first, second = batch(0, masked=20), batch(1)
    both = types.SimpleNamespace(
        id_BS=torch.cat([first.id_BS, second.id_BS]), target_BS=torch.cat([first.target_BS, second.target_BS])
    )
    two, one = Tiny(moe=False), Tiny(moe=False)
    two.drop.p = one.drop.p = 0.0
    a = stepped(two, tiny_config(accumulate=2, clip=None), first, second)
    b = stepped(one, tiny_config(accumulate=1, clip=None), both)
    torch.testing.assert_close(a.grad_norm, b.grad_norm)
    torch.testing.assert_close(torch.tensor(a.window.means()), torch.tensor(b.window.means()))
    for p, q in zip(two.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_the_step_is_the_one_written_out():
    config = tiny_config(accumulate=1, aux_weight=0.5, z_weight=0.25, clip=0.5)
    one = batch(3)
    model, twin = Tiny(), Tiny()
    work = stepped(model, config, one)

    torch.manual_seed(derived_seed(config.seed, 0, 0))
    generator = torch.Generator().manual_seed(derived_seed(config.seed, 0, 0))
    output = twin.train()(one.id_BS, generator=generator)
    loss = F.cross_entropy(output.logits_BSV.flatten(0, 1), one.target_BS.flatten())
    aux, z = load_balance_loss(output.routings[0]), router_z_loss(output.routings[0])
    (loss + 0.5 * aux + 0.25 * z).backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    optimizer = adamw(twin, weight_decay=config.weight_decay, betas=config.betas)
    for group in optimizer.param_groups:
        group["lr"] = config.lr_at(0)
    optimizer.step()

    torch.testing.assert_close(work.grad_norm, norm)
    torch.testing.assert_close(torch.tensor(work.window.means()), torch.stack([loss, aux, z, 0 * z]).detach())
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_weights_of_zero_report_and_do_not_push():
    one = batch(4)
    model, twin = Tiny(), Tiny()
    work = stepped(model, tiny_config(accumulate=1, aux_weight=0.0, z_weight=0.0), one)
    assert work.window.means()[1] > 0.9 and work.window.means()[2] > 0
    stepped(twin, tiny_config(accumulate=1, aux_weight=1.0, z_weight=0.0), one)
    assert not torch.equal(model.router.weight, twin.router.weight)


def test_routers_learn_once_a_step_from_the_load_of_all_micro_batches():
    model = Tiny()
    work = stepped(model, tiny_config(accumulate=3), *(batch(n) for n in range(6)), steps=2)
    assert len(model.router.loads) == 2
    assert all(sum(load_E) == 3 * 32 for load_E in model.router.loads)
    assert model.router.bias_E.abs().max() > 0
    assert [load_E.tolist() for load_E in work.window.load_L] == [
        [sum(pair) for pair in zip(*model.router.loads, strict=True)]
    ]


def test_routers_learn_from_the_demand_before_capacity(monkeypatch):
    model = Tiny()
    whole = model.router.forward
    monkeypatch.setattr(model.router, "forward", lambda *a, **k: whole(*a, **k).truncate(2))
    stepped(model, tiny_config(accumulate=1), batch(0))
    assert sum(model.router.loads[0]) == 32


def test_matrices_decay_and_vectors_do_not():
    model = Tiny()
    model.register_parameter("up_bias", torch.nn.Parameter(torch.zeros(EXPERTS, 3)))
    model.norm.weight.requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = adamw(model, weight_decay=0.1, betas=(0.9, 0.95)).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {"embed.weight", "router.weight", "expert_ED"}
    assert {names[id(p)] for p in free["params"]} == {"norm.bias", "up_bias"}


def test_a_gradient_that_is_not_finite_is_found_before_the_update():
    model = Tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.router.weight.register_hook(lambda gradient: gradient * float("nan"))
    work = Step(model.train(), tiny_config(accumulate=1), Fixed(batch(0)))
    with pytest.raises(
        TrainingError, match=r"at step 1 with lr 0.005: loss [\d.]+; .*gradient router.weight \(1 in all\)"
    ):
        work.run(0, 0.005)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_parameter_that_is_not_finite_is_named():
    model = Tiny()
    with torch.no_grad():
        model.norm.bias[3] = float("inf")
    work = Step(model.train(), tiny_config(accumulate=1), Fixed(batch(0)))
    with pytest.raises(TrainingError, match=r"first non-finite parameter norm\.bias"):
        work.run(0, 0.005)


def test_a_norm_that_overflows_says_so():
    model = Tiny()
    model.router.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e38))
    work = Step(model.train(), tiny_config(accumulate=1), Fixed(batch(0)))
    with pytest.raises(TrainingError, match="gradient norm inf, every single gradient finite"):
        work.run(0, 0.005)


@pytest.mark.parametrize(
    ("router", "options"), [("GroupLimited", {}), ("NoisyTopK", {}), ("LossFree", {"renormalize": True})]
)
def test_a_router_whose_one_weight_is_always_1_is_told(router, options):
    def lm(top_k, **options):
        moe = MoEConfig(4, top_k, 8, router=router, router_options=options)
        return LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2, moe=moe)).train()

    model = lm(1, **options)
    with pytest.warns(UserWarning, match=f"{router} with top_k=1 scales each weight to 1"):
        Step(model, tiny_config(accumulate=1), Fixed(batch(0)))
    id_BS = torch.arange(12).view(2, 6)
    model(id_BS).logits_BSV.square().sum().backward()
    assert max(float(p.grad.abs().max()) for p in model.blocks[0].ff.router.parameters()) < 1e-4  # rounding
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Step(lm(2, **options), tiny_config(accumulate=1), Fixed(batch(0)))
        if router != "NoisyTopK":
            Step(lm(1, renormalize=False), tiny_config(accumulate=1), Fixed(batch(0)))
        for parameter in model.blocks[0].ff.router.parameters():
            parameter.requires_grad_(False)
        Step(model, tiny_config(accumulate=1), Fixed(batch(0)))


def test_a_weight_without_effect_warns_once():
    model = Tiny()
    whole = model.router.forward
    model.router.forward = lambda *a, **k: dataclasses.replace(whole(*a, **k), score_TE=None, logit_TE=None)
    work = Step(model.train(), tiny_config(accumulate=1, z_weight=0.0), Fixed(batch(0), batch(1)))
    with pytest.warns(UserWarning, match="aux_weight=0.01 has no effect"):
        work.run(0, 0.005)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        work.run(1, 0.005)
    assert work.window.means()[1:] == (0.0, 0.0, 0.0)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights():
    seen = []
    model = Tiny(moe=False)
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    work = stepped(model, tiny_config(accumulate=1, dtype="bf16"), batch(0))
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {s.dtype for state in work.optimizer.state.values() for s in state.values()} == {torch.float32}


def test_the_window_goes_to_json_and_back_exactly():
    window = Window(torch.device("cpu"))
    for n in range(3):
        window.add(torch.tensor([0.1 * n, 1 / 3, 2 / 7, n / 9]), [torch.tensor([n, 1]), torch.tensor([2, 3, n])])
    again = Window(torch.device("cpu"))
    again.restore(json.loads(json.dumps(window.to_json_dict())))
    assert torch.equal(again.sum_4, window.sum_4) and again.steps == 3
    assert [load_E.tolist() for load_E in again.load_L] == [[3, 3], [6, 9, 3]]


def test_a_window_of_before_there_were_penalties_is_read():
    window = Window(torch.device("cpu"))
    window.restore({"sum": [1.0, 2.0, 3.0], "steps": 2, "load": []})
    assert window.means() == (0.5, 1.0, 1.5, 0.0)


def test_seeds_differ():
    seeds = {derived_seed(seed, step, micro) for seed in range(4) for step in range(50) for micro in range(4)}
    assert len(seeds) == 800 and all(0 <= seed < 2**63 for seed in seeds)


def test_what_a_step_draws_depends_on_the_step_alone():
    draws = []
    for noise in (0, 1):
        model = Tiny()
        torch.manual_seed(noise)
        work = stepped(model, tiny_config(), *(batch(n) for n in range(4)), steps=2)
        draws.append(work.window.means())
    assert draws[0] == draws[1]


def test_where_looking_would_wait_the_weights_freeze_until_the_check():
    """What an accelerator does, on the CPU: the step that went wrong is found later, the weights are from before it."""

    class Bad(Tiny):
        def forward(self, id_BS, *, generator=None):
            output = super().forward(id_BS, generator=generator)
            if int(id_BS[0, 0]) == 31:
                output.logits_BSV = output.logits_BSV * float("inf")
            return output

    batches = [batch(n) for n in range(5)]
    for number, one in enumerate(batches):
        one.id_BS[0, 0] = 31 if number == 2 else 0
    config = tiny_config(accumulate=1)
    model, twin = Bad(), Tiny()
    stepped(twin, config, *batches, steps=2)
    work = Step(model.train(), config, Fixed(*batches))
    work._lazy = True
    for step in range(2):
        work.run(step, config.lr_at(step))
    work.check()
    for step in range(2, 5):
        work.run(step, config.lr_at(step))
    for (name, p), q in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    with pytest.raises(TrainingError, match=r"at step 3 with lr 0.01: .*first non-finite gradient expert_ED"):
        work.check()
