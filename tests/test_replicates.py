"""An experiment with seeds: how seeds are written, and what the runs and files of each are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rrcli import configuration
from rrcli.errors import UsageError
from rrcli.experiment.identity import eval_inputs, train_inputs, within_context
from rrcli.experiment.replicates import Replicate, reserved
from rrcli.experiment.training_run import prepare_training
from rrcli.experiment.workspace import Workspace
from rrcli.models.inspection import stated_context
from rrcli.models.source import resolve
from rrcli.settings import STAGES, CommonSettings, EvalSettings, TrainSettings


@pytest.mark.parametrize(
    ("written", "seeds"),
    [
        ("3", (0, 1, 2)),
        (" 1 ", (0,)),
        (3, (0, 1, 2)),
        ("0,5, 7", (0, 5, 7)),
        ("5,", (5,)),
        ([5, 0], (5, 0)),
        ([3], (3,)),
        ("", ()),
        ([], ()),
    ],
)
def test_seeds_are_a_number_of_them_or_a_list(tmp_path: Path, written: Any, seeds: tuple[int, ...]) -> None:
    assert configuration.load(CommonSettings, tmp_path, {"seeds": written}).seeds == seeds


@pytest.mark.parametrize("written", ["three", "-1", "0", "0,0", "0;1", "1.5", [True], [0.5], [-1], 0, "1000", "²"])
def test_what_names_no_seeds_is_refused(tmp_path: Path, written: Any) -> None:
    with pytest.raises(UsageError, match=r"--seeds (is|asks for) ") as caught:
        configuration.load(CommonSettings, tmp_path, {"seeds": written})
    assert "3 for 0, 1 and 2" in caught.value.hint


def test_the_seed_is_the_first_unless_it_says_which(tmp_path: Path) -> None:
    assert configuration.load(TrainSettings, tmp_path, {"seeds": "5,6"}).seed == 5
    assert configuration.load(TrainSettings, tmp_path, {"seeds": "5,6", "seed": 6}).seed == 6
    with pytest.raises(UsageError, match="--seed is 0, which is not among the seeds of the experiment: 5,6") as caught:
        configuration.load(TrainSettings, tmp_path, {"seeds": "5,6", "seed": 0})
    assert "--seeds 0,5,6" in caught.value.hint
    (tmp_path / "rr.toml").write_text("[common]\nseeds = [5, 6]\n")
    with pytest.raises(UsageError, match="--seed is 7") as caught:
        configuration.load(TrainSettings, tmp_path, {"seed": 7})
    assert "--seeds 5,6,7" in caught.value.hint


def test_the_first_seed_has_the_plain_names() -> None:
    alone, several = CommonSettings(seed=4), CommonSettings(seed=5, seeds=(4, 5))
    for stage in STAGES:
        assert Workspace(Path(), alone).replicate(stage) == Replicate(stage, 4)
        assert Workspace(Path(), several).replicates(stage)[0].name == stage
    workspace = Workspace(Path("place"), several)
    assert [one.name for one in workspace.replicates("finetuned_recursive")] == [
        "finetuned_recursive",
        "finetuned_recursive-seed5",
    ]
    assert [one.name for one in workspace.replicates("after_surgery")] == ["after_surgery"]
    one = workspace.replicate("vanilla_equal_flops")
    assert (one.name, one.flag) == ("vanilla_equal_flops-seed5", " --seed 5")
    assert workspace.results_file(one.name) == Path("place/eval_results/vanilla_equal_flops-seed5_results.json")
    assert workspace.replicate("baseline") == Replicate("baseline", 4)


def test_a_name_never_leaves_its_folder() -> None:
    workspace = Workspace(Path("place"), CommonSettings())
    for make in (workspace.results_file, workspace.run_folder, workspace.log_folder):
        for name in ("../outside", "/root", ".hidden", "a/b"):
            with pytest.raises(UsageError, match="not a plain name"):
                make(name)


def test_names_of_stages_and_seeds_are_reserved() -> None:
    for name in ("baseline", "Baseline", "finetuned_recursive-seed1", "FINETUNED_recursive-Seed12"):
        assert reserved(name)
    for name in ("mine", "finetuned_recursive-seed", "finetuned_recursive-seed1b", "my-finetuned_recursive"):
        assert not reserved(name)


def test_a_replicate_is_named_by_stage_and_seed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown stage 'finetuned_vanilla-seed1'") as caught:
        Workspace(tmp_path, CommonSettings()).replicate("finetuned_vanilla-seed1")
    assert caught.value.hint == "Write --stage finetuned_vanilla --seed 1."


def test_a_seed_more_changes_what_is_evaluated_once_and_nothing_that_is_trained() -> None:
    def inputs(stage: str, **changes: Any) -> str:
        return eval_inputs(EvalSettings(**changes), stage, "model", "data")

    for stage in STAGES:
        alone, more = inputs(stage), inputs(stage, seeds=(0, 1))
        assert (alone == more) == (stage not in ("baseline", "after_surgery"))
        assert inputs(stage, seeds=(0,)) == alone
    assert inputs("finetuned_vanilla", seeds=(0, 1), seed=1) != inputs("finetuned_vanilla", seeds=(0, 1))
    assert inputs("baseline", seeds=(0, 1), seed=1) == inputs("baseline", seeds=(0, 1))
    trained = [train_inputs(TrainSettings(seeds=seeds), "vanilla", "start", "data") for seeds in ((), (0, 1))]
    assert trained[0] == trained[1]


def test_a_length_beyond_the_context_is_the_same_run_as_one_at_its_end(tmp_path: Path) -> None:
    """Examples and windows are cut to the context, so that what lies beyond changes nothing."""
    context = stated_context(resolve("default", tmp_path).path)
    assert context is not None

    def inputs(max_length: int) -> str:
        return prepare_training(TrainSettings(max_length=max_length), "vanilla", tmp_path).inputs

    assert inputs(context + 1) == inputs(10 * context) == inputs(context) != inputs(context - 1)
    base = resolve("default", tmp_path)
    windows = [within_context(EvalSettings(max_length=n), base, tmp_path).max_length for n in (0, 9, context + 5)]
    assert windows == [0, 9, context]
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 8, "text_config": {"n_positions": 5}}')
    assert stated_context(tmp_path) == 5
    for text in ("{}", "[1]", "{", '{"max_position_embeddings": "many"}'):
        (tmp_path / "config.json").write_text(text)
        assert stated_context(tmp_path) is None
    assert stated_context(tmp_path / "absent") is None
