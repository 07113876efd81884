"""Sparse zeroth-order tuning: only entries that pre-training is sensitive to are tuned; the rest is frozen in bits."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from turnout.errors import TrainingError, UsageError, word
from turnout.expects import expects
from turnout.train.zeroth.one_byte import perturbed

__all__ = ["mezo", "overlay", "sensitive"]

_WHERE = "turnout.train.zeroth"
_GROUP = 64  # entries that share one scale


@expects(model=nn.Module)
def sensitive(
    model: nn.Module, losses: Iterable[Callable[[nn.Module], Tensor]], *, share: float = 0.001
) -> dict[str, Tensor]:
    """Name -> positions, in the flattened parameter, of the share of entries with the largest mean squared gradient.

    It is the diagonal of the empirical Fisher matrix on what the model was pre-trained on, and needs gradients, once;
    the tuning that follows does not. The share is of all entries together.

    Args:
        model: unchanged; what asks for gradients is looked at.
        losses: one a batch of pre-training text: from the model to a scalar.
        share: of the entries, above 0, to 1; at least one is found.

    Returns:
        The names that have any, with sorted positions.

    Raises:
        UsageError: a share out of range, no batch, or nothing that asks for gradients.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> sensitive(model, [lambda m: m(torch.tensor([1.0, 5.0, 2.0])).sum()], share=0.34)
    {'weight': tensor([1])}

    Source: Guo et al., 2024, "Zeroth-Order Fine-Tuning of LLMs with Extreme Sparsity".
    """
    named = {name: one for name, one in model.named_parameters() if one.requires_grad}
    if not 0 < share <= 1 or not named:
        got = f"{share} of {sum(one.numel() for one in named.values())} entries"
        raise UsageError(word("share", got=got, allowed="be above 0, to 1, of what asks for gradients",
                              where=f"{_WHERE}.sensitive", fix="pass share=0.001"))  # fmt: skip
    square, batches = {name: torch.zeros_like(one) for name, one in named.items()}, 0
    for loss in losses:
        found = torch.autograd.grad(loss(model), list(named.values()), allow_unused=True)
        batches += 1
        for name, gradient in zip(named, found, strict=True):
            if gradient is not None:
                square[name] += gradient.square()
    if not batches:
        fix = "pass one loss a batch"
        raise UsageError(word("losses", got="none", allowed="be one or more", where=f"{_WHERE}.sensitive", fix=fix))
    every = torch.cat([one.flatten() for one in square.values()])
    chosen = every.topk(max(1, int(share * len(every)))).indices.sort().values
    index, begin = {}, 0
    for name, one in square.items():
        here = chosen[(chosen >= begin) & (chosen < begin + one.numel())] - begin
        begin += one.numel()
        if len(here):
            index[name] = here
    return index


@expects(model=nn.Module)
def overlay(model: nn.Module, index: Mapping[str, Tensor], *, bits: int = 32) -> list[str]:
    """Leaves of the model only the entries at ``index`` to train, and freezes the rest, matrices in so many bits.

    A parameter becomes its frozen part, which is kept as whole numbers from -7 to 7 (4 bits, two a byte) or -127 to 127
    (8 bits) with a scale for each 64 entries, and a vector of the entries to train, in full; what reads the parameter
    gets the two put together. Parameters with fewer than two dimensions stay in full.

    Args:
        model: changed in place: its parametrizations (torch.nn.utils.parametrize) hold the parts.
        index: name -> positions in the flattened parameter, as ``sensitive`` gives them.
        bits: 32, 8 or 4.

    Returns:
        The names of the vectors to train, all that asks for gradients afterwards.

    Raises:
        UsageError: other bits, a name or position that there is not, or a parameter that two modules share.

    >>> model = nn.Linear(2, 2)
    >>> overlay(model, {"weight": torch.tensor([3])}, bits=4)
    ['parametrizations.weight.original']
    >>> [name for name, one in model.named_parameters() if one.requires_grad]
    ['parametrizations.weight.original']

    Source: Guo et al., 2024, "Zeroth-Order Fine-Tuning of LLMs with Extreme Sparsity". Where we differ: they quantise
    with SqueezeLLM; ours is rounding to the nearest in groups.
    """
    where = f"{_WHERE}.overlay"
    if bits not in (32, 8, 4):
        raise UsageError(word("bits", got=bits, allowed="be 32, 8 or 4", where=where, fix="pass bits=4"))
    named = dict(model.named_parameters())
    _check_index(model, named, index, where)
    trained = []
    for name, one in named.items():
        one.requires_grad_(False)
        here = index.get(name)
        low = bits if one.dim() > 1 else 32
        if here is None and low == 32:
            continue
        owner, _, leaf = name.rpartition(".")
        none = torch.zeros(0, dtype=torch.long, device=one.device)
        over = _Over(one.detach(), none if here is None else here.to(one.device), low)
        parametrize.register_parametrization(model.get_submodule(owner), leaf, over, unsafe=True)
        vector = f"{owner}.parametrizations.{leaf}.original".lstrip(".")
        model.get_parameter(vector).requires_grad_(here is not None)
        if here is not None:
            trained.append(vector)
    return trained


@expects(model=nn.Module)
def mezo(
    model: nn.Module,
    loss: Callable[[nn.Module, int], Tensor],
    *,
    steps: int,
    rate: float,
    eps: float = 1e-3,
    seed: int = 0,
) -> list[float]:
    """Zeroth-order SGD on all that asks for gradients: two losses a step, no gradient, one copy of what is trained.

    theta <- theta - rate (L(theta + eps z) - L(theta - eps z)) / 2 eps z, with a new z of ``seed`` each step.

    Args:
        model: changed in place.
        loss: from the model and the number of the step to a scalar; the same data for the same step.
        steps: how many.
        rate: of the step, above 0.
        eps: the perturbation, above 0.
        seed: of all directions.

    Returns:
        The mean of the two losses, step by step.

    Raises:
        UsageError: a setting out of range, or nothing to train.
        TrainingError: a loss that is not finite; the model is as before the step.

    >>> model = nn.Linear(2, 1)
    >>> seen = mezo(model, lambda m, step: m(torch.ones(1, 2)).square().sum(), steps=50, rate=0.05)
    >>> seen[-1] < seen[0]
    True

    Source: Malladi et al., 2023, "Fine-Tuning Language Models with Just Forward Passes" (MeZO).
    """
    parameters = [one for one in model.parameters() if one.requires_grad]
    if not (rate > 0 and eps > 0 and steps >= 0 and parameters):
        got = f"rate={rate}, eps={eps}, steps={steps}, {len(parameters)} parameters that ask for gradients"
        allowed, fix = "be above 0, steps from 0, with something to train", "pass rate=1e-3, eps=1e-3"
        raise UsageError(word("the settings", got=got, allowed=allowed, where=f"{_WHERE}.mezo", fix=fix))
    chance, seen = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        own = int(torch.randint(2**62, (), generator=chance))
        with torch.no_grad():
            high, low = perturbed(parameters, own, eps, lambda step=step: float(loss(model, step)))
        if not math.isfinite(high - low):
            got, fix = f"{high} and {low} in step {step}", "train with a lower rate"
            raise TrainingError(word("the losses", got=got, allowed="be finite", where=f"{_WHERE}.mezo", fix=fix))
        seen.append((high + low) / 2)
        again = torch.Generator().manual_seed(own)
        with torch.no_grad():
            for one in parameters:
                z = torch.randn(one.shape, generator=again).to(device=one.device, dtype=one.dtype)
                one.add_(z, alpha=-rate * (high - low) / (2 * eps))
    return seen


class _Over(nn.Module):
    """A tensor as its frozen part, in bits, and the entries that are trained."""

    def __init__(self, whole: Tensor, index_N: Tensor, bits: int) -> None:
        super().__init__()
        self.shape, self.bits, self.dtype = whole.shape, bits, whole.dtype
        self.register_buffer("index_N", index_N)
        code, scale = (whole.flatten().clone(), whole.new_zeros(0)) if bits == 32 else _coded(whole.flatten(), bits)
        self.register_buffer("code", code)
        self.register_buffer("scale", scale)

    def forward(self, value_N: Tensor) -> Tensor:
        flat = self.code if self.bits == 32 else _uncoded(self.code, self.scale, self.bits, self.shape.numel())
        return flat.to(self.dtype).index_put((self.index_N,), value_N).view(self.shape)

    def right_inverse(self, whole: Tensor) -> Tensor:
        return whole.detach().flatten()[self.index_N].clone()


def _coded(value_N: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    groups = -(-len(value_N) // _GROUP)
    value = nn.functional.pad(value_N.float(), (0, groups * _GROUP - len(value_N))).view(groups, _GROUP)
    top = 2 ** (bits - 1) - 1
    scale = value.abs().amax(1) / top
    code = (value / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8).view(-1)
    if bits == 8:
        return code, scale
    nibble = (code + 8).view(torch.uint8)
    return nibble[::2] | (nibble[1::2] << 4), scale


def _uncoded(code: Tensor, scale: Tensor, bits: int, count: int) -> Tensor:
    if bits == 4:
        code = torch.stack((code & 15, code >> 4), 1).view(-1).view(torch.int8) - 8
    return (code.view(-1, _GROUP).float() * scale[:, None]).view(-1)[:count]


def _check_index(model: nn.Module, named: Mapping[str, Tensor], index: Mapping[str, Tensor], where: str) -> None:
    owners: dict[int, str] = {}
    for name, one in model.named_parameters(remove_duplicate=False):
        if owners.setdefault(id(one), name) != name:
            got, allowed = f"{owners[id(one)]} and {name}, which are one", "be of one module each"
            raise UsageError(word("the parameters", got=got, allowed=allowed, where=where, fix="untie them first"))
    for name, here in index.items():
        if name not in named:
            fix = "pass what turnout.train.zeroth.sensitive found of this model"
            raise UsageError(word("index", got=repr(name), allowed="name its parameters", where=where, fix=fix))
        low, high = (int(here.min()), int(here.max())) if len(here) else (0, -1)
        if not 0 <= low <= high < named[name].numel() or len(here.unique()) < len(here):
            got, allowed = f"{low} to {high} of {name}", f"be different, from 0 to {named[name].numel() - 1}"
            fix = "pass positions in the flattened parameter"
            raise UsageError(word("the positions", got=got, allowed=allowed, where=where, fix=fix))
