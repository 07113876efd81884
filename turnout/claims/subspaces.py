"""Four tasks whose tokens lie in subspaces of their own, and an adapter for each, for claims about choosing them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from turnout.models.checkpoint import PeftAdapter, write_adapter
from turnout.paths import LoRA
from turnout.reshape.adapters.attach import attach, detach
from turnout.reshape.adapters.routers import Site, even

TASKS, WIDTH, OUT, RANK = 4, 32, 24, 6
_EACH = WIDTH // TASKS  # dimensions of a task's subspace
_NOISE, _STEPS, _BATCH = 0.2, 300, 64


@dataclasses.dataclass(frozen=True)
class Score:
    """The squared error, and the share of tokens whose first adapter is another task's."""

    loss: float
    wrong: float


class World:
    """A frozen linear map, and tasks that each want another map on tokens of their own subspace.

    A token of task z is U_z (m_z + c) + noise, with an orthonormal basis U_z (D, 8), a mean m_z of length ``distance``
    and c of unit variance; noise goes everywhere. The task wants (W + M_z) x. The adapter of a task sees its tokens
    alone. With ``twins`` tasks 0 and 1, and 2 and 3, have the same tokens, and still want other maps.
    """

    def __init__(self, seed: int, folder: str | Path, *, distance: float = 2.0, twins: bool = False) -> None:
        self.folder, self.chance = Path(folder), torch.Generator().manual_seed(seed)
        basis_DD = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=self.chance))[0]
        self.basis = list(basis_DD.t().split(_EACH))
        self.mean = [distance * nn.functional.normalize(self._randn(_EACH), dim=0) for _ in range(TASKS)]
        if twins:
            self.basis, self.mean = ([each[z // 2 * 2] for z in range(TASKS)] for each in (self.basis, self.mean))
        self.shift = [self._randn(OUT, WIDTH) / WIDTH**0.5 for _ in range(TASKS)]
        self.base_OD = self._randn(OUT, WIDTH) / WIDTH**0.5
        self.folders = [self._taught(task) for task in range(TASKS)]

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.chance)

    def batch(self, task: int, rows: int = _BATCH) -> tuple[Tensor, Tensor]:
        """Tokens (rows, D) of a task, and what it wants of them (rows, O)."""
        x_TD = (self.mean[task] + self._randn(rows, _EACH)) @ self.basis[task] + _NOISE * self._randn(rows, WIDTH)
        return x_TD, x_TD @ (self.base_OD + self.shift[task]).t()

    def model(self) -> nn.Module:
        """The frozen map, called "map"."""
        linear = nn.Linear(WIDTH, OUT, bias=False)
        linear.weight.data.copy_(self.base_OD)
        return nn.ModuleDict({"map": linear}).requires_grad_(False)

    def _taught(self, task: int) -> Path:
        one = LoRA(WIDTH, OUT, (RANK,), generator=self.chance)
        optimizer = torch.optim.Adam(one.parameters(), lr=1e-2)
        for _ in range(_STEPS):
            x_TD, want_TO = self.batch(task)
            loss = (x_TD @ self.base_OD.t() + (x_TD @ one.down.t()) @ one.up - want_TO).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        place = self.folder / f"task{task}"
        write_adapter(place, PeftAdapter(place.name, None, {"map": one.factors(0)}))
        return place

    @torch.no_grad()
    def score(self, router: str | Callable[[Site], nn.Module], *, options: dict[str, object] | None = None) -> Score:
        """What a router makes of tokens of all tasks, mixed: the squared error, and how often it errs."""
        model, wrong, total = self.model(), 0.0, 0.0
        attach(model, self.folders, router=router, router_options=options)
        layer = model["map"]  # pyrefly: ignore[bad-index]
        chance, self.chance = self.chance, torch.Generator().manual_seed(1_000_003)
        for task in range(TASKS):
            x_TD, want_TO = self.batch(task, 2048)
            total += (layer(x_TD) - want_TO).square().mean().item() / TASKS
            wrong += (layer.decide(x_TD)[0].dense().argmax(1) != task).float().mean().item() / TASKS
        self.chance = chance
        return Score(total, wrong)

    @torch.no_grad()
    def oracle(self) -> float:
        """The squared error when every token takes the adapter of its task."""
        total = 0.0
        chance, self.chance = self.chance, torch.Generator().manual_seed(1_000_003)
        for task, folder in enumerate(self.folders):
            model = self.model()
            attach(model, [folder], router=even)
            x_TD, want_TO = self.batch(task, 2048)
            total += (model["map"](x_TD) - want_TO).square().mean().item() / TASKS  # pyrefly: ignore[bad-index]
            detach(model)
        self.chance = chance
        return total
