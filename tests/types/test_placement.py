"""A placement is what it says, whole, in a file and in what it takes to become another."""

import json

import numpy as np
import pytest

from turnout.errors import CheckpointError, UsageError
from turnout.types import Placement

HELD = np.array([[1, 1, 0, 1], [0, 1, 1, 1]], dtype=bool)


def test_the_tables_say_the_same():
    placement = Placement.of([HELD, HELD[::-1]])
    assert placement.slots == 12 and placement.num_layers == 2
    for layer in range(2):
        log2phy, count_E = placement.log2phy(layer), placement.count(layer)
        assert (placement.held(layer) == [HELD, HELD[::-1]][layer]).all()
        for expert in range(4):
            slots = [slot for slot in log2phy[expert].tolist() if slot >= 0]
            assert len(slots) == count_E[expert]
            assert all(placement.phy2log[layer][slot] == expert for slot in slots)
            assert [placement.device[layer][slot] for slot in slots] == placement.held(layer)[:, expert].nonzero()[
                0
            ].tolist()
        assert [placement.on(layer, g) for g in range(2)] == [
            tuple(placement.held(layer)[g].nonzero()[0].tolist()) for g in range(2)
        ]


@pytest.mark.parametrize("experts", [4, 5, 7])
def test_contiguous_is_even(experts):
    placement = Placement.contiguous([experts, experts + 1], devices=3)
    sizes = [len(placement.on(0, g)) for g in range(3)]
    assert sum(sizes) == experts and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ((2, (2,), ((0, 0, 1),), ((0, 0, 1),)), "expert 0 twice on device 0"),
        ((2, (2,), ((0, 0),), ((0, 1),)), "none of expert 1"),
        ((2, (2,), ((0, 2),), ((0, 1),)), "expert 2"),
        ((2, (2,), ((0, 1),), ((0, 2),)), "devices [0, 2]"),
        ((2, (2,), ((0, 1),), ((1, 0),)), "slots in another order"),
        ((2, (2,), ((0, 1),), ((0,),)), "2 experts on 1 devices"),
        ((2, (2, 2), ((0, 1),), ((0, 1),)), "2, 1, 1 and 0 layers"),
        ((2, (2,), ((0, 1),), ((0, 1),), 3), "3 nodes of 2 devices"),
        ((2, (2,), ((),), ((),)), "0 experts on 0 devices"),
        ((2, (2,), ((0, 1),), ((0, 1),), 1, ("a", "b")), "1, 1, 1 and 2 layers"),
    ],
)
def test_what_is_no_placement_is_refused(fields, says):
    with pytest.raises(UsageError) as error:
        Placement(*fields)
    assert says in str(error.value)


def test_moves_come_from_the_nearest_holder_and_nothing_moves_for_a_drop():
    before = Placement.of([np.array([[1, 0, 1], [0, 1, 0], [1, 0, 0], [0, 1, 1]])], nodes=2)
    after = Placement.of([np.array([[1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1]])], nodes=2)
    moves = before.moved(after, expert_bytes=[4.0])
    assert moves.copies == ((0, 0, 0, 1), (0, 1, 3, 2)) and moves.bytes == 8.0 and moves.share == 2 / 6
    assert before.moved(before).copies == ()
    with pytest.raises(UsageError, match="one model and one cluster"):
        before.moved(Placement.contiguous([3], devices=4))


def test_a_file_holds_it_whole_or_is_refused(tmp_path):
    placement = Placement.of([HELD], nodes=2, layers=["0"])
    placement.save(tmp_path / "p.json", stated={"balance": 1.5})
    assert Placement.read(tmp_path / "p.json") == (placement, {"balance": 1.5})
    assert Placement.open(tmp_path / "p.json").digest == placement.digest != Placement.of([HELD]).digest
    body = json.loads((tmp_path / "p.json").read_text())
    for change in ({"stated": {"balance": 1.0}}, {"nodes": 1}, {"sha256": "0"}, {"format": "turnout.plan/1"}):
        (tmp_path / "q.json").write_text(json.dumps(body | change))
        with pytest.raises(CheckpointError):
            Placement.open(tmp_path / "q.json")
    with pytest.raises(CheckpointError, match="turnout place"):
        Placement.open(tmp_path / "none.json")
