"""Train a model on: what it begins with, what may be set, what is kept, and how it goes on after whatever stops it."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_folders as folders
import pytest
import torch
from test_stock import ALONE, DENSE, ROUTED
from tokenizers.processors import TemplateProcessing

from turnout.cli.main import main
from turnout.errors import CheckpointError, DataError, Interrupted, UsageError
from turnout.models import LM, LMConfig, checkpoint
from turnout.models.config import MoEConfig
from turnout.recipes import execute as executing
from turnout.recipes import tiny_dense
from turnout.recipes.convert import convert
from turnout.recipes.execute import execute
from turnout.recipes.inspect import evaluate_run
from turnout.recipes.models import evaluate_model, trained_here
from turnout.recipes.run import Run
from turnout.recipes.sample import Sampling, sample_model
from turnout.recipes.size import least_bytes
from turnout.recipes.steps import Drop, Upcycle
from turnout.recipes.tune import tune
from turnout.train.data import TokenSet, load_tokenizer, train_tokenizer, windows
from turnout.train.data.tokenizer import separator_id
from turnout.train.state import find
from turnout.train.step import adamw

KINDS = ROUTED | {name: keys for name, (keys, _) in (DENSE | ALONE).items()}
FIRST = ("llama", "mixtral", "phi3", "deepseek_v3", "gpt2")
FAMILIES = [pytest.param(kind, marks=[] if kind in FIRST else [pytest.mark.slow]) for kind in KINDS]
FEW = ["steps=4", "warmup=1", "batch=4", "seq=32", "eval_every=2", "checkpoint_every=2", "log_every=1"]
SMALL = (
    "width=16 layers=2 heads=2 kv_heads=1 model.hidden=24 vocab_size=300 max_seq=64 seq=32 batch=4 steps=4 warmup=1 "
    "eval_every=2 checkpoint_every=2 log_every=1 eval_tokens=null"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for n in range(40):
        (folder / f"{n}.txt").write_text(f"document {n}: " + " ".join(str(n * k) for k in range(60)))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = folders.make(tmp_path_factory.mktemp("models") / "llama", "llama")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return folders.make(tmp_path_factory.mktemp("models") / "mixtral", "mixtral", torch.bfloat16, **keys)


@pytest.fixture(scope="module")
def own(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ours."""
    out = tmp_path_factory.mktemp("runs") / "own"
    execute(tiny_dense().with_domains({"text": (str(text),)}).override(SMALL), out, quiet=True)
    return out


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def planned(model: Path, text: Path, *more: str, only: Any = "all") -> Run:
    return tune(model, only=only).with_domains({"text": (str(text),)}).override([*FEW, "eval_tokens=null", *more])


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint.load(folder).state_dict())


# ---- what it begins with


@pytest.mark.parametrize("base", ["llama", "mixtral", "own"])
@pytest.mark.parametrize("limit", [None, 300])
def test_the_first_evaluation_is_what_eval_says_of_the_base(base, limit, text, tmp_path, request):
    model = request.getfixturevalue(base)
    execute(planned(model, text, f"eval_tokens={json.dumps(limit)}"), tmp_path / "x", quiet=True)
    first = lines(tmp_path / "x", "eval")[0]
    said = evaluate_run(model, domains={}, like=tmp_path / "x", limit=limit)
    assert first["step"] == 0
    assert first["bits_per_byte"] == pytest.approx(said["bits_per_byte"], rel=1e-7)
    assert (first["predicted"], first["bytes"]) == (said["tokens"], said["bytes"])
    done = executing.read_run(tmp_path / "x")
    last = done.after if limit else done.result
    assert done.before["bits_per_byte"] == first["bits_per_byte"] > last["bits_per_byte"]
    assert "before the first step" in executing.results_table([done])


def test_it_begins_where_the_run_before_it_ended(own, text, tmp_path):
    run = planned(own, text)
    execute(dataclasses.replace(run, data=Run.open(own).data), tmp_path / "x", quiet=True)
    ended = json.loads((own / "result.json").read_text())
    assert lines(tmp_path / "x", "eval")[0]["bits_per_byte"] == pytest.approx(ended["bits_per_byte"], rel=1e-7)


def test_the_first_evaluation_is_what_transformers_computes(llama, text, tmp_path):
    execute(planned(llama, text), tmp_path / "x", quiet=True)
    tokens = TokenSet.open(tmp_path / "x" / "tokens")
    model = folders.transformers().AutoModelForCausalLM.from_pretrained(llama).eval()
    nats = size = 0.0
    for batch in windows(tokens.held_out, batch=4, seq=32, limit=None):
        with torch.no_grad():
            logits = model(batch.id_BS).logits.double()
        nats += float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.target_BS.flatten(), reduction="sum")
        )
        size += int(torch.as_tensor(tokens.byte_length_V)[batch.target_BS[batch.target_BS >= 0]].sum())
    assert lines(tmp_path / "x", "eval")[0]["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_trained_and_given_back(kind, text, tmp_path, quiet):
    base = folders.make(tmp_path / "base", kind.split()[0], **KINDS[kind])
    run = planned(base, text, "steps=1", "warmup=0", "lr=1e-2", "min_lr=1e-2")
    run.save(tmp_path / "run.json")
    assert Run.open(tmp_path) == run
    execute(run, tmp_path / "x", quiet=True)
    moved = [name for name, a in weights(tmp_path / "x" / "model").items() if not torch.equal(a, _base(base)[name])]
    assert moved, "one step moves something"
    convert(tmp_path / "x", [], tmp_path / "out", as_format="transformers")
    ours = checkpoint.load(tmp_path / "x" / "model")
    id_BS = torch.randint(300, (3, 40), generator=torch.Generator().manual_seed(5))
    assert torch.allclose(ours(id_BS).logits_BSV, folders.logits(tmp_path / "out"), atol=1e-4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == kind.split()[0]


def _base(folder: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint.from_hf(folder, dtype=torch.float32).state_dict())


def test_small_files_go_along_and_stock_generate_works(llama, text, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    execute(planned(base, text), tmp_path / "x", quiet=True)
    shutil.rmtree(base)
    convert(tmp_path / "x", [], tmp_path / "out", as_format="transformers")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (llama / name).read_bytes(), name
    library = folders.transformers()
    model = library.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = library.AutoTokenizer.from_pretrained(tmp_path / "out")
    said = tokenizer("document 3: ", return_tensors="pt", return_token_type_ids=False)
    made = model.generate(**said, max_new_tokens=5, do_sample=False)
    assert made.shape[1] == said["input_ids"].shape[1] + 5
    assert torch.equal(
        made, checkpoint.load(tmp_path / "x" / "model").generate(said["input_ids"], tokens=5, temperature=0)
    )


def test_upcycled_trained_on_and_given_back(own, text, tmp_path):
    convert(own, [Upcycle(4, 2)], tmp_path / "sparse")
    run = planned(tmp_path / "sparse", text, "steps=6")
    assert run.model.moe is not None and run.train.aux_weight > 0
    execute(dataclasses.replace(run, data=Run.open(own).data), tmp_path / "x", quiet=True)
    first = lines(tmp_path / "x", "eval")[0]["bits_per_byte"]
    assert first == pytest.approx(json.loads((own / "result.json").read_text())["bits_per_byte"], rel=1e-5)
    convert(tmp_path / "x", [], tmp_path / "out", as_format="transformers")
    assert folders.logits(tmp_path / "out").isfinite().all()


@pytest.mark.parametrize("base", ["own", "llama"])
def test_a_conversion_is_never_resumed_from_nothing(base, tmp_path, request, capsys):
    convert(request.getfixturevalue(base), [Upcycle(4, 2)], tmp_path / "up")
    before = (tmp_path / "up" / "run.json").read_bytes()
    assert main(["train", "--resume", "--out", str(tmp_path / "up")]) == 2
    assert "turnout train --from" in capsys.readouterr().err
    assert (tmp_path / "up" / "run.json").read_bytes() == before
    assert not (tmp_path / "up" / "checkpoints").exists()


def test_what_was_tuned_is_converted_and_tuned_again(mixtral, text, tmp_path, quiet):
    execute(planned(mixtral, text, only="router"), tmp_path / "x", quiet=True)
    convert(tmp_path / "x", [Drop(count=1, by="random")], tmp_path / "fewer")
    assert Run.open(tmp_path / "fewer").start is None, "it is another model now"
    execute(planned(tmp_path / "fewer", text, only="adapters"), tmp_path / "y", quiet=True)
    assert not (tmp_path / "y" / "adapter").exists() or json.loads(
        (tmp_path / "y" / "adapter" / "adapter_config.json").read_text()
    )["base_model_name_or_path"] == str(tmp_path / "fewer")


# ---- what is made of a model in any folder


def test_documents_begin_as_they_did_in_training(own, llama, text, tmp_path):
    moved = Path(shutil.copytree(own / "model", tmp_path / "moved"))
    convert(llama, [Upcycle(num_experts=2, top_k=1)], tmp_path / "theirs", as_format="model")
    began = planned(llama, text)
    execute(began, tmp_path / "on", quiet=True)
    assert trained_here(moved) and trained_here(own / "model") and trained_here(tmp_path / "on" / "model")
    assert not trained_here(llama) and not trained_here(tmp_path / "theirs")

    lm, tokenizer = checkpoint.load(moved), load_tokenizer(moved / "tokenizer.json")
    ids = torch.tensor([[separator_id(tokenizer), *tokenizer.encode("document 7: ").ids]])
    expected = tokenizer.decode(lm.generate(ids, tokens=12, temperature=0.0)[0].tolist(), skip_special_tokens=True)
    settings = Sampling(tokens=12, temperature=0.0, eos=False)
    for folder in (moved, own):
        assert sample_model(folder, ["document 7: "], settings) == (expected,)

    (tmp_path / "one.txt").write_text("document 7: 0 7 14 21")
    found = evaluate_model(moved, domains={"text": (str(tmp_path / "one.txt"),)})
    with_run = evaluate_run(own, domains={"text": (str(tmp_path / "one.txt"),)})
    assert (found["tokens"], found["bytes"]) == (with_run["tokens"], with_run["bytes"])
    assert found["bits_per_byte"] == pytest.approx(with_run["bits_per_byte"], rel=1e-6)


# ---- the command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume", "--out", "x"], "leave --from out: a resumed run knows what it began with"),
        (["tiny", "--out", "x"], "got the recipe tiny beside it"),
        (["width=3", "--out", "x"], "turnout convert makes another model of it first"),
        (["only=adaptors", "--out", "x"], "be all or router or adapters"),
        ([], "add --out runs/x"),
    ],
)
def test_mistakes_are_worded(arguments, words, llama, capsys):
    named = [one for one in arguments if one == "tiny"]
    rest = [one for one in arguments if one != "tiny"]
    assert main(["train", *named, "--from", str(llama), *rest]) == 2
    assert words in capsys.readouterr().err


def test_show_and_train_from_the_command_line(llama, text, tmp_path, capsys):
    assert main(["train", "--from", str(llama), "only=adapters", "--show"]) == 0
    shown = capsys.readouterr().out
    assert 'train.only="adapters"' in shown and "train.rank=8 " in shown and "start.path=" in shown
    asked = ["only=adapters", "rank=2", *FEW, "--data", str(text), "--out", str(tmp_path / "x"), "--quiet"]
    assert main(["train", "--from", str(llama), *asked]) == 0
    assert "before the first step" in capsys.readouterr().out
    assert json.loads((tmp_path / "x" / "run.json").read_text())["train"]["rank"] == 2
    assert main(["eval", str(llama), "--like", str(tmp_path / "x")]) == 0
    assert main(["eval", str(llama), "--like", str(tmp_path / "x"), "--data", str(text)]) == 2
    assert main(["sample", str(tmp_path / "x"), "--prompt", "document", "--tokens", "3"]) == 0


# ---- what may be set


@pytest.mark.parametrize(
    "field", ["width=32", "layers=1", "model.moe=null", "max_seq=8", "start.path=x", "tokenizer=y"]
)
def test_what_the_model_is_cannot_be_set(field, llama):
    with pytest.raises(UsageError, match=r"must stay .* in turnout train --from"):
        tune(llama).override([field])


def test_what_can_be_set(llama):
    run = tune(llama).scaled(["steps=50", "lr=1e-4", "min_lr=0", "held_out=0.2"])
    assert (run.train.steps, run.train.warmup, run.train.lr, run.data.held_out) == (50, 5, 1e-4, 0.2)
    assert run.train.seq == run.model.max_seq == 64
    with pytest.raises(UsageError, match=r"seq must be at most max_seq=64, which the model has.* pass seq=64\.$"):
        run.override(["seq=65"])


@pytest.mark.parametrize(
    ("kind", "only", "words"),
    [("llama", "router", "turnout convert --to moe"), (None, "adapters", "turnout train --from MODEL")],
)
def test_what_is_not_there_cannot_be_trained(kind, only, words, llama):
    run = tiny_dense() if kind is None else tune(llama)
    with pytest.raises(UsageError, match=words):
        run.override([f"only={only}", "rank=null" if only == "router" else "rank=4"])


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("only=adapters", "pass rank=8"),
        ("rank=4", "add only=adapters, or leave rank out"),
        ("alpha=2", "add only=adapters, or leave alpha out"),
    ],
)
def test_rank_and_adapters_go_together(field, words, llama):
    with pytest.raises(UsageError, match=words):
        tune(llama).override([field])


def test_a_router_that_balances_itself_gets_no_balance_loss(tmp_path, text):
    folder = folders.make(tmp_path / "v3", "deepseek_v3", **ROUTED["deepseek_v3"])
    run = planned(folder, text)
    assert run.train.aux_weight == 0
    execute(run, tmp_path / "x", quiet=True)
    before, after = _base(folder), weights(tmp_path / "x" / "model")
    biases = [name for name in before if name.endswith("bias_E")]
    assert biases and all(not torch.equal(before[name], after[name]) for name in biases), "it learns from the load"


# ---- what does not fit


def test_tokenizers_that_do_not_fit_are_refused(llama, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    (base / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json beside it in turnout train --from"):
        tune(base)
    train_tokenizer([folders.TEXT], vocab_size=400).save(str(base / "tokenizer.json"))
    with pytest.raises(UsageError, match=r"no more tokens than the 300 of the model.* that the model was trained with"):
        tune(base)
    tokenizer = train_tokenizer([folders.TEXT], vocab_size=300)
    body = json.loads(tokenizer.to_str()) | {"normalizer": {"type": "Lowercase"}}
    (base / "tokenizer.json").write_text(json.dumps(body))
    with pytest.raises(DataError, match="be lossless, byte-level or of SentencePiece's kind"):
        tune(base)


def test_tokens_of_another_tokenizer_are_refused(llama, own, text, tmp_path):
    kept = (own / "tokens" / "tokens.json").read_bytes()
    with pytest.raises(UsageError, match="made with another tokenizer"):
        execute(planned(llama, text), tmp_path / "x", tokens_folder=own / "tokens", quiet=True)
    assert (own / "tokens" / "tokens.json").read_bytes() == kept, "they belong to another run"
    assert not (tmp_path / "x" / "run.json").exists(), "nothing was begun"
    execute(planned(llama, text), tmp_path / "y", tokens_folder=tmp_path / "shared", quiet=True)
    execute(planned(llama, text, "seed=1"), tmp_path / "z", tokens_folder=tmp_path / "shared", quiet=True)
    digests = {json.loads((tmp_path / name / "run.json").read_text())["tokens_digest"] for name in "yz"}
    assert len(digests) == 1


def test_a_tokenizer_that_begins_a_text_itself_opens_documents(llama, text, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    body = train_tokenizer([folders.TEXT], vocab_size=299)
    body.add_special_tokens(["<s>"])
    body.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", body.token_to_id("<s>"))])
    body.save(str(base / "tokenizer.json"))
    execute(planned(base, text, "steps=1", "warmup=0"), tmp_path / "x", quiet=True)
    tokens = TokenSet.open(tmp_path / "x" / "tokens")
    starts = tokens.held_out.document_N[:-1]
    assert set(tokens.held_out.token_T[starts].tolist()) == {299} == {tokens.separator_id}
    assert 0 not in tokens.held_out.token_T, "no separator beside it"


def test_a_folder_without_a_model_is_refused(tmp_path):
    tmp_path.joinpath("run.json").write_text(json.dumps({"format": "turnout.adaptation/1"}))
    with pytest.raises(CheckpointError, match="attach_folder"):
        tune(tmp_path)


def test_another_model_than_the_start_is_refused(llama, text, tmp_path):
    run = planned(llama, text)
    wider = dataclasses.replace(run, model=dataclasses.replace(run.model, norm_eps=1e-3))
    with pytest.raises(UsageError, match=r"Run\.model must be that of"):
        execute(wider, tmp_path / "x", quiet=True)


# ---- going on

KILLED = """
import os, sys
from turnout.recipes.execute import execute
from turnout.recipes.run import Run
from turnout.train.step import Step
before = Step.run
def stopping(self, number, lr):
    if number == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
    before(self, number, lr)
Step.run = stopping
execute(Run.open(sys.argv[1]), sys.argv[2], quiet=True)
"""


@pytest.mark.parametrize(
    "only", ["all", *(pytest.param(one, marks=pytest.mark.slow) for one in ("adapters", "router"))]
)
def test_killed_and_resumed_without_the_base_bit_for_bit(only, mixtral, text, tmp_path, quiet):
    base = tmp_path / "base"
    shutil.copytree(mixtral, base)
    run = planned(base, text, only=only)
    run.save(tmp_path / "plan.json")
    execute(run, tmp_path / "whole", quiet=True)
    arguments = [str(tmp_path / "plan.json"), str(tmp_path / "cut"), "3"]
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False).returncode == -9
    shutil.rmtree(base)
    execute(Run.open(tmp_path / "cut"), tmp_path / "cut", resume="latest", quiet=True)
    whole, cut = (weights(tmp_path / name / "model") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    for kind, value in (("train", "loss"), ("eval", "bits_per_byte")):
        a, b = ([(line["step"], line[value]) for line in lines(tmp_path / name, kind)] for name in ("whole", "cut"))
        assert a == b
    if only == "adapters":
        files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_without_a_checkpoint_the_base_must_be_the_same(llama, text, tmp_path):
    base, out = tmp_path / "base", tmp_path / "x"
    shutil.copytree(llama, base)
    run = planned(base, text)
    run.save(tmp_path / "plan.json")
    arguments = [str(tmp_path / "plan.json"), str(out), "1"]
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False).returncode == -9
    assert not find(out / "checkpoints")
    config = (base / "config.json").read_text()
    for problem, change in (
        ("other bytes", lambda: (base / "config.json").write_text(config + "\n")),
        ("does not exist", lambda: shutil.rmtree(base)),
    ):
        change()
        with pytest.raises(CheckpointError, match=f"has no checkpoint yet.*{problem}"):
            execute(Run.open(out), out, resume="latest", quiet=True)
    shutil.copytree(llama, base)
    execute(Run.open(out), out, resume="latest", quiet=True)
    assert [line["step"] for line in lines(out, "eval")] == [0, 2, 4], "the first evaluation is not done twice"


def test_what_is_trained_stays_when_a_run_goes_on(mixtral, text, tmp_path, monkeypatch, quiet):
    out = tmp_path / "x"
    execute(planned(mixtral, text), out, quiet=True)
    run = dataclasses.replace(Run.open(out), train=dataclasses.replace(Run.open(out).train, only="router"))
    with pytest.raises(UsageError, match="only must stay 'all'"):
        execute(run, out, resume="latest", quiet=True)


@pytest.mark.parametrize("where", ["tokens_for", "train", "finish"])
def test_ctrl_c_at_any_time_says_how_to_go_on(where, llama, text, tmp_path, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(executing, where, interrupted)
        with pytest.raises(Interrupted, match=r"To go on: turnout train --resume --out "):
            execute(planned(llama, text), tmp_path / "x", quiet=True)
    execute(Run.open(tmp_path / "x"), tmp_path / "x", resume="latest", quiet=True)
    assert (tmp_path / "x" / "result.json").exists()


# ---- what is trained


def test_only_the_router_is_trained(mixtral, text, tmp_path, quiet):
    execute(planned(mixtral, text, "lr=0.1", only="router"), tmp_path / "x", quiet=True)
    before, after = _base(mixtral), weights(tmp_path / "x" / "model")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"blocks.{layer}.ff.router.weight" for layer in range(2)}
    state = find(tmp_path / "x" / "checkpoints")[-1] / "optimizer.safetensors"
    assert state.stat().st_size < 3 * sum(after[name].numel() * 4 for name in moved) + 2000


@pytest.mark.parametrize("kind", FAMILIES)
def test_only_adapters_are_trained_and_peft_loads_them(kind, text, tmp_path, quiet, capsys):
    peft = pytest.importorskip("peft")
    base = folders.make(tmp_path / "base", kind.split()[0], **KINDS[kind])
    execute(planned(base, text, "lr=0.05", "rank=3", only="adapters"), tmp_path / "x")
    said = capsys.readouterr().err
    from safetensors.torch import load_file

    saved = load_file(find(tmp_path / "x" / "checkpoints")[-1] / "model.safetensors")
    before = _base(base)
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items() if name in saved), "the base stays"
    if kind == "gpt2":  # whose folder stores (in, out)
        assert not (tmp_path / "x" / "adapter").exists() and "GPT2LMHeadModel stores otherwise" in said
        return
    assert "folded in" not in said
    model = folders.transformers().AutoModelForCausalLM.from_pretrained(base)
    id_BS = torch.randint(300, (3, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        plain = model(id_BS).logits
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "x" / "adapter").eval()(id_BS).logits
        ours = checkpoint.load(tmp_path / "x" / "model")(id_BS).logits_BSV
    assert (theirs - plain).abs().max() > 1e-2, "they do something"
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_what_is_frozen_takes_no_memory_for_training(mixtral):
    every, router, adapters = (least_bytes(tune(mixtral, only=only)) for only in ("all", "router", "adapters"))
    assert adapters < router < every


CONFIGS = {
    "placed": LMConfig(vocab_size=30, width=8, layers=1, heads=2, max_seq=16, learned_positions=True),
    "tied": LMConfig(vocab_size=30, width=8, layers=1, heads=2, tie_embeddings=True),
    "biased": LMConfig(
        vocab_size=30, width=8, layers=1, heads=2, qkv_bias=True, out_bias=True, ff_bias=True, sinks=True
    ),
    "sparse": LMConfig(
        vocab_size=30,
        width=8,
        layers=1,
        heads=2,
        qk_norm="head",
        moe=MoEConfig(4, 2, 8, router="GroupLimited", bias=True, shared_hidden=8),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("embeddings", [True, False])
def test_matrices_decay_and_nothing_else(name, embeddings):
    lm = LM(CONFIGS[name])
    names = {id(p): n for n, p in lm.named_parameters()}
    optimizer = adamw(lm, weight_decay=0.1, betas=(0.9, 0.95), embeddings=embeddings)
    decays = {names[id(p)]: group["weight_decay"] > 0 for group in optimizer.param_groups for p in group["params"]}
    assert set(decays) == set(names.values()), "every parameter once"
    for one, does in decays.items():
        vector = any(word in one for word in ("norm", "bias", "sinks"))
        assert does == (not vector and (embeddings or one not in ("embedding", "positions"))), one
    assert not any("bias_E" in one for one in decays), "biases of routers are buffers, which no optimizer sees"
