"""The servers that benchmarks.serving compares: how each is started, and what it has taken of the processor."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks import llama_cpp

__all__ = ["SERVERS", "Running", "folder_to_serve", "start"]

SERVERS = ("turnout", "transformers", "llama.cpp")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that answers.

    Args:
        name: of ``SERVERS``.
        url: where.
        model: the name to ask for.
        process: itself.
        log: what it says.
    """

    name: str
    url: str
    model: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def cpu_s(self) -> float:
        """What it and its children have taken so far."""
        found = 0.0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if self.process.pid in (int(stat.parent.name), int(fields[1])):
                found += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return found

    def resident_bytes(self) -> int:
        """What it holds in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))

    def stop(self) -> None:
        """Ends it."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def folder_to_serve(source: Path, kind: str, place: Path) -> Path:
    """A folder with the weights of ``source/kind``, and a tokenizer that has a word for each token.

    The models of the benchmarks have none. No token ends a text: every answer has the length that was asked for.

    Args:
        source: of ``benchmarks.decoding_models.prepare``.
        kind: which weights.
        place: where to.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    from turnout.serve.load.traffic import WORDS

    found = place / kind
    found.mkdir(parents=True, exist_ok=True)
    for file in (source / kind).iterdir():
        if not (found / file.name).exists():
            try:  # not as a link by name, which leads out of the folder and is refused
                (found / file.name).hardlink_to(file.absolute())
            except OSError:
                shutil.copyfile(file, found / file.name)
    size = json.loads((found / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    words = {word: at for at, word in enumerate([*dict.fromkeys(WORDS)][:size])}
    words |= {f"w{at}": at for at in range(len(words), size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(found / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    (found / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    return found


def start(name: str, folder: Path, gguf: Path, kind: str, *, threads: int, streams: int, room: int) -> Running:
    """Starts a server, and waits until it answers.

    Args:
        name: of ``SERVERS``.
        folder: of the weights and the tokenizer.
        gguf: the same for llama.cpp.
        kind: of the weights.
        threads: how many it may use.
        streams: how many at once.
        room: the most tokens of one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    log = folder.parent / f"{name}.{kind}.log"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment |= {"NUMBA_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    model = str(folder)
    if name == "turnout":
        command = [sys.executable, "-m", "turnout", "serve", str(folder), "--port", port, "--no-viewer"]
        command += ["--served-model-name", "model", "--max-running", str(streams)]
        model = "model"
    elif name == "transformers":
        program = shutil.which("transformers", path=str(Path(sys.executable).parent)) or "transformers"
        command = [program, "serve", str(folder), "--port", port, "--device", "cpu", "--dtype", _DTYPES[kind]]
    else:
        python, environment = llama_cpp.command()
        command = [*python, "-m", "benchmarks.llama_server", str(gguf), str(folder / "tokenizer.json"), port]
        command += [str(threads), str(streams), str(room)]
        model = "llama.cpp"
    with log.open("wb") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
    found = Running(name, f"http://127.0.0.1:{port}", model, process, log)
    _wait(found)
    return found


def _wait(found: Running, limit_s: float = 600.0) -> None:
    until = time.monotonic() + limit_s
    while time.monotonic() < until and found.process.poll() is None:
        try:
            with urllib.request.urlopen(f"{found.url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    found.stop()
    said: Any = found.log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise RuntimeError(f"{found.name} does not answer: {said}")
