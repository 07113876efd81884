"""C3PO: what is recorded, which scores come out, and that the last token of a prompt alone is routed by them."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from variants import ROUTED, TINY, VARIANTS, ids, make

import turnout
from turnout.errors import CheckpointError, ShapeError, UsageError
from turnout.models import C3PO, LM, Contrast, Pathways
from turnout.models.c3po import c3po as module
from turnout.models.c3po.rerouted import Rerouted, batch_of, own_scores

KINDS = ["moe", "groups", "gpt-oss", "loss-free", "moe in one layer"]
PROMPTS = [row[: 3 + n % 4].tolist() for n, row in enumerate(ids(8, 7))]


def known(lm: LM, prompts=PROMPTS, tokens: int = 2) -> Pathways:
    made = turnout.generate(lm, prompts, tokens=tokens, temperature=0, eos=None)
    return Pathways.record(lm, prompts, made.rows)


@pytest.fixture
def moe() -> tuple[LM, Pathways]:
    lm = make("moe")
    return lm, known(lm)


@torch.no_grad()
def test_what_goes_well_is_kept_with_its_scores(moe) -> None:
    lm, pathways = moe
    wrong = [(*answer[:-1], (answer[-1] + 1) % 61) for answer in pathways.answers]
    both = Pathways.record(lm, [*PROMPTS, *PROMPTS], [*pathways.answers, *wrong])
    assert both.asked == 16 and both.prompts == pathways.prompts == tuple(map(tuple, PROMPTS))
    for prompt, score_LE, embedding_D in zip(both.prompts, both.score_NLE, both.embedding_ND, strict=True):
        out = lm(torch.tensor([prompt]))
        torch.testing.assert_close(score_LE, torch.stack([r.score_TE[-1] for r in out.routings]), rtol=0, atol=1e-5)
        torch.testing.assert_close(embedding_D, F.normalize(out.hidden_BSD[0].mean(0), dim=0), rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="hold some that are right"):
        Pathways.record(lm, PROMPTS, wrong)


def test_it_is_written_and_read(moe, tmp_path) -> None:
    lm, pathways = moe
    pathways.save(tmp_path / "new")
    read = Pathways.load(tmp_path / "new")
    for field in dataclasses.fields(Pathways):
        ours, theirs = getattr(pathways, field.name), getattr(read, field.name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    how = {"neighbors": 2, "layers": 2}
    assert torch.equal(C3PO(read, **how).scores(lm, PROMPTS[:2]), C3PO(pathways, **how).scores(lm, PROMPTS[:2]))
    file = tmp_path / "new" / "pathways.json"
    file.write_text(file.read_text().replace(f'"{pathways.routers}"', '"other"'))
    with pytest.raises(CheckpointError, match="do not belong together"):
        Pathways.load(tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"Pathways\.save"):
        Pathways.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_the_last_token_of_a_prompt_alone_is_routed_by_given_scores(name: str, monkeypatch) -> None:
    lm, prompts = make(name), PROMPTS[:3]
    batch = batch_of(prompts, [(0,)] * 3, torch.device("cpu"))
    own_BLE = own_scores(lm, batch)[0]
    routed = len(lm.routers)
    drawn_BLE = torch.rand(own_BLE[:, -1:].shape, generator=torch.Generator().manual_seed(0))

    def hidden(score_BLE):
        return lm.hidden(batch.id_BS, batch.length_B, detour=Rerouted(batch.last_B, score_BLE, routed))[0]

    whole = lm.hidden(batch.id_BS, batch.length_B)[0]
    at = torch.arange(3), batch.last_B
    torch.testing.assert_close(hidden(own_BLE)[at], whole[at], rtol=0, atol=1e-5)
    changed = hidden(drawn_BLE)
    for row, prompt in enumerate(prompts):
        before = slice(0, len(prompt) - 1)
        torch.testing.assert_close(changed[row, before], whole[row, before], rtol=0, atol=1e-5)
        # The same by hand: a router that says so of the last token it is asked about.
        router = lm.routers[-1]
        with monkeypatch.context() as patch:
            scored = type(router).scored

            def told(x_TD, router=router, scored=scored, row=row):
                logit_TE, score_TE = scored(router, x_TD)
                return logit_TE, torch.cat([score_TE[:-1], drawn_BLE[row, -1:]])

            patch.setattr(router, "scored", told, raising=False)
            by_hand = lm(torch.tensor([prompt])).hidden_BSD[0, -1]
        torch.testing.assert_close(changed[row, len(prompt) - 1], by_hand, rtol=0, atol=1e-5)


@pytest.mark.parametrize("by", ["gradient", "kernel", "mode"])
def test_all_of_its_own_pathway_is_the_model_itself(by: str, moe) -> None:
    lm, pathways = moe
    for how in ({"temperature": 0}, {"seed": 0}):
        plain = turnout.generate(lm, PROMPTS[:3], tokens=4, logprobs=True, **how)
        same = turnout.generate(lm, PROMPTS[:3], tokens=4, logprobs=True, remix=C3PO(pathways, by=by, alpha=1), **how)
        some = turnout.generate(lm, PROMPTS[:3], tokens=4, logprobs=True, remix=C3PO(pathways, by=by, rate=5), **how)
        assert plain.rows == same.rows and torch.equal(plain.logprob_BN, same.logprob_BN)
        assert not torch.equal(plain.logprob_BN, some.logprob_BN)


@torch.no_grad()
def test_tokens_that_follow_are_routed_as_ever(moe) -> None:
    lm, pathways = moe
    how = C3PO(pathways, by="kernel", layers=1, neighbors=2, experts=3)
    prompt, new = PROMPTS[0], []
    last = torch.tensor([len(prompt) - 1])
    score_BLE = how.scores(lm, [prompt])
    for _ in range(6):
        text = torch.tensor([[*prompt, *new]])
        hidden = lm.hidden(text, detour=Rerouted(last, score_BLE, 2))[0]
        new.append(int(lm.scores(hidden[:, -1]).argmax()))
    assert turnout.generate(lm, PROMPTS[:2], tokens=6, temperature=0, eos=None, remix=how).rows[0] == new


def test_the_mean_of_neighbours_by_hand(moe) -> None:
    lm, pathways = moe
    prompt = [9, 8, 7, 6]
    batch = batch_of([prompt], [(0,)], torch.device("cpu"))
    own_LE = own_scores(lm, batch)[0][0, -1:]
    with torch.no_grad():
        one_D = F.normalize(lm(torch.tensor([prompt])).hidden_BSD[0].mean(0), dim=0)
    distance_N = (pathways.embedding_ND - one_D).norm(dim=1)
    near = distance_N.argsort()[:3]
    weight = torch.exp(-0.5 * (distance_N[near] / distance_N[near].mean()) ** 2)
    mean_LE = (weight[:, None, None] * pathways.score_NLE[near, -1:]).sum(0) / weight.sum()
    core = own_LE >= own_LE.topk(2, dim=1).values[:, -1:]
    want_LE = 0.3 * own_LE + 0.7 * torch.where(core, mean_LE, own_LE)
    found = C3PO(pathways, by="kernel", alpha=0.3, layers=1, experts=2).scores(lm, [prompt])
    torch.testing.assert_close(found[0], want_LE, rtol=0, atol=1e-5)
    chosen = C3PO(pathways, by="kernel", alpha=None, layers=1).scores(lm, [prompt])[0]
    mean_LE = C3PO(pathways, by="kernel", layers=1).scores(lm, [prompt])[0]
    on_line = [torch.allclose(chosen, s * own_LE + (1 - s) * mean_LE, atol=1e-5) for s in module._SHARES]
    assert any(on_line)


@pytest.mark.parametrize("name", ["moe", "loss-free", "groups"])
def test_the_gradient_is_that_of_the_neighbours_loss(name: str) -> None:
    lm = make(name).double()
    pathways = known(lm.float(), tokens=2)
    lm = lm.double()
    how = C3PO(pathways, neighbors=2, layers=1)
    near, weight = torch.tensor([[0, 5]]), torch.tensor([[0.7, 0.3]], dtype=torch.float64)
    own_BLE = pathways.score_NLE[2:3, -1:].double()
    core = torch.ones_like(own_BLE, dtype=torch.bool)
    leaf = own_BLE.clone().requires_grad_()
    loss = module._losses(how, lm, leaf, core, near, weight).sum()
    (slope,) = torch.autograd.grad(loss, leaf)
    with torch.no_grad():
        plain = module._losses(how, lm, own_BLE, None, near, weight).sum()
        torch.testing.assert_close(loss.detach(), plain, rtol=1e-6, atol=0)
    router = lm.routers[-1]
    chosen = router.chosen(own_BLE[0])[0][0].tolist()
    for e in chosen:
        with torch.no_grad():
            moved = [own_BLE.clone() for _ in range(2)]
            moved[0][0, 0, e] += 1e-3
            moved[1][0, 0, e] -= 1e-3
            high, low = (module._losses(how, lm, each, None, near, weight).sum() for each in moved)
        torch.testing.assert_close(slope[0, 0, e], (high - low) / 2e-3, rtol=5e-3, atol=1e-4)
    others = [e for e in range(router.num_experts) if e not in chosen]
    assert bool((slope[0, 0, others] != 0).all()), "experts that are not chosen have a gradient too"


def test_steps_lower_the_neighbours_loss_and_rows_do_not_matter(moe) -> None:
    lm, pathways = moe
    how = C3PO(pathways, rate=0.05, layers=2, neighbors=3, steps=5)
    prompts = [[9, 8, 7], [3, 3, 3, 3, 3]]
    together = how.scores(lm, prompts)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(how.scores(lm, [prompt])[0], together[row], rtol=0, atol=1e-5)
    near, weight = how._near(module.embedded(lm, prompts, None), pathways.embedding_ND)
    own = own_scores(lm, batch_of(prompts, [(0,)] * 2, torch.device("cpu")))[0]
    with torch.no_grad():
        before, after = (module._losses(how, lm, each, None, near, weight) for each in (own, together))
    assert bool((after < before).all())
    assert bool((together >= 0).all())
    assert all(parameter.grad is None for parameter in lm.parameters())


def test_only_core_experts_of_critical_layers_move(moe) -> None:
    lm, pathways = moe
    own = own_scores(lm, batch_of([[9, 8]], [(0,)], torch.device("cpu")))[0]
    for by in ("gradient", "kernel", "mode"):
        found = C3PO(pathways, by=by, layers=1, experts=2, rate=1.0).scores(lm, [[9, 8]])
        assert found.shape == (1, 1, 5)
        moved = (found[0, 0] - own[0, -1]).abs() > 1e-7
        assert 0 < int(moved.sum()) <= 2
        assert set(moved.nonzero().flatten().tolist()) <= set(own[0, -1].topk(2).indices.tolist())


def test_another_model_or_encoder_is_named(moe) -> None:
    lm, pathways = moe
    with pytest.raises(UsageError, match="one with other routers"):
        turnout.generate(make("moe", seed=4), PROMPTS[:1], tokens=1, remix=C3PO(pathways))
    with pytest.raises(UsageError, match="encoder must be that of the pathways"):
        C3PO(pathways, encoder=lambda prompts: torch.ones(len(prompts), 1)).check(lm)
    with pytest.raises(ShapeError, match="the encoder must give one row for each"):
        Pathways.record(lm, PROMPTS, pathways.answers, encoder=lambda prompts: torch.ones(1, 1))
    by_length = Pathways.record(
        lm, PROMPTS, pathways.answers, encoder=lambda prompts: torch.tensor([[len(p), 1.0] for p in prompts])
    )
    with pytest.raises(UsageError, match=r"encoder must be that of the pathways.*got none"):
        C3PO(by_length).check(lm)
    with pytest.raises(UsageError, match="contrast and remix must be one"):
        turnout.generate(lm, PROMPTS[:1], tokens=1, remix=C3PO(pathways), contrast=Contrast())
    for name in ("dense", "hash"):
        with pytest.raises(UsageError, match=r"turnout\.models\.Pathways"):
            Pathways.record(make(name), PROMPTS, pathways.answers)


@pytest.mark.parametrize(
    "wrong",
    [
        {"by": "luck"}, {"kernel": "flat"}, {"alpha": 1.5}, {"alpha": None}, {"neighbors": 9}, {"rate": 0},
        {"layers": 0}, {"steps": 0}, {"experts": 0},
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(wrong: dict, moe) -> None:
    with pytest.raises((UsageError, turnout.errors.UnknownNameError), match=next(iter(wrong))):
        C3PO(moe[1], **wrong)


def test_kinds_are_there() -> None:
    assert set(KINDS) <= set(VARIANTS) and ROUTED.num_experts == 5 and TINY.vocab_size == 61
