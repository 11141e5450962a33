"""The date that a chat template writes is one day for a whole experiment: that of its first evaluation or training."""

from __future__ import annotations

import copy
import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils as templates

from rrcli.configuration import load
from rrcli.demo import MODEL_DIR
from rrcli.errors import RRError, UsageError
from rrcli.experiment import template_date as dates
from rrcli.experiment.identity import data_identity
from rrcli.experiment.planning import status_of
from rrcli.experiment.replicates import Replicate
from rrcli.experiment.template_date import FILE, fix_date, with_template_date
from rrcli.experiment.training_run import prepare_training
from rrcli.files import combine
from rrcli.models.loading import load_tokenizer
from rrcli.models.source import ModelSource, resolve
from rrcli.reporting import Silent
from rrcli.services.eval import evaluate
from rrcli.settings import CommonSettings, EvalSettings, TrainSettings

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
DATED = "Today: {{ strftime_now('%d %b %Y') }}\n" + TURNS
TODAY, TOMORROW = datetime.datetime(2026, 7, 3, 22), datetime.datetime(2026, 7, 4, 1)
MESSAGES = [{"role": "user", "content": "Where?"}]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets the day, for transformers' templates and for the experiment."""

    def set_day(moment: datetime.datetime) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return moment

        class Day(datetime.date):
            @classmethod
            def today(cls) -> Any:
                return moment.date()

        monkeypatch.setattr(templates, "datetime", Clock)
        monkeypatch.setattr(dates, "date", Day)

    set_day(TODAY)
    return set_day


def with_template(folder: Path, template: str) -> Path:
    shutil.copytree(MODEL_DIR, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def measured(model: Path, directory: Path, **options: Any) -> dict[str, Any]:
    settings = EvalSettings(
        model=str(model), problems=1, max_new_tokens=4, skip_perplexity=True, skip_generation=True,
        skip_performance=True, tensorboard=False, task=("chain_sum",), **options,
    )  # fmt: skip
    return evaluate(settings, "baseline", directory, Silent()).results


def test_two_days_ask_the_same_question(tmp_path: Path, now: Any) -> None:
    model = with_template(tmp_path / "model", DATED)
    first = measured(model, tmp_path)
    assert first["records"]["problems"][0]["prompt"].startswith("Today: 03 Jul 2026\n")
    assert (tmp_path / FILE).read_text() == "2026-07-03\n"
    now(TOMORROW)
    second = measured(model, tmp_path)
    assert second["records"]["problems"] == first["records"]["problems"]
    assert second["inputs"] == first["inputs"]
    assert second["settings"]["template_date"] == "2026-07-03"
    options = {name: first["settings"][name] for name in ("problems", "max_new_tokens", "skip_perplexity", "task")}
    options |= {"skip_generation": True, "skip_performance": True, "model": str(model)}
    plan = lambda cls: cls(**{k: v for k, v in options.items() if k in cls.__dataclass_fields__})  # noqa: E731
    assert status_of("eval", Replicate("baseline", 0), tmp_path, plan).status == "done"
    training = prepare_training(TrainSettings(model=str(model)), "vanilla", tmp_path)
    assert training.settings.template_date == "2026-07-03"
    other = measured(model, tmp_path, template_date="2026-01-02")
    assert other["records"]["problems"][0]["prompt"].startswith("Today: 02 Jan 2026\n")
    assert other["inputs"] != first["inputs"]


def test_training_may_be_what_comes_first(tmp_path: Path, now: Any) -> None:
    model = with_template(tmp_path / "model", DATED)
    training = prepare_training(TrainSettings(model=str(model)), "vanilla", tmp_path)
    assert (tmp_path / FILE).read_text() == "2026-07-03\n"
    now(TOMORROW)
    assert prepare_training(TrainSettings(model=str(model)), "vanilla", tmp_path).inputs == training.inputs


def test_a_tokenizer_and_its_copies_write_the_day_they_are_given(tmp_path: Path, now: Any) -> None:
    tokenizer = load_tokenizer(ModelSource("model", with_template(tmp_path / "model", DATED)))
    fix_date(tokenizer, "2025-12-31")
    for one in (tokenizer, copy.deepcopy(tokenizer)):  # lm-eval gets a copy
        text = one.apply_chat_template(MESSAGES, tokenize=False)
        assert text.startswith("Today: 31 Dec 2025\n")
    assert (
        tokenizer.apply_chat_template(MESSAGES)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    )
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == DATED


@pytest.mark.parametrize("begin", ["", " ", "\n", "\n\n ", "  {%- if true %} x {% endif %}", "{# #}\n"])
@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d", "%-d. %B %y, %A", "%x %e %j %p"])
def test_the_text_is_what_the_template_writes_on_that_day(begin: str, form: str, tmp_path: Path, now: Any) -> None:
    """To the last space: a macro is put before the template."""
    template = begin + '{% if strftime_now is defined %}{% set day = strftime_now("' + form + '") %}{% endif %}'
    template += "{% macro said() %}<{{ strftime_now('%Y')|int + 1 }}>{% endmacro %} {{ said() }}{{ day }}\n" + TURNS
    tokenizer = load_tokenizer(ModelSource("model", with_template(tmp_path / "model", template)))
    now(TODAY.replace(hour=0))
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert TODAY.replace(hour=0).strftime(form) in text
    now(TOMORROW)
    fix_date(tokenizer, "2026-07-03")
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == text


def test_without_a_date_in_the_template_nothing_changes(tmp_path: Path, now: Any) -> None:
    """Results that were made before there was such an option stay what they are."""
    model = resolve(str(with_template(tmp_path / "model", TURNS)), tmp_path)
    for settings in (EvalSettings(), TrainSettings()):
        assert with_template_date(settings, model, tmp_path) == settings
    assert not (tmp_path / FILE).exists()
    before = data_identity(EvalSettings(), tmp_path)
    (tmp_path / FILE).write_text("2026-07-03\n")
    assert data_identity(EvalSettings(), tmp_path) != before
    from rrcli.data.splits import SPLIT_RULE
    from rrcli.data.training_data import source_fingerprint, task_specs

    fingerprint = source_fingerprint(EvalSettings(), tmp_path)
    assert before == combine(SPLIT_RULE, fingerprint, task_specs(EvalSettings()))


@pytest.mark.parametrize(
    "place", ["tokenizer_config.json", "additional_chat_templates/rag.jinja", "chat_template.json"]
)
def test_the_date_is_found_wherever_a_template_may_be(place: str, tmp_path: Path, now: Any) -> None:
    folder = with_template(tmp_path / "model", TURNS)
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_text(json.dumps({"chat_template": DATED}))
    source = ModelSource("model", folder)
    assert with_template_date(EvalSettings(chat_template=False), source, tmp_path).template_date == ""
    assert with_template_date(EvalSettings(), source, tmp_path).template_date == "2026-07-03"


def test_what_is_no_date_is_named(tmp_path: Path) -> None:
    source = ModelSource("model", MODEL_DIR)
    with pytest.raises(UsageError, match=r"--template-date is '3\.7\.2026'"):
        with_template_date(EvalSettings(template_date="3.7.2026"), source, tmp_path)
    (tmp_path / FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(RRError, match=r"template_date\.txt does not hold the date"):
        data_identity(load(CommonSettings, tmp_path), tmp_path)
