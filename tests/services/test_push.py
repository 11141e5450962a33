"""`rr push` to a hub on loopback, and what others load from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import rr_process
from exports import NEW_TOKENS, PROMPTS, base_model, own_tokens, train
from fake_hub import Hub, Repository, fake_hub
from rrcli.errors import UsageError
from rrcli.reporting import Silent
from rrcli.services.push import _left_over, push
from rrcli.settings import CommonSettings

# huggingface_hub's own call of httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
LOADS = """
import json, sys
sys.path.insert(0, {tests!r})
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from exports import generated
tokenizer = AutoTokenizer.from_pretrained("me/tiny")
found = [
    generated(cls.from_pretrained("me/tiny", trust_remote_code=True), tokenizer)
    for cls in (AutoModelForCausalLM, LlamaForCausalLM)
]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with fake_hub() as found:
        yield found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    train(folder, base_model(folder / "base", "llama"), lora=True)
    return folder


def test_a_push_is_one_commit_that_others_load_from_the_hub(place: Path, hub: Hub, tmp_path: Path) -> None:
    done = rr_process("push", "finetuned_recursive", "me/tiny", "--json", folder=place, **hub.environment)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    repository = hub.repositories["me/tiny"]
    assert (said["schema"], said["commit"], said["private"]) == ("rr.push/1", repository.commits[-1], True)
    assert repository.private
    assert len(repository.commits) == 2
    assert {"README.md", "adapter/adapter_model.safetensors", "modeling_rr.py"} <= repository.files.keys()
    assert b'from_pretrained("me/tiny", trust_remote_code=True)' in repository.files["README.md"]
    assert not list(place.glob(".rr-push-*"))
    environment = os.environ | hub.environment | {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "code")}
    code = LOADS.format(tests=str(Path(__file__).parents[1]))
    loads = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert loads.returncode == 0, loads.stderr
    expected = own_tokens(place / "checkpoints" / "finetuned_recursive" / "step-000002", PROMPTS, NEW_TOKENS)
    assert json.loads(loads.stdout.splitlines()[-1]) == [expected, expected]


@pytest.fixture
def at_home(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    for name, value in hub.environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("at_home")
def test_another_persons_repository_is_not_written_over(place: Path, hub: Hub) -> None:
    repository = hub.repositories["me/other"] = Repository(private=False, files={"model.safetensors": b"x"})
    with pytest.raises(Exception, match="holds something else") as caught:
        push(CommonSettings(), "finetuned_recursive", "me/other", place, Silent())
    assert "--overwrite" in caught.value.hint
    assert repository.files == {"model.safetensors": b"x"}
    result = push(CommonSettings(), "finetuned_recursive", "me/other", place, Silent(), overwrite=True)
    assert (result.private, result.files) == (None, len(repository.files))


@pytest.mark.usefixtures("at_home")
def test_without_a_token_the_error_says_how_to_log_in(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(Exception, match="does not take the repository me/new") as caught:
        push(CommonSettings(), "finetuned_recursive", "me/new", place, Silent())
    assert "hf auth login" in caught.value.hint


@pytest.mark.usefixtures("at_home")
def test_adapters_of_a_base_that_is_not_on_the_hub_are_merged_or_refused(place: Path, hub: Hub) -> None:
    train(place, place / "base", run="finetuned_vanilla", recursive=False, lora=True)
    with pytest.raises(UsageError, match="nobody else could load them"):
        push(CommonSettings(), "finetuned_vanilla", "me/vanilla", place, Silent())
    result = push(CommonSettings(), "finetuned_vanilla", "me/vanilla", place, Silent(), merge=True, public=True)
    repository = hub.repositories["me/vanilla"]
    assert (result.private, repository.private) == (False, False)
    assert not [name for name in repository.files if "adapter" in name or name.endswith(".py")]


def test_no_id_of_a_repository_is_refused(place: Path) -> None:
    for name in ("a/b/c", "-x/y", "me/../you"):
        with pytest.raises(UsageError, match="no id of a repository"):
            push(CommonSettings(), "finetuned_recursive", name, place, Silent())


def test_what_an_earlier_export_left_goes_and_all_else_stays() -> None:
    there = ["recursion.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "photo.png", "x.py"]
    assert _left_over(there, ["recursion.json", "model.safetensors"]) == [*sorted(there[1:3]), "x.py"]
    assert _left_over(there[1:], ["model.safetensors"]) == []
