"""Points of scaling laws, from run folders and tables."""

import gzip
import json

import pytest

from turnout.errors import DataError
from turnout.measure import points_of_runs, points_of_table


def run(folder, experts=0, top_k=1, *, width=32, bits=2.0, steps=100, text="ab", tied=True):
    """A finished run of which only what is read is there."""
    folder.mkdir()
    moe = {"num_experts": experts, "top_k": top_k} if experts else None
    model = {"vocab_size": 50, "width": width, "tie_embeddings": tied, "max_seq": 16, "moe": moe}
    train = {"steps": steps, "batch": 4, "seq": 16, "accumulate": 1}
    tables = 50 * width * (1 if tied else 2)
    met = 10_000 + tables
    cost = {"params": met + 5000 * max(experts - top_k, 0), "params_active": met, "flops": 25_000.0}
    (folder / "run.json").write_text(
        json.dumps({"recipe": "tiny", "model": model, "train": train, "held_out_text": text})
    )
    (folder / "result.json").write_text(json.dumps({"bits_per_byte": bits, "cost": cost}))
    return folder


def test_runs_have_their_parameters_without_tables_and_their_experts(tmp_path):
    folders = [run(tmp_path / "dense", bits=2.5), run(tmp_path / "moe", 8), run(tmp_path / "untied", 4, tied=False)]
    dense, moe, untied = points_of_runs(folders)
    assert (dense.params, dense.experts, dense.loss, dense.name) == (10_000, 1, 2.5, "dense")
    assert (moe.params, moe.experts, moe.loss) == (10_000, 8, 2.0)
    assert untied.params == 10_000


def test_by_cost_there_may_be_several_experts_a_token(tmp_path):
    (point,) = points_of_runs([run(tmp_path / "moe", 8, 2)], by="cost")
    assert (point.params, point.experts) == (25_000, (10_000 + 6 * 5000) / 10_000)
    with pytest.raises(DataError, match=r"top 2.*--by cost"):
        points_of_runs([tmp_path / "moe"])


def test_runs_that_differ_in_more_are_refused(tmp_path):
    one = run(tmp_path / "one")
    with pytest.raises(DataError, match=r"number of training tokens.*12800 in .*longer and 6400"):
        points_of_runs([one, run(tmp_path / "longer", steps=200)])
    with pytest.raises(DataError, match=r"one text.*held_out_text cd"):
        points_of_runs([one, run(tmp_path / "other", text="cd")])
    (one / "result.json").unlink()
    with pytest.raises(DataError, match=r"finished runs.*--resume --out .*one"):
        points_of_runs([one])


def test_tables_by_our_names_and_by_the_published_ones(tmp_path):
    ours = tmp_path / "a.csv"
    ours.write_text("loss, Experts ,params\n3.2,,1e6\n3.0,8,1e6\n")
    assert [(p.params, p.experts, p.loss) for p in points_of_table(ours)] == [(1e6, 1, 3.2), (1e6, 8, 3.0)]
    theirs = tmp_path / "b.csv.gz"
    with gzip.open(theirs, "wt") as file:
        file.write("router_type,dense_parameter_count,num_experts,loss_validation\nHash,5e6,4,2.9\n")
    (point,) = points_of_table(theirs)
    assert (point.params, point.experts, point.loss, point.name) == (5e6, 4, 2.9, "b.csv.gz:2")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("params,experts\n1,2\n", "column loss"),
        ("", "column params, experts, loss"),
        ("params,experts,loss\n1e6,8,\n", r"'' for loss in a\.csv:2"),
        ("params,experts,loss\n1e6,many,3\n", "'many' for experts"),
    ],
)
def test_tables_that_say_less_are_refused(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        points_of_table(tmp_path / "a.csv")


def test_what_is_no_table_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"params,\xff\xfe")
    (tmp_path / "b.csv.gz").write_bytes(b"no gzip")
    for name in ("a.csv", "b.csv.gz"):
        with pytest.raises(DataError, match="be a table"):
            points_of_table(tmp_path / name)
