"""The scripts are plain POSIX sh of about a dozen lines, CI runs the developer's command, and no hook is fetched."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from house import ROOT

SCRIPTS = [*(ROOT / "scripts" / name for name in ("demo", "env", "site", "test", "test-python")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_short_plain_sh(script: Path) -> None:
    """It parses, may be executed, says on its second line what it does, and can be read at a glance."""
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/bin/sh" and lines[1].startswith("# ")
    assert os.access(script, os.X_OK)
    assert len(lines) <= 16
    for shell in filter(shutil.which, ("sh", "dash", "bash")):
        subprocess.run([shell, "-n", str(script)], check=True)


def test_no_script_is_unchecked() -> None:
    """A new script joins the list above; the others here are Python."""
    assert {path for path in (ROOT / "scripts").iterdir() if path.is_file() and not path.suffix} == set(SCRIPTS[:-1])


def test_ci_runs_what_a_developer_runs() -> None:
    """Nothing but ``scripts/test --all``."""
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").strip().endswith("exec scripts/test --all")


def test_hooks_are_local() -> None:
    """pre-commit clones nothing, and what a hook runs is here after scripts/test."""
    configuration = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in configuration["repos"]] == ["local"]
    hooks = configuration["repos"][0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    for hook in hooks:
        tool, *arguments = hook["entry"].split()
        assert tool.startswith(".venv/bin/")
        assert all((ROOT / word).is_file() for word in arguments if word.startswith("scripts/"))


def test_env_says_what_is_missing(tmp_path: Path) -> None:
    """Without a Python, or with an old one, one line says which is needed; nothing is made."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    shutil.copy(ROOT / "scripts" / "env", scripts / "env")
    (scripts / "run").write_text('extras=""\n. "$(dirname "$0")/env"\n', encoding="utf-8")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "dirname", "cat", "cksum", "tr"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    run = [str(shutil.which("sh")), str(scripts / "run")]
    for python in (None, "#!/bin/sh\n[ \"$1\" = -V ] && echo 'Python 3.9.1'\nexit 1\n"):
        if python:
            (tools / "python3").write_text(python, encoding="utf-8")
            (tools / "python3").chmod(0o755)
        done = subprocess.run(run, check=False, env={"PATH": str(tools)}, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("turnout needs Python 3.11 or newer") and done.stderr.count("\n") == 1
        assert not (tmp_path / ".venv").exists()
