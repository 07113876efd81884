"""What is installed from the built archives works away from the checkout: commands, pages, types, what README shows."""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import turnout
from house import ROOT
from tests.test_docs import blocks

pytestmark = pytest.mark.slow

# What lies about in a checkout, and is nobody's.
JUNK = ["turnout/__pycache__/old.pyc", "tests/old.pyc", "docs/.draft.md", "build/lib/turnout/old.py", "runs/x/run.json"]
BUILD = "from setuptools import build_meta; print(build_meta.build_{kind}({out!r}))"
SMALL = (
    "width=16 model.layers=2 heads=2 kv_heads=1 model.hidden=16 model.moe.hidden=8 num_experts=4 vocab_size=300 "
    "max_seq=32 seq=32 batch=4 steps=2 warmup=1 eval_every=2 checkpoint_every=2 eval_tokens=512"
).split()


def build(kind: str, source: Path, out: Path) -> Path:
    """An archive, as pip has setuptools build it, without a network."""
    code = BUILD.format(kind=kind, out=str(out))
    done = run([sys.executable, "-c", code], source)
    return out / done.splitlines()[-1]


def run(command: list[str | Path], folder: Path) -> str:
    """What a command prints, away from the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"COLUMNS": "100", "NO_COLOR": "1", "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive of a checkout that junk lies about in, and the wheel that is built from that archive."""
    here = tmp_path_factory.mktemp("package")
    skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, here / "checkout", ignore=skipped)
    for name in JUNK:
        path = here / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("junk", encoding="utf-8")
    source = build("sdist", here / "checkout", here)
    with tarfile.open(source) as archive:
        archive.extractall(here / "source", filter="data")
    (folder,) = (here / "source").iterdir()
    return source, build("wheel", folder, here)


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment that has the wheel, and the libraries of this one."""
    made = tmp_path_factory.mktemp("environment") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", made], made.parent)
    python = made / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], made).strip())
    # Added after the environment's own, and without what this one's own .pth files would add, such as the checkout.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-index", "--no-deps", archives[1]], made)
    return made / "bin"


def test_the_source_archive_has_all_of_the_repository_and_no_junk(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ["LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt", "pyproject.toml"]
    wanted += ["scripts/house.py", "tests/conftest.py", "tests/test_package.py", "tests/cli/test_words.py"]
    wanted += ["docs/claims.json", "docs/guides/certify.md", "benchmarks/results/2026-11-21-peers-cpu.json"]
    wanted += [path.relative_to(ROOT).as_posix() for path in (ROOT / "turnout").rglob("*.*") if path.suffix != ".pyc"]
    assert set(wanted) <= names, sorted(set(wanted) - names)
    assert not set(JUNK) & names
    assert not [name for name in names if name.endswith((".pyc", ".so")) or "__pycache__" in name]


def test_the_wheel_has_the_package_and_nothing_else(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        said = {
            name.partition("/")[2]: archive.read(name).decode() for name in archive.namelist() if "dist-info" in name
        }
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "turnout").rglob("*") if path.is_file()}
    assert names == {name for name in files if "__pycache__" not in name}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    about = email.message_from_string(said["METADATA"])
    assert (about["Version"], about["License-Expression"]) == (turnout.__version__, "Apache-2.0")
    assert set(about.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    assert "licenses/LICENSE" in said and "turnout = turnout.cli:main" in said["entry_points.txt"]


def test_the_installed_package_is_not_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = run([installed / "python", "-c", "import turnout; print(turnout.__file__)"], tmp_path).strip()
    assert Path(where).is_relative_to(installed.parent)


def test_commands_of_the_installed_package_work(installed: Path, tmp_path: Path) -> None:
    """From help, over every method, to a trained model and its page, which needs the package's own files."""
    command = installed / "turnout"
    assert run([command, "--version"], tmp_path).split()[-1] == turnout.__version__
    assert "usage: turnout" in run([command, "--help"], tmp_path)
    assert "LossFree" in run([command, "methods"], tmp_path)
    (tmp_path / "text").mkdir()
    for n in range(40):
        words = " ".join(str(n * k) for k in range(60))
        (tmp_path / "text" / f"{n}.txt").write_text(f"document {n}: {words}", encoding="utf-8")
    run([command, "train", "tiny", *SMALL, "--data", "text", "--out", "run", "--quiet"], tmp_path)
    run([command, "report", "run"], tmp_path)
    assert "<svg" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "bits" in run([command, "eval", "run"], tmp_path)


def test_what_readme_shows_runs(installed: Path, tmp_path: Path) -> None:
    """Its Python blocks, as a script."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    text = "\n".join(block.text for block in blocks(page) if block.words == ("python",))
    assert "import" in text
    (tmp_path / "readme.py").write_text(text, encoding="utf-8")
    run([installed / "python", "readme.py"], tmp_path)
