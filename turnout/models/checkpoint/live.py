"""A live model of transformers as the LM that it is exactly, sharing the weights that lie the same way in both."""

import copy
import itertools
import types
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from turnout.errors import TurnoutError, UsageError, word
from turnout.expects import expects
from turnout.models.checkpoint.own import outline
from turnout.models.checkpoint.survey import CORRECTION, layout
from turnout.models.ends import own_ends
from turnout.models.families import FAMILIES
from turnout.models.families.express import family_of, obstacles
from turnout.models.families.family import Family, Names
from turnout.models.families.foreign import refuse_foreign_windows
from turnout.models.families.tensors import slots
from turnout.models.lm import LM, LMConfig
from turnout.models.wishes import own_wishes
from turnout.wrappers import unwrapped

__all__ = ["from_live", "lm_or_itself"]

_WHERE = "turnout.models.checkpoint.from_live"
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What may be set on a module without changing what it computes in evaluation.
_FREE = ("training", "gradient_checkpointing", "p", "attention_dropout", "name_or_path")
_AS_IT_IS = "generate with the model as it is: turnout.generate(..., fallback=True)"
_MERGE = "merge the adapters first: model.merge_and_unload()"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@expects(hf_model=nn.Module)
def from_live(hf_model: nn.Module) -> LM:
    """The LM that computes what a model of transformers does, on its device, for inference.

    Weights that lie the same way in both, experts and output matrices above all, are shared: training the one changes
    the other. Those that the LM holds in one piece (queries, keys and values; gates and values of dense layers) are
    copied once. Make it anew after changing the model.

    Args:
        hf_model: an unquantised causal language model of one of the architectures of ``turnout.models.families``.

    Raises:
        UsageError: it computes something else: another architecture, parts of other classes, adapters, hooks, a setting
            that the LM has not, dtypes that differ; the message names what.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    >>> hf_model, id_BS = LlamaForCausalLM(LlamaConfig(**sizes)).eval(), torch.tensor([[3, 1, 4]])
    >>> torch.allclose(from_live(hf_model)(id_BS).logits_BSV, hf_model(id_BS).logits, atol=1e-5)
    True

    Source: none; the architectures of transformers 5, as ``from_hf`` reads them.
    """
    inside = unwrapped(hf_model)
    family, config, dtype = _read(inside)
    stored = _tensors(inside, config)
    lm = outline(config).to(dtype)
    names = layout(family, stored)
    _check_tensors({name: slot.shape for name, slot in slots(lm, names).items()}, stored)
    shared = _share(lm, names, stored)
    device = next(iter(stored.values())).device
    for module in lm.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_meta:
                made = torch.empty_like(tensor, device=device)
                setattr(module, name, nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made)
    lm.to(dtype)  # which works the angles of RoPE out
    with torch.no_grad():
        for name, slot in slots(lm, names).items():
            if name not in shared:
                slot.view.copy_(slot.cut(stored[name]))
    lm.ends, lm.wishes = own_ends(inside), own_wishes(inside)
    return lm.requires_grad_(False).eval()


def lm_or_itself(hf_model: nn.Module, *, fallback: bool) -> nn.Module:
    """The LM that a model of transformers is exactly; else, if that is asked for, the model itself, with a warning.

    Raises:
        UsageError: as ``from_live``, where it is not; or a model that cannot go on from tokens at all.
    """
    try:
        return from_live(hf_model)
    except UsageError as error:
        if not fallback:
            raise
        if getattr(getattr(hf_model, "config", None), "is_encoder_decoder", None) is not False:
            raise
        if getattr(getattr(hf_model, "active_peft_config", None), "is_prompt_learning", False):
            got, fix = "one of PEFT's that puts tokens of its own before a text", "call its own generate"
            raise _refusal(got, "read a text and what follows it as they are", fix) from error
        warnings.warn(f"turnout.generate runs the model as it is, with transformers: {error}", stacklevel=5)
        return hf_model


def _read(model: nn.Module) -> tuple[Family, LMConfig, torch.dtype]:
    """The architecture, our configuration and the dtype of a model of which all parts are what they seem.

    Raises:
        UsageError: it is something else; says what.
    """
    keys = _keys(model)
    family = family_of(keys)
    if family is None or type(model).__name__ != family.architecture:
        known = ", ".join(sorted(one.architecture for one in FAMILIES))
        raise _refusal(f"a {type(model).__name__}", f"be one of {known}", _AS_IT_IS)
    config = _config(family, keys)
    if strange := next(_strange(model), None):
        fix = _MERGE if " of peft." in strange else _AS_IT_IS
        raise _refusal(strange, "consist of what transformers makes it of", fix)
    return family, config, _dtype(model)


def _config(family: Family, keys: dict[str, Any]) -> LMConfig:
    try:
        config = family.read(family.keys(keys))
        refuse_foreign_windows(family, family.keys(keys), config)
    except TurnoutError as error:
        raise _refusal(f"a {family.architecture} of which {error}", "be an LM exactly", _AS_IT_IS) from error
    if doubts := obstacles(config, family):
        raise _refusal(f"a {family.architecture} of which {'; '.join(doubts)}", "be an LM exactly", _AS_IT_IS)
    return config


def _dtype(model: nn.Module) -> torch.dtype:
    """That of all weights, which lie on one device."""
    dtypes = {tensor.dtype: name for name, tensor in model.named_parameters() if not name.endswith(CORRECTION)}
    if len(dtypes) != 1 or next(iter(dtypes)) not in _FLOATS:
        got = ", ".join(f"{str(kind).removeprefix('torch.')} ({name})" for kind, name in dtypes.items())
        fix = "load it with one dtype and no quantisation: from_pretrained(..., dtype=torch.bfloat16)"
        raise _refusal(f"weights of {got}", "have one floating-point dtype", fix)
    devices = {str(tensor.device) for tensor in model.parameters()}
    if len(devices) != 1 or devices == {"meta"}:
        fix = "load it onto one device: model.to('cpu')"
        raise _refusal(f"weights on {', '.join(sorted(devices))}", "lie on one device", fix)
    return next(iter(dtypes))


def _keys(model: nn.Module) -> dict[str, Any]:
    """The keys of its config.json."""
    config: Any = getattr(model, "config", None)
    if not callable(getattr(config, "to_dict", None)) or not type(model).__module__.startswith("transformers."):
        got = f"a {type(model).__name__} of {type(model).__module__.partition('.')[0]}"
        fix = (
            _MERGE if ".peft." in f".{type(model).__module__}" else "pass AutoModelForCausalLM.from_pretrained(FOLDER)"
        )
        raise _refusal(got, "be a causal language model of transformers", fix)
    return config.to_dict() | {"architectures": [type(model).__name__]}


def _strange(model: nn.Module) -> Iterator[str]:
    """What a part has that transformers did not give it: a class, a setting, a forward of its own, hooks."""
    with _Light():
        fresh = dict(type(model)(copy.deepcopy(model.config)).named_modules())
    for name, module in model.named_modules():
        shown, kind = name or "the model", type(module)
        like = fresh.get(name)
        if like is None or type(like) is not kind:
            was = "" if like is None else f", where its configuration has a {type(like).__name__}"
            yield f"{shown}, a {kind.__name__} of {kind.__module__}{was}"
            return
        mine, its = _settings(like), _settings(module)
        for key in mine:
            if mine[key] != its.get(key):
                yield f"{shown}, whose {key} is {its.get(key)!r:.80}, not {mine[key]!r:.80}"
        yield from _buffers(shown, module, like)
        if "forward" in vars(module):
            yield f"{shown}, whose forward was replaced"
        if any(getattr(module, hooks) for hooks in _HOOKS):
            yield f"{shown}, which has hooks"


class _Light(TorchFunctionMode):
    """Weights without memory or time, and everything that is worked out from a configuration as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.normal_:
            return args[0]
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


def _buffers(shown: str, module: nn.Module, like: nn.Module) -> Iterator[str]:
    """What a module has worked out from its configuration, which no folder holds, where it is something else."""
    for key in sorted(module._non_persistent_buffers_set):
        its, mine = module._buffers.get(key), like._buffers.get(key)
        if its is None or mine is None or its.is_meta:
            continue
        if key == "inv_freq" and getattr(module, "rope_type", "") == "longrope":
            continue  # which of two, every forward pass decides anew
        its = its.cpu()
        if torch.equal(its.to(mine.dtype), mine):
            continue
        if its.shape != mine.shape or not torch.equal(its, mine.to(its.dtype)):
            yield f"{shown}, whose {key} is not what its configuration makes it"
        what = f"{shown}.{key} was rounded to {str(its.dtype).removeprefix('torch.')} with the weights"
        fix = "from_pretrained(..., dtype=...), not .to(dtype)"
        warnings.warn(f"{what}; turnout computes with it as it was. Nearest fix: {fix}.", UserWarning, stacklevel=6)


def _settings(module: nn.Module) -> dict[str, object]:
    """What a module computes with beside its parts and tensors."""
    kinds = (int, float, str, tuple, types.FunctionType, types.BuiltinFunctionType)
    plain = {name: value for name, value in vars(module).items() if isinstance(value, kinds) or value is None}
    return {name: value for name, value in plain.items() if not name.startswith("_") and name not in _FREE}


def _tensors(model: nn.Module, config: LMConfig) -> dict[str, Tensor]:
    """The weights by name, as a folder would hold them."""
    stored = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    head = stored.pop("lm_head.weight", None) if config.tie_embeddings else None
    if head is not None and not torch.equal(head, cast("Any", model).get_input_embeddings().weight):
        got, allowed = "an lm_head.weight of its own", "be the embedding, as tie_word_embeddings says"
        raise _refusal(got, allowed, "set model.config.tie_word_embeddings = False")
    return stored


def _check_tensors(wanted: dict[str, tuple[int, ...]], stored: dict[str, Tensor]) -> None:
    """Refuses weights of other names or shapes: adapters, added layers, parts of a model that others hold."""
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    wrong = sorted(name for name in {**wanted, **shapes} if wanted.get(name) != shapes.get(name))
    if wrong:
        told = [f"{name} is {shapes.get(name, 'missing')}, not {wanted.get(name, 'there')}" for name in wrong[:2]]
        got = f"weights of which {', '.join(told)}" + (f" ({len(wrong)} such)" if len(wrong) > 2 else "")
        raise _refusal(got, "have the weights that its configuration says", "merge adapters first; or " + _AS_IT_IS)


def _share(lm: LM, names: Names, stored: dict[str, Tensor]) -> set[str]:
    """Puts weights in the place of parameters that hold nothing else; which ones."""
    places = {
        parameter.untyped_storage()._cdata: (module, name, parameter)
        for module in lm.modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    shared = set()
    for name, slot in slots(lm, names).items():
        module, attribute, parameter = places.get(slot.view.untyped_storage()._cdata, (None, "", None))
        if parameter is None or slot.joined or stored[name].dtype != parameter.dtype:
            continue
        for order in itertools.permutations(range(parameter.ndim)):
            turned = parameter.permute(order)
            if turned.shape == slot.view.shape and turned.stride() == slot.view.stride():
                back = [order.index(axis) for axis in range(parameter.ndim)]
                setattr(module, attribute, nn.Parameter(stored[name].permute(back), requires_grad=False))
                shared.add(name)
                break
    return shared


def _refusal(got: str, allowed: str, fix: str) -> UsageError:
    return UsageError(word("hf_model", got=got, allowed=allowed, where=_WHERE, fix=fix))
