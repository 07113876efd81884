"""What was written, held against transformers itself: whether it loads there whole, and computes what it does here."""

import contextlib
import gc
import importlib.util
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turnout.errors import CheckpointError, word
from turnout.models import LMConfig, checkpoint
from turnout.models.checkpoint.own import read_json
from turnout.recipes.room import free_memory
from turnout.recipes.tied import tied

__all__ = ["check_with_transformers", "said"]

_WHERE = "turnout convert"
_ROWS, _LENGTH = 2, 32
# In fp32: the furthest apart that a logit may be, against the largest. In half precision no two programs agree, single
# tokens are far off where two experts score nearly the same, but neither may be much further from fp32 than the other.
_SAME, _TIMES, _FLOOR = 1e-4, 4.0, 0.02
# Tokens that must be compared where others are left out, because rounding may send them to other experts.
_ENOUGH = 8
# The weights, what reading adds to them, and what a short batch takes.
_ROOM, _BESIDE = 1.3, 256 * 2**20
_HALVES = (torch.bfloat16, torch.float16)


def check_with_transformers(folder: Path, *, params: int) -> dict[str, Any]:
    """Loads a folder with transformers and compares its logits with ours, in fp32 and in the dtype that is stored.

    One model is in memory at a time. Code that the folder brings is not run.

    Args:
        folder: that ``to_hf`` wrote.
        params: of its model, for the memory that it takes.

    Returns:
        ``version`` of transformers; ``dtypes``, for each how far its logits are from ours, the furthest, and relative
        on average, with the number of ``tied_tokens`` left out, if any, that rounding may send to other experts; and
        ``skipped``, what was not checked and why.

    Raises:
        CheckpointError: transformers refuses it, finds tensors missing, left over or of another shape, or computes
            something else.

    Source: none; transformers is the judge.
    """
    if importlib.util.find_spec("transformers") is None:
        return {"version": None, "dtypes": {}, "skipped": ["it is not installed"]}
    packed = "quantization_config" in read_json(folder / "config.json", _WHERE)
    if packed and importlib.util.find_spec("compressed_tensors") is None:
        return {"version": None, "dtypes": {}, "skipped": ["compressed-tensors, which it needs, is not installed"]}
    seen = checkpoint.peek(folder)
    id_BS = batch(seen.config)
    found, skipped, exact_BSV = dict[str, Any](), list[str](), None
    for dtype in dict.fromkeys((torch.float32, seen.dtype)):
        name, memory = str(dtype).removeprefix("torch."), free_memory()
        if memory is not None and memory < _ROOM * params * dtype.itemsize + _BESIDE:
            skipped.append(f"{name}, for want of memory")
            continue
        try:
            ours_BSV, theirs_BSV = _ours(folder, id_BS, dtype), _theirs(folder, id_BS, dtype)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
                raise
            skipped.append(f"{name}, for want of memory")
            continue
        if not ours_BSV.isfinite().all():
            skipped.append(f"{name}, whose logits are not finite here")
            continue
        if dtype not in _HALVES:
            exact_BSV = ours_BSV
        found[name] = _compare(folder, ours_BSV, theirs_BSV, exact_BSV, name, id_BS)
    import transformers

    return {"version": transformers.__version__, "dtypes": found, "skipped": skipped}


def batch(config: LMConfig) -> Tensor:
    """The token ids that are compared: always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (_ROWS, min(_LENGTH, config.max_seq)), generator=generator)


def said(found: dict[str, Any]) -> str:
    """What ``check_with_transformers`` gave, as a line."""
    dtypes = [
        f"{name} logits {each['relative']:.2g} from turnout's, relative"
        + (f" ({each['tied_tokens']} tokens left out, whose experts are tied)" if "tied_tokens" in each else "")
        for name, each in found["dtypes"].items()
    ]
    missed = f"not checked with transformers: {', '.join(found['skipped'])}" if found["skipped"] else ""
    checked = f"transformers {found['version']} loads it: {', '.join(dtypes)}" if dtypes else ""
    return "; ".join(filter(None, (checked, missed)))


@torch.no_grad()
def _ours(folder: Path, id_BS: Tensor, dtype: torch.dtype) -> Tensor:
    return checkpoint.from_hf(folder, dtype=dtype)(id_BS).logits_BSV.float()


@torch.no_grad()
def _theirs(folder: Path, id_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """The logits of transformers' own model; nothing may be missing or left over when it loads."""
    # compressed-tensors shows bars that nothing turns off; what is wrong is raised, or in the notes.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # of versions and of dtypes
        import transformers

        quiet = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            model, notes = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True, trust_remote_code=False
            )
            logits_BSV = _run(model.eval(), id_BS)
        except MemoryError:
            raise
        except Exception as error:  # whatever transformers says is the answer
            if "allocate memory" in str(error):
                raise
            raise _refused(folder, f"{type(error).__name__}: {str(error)[:300]}", "load in transformers") from error
        finally:
            transformers.logging.set_verbosity(quiet[0])
            if quiet[1]:
                transformers.logging.enable_progress_bar()
    wrong = {kind: sorted(map(str, names))[:3] for kind, names in notes.items() if names}
    if wrong:
        raise _refused(folder, f"{wrong} when transformers loads it", "be loaded whole")
    del model
    gc.collect()
    return logits_BSV


def _run(model: Any, id_BS: Tensor) -> Tensor:
    """The logits; expert by expert where the sizes are none for the grouped product of this machine."""
    try:
        return model(id_BS).logits.float()
    except RuntimeError as error:
        if "multiple of 16 bytes" not in str(error):
            raise
    model.set_experts_implementation("eager")
    return model(id_BS).logits.float()


def _compare(
    folder: Path, ours_BSV: Tensor, theirs_BSV: Tensor, exact_BSV: Tensor | None, name: str, id_BS: Tensor
) -> dict[str, float]:
    """How far apart they are; in half precision within what ours is from fp32, where that is known."""
    far_BS, largest = (ours_BSV - theirs_BSV).abs().amax(2), float(theirs_BSV.abs().max())
    relative, aside = _relative(theirs_BSV, ours_BSV), {}
    within = float(far_BS.max()) <= _SAME * max(1.0, largest)
    if not within and name == "float32" and theirs_BSV.isfinite().all():
        clear_BS = ~tied(checkpoint.from_hf(folder, dtype=torch.float32), id_BS)
        if int(clear_BS.sum()) >= _ENOUGH and float(far_BS[clear_BS].max()) <= _SAME * max(1.0, largest):
            within, aside = True, {"tied_tokens": int((~clear_BS).sum())}
            far_BS, relative = far_BS[clear_BS], _relative(theirs_BSV[clear_BS], ours_BSV[clear_BS])
    worst = float(far_BS.max())
    if "16" in name:
        reference = ours_BSV if exact_BSV is None else exact_BSV
        within = _relative(theirs_BSV, reference) <= _TIMES * _relative(ours_BSV, reference) + _FLOOR
        within |= exact_BSV is None and relative <= _TIMES * _FLOOR
    if not theirs_BSV.isfinite().all():
        raise _refused(folder, f"logits that are not finite in {name}", "be finite in transformers as they are here")
    if not within:
        got = f"logits {worst:.3g} apart in {name}, {relative:.2g} of their size on average"
        raise _refused(folder, got, "compute the same in transformers and here")
    return {"max_abs": worst, "relative": relative} | aside


def _relative(a_BSV: Tensor, b_BSV: Tensor) -> float:
    """The distance of a token's logits against their length, on average."""
    return float(((a_BSV - b_BSV).norm(dim=-1) / b_BSV.norm(dim=-1).clamp_min(1e-30)).mean())


def _refused(folder: Path, got: str, allowed: str) -> CheckpointError:
    fix = "keep the model in turnout's own format with --as model, and report this: a folder that transformers reads "
    fix += "otherwise is a defect of turnout"
    return CheckpointError(word("what was written", got=got, allowed=allowed, where=_WHERE, fix=fix))
