"""`rr serve`: transformers' own server over HTTP gives rr's own tokens, and has one model alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from exports import NEW_TOKENS, PROMPTS, base_model, own_tokens, train
from rrcli.errors import RRError, UsageError
from rrcli.recursion.exits import ExitRule
from rrcli.reporting import Silent
from rrcli.services import serve as service
from rrcli.settings import ServeSettings

RR = [sys.executable, "-m", "rrcli"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    train(folder, base_model(folder / "base", "llama"), exit=ExitRule("probability", 0.2))
    return folder


@pytest.fixture(scope="module")
def served(
    place: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The command as a process, and what it said when it was ready."""
    for package in service.NEEDED:
        pytest.importorskip(package)
    command = [*RR, "serve", "finetuned_recursive", "--device", "cpu", "--port", "0", "--json"]
    # Without this cache of the hub, as on a new machine.
    new = tmp_path_factory.mktemp("home")
    environment = os.environ | {"HF_HOME": str(new), "HF_MODULES_CACHE": str(new / "modules")}
    process = subprocess.Popen(
        command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said, process.communicate()[1]
    yield process, json.loads(said)
    process.kill()
    process.communicate()


def ask(address: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read()


def test_the_answers_over_http_are_rrs_own(place: Path, served: tuple[Any, dict[str, Any]]) -> None:
    _, said = served
    assert said["url"].startswith("http://127.0.0.1:")
    assert (said["schema"], said["model"], said["dtype"]) == ("rr.serve/1", "finetuned_recursive", "float32")
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    expected = own_tokens(place / "checkpoints" / "finetuned_recursive" / "step-000002")
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        body = {"model": said["model"], "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
        found = json.loads(ask(f"{said['url']}/v1/completions", body))
        text = found["choices"][0]["text"]
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)
        lines = ask(f"{said['url']}/v1/completions", body | {"stream": True}).decode().splitlines()
        parts = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert "".join(part["choices"][0].get("text", "") for part in parts) == text


def test_the_server_has_one_model_alone(place: Path, served: tuple[Any, dict[str, Any]]) -> None:
    """Not what else lies on this machine, whose code would be run."""
    _, said = served
    answer = ask(f"{said['url']}/load_model", {"model": str(place / "base")}).decode()
    assert "this server has the model finetuned_recursive alone" in answer
    with pytest.raises(urllib.error.HTTPError):
        ask(f"{said['url']}/v1/completions", {"model": str(place / "base"), "prompt": "x", "max_tokens": 1})


def test_the_curl_line_is_answered(served: tuple[Any, dict[str, Any]]) -> None:
    done = subprocess.run(["sh", "-c", served[1]["curl"]], capture_output=True, text=True, check=False)
    if done.returncode == 127:
        pytest.skip("there is no curl")
    assert '"text_completion"' in done.stdout


def test_ctrl_c_ends_it_and_removes_the_folder(place: Path, served: tuple[Any, dict[str, Any]]) -> None:
    process, said = served
    assert list(place.glob(".rr-serve-*"))
    process.send_signal(signal.SIGINT)
    process.wait(120)
    assert process.returncode == 0
    assert not list(place.glob(".rr-serve-*"))
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(said["url"], timeout=5)


def test_what_is_missing_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(UsageError, match="needs uvicorn") as caught:
        service.serve(ServeSettings(), "finetuned_recursive", place, Silent(), started=lambda _: None)
    assert "rrcli[serve]" in caught.value.hint


def test_a_model_with_a_class_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["PocketForCausalLM"]}))
    with pytest.raises(RRError, match="PocketForCausalLM is none of them"):
        service._refuse_own_class(tmp_path)
