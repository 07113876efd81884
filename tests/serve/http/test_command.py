"""``turnout serve`` as a process: what it prints, what it refuses, and how it ends."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from turnout.cli import serve
from turnout.cli.main import main
from turnout.errors import CheckpointError, DataError
from turnout.recipes.certify import model_folder


@pytest.fixture
def start() -> Iterator:
    """Starts servers, and ends them whatever happens."""
    begun: list[subprocess.Popen[str]] = []

    def run(*argv: str | Path) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "turnout", "serve", "--port", "0", *map(str, argv)]
        begun.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        line = begun[-1].stdout.readline() if begun[-1].stdout else ""
        assert " at http://" in line, begun[-1].communicate()[1]
        return begun[-1], line.split(" at ")[1].strip()

    yield run
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate()


def post(url: str, body: dict) -> httpx.Response:
    return httpx.post(f"{url}/completions", json=body, timeout=600, trust_env=False)


@pytest.mark.slow
def test_it_ends_in_peace(start, folder):
    process, url = start(folder, "--drain-timeout", "500")  # however busy the machine is
    assert process.stdout.readline().startswith(f"curl {url}/chat/completions")
    assert process.stdout.readline() == f"in a browser: {url.replace('/v1', '/')}\n"
    answers: list[httpx.Response] = []
    long = {"prompt": "a", "max_tokens": 250, "ignore_eos": True, "n": 60}
    thread = threading.Thread(target=lambda: answers.append(post(url, long)))
    thread.start()
    health = url.replace("/v1", "/health")
    until = time.monotonic() + 200
    while httpx.get(health, trust_env=False).json()["running"] == 0 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    found = post(url, {"prompt": "a"})
    assert (found.status_code, found.json()["error"]["code"]) == (503, "draining")
    thread.join()
    assert [len(answer.json()["choices"]) for answer in answers] == [60]
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert (out, err) == ("", "")


@pytest.mark.slow
def test_whoever_is_cut_short_at_the_end_is_told_in_openais_format(start, folder):
    process, url = start(folder, "--drain-timeout", "0.3")
    answers: list[httpx.Response] = []
    body = {"prompt": "a", "max_tokens": 250, "ignore_eos": True, "n": 128}
    threads = [threading.Thread(target=lambda: answers.append(post(url, body))) for _ in range(8)]
    for thread in threads:
        thread.start()
    while httpx.get(url.replace("/v1", "/health"), trust_env=False).json()["running"] == 0:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert {(found.status_code, found.json()["error"]["code"]) for found in answers} <= {
        (503, "cancelled"),
        (503, "draining"),
        (429, "queue_full"),
    }, [found.text[:200] for found in answers]
    assert (503, "cancelled") in {(found.status_code, found.json()["error"]["code"]) for found in answers}


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(start, folder):
    process, url = start(folder)
    body = json.dumps({"prompt": "a", "max_tokens": 250, "ignore_eos": True, "n": 128, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0]))) as sock:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        sock.recv(100)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert time.monotonic() - began < 15
    assert process.returncode == 0


@pytest.mark.slow
def test_killed_and_started_again_at_its_port(start, folder):
    process, url = start(folder)
    first = post(url, {"prompt": "a", "max_tokens": 8, "temperature": 0}).json()["choices"]
    with httpx.stream("POST", f"{url}/completions", json={"prompt": "a", "stream": True}, trust_env=False):
        process.kill()
        process.communicate()
    _, again = start(folder, "--port", url.split(":")[2].split("/")[0])
    assert post(again, {"prompt": "a", "max_tokens": 8, "temperature": 0}).json()["choices"] == first


def refused(capsys, *argv: str | Path) -> str:
    assert main(["serve", *map(str, argv)]) == 2
    return capsys.readouterr().err


def test_strangers_need_a_key(folder, capsys):
    said = refused(capsys, folder, "--host", "0.0.0.0")
    assert "--api-key-file FILE" in said and "--insecure" in said
    assert len(said.splitlines()) == 1


def test_a_port_that_is_taken_is_known_before_the_model_is_read(folder, capsys, monkeypatch):
    monkeypatch.setattr(serve, "_engine", lambda *_: pytest.fail("the model was read"))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        assert f"got {port}, where another program listens" in refused(capsys, folder, "--port", port)


def test_mistakes(folder, tmp_path, capsys, monkeypatch):
    assert "does not exist" in refused(capsys, "no/such/folder")
    assert "NAME=FOLDER" in refused(capsys, folder, "--lora", "x")
    assert "does not exist" in refused(capsys, folder, "--lora", "x=no/such")
    (tmp_path / "keys").write_text("# none\n\n")
    assert "hold a key" in refused(capsys, folder, "--api-key-file", tmp_path / "keys")
    assert "printable ASCII" in refused(capsys, folder, "--api-key", "a b")
    assert "above 0" in refused(capsys, folder, "--request-timeout", "0")
    assert "--kv-memory 2GB" in refused(capsys, folder, "--kv-memory", "much")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "pip install 'turnout[serve]'" in refused(capsys, folder)


def test_a_folder_without_a_tokenizer(folder, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        os.link(folder / name, tmp_path / name)
    assert "tokenizer.json beside it" in refused(capsys, tmp_path, "--port", "0")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_keys_come_from_a_pipe(tmp_path):
    """As the shell's ``--api-key-file <(command)``."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    os.mkfifo(tmp_path / "keys")
    for written, want in ((b"# of ours\none\ntwo\n", ["one", "two"]), (b"\xff\n", None)):
        thread = threading.Thread(target=(tmp_path / "keys").write_bytes, args=(written,))
        thread.start()
        asked = parser.parse_args(["x", "--api-key-file", str(tmp_path / "keys")])
        if want:
            assert serve._keys(asked) == want
        else:
            with pytest.raises(DataError, match="not UTF-8"):
                serve._keys(asked)
        thread.join()


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    (tmp_path / "keys").write_text("one\n# not this\n two \n")
    monkeypatch.setenv("TURNOUT_API_KEY", "three")
    assert serve._keys(parser.parse_args(["x", "--api-key-file", str(tmp_path / "keys")])) == ["one", "two"]
    assert serve._keys(parser.parse_args(["x"])) == ["three"]
    assert serve._keys(parser.parse_args(["x", "--api-key", "four"])) == ["four"]


def test_what_the_checkpoint_wishes_is_said(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "moe")
    (tmp_path / "moe" / "generation_config.json").write_text('{"do_sample": true, "top_k": 20, "eos_token_id": 0}')
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    arguments = parser.parse_args([str(tmp_path / "moe"), "--device", "cpu", "--served-model-name", "m"])
    with pytest.warns(UserWarning, match="pass top_k=20"):
        engine, texts = serve._engine(arguments, {})
    engine.close()
    assert (engine.models(), texts.eos) == (("m",), (0,))
    assert texts.template is not None


def test_a_budget_below_a_page_or_beyond_the_machine_is_refused():
    from turnout.errors import UsageError
    from turnout.models import LM, LMConfig
    from turnout.serve.engine.paged_lane import PagedLane

    lm = LM(LMConfig(vocab_size=16, width=16, layers=2, heads=2))
    with pytest.raises(UsageError, match="cache_bytes must hold a page of 64 positions"):
        PagedLane(lm, 1, 10, sharing=False)
    with pytest.raises(UsageError, match="cache_bytes must be memory that this machine has"):
        PagedLane(lm, 1, 10**17, sharing=False)


@pytest.mark.parametrize("within", [False, True])
def test_a_file_of_llama_cpp_is_refused_by_name(tmp_path, within):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\xbd\x00")
    with pytest.raises(CheckpointError, match=r"of llama\.cpp.*GGUF is written here, not read"):
        model_folder(tmp_path if within else file)
