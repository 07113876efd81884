"""Lanes for what no step is compiled for: each request by itself, judged by what others make of it."""

import pytest
import torch
from variants import make

import turnout
from turnout.errors import CheckpointError, UsageError
from turnout.models.checkpoint import from_hf, from_live, load_offloaded
from turnout.models.with_lora import with_lora
from turnout.reshape.quantize import quantize
from turnout.serve.engine import Engine, Request
from turnout.serve.engine.paged_lane import PagedLane

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
WAIT_S = 300
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 61, "initializer_range": 0.3, "max_position_embeddings": 64,
}  # fmt: skip
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def adapted(folder: str, targets: list[str], **settings: object) -> torch.nn.Module:
    """PEFT's model of an adapter with factors that show, written to a folder."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **settings)
    model = peft.get_peft_model(llama(), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.5, generator=generator)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def greedy(model: torch.nn.Module, prompt: tuple[int, ...], tokens: int) -> list[int]:
    id_BS = torch.tensor([prompt])
    for _ in range(tokens):
        id_BS = torch.cat((id_BS, model(input_ids=id_BS).logits[:, -1].argmax(-1, keepdim=True)), 1)
    return id_BS[0, len(prompt) :].tolist()


def test_adapters_beside_a_budget_are_said(tmp_path) -> None:
    adapted(str(tmp_path), ["q_proj"])
    lm = from_live(llama())
    if not isinstance(Engine(lm)._loop.lanes["model"], PagedLane):
        pytest.skip("nothing is compiled here")
    with pytest.warns(UserWarning, match="adapters keep their keys and values beside that, each by itself, 4 at most"):
        Engine(lm, adapters={"a": tmp_path, "b": tmp_path}, slots=4, cache_bytes=1 << 20)


@torch.no_grad()
def test_adapters_by_name_are_as_peft_computes_them(tmp_path) -> None:
    base = llama()
    names = {"attention": ["q_proj", "v_proj"], "all": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
    theirs = {name: adapted(str(tmp_path / name), targets) for name, targets in names.items()}
    theirs["ranks"] = adapted(str(tmp_path / "ranks"), names["all"], rank_pattern={"k_proj": 7}, use_rslora=True)
    lm = from_live(base)
    with Engine(lm, name="base", adapters={name: tmp_path / name for name in theirs}, slots=4) as engine:
        assert engine.models() == ("base", *theirs)
        asked = [Request(PROMPT, 20, adapter=name) for name in (None, *theirs) for _ in range(2)]
        found = [[t.id for t in ticket.result(WAIT_S)[0]] for ticket in [engine.submit(one) for one in asked]]
    want = [greedy(model, PROMPT, 20) for model in (base, *theirs.values())]
    assert found == [row for row in want for _ in range(2)] and len({tuple(row) for row in want}) == 4
    for name, model in theirs.items():
        logits_BSV = with_lora(lm, tmp_path / name)(torch.tensor([PROMPT])).logits_BSV
        torch.testing.assert_close(logits_BSV, model(input_ids=torch.tensor([PROMPT])).logits, rtol=0, atol=1e-4)
    shared = with_lora(lm, tmp_path / "all")
    assert all(a is b for (n, a), b in zip(lm.named_parameters(), lm.parameters(), strict=True) if n)
    own = {id(one) for one in lm.parameters()}
    assert all(id(one) in own for name, one in shared.named_parameters() if "added" not in name)


def test_adapters_go_with_experts_in_files_and_in_few_bits(tmp_path) -> None:
    """Found by hand: turnout serve MODEL --expert-memory SIZE --lora NAME=FOLDER ended with an AssertionError."""
    torch.manual_seed(5)
    config = transformers.MixtralConfig(**{**SIZES, "num_local_experts": 4})
    model = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    whole = from_hf(tmp_path / "base")
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "one")
    few = load_offloaded(tmp_path / "base", expert_memory=4 * 3 * 32 * 48 * 4)
    packed, _ = quantize(whole, bits=8, group=16, parts=("experts",))
    for lm in (few, packed):
        with Engine(lm, name="base", adapters={"one": tmp_path / "one"}) as engine:
            asked = [Request(PROMPT, 12, adapter=name) for name in ("one", None)]
            found = [[t.id for t in ticket.result(WAIT_S)[0]] for ticket in [engine.submit(one) for one in asked]]
        same = whole if lm is few else lm
        assert found[1] == turnout.generate(same, [PROMPT], tokens=12, temperature=0).rows[0]
        theirs = with_lora(same, tmp_path / "one")
        assert found[0] == turnout.generate(theirs, [PROMPT], tokens=12, temperature=0).rows[0]
        assert found[0] != found[1] and (lm is packed or found[0] == greedy(tuned.eval(), PROMPT, 12))
    few.experts.close()


@torch.no_grad()
def test_adapters_of_what_is_no_map_by_itself_are_refused(tmp_path) -> None:
    adapted(str(tmp_path), ["lm_head"])
    with pytest.raises(CheckpointError, match="factors of lm_head"):
        Engine(from_live(llama()), adapters={"a": tmp_path})
    with pytest.raises(UsageError, match="other than the model's"):
        Engine(from_live(llama()), name="a", adapters={"a": tmp_path})


@torch.no_grad()
@pytest.mark.usefixtures("compiled")
def test_an_attached_router_answers_by_its_name(tmp_path) -> None:
    for name in ("x", "y"):
        adapted(str(tmp_path / name), ["q_proj", "v_proj"])
    model, _ = turnout.reshape.attach(llama(), [tmp_path / "x", tmp_path / "y"], router="arrow")
    with pytest.warns(UserWarning, match="runs the model as it is"):
        engine = Engine(llama(), adapters={"routed": model.eval()})
    with engine:
        assert isinstance(engine._loop.lanes["model"], PagedLane)
        tokens, end = engine.submit(Request(PROMPT, 12, adapter="routed")).result(WAIT_S)
    assert [token.id for token in tokens] == greedy(model, PROMPT, 12) and end.reason == "length"


@torch.no_grad()
def test_a_model_of_transformers_is_run_as_it_is_where_that_is_asked_for() -> None:
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"})
    model = transformers.GPTNeoXForCausalLM(config).eval()
    with pytest.raises(UsageError, match="GPTNeoX"):
        Engine(model)
    with pytest.warns(UserWarning, match="runs the model as it is"), Engine(model, fallback=True, slots=3) as engine:
        tickets = [engine.submit(Request(PROMPT[:n], 12, logprobs=0)) for n in (2, 8, 8)]
        found = [[token.id for token in ticket.result(WAIT_S)[0]] for ticket in tickets]
    assert found == [greedy(model, PROMPT[:n], 12) for n in (2, 8, 8)]


def test_without_numba_requests_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNOUT_COMPILED", "0")
    lm = make("gpt-oss")
    with Engine(lm, slots=3) as engine:
        assert not isinstance(engine._loop.lanes["model"], PagedLane)
        asked = [Request(PROMPT[:n], 20, logprobs=1) for n in (1, 3, 8)]
        tickets = [engine.submit(one) for one in asked]
        found = [ticket.result(WAIT_S)[0] for ticket in tickets]
        gone = engine.submit(Request(PROMPT, 30))
        gone.cancel()
        assert gone.result(WAIT_S)[1].reason in ("cancelled", "length")
    for one, tokens in zip(asked, found, strict=True):
        want = turnout.generate(lm, [list(one.prompt)], tokens=20, temperature=0, logprobs=True)
        assert [token.id for token in tokens] == want.rows[0]
        assert [token.logprob for token in tokens] == want.logprob_BN[0].tolist()


def test_memory_that_cannot_be_bounded_is_said() -> None:
    lm = from_live(llama())
    lm.blocks[0].register_forward_hook(lambda *_: None)  # which no step is compiled for
    with pytest.warns(UserWarning, match="cache_bytes=1,000,000 has no effect"):
        Engine(lm, cache_bytes=1_000_000)
