"""A comparison as a table, Markdown, CSV and JSON: the same numbers everywhere, and text that stays in its cell."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pandas
import pytest

from comparing import four_stages, publish, results
from rrcli.comparison import formats, tables, written
from rrcli.comparison.comparison import Comparison
from rrcli.evaluation import metrics
from rrcli.services.compare import compare
from rrcli.settings import STAGES, CompareSettings
from test_cli_surface import rr


def recursive_stages() -> list[dict]:
    """Return four stages, the last one measured at two depths."""
    stages = four_stages()
    for row in stages[3]["records"]["documents"]:
        row["nll"] = [row["nll"][0] + 5, row["nll"][0]]
        row["correct"] = row["correct"] * 2
    stages[3]["by_depth"] = metrics.by_depth({"documents": stages[3]["records"]["documents"]})
    stages[3]["records"]["generations"][1]["text"] = "a | b\nand [bold]c[/bold]"
    for stage in stages:
        for row in stage["records"]["generations"]:
            row["prompt"] = f"Once, {row['key']}"
    return stages


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    publish(tmp_path, *recursive_stages())
    return tmp_path


@pytest.fixture
def comparison(directory: Path) -> Comparison:
    return compare(CompareSettings(generations=True), [], directory)


def test_markdown_is_a_table_of_every_row_and_stage(comparison: Comparison) -> None:
    text = written.markdown(comparison)
    text = text.partition("## Flipped problems")[0]
    table = [re.sub(" +", " ", line) for line in text.splitlines() if line.startswith("|")]
    assert table[0] == f"| Metric | {' | '.join(STAGES[:4])} |"
    assert re.fullmatch(r"\|:-+\|(-+:\|){4}", table[1])
    deeper = sum(bool(row.depths) for row in comparison.rows)
    assert deeper == 2
    assert len(table) == 2 + len(comparison.rows) + deeper
    assert all(line.replace("\\|", "").count("|") == 4 + 2 for line in table)
    perplexity = next(line for line in table if line.startswith("| Perplexity"))
    assert f"{comparison.rows[0].cells[3].value:.2f}<br>−" in perplexity
    assert perplexity.count("p < 0.0001") + perplexity.count("p = 0.0001") == 2
    assert all(f"- {sentence}" in text for sentence in comparison.sentences)


def test_markdown_keeps_a_generation_in_its_place(comparison: Comparison) -> None:
    text = written.markdown(comparison)
    assert text.count("### Once, g") == 4
    assert "- **finetuned_recursive**: a \\| b<br>and \\[bold\\]c\\[/bold\\]" in text


def test_csv_has_one_line_for_each_value(comparison: Comparison) -> None:
    lines = list(csv.DictReader(io.StringIO(written.csv_text(comparison))))
    own = [line for line in lines if line["depth"] == ""]
    assert len(own) == sum(cell.value is not None for row in comparison.rows for cell in row.cells)
    for row in comparison.rows:
        for stage, cell in zip(comparison.labels, row.cells, strict=True):
            if cell.value is not None:
                (line,) = [x for x in own if (x["metric"], x["stage"]) == (row.metric.name, stage)]
                assert float(line["value"]) == cell.value
                assert (line["p_value"] or "None", line["verdict"]) == (str(cell.p_value), cell.verdict)
    depths = [line for line in lines if line["metric"] == "perplexity" and line["depth"]]
    assert [(line["stage"], line["depth"]) for line in depths] == [("finetuned_recursive", d) for d in "01"]
    assert float(depths[1]["value"]) == comparison.rows[0].cells[3].value
    assert {line["n"] for line in own if line["metric"] == "perplexity"} == {"80"}


def test_parquet_holds_the_frame_itself(comparison: Comparison) -> None:
    made = comparison.to_frame()
    read = pandas.read_parquet(io.BytesIO(written.parquet(comparison)))
    assert list(read.columns) == list(made.columns)
    assert read.value.tolist() == pytest.approx(made.value.tolist(), rel=0, abs=0)
    assert read.depth.dropna().tolist() == made.depth.dropna().tolist() == [0, 1] * 2
    assert read.verdict.fillna("").tolist() == made.verdict.fillna("").tolist()


def test_latex_has_a_row_for_each_line_and_no_bare_sign(comparison: Comparison) -> None:
    text = written.latex(comparison)
    assert text.startswith("% Differences are to baseline")
    assert "\\toprule" in text
    assert "finetuned\\_recursive" in text
    assert re.search(r"^Perplexity \$\\downarrow\$ &.*\\\\$", text, re.MULTILINE)
    body = text.partition("\n")[2]
    assert body.isascii()
    assert all(line.count("&") == 4 for line in body.splitlines() if line.endswith("\\\\"))


def test_a_notebook_shows_the_table_and_its_sentences_without_foreign_markup(comparison: Comparison) -> None:
    comparison.stages[0] = replace(comparison.stages[0], label="<script>x</script>")
    comparison.warnings.append("<b>careful</b>")
    page = comparison._repr_html_()
    assert "<script" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert page.count("<tr") == 1 + len(comparison.texts()[1])
    assert page.count("<li>") == len(comparison.sentences) + len(comparison.warnings)
    assert "6.71<br>−" in page


def test_tables_need_no_more_than_their_rows() -> None:
    made = tables.frame([{"value": None, "n": 3}, {"stage": "a"}], ("stage", "value", "n", "role"))
    assert list(made.dtypes.astype(str))[1:3] == ["float64", "Int64"]
    assert made.n.tolist()[0] == 3
    assert made.role.isna().all()
    found = re.sub(" +", " ", tables.markdown(["a|b"], [["1\n2"], ["  x"]]))
    assert found.splitlines()[2:] == ["| 1<br>2 |", "| &nbsp;&nbsp;x |"]


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (3, "3"), (12345.6, "12,346"), (0.12345, "0.123")])
def test_numbers_have_few_digits(value: float | None, text: str) -> None:
    assert formats.number(value) == text


# -- at the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_has_depths_and_generations(directory: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    shown = rr("compare", "--generations", directory=directory)
    assert shown.exit_code == 0, shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= width
    assert re.search(r"by depth .* 7\.02 ?/ ?6\.71", shown.stdout)
    bounds = r"[+−]?[\d.,]*\d"
    broken = re.sub(rf"\[{bounds}, ?{bounds}\]|\[{bounds},(?= )|(?<= ){bounds}\](?= )", "", shown.stdout)
    assert not re.search(r"\[[+−\d]|\d\]", broken.partition("Differences")[0])  # no interval breaks inside a bound
    assert "[bold]c[/bold]" in shown.stdout
    assert "Once, g3" in " ".join(shown.stdout.split())
    assert "…" not in shown.stdout


@pytest.mark.parametrize(
    ("name", "flags", "begins"),
    [
        ("a.txt", (), "\n  Metric"),
        ("a.md", (), "| Metric  "),
        ("a.csv", (), "metric,label,"),
        ("a.json", (), '{"schema": "rr.comparison/2"'),
        ("a.tex", (), "% Differences are"),
        ("a.CSV", (), "metric,label,"),
        ("a.md", ("--format", "csv"), "metric,label,"),
        ("a.txt", ("--json",), '{"schema": "rr.comparison/2"'),
        ("new/folder/a.md", (), "| Metric  "),
    ],
)
def test_out_takes_the_place_of_the_screen(directory: Path, name: str, flags: tuple[str, ...], begins: str) -> None:
    shown = rr("compare", "--out", name, *flags, directory=directory)
    assert (shown.exit_code, shown.stdout) == (0, "")
    assert "Comparison: " in shown.stderr
    assert name in shown.stderr.replace("\n", "")
    text = (directory / name).read_text(encoding="utf-8")
    assert text.lstrip().startswith(begins.strip())
    assert [file.name for file in (directory / name).parent.iterdir() if file.name.endswith(".tmp")] == []


def test_formats_on_the_screen_are_those_of_the_file(directory: Path) -> None:
    for form in ("json", "csv", "markdown", "latex"):
        rr("compare", "--format", form, "--out", f"x.{form}", directory=directory)
        shown = rr("compare", "--format", form, directory=directory)
        assert shown.stdout == (directory / f"x.{form}").read_text(encoding="utf-8")
    assert rr("compare", "--json", directory=directory).stdout == (directory / "x.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("form", ["csv", "latex", "parquet"])
def test_generations_and_values_alone_do_not_go_together(directory: Path, form: str) -> None:
    failed = rr("compare", "--generations", "--format", form, directory=directory)
    assert failed.exit_code == 2
    assert "do not go together" in failed.stderr


def test_parquet_goes_to_a_file(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rr("compare", "--out", "a.parquet", directory=directory).exit_code == 0
    assert set(pandas.read_parquet(directory / "a.parquet").stage) == set(STAGES[:4])
    failed = rr("compare", "--format", "parquet", directory=directory)
    assert failed.exit_code == 2
    assert "hint: Name a file: --out FILE.parquet." in failed.stderr
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    failed = rr("compare", "--out", "b.parquet", directory=directory)
    assert failed.exit_code == 1
    assert "rrcli[parquet]" in failed.stderr
    assert not (directory / "b.parquet").exists()


def test_an_out_that_cannot_be_written(directory: Path) -> None:
    (directory / "file").touch()
    failed = rr("compare", "--out", "file/x.md", directory=directory)
    assert failed.exit_code == 1
    assert "file" in failed.stderr


def test_a_failed_gate_ends_with_3_after_the_table(directory: Path) -> None:
    gates = ("--gate", "baseline.perplexity < finetuned_vanilla.perplexity", "--gate", "baseline.perplexity > 1")
    failed = rr("compare", *gates, directory=directory)
    assert failed.exit_code == 3
    assert "Perplexity" in failed.stdout
    assert "does not hold" in failed.stdout
    assert "error: the gate does not hold: 'baseline.perplexity < finetuned_vanilla.perplexity'" in failed.stderr
    value = json.loads(rr("compare", "--json", *gates, directory=directory).stdout)
    assert [gate["holds"] for gate in value["gates"]] == [False, True]
    assert rr("compare", *gates[2:], directory=directory).exit_code == 0


def test_without_generations_there_is_nothing_to_show(tmp_path: Path) -> None:
    value = results("baseline")
    del value["records"]["generations"]
    publish(tmp_path, value)
    failed = rr("compare", "--generations", directory=tmp_path)
    assert failed.exit_code == 1
    assert "hold no generations" in failed.stderr
