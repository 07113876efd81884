"""A router of your own: any module from tokens (T, D) to a Routing runs, balances and is measured like the others.

Top-p (Huang et al., 2024, "Harder Tasks Need More Experts"): as many experts as it takes for their probabilities to
add up to p. docs/guides/routers.md takes it from here to a method of turnout's own.
"""

import torch
from torch import Tensor, nn

from turnout.layers import MoE
from turnout.measure import load_report
from turnout.train import load_balance_loss
from turnout.types import Routing


class TopP(nn.Module):
    """Each token takes its likeliest experts, until they hold the share p of the probability."""

    def __init__(self, width: int, num_experts: int, *, p: float = 0.4) -> None:
        super().__init__()
        self.width, self.num_experts, self.p = width, num_experts, p
        self.weight = nn.Parameter(torch.randn(num_experts, width, generator=torch.Generator().manual_seed(0)) * 0.3)

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing; it keeps the scores, which the balance loss reads."""
        logit_TE = x_TD.float() @ self.weight.T
        score_TE = logit_TE.softmax(1)
        best_TE, index_TE = score_TE.detach().sort(dim=1, descending=True, stable=True)
        needed_TE = best_TE.cumsum(1) - best_TE < self.p  # what better experts hold is not enough yet
        mask_TE = torch.zeros_like(needed_TE).scatter(1, index_TE, needed_TE)
        entries = Routing.from_dense(score_TE, mask_TE=mask_TE)
        return Routing(
            entries.token_R, entries.weight_R, entries.offset_E, len(x_TD), score_TE=score_TE, logit_TE=logit_TE
        )


layer = MoE(16, 32, 8, router=TopP(16, 8))
x = torch.randn(4, 50, 16, generator=torch.Generator().manual_seed(1)) + 0.5  # a bias that some experts like
optimizer = torch.optim.Adam(layer.parameters(), lr=3e-2)
for step in range(61):
    routed = layer(x)
    balance = load_balance_loss(routed.routing)
    if step % 20 == 0:
        load = load_report([routed.routing])
        print(f"step {step}: {routed.routing.num_entries / 200:.1f} experts a token, ", end="")
        print(f"balance loss {balance.item():.2f}, MaxVio {load['max_vio']:.2f}")
    optimizer.zero_grad()
    balance.backward()
    optimizer.step()
