"""A model in a wrapper trains as it does alone: routers learn, chance is drawn, padding is known, names are plain."""

import contextlib
import socket
import subprocess
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from turnout.decide.token import SMEAR
from turnout.errors import UsageError
from turnout.layers import Turnout
from turnout.models import LM, LMConfig, MoEConfig, checkpoint
from turnout.paths import Bank
from turnout.train import TrainConfig, train
from turnout.train.data import Document, prepare
from turnout.train.step import Step
from turnout.wrappers import plain_names, routers_of, stripped, takes, unwrapped


class Around(nn.Module):
    """A wrapper as people write them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inside = model

    def forward(self, *arguments, **keywords):
        return self.inside(*arguments, **keywords)


# DistributedDataParallel and the compiler speak to developers of torch.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def eagerly(request: pytest.FixtureRequest) -> Iterator[None]:
    """The wrapper of a compiled model, without the seconds that compiling takes; slow tests compile."""
    stance = "default" if request.node.get_closest_marker("slow") else "force_eager"
    with torch.compiler.set_stance(stance):
        yield


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    where = f"tcp://127.0.0.1:{free_port()}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def wrap(how: str, lm: LM) -> nn.Module:
    if how == "compiled":
        return torch.compile(lm, backend="eager")
    if how == "compiled parts":
        for block in lm.blocks:
            block.ff = torch.compile(block.ff, backend="eager")
        return lm
    if how == "compiled DDP":
        return torch.compile(nn.parallel.DistributedDataParallel(lm, find_unused_parameters=True), backend="eager")
    if how == "DDP":
        return nn.parallel.DistributedDataParallel(lm, find_unused_parameters=True)
    return {"home-made": Around, "DataParallel": nn.DataParallel, "none": lambda lm: lm}[how](lm)


HOW = ["compiled", "compiled parts", "compiled DDP", "DDP", "home-made", "DataParallel"]
ROUTERS = {
    "LossFree": {"rate": 0.1},
    "GroupLimited": {"rate": 0.1},
    "DenseToSparse": {"steps": 4},
    "NoisyTopK": {},
}


def model(router: str = "LossFree") -> LM:
    moe = MoEConfig(4, 2, 16, router=router, router_options=ROUTERS[router])
    return LM(LMConfig(vocab_size=260, width=16, layers=2, heads=2, max_seq=16, init_std=0.3, moe=moe))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    texts = [Document(str(n), f"text number {n} and so on and on " * 4) for n in range(30)]
    return prepare({"d": texts}, tmp_path_factory.mktemp("t"), vocab_size=260, held_out=0.3, quiet=True)


def run(wrapped: nn.Module, tokens, out, steps: int = 3, **more):
    config = TrainConfig(steps=steps, batch=2, seq=16, aux_weight=0.1, z_weight=0.01, checkpoint_every=1)
    return train(wrapped, tokens, config, out, quiet=True, **more)


@pytest.mark.parametrize("how, router", [(how, "LossFree") for how in HOW] + [("home-made", name) for name in ROUTERS])
def test_it_learns_what_the_model_itself_does(how: str, router: str, tokens, tmp_path) -> None:
    inside, alone = model(router), model(router)
    with group_of_one() if "DDP" in how else contextlib.nullcontext():
        got = run(wrap(how, inside), tokens, tmp_path / "a")
    want = run(alone, tokens, tmp_path / "b")
    assert got.loss == pytest.approx(want.loss, rel=1e-4)
    for key in ("max_vio", "load", "dropped"):
        torch.testing.assert_close(*(torch.tensor(done.evaluations[-1][key]) for done in (got, want)))
    for one, two in zip(inside.routers, alone.routers, strict=True):
        inner = unwrapped(one)
        for name, buffer in two.named_buffers():
            assert torch.equal(dict(inner.named_buffers())[name], buffer) and bool(buffer.any())


@pytest.mark.slow
def test_really_compiled(tokens, tmp_path) -> None:
    test_it_learns_what_the_model_itself_does("compiled", "LossFree", tokens, tmp_path)


@pytest.mark.parametrize("how", HOW)
def test_checkpoints_go_both_ways(how: str, tokens, tmp_path) -> None:
    whole, back, forth = model(), model(), model()
    with group_of_one() if "DDP" in how else contextlib.nullcontext():
        run(wrap(how, model()), tokens, tmp_path / "a")
        want = run(whole, tokens, tmp_path / "b")
        found = [run(back, tokens, tmp_path / "a", resume="step-00000002")]
        found.append(run(wrap(how, forth), tokens, tmp_path / "b", resume="step-00000002"))
    for lm, done in zip((back, forth), found, strict=True):
        assert done.evaluations[-1]["bits_per_byte"] == pytest.approx(want.evaluations[-1]["bits_per_byte"], rel=1e-5)
        assert list(plain_names(lm, lm.state_dict()).values()) == list(whole.state_dict())
        for one, two in zip(lm.routers, whole.routers, strict=True):
            assert torch.equal(one.bias_E, two.bias_E)


def test_a_run_that_goes_on_in_another_wrapper_is_the_same_run(tokens, tmp_path) -> None:
    once, second = model(), model()
    run(wrap("compiled", once), tokens, tmp_path / "a")
    run(wrap("home-made", second), tokens, tmp_path / "a", resume="step-00000002")
    assert all(torch.equal(one, two) for one, two in zip(once.parameters(), second.parameters(), strict=True))


def test_checkpoints_with_names_of_wrappers_are_read(tokens, tmp_path, monkeypatch) -> None:
    """As they were written before: by the names that torch gives."""
    with monkeypatch.context() as patch:
        patch.setattr("turnout.train.state.plain_names", lambda model, names: {name: name for name in names})
        wrapped, lm = model(), model()
        run(wrap("compiled", wrapped), tokens, tmp_path / "a")
    run(lm, tokens, tmp_path / "a", resume=True)
    assert all(torch.equal(one, two) for one, two in zip(wrapped.parameters(), lm.parameters(), strict=True))


def test_a_wrapped_model_is_saved_as_what_it_is(tmp_path) -> None:
    lm = model()
    for number, wrapped in enumerate((torch.compile(lm, backend="eager"), nn.DataParallel(lm))):
        checkpoint.save(tmp_path / str(number), wrapped)
        assert torch.equal(checkpoint.load(tmp_path / str(number)).embedding, lm.embedding)
    with pytest.raises(UsageError, match="be an LM"):
        checkpoint.save(tmp_path / "x", nn.Linear(1, 1))


def test_padding_reaches_a_wrapped_model() -> None:
    id_BS, target_BS = torch.randint(260, (2, 2, 16), generator=torch.Generator().manual_seed(0))
    target_BS[:, 9:] = -100
    loads = []
    for lm in (model(), Around(model())):
        for cut in (16, 9):
            batch = types.SimpleNamespace(id_BS=id_BS[:, :cut], target_BS=target_BS[:, :cut])
            stream = types.SimpleNamespace(batch=lambda _, batch=batch: batch)
            work = Step(lm.train(), TrainConfig(steps=1, batch=2, seq=16), stream)
            sums = work._backward(0)
            loads.append([load_E.tolist() for load_E in sums.load_L])
            assert sum(loads[-1][0]) == 2 * 9 * 2
    assert loads[0] == loads[1] == loads[2] == loads[3]


def test_routers_that_nobody_names_are_refused(tokens, tmp_path) -> None:
    class Nameless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = model().blocks[0].ff

        def forward(self, id_BS):
            raise AssertionError("never called")

    with pytest.raises(UsageError, match="attribute routers"):
        run(Nameless(), tokens, tmp_path / "a")


def test_a_model_that_cannot_know_of_padding_is_refused() -> None:
    class Deaf(Around):
        def forward(self, id_BS):
            return self.inside(id_BS)

    batch = types.SimpleNamespace(id_BS=torch.ones(2, 6).long(), target_BS=torch.ones(2, 6).long())
    work = Step(Deaf(model()), TrainConfig(steps=1, batch=2, seq=6), types.SimpleNamespace(batch=lambda _: batch))
    work._backward(0)
    batch.target_BS[1, 4:] = -100
    with pytest.raises(UsageError, match="attention_mask"):
        work._backward(0)


def test_a_wrapped_router_of_sequences_is_one() -> None:
    torch.manual_seed(0)
    policy, bank = SMEAR(8, 3), Bank(3, 8, 4)
    x_BSD = torch.randn(2, 5, 8)
    want = Turnout(bank, policy).eval()(x_BSD).output
    assert torch.equal(Turnout(bank, nn.DataParallel(policy)).eval()(x_BSD).output, want)


def test_what_is_asked_of_wrappers() -> None:
    lm = model()
    around = torch.compile(Around(nn.DataParallel(lm)), backend="eager")
    assert routers_of(around) == lm.routers and takes(around, "generator") and not takes(around, "no such")
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    assert isinstance(unwrapped(averaged), nn.Linear)
    assert list(plain_names(averaged, averaged.state_dict()).values()) == ["n_averaged", "weight", "bias"]
    whole = nn.Module()
    whole.module, whole.weight = nn.Linear(1, 1), nn.Parameter(torch.ones(1))  # no wrapper: it has a weight of its own
    assert unwrapped(whole) is whole and stripped("_orig_mod.module.a.module.b") == "a.module.b"


TWO = """
import sys, torch
from torch import nn
from turnout.models import LM, LMConfig, MoEConfig
from turnout.train import TrainConfig
from turnout.train.step import Step
rank, port = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
moe = MoEConfig(4, 2, 8, router="LossFree", router_options={"rate": 1.0})
lm = LM(LMConfig(vocab_size=32, width=8, layers=1, heads=2, max_seq=8, init_std=0.5, moe=moe)).train()
class Stream:
    def batch(self, index):
        id_BS = torch.full((1, 8), 3 if rank else 20)
        return type("B", (), {"id_BS": id_BS, "target_BS": id_BS})
parallel = nn.parallel.DistributedDataParallel(lm, find_unused_parameters=True)
work = Step(parallel, TrainConfig(1, batch=1, seq=8), Stream())
alone = lm(Stream().batch(0).id_BS).routings[0].load_E
work.run(0, 0.0)
torch.distributed.all_reduce(alone)
assert lm.routers[0].bias_E.tolist() == torch.sign(alone.sum() - 4 * alone).tolist()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_the_load_is_that_of_all_ranks() -> None:
    port = str(free_port())
    both = [subprocess.Popen([sys.executable, "-c", TWO, str(rank), port], stderr=subprocess.PIPE) for rank in (0, 1)]
    for process in both:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said.decode()
