"""Systems without fcntl, resource and other things of POSIX: everything works there, or says what it cannot do."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from house import STOREYS, read

# What Windows lacks, hidden; torch and its like have been seen to do without. ``locks`` is what it has instead of
# flock, here over lockf(3): processes are kept apart by the system, as there.
HIDDEN = """
import os, sys, types, warnings
class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("fcntl", "resource", "termios", "pwd", "grp"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Hidden)
import shutil, subprocess, torch  # on Linux they ask for what goes below, and would take msvcrt for all of Windows
shutil._use_fd_functions = False
locks = types.ModuleType("msvcrt")
locks.LK_NBLCK = 2
locks.locking = lambda handle, mode, count: lockf(handle, os.F_TLOCK, count)
lockf, real = os.lockf, os.open
def no_folders(path, flags, *rest, **named):
    if not isinstance(path, int) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return real(path, flags, *rest, **named)
os.open = no_folders
for name in ("O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "O_NONBLOCK", "sched_getaffinity", "uname", "getuid", "geteuid",
             "fork", "lockf", "sysconf", "getloadavg", "killpg"):
    if hasattr(os, name):
        delattr(os, name)
"""
LOCKS = HIDDEN + "\nsys.modules['msvcrt'] = locks\n"


def run(code: str, folder: Path, before: str = LOCKS) -> str:
    """What the code prints in a process of its own, where all that is hidden."""
    command = [sys.executable, "-c", before + textwrap.dedent(code)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_hidden_is_hidden(tmp_path: Path) -> None:
    code = """
    for name in ("fcntl", "resource"):
        try:
            __import__(name)
        except ImportError:
            print(name, hasattr(os, "O_NOFOLLOW"), hasattr(os, "O_DIRECTORY"))
    """
    assert run(code, tmp_path) == "fcntl False False\nresource False False\n"


@pytest.mark.slow
def test_every_room_loads(tmp_path: Path) -> None:
    """Every module, but those that only torch for CUDA on Linux has use for."""
    names = [module.name for module in read() if ".kernels." not in module.name and module.name != "turnout.__main__"]
    assert len(names) > 200 and {name.split(".")[1] for name in names if "." in name} <= {r for s in STOREYS for r in s}
    assert (
        run(f"import importlib; print(len([importlib.import_module(n) for n in {names}]))", tmp_path)
        == f"{len(names)}\n"
    )


@pytest.mark.slow
def test_a_run_is_trained_read_converted_and_certified(tmp_path: Path) -> None:
    """From text to a page, from a model to its conversion and a certificate; resumed once on the way."""
    (tmp_path / "text").mkdir()
    for n in range(40):
        words = " ".join(str(n * k) for k in range(60))
        (tmp_path / "text" / f"{n}.txt").write_text(f"document {n}: {words}", encoding="utf-8")
    small = (
        "width=16 model.layers=2 heads=2 kv_heads=1 model.hidden=16 model.moe.hidden=8 num_experts=4 vocab_size=300 "
        "max_seq=32 seq=32 batch=4 steps=4 warmup=1 eval_every=2 checkpoint_every=2 eval_tokens=512"
    )
    code = f"""
    from turnout.cli import main
    assert main(["train", "tiny", *{small.split()}, "steps=2", "--data", "text", "--out", "run", "--quiet"]) == 0
    assert main(["train", "--resume", "--out", "run", "steps=4", "--quiet"]) == 0
    assert main(["report", "run"]) == 0
    assert main(["convert", "run/model", "--drop-experts", "1", "--by", "random", "--out", "smaller", "--quiet"]) == 0
    assert main(["certify", "run/model", "run/model"]) == 0
    assert main(["doctor"]) == 0
    print("done")
    """
    assert run(code, tmp_path).endswith("done\n")
    assert {"report.html", "result.json", ".lock"} <= {path.name for path in (tmp_path / "run").iterdir()}


HOLD = """
    from pathlib import Path
    from turnout.train.folder import locked
    with locked(Path("run")):
        print("held", flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize("before", [LOCKS, "import sys\n"], ids=["without fcntl", "with"])
def test_a_second_process_is_kept_out_until_the_first_is_gone(tmp_path: Path, before: str) -> None:
    """Also when the first is killed: the system lets go of what a process held."""
    command = [sys.executable, "-c", before + textwrap.dedent(HOLD)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, cwd=tmp_path, **pipes)
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        second = subprocess.run(command, cwd=tmp_path, input="\n", capture_output=True, text=True, check=False)
        assert f"process {first.pid} is training" in second.stderr and second.stdout == ""
    finally:
        first.kill()
        first.communicate()
    assert run(HOLD.replace("sys.stdin.readline()", "pass"), tmp_path, before) == "held\n"


def test_a_python_without_any_locks_says_so(tmp_path: Path) -> None:
    code = """
    from turnout.storage import hold
    with warnings.catch_warnings(record=True) as said, open("a", "wb") as file:
        warnings.simplefilter("always")
        assert hold(file)
    print(said[0].message)
    """
    assert run(code, tmp_path, HIDDEN) == "this Python has no locks: nothing keeps other processes out of a\n"


def test_a_link_is_not_followed_where_the_system_cannot_be_told(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("kept", encoding="utf-8")
    (tmp_path / "log").symlink_to("secret")
    code = """
    from pathlib import Path
    from turnout.storage import open_own
    try:
        open_own(Path("log"))
    except OSError as error:
        print(error.strerror)
    """
    assert "symbolic links" in run(code, tmp_path)
