import pytest

from turnout import errors
from turnout.errors import nearest, word


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name[0].isupper()])
def test_every_exception_is_a_turnout_error(name):
    assert issubclass(getattr(errors, name), errors.TurnoutError)


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("UsageError", ValueError),
        ("UnknownNameError", ValueError),
        ("ShapeError", ValueError),
        ("DataError", ValueError),
        ("CheckpointError", ValueError),
        ("StorageError", OSError),
        ("TrainingError", RuntimeError),
        ("MissingExtraError", ImportError),
    ],
)
def test_the_builtin_family_catches_it(name, builtin):
    with pytest.raises(builtin):
        raise getattr(errors, name)("x")


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = [line.split("── ")[1].split()[0] for line in errors.__doc__.splitlines() if "── " in line]
    assert sorted([*drawn, "TurnoutError"]) == sorted(name for name in errors.__all__ if name[0].isupper())


def test_a_message_says_four_things():
    message = word("top_k", got=9, allowed="be between 1 and 8", where="TopK", fix="pass top_k=8")
    assert message == "top_k must be between 1 and 8 in TopK; got 9. Nearest fix: pass top_k=8."
    assert "got 'x'" in word("a", got=["x"][0].__repr__(), allowed="b", where="c", fix="d")
    assert "got plain text" in word("a", got="plain text", allowed="b", where="c", fix="d")
    assert "\n" not in message


def test_the_nearest_name_is_offered_and_all_are_listed():
    error = nearest("tinny", ["tiny", "demo"], kind="recipe", where="turnout train")
    assert isinstance(error, errors.UnknownNameError)
    assert "Did you mean 'tiny'?" in str(error) and "Available: demo, tiny." in str(error)
    assert "Did you mean" not in str(nearest("zzz", ["tiny", "demo"], kind="recipe", where="x"))
    assert str(nearest("a", [], kind="recipe", where="x"))


def test_the_same_name_in_other_letters_is_offered_first():
    for name in ("topk", "TOPK", "topK"):
        assert "Did you mean 'TopK'?" in str(nearest(name, ["TopP", "TopK", "Top"], kind="router", where="here"))
