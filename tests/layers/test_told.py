"""What a call was told reaches its layers: in recomputation, threads, nested and interrupted calls, and no others."""

import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from turnout.decide.token import SMEAR, DenseToSparse, FedIns, Glider, GShard, Hash, NoisyTopK, Poly, Switch
from turnout.errors import ShapeError, UsageError
from turnout.layers import Adapter, Asking, MoE, Scaled, Turnout, given
from turnout.layers.told import listen, listening, listens, unlisten
from turnout.paths import SSF, LoRA, ScaLearn
from turnout.types import Routing
from turnout.types.recall import steady

MODES = pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
KINDS = ["smear", "smear-query", "poly", "mhr", "glider", "fedins", "scalearn"]


def router(kind: str) -> nn.Module:
    made = {
        "smear": lambda: SMEAR(8, 3, std=1.0, gain=1.0),
        "smear-query": lambda: SMEAR(8, 3, std=1.0, gain=1.0, query_width=2),
        "poly": lambda: Poly(8, 3, num_tasks=4),
        "mhr": lambda: Poly(8, 3, num_tasks=4, parts=2),
        "glider": lambda: Glider(8, 3, query_width=2, std=1.0, threshold=-1.0, gamma=1.0),
        "fedins": lambda: FedIns(8, 3, top_k=2, std=1.0),
        "scalearn": lambda: ScaLearn(3, 8),
    }
    return made[kind]()


def layer(kind: str = "smear", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "fedins":
        return Scaled(nn.Linear(8, 8), jolted(SSF(3, 8)), router(kind))
    return Adapter(nn.Linear(8, 8), jolted(LoRA(8, 8, ranks=(2, 2, 3))), jolted(router(kind)))


def jolted(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.5)
    return module


class Model(nn.Module):
    """What a model of transformers looks like to its layers."""

    def __init__(self, kind: str = "smear", depth: int = 2, fails: type[BaseException] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(kind, seed) for seed in range(depth))
        self.fails, self.reentrant = fails, None
        self.inner: nn.Module | None = None

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        x = inputs_embeds
        for number, one in enumerate(self.layers):
            if self.inner is not None and number:
                self.inner(inputs_embeds=x.detach().flip(0))
            x = one(x) if self.reentrant is None else checkpoint(one, x, use_reentrant=self.reentrant)
            if self.fails:
                raise self.fails
        return x


def heard(kind: str = "smear", **fields) -> Model:
    model = Model(kind, **fields).eval()
    listen(model)
    return model


def x(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()


MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
OTHER = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
SAYS = [
    {"task_B": torch.tensor([0, 1, 2]), "query_BQ": torch.tensor([[1.0, 0], [0, 1], [-1, 1]])},
    {"task_B": torch.tensor([3, 3, 1]), "query_BQ": torch.tensor([[0.0, 1], [1, 1], [-1, 0]])},
]


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """But for the order in which gradients are added up."""
    return bool(wanted.abs().sum() > 0) and torch.allclose(
        got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max())
    )


def slopes(module: nn.Module) -> torch.Tensor:
    return torch.cat([one.grad.flatten() for one in module.parameters() if one.grad is not None])


@MODES
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_two_calls_are_those_without_recomputation(kind, reentrant):
    """The same tokens, told different things; both are out before either goes back, and it goes back elsewhere."""

    def run(mode: bool | None) -> torch.Tensor:
        torch.manual_seed(7)
        module, losses = layer(kind), []
        for mask_BS, says in zip((MASK, OTHER), SAYS, strict=True):
            with given(mask_BS=mask_BS, **says):
                y = module(x()) if mode is None else checkpoint(module, x(), use_reentrant=mode)
            losses.append((y * mask_BS[..., None]).square().sum())
        with given(task_B=torch.tensor([0])):  # whatever holds when they go back
            sum(losses).backward()
        return slopes(module)

    assert same(run(reentrant), run(None))


@MODES
def test_a_function_with_contexts_inside_is_run_again_as_it_was(reentrant):
    def function(module, x):
        with given(mask_BS=MASK):
            y = module(x)
        with given(mask_BS=OTHER):
            return y + module(x.flip(1))

    def run(mode: bool | None) -> torch.Tensor:
        module = layer().eval()
        y = function(module, x()) if mode is None else checkpoint(function, module, x(), use_reentrant=mode)
        y.square().sum().backward(retain_graph=True)
        y.sum().backward()  # a second time, from the first on
        return slopes(module)

    assert same(run(reentrant), run(None))


@MODES
@pytest.mark.filterwarnings("ignore:None of the inputs")  # the outer one runs without gradients
def test_checkpoints_in_checkpoints(reentrant):
    def run(nested: bool) -> torch.Tensor:
        modules = nn.Sequential(layer(seed=0), layer(seed=1), layer(seed=2)).eval()
        inner = modules if not nested else lambda x: checkpoint_sequential(modules, 3, x, use_reentrant=reentrant)
        with given(mask_BS=MASK):
            y = inner(x()) if not nested else checkpoint(inner, x(), use_reentrant=reentrant)
        with given(mask_BS=OTHER):
            z = inner(x()) if not nested else checkpoint(inner, x(), use_reentrant=reentrant)
        (y.square().sum() + z.sum()).backward()
        return slopes(modules)

    assert same(run(True), run(False))


@MODES
def test_the_backward_pass_may_be_in_another_thread(reentrant):
    def run(mode: bool | None) -> torch.Tensor:
        module = layer().eval()
        with given(mask_BS=MASK):
            y = module(x()) if mode is None else checkpoint(module, x(), use_reentrant=mode)
        thread = threading.Thread(target=y.square().sum().backward)
        thread.start()
        thread.join()
        return slopes(module)

    assert same(run(reentrant), run(None))


class Again(torch.autograd.Function):
    """Somebody else's checkpoint."""

    @staticmethod
    def forward(ctx, module, x):
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            y = ctx.module(ctx.saved_tensors[0].detach().requires_grad_())
        torch.autograd.backward(y, grad)
        return None, grad


def test_what_is_not_known_in_a_backward_pass_is_refused():
    with given(mask_BS=MASK):
        y = Again.apply(layer(), x())
    with pytest.raises(UsageError, match=r"torch\.utils\.checkpoint"):
        y.sum().backward()
    once = [True, False]

    def changes(module, x):
        return module(x) if once.pop(0) else module(x[:, 1:])

    y = checkpoint(changes, layer(), x(), use_reentrant=False)
    with pytest.raises(UsageError, match="at place 0"):
        y.sum().backward()


@MODES
@pytest.mark.parametrize("kind", ["noisy", "switch", "gshard", "dense", "poly", "smear"])
def test_a_generator_draws_the_same_when_a_layer_is_run_again(kind, reentrant):
    def made() -> nn.Module:
        torch.manual_seed(3)
        kinds = {
            "noisy": lambda: NoisyTopK(8, 4, std=1.0),
            "switch": lambda: Switch(8, 4, std=1.0, jitter=0.5),
            "gshard": lambda: GShard(8, 4, std=1.0),
            "dense": lambda: DenseToSparse(8, 4, std=1.0),
        }
        if kind in kinds:
            return jolted(MoE(8, 6, 4, router=kinds[kind]()))
        policy = Poly(8, 3, num_tasks=4) if kind == "poly" else SMEAR(8, 3, std=1.0, gain=1.0, dropout=0.5)
        return Turnout(jolted(LoRA(8, 8, ranks=(2, 2, 3))), jolted(policy))

    def run(mode: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
        module, chance = made(), torch.Generator().manual_seed(5)
        with given(**SAYS[0]):
            for _ in range(2):
                call = lambda x: module(x, generator=chance).output  # noqa: E731
                y = call(x()) if mode is None else checkpoint(call, x(), use_reentrant=mode)
                y.square().sum().backward()
        return slopes(module), chance.get_state()

    (got, state), (wanted, after) = run(reentrant), run(None)
    assert same(got, wanted) and torch.equal(state, after)


@MODES
def test_token_ids_are_arguments_and_come_again(reentrant):
    def run(mode: bool | None) -> torch.Tensor:
        torch.manual_seed(0)
        module, ids = jolted(MoE(8, 6, 4, router=Hash(8, 4))), torch.arange(15).view(3, 5)
        call = lambda x, ids: module(x, token_id=ids).output  # noqa: E731
        y = call(x(), ids) if mode is None else checkpoint(call, x(), ids, use_reentrant=mode)
        y.square().sum().backward()
        return slopes(module)

    assert same(run(reentrant), run(None))


@MODES
def test_padding_takes_no_place_in_a_recomputation_either(reentrant):
    def run(mode: bool | None) -> torch.Tensor:
        torch.manual_seed(0)
        module, losses = jolted(MoE(8, 6, 4, router=Switch(8, 4, std=1.0, capacity_factor=0.5))).eval(), []
        for mask_BS in (MASK, OTHER):
            with given(mask_BS=mask_BS):
                call = lambda x: module(x).output  # noqa: E731
                losses.append(call(x()) if mode is None else checkpoint(call, x(), use_reentrant=mode))
        sum(loss.square().sum() for loss in losses).backward()
        return slopes(module)

    assert same(run(reentrant), run(None))


def test_outside_of_checkpoints_the_very_generator_is_used():
    chance = torch.Generator()
    assert steady(chance) is chance and steady(None) is None


@MODES
def test_an_asking_model_is_run_again_with_its_query(reentrant):
    def run(mode: bool | None) -> torch.Tensor:
        torch.manual_seed(0)
        shared = FedIns(8, 3, top_k=1, std=1.0, query_width=8)
        inner = Model(depth=0)
        inner.layers = nn.ModuleList(Scaled(nn.Linear(8, 8), jolted(SSF(3, 8)), shared) for _ in range(2))
        inner.reentrant = mode
        asking = Asking(inner, Mean(), shared)
        (asking(inputs_embeds=x()).square().sum() + asking(inputs_embeds=x(1)).sum()).backward()
        return slopes(asking)

    assert same(run(reentrant), run(None))


class Mean(nn.Module):
    def forward(self, inputs_embeds):
        return inputs_embeds.mean(1)


# ---- what a model is called with


def test_a_mask_counts_however_it_is_passed():
    model = heard()
    wanted = model(None, MASK, x())
    assert not torch.allclose(wanted, model(None, None, x()))
    for call in (
        lambda: model(inputs_embeds=x(), attention_mask=MASK),
        lambda: model(None, MASK, inputs_embeds=x()),
        lambda: model.forward(None, MASK, x()),
        lambda: model(None, MASK.bool(), x()),
        lambda: model(None, MASK.float(), x()),
        lambda: model(None, MASK.int(), x()),
        lambda: copy.deepcopy(model)(None, MASK, x()),
        lambda: nn.Sequential(model)[0](None, MASK, x()),
        lambda: pickled(model)(None, MASK, x()),
        lambda: model(torch.ones(3, 5), torch.cat((MASK[:, :0], MASK), 1), x()),
    ):
        assert torch.equal(call(), wanted)
    with given(mask_BS=MASK):
        assert torch.equal(model(inputs_embeds=x()), wanted)
        assert torch.equal(model(inputs_embeds=x(), attention_mask=MASK[:, None, None].expand(3, 1, 5, 5)), wanted)


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_with_a_cache_the_last_columns_are_those_of_the_new_tokens():
    model = heard(depth=1)
    long = torch.cat((OTHER, MASK), 1)
    assert torch.equal(model(inputs_embeds=x(), attention_mask=long), model(inputs_embeds=x(), attention_mask=MASK))


def test_masks_that_do_not_say_what_is_padding_are_refused():
    model = heard()
    for mask, match in (
        (MASK[:, None, None].expand(3, 1, 5, 5), "true at tokens"),
        ({"full": MASK}, "a dict"),
        ((1.0 - MASK) * -1e9, "below 0"),
        (MASK[:2], "mask"),
        (MASK[:, :3], "mask"),
    ):
        with pytest.raises(ShapeError, match=match):
            model(inputs_embeds=x(), attention_mask=mask)


class Head(nn.Module):
    def __init__(self, hands: str) -> None:
        super().__init__()
        self.body, self.hands = Model().eval(), hands

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, logits_to_keep=0):
        handed = {"the same": attention_mask, "none": None}.get(self.hands, MASK[:, None, None].expand(3, 1, 5, 5))
        return self.body(None, handed, inputs_embeds)


def test_the_innermost_call_counts():
    alone = heard()
    for hands, wanted in (("the same", MASK), ("none", None), ("who sees whom", MASK)):
        model = Head(hands)
        listen(model)
        listen(model.body)
        assert torch.equal(model(None, MASK, x()), alone(None, wanted, x())), hands
    assert torch.equal(model.body(None, OTHER, x()), alone(None, OTHER, x()))


def test_a_call_within_a_call_is_told_nothing_by_the_outer_one():
    model, wanted = heard(), heard()(None, MASK, x())
    model.inner = heard("poly")
    with pytest.raises(UsageError, match="task_B"):
        model(None, MASK, x())
    model.inner = heard()
    seen = []
    model.inner.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(model(None, MASK, x()), wanted)
    middle = model.layers[0](x()).detach()  # nothing is said here
    with given(mask_BS=MASK):
        masked = model.layers[0](x()).detach()
    assert torch.equal(seen[0], heard()(inputs_embeds=masked.flip(0))) and not torch.equal(masked, middle)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, RuntimeError])
def test_an_interrupted_call_leaves_nothing_behind(kind):
    model = heard(fails=kind)
    with pytest.raises(kind):
        model(None, MASK, x())
    model.fails = None
    assert torch.equal(model(inputs_embeds=x()), heard()(inputs_embeds=x()))
    assert model(inputs_embeds=x()[:2]).shape == (2, 5, 8)
    with pytest.raises(kind), given(mask_BS=MASK):
        raise kind
    assert torch.equal(model(inputs_embeds=x()), heard()(inputs_embeds=x()))


@pytest.mark.parametrize("mode", [None, False, True])
def test_threads_on_one_model_hear_their_own_calls(mode):
    model, seen, gate = heard(), {}, threading.Barrier(2)
    model.reentrant = mode
    wanted = {}
    for name, mask in (("a", MASK), ("b", OTHER)):
        alone = heard()
        inputs = x()
        alone(None, mask, inputs).square().sum().backward()
        wanted[name] = inputs.grad

    def work(name, mask):
        inputs = x()
        gate.wait()
        y = model(None, mask, inputs)
        gate.wait()
        (slope,) = torch.autograd.grad(y.square().sum(), inputs) if mode is not True else (None,)
        if slope is None:
            y.square().sum().backward()
            slope = inputs.grad
        seen[name] = slope

    threads = [threading.Thread(target=work, args=pair) for pair in (("a", MASK), ("b", OTHER))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(seen[name], wanted[name]) for name in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore")
def test_compiled_models_hear_their_calls(backend):
    torch._dynamo.reset()
    model = heard()
    compiled = torch.compile(model, backend=backend)
    for mask in (MASK, None, OTHER):
        assert torch.allclose(compiled(None, mask, x()), model(None, mask, x()), atol=1e-6)
    model.reentrant = False
    compiled(None, MASK, x()).square().sum().backward()
    plain = heard()
    plain(None, MASK, x()).square().sum().backward()
    assert same(slopes(model), slopes(plain))


class Coder(nn.Module):
    """An encoder and a decoder that looks at it, in the names of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = heard(depth=1), Decoder().eval()
        listen(self.decoder)

    def forward(self, inputs_embeds=None, attention_mask=None, decoder_inputs_embeds=None, decoder_attention_mask=None):
        seen = self.encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask)
        return self.decoder(None, decoder_attention_mask, decoder_inputs_embeds, seen, attention_mask)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = layer(seed=5), layer(seed=6)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
    ):
        return self.own(inputs_embeds) + self.cross(encoder_hidden_states).mean(1, keepdim=True)


def test_encoder_and_decoder_have_masks_of_their_own():
    model = Coder()
    listen(model)
    short, mask = x(1)[:, :3], OTHER[:, :3]
    with given(mask_BS=MASK):
        seen = model.encoder.layers[0](x())
        cross = model.decoder.cross(seen).mean(1, keepdim=True)
    with given(mask_BS=mask):
        own = model.decoder.own(short)
    assert torch.equal(model(x(), MASK, short, mask), own + cross)
    assert torch.equal(model(x(), MASK, short, None), model.decoder.own(short) + cross)
    with pytest.raises(ShapeError, match="some of it padding"):
        model(x(), MASK, x(1), OTHER)  # of one length: which is meant is not known
    model(x(), None, x(1), None)


def test_tokens_that_were_mixed_or_cut_are_no_sequences():
    model = heard(depth=1)
    inner = model.layers[0]
    model.layers = nn.ModuleList([nn.Identity()])
    for cut, says in ((lambda x: inner(x.flatten(0, 1)[:9]), "mixed or cut"), (lambda x: inner(x[:, -1:]), "padding")):
        model.layers[0].forward = cut
        with pytest.raises(ShapeError, match=says):
            model(None, MASK, x())
    model(None, torch.ones_like(MASK), x())  # nothing is padding
    model.layers[0].forward = lambda x: inner(x.flatten(0, 1)).view(x.shape)
    assert torch.equal(model(None, MASK, x()), heard(depth=1)(None, MASK, x()))


def test_listening_is_a_class_of_the_same_name_and_ends():
    model = Model()
    listen(model)
    assert type(model) is not Model and isinstance(model, Model) and type(model).__name__ == "Model"
    assert type(model) is listening(Model, ()) and listens(model) and not listens(nn.Linear(1, 1))
    unlisten(model)
    unlisten(model)
    assert type(model) is Model
    model.forward = lambda x: x
    with pytest.raises(UsageError, match="on the instance"):
        listen(model)


def test_layers_stand_in_state_dicts_as_if_they_were_plain():
    module = nn.Sequential(layer()).eval()
    state = module.state_dict()
    assert {key for key in state if ".paths." not in key and ".router." not in key} == {"0.weight", "0.bias"}
    again = nn.Sequential(layer(seed=1)).eval()
    assert not again.load_state_dict(state).missing_keys
    assert torch.equal(again(x()), module(x()))
    older = {key.replace("0.weight", "0.base.weight").replace("0.bias", "0.base.bias"): state[key] for key in state}
    assert not nn.Sequential(layer(seed=1)).load_state_dict(older).unexpected_keys
    with pytest.raises(RuntimeError, match="Unexpected"):
        again.load_state_dict({**state, "0.other": torch.ones(1)})
    assert module[0].weight is module[0].base.weight and module[0].bias is module[0].base.bias


def test_a_router_may_be_a_function_of_what_was_said():
    class Even(nn.Module):
        parts = 1

        def forward(self, x_TD, *, given):
            return Routing.from_dense(torch.full((given.num_sequences, 2), 0.5))

    with given(batch=2):
        assert Adapter(nn.Linear(8, 4), LoRA(8, 4, ranks=(1, 1)), Even())(torch.ones(4, 8)).shape == (4, 4)
