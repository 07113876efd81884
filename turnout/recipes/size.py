"""Whether this machine can hold a training run, known before a weight is made."""

from turnout.errors import UsageError, word
from turnout.measure import quantity
from turnout.measure.memory import free_on
from turnout.recipes.run import Run
from turnout.types.device import find_device, find_precision, shown

__all__ = ["check_size", "least_bytes"]

# A weight in fp32; and where it is trained its gradient and two moments of AdamW.
_PER_WEIGHT, _PER_TRAINED = 4, 12
# What the objects of one block take whatever its sizes; measured at 0.1 MB and more.
_PER_BLOCK = 100_000


def least_bytes(run: Run) -> int:
    """The fewest bytes that training takes: weights with all that belongs to them, and what backward needs of a batch.

    Counted low, so that nothing is refused that would fit: of a batch only the inputs of the products of each block,
    without logits, attention or what PyTorch keeps beside it.

    Args:
        run: what is to be trained.

    Source: none; plain arithmetic.
    """
    model, moe = run.model, run.model.moe
    layers = range(min(model.layers, 100_000))
    routed, banked = sum(map(model.is_routed, layers)), sum(map(model.experts_of, layers))
    dense = max(model.layers - routed, 0) * 3 * model.width * model.dense_hidden
    experts = 0 if moe is None else banked * 3 * model.width * moe.hidden
    weights = model.vocab_size * model.width + dense + experts + model.layers * model.width**2
    trained = weights
    if run.train.only != "all":
        trained = 0 if moe is None or run.train.only == "adapters" else banked * model.width
    kept = run.train.batch * _row_bytes(run)
    return _PER_WEIGHT * weights + _PER_TRAINED * trained + _PER_BLOCK * model.layers + kept


def _row_bytes(run: Run) -> int:
    half = find_precision(run.train.dtype, find_device(run.train.device)) == "bf16"
    return 4 * run.train.seq * run.model.width * run.model.layers * (2 if half else 4)


def check_size(run: Run, *, free: int | None = None) -> None:
    """Refuses a run that cannot fit, before anything is built.

    Args:
        run: what is to be trained.
        free: bytes; None for what is said to be free where it is trained, if anything says so.

    Raises:
        UsageError: too large; says what would fit. Or its device is not there.
    """
    device = find_device(run.train.device)
    free, need = free_on(device) if free is None else free, least_bytes(run)
    if free is None or need <= free:
        return
    each = _row_bytes(run)
    fits = (free - (need - run.train.batch * each)) // max(each, 1)
    fix = f"pass batch={fits}, with accumulate= for the rest" if fits >= 1 else "make it smaller"
    fix += "" if device.type == "cpu" else ", or device=cpu"
    on = "" if device.type == "cpu" else f" on {shown(device)}"
    got, allowed = f"{quantity(free)}B free{on}", f"hold the {quantity(need)}B that this run takes at the very least"
    raise UsageError(word("the memory", got=got, allowed=allowed, where=f"recipe {run.recipe!r}", fix=fix))
