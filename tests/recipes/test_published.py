"""Models with the tokenizers of published families: measured as transformers would, trained on, given back."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import hf_folders as folders
import published
import pytest
import torch

from turnout.cli.main import main
from turnout.models import LMConfig, checkpoint
from turnout.recipes.calibration import calibration
from turnout.recipes.convert import convert
from turnout.recipes.execute import execute
from turnout.recipes.inspect import evaluate_run
from turnout.recipes.run import Run
from turnout.recipes.sample import Sampling, sample_model
from turnout.recipes.tune import tune
from turnout.train.data import TokenSet
from turnout.train.data.tokenizer import byte_lengths, load_tokenizer, opening_ids

KINDS = {"llama2": "llama", "mistral": "mistral", "phi3": "phi3", "gemma": "gemma", "llama3": "llama"}
EVEN = "the cat, it's 7 déjà vu  and\n\tmore: 例え 🙂 "
FEW = ["steps=4", "warmup=1", "batch=4", "seq=48", "eval_every=2", "checkpoint_every=2", "eval_tokens=null"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for n in range(30):
        (folder / f"{n}.txt").write_text(f"{n}: {EVEN * 3}")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    keys: dict[str, Any] = {"head_dim": 8} if request.param == "gemma" else {}
    folder = tmp_path_factory.mktemp("models") / request.param
    folders.make(folder, KINDS[request.param], vocab_size=published.VOCAB, max_position_embeddings=256, **keys)
    published.write(folder, request.param)
    return request.param, folder


def opened(folder: Path, style: str, text: str) -> torch.Tensor:
    """What stock transformers reads of a text; behind the separator where it puts nothing before it."""
    stock = folders.transformers().AutoTokenizer.from_pretrained(folder)
    ids = stock(text)["input_ids"]
    if published.STYLES[style][2] is None:
        ids = [stock.convert_tokens_to_ids("<|endoftext|>"), *ids]
    return torch.tensor([ids])


@torch.no_grad()
def bits(model: Any, id_BS: torch.Tensor) -> float:
    logits_SV = model(id_BS).logits[0].double()
    nats = torch.nn.functional.cross_entropy(logits_SV[:-1], id_BS[0, 1:], reduction="sum")
    return float(nats) / math.log(2)


def test_eval_is_what_transformers_computes_of_a_whole_document(base, tmp_path):
    style, folder = base
    (tmp_path / "one.txt").write_text(EVEN * 3)
    model = folders.transformers().AutoModelForCausalLM.from_pretrained(folder).eval()
    id_BS = opened(folder, style, EVEN * 3)
    found = evaluate_run(folder, domains={"one": (str(tmp_path / "one.txt"),)})
    assert (found["tokens"], found["bytes"]) == (id_BS.shape[1] - 1, len((EVEN * 3).encode()))
    assert found["bits_per_byte"] == pytest.approx(bits(model, id_BS) / len((EVEN * 3).encode()), rel=1e-6)


def test_what_opens_a_document_is_seen_and_not_predicted(base, tmp_path):
    style, folder = base
    texts = ["the cat ", "a dog: 7 ", "例え"]
    for number, one in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(one)
    model = folders.transformers().AutoModelForCausalLM.from_pretrained(folder).eval()
    documents = [opened(folder, style, one) for one in texts]
    id_BS = torch.cat(documents, 1)
    starts = [0, *itertools.accumulate(ids.shape[1] for ids in documents[:-1])]
    with torch.no_grad():
        nats_S = -model(id_BS).logits[0].double().log_softmax(-1)[:-1].gather(1, id_BS[0, 1:, None])[:, 0]
    counted_S = torch.tensor([place not in starts for place in range(1, id_BS.shape[1])])
    found = evaluate_run(folder, domains={"all": (str(tmp_path),)})
    size = sum(len(one.encode()) for one in texts)
    assert (found["tokens"], found["bytes"]) == (int(counted_S.sum()), size)
    assert found["bits_per_byte"] == pytest.approx(float(nats_S[counted_S].sum()) / math.log(2) / size, rel=1e-6)


def test_trained_on_measured_and_given_back(base, text, tmp_path):
    style, folder = base
    run = tune(folder).with_domains({"text": (str(text),)}).override([*FEW, "seq=256"])
    execute(run, tmp_path / "x", quiet=True)
    tokens = TokenSet.open(tmp_path / "x" / "tokens")
    model = folders.transformers().AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = tokens.held_out.document_N.tolist()
    documents = [tokens.held_out.token_T[a:b].tolist() for a, b in itertools.pairwise(rows)]
    texts = [tokens.tokenizer.decode(ids[1:], skip_special_tokens=False) for ids in documents]
    stock = [opened(folder, style, text) for text in texts]
    assert [ids.tolist()[0] for ids in stock] == documents
    want = sum(bits(model, ids) for ids in stock) / sum(len(text.encode()) for text in texts)
    lines = [json.loads(line) for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["kind"] == "eval")
    assert first["bits_per_byte"] == pytest.approx(want, rel=1e-6)
    like = evaluate_run(folder, domains={}, like=tmp_path / "x")
    assert like["bits_per_byte"] == pytest.approx(want, rel=1e-6)

    convert(tmp_path / "x", [], tmp_path / "out", as_format="transformers")
    library = folders.transformers()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    given = library.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    said = library.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = torch.tensor([said("7: the cat")["input_ids"]])
    mask = torch.ones_like(prompt)
    made = given.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    trained = checkpoint.load(tmp_path / "x" / "model")
    assert torch.equal(made, trained.generate(prompt, tokens=5, temperature=0))
    # What a run has trained is opened as its documents were; where a tokenizer has no BOS, transformers opens nothing.
    plain = tokens.tokenizer.encode("7: the cat", add_special_tokens=False).ids
    as_trained = trained.generate(torch.tensor([[*opening_ids(tokens.tokenizer), *plain]]), tokens=5, temperature=0)
    for place, ids in ((tmp_path / "x", as_trained), (tmp_path / "out", made)):
        (sampled,) = sample_model(place, ["7: the cat"], Sampling(tokens=5, temperature=0.0, eos=False))
        assert sampled == said.decode(ids[0], skip_special_tokens=True)
    assert main(["eval", str(tmp_path / "x"), "--data", str(text)]) == 0
    assert Run.open(tmp_path / "x").start is not None


def test_calibration_opens_each_document_and_counts_its_bytes(base, text):
    style, folder = base
    found = calibration(text, folder, vocab_size=published.VOCAB, max_seq=4096, tokens=10**5)
    documents = [opened(folder, style, file.read_text())[0] for file in sorted(text.iterdir())]
    ids = torch.cat([batch.flatten() for batch in (*found.batches, *found.held_out)])
    assert torch.equal(ids, torch.cat(documents)[: len(ids)])
    length_V = torch.from_numpy(byte_lengths(load_tokenizer(folder)))
    rows = torch.cat(found.held_out)
    size = int(length_V.clamp(min=0)[rows[:, 1:]].sum() + length_V.clamp(max=0)[rows[:, :-1]].sum())
    inside = 3 * len(rows) if style == "llama3" else 0  # characters that lie in two rows: counted with the first
    assert abs(found.held_out_bytes - size) <= inside


def test_a_page_shows_the_spaces(text, tmp_path):
    folder = folders.make(
        tmp_path / "m", "mixtral", vocab_size=published.VOCAB, num_local_experts=4, num_experts_per_tok=2
    )
    published.write(folder, "llama2")
    execute(tune(folder).with_domains({"text": (str(text),)}).override(FEW), tmp_path / "x", quiet=True)
    shown = (tmp_path / "x" / "routes.json").read_text()
    assert " the" in shown or '" t' in shown
    assert isinstance(checkpoint.load(tmp_path / "x" / "model").config, LMConfig)
