"""What a live model is while it has adapters: it listens, its base is frozen, and it saves itself as its base."""

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.layers import Adapter, Scaled, Sharded
from turnout.layers.told import listen, listens, unlisten

__all__ = ["alive", "freeze", "leave_alone", "put", "saved_by"]

SHARDS = "turnout_shards"  # where ``attach_shards`` keeps the pools
CHOICE = "_turnout_adapter_choice"  # what ``save_attached`` writes: the router's name, or None, its options, adapters
_TRAINED = "_turnout_trained"  # the names of the parameters that asked for gradients before
_ASKING = "_turnout_asking"  # and those that did when everything was attached
_SAVER = "_turnout_saver"
# Where Trainer resumes from; transformers knows such folders by the same pattern.
_CHECKPOINT = re.compile(r"checkpoint-\d+")
Saver = Callable[[Any, Mapping[str, Tensor]], Callable[[Path], object]]


class Living:
    """What a model of transformers does while it has adapters.

    Source: none; plain bookkeeping.
    """

    def save_pretrained(self: Any, save_directory: Any, *arguments: Any, **keywords: Any) -> None:
        """Writes the base, as transformers does, and beside it what was added; see ``saved_by``.

        In a folder called checkpoint-N the weights hold what was added as well: Trainer resumes from them alone.

        Raises:
            UsageError: what was added cannot be written, or the base not by itself.
        """
        plain = super().save_pretrained  # pyrefly: ignore[missing-attribute]
        said = inspect.signature(plain).bind(save_directory, *arguments, **keywords)
        _check_saving(self, {**said.arguments, **said.kwargs})
        state = said.arguments.pop("state_dict", None)
        base, added = split(self, self.state_dict() if state is None else state)
        write = vars(self)[_SAVER](self, added)
        folder = Path(save_directory)
        if _CHECKPOINT.fullmatch(folder.resolve().name):
            base |= {key: tensor.clone() for key, tensor in added.items()}  # shared ones once for each name
        said.arguments["state_dict"] = base
        plain(*said.args, **said.kwargs)
        if said.arguments.get("is_main_process", True):
            write(folder)

    def load_state_dict(self: Any, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ever; but a base alone does not pass for the whole.

        Raises:
            UsageError: with ``strict=False``, a state dict of the base and of nothing that was added.
        """
        if not strict:
            base, added = split(self, state_dict)
            layers = changed(self)
            whole = bool(layers) and all(any(key.startswith(f"{name}.") for key in base) for name in layers)
            if whole and not added:
                got, allowed = "the base alone", "hold the adapters too, or they would stay as they happen to be"
                fix = "turnout.reshape.attach_folder(base, FOLDER) for a saved one; or detach first, to load a base"
                raise UsageError(word("the state dict", got=got, allowed=allowed, where="load_state_dict", fix=fix))
        return super().load_state_dict(state_dict, strict=strict, assign=assign)  # pyrefly: ignore[missing-attribute]

    @property
    def peft_config(self) -> Any:
        """None that could be told: PEFT's adapters do not go on a model that has turnout's."""
        raise AttributeError("peft_config")

    @peft_config.setter
    def peft_config(self: Any, value: object) -> None:
        """PEFT sets it when its layers are in: they are taken out again."""
        for name, module in list(self.named_modules()):
            if type(module).__module__.startswith("peft.") and hasattr(module, "base_layer"):
                put(self, name, module.base_layer)
        for name, parameter in self.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name in vars(self).get(_ASKING, ()))
        vars(self).pop("_hf_peft_config_loaded", None)
        got, allowed = (
            "a model that turnout has put adapters on",
            "be a plain one: PEFT would neither train nor save them",
        )
        fix = "train the adapter with PEFT on the base alone, and give its folder to turnout.reshape.attach too"
        raise UsageError(word("PEFT's model", got=got, allowed=allowed, where="get_peft_model", fix=fix))


def alive(model: nn.Module) -> None:
    """Lets the model, and the models in it, tell their layers what they are called with; until ``leave_alone``.

    Raises:
        UsageError: the model's ``forward`` was replaced on the instance.
    """
    inner = [module for module in model.modules() if module is not model and listens(module)]
    for module in (*inner, model):
        listen(module, (Living,) if hasattr(module, "save_pretrained") else ())


def freeze(model: nn.Module) -> None:
    """Nothing asks for gradients, and ``leave_alone`` will know what did."""
    named = model.named_parameters(remove_duplicate=False)
    vars(model)[_TRAINED] = {name for name, parameter in named if parameter.requires_grad}
    model.requires_grad_(False)


def saved_by(model: nn.Module, saver: Saver) -> None:
    """Says what writes that which was added: from model and tensors to a function of the folder; it may refuse."""
    vars(model)[_SAVER] = saver
    vars(model)[_ASKING] = {name for name, one in model.named_parameters(remove_duplicate=False) if one.requires_grad}


def leave_alone(model: nn.Module) -> None:
    """Undoes ``alive``, ``freeze`` and ``saved_by``; the layers themselves are put back before."""
    for module in list(model.modules()):  # it may have been one within this one that was changed
        unlisten(module)
        if hasattr(module, SHARDS):
            delattr(module, SHARDS)
        trained = vars(module).pop(_TRAINED, None)
        for name, parameter in module.named_parameters(remove_duplicate=False) if trained is not None else ():
            parameter.requires_grad_(name in trained)
        for name in (CHOICE, _SAVER, _ASKING):
            vars(module).pop(name, None)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Sets the module of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def changed(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that something was added to."""
    return {name: one for name, one in model.named_modules() if isinstance(one, Adapter | Scaled | Sharded)}


def split(model: nn.Module, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A state dict as that of the base, under its own names, and that of what was added."""
    layers = changed(model)
    base, added = {}, {}
    for key, tensor in state.items():
        layer = next((name for name in _above(key) if name in layers), None)
        rest = key if layer is None else key.removeprefix(f"{layer}.")
        if key.startswith(f"{SHARDS}.") or (layer is not None and rest.startswith(("paths.", "router."))):
            added[key] = tensor
        else:
            base[key if layer is None else f"{layer}.{rest.removeprefix('base.')}"] = tensor
    return base, added


def _above(key: str) -> list[str]:
    """The names of the modules that a tensor is in."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _check_saving(model: Any, said: Mapping[str, Any]) -> None:
    got = fix = ""
    if _SAVER not in vars(model):
        got, fix = "a part of a model with adapters", "save the whole model, or call turnout.reshape.detach on it first"
    elif said.get("push_to_hub"):
        got, fix = "push_to_hub=True", "call model.push_to_hub(NAME), or upload the folder when it is saved"
    elif said.get("distributed_checkpoint"):
        got, fix = "distributed_checkpoint=True", "leave it out, or save model.state_dict() with torch"
    if fix:
        allowed = "be of the whole model with its adapters, into one folder"
        raise UsageError(word("what to save", got=got, allowed=allowed, where="save_pretrained", fix=fix))
