"""Whether models of equal names and shapes are one architecture: what configurations, modules and tokenizers mean."""

import filecmp
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from turnout.errors import TurnoutError, UsageError, word
from turnout.models import LM
from turnout.models.families.express import family_of
from turnout.models.families.meaning import meaning
from turnout.models.packed import refuse_packed
from turnout.paths import FactoredBank, LoRA
from turnout.reading import TOKENIZER_BYTES, read_json

__all__ = ["differences", "refuse_unlike"]

# Fields of a configuration that change training, storage or what is returned, not what a model computes.
_FREE = {"use_cache", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures", "auto_map"}
_FREE |= {"initializer_range", "initializer_factor", "return_dict", "gradient_checkpointing", "pretraining_tp"}
_FREE |= {"router_aux_loss_coef", "router_jitter_noise", "output_router_logits", "output_attentions", "is_training"}
_FREE |= {"output_hidden_states", "problem_type", "use_mtp", "num_nextn_predict_layers", "tokenizer_class"}
# Those that decide where a text or a sequence ends: the result has the first model's.
_SAID = {"max_seq", "max_position_embeddings", "model_max_length", "bos_token_id", "eos_token_id", "pad_token_id"}
# Modules without weights that do nothing when a model is used.
_IDLE = (nn.Identity, nn.modules.dropout._DropoutNd)
_LOOSE = {"training", "p", "inplace", "momentum", "name_or_path"}
_BUILT_IN = "torch.nn.modules"


def refuse_unlike(models: Sequence[nn.Module], where: str) -> None:
    """Refuses models whose equal tensors mean other things: another rotary base, more heads of less width, another eps.

    Raises:
        UsageError: the first difference to the first model, by name; or weights in few bits, which have no mean.
    """
    for model in models:
        refuse_packed(model, "merged", where=where)
    for index, other in enumerate(models[1:], 1):
        for name, ours, theirs in (*_configs(models[0], other)[0], *_modules(models[0], other)[0]):
            allowed = f"be {ours}, as in model 0: their weights have the same shapes and mean other things"
            fix = "pass models that were tuned from one start"
            raise UsageError(word(f"{name} of model {index}", got=theirs, allowed=allowed, where=where, fix=fix))
        if (token := _vocabularies(models[0], other)) is not None:
            allowed = f"be the one of model 0: there {token!r} has another id, or none"
            fix = "tune both models with one tokenizer"
            got = "another vocabulary"
            raise UsageError(word(f"the tokenizer of model {index}", got=got, allowed=allowed, where=where, fix=fix))


def differences(models: Sequence[nn.Module]) -> list[str]:
    """What differs between models that may be merged all the same, a sentence each; the result has the first one's."""
    found = list[str]()
    products = [name for name, module in models[0].named_modules() if _is_product(module)]
    if products:
        said = f"{products[0]} ({len(products)} in all) is a product of matrices, and those are merged one by one"
        found.append(f"{said}: the product of the results is not the merged product")
    for index, other in enumerate(models[1:], 1):
        for name, ours, theirs in (*_configs(models[0], other)[1], *_modules(models[0], other)[1]):
            found.append(f"{name} is {theirs} in model {index} and {ours} in the first, whose the result has")
        found += [
            f"{what} of model {index} is not the first one's, which the result has" for what in _texts(models[0], other)
        ]
    return list(dict.fromkeys(found))


def _is_product(module: nn.Module) -> bool:
    """Whether a module's map is a product of its tensors: adapters, here or of PEFT, and factored experts."""
    return isinstance(module, FactoredBank | LoRA) or (hasattr(module, "lora_A") and hasattr(module, "lora_B"))


# (what, in the first model, in the other): those to refuse, and those to tell.
_Unlike = tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]


def _configs(one: nn.Module, other: nn.Module) -> _Unlike:
    """Fields that differ: those that change what is computed, and those that do not."""
    a, b = _fields(one), _fields(other)
    kinds: _Unlike = ([], [])
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) != b.get(name) and not (name in _FREE or "dropout" in name or name.endswith("_implementation")):
            kinds[name in _SAID].append((name, repr(a.get(name)), repr(b.get(name))))
    return kinds


def _fields(model: nn.Module) -> dict[str, Any]:
    """What a model's configuration means; of one that nobody knows, all it says."""
    if isinstance(model, LM):
        return meaning(model.config)
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    keys = to_dict() if callable(to_dict) else config
    keys = keys if isinstance(keys, Mapping) else getattr(keys, "__dict__", {})
    keys = {str(name): value for name, value in keys.items()}
    family = family_of(keys)
    if family is None:
        return keys
    try:
        known = meaning(family.read(family.keys(keys)))
    except TurnoutError:
        return keys
    return known | {
        name: keys.get(name) for name in (*_SAID - {"max_seq", "max_position_embeddings"}, "model_type", "id2label")
    }


def _modules(one: nn.Module, other: nn.Module) -> _Unlike:
    """Modules of other classes, or built into torch with other settings; settings of other modules beside them."""
    if isinstance(one, LM) and isinstance(other, LM):
        return [], []  # its configuration says all of it
    refused, told = list[tuple[str, str, str]](), list[tuple[str, str, str]]()
    a, b = (
        {name: module for name, module in model.named_modules() if not isinstance(module, _IDLE)}
        for model in (one, other)
    )
    for name in dict.fromkeys([*a, *b]):
        what = f"the module {name!r}" if name else "the class"
        kinds = [type(side[name]).__qualname__ if name in side else "nothing" for side in (a, b)]
        if kinds[0] != kinds[1]:
            refused.append((what, kinds[0], kinds[1]))
            continue
        ours, theirs = _settings(a[name]), _settings(b[name])
        into = refused if type(a[name]).__module__.startswith(_BUILT_IN) else told
        into += [
            (f"{key} of {what}", repr(ours.get(key)), repr(theirs.get(key)))
            for key in ours
            if ours[key] != theirs.get(key)
        ]
    return refused, told


def _settings(module: nn.Module) -> dict[str, object]:
    """The plain values among a module's attributes."""
    simple = (int, float, str, bool, tuple, type(None))
    known = {name: value for name, value in vars(module).items() if isinstance(value, simple)}
    return {name: value for name, value in known.items() if not name.startswith("_") and name not in _LOOSE}


def _vocabularies(one: nn.Module, other: nn.Module) -> str | None:
    """The first token that has another id in the second model's tokenizer; None where there are none, or no files."""
    a, b = _beside(one, "tokenizer.json"), _beside(other, "tokenizer.json")
    if a is None or b is None or filecmp.cmp(a, b, shallow=False):
        return None
    ids = [_ids(read_json(path, limit=TOKENIZER_BYTES)) for path in (a, b)]
    return next((token for token in (*ids[0], *ids[1]) if ids[0].get(token) != ids[1].get(token)), None)


def _ids(body: Mapping[str, Any]) -> dict[str, object]:
    """Token -> id, of any kind of tokenizer.json."""
    model = body.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    pieces = vocab if isinstance(vocab, list) else []
    found: dict[str, object] = {str(piece[0]): index for index, piece in enumerate(pieces) if piece}
    found |= vocab if isinstance(vocab, dict) else {}
    added = [token for token in body.get("added_tokens") or [] if isinstance(token, dict)]
    return found | {str(token.get("content")): token.get("id") for token in added}


def _texts(one: nn.Module, other: nn.Module) -> list[str]:
    """What of a tokenizer with the same vocabulary differs: how it cuts texts, and how it writes a conversation."""
    found = list[str]()
    a, b = _beside(one, "tokenizer.json"), _beside(other, "tokenizer.json")
    if a is not None and b is not None and not filecmp.cmp(a, b, shallow=False):
        found.append("the tokenizer, but for its vocabulary,")
    if _template(one) != _template(other):
        found.append("the chat template")
    return found


def _template(model: nn.Module) -> str | None:
    if (file := _beside(model, "chat_template.jinja")) is not None:
        return file.read_text(encoding="utf-8", errors="replace")
    if (file := _beside(model, "tokenizer_config.json")) is not None:
        return json.dumps(read_json(file).get("chat_template"))
    return None


def _beside(model: nn.Module, name: str) -> Path | None:
    """The file of this name in the folder that a model was read from."""
    place = model.origin if isinstance(model, LM) else getattr(model, "name_or_path", None)
    if not isinstance(place, str | Path) or not str(place):
        return None
    files = (Path(place) / name, Path(place).parent / name) if isinstance(model, LM) else (Path(place) / name,)
    return next((file for file in files if file.is_file()), None)
