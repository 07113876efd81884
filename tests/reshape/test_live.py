"""A live model of transformers with adapters: what its calls say is heard, and what it saves is its base and the rest.

The judge is transformers itself: its checkpoints of gradients, ``from_pretrained``, Trainer.
"""

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from turnout import adopt
from turnout.errors import CheckpointError, ShapeError, UsageError
from turnout.layers import given
from turnout.models.checkpoint import PeftAdapter, read_adapter
from turnout.reshape import (
    add_tasks,
    attach,
    attach_folder,
    attach_shards,
    detach,
    fresh_adapters,
    scale_and_shift,
)
from turnout.reshape.adapters.routers import even

transformers = pytest.importorskip("transformers")
pytestmark = [  # transformers' and PEFT's own
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
MAPS = ("q_proj", "v_proj", "down_proj")
ROUTERS = {
    "smear": {"std": 1.0, "gain": 1.0},
    "poly": {"num_tasks": 3},
    "glider": {"embeddings": {f"a{n}": [float(n == m) for m in range(3)] for n in range(3)}},
    "arrow": {},
    "phatgoose": {},
    "scalearn": {"share": True},
    "even": {},
}
SAYS = {"task_B": torch.tensor([0, 1, 2]), "query_BQ": torch.eye(3)}


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def base(**fields) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | fields))).eval()


def adapters(model: nn.Module) -> list[PeftAdapter]:
    found, chance = [], torch.Generator().manual_seed(1)
    for n in range(3):
        linears = {name: one for name, one in model.named_modules() if name.endswith(MAPS)}
        drawn = {
            name: (
                torch.randn(2, one.in_features, generator=chance),
                torch.randn(one.out_features, 2, generator=chance),
            )
            for name, one in linears.items()
        }
        factor = {name: (0.3 * a, 0.3 * b, 0.3) for name, (a, b) in drawn.items()}
        gate = {name: torch.randn(one.in_features, generator=chance) for name, one in linears.items()}
        found.append(PeftAdapter(f"a{n}", None, factor, gate))
    return found


def live(router: str = "smear", **fields) -> nn.Module:
    model, _ = attach(base(**fields), adapters(base(**fields)), router=router, router_options=ROUTERS[router])
    jolt(model)
    return model


def jolt(model: nn.Module) -> None:
    """As if adapters and routers had been trained."""
    for seed, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.1)


def sharded() -> nn.Module:
    model, _ = attach_shards(base(), ["q_proj", "v_proj"], rank=3, shards=4, generator=torch.Generator().manual_seed(0))
    jolt(model)
    return model


def pooled() -> nn.Module:
    torch.manual_seed(1)
    query = nn.Sequential(nn.Embedding(64, 4), nn.Flatten(), nn.Linear(36, 4))
    asking, _ = scale_and_shift(base(), ["model.layers.0.mlp.down_proj"], query=query, query_width=4, pool_size=5)
    jolt(asking)
    return asking


IDS = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
MASK[1, :2] = 0
OTHER = MASK.flip(0)


def logits(model: nn.Module, *arguments) -> torch.Tensor:
    with torch.no_grad(), given(**SAYS):
        return model.eval()(*(arguments or (IDS, MASK))).logits


# ---- what its calls say


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_gradient_checkpointing_changes_no_gradient(router, reentrant):
    def slopes(mode: str) -> torch.Tensor:
        model = live(router).train()
        model.enable_input_require_grads()
        if mode == "layers":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(3)
        losses = []
        for mask, shift in ((MASK, 0), (OTHER, 1)):  # both are out before either goes back
            with given(**{name: value.roll(shift, 0) for name, value in SAYS.items()}):

                def call(x, mask=mask):
                    return model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits

                x = model.get_input_embeddings()(IDS)
                found = checkpoint(call, x, use_reentrant=reentrant) if mode == "model" else call(x)
                losses.append((found * mask[..., None]).square().mean())
        (losses[0] + 2 * losses[1]).backward()
        return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])

    wanted = slopes("plain")
    for mode in ("layers", "model"):
        assert float((slopes(mode) - wanted).norm() / wanted.norm()) < 1e-5, mode
    assert wanted.norm() > 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [sharded, pooled])
def test_shards_and_pools_are_recomputed_alike(make, reentrant):
    def slopes(recompute: bool) -> torch.Tensor:
        model = make()
        inner = getattr(model, "model", model) if make is pooled else model
        if recompute:
            inner.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        inner.enable_input_require_grads()
        sum(model(ids).logits.square().mean() for ids in (IDS, IDS.flip(1))).backward()
        return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])

    wanted = slopes(False)
    assert wanted.norm() > 0 and float((slopes(True) - wanted).norm() / wanted.norm()) < 1e-5


def test_every_way_to_pass_a_mask_is_heard():
    model = live()
    wanted = logits(model)
    kept = MASK[..., None]
    ways = [
        lambda: model(input_ids=IDS, attention_mask=MASK),
        lambda: model(IDS, attention_mask=MASK.bool()),
        lambda: model(inputs_embeds=model.get_input_embeddings()(IDS), attention_mask=MASK.float()),
        lambda: model.forward(IDS, MASK),
    ]
    with torch.no_grad():
        assert float((model(IDS).logits - wanted).abs().max()) > 0.01
        for way in ways:
            assert float(((way().logits - wanted) * kept).abs().max()) < 1e-5
        hidden = model.model(IDS, MASK).last_hidden_state  # the model within
        assert torch.allclose(model.lm_head(hidden), wanted, atol=1e-5)
        square = MASK[:, None, None].bool() & torch.ones(9, 9, dtype=torch.bool).tril()
        with pytest.raises(ShapeError, match="mask_BS"):
            model(IDS, square)
        with given(mask_BS=MASK):
            assert float(((model(IDS, square).logits - wanted) * kept).abs().max()) < 1e-5


@torch.no_grad()
def test_left_and_right_padding_are_the_sequence_alone():
    model = live()
    alone = model(IDS[:1, :4]).logits
    left = model(torch.cat((IDS[1:2, :5], IDS[:1, :4]), 1), torch.tensor([[0] * 5 + [1] * 4])).logits[:, 5:]
    right = model(torch.cat((IDS[:1, :4], IDS[1:2, :5]), 1), torch.tensor([[1] * 4 + [0] * 5])).logits[:, :4]
    assert torch.allclose(right, alone, atol=1e-5) and torch.allclose(left, alone, atol=1e-5)


def test_generation_is_told_of_padding_at_every_step():
    """By hand: the router is told, at each step, of the tokens that are new."""
    model = live()
    made = model.generate(IDS, attention_mask=MASK, max_new_tokens=3, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        mask, step = MASK, {"input_ids": IDS, "past_key_values": None}
        for n in range(3):
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, -step["input_ids"].shape[1] :]
            found = model(**step, attention_mask=mask, position_ids=position, use_cache=True)
            new = found.logits[:, -1:].argmax(-1)
            assert torch.equal(new[:, 0], made[:, 9 + n])
            mask, step = (
                torch.cat((mask, torch.ones_like(new)), 1),
                {"input_ids": new} | {"past_key_values": found.past_key_values},
            )
    head, _ = attach(base(), fresh_adapters(base(), ["lm_head"], count=2, rank=2), router="smear")
    assert head.generate(IDS, attention_mask=MASK, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (3, 11)


def test_models_that_look_both_ways_hear_too():
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=2)).eval()
    attach(model, fresh_adapters(model, ["query", "value"], count=2, rank=2), router="smear")
    jolt(model)
    with torch.no_grad():
        wanted = model(IDS[:1, :4]).last_hidden_state
        mask = torch.tensor([[1] * 4 + [0] * 5])
        assert torch.allclose(model(IDS[:1], mask).last_hidden_state[:, :4], wanted, atol=1e-5)


def test_encoders_and_decoders_hear_their_own_masks():
    sizes = {"vocab_size": 64, "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
    attach(model, fresh_adapters(model, ["q", "v", "wo"], count=2, rank=2), router="smear")
    jolt(model)
    with torch.no_grad():
        alone = model(IDS[:1, :4], decoder_input_ids=IDS[1:2, :3]).logits
        mask, after = torch.tensor([[1] * 4 + [0] * 5]), torch.tensor([[1] * 3 + [0] * 4])
        padded = model(IDS[:1], mask, IDS[1:2, :7], after).logits[:, :3]
        assert torch.allclose(padded, alone, atol=1e-5)
        with pytest.raises(ShapeError, match="some of it padding"):
            model(IDS[:1], mask, IDS[1:2], torch.ones_like(IDS[1:2]))


# ---- what stands still


def test_the_base_stands_still_unless_told_and_asks_again_afterwards():
    def asking(model: nn.Module) -> set[str]:
        return {name for name, one in model.named_parameters() if one.requires_grad}

    model = base()
    model.model.norm.requires_grad_(False)
    before = asking(model)
    for change in (
        lambda: attach(model, adapters(model), router="smear"),
        lambda: attach_shards(model, ["q_proj", "v_proj"], rank=3, shards=4),
    ):
        change()
        assert asking(model) and all(".paths." in n or ".router." in n or "shards" in n for n in asking(model))
        detach(model)
        assert asking(model) == before
    for change in (
        lambda: attach(model, adapters(model), router="smear", freeze=False),
        lambda: attach_shards(model, ["q_proj", "v_proj"], rank=3, shards=4, freeze=False),
    ):
        change()
        assert "lm_head.weight" in asking(model) and "model.layers.0.self_attn.q_proj.base.weight" in asking(model)
        detach(model)
        assert asking(model) == before
    wanted = logits(model)
    attach(model.model, adapters(model.model), router="smear")  # a part of it
    assert asking(model) != before
    detach(model)
    assert asking(model) == before and torch.equal(logits(model), wanted)
    asking_model, _ = scale_and_shift(model, ["lm_head"], query=nn.Flatten(), query_width=9, pool_size=3)
    assert detach(asking_model)[0] is model and asking(model) == before and torch.equal(logits(model), wanted)
    assert type(model) is transformers.LlamaForCausalLM and type(model.model) is transformers.LlamaModel


# ---- what it saves


def stock(folder) -> nn.Module:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("make", [*ROUTERS, "shards"])
def test_what_is_saved_is_the_base_and_with_attach_folder_the_whole(make, tmp_path):
    model = sharded() if make == "shards" else live(make)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "one")
    again = stock(tmp_path / "one")
    assert torch.equal(logits(again), logits(base()))
    attach_folder(again, tmp_path / "one")
    assert torch.equal(logits(again), wanted)
    again.save_pretrained(tmp_path / "two")  # and so on
    assert torch.equal(logits(attach_folder(stock(tmp_path / "two"), tmp_path / "two")[0]), wanted)
    state = {key: one * 0 if one.is_floating_point() else one for key, one in model.state_dict().items()}
    assert not model.load_state_dict(state).missing_keys and not logits(model).any()
    model.load_state_dict(again.state_dict())
    assert torch.equal(logits(model), wanted)
    if make != "shards":
        assert read_adapter(tmp_path / "two" / "adapters" / "a1").params == adapters(base())[1].params


def test_pieces_given_state_dicts_and_older_folders(tmp_path):
    model = live()
    wanted = logits(model)
    model.save_pretrained(tmp_path / "pieces", max_shard_size="8KB")
    assert len(list((tmp_path / "pieces").glob("model-*.safetensors"))) > 2
    state = {key: one + 1 if one.is_floating_point() else one for key, one in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict=state)
    assert torch.equal(logits(attach_folder(stock(tmp_path / "pieces"), tmp_path / "pieces")[0]), wanted)
    model.load_state_dict(state)  # all of it is from what was given, the adapters too
    assert torch.equal(logits(attach_folder(stock(tmp_path / "given"), tmp_path / "given")[0]), logits(model))
    other = live("poly")
    add_tasks(other)
    other.save_pretrained(tmp_path / "given")  # over what is there
    assert torch.equal(logits(attach_folder(stock(tmp_path / "given"), tmp_path / "given")[0]), logits(other))
    model.save_pretrained(tmp_path / "nothing", is_main_process=False)
    assert not (tmp_path / "nothing" / "adapters.json").exists()


def test_tied_weights_and_an_adapted_head(tmp_path):
    model = base(tie_word_embeddings=True)
    wanted = logits(model)
    attach(model, fresh_adapters(model, ["q_proj", "lm_head"], count=2, rank=2), router="arrow")
    jolt(model)
    model.save_pretrained(tmp_path / "tied")
    again = stock(tmp_path / "tied")
    assert torch.equal(logits(again), wanted) and again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(attach_folder(again, tmp_path / "tied")[0]), logits(model))


def test_weights_tied_again_are_tied_and_of_another_size_refused():
    model = base(tie_word_embeddings=True)
    attach(model, fresh_adapters(model, ["q_proj", "lm_head"], count=2, rank=2), router="even")
    jolt(model)
    wanted = logits(model)
    model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.tie_weights()
    assert model.lm_head.base.weight is model.model.embed_tokens.weight and torch.equal(logits(model), wanted)
    with pytest.raises(UsageError, match=r"weight of a changed layer must keep the shape \(64, 16\).*detach"):
        model.lm_head.weight = nn.Parameter(torch.zeros(70, 16))
    model.resize_token_embeddings(70)  # behind its back
    with pytest.raises(ShapeError, match=r"70 features of the linear map.*detach before"):
        logits(model)


def test_several_sequences_packed_in_a_row_are_refused_where_a_router_takes_them_for_one():
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(3, 9)
    with pytest.raises(UsageError, match="rows whose positions begin anew"):
        live("smear")(IDS, position_ids=packed)
    alone, model = live("even"), live("smear")
    with torch.no_grad():  # where nothing is mixed it is as in the stock model; padding has positions of its own
        whole, first = (alone(IDS, position_ids=packed).logits, alone(IDS[:, :4]).logits)
        assert torch.allclose(whole[:, :4], first, atol=1e-5)
        model(IDS, MASK, position_ids=(MASK.cumsum(1) - 1).masked_fill(MASK == 0, 1))


def test_routers_that_a_function_built(tmp_path):
    model, _ = attach(base(), adapters(base()), router=even)
    model.save_pretrained(tmp_path / "made")
    assert torch.equal(logits(stock(tmp_path / "made")), logits(base()))
    with pytest.raises(UsageError, match="built by a function"):
        attach_folder(base(), tmp_path / "made")
    assert torch.equal(logits(attach_folder(base(), tmp_path / "made", router=even)[0]), logits(model))


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    model, asking = live(), pooled()
    for save, match in (
        (lambda: model.model.save_pretrained(tmp_path / "x"), "the whole model"),
        (lambda: model.save_pretrained(tmp_path / "x", push_to_hub=True), r"model\.push_to_hub"),
        (lambda: model.save_pretrained(tmp_path / "x", distributed_checkpoint=True), "distributed_checkpoint"),
        (lambda: asking.model.save_pretrained(tmp_path / "x"), r"asking\.state_dict"),
    ):
        with pytest.raises(UsageError, match=match):
            save()
    assert not (tmp_path / "x").exists()
    again = pooled()
    again.load_state_dict({name: 2 * one for name, one in asking.state_dict().items()})
    again.load_state_dict(asking.state_dict())
    assert torch.equal(logits(again, IDS), logits(asking, IDS))
    with pytest.raises(UsageError, match="the base alone"):
        model.load_state_dict(base().state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="Missing"):
        model.load_state_dict(base().state_dict())
    detach(model)
    model.load_state_dict(base().state_dict())
    model.save_pretrained(tmp_path / "plain")
    assert sorted(one.name for one in (tmp_path / "plain").iterdir() if "adapter" in one.name) == []
    (tmp_path / "one").mkdir()
    live().save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "adapters.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapters\.json"):
        attach_folder(base(), tmp_path / "one")


def test_pushing_to_the_hub_sends_the_whole_folder(tmp_path, monkeypatch):
    sent = []
    import transformers.utils.hub as hub

    class Api:
        def create_repo(self, name, **rest):
            return type("Repo", (), {"repo_id": name})

    def send(self, folder, *rest, **more):
        sent.extend(path.relative_to(folder).as_posix() for path in hub.Path(folder).rglob("*") if path.is_file())

    monkeypatch.setattr(hub, "hf_api", Api, raising=False)
    monkeypatch.setattr(hub, "Path", type(tmp_path), raising=False)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_upload_modified_files", send)
    live().push_to_hub("some/where")
    assert {"model.safetensors", "adapters.json", "routers.safetensors", "adapters/a0/adapter_config.json"} <= set(sent)


def test_peft_goes_on_the_base_and_not_on_top(tmp_path):
    peft = pytest.importorskip("peft")
    model = live()
    wanted, modules = logits(model), dict(model.named_modules())
    asked = [one.requires_grad for one in model.parameters()]
    config = peft.LoraConfig(target_modules=["o_proj"])
    for wrap in (lambda: peft.get_peft_model(model, config), lambda: model.add_adapter(config)):
        with pytest.raises(UsageError, match="on the base alone"):
            wrap()
        assert dict(model.named_modules()) == modules and [one.requires_grad for one in model.parameters()] == asked
    model.save_pretrained(tmp_path / "after")
    assert torch.equal(logits(attach_folder(stock(tmp_path / "after"), tmp_path / "after")[0]), wanted)


def test_an_adopted_model_is_attached_and_saved_too(tmp_path):
    sizes = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()
    plain = logits(model)
    adopt(model)
    model.save_pretrained(tmp_path / "adopted")
    assert torch.equal(logits(stock(tmp_path / "adopted")), plain)
    attach(model, fresh_adapters(model, ["q_proj", "v_proj"], count=2, rank=2), router="smear")
    jolt(model)
    model.save_pretrained(tmp_path / "both")
    again = stock(tmp_path / "both")
    assert torch.equal(logits(again), plain)
    adopt(again)
    assert torch.equal(logits(attach_folder(again, tmp_path / "both")[0]), logits(model))


def test_accelerate_sees_the_state_dict_of_the_whole(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = live()
    wanted = logits(model)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    assert torch.equal(logits(prepared), wanted)
    state = accelerator.get_state_dict(prepared)
    assert state.keys() == model.state_dict().keys() and "model.layers.0.self_attn.q_proj.weight" in state
    accelerator.unwrap_model(prepared).save_pretrained(tmp_path / "out", state_dict=state)
    assert torch.equal(logits(attach_folder(stock(tmp_path / "out"), tmp_path / "out")[0]), wanted)


# ---- Trainer


def train(model: nn.Module, folder, steps: int, resume: str | None = None, **settings) -> None:
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in IDS.repeat(4, 1)]
    fields = {"max_steps": steps, "per_device_train_batch_size": 3, "learning_rate": 0.05, "save_steps": 1}
    fields |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "seed": 0}
    arguments = transformers.TrainingArguments(str(folder), **(fields | settings))
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:3])
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "last"))


@pytest.mark.slow
@pytest.mark.parametrize("make", ["smear", "scalearn", "shards"])
def test_trainer_trains_what_was_added_and_resumes(make, tmp_path):
    def made() -> nn.Module:
        return sharded() if make == "shards" else live(make)

    model, start = made(), made().state_dict()
    train(model, tmp_path, 4)
    end = model.state_dict()
    moved = {name for name in end if not torch.equal(end[name], start[name])}
    added = {name for name, one in made().named_parameters() if one.requires_grad}
    assert moved and {name for name in moved if name in base().state_dict()} == set()
    assert all(any(part in name for name in moved) for part in {one.rsplit(".", 2)[1] for one in added})
    for folder in ("last", "checkpoint-4"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert torch.equal(logits(again), logits(base()))
        assert torch.equal(logits(attach_folder(again, tmp_path / folder)[0]), logits(model))
    stock(tmp_path / "last")
    other = made()  # which knows nothing of the training
    (tmp_path / "resumed").mkdir()
    train(other, tmp_path / "resumed", 4, resume=str(tmp_path / "checkpoint-2"))
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, end[name]), name
    best = made()
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-3}
    (tmp_path / "best").mkdir()
    train(best, tmp_path / "best", 3, **settings, metric_for_best_model="loss", greater_is_better=True)
    chosen = json.loads((tmp_path / "best" / "checkpoint-3" / "trainer_state.json").read_text())[
        "best_model_checkpoint"
    ]
    wanted = attach_folder(base(), chosen, any_base=True)[0]
    assert not chosen.endswith("-3") and torch.equal(logits(best), logits(wanted))


@pytest.mark.slow
def test_trainer_with_gradient_checkpointing_takes_the_same_steps(tmp_path):
    plain, recomputed = live(), live()
    train(plain, tmp_path / "a", 3)
    train(recomputed, tmp_path / "b", 3, gradient_checkpointing=True)
    wanted = copy.deepcopy(plain).state_dict()
    assert all(torch.allclose(one, wanted[name], atol=1e-5) for name, one in recomputed.state_dict().items())
