import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from turnout.errors import CheckpointError, ShapeError, StorageError, UnknownNameError, UsageError
from turnout.storage import sealed
from turnout.types import Routing, Trace, TraceWriter

EXPERTS = (4, 6)
DOMAINS = ("code", "prose", "empty")


def routing(num_tokens: int, num_experts: int, generator: torch.Generator) -> Routing:
    """Any pattern: rows with none, one or several entries."""
    weight_TE = torch.rand(num_tokens, num_experts, generator=generator)
    return Routing.from_dense(weight_TE * (torch.rand(weight_TE.shape, generator=generator) < 0.4))


def record(folder: Path, seed: int = 0, **options) -> tuple[Trace, list[torch.Tensor], list[tuple[int, int]]]:
    """A trace of a few batches of documents; beside it the dense matrices and the documents (tokens, domain)."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dense_L, documents = [[] for _ in EXPERTS], []
    with TraceWriter(folder, num_experts_L=EXPERTS, domains=DOMAINS, **options) as writer:
        for _ in range(chance.randint(1, 4)):
            batch = [(chance.randint(0, 7), chance.randint(0, 1)) for _ in range(chance.randint(1, 3))]
            count = sum(tokens for tokens, _ in batch)
            layers = [routing(count, experts, generator) for experts in EXPERTS]
            ids = torch.randint(0, 60_000, (count,), generator=generator) if options.get("token_ids") else None
            writer.add(
                layers,
                document_tokens=[tokens for tokens, _ in batch],
                document_domains=[domain for _, domain in batch],
                token_id_T=ids,
            )
            documents += batch
            for dense, layer in zip(dense_L, layers, strict=True):
                dense.append(layer.dense())
    return Trace.open(folder), [torch.cat(dense) for dense in dense_L], documents


@pytest.mark.parametrize("seed", range(12))
def test_what_is_read_is_what_was_recorded(seed, tmp_path):
    trace, dense_L, documents = record(tmp_path / "t", seed, context={"model": "tiny"}, layers=["2", "5"])
    count = sum(tokens for tokens, _ in documents)
    assert (trace.num_tokens, trace.num_documents, trace.num_layers) == (count, len(documents), 2)
    assert trace.num_experts_L == EXPERTS and trace.layers == ("2", "5") and trace.domains == DOMAINS
    assert trace.context == {"model": "tiny"} and trace.has_token_ids is False
    for layer, dense_TE in enumerate(dense_L):
        assert torch.equal(trace.routing(layer).validate().dense(), dense_TE), f"seed {seed}"
    found = [(end - first, DOMAINS.index(name)) for first, end, name in trace.documents()]
    assert found == documents and int(trace.document_N[-1]) == count


@pytest.mark.parametrize("seed", range(12))
def test_any_part_can_be_read_alone(seed, tmp_path):
    trace, dense_L, _ = record(tmp_path / "t", seed)
    chance = random.Random(seed)
    for _ in range(5):
        stop = chance.randint(0, trace.num_tokens)
        start = chance.randint(0, stop)
        for layer in (0, 1):
            part = trace.routing(layer, start, stop).validate()
            assert torch.equal(part.dense(), dense_L[layer][start:stop]), f"seed {seed}: {start}..{stop}"
    for start, stop in ((-1, 0), (1, 0), (0, trace.num_tokens + 1)):
        with pytest.raises(ShapeError, match="start and stop"):
            trace.routing(0, start, stop)


@pytest.mark.parametrize("seed", range(12))
def test_loads_by_domain(seed, tmp_path):
    trace, dense_L, documents = record(tmp_path / "t", seed)
    domain_T = torch.tensor([domain for tokens, domain in documents for _ in range(tokens)], dtype=torch.long)
    for layer, dense_TE in enumerate(dense_L):
        assert torch.equal(trace.load(layer), (dense_TE != 0).sum(0))
        for number, name in enumerate(DOMAINS):
            expected_E = (dense_TE[domain_T == number] != 0).sum(0)
            assert torch.equal(trace.load(layer, domain=name), expected_E), f"seed {seed}: {name}"
    with pytest.raises(UnknownNameError, match="Did you mean 'prose'"):
        trace.load(0, domain="pros")


def test_affinity_between_layers_survives(tmp_path):
    trace, dense_L, _ = record(tmp_path / "t", 3)
    first, second = (Routing.from_dense(dense_TE) for dense_TE in dense_L)
    assert torch.equal(trace.routing(0).affinity(trace.routing(1)), first.affinity(second))


def test_token_ids_are_absent_unless_asked_for(tmp_path):
    trace, _, _ = record(tmp_path / "without")
    assert not (tmp_path / "without" / "token_id.bin").exists()
    assert "token_id" not in json.loads((tmp_path / "without" / "trace.json").read_text())["columns"]
    with pytest.raises(UsageError, match="token_ids=True"):
        trace.column("token_id")
    trace, dense_L, _ = record(tmp_path / "with", token_ids=True)
    assert trace.has_token_ids and len(trace.column("token_id")) == len(dense_L[0])
    generator = torch.Generator().manual_seed(1)
    for given, options in ((torch.zeros(2, dtype=torch.long), {}), (None, {"token_ids": True})):
        with (
            pytest.raises(ShapeError, match="token ids"),
            TraceWriter(tmp_path / f"x{given is None}", num_experts_L=[4], domains=["a"], **options) as writer,
        ):
            writer.add([routing(2, 4, generator)], document_tokens=[2], document_domains=[0], token_id_T=given)


def test_columns_are_mapped_and_little_endian(tmp_path):
    trace, dense_L, _ = record(tmp_path / "t", 5)
    types = {"start": "<i8", "expert": "<u2", "weight": "<f4"}
    for name, dtype in types.items():
        column = trace.column(name, 1)
        assert isinstance(column, np.memmap) and column.dtype == np.dtype(dtype) and not column.flags.writeable
    assert len(trace.column("start", 1)) == trace.num_tokens + 1
    assert len(trace.column("weight", 1)) == int((dense_L[1] != 0).sum())
    for name, layer in (("weight", None), ("document", 0), ("weight", 2), ("weight", -1), ("other", None)):
        with pytest.raises(UsageError, match="the column"):
            trace.column(name, layer)


def test_an_empty_trace(tmp_path):
    with TraceWriter(tmp_path / "t", num_experts_L=[3], domains=["a"]):
        pass
    trace = Trace.open(tmp_path / "t")
    assert trace.num_tokens == 0 and list(trace.documents()) == []
    assert trace.routing(0).validate().load_E.tolist() == trace.load(0, domain="a").tolist() == [0, 0, 0]


def test_weights_of_low_precision_and_with_gradient(tmp_path):
    weight = torch.tensor([[0.5], [0.25]], dtype=torch.bfloat16).requires_grad_()
    with TraceWriter(tmp_path / "t", num_experts_L=[2], domains=["a"]) as writer:
        layer = Routing.from_topk(torch.tensor([[1], [0]]), weight, num_experts=2)
        writer.add([layer], document_tokens=[2], document_domains=[0])
    assert Trace.open(tmp_path / "t").column("weight", 0).tolist() == [0.5, 0.25]


def test_a_half_written_folder_is_no_trace(tmp_path):
    generator = torch.Generator().manual_seed(0)
    with (
        pytest.raises(ZeroDivisionError),
        TraceWriter(tmp_path / "t", num_experts_L=[4], domains=["a"]) as writer,
    ):
        writer.add([routing(3, 4, generator)], document_tokens=[3], document_domains=[0])
        raise ZeroDivisionError
    assert list((tmp_path / "t").iterdir())
    with pytest.raises(CheckpointError, match="never finished"):
        Trace.open(tmp_path / "t")
    # It may be recorded again in the same place.
    record(tmp_path / "t")


@pytest.mark.parametrize("name", ["document.bin", "domain.bin", "start.001.bin", "expert.000.bin", "weight.001.bin"])
def test_a_truncated_or_missing_column_is_refused(name, tmp_path):
    record(tmp_path / "t", 5)
    path = tmp_path / "t" / name
    data = path.read_bytes()
    for broken in (data[:-1], data[: len(data) // 2], data + b"\x00", None):
        path.unlink(missing_ok=True)
        if broken is not None:
            path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=name):
            Trace.open(tmp_path / "t")


def test_a_folder_that_is_none_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"turnout\.trace/2"):
            Trace.open(path)


def forge(folder: Path, **changes) -> None:
    head = json.loads((folder / "trace.json").read_text())
    head |= changes
    head = {name: value for name, value in head.items() if value is not ... and name != "sha256"}
    (folder / "trace.json").write_text(json.dumps(sealed(head)))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": "turnout.trace/2"}', '{"format": "turnout.trace/1"}'])
def test_a_broken_head_is_refused(text, tmp_path):
    record(tmp_path / "t")
    (tmp_path / "t" / "trace.json").write_text(text)
    with pytest.raises(CheckpointError, match="the trace"):
        Trace.open(tmp_path / "t")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_tokens": 10**9},
        {"num_documents": 1000},
        {"num_experts_L": [4, 6, 8]},
        {"layers": ["0"]},
        {"columns": {}},
        {"has_token_ids": True},
        {"num_tokens": "many"},
        {"domains": 3},
    ],
)
def test_a_head_that_does_not_fit_its_columns_is_refused(changes, tmp_path):
    record(tmp_path / "t", 5)
    forge(tmp_path / "t", **changes)
    with pytest.raises(CheckpointError, match="the trace"):
        Trace.open(tmp_path / "t")


def test_a_finished_trace_is_not_overwritten(tmp_path):
    record(tmp_path / "t")
    with pytest.raises(UsageError, match="not hold a trace yet"):
        TraceWriter(tmp_path / "t", num_experts_L=[2], domains=["a"])


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts_L": [0], "domains": ["a"]},
        {"num_experts_L": [65_537], "domains": ["a"]},
        {"num_experts_L": [2, 2], "domains": ["a"], "layers": ["one"]},
    ],
)
def test_sizes_out_of_range_are_refused(options, tmp_path):
    with pytest.raises(UsageError, match="num_experts_L"):
        TraceWriter(tmp_path / "t", **options)


@pytest.mark.parametrize(
    "change",
    [
        {"routing_L": lambda g: []},
        {"routing_L": lambda g: [routing(3, 5, g)]},
        {"routing_L": lambda g: [routing(4, 4, g)]},
        {"routing_L": lambda g: [routing(3, 4, g), routing(3, 4, g)]},
        {"document_tokens": [2]},
        {"document_tokens": [2, 1]},
        {"document_tokens": [4, -1], "document_domains": [0, 0]},
        {"document_domains": [1]},
        {"document_domains": [-1]},
    ],
)
def test_documents_that_do_not_fit_are_refused(change, tmp_path):
    generator = torch.Generator().manual_seed(0)
    right = {"routing_L": lambda g: [routing(3, 4, g)], "document_tokens": [3], "document_domains": [0]}
    given = right | change
    with TraceWriter(tmp_path / "t", num_experts_L=[4], domains=["a"]) as writer:
        with pytest.raises(ShapeError, match="the documents"):
            writer.add(given.pop("routing_L")(generator), **given)
        writer.add(right.pop("routing_L")(generator), **right)
    assert Trace.open(tmp_path / "t").num_tokens == 3, "a refused document leaves nothing behind"


def test_adding_needs_an_open_writer(tmp_path):
    writer = TraceWriter(tmp_path / "t", num_experts_L=[4], domains=["a"])
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(UsageError, match="with"):
        writer.add([routing(3, 4, generator)], document_tokens=[3], document_domains=[0])


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(StorageError, match="file"),
        TraceWriter(tmp_path / "file" / "t", num_experts_L=[4], domains=["a"]),
    ):
        pass


def test_a_full_disk_is_named_and_leaves_no_trace(tmp_path):
    resource = pytest.importorskip("resource")
    generator = torch.Generator().manual_seed(0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        pytest.raises(StorageError, match="too large"),
        TraceWriter(tmp_path / "t", num_experts_L=[4], domains=["a"]) as writer,
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            for _ in range(200):
                writer.add([routing(1000, 4, generator)], document_tokens=[1000], document_domains=[0])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "t" / "trace.json").exists()
