"""The folders that are harmed, made small, and what is read from each: everything that the folder stands for."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from turnout.errors import CheckpointError
from turnout.measure import ReportData, RunData
from turnout.measure.passage import Passage
from turnout.measure.runs import read_run
from turnout.models import LM, LMConfig, MoEConfig, checkpoint
from turnout.models.checkpoint import PeftAdapter, read_adapter, write_adapter
from turnout.models.checkpoint.peft import write_gates
from turnout.models.config import MLAConfig
from turnout.recipes import tiny
from turnout.recipes.convert import convert
from turnout.recipes.run import Run
from turnout.recipes.steps import Drop, Merge
from turnout.reshape import attach, attach_folder, attach_shards, load_shards, save_attached, save_shards
from turnout.show import ConversionData, conversion_html, report_html
from turnout.train import state
from turnout.train.data import Document, TokenSet, prepare
from turnout.train.data.tokenizer import check_tokenizer, load_tokenizer
from turnout.types import Routing, Trace, TraceWriter


@dataclasses.dataclass(frozen=True)
class Subject:
    """A kind of folder.

    Args:
        make: writes a sound one.
        read: everything that it stands for, as a value whose repr is compared.
        hashed: whether hashes tell every change of it.
    """

    make: Callable[[Path], None]
    read: Callable[[Path, Path], Any]
    hashed: bool = False


def _tensors(named: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + bytes(data.tolist()))
    return total.hexdigest()


def _lm(router: str = "TopK", **options: Any) -> LM:
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=4, top_k=2, hidden=8, router=router, **options)
    return LM(LMConfig(vocab_size=32, width=16, layers=2, heads=2, kv_heads=1, hidden=24, moe=moe, max_seq=64))


def _own(path: Path) -> None:
    checkpoint.save(path, _lm())


def _read_own(path: Path, out: Path) -> Any:
    checkpoint.peek(path)
    lm = checkpoint.load(path)
    return lm.config, _tensors(dict(lm.state_dict()))


def _mixtral(path: Path) -> None:
    checkpoint.to_hf(_lm(router_options={"renormalize": True}), path, shard_bytes=8_000)


def _deepseek(path: Path) -> None:
    torch.manual_seed(0)
    options = {"num_groups": 2, "top_groups": 1, "scale": 1.5}
    moe = MoEConfig(4, 2, 8, router="GroupLimited", router_options=options, shared_hidden=8, layers=(1,))
    mla = MLAConfig(kv_rank=8, rope_dim=4, nope_dim=4, v_dim=8, q_rank=8)
    checkpoint.to_hf(LM(LMConfig(32, 16, 2, 2, hidden=24, attention="mla", mla=mla, moe=moe, max_seq=64)), path)


def _dense(path: Path) -> None:
    torch.manual_seed(0)
    scaling = {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 32}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    checkpoint.to_hf(LM(LMConfig(32, 16, 2, 2, kv_heads=1, hidden=24, rope_scaling=scaling, max_seq=64)), path)


def _dense_as(architecture: str, **fields: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        torch.manual_seed(0)
        lm = LM(LMConfig(32, 16, 2, 2, **{"kv_heads": 1, "hidden": 24, "max_seq": 64, **fields}))
        checkpoint.to_hf(lm, path, architecture=architecture)

    return make


_phi3 = _dense_as(
    "Phi3ForCausalLM",
    rope_share=0.5,
    window=8,
    rope_scaling={
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 8.0],
        "original_max_position_embeddings": 32,
        "attention_factor": 1.2,
    },
)
_smollm3 = _dense_as("SmolLM3ForCausalLM", rope_layers=(0,), window=8, window_layers=(1,))
_granite = _dense_as("GraniteForCausalLM", embedding_scale=2.0, residual_scale=0.5, logit_divisor=3.0)
_olmo2 = _dense_as("Olmo2ForCausalLM", norm_place="after", qk_norm="full")
_gemma = _dense_as(
    "Gemma3ForCausalLM",
    window=8,
    window_layers=(0,),
    activation="geglu_tanh",
    norm="rms_plus_one",
    norm_place="both",
    qk_norm="head",
    embedding_scale=4.0,
    embedding_rounded=True,
    tie_embeddings=True,
    local_rope_theta=1e3,
    logit_softcap=5.0,
)
_gpt2 = _dense_as(
    "GPT2LMHeadModel",
    kv_heads=None,
    qkv_bias=True,
    out_bias=True,
    ff_bias=True,
    activation="gelu_tanh",
    rope_layers=(),
    learned_positions=True,
    norm="layer",
)


def _read_hf(path: Path, out: Path) -> Any:
    checkpoint.peek(path)
    lm = checkpoint.from_hf(path)
    lm(torch.arange(8)[None])
    checkpoint.to_hf(lm, out / "hf")
    # What it computes, told apart from what it starts from when it is made anew.
    config = dataclasses.replace(lm.config, init_std=0.02).to_json_dict()
    return json.dumps(config, sort_keys=True), _tensors(dict(lm.state_dict()))


def _linears() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(8, 12), "b": nn.Linear(12, 8)})


def _peft(name: str) -> PeftAdapter:
    g = torch.Generator().manual_seed(len(name))
    sizes = {"a": (8, 12), "b": (12, 8)}
    return PeftAdapter(name, "base", {
        module: (torch.randn(2 + i, d, generator=g), torch.randn(o, 2 + i, generator=g), 0.5)
        for i, (module, (d, o)) in enumerate(sizes.items())
    })  # fmt: skip


def _adapter(path: Path) -> None:
    write_adapter(path, _peft("one"))


def _read_adapter(path: Path, out: Path) -> Any:
    one = read_adapter(path)
    return one.base, {name: (_tensors({"a": a, "b": b}), scale) for name, (a, b, scale) in one.factor.items()}


def _gates(path: Path) -> None:
    write_adapter(path, _peft("one"))
    write_gates(path, {"a": torch.linspace(0, 1, 8), "b": torch.linspace(0, 1, 12)})


def _read_gates(path: Path, out: Path) -> Any:
    return _tensors(dict(read_adapter(path).gate))


def _pair() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(8, 4)}) for _ in range(2))


def _shards(path: Path) -> None:
    path.mkdir()
    model, _ = attach_shards(_pair(), ["proj"], budget=1, rank=2, shards=2, private=0)
    save_shards(path, model)


def _read_shards(path: Path, out: Path) -> Any:
    model, _ = load_shards(_pair(), path)
    return _tensors(dict(model.state_dict()))


def _state(path: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = _linears()
    optimizer = torch.optim.AdamW(model.parameters())
    model["b"](model["a"](torch.ones(1, 8))).sum().backward()
    optimizer.step()
    return model, optimizer


def _checkpoint(path: Path) -> None:
    state.save(path, 3, *_state(path), {"window": {"loss": 1.5}}, keep=1)


def _read_checkpoint(path: Path, out: Path) -> Any:
    model, optimizer = _state(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = state.choose(path, "latest")
    if found is None:
        raise CheckpointError("no checkpoint")
    body = state.load(found, model, optimizer)
    moments = {str(key): _tensors(value) for key, value in optimizer.state_dict()["state"].items()}
    return body, moments, _tensors(dict(model.state_dict()))


def _attached(path: Path) -> None:
    model, _ = attach(_linears(), [_peft("one"), _peft("other")], router="smear")
    save_attached(path, model)


def _read_attached(path: Path, out: Path) -> Any:
    model, report = attach_folder(_linears(), path)
    return report["router"], _tensors(dict(model.state_dict()))


def _tokens(path: Path) -> None:
    texts = [Document(str(n), f"text number {n}, and so on, to the {n}th") for n in range(30)]
    prepare({"notes": texts, "more": texts[:5]}, path, vocab_size=262, held_out=0.3, quiet=True)


def _read_tokens(path: Path, out: Path) -> Any:
    tokens = TokenSet.open(path)
    ids = tokens.tokenizer.encode("text number 3").ids
    sides = [
        [side.token_T.tolist(), side.document_N.tolist(), side.domain_N.tolist()]
        for side in (tokens.train, tokens.held_out)
    ]
    return sides, ids, tokens.byte_length_V.tolist(), tokens.domains, tokens.separator_id, tokens.digest, tokens.notes


def _trace(path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    with TraceWriter(path, num_experts_L=[3, 4], domains=["a", "b"], context={"seed": 1}) as writer:
        for size in (4, 7):
            index = [torch.rand(size, e, generator=g).topk(2).indices for e in (3, 4)]
            layers = [
                Routing.from_topk(i, torch.rand(size, 2, generator=g), num_experts=e)
                for i, e in zip(index, (3, 4), strict=True)
            ]
            writer.add(layers, document_tokens=[size], document_domains=[size % 2])


def _read_trace(path: Path, out: Path) -> Any:
    trace = Trace.open(path)
    loads = [
        [trace.load(layer, domain=d).tolist() for d in (None, *trace.domains)] for layer in range(trace.num_layers)
    ]
    routings = [
        _tensors({"w": trace.routing(n).weight_R, "t": trace.routing(n).token_R}) for n in range(trace.num_layers)
    ]
    return loads, routings, list(trace.documents()), trace.layers, dict(trace.context)


def _run(path: Path) -> None:
    path.mkdir()
    tiny().save(path / "run.json", hardware={"cpu": "x"}, tokens_digest="0" * 64)
    lines = [{"kind": "train", "step": n, "loss": 3.0 / n, "tokens_per_s": 10.0 * n} for n in range(1, 5)]
    lines += [{"kind": "eval", "step": 4, "bits_per_byte": 1.5, "by_domain": {"a": 1.5}, "load": [[0.25] * 4]}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "result.json").write_text(json.dumps({"bits_per_byte": 1.5, "by_domain": {"a": 1.5}, "seconds": 2.0}))
    routing = Routing.from_topk(torch.tensor([[1], [3]]), torch.ones(2, 1), num_experts=4)
    passages = [Passage.from_routings(["x", "y"], [routing], domain=name).to_json_dict() for name in ("a", "b")]
    load = {"load": [[0.25] * 4], "load_by_domain": {"a": [[0.25] * 4], "b": [[0.5, 0.5, 0.0, 0.0]]}}
    (path / "routes.json").write_text(json.dumps(load | {"passages": passages}))
    _trace(path / "trace")


def _read_a_run(path: Path, out: Path) -> Any:
    data = read_run(path, name="run")
    report_html(ReportData("runs", (data,)))
    assert isinstance(data, RunData)
    return Run.open(path), data


def _conversion(path: Path) -> None:
    text = path.with_name("text.txt")
    text.write_text("".join(f"line {n} of the text, and so on\n" for n in range(200)))
    _tokenizer(path.with_name("big"))
    checkpoint.save(path.with_name("big"), LM(dataclasses.replace(_lm().config, vocab_size=262)))
    convert(path.with_name("big"), [Drop(count=1, by="frequency"), Merge(keep=2)], path, text=text, text_tokens=400)
    for file in path.iterdir():
        if file.name not in ("run.json", "certificate.json"):
            file.unlink()


def _read_conversion(path: Path, out: Path) -> Any:
    data = ConversionData.open(path)
    conversion_html(data)
    return data.record, data.certificate


def _tokenizer(path: Path) -> None:
    path.mkdir(exist_ok=True)
    _tokens(path / "all")
    (path / "all" / "tokenizer.json").rename(path / "tokenizer.json")
    for file in sorted((path / "all").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (path / "all").rmdir()


def _read_tokenizer(path: Path, out: Path) -> Any:
    tokenizer = load_tokenizer(path)
    check_tokenizer(tokenizer, vocab_size=400)
    return tokenizer.encode("text number 3, to the end").ids


SUBJECTS = {
    "own": Subject(_own, _read_own, hashed=True),
    "mixtral": Subject(_mixtral, _read_hf),
    "deepseek": Subject(_deepseek, _read_hf),
    "llama": Subject(_dense, _read_hf),
    "gemma": Subject(_gemma, _read_hf),
    "gpt2": Subject(_gpt2, _read_hf),
    "granite": Subject(_granite, _read_hf),
    "smollm3": Subject(_smollm3, _read_hf),
    "phi3": Subject(_phi3, _read_hf),
    "olmo2": Subject(_olmo2, _read_hf),
    "adapter": Subject(_adapter, _read_adapter),
    "attached": Subject(_attached, _read_attached),
    "gates": Subject(_gates, _read_gates),
    "shards": Subject(_shards, _read_shards, hashed=True),
    "checkpoint": Subject(_checkpoint, _read_checkpoint, hashed=True),
    "tokens": Subject(_tokens, _read_tokens, hashed=True),
    "trace": Subject(_trace, _read_trace, hashed=True),
    "run": Subject(_run, _read_a_run),
    "conversion": Subject(_conversion, _read_conversion),
    "tokenizer": Subject(_tokenizer, _read_tokenizer),
}
