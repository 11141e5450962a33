"""`rr export` as a command: what it says, and the model card with what the experiment measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

from commands import rr
from comparing import stage_results
from exports import base_model, train
from rrcli.files import write_json


def test_the_command_says_where_the_folder_is_and_the_card_holds_the_comparison(tmp_path: Path) -> None:
    train(tmp_path, base_model(tmp_path / "base", "llama"))
    done = rr("export", "finetuned_recursive", "first", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'from_pretrained("' in done.stdout
    assert "trust_remote_code=True" in done.stdout
    assert "Nothing was measured" in (tmp_path / "first" / "README.md").read_text()
    for stage in ("baseline", "finetuned_recursive"):
        write_json(tmp_path / "eval_results" / f"{stage}_results.json", stage_results(stage))
    (tmp_path / "rr.toml").write_text('[compare]\ngate = ["1 > 2"]\ngenerations = true\n')
    done = rr("export", "finetuned_recursive", "second", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["schema"], said["recursive"], said["adapters"]) == ("rr.export/1", True, None)
    card = (tmp_path / "second" / "README.md").read_text()
    assert re.search(r"\| Metric +\| +baseline \| +finetuned_recursive \|", card)
    assert "Nothing was measured" not in card
    again = rr("export", "finetuned_recursive", "second", folder=tmp_path)
    assert (again.returncode, "--overwrite" in again.stderr) == (1, True)
    refused = rr("export", "finetuned_recursve", "third", folder=tmp_path)
    assert (refused.returncode, "neither a stage nor a run nor a folder" in refused.stderr) == (2, True)
    assert not (tmp_path / "third").exists()
