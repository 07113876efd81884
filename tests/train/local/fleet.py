"""A small problem for several replicas in one process: each has its own data, and all start alike."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

Replica = tuple[nn.Module, torch.optim.Optimizer]


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def fleet(count: int, *, rate: float = 0.1, adam: bool = False) -> tuple[list[nn.Module], list[torch.optim.Optimizer]]:
    first = model()
    models = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
    kind = torch.optim.AdamW if adam else torch.optim.SGD
    return models, [kind(one.parameters(), lr=rate) for one in models]


def batches(steps: int, replica: int, *, size: int = 6) -> Iterator[tuple[Tensor, Tensor]]:
    chance = torch.Generator().manual_seed(100 + replica)
    for _ in range(steps):
        x = torch.randn(size, 5, generator=chance, dtype=torch.float64)
        yield x, torch.randint(3, (size,), generator=chance)


def step(replica: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> float:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(replica(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def walk(models: list[nn.Module], optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    """All replicas, one step after the other, on their own data."""
    data = [batches(steps, at) for at in range(len(models))]
    for _ in range(steps):
        for one, optimizer, mine in zip(models, optimizers, data, strict=True):
            step(one, optimizer, next(mine))


def flat(one: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in one.parameters()])


def data_parallel(count: int, steps: int, *, rate: float = 0.1) -> Tensor:
    """SGD on the mean of the replicas' gradients, step by step."""
    one = model()
    data = [batches(steps, at) for at in range(count)]
    for _ in range(steps):
        one.zero_grad()
        for mine in data:
            x, label = next(mine)
            (nn.functional.cross_entropy(one(x), label) / count).backward()
        with torch.no_grad():
            for parameter in one.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=rate)
    return flat(one)
