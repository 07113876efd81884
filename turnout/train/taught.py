"""Knowledge distillation, staged: a student learns from its teacher's probabilities too, and later from text alone."""

import torch
from torch import Tensor, nn

from turnout.errors import ShapeError, UsageError, word
from turnout.train.config import TrainConfig

__all__ = ["check_teacher", "divergence", "taught_until"]

IGNORE = -100


def divergence(student_BSV: Tensor, teacher_BSV: Tensor, target_BS: Tensor) -> Tensor:
    """The sum over positions with a target of KL(teacher || student), in nats, of their softmaxes.

    Args:
        student_BSV: scores of every next token.
        teacher_BSV: the teacher's; no gradient goes there.
        target_BS: -100 where nothing counts.

    Raises:
        ShapeError: other shapes.

    >>> logits_BSV = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
    >>> float(divergence(logits_BSV, logits_BSV, torch.tensor([[1, 0]])))
    0.0

    Source: Hinton et al., 2015, "Distilling the Knowledge in a Neural Network", at temperature 1.
    """
    if student_BSV.shape != teacher_BSV.shape or student_BSV.shape[:-1] != target_BS.shape:
        got = f"{tuple(student_BSV.shape)}, {tuple(teacher_BSV.shape)} and {tuple(target_BS.shape)}"
        fix = "give teacher and student the same vocabulary, and both the same text"
        allowed = "be (B, S, V), (B, S, V) and (B, S)"
        raise ShapeError(word("logits and targets", got=got, allowed=allowed, where="turnout.train", fix=fix))
    counts_BS = target_BS != IGNORE
    ours_TV = student_BSV[counts_BS].float().log_softmax(1)
    theirs_TV = teacher_BSV[counts_BS].detach().float().log_softmax(1)
    return (theirs_TV.exp() * (theirs_TV - ours_TV)).sum()


def taught_until(config: TrainConfig) -> int:
    """How many steps have a teacher.

    >>> taught_until(TrainConfig(steps=100, batch=1, seq=8, kd_weight=1.0, kd_share=0.7))
    70

    Source: Rajbhandari et al., 2022, "DeepSpeed-MoE", section 4.2: with one to the end a small student underfits.
    """
    return round(config.kd_share * config.steps) if config.kd_weight > 0 else 0


def check_teacher(config: TrainConfig, teacher: nn.Module | None, *, alone: bool) -> None:
    """Refuses a teacher without weight, a weight without a teacher, and one for many processes.

    Raises:
        UsageError: such.
    """
    got, fix = "", ""
    if teacher is None and config.kd_weight > 0:
        got, fix = f"none with kd_weight={config.kd_weight}", "turnout train --teacher MODEL, or kd_weight=0"
    elif teacher is not None and config.kd_weight == 0:
        got, fix = "one with kd_weight=0", "kd_weight=1.0, or leave the teacher out"
    elif teacher is not None and not alone:
        got, fix = "one for several processes", "train the student on one, or without a teacher"
    if got:
        allowed = "go with kd_weight above 0, on one process"
        raise UsageError(word("the teacher", got=got, allowed=allowed, where="turnout.train", fix=fix))
    if teacher is not None:
        teacher.eval()
        if any(tensor.is_floating_point() and tensor.device.type == "meta" for tensor in teacher.parameters()):
            raise UsageError(word("the teacher", got="one without weights", allowed="have some", where="turnout.train",
                                  fix="load it"))  # fmt: skip


@torch.no_grad()
def told(teacher: nn.Module, id_BS: Tensor, real_BS: Tensor | None) -> Tensor:
    """(B, S, V) the teacher's scores."""
    known = {} if real_BS is None else {"attention_mask": real_BS}
    return teacher(id_BS, **known).logits_BSV
