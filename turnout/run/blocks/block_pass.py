"""One training step of sparse blocks while a schedule plays it: what each task on the chip reads, does and leaves."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from turnout.run.blocks.block_gradients import BlockGradients
from turnout.run.blocks.block_parts import BlockParts, Gated, Graph
from turnout.types import BlockSchedule, BlockTask

__all__ = ["BlockPass", "Loss", "Packed"]

Loss = Callable[[Tensor, slice, Sequence[Sequence[Gated]]], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """The rows of one chunk as they are sent: sorted by expert, and what is needed to put them back.

    Args:
        row_RD: what is sent.
        token_R: the token of each, counted in the chunk.
        order_R: where each entry stood when they were in the order of tokens.
        weight_R: the combine weights, as sent.
        count_GE: (G, E / G) how many go to each expert of each rank.
        kept: what the combine wants to know of the chunk's tokens.
    """

    row_RD: Tensor
    token_R: Tensor
    order_R: Tensor
    weight_R: Tensor
    count_GE: Tensor
    kept: tuple[Tensor, ...]


class BlockPass:
    """What has been computed of one step. Keys are (block, chunk); chunks of attention and gate, or of experts.

    Args:
        schedule: what is played.
        parts: the blocks.
        dense: where each block's dense gradients go.
        expert: and its experts'.
        ranks: G, how many share the experts.
        x_BSD: what goes into the first block.
        about: passed on to the parts.
        loss: of (the last block's output, which sequences they are, each block's gates), a sum over sequences.

    Source: none; the chain rule.
    """

    def __init__(
        self,
        schedule: BlockSchedule,
        parts: Sequence[BlockParts],
        dense: Sequence[BlockGradients],
        expert: Sequence[BlockGradients],
        *,
        ranks: int,
        x_BSD: Tensor,
        about: Any,
        loss: Loss,
    ) -> None:
        self.schedule, self.parts, self.dense, self.expert = schedule, parts, dense, expert
        self.ranks, self.x_BSD, self.about, self.loss = ranks, x_BSD, about, loss
        self.work: dict[str, Callable[[int, int], None]] = {
            "A": self._attend, "G": self._gate, "E": self._run_experts, "G'": self._ungate,
            "E'": self._experts_whole, "Ex": self._experts_input, "Ew": self._experts_weight,
            "A'": self._attention_whole, "Ax": self._attention_input, "Aw": self._attention_weight,
        }  # fmt: skip
        # Of attention's chunks: the graphs, x + attention(x), what the gate said, and gradients of each.
        self._attentions: dict[tuple[int, int], Graph] = {}
        self._gates: dict[tuple[int, int], Graph] = {}
        self._attended: dict[tuple[int, int], Tensor] = {}
        self.gated: dict[tuple[int, int], Gated] = {}
        self._aside_slopes: dict[tuple[int, int], tuple[Tensor | None, ...]] = {}
        self._attended_slopes: dict[tuple[int, int], Tensor] = {}
        self._x_slopes: dict[tuple[int, int], Tensor] = {}
        # Of the experts' chunks: what goes over the wire and what came, forward, then back.
        self.packed: dict[tuple[int, int], Packed] = {}
        self.count_GE: dict[tuple[int, int], Tensor] = {}
        self.received: dict[tuple[int, int], Tensor] = {}
        self.made: dict[tuple[int, int], Tensor] = {}
        self.returned: dict[tuple[int, int], Tensor] = {}
        self.returned_slopes: dict[tuple[int, int], Tensor] = {}
        self.made_slopes: dict[tuple[int, int], Tensor] = {}
        self.received_slopes: dict[tuple[int, int], Tensor] = {}
        self.row_slopes: dict[tuple[int, int], Tensor] = {}
        self._experts: dict[tuple[int, int], Graph] = {}
        self._sums: dict[tuple[int, int], Graph] = {}
        self._packed_slopes: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self._unpacked: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self.losses: list[Tensor] = []

    @property
    def slope_BSD(self) -> Tensor:
        """The gradient of what went into the first block."""
        return torch.cat([self._x_slopes[0, chunk] for chunk in range(self.schedule.attention_chunks)])

    def rows(self, chunk: int, parts: int) -> slice:
        """The sequences of part ``chunk`` of ``parts``."""
        return slice(chunk * len(self.x_BSD) // parts, (chunk + 1) * len(self.x_BSD) // parts)

    def tokens(self, task: BlockTask) -> int:
        """How many tokens a task on the chip is about."""
        schedule = self.schedule
        rows = self.rows(task.chunk, schedule.attention_chunks if task.kind[0] in "AG" else schedule.expert_chunks)
        return (rows.stop - rows.start) * self.x_BSD.shape[1]

    def _shared(self, chunk: int, *, of: int, among: int) -> Iterator[tuple[int, slice, slice]]:
        """Each part of the other kind that has rows of this one, where these tokens are there, and where here."""
        own, length = self.rows(chunk, of), self.x_BSD.shape[1]
        for other in self.schedule.sharing(chunk, of=of, among=among):
            theirs = self.rows(other, among)
            first, last = max(own.start, theirs.start), max(min(own.stop, theirs.stop), own.start, theirs.start)
            there = slice((first - theirs.start) * length, (last - theirs.start) * length)
            yield other, there, slice((first - own.start) * length, (last - own.start) * length)

    def _of_attention(self, chunk: int) -> Iterator[tuple[int, slice, slice]]:
        """The parts of attention that have rows of a chunk of the experts."""
        return self._shared(chunk, of=self.schedule.expert_chunks, among=self.schedule.attention_chunks)

    def _of_experts(self, chunk: int) -> Iterator[tuple[int, slice, slice]]:
        """The parts of the experts that have rows of a chunk of attention."""
        return self._shared(chunk, of=self.schedule.attention_chunks, among=self.schedule.expert_chunks)

    # ---- forward

    def _attend(self, block: int, chunk: int) -> None:
        rows, part = self.rows(chunk, self.schedule.attention_chunks), self.parts[block]
        if block == 0:
            x_BSD = self.x_BSD[rows]
        else:
            found = [self._added(block - 1, other)[there] for other, there, _ in self._of_experts(chunk)]
            x_BSD = _joined(found).view(-1, *self.x_BSD.shape[1:])
        graph = Graph(lambda owed, x_BSD: (part.attention(x_BSD, self.about, rows),), x_BSD)
        self._attentions[block, chunk], (self._attended[block, chunk],) = graph, graph.outputs

    def _gate(self, block: int, chunk: int) -> None:
        rows, part, said = self.rows(chunk, self.schedule.attention_chunks), self.parts[block], list[Gated]()

        def work(owed: object, x_BSD: Tensor) -> tuple[Tensor, ...]:
            said.append(part.gate(x_BSD, self.about, rows))
            return said[0].x_TD, said[0].weight_R, *said[0].kept, *said[0].aside

        graph = Graph(work, self._attended.pop((block, chunk)))
        x_TD, weight_R, *more = graph.outputs
        kept, aside = tuple(more[: len(said[0].kept)]), tuple(more[len(said[0].kept) :])
        self.gated[block, chunk] = dataclasses.replace(said[0], x_TD=x_TD, weight_R=weight_R, kept=kept, aside=aside)
        self._gates[block, chunk] = graph
        for other, _, _ in self._of_experts(chunk):
            if all((block, each) in self.gated for each, _, _ in self._of_attention(other)):
                self._pack(block, other)

    def _pack(self, block: int, chunk: int) -> None:
        """The rows of a chunk as they are sent, once all gates have spoken that are asked about it."""
        found, experts = [], self.parts[block].num_experts
        for other, there, _ in self._of_attention(chunk):
            gated = self.gated[block, other]
            entries = slice(*(int(gated.start_T[end]) for end in (there.start, there.stop)))
            counts_T = gated.start_T[there.start : there.stop + 1].diff()
            kept = tuple(each[there] for each in gated.kept)
            found.append((gated.x_TD[there], counts_T, gated.weight_R[entries], gated.expert_R[entries], *kept))
        x_TD, count_T, weight_R, expert_R, *kept = (_joined(each) for each in zip(*found, strict=True))
        order_R = expert_R.argsort(stable=True)
        token_R = torch.arange(len(x_TD), device=x_TD.device).repeat_interleave(count_T)[order_R]
        self.packed[block, chunk] = Packed(
            row_RD=x_TD.index_select(0, token_R),
            token_R=token_R,
            order_R=order_R,
            weight_R=weight_R[order_R],
            count_GE=torch.bincount(expert_R, minlength=experts).view(self.ranks, -1),
            kept=tuple(kept),
        )

    def _run_experts(self, block: int, chunk: int) -> None:
        count_GE, part = self.count_GE[block, chunk], self.parts[block]
        load = count_GE.sum(0).tolist()
        slot_N = (
            torch.arange(len(load), device=count_GE.device).repeat(self.ranks).repeat_interleave(count_GE.flatten())
        )
        order_N = slot_N.argsort(stable=True)

        def work(owed: Any, row_ND: Tensor) -> tuple[Tensor, ...]:
            out_ND = part.experts(row_ND.index_select(0, order_N), load, owed.linear)
            return (torch.empty_like(out_ND).index_copy(0, order_N, out_ND),)

        graph = Graph(work, self.received.pop((block, chunk)))
        self._experts[block, chunk], (self.made[block, chunk],) = graph, graph.outputs

    def _added(self, block: int, chunk: int) -> Tensor:
        """(T, D) the block's output for a chunk of the experts, from what came back."""
        if (block, chunk) not in self._sums:
            packed, part = self.packed[block, chunk], self.parts[block]
            tokens = packed.kept[0].shape[0]

            def work(owed: object, back_RD: Tensor, weight_R: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
                wide = torch.promote_types(back_RD.dtype, torch.float32)
                sum_TD = torch.zeros(tokens, back_RD.shape[1], dtype=wide, device=back_RD.device)
                sum_TD = sum_TD.index_add(0, packed.token_R, back_RD.to(wide) * weight_R[:, None].to(wide))
                return (part.combine(sum_TD.to(back_RD.dtype), *kept),)

            inputs = (self.returned.pop((block, chunk)), packed.weight_R, *packed.kept)
            self._sums[block, chunk] = Graph(work, *inputs)
        return self._sums[block, chunk].outputs[0]

    # ---- the turn

    def turn(self, chunks: Sequence[int]) -> None:
        """The loss of these chunks of the last block's output, and its gradient, as far as the chip has it."""
        last, length = self.schedule.blocks - 1, self.x_BSD.shape[1]
        found = [self._added(last, chunk) for chunk in chunks]
        y_BSD = _joined(found).view(-1, *self.x_BSD.shape[1:]).requires_grad_()
        rows = [self.rows(chunk, self.schedule.expert_chunks) for chunk in chunks]
        gates = self._asides() if len(chunks) == self.schedule.expert_chunks else []
        with torch.enable_grad():
            loss = self.loss(y_BSD, slice(rows[0].start, rows[-1].stop), gates)
            loss.backward()
        self.losses.append(loss.detach())
        for block, gated in enumerate(gates):
            for chunk, each in enumerate(gated):
                self._aside_slopes[block, chunk] = tuple(aside.grad for aside in each.aside)
        slope_TD = torch.zeros_like(y_BSD) if y_BSD.grad is None else y_BSD.grad
        slopes = slope_TD.flatten(0, 1).split([(each.stop - each.start) * length for each in rows])
        for chunk, slope_TD in zip(chunks, slopes, strict=True):
            self._unadd(last, chunk, slope_TD)

    def _asides(self) -> list[list[Gated]]:
        chunks, found = range(self.schedule.attention_chunks), []
        for block in range(self.schedule.blocks):
            gates = [self.gated[block, chunk] for chunk in chunks]
            leaves = [tuple(a.requires_grad_(a.is_floating_point()) for a in gated.aside) for gated in gates]
            found.append([dataclasses.replace(g, aside=aside) for g, aside in zip(gates, leaves, strict=True)])
        return found

    # ---- backward

    def _unadd(self, block: int, chunk: int, slope_TD: Tensor) -> None:
        graph = self._sums.pop((block, chunk))
        back_RD, *rest = graph.back((slope_TD,), self.dense[block].of)
        graph.owed.pay(self.dense[block].of)
        self.returned_slopes[block, chunk], self._packed_slopes[block, chunk] = back_RD, tuple(rest)

    def _experts_whole(self, block: int, chunk: int) -> None:
        self._experts_input(block, chunk)
        self._experts_weight(block, chunk)

    def _experts_input(self, block: int, chunk: int) -> None:
        slope = self.made_slopes.pop((block, chunk))
        (found,) = self._experts[block, chunk].back((slope,), self.expert[block].of)
        self.received_slopes[block, chunk] = found

    def _experts_weight(self, block: int, chunk: int) -> None:
        self._experts.pop((block, chunk)).owed.pay(self.expert[block].of)

    def _unpack(self, block: int, chunk: int) -> tuple[Tensor, ...]:
        """Gradients by token, or by entry in the order of tokens: of x, of weights, of what was kept."""
        if (block, chunk) not in self._unpacked:
            packed, (weight_R, *kept) = self.packed[block, chunk], self._packed_slopes.pop((block, chunk))
            row_RD = self.row_slopes.pop((block, chunk))
            x_TD = row_RD.new_zeros(packed.kept[0].shape[0], row_RD.shape[1]).index_add_(0, packed.token_R, row_RD)
            self._unpacked[block, chunk] = (
                x_TD,
                torch.empty_like(weight_R).index_copy_(0, packed.order_R, weight_R),
                *kept,
            )
        return self._unpacked[block, chunk]

    def _ungate(self, block: int, chunk: int) -> None:
        gated, found = self.gated[block, chunk], []
        for other, there, here in self._of_experts(chunk):
            x_TD, weight_R, *kept = self._unpack(block, other)
            # Entries of this chunk's tokens follow each other there as here, after those of the chunks before.
            count = int(gated.start_T[here.stop] - gated.start_T[here.start])
            before = sum(int(t.start_T[s.stop] - t.start_T[s.start]) for t, s in self._before(block, other, chunk))
            found.append((x_TD[there], weight_R[before : before + count], *(each[there] for each in kept)))
        slopes = [_joined(each) for each in zip(*found, strict=True)]
        aside = self._aside_slopes.pop((block, chunk), (None,) * len(gated.aside))
        graph = self._gates.pop((block, chunk))
        (self._attended_slopes[block, chunk],) = graph.back((*slopes, *aside), self.dense[block].of)
        graph.owed.pay(self.dense[block].of)

    def _before(self, block: int, chunk: int, until: int) -> Iterator[tuple[Gated, slice]]:
        """The gates of a chunk of the experts before attention's chunk ``until``, with which of their tokens it has."""
        for other, there, _ in self._of_attention(chunk):
            if other < until:
                yield self.gated[block, other], there

    def _attention_whole(self, block: int, chunk: int) -> None:
        self._attention_input(block, chunk)
        self._attention_weight(block, chunk)

    def _attention_input(self, block: int, chunk: int) -> None:
        slope_BSD = self._attended_slopes.pop((block, chunk))
        (found,) = self._attentions[block, chunk].back((slope_BSD,), self.dense[block].of)
        self._x_slopes[block, chunk] = found
        for other, _, _ in self._of_experts(chunk) if block else ():
            parts = [(each, there) for each, there, _ in self._of_attention(other)]
            if all((block, each) in self._x_slopes for each, _ in parts):
                slopes = [self._x_slopes[block, each].flatten(0, 1)[there] for each, there in parts]
                self._unadd(block - 1, other, _joined(slopes))

    def _attention_weight(self, block: int, chunk: int) -> None:
        self._attentions.pop((block, chunk)).owed.pay(self.dense[block].of)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
