"""What the machine says about itself, without saying whose it is."""

import getpass
import json
import platform
import subprocess

import torch

from turnout import __version__
from turnout.measure import hardware


def test_versions_and_threads_are_those_of_this_process() -> None:
    found = hardware()
    assert found["torch"] == torch.__version__
    assert found["turnout"] == __version__
    assert found["python"] == platform.python_version()
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1


def test_it_is_json_and_names_neither_machine_nor_user() -> None:
    text = json.dumps(hardware())
    words = set(text.replace('"', " ").replace(",", " ").split())
    assert platform.node() not in words
    assert getpass.getuser() not in words


def test_the_commit_is_a_hash_or_nothing() -> None:
    commit = hardware()["commit"]
    inside = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert commit is None or commit.rstrip("+") == inside.stdout.strip()
