"""Tables of pandas: values as a data frame, and texts as a table in Markdown, LaTeX or HTML.

pandas is loaded when a table is made, and not before: it takes a second that a plain `rr compare` does not need.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rrcli.errors import RRError

if TYPE_CHECKING:
    from pandas import DataFrame

# Columns that hold no texts, by their type in pandas. The types of whole numbers and of truth values are those that can
# be missing, so that 3 does not become 3.0.
NUMBER, WHOLE, TRUTH = "float64", "Int64", "boolean"
NUMBERS = (
    *("value", "low", "high", "difference", "difference_low", "difference_high", "confidence", "p_value", "p_adjusted"),
    *("nll", "score", "distinct_2", "rep_4", "relevance"),
)
WHOLES = (
    *("seed", "depth", "n", "step", "tokens", "bytes", "words", "hits", "length", "passes"),
    *("samples", "samples_right"),
)
TRUTHS = ("final", "correct", "strict", "ended", "lookup", "finished")
TYPES = dict.fromkeys(NUMBERS, NUMBER) | dict.fromkeys(WHOLES, WHOLE) | dict.fromkeys(TRUTHS, TRUTH)
# What is markup in Markdown, or in the HTML that it may hold; a backslash before it takes that meaning away.
MARKUP = re.compile(r"[\\`*_{}\[\]<>#|~$&!]")
# What LaTeX's fonts may lack.
LATEX_SIGNS = {"↓": r"$\downarrow$", "↑": r"$\uparrow$", "−": "$-$"}


def frame(rows: Iterable[Mapping[str, Any]], columns: Iterable[str], numbers: Collection[str] = ()) -> DataFrame:
    """Return a data frame with a row for each mapping; what a mapping lacks, or has as None, is missing.

    Args:
        numbers: columns that hold numbers here and texts elsewhere.
    """
    import pandas

    rows, types = list(rows), TYPES | dict.fromkeys(numbers, NUMBER)
    made = {}
    for name in columns:
        values = [row.get(name) for row in rows]
        empty = "object" if all(value is None for value in values) else None
        made[name] = pandas.Series(values, dtype=types.get(name, empty))
    return pandas.DataFrame(made)


def csv_text(made: DataFrame) -> str:
    """Return a data frame as CSV, without its index; numbers have all their digits."""
    return str(made.to_csv(index=False, lineterminator="\n"))


def check_parquet() -> None:
    """Check that parquet can be written.

    Raises:
        RRError: the library is not installed.
    """
    if find_spec("pyarrow") is None:
        raise RRError("a .parquet file needs pyarrow", "pip install 'rrcli[parquet]'")


def parquet(made: DataFrame) -> bytes:
    """Return a data frame as the bytes of a parquet file, without its index."""
    file = io.BytesIO()
    made.to_parquet(file, index=False)
    return file.getvalue()


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, foreign: bool = False) -> str:
    """Return texts as a table in Markdown; a line break in a text becomes <br>, and space at its begin is kept.

    Args:
        foreign: whether the texts below the header are those of models and data sets.
    """
    made = _texts(header, rows, foreign_in_markdown if foreign else _in_markdown, in_markdown)
    align = ("left", *["left" if foreign else "right"] * (len(header) - 1))
    return str(made.to_markdown(index=False, colalign=align, disable_numparse=True))


def latex(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return texts as a table in LaTeX (package booktabs); each line of a text has a row of its own."""
    lines = []
    for row in rows:
        parts = [text.split("\n") for text in row]
        lines += [[part[n] if n < len(part) else "" for part in parts] for n in range(max(map(len, parts)))]
    made = _texts(header, lines, str)
    text = str(made.to_latex(index=False, escape=True, column_format="l" + "r" * (len(header) - 1)))
    for sign, command in LATEX_SIGNS.items():
        text = text.replace(sign, command)
    return text


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return texts as a table in HTML, in which no text is markup."""
    import pandas

    made = _texts(header, rows, in_html, in_html)
    with pandas.option_context("display.max_colwidth", None):  # else long texts are cut
        return str(made.to_html(index=False, escape=False, border=0))


def in_markdown(text: str) -> str:
    """Return a text so that it fits into one cell of a Markdown table, or one item of a list."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\r", "").replace("\n", "<br>")


def foreign_in_markdown(text: str) -> str:
    """Return a text of a model or a data set so that Markdown shows it to the letter, with its line breaks."""
    return MARKUP.sub(r"\\\g<0>", text).replace("\r", "").replace("\n", "<br>")


def in_html(text: str) -> str:
    """Return a text as HTML shows it to the letter, with its line breaks."""
    return html.escape(text).replace("\n", "<br>")


def _in_markdown(text: str) -> str:
    bare = text.lstrip(" ")
    return "&nbsp;" * (len(text) - len(bare)) + in_markdown(bare)


def _texts(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    write: Callable[[str], str],
    heading: Callable[[str], str] = str,
) -> DataFrame:
    import pandas

    rows = [[write(text) for text in row] for row in rows]
    return pandas.DataFrame(rows, columns=[heading(text) for text in header])
