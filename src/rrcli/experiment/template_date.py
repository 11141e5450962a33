"""The day that a chat template writes as today's: one day for a whole experiment.

Some templates write today's date into the system turn, through the function `strftime_now` that transformers hands to
every template. Stages that are measured on two days would then be asked other prompts, and training would show a third.
So the first evaluation or training keeps its day in `template_date.txt`, and every later one uses it; the option
`template_date` names another. The day reaches the numbers: where there is one, it is part of their inputs. Loads no
torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any, TypeVar

from rrcli.errors import RRError, UsageError
from rrcli.files import write_text
from rrcli.models.source import ModelSource, base_of
from rrcli.settings import CommonSettings, EvalSettings, TrainSettings, with_changes

FILE = "template_date.txt"
# How templates ask for the date.
FUNCTION = "strftime_now"
TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")
# What a format of `strftime` may hold, the longer ones first; %% stays as it is.
DIRECTIVES = (*("-d", "-m", "-H", "-I", "-M", "-S", "-j", "-y"), *"aAbBcdDeFGHIjmMnpSTuUVwWxXyYzZ")
# The named templates of a tokenizer that has several.
TEMPLATE_FOLDER = "additional_chat_templates"
# A GGUF file keeps its template before its tensors; vocabularies, which may come first, take a few MiB.
GGUF_HEAD = 2**26

Dated = TypeVar("Dated", EvalSettings, TrainSettings)


def template_date(settings: CommonSettings, directory: Path) -> str:
    """Return the day of the experiment as YYYY-MM-DD: the option's, else the kept one, else ''.

    Raises:
        UsageError: the option is no date. RRError: the file of the kept one holds none.
    """
    if settings.template_date:
        try:
            return date.fromisoformat(settings.template_date).isoformat()
        except ValueError as error:
            raise UsageError(
                f"--template-date is '{settings.template_date}'", "Write it as year-month-day, such as 2026-07-31."
            ) from error
    file = directory / FILE
    try:
        return date.fromisoformat(file.read_text(encoding="utf-8").strip()).isoformat()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:
        raise RRError(
            f"{file} does not hold the date of the experiment", "Write year-month-day into it, such as 2026-07-31."
        ) from error


def with_template_date(settings: Dated, source: ModelSource, directory: Path) -> Dated:
    """Return the settings with the experiment's day; the first time that a template asks for it, keep today.

    Args:
        source: the model that is measured or trained.
    """
    day = template_date(settings, directory)
    if not day and settings.chat_template and _asks_for_date(source, directory):
        day = date.today().isoformat()
        write_text(directory / FILE, day + "\n")
    return with_changes(settings, template_date=day)


def fix_date(tokenizer: Any, day: str) -> None:
    """Let the chat template of `tokenizer` take `day`, YYYY-MM-DD, for today; '' leaves it as it is.

    A macro in front of the template hides transformers' own function. The template that the tokenizer has, and saves,
    stays the same.
    """
    if not day or FUNCTION not in str(tokenizer.chat_template):
        return
    macro, own = _macro(datetime.fromisoformat(day)), tokenizer.apply_chat_template

    def apply_chat_template(conversation: Any, tools: Any = None, *args: Any, **options: Any) -> Any:
        template = tokenizer.get_chat_template(options.pop("chat_template", None), tools)
        return own(conversation, tools, *args, chat_template=macro + template, **options)

    vars(tokenizer)["apply_chat_template"] = apply_chat_template


def _macro(moment: datetime) -> str:
    """Return a macro of Jinja that formats `moment` as `strftime` does."""
    values = {f"%{directive}": moment.strftime(f"%{directive}") for directive in DIRECTIVES}
    replaced = "".join(f" | replace({text!r}, {value!r})" for text, value in values.items())
    # Jinja drops one line break after a block, as it is set up by transformers: the template begins a line.
    return f"{{% macro {FUNCTION}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"


def _asks_for_date(source: ModelSource, directory: Path) -> bool:
    """Tell whether a chat template of a model, or of the base that it refers to, asks for the date."""
    places = {source.path, base_of(source, directory).path}
    return any(FUNCTION.encode() in text for place in places for text in _templates(place))


def _templates(place: Path) -> Iterator[bytes]:
    """Yield the contents of the files of a model that may hold a chat template."""
    if place.is_file():
        with place.open("rb") as file:
            yield file.read(GGUF_HEAD)
        return
    for file_path in (*(place / name for name in TEMPLATE_FILES), *(place / TEMPLATE_FOLDER).glob("*.jinja")):
        if file_path.is_file():
            yield file_path.read_bytes()
