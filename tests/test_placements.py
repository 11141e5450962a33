"""The table of placements: a few of its cells for real, what counts as a fault, and that the page has all of them."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from placements import (
    COMMANDS,
    COPIES,
    FAMILIES,
    ON_DISK,
    ONE,
    PLACEMENTS,
    Cell,
    Done,
    Outcome,
    apart,
    folder_of,
    judge,
    prepare,
)
from rrcli.files import checkpoints

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import placement_matrix  # noqa: E402


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("placements")
    prepare("llama", [ONE, ON_DISK, COPIES], root)
    return root


def test_cells_are_run_and_compared(root: Path) -> None:
    cells = [Cell("llama", ON_DISK, command) for command in ("surgery", "eval", "train c", "generate")]
    found = [placement_matrix.alone(cell, root) for cell in cells]
    assert [str(outcome) for outcome in found] == [
        "works, exact",
        "works, exact",
        "refused: --device-map map.json lays weights where they cannot train. Train in parts: --parallel fsdp=N.",
        "works, exact",
    ]
    assert str(placement_matrix.alone(Cell("llama", ONE, "train b"), root)) == "works"
    refused = placement_matrix.alone(Cell("llama", COPIES, "generate"), root)
    assert refused == Outcome("refused", "No such option: --num-processes")


def test_what_differs_is_a_fault(root: Path) -> None:
    trained = Cell("llama", ONE, "train b")
    own = folder_of(trained, root, "other")
    (own / "checkpoints").mkdir(parents=True)
    for name in ("checkpoints/b", "logs"):
        shutil.copytree(folder_of(trained, root) / name, own / name)
    other = Cell("llama", "other", "train b")
    done = [Done(0, "", "")]
    assert judge(other, done, root) == Outcome("works", difference=0.0)
    file = checkpoints(own / "checkpoints" / "b")[-1] / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, file)
    assert re.match("fault: weights differ by", str(judge(other, done, root)))
    assert judge(other, [Done(1, "", "Traceback (most recent call last)")], root).kind == "fault"
    assert judge(other, [Done(1, "", "error: memory\nhint: less")], root).kind == "fault", "not a refusal"
    assert judge(other, [Done(2, "", "error: it cannot be")], root).kind == "fault", "no next step"
    refused = judge(other, [Done(2, "", "1 problem\nerror: it cannot be\nhint: Take\n  another.")], root)
    assert refused == Outcome("refused", "it cannot be. Take another.")


def test_how_far_tensors_are_apart() -> None:
    one = {"a": torch.tensor([4.0, 0.0]), "b": torch.tensor([1.0])}
    assert apart(one, one) == 0
    assert apart({**one, "a": torch.tensor([4.0, 1.0])}, one) == 0.25  # of the norm
    assert apart({"a": one["a"]}, one) != apart({"a": one["a"]}, one)  # nan: a tensor is missing


def test_the_page_has_every_cell() -> None:
    page = (ROOT / "docs" / "placements.md").read_text(encoding="utf-8")
    reasons = re.findall(r"^(\d+)\. .+\.|^(\d+)\. No such option", page, re.M)
    numbers = {number for pair in reasons for number in pair if number}
    for family in FAMILIES:
        part = page.split(f"\n## {family}\n")[1].split("\n## ")[0]
        rows = {row.split("|")[1].strip(" `"): row.split("|")[2:-1] for row in part.strip().splitlines()[2:]}
        assert list(rows) == list(PLACEMENTS)
        for cells in rows.values():
            assert len(cells) == len(COMMANDS)
            for cell in cells:
                found = re.fullmatch(r" works(?:, exact|, \de-\d\d)? | refused \((\d+)\) ", cell)
                assert found, cell
                assert found[1] is None or found[1] in numbers


def test_the_processes_of_a_cell() -> None:
    counts = {placement: Cell("llama", placement, "eval").processes for placement in PLACEMENTS}
    assert [placement for placement, count in counts.items() if count == 1] == [ONE, ON_DISK, "--quantize 4bit"]
