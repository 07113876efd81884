"""The compiled step: which models it takes, what its caches hold, and that it rounds no worse than the modules."""

import dataclasses

import pytest
import torch
from variants import TINY, VARIANTS, ids, make

from turnout.errors import ShapeError
from turnout.models import LM
from turnout.models.decoding import Decoder, decoding_path, paged
from turnout.models.decoding.compiled import finish
from turnout.models.decoding.paged import PagedSteps
from turnout.models.decoding.pages import PAGE, Pages
from turnout.models.decoding.path import why_plain
from turnout.models.decoding.plain import PlainSteps
from turnout.run.product import instead_of_linear

pytestmark = pytest.mark.usefixtures("compiled")

# What the step does not know, and why.
PLAIN = {
    "hash": "Hash",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_model_is_compiled_or_named(name: str) -> None:
    why = why_plain(make(name))
    assert (PLAIN[name] in (why or "")) if name in PLAIN else why is None


def spoilt(how: str) -> LM:
    lm = make("moe in one layer")
    block = lm.blocks[1]
    if how == "a hook":
        block.ff.register_forward_hook(lambda *_: None)
    if how == "a hook before":
        block.attention.register_forward_pre_hook(lambda *_: None)
    if how == "own forward":
        block.ff_norm.forward = lambda x: x
    if how == "a wrapper":
        lm.blocks[1] = torch.compile(block, backend="eager")
    if how == "another class":
        block.attention.__class__ = type("Mine", (type(block.attention),), {})
    if how == "double":
        block.attention.qkv.weight.data = block.attention.qkv.weight.data.double()
    if how == "backend":
        block.ff.backend = "reference"
    if how == "capacity":
        block.ff.router.capacity_factor = 1.0
    if how == "training":
        block.ff.router.train()
    if how == "meta":
        lm.head.weight = torch.nn.Parameter(lm.head.weight.to("meta"))
    return lm


@pytest.mark.parametrize(
    ("how", "why"),
    {
        "a hook": "blocks.1.ff has hooks",
        "a hook before": "blocks.1.attention has hooks",
        "own forward": "blocks.1.ff_norm has hooks, or a forward of its own",
        "a wrapper": "blocks.1 is of type OptimizedModule",
        "another class": "blocks.1.attention is of type Mine",
        "double": "blocks.1.attention.qkv.weight is torch.float64",
        "backend": "blocks.1.ff is told to run by reference",
        "capacity": "blocks.1.ff.router limits",
        "training": "some of the model's modules are training",
        "meta": "head.weight is on meta",
    }.items(),
)
def test_what_it_does_not_know_is_named(how: str, why: str) -> None:
    assert why in (why_plain(spoilt(how)) or "")
    assert why in decoding_path(spoilt(how)) and decoding_path(make("moe")) == "one compiled step a token"


def test_what_holds_around_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make("moe")
    with torch.autocast("cpu"):
        assert why_plain(lm) == "autocast is on"
    with instead_of_linear(torch.nn.functional.linear):
        assert "linear products go elsewhere" in (why_plain(lm) or "")
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert why_plain(lm) == "hooks on all modules"
    hook.remove()
    monkeypatch.setenv("TURNOUT_COMPILED", "0")
    assert why_plain(lm) == "TURNOUT_COMPILED=0 is set"


@pytest.mark.parametrize("name", ["moe", "gpt-oss", "gemma"])
@torch.no_grad()
def test_both_paths_say_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, id_BS, length_B = make(name), ids(3, 24), torch.tensor([9, 4, 12])
    found = []
    for _ in range(2):
        decoder = Decoder(lm, 3, 4)
        found.append([decoder.prefill(id_BS[:, :12], length_B).clone()])
        found[-1] += [decoder.step(id_B).clone() for id_B in id_BS[:, 12:].T]
        monkeypatch.setenv("TURNOUT_COMPILED", "0")
    assert decoder.why_plain == "TURNOUT_COMPILED=0 is set"
    torch.testing.assert_close(torch.stack(found[0]), torch.stack(found[1]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["moe", "gpt-oss", "gemma", "groups", "latent", "gpt-2 with experts"])
@torch.no_grad()
def test_few_tokens_of_prompts_are_one_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, id_BS, lengths, found = make(name), ids(4, 20), [3, 9, 1, 14], []
    read: list[int] = []
    run = PagedSteps.read
    monkeypatch.setattr(PagedSteps, "read", lambda *given: read.append(len(given[2])) or run(*given))
    for most, long in ((14, []), (13, [14]), (3, [9, 14]), (0, lengths)):
        monkeypatch.setattr(paged, "_SMALL", 0)
        monkeypatch.setattr(paged, "_FEW", most)
        decoder = Decoder(lm, 4, 4)
        found.append([decoder.prefill(id_BS[:, :14], torch.tensor(lengths)).clone()])
        found[-1] += [decoder.step(id_B).clone() for id_B in id_BS[:, 14:].T]
        assert read == long
        read.clear()
    for one in found[1:]:
        torch.testing.assert_close(torch.stack(one), torch.stack(found[0]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["moe", "gpt-oss", "latent"])
@torch.no_grad()
def test_rows_in_16_bits_have_the_bits_that_they_have_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "_SMALL", 0)
    monkeypatch.setattr(paged, "_FEW_SHORT", 5)
    monkeypatch.setattr(paged, "CHUNK", 64)
    lm = LM(dataclasses.replace(TINY, **VARIANTS[name], max_seq=400, init_std=0.2)).eval().bfloat16()
    id_BS, lengths = ids(4, 170), [130, 1, 63, 68]
    decoder = Decoder(lm, len(lengths), 10)
    together = [decoder.prefill(id_BS[:, :130], torch.tensor(lengths)).clone()]
    together += [decoder.step(id_B).clone() for id_B in id_BS[:, 130:].T]
    for row, length in enumerate(lengths):
        alone = Decoder(lm, 1, 1)
        got = [alone.prefill(id_BS[row : row + 1, :length]).clone()]
        got += [alone.step(id_BS[row : row + 1, place]).clone() for place in range(130, 170)]
        assert torch.equal(torch.cat(got), torch.stack(together)[:, row])


@pytest.mark.parametrize("few", [0, 5, 64])
@pytest.mark.parametrize("name", ["moe", "window", "gpt-oss", "gemma", "latent", "sinks", "full norm"])
@torch.no_grad()
def test_rows_have_the_bits_that_they_have_alone(name: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in parts, parts as steps or not, pages in any order; and both are what the whole text gives."""
    monkeypatch.setattr(paged, "_SMALL", 0)
    monkeypatch.setattr(paged, "_FEW", few)
    monkeypatch.setattr(paged, "CHUNK", 64)
    config = dataclasses.replace(TINY, **VARIANTS[name], max_seq=400, init_std=0.2)
    lm, lengths = LM(config).eval(), [130, 1, 63, 192, 64, 70]
    id_BS = ids(len(lengths), 270)
    decoder = Decoder(lm, len(lengths), 10)
    together = [decoder.prefill(id_BS[:, :192], torch.tensor(lengths)).clone()]
    together += [decoder.step(id_B).clone() for id_B in id_BS[:, 192:].T]
    for row, length in enumerate(lengths):
        alone = Decoder(lm, 1, 1)
        got = [alone.prefill(id_BS[row : row + 1, :length]).clone()]
        got += [alone.step(id_BS[row : row + 1, place]).clone() for place in range(192, 270)]
        assert torch.equal(torch.cat(got), torch.stack(together)[:, row])
        whole = lm(torch.cat((id_BS[row, :length], id_BS[row, 192:]))[None]).logits_BSV[0, length - 1 :]
        torch.testing.assert_close(torch.cat(got), whole, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["dense", "moe", "gemma"])
@torch.no_grad()
def test_the_last_layer_does_no_more_than_is_asked(name: str) -> None:
    lm, id_BS = make(name), ids(2, 5)
    seen: list[int] = []
    lm.blocks[-1].ff.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    whole, some = lm.hidden(id_BS)[0], lm.hidden(id_BS, only_B=torch.tensor([4, 2]))[0]
    assert seen == [5, 1] and some.shape == (2, 1, lm.config.width)
    torch.testing.assert_close(some[:, 0], whole[[0, 1], [4, 2]], rtol=0, atol=2e-5)


@torch.no_grad()
def test_texts_take_pages_and_windows_give_them_back() -> None:
    config = dataclasses.replace(TINY, max_seq=500, window=5, window_layers=(1,), init_std=0.2)
    lm, id_S = LM(config).eval(), ids(1, 500)[0].tolist()
    pages = Pages(lm, [8, 3])
    assert pages.windows == [None, 5] and pages.memory_bytes == 11 * PAGE * 2 * 2 * 8 * 4
    steps, text = PagedSteps(lm, pages), pages.begin()
    assert pages.extend(text, 300, steps=False) and [pool.free for pool in pages.pools] == [3, 2]
    finish(steps.read(text, id_S[:300]))
    pages.trim(text)
    for place in range(300, 400):
        assert pages.extend(text, place + 1, steps=True)
        steps.step([text], [[id_S[place]]])
        pages.trim(text)
    assert [sum(page >= 0 for page in held) for held in text.held_G] == [7, 1]
    assert not pages.extend(text, 513, steps=True) and [pool.free for pool in pages.pools] == [1, 2]
    pages.free(text)
    assert [pool.free for pool in pages.pools] == [8, 3]


@pytest.mark.parametrize("latent", [False, True])
@torch.no_grad()
def test_texts_that_come_to_the_border_of_longrope(latent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = {"short_factor": (1.0, 1.2, 1.5)[: 3 if latent else 2] + (2.0,) * (not latent) * 2}
    factors["long_factor"] = tuple(3 * each + 1 for each in factors["short_factor"])
    rope = {"rope_type": "longrope", "attention_factor": 1.2, "original_max_position_embeddings": 16} | factors
    sizes = VARIANTS["latent"] if latent else {}
    lm = LM(dataclasses.replace(TINY, **sizes, rope_scaling=rope, init_std=0.2)).eval()
    id_BS, length_B, found = ids(4, 34), torch.tensor([9, 20, 4, 16]), []
    assert why_plain(lm) is None
    for _ in range(2):
        decoder = Decoder(lm, 4, 4)
        found.append([decoder.prefill(id_BS[:, :20], length_B).clone()])
        found[-1] += [decoder.step(id_B).clone() for id_B in id_BS[:, 20:].T]
        monkeypatch.setenv("TURNOUT_COMPILED", "0")
    assert decoder.why_plain == "TURNOUT_COMPILED=0 is set"
    torch.testing.assert_close(torch.stack(found[0]), torch.stack(found[1]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["head norm", "moe in one layer", "gpt-oss", "gemma", "gpt-2", "groups", "latent"])
@torch.no_grad()
def test_sixteen_bits_are_no_further_from_the_truth_than_the_modules(name: str, dtype: torch.dtype) -> None:
    lm = make(name).to(dtype)
    truth, id_BS = make(name), ids(4, 30)
    truth.load_state_dict({key: value.float() for key, value in lm.state_dict().items()})
    want = truth(id_BS).logits_BSV[:, 19:]
    off = []
    for steps in (Decoder(lm, 4, 30), PlainSteps(lm)):
        got = [steps.prefill(id_BS[:, :20], torch.full((4,), 20)).float()]
        got += [steps.step(id_B).float().clone() for id_B in id_BS[:, 20:].T]
        # The median: where two experts all but tie, either path may take another one than the truth does.
        off.append(float((torch.stack(got, 1) - want).abs()[:, 1:].median()))
    assert off[0] < 0.8 * off[1], off


@torch.no_grad()
def test_weights_that_do_not_fit_are_refused() -> None:
    lm = make("dense")
    lm.blocks[0].attention.out.weight = torch.nn.Parameter(torch.zeros(32, 31))
    with pytest.raises(ShapeError, match=r"blocks.0.attention.out.weight must be \(32, 32\)"):
        Decoder(lm, 1, 1)


@torch.no_grad()
def test_what_is_no_number_stays_none() -> None:
    lm = make("moe")
    lm.blocks[0].attention.out.weight[3, 4] = torch.nan
    decoder = Decoder(lm, 1, 8)
    decoder.prefill(ids(1, 4))
    assert decoder.step(torch.tensor([1])).isnan().all()


@pytest.mark.slow  # the step is compiled once more
@torch.no_grad()
def test_several_threads_say_the_same() -> None:
    before = torch.get_num_threads()
    for name in ("moe in one layer", "gpt-oss", "gpt-2 with experts", "full norm", "latent queries"):
        lm, id_BS, found = make(name), ids(3, 24), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                decoder = Decoder(lm, 3, 4)
                decoder.prefill(id_BS[:, :12])
                found.append(torch.stack([decoder.step(id_B).clone() for id_B in id_BS[:, 12:].T]))
            finally:
                torch.set_num_threads(before)
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-6)
        torch.testing.assert_close(found[2], found[0], rtol=0, atol=2e-6)
