"""Audit the model in a folder, or a network that some code makes, for what leaks between users of one batch."""

import contextlib
import pkgutil
import sys
from pathlib import Path

from torch import nn

from turnout.errors import CheckpointError, MissingExtraError, UsageError, word
from turnout.hub import located
from turnout.measure import Isolation, audit
from turnout.models.placed import roomy, weight_bytes
from turnout.recipes.certify import model_folder, open_model
from turnout.types import batch_invariant

__all__ = ["audit_model"]

_WHERE = "turnout audit"


def audit_model(
    model: str | Path,
    *,
    stock: bool = False,
    invariant: bool = False,
    width: int | None = None,
    length: int | None = None,
    batches: int = 40,
    bound: float | None = None,
    seed: int = 0,
    device: object = "auto",
) -> Isolation:
    """What ``measure.audit`` finds in a folder's model, or in what ``module:attribute`` is.

    Args:
        model: a run, a model's folder, a model of the hub that is here; or ``module:attribute``, which is imported,
            code and all: a network, or a function without arguments that makes one.
        stock: a folder of transformers runs as transformers' own model, not as ours.
        invariant: audit within ``turnout.types.batch_invariant``, which holds for turnout's own models and layers.
        width: D of a layer that does not say it.
        length: as ``measure.audit``.
        batches: as ``measure.audit``.
        bound: as ``measure.audit``.
        seed: as ``measure.audit``.
        device: where it runs.

    Raises:
        TurnoutError: no such model, or nothing can be compared.

    Source: none; ``measure.audit``, with what opens a model around it.
    """
    network, name = _opened(model, stock)
    network = network.to(roomy(device, weight_bytes(network)))
    how = {"width": width, "length": length, "batches": batches, "bound": bound, "seed": seed, "name": name}
    with batch_invariant() if invariant else contextlib.nullcontext():
        return audit(network, **how)


def _opened(model: str | Path, stock: bool) -> tuple[nn.Module, str]:
    made = str(model).partition(":")
    if made[1] and not Path(model).exists() and len(made[0]) > 1:
        if stock:
            got, fix = f"--stock and {model}", "leave --stock out: the code says itself what it makes"
            raise UsageError(word("--stock", got=got, allowed="go with a folder", where=_WHERE, fix=fix))
        return _imported(str(model)), str(model)
    found = located(model, where=_WHERE)
    if not stock:
        return open_model(found.folder, where=_WHERE)[0], found.name
    return _stock(model_folder(found.folder, where=_WHERE)), f"{found.name} in transformers"


def _imported(name: str) -> nn.Module:
    """What this attribute is, or makes; as ``python -m`` does, code of the working folder is found."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        fix = "name a module that can be imported from here, and what it holds: package.module:make"
        got = f"{name} ({error})"
        raise UsageError(word("MODEL", got=got, allowed="be there", where=_WHERE, fix=fix)) from error
    finally:
        if added:
            sys.path.remove(here)
    try:
        network = found() if callable(found) and not isinstance(found, nn.Module) else found
    except Exception as error:  # whatever the code says is the answer
        got, fix = f"{name} ({type(error).__name__}: {str(error)[:200]})", "name a function that makes it by itself"
        allowed = "be a network, or make one when called without arguments,"
        raise UsageError(word("MODEL", got=got, allowed=allowed, where=_WHERE, fix=fix)) from error
    if not isinstance(network, nn.Module):
        got, fix = f"{name}, a {type(network).__name__}", "name a torch.nn.Module, or what makes one"
        raise UsageError(word("MODEL", got=got, allowed="be a network", where=_WHERE, fix=fix))
    return network


def _stock(folder: Path) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        fix = "pip install 'turnout[hf]', or leave --stock out"
        allowed = "be installed for --stock"
        raise MissingExtraError(word("transformers", got="none", allowed=allowed, where=_WHERE, fix=fix)) from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        pairs = getattr(config, "is_encoder_decoder", False)
        kind = transformers.AutoModelForSeq2SeqLM if pairs else transformers.AutoModelForCausalLM
        return kind.from_pretrained(folder, dtype="auto", local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers says is the answer
        got, fix = f"{folder} ({type(error).__name__}: {str(error)[:200]})", "name a folder of transformers"
        allowed = "load in transformers"
        raise CheckpointError(word("the model", got=got, allowed=allowed, where=_WHERE, fix=fix)) from error
