"""A comparison of routers: arms of equal products, runs that are kept, and numbers that are those of the runs."""

import json

import pytest

from turnout.cli.main import main
from turnout.decide import token
from turnout.errors import UnknownNameError, UsageError
from turnout.models import LM
from turnout.recipes import study as studied
from turnout.recipes.study import DEFAULT_ARMS, arm_of, study
from turnout.recipes.tiny import tiny, tiny_dense

SMALL = [
    *("width=16", "layers=2", "heads=2", "kv_heads=null", "hidden=24", "vocab_size=300", "max_seq=32"),
    *("num_experts=4", "moe.hidden=12", "steps=4", "batch=4", "seq=32", "warmup=1", "eval_every=4", "eval_tokens=256"),
]


@pytest.mark.parametrize("name", DEFAULT_ARMS)
def test_every_default_arm_is_a_model_of_as_many_products(name):
    base = tiny()
    run = studied._run_of(base, arm_of(name, base), 1)
    assert run.train.seed == 1 and run.train.checkpoint_every == 600
    cost, wanted = LM(run.model, seed=0).cost(), LM(base.model, seed=0).cost()
    # ReMoE, TopP: as many experts as they are asked for in the mean. RMoE and HyperRouter have larger routers.
    within = {"RMoE": 0.2, "HyperRouter": 0.2, "MoEPlusPlus": 0.35}.get(name, 0.03)
    assert cost.flops == pytest.approx(wanted.flops, rel=within)
    assert name == "dense" or run.model.moe.router == name


def test_the_default_set_is_twenty_routers_and_a_dense_model():
    assert len(set(DEFAULT_ARMS)) == 21 and set(DEFAULT_ARMS) - {"dense"} <= set(token.__all__)


def test_arms_of_ones_own_and_wrong_ones():
    base = tiny()
    wide = arm_of("wide:top_k=4; moe.hidden=64", base)
    assert wide.overrides == ("top_k=4", "moe.hidden=64")
    assert studied._run_of(base, wide, 0).model.moe.top_k == 4
    with pytest.raises(UnknownNameError, match="ReMoE"):
        arm_of("ReMoe2", base)
    with pytest.raises(UsageError, match="--recipe must have experts"):
        arm_of("TopK", tiny_dense())
    with pytest.raises(UsageError, match="plain name"):
        arm_of("../up:top_k=1", base)


@pytest.mark.parametrize(
    ("arms", "more", "words"),
    [
        (["TopK"], {}, "two or more different ones"),
        (["TopK", "TopK"], {}, "each once"),
        (["TopK", "Hash"], {"seeds": (1,)}, "--seeds"),
        (["TopK", "Hash"], {"seeds": (1, 1)}, "--seeds"),
        (["TopK", "Hash"], {"against": "Hush"}, "Did you mean 'Hash'"),
    ],
)
def test_what_compares_nothing_is_refused(tmp_path, arms, more, words):
    base = tiny()
    with pytest.raises(UsageError, match=words):
        study(base, [arm_of(name, base) for name in arms], tmp_path, **more)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_runs_are_made_kept_and_compared(tmp_path, capsys):
    text = tmp_path / "text"
    for domain, word in (("ones", "one and another one"), ("twos", "2 + 2 = 22, two")):
        (text / domain).mkdir(parents=True)
        for number in range(80):
            (text / domain / f"{number}.txt").write_text(f"{word} {number} {word[::-1]} " * 6)
    out = tmp_path / "out"
    data = [f"--data={name}={text / name}" for name in ("ones", "twos")]
    sets = [f"--set={one}" for one in SMALL]
    argv = ["compare", "dense", "TopK", "Switch", "--seeds", "0,1", "--steps", "4", *data, *sets, "--out", str(out)]
    assert main(argv) == 0
    said = capsys.readouterr()
    assert "Switch, seed 1:" in said.err and "min left" in said.err and "cannot be told from" not in said.out
    body = json.loads((out / "compare.json").read_text())["values"]
    rows = {row["arm"]: row for row in body["rows"]}
    assert body["against"] == "TopK" and set(rows) == {"dense", "TopK", "Switch"}
    for name, experts in (("TopK", 2), ("Switch", 1)):
        mean = rows[name]["mean"]
        assert mean["experts_per_token"] == experts and 0 <= mean["kept"] <= 1 and 0 <= mean["affinity"] <= 1
        assert 0 <= mean["specialisation"] <= 1 and mean["flops"] > 0
        bits = [json.loads((out / "runs" / f"{name}-{s}" / "result.json").read_text())["bits_per_byte"] for s in (0, 1)]
        assert mean["bits_per_byte"] == pytest.approx(sum(bits) / 2)
    assert "kept" not in rows["dense"]["mean"]
    assert "ways to route" in (out / "compare.html").read_text()
    # Again: nothing is trained.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert main([*argv, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == before
    # Another length is another comparison.
    assert main([*argv, "--set=steps=5"]) == 2
    assert "holds another run" in capsys.readouterr().err
