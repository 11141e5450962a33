"""From records to numbers: the definitions of the metrics, written out once more by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrcli.evaluation import metrics, stats


def document(
    key: str, nll: list[float], correct: list[int], tokens: int, size: int = 0, words: int = 0
) -> dict[str, Any]:
    size, words = size or 4 * tokens, words or max(1, tokens // 2)
    return {"key": key, "tokens": tokens, "words": words, "bytes": size, "nll": nll, "correct": correct}


def problem(key: str, correct: list[bool], task: str = "chain_sum", strict: list[bool] | None = None) -> dict[str, Any]:
    return {"key": key, "task": task, "correct": correct, "strict": strict or correct, "outputs": ["x"] * len(correct)}


# Very different lengths and levels: a mean of perplexities would be far off.
DOCUMENTS = [
    document("a", [40.0, 30.0], [3, 4], tokens=10, size=47, words=7),
    document("b", [100.0, 90.0], [60, 61], tokens=100, size=391, words=80),
    document("c", [6.0, 8.0], [0, 0], tokens=2, size=9, words=1),
]
PROBLEMS = [
    problem("p", [True, True]),
    problem("q", [False, True], strict=[False, False]),
    problem("r", [False, False], task="leg_counting:max_animals=2"),
    problem("s", [True, False], task="leg_counting:max_animals=2"),
]


def test_perplexity_is_the_exponential_of_nats_per_token() -> None:
    found = metrics.from_records({"documents": DOCUMENTS})
    assert found["perplexity"]["value"] == pytest.approx(math.exp(128 / 112))
    mean_of_perplexities = sum(math.exp(d["nll"][-1] / d["tokens"]) for d in DOCUMENTS) / 3
    assert abs(found["perplexity"]["value"] - mean_of_perplexities) > 1
    assert found["perplexity"]["n"] == 3
    assert found["tokens"]["value"] == 112


def test_perplexity_interval_is_the_ratio_interval_in_nats() -> None:
    documents = [*DOCUMENTS, *(row | {"key": row["key"] + "'"} for row in DOCUMENTS)]
    found = metrics.from_records({"documents": documents})["perplexity"]
    expected = stats.ratio([30.0, 90.0, 8.0] * 2, [10, 100, 2] * 2)
    assert (found["low"], found["high"]) == pytest.approx((math.exp(expected.low or 0), math.exp(expected.high or 0)))
    assert found["low"] < found["value"] < found["high"]


def test_bits_word_and_byte_perplexity() -> None:
    found = metrics.from_records({"documents": DOCUMENTS})
    assert found["bits_per_byte"]["value"] == pytest.approx(128 / (47 + 391 + 9) / math.log(2))
    assert found["byte_perplexity"]["value"] == pytest.approx(math.exp(128 / 447))
    assert found["byte_perplexity"]["value"] == pytest.approx(2 ** found["bits_per_byte"]["value"])
    assert found["word_perplexity"]["value"] == pytest.approx(math.exp(128 / 88))


def test_token_accuracy_is_a_share_of_tokens() -> None:
    documents = [*DOCUMENTS, *(row | {"key": row["key"] + "'"} for row in DOCUMENTS)]
    found = metrics.from_records({"documents": documents})["token_accuracy"]
    assert found["value"] == pytest.approx(100 * 65 / 112)
    expected = stats.ratio([4, 61, 0] * 2, [10, 100, 2] * 2)
    assert (found["low"], found["high"]) == pytest.approx((100 * (expected.low or 0), 100 * (expected.high or 0)))


def test_reasoning_accuracy_overall_strict_and_by_task() -> None:
    found = metrics.from_records({"problems": PROBLEMS})
    wilson = stats.wilson(2, 4)
    assert found["reasoning_accuracy"] == {
        "value": 50.0,
        "low": pytest.approx(100 * wilson.low),
        "high": pytest.approx(100 * wilson.high),
        "n": 4,
    }
    assert found["reasoning_accuracy_strict"]["value"] == 25
    assert found["reasoning_accuracy/chain_sum"]["value"] == 100
    assert found["reasoning_accuracy/leg_counting"]["value"] == 0
    assert found["reasoning_accuracy/leg_counting"]["n"] == 2


def test_two_settings_of_one_generator_are_not_lost() -> None:
    easy = [problem(f"e{i}", [True], task="chain_sum:max_terms=2") for i in range(3)]
    hard = [problem(f"h{i}", [False], task="chain_sum:max_terms=9") for i in range(3)]
    found = metrics.from_records({"problems": easy + hard})
    by_task = [entry for name, entry in found.items() if name.startswith("reasoning_accuracy/")]
    assert sum(entry["n"] for entry in by_task) == 6


def test_by_depth_lists_every_pass_and_ends_with_the_metric_itself() -> None:
    records = {"documents": DOCUMENTS, "problems": PROBLEMS}
    table, final = metrics.by_depth(records), metrics.from_records(records)
    assert {name: len(values) for name, values in table.items()} == {
        "perplexity": 2,
        "token_accuracy": 2,
        "reasoning_accuracy": 2,
    }
    assert table["perplexity"][0]["value"] == pytest.approx(math.exp(146 / 112))
    assert table["token_accuracy"][0]["value"] == pytest.approx(100 * 63 / 112)
    assert table["reasoning_accuracy"][0]["value"] == 50
    for name, values in table.items():
        assert values[-1] == final[name]


def test_by_depth_of_one_kind_of_record() -> None:
    assert set(metrics.by_depth({"documents": DOCUMENTS})) == {"perplexity", "token_accuracy"}
    assert set(metrics.by_depth({"problems": PROBLEMS})) == {"reasoning_accuracy"}


@pytest.mark.parametrize("records", [{}, {"documents": []}, {"documents": [], "problems": [], "generations": []}])
def test_no_records_no_metrics(records: dict[str, list[Any]]) -> None:
    assert metrics.from_records(records) == {}
    assert metrics.by_depth(records) == {}


def test_few_documents_have_no_interval() -> None:
    found = metrics.from_records({"documents": DOCUMENTS})["perplexity"]
    assert found == {"value": pytest.approx(math.exp(128 / 112)), "low": None, "high": None, "n": 3}


def test_an_absurd_loss_does_not_overflow() -> None:
    worst = [document("a", [1e6], [0], tokens=10), document("b", [2e6], [0], tokens=10)]
    assert metrics.from_records({"documents": worst})["perplexity"]["value"] == math.inf


def test_document_totals_take_the_asked_depth() -> None:
    records = {"documents": DOCUMENTS}
    assert metrics.PERPLEXITY.totals(records) == {"a": (30.0, 10), "b": (90.0, 100), "c": (8.0, 2)}
    assert metrics.BITS_PER_BYTE.totals(records, 0)["a"] == (40.0, 47)
    assert metrics.TOKEN_ACCURACY.totals(records)["b"] == (61, 100)


def test_generation_scores_are_means_over_prompts() -> None:
    rows = [
        {"key": "1", "text": "", "distinct_2": 1.0, "rep_4": 0.0, "length": 10, "finished": True},
        {"key": "2", "text": "", "distinct_2": 0.5, "rep_4": 0.5, "length": 30, "finished": False},
    ]
    found = metrics.from_records({"generations": rows})
    assert {name: entry["value"] for name, entry in found.items()} == {
        "distinct_2": 0.75,
        "rep_4": 0.25,
        "length": 20,
        "finished": 0.5,
    }


def naive_distinct(tokens: list[int], n: int) -> float:
    seen: list[list[int]] = []
    count = 0
    for start in range(len(tokens)):
        gram = tokens[start : start + n]
        if len(gram) == n:
            count += 1
            if gram not in seen:
                seen.append(gram)
    return len(seen) / count if count else 1.0


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_distinct_and_rep_agree_with_counting(tokens: list[int], n: int) -> None:
    assert metrics.distinct_n(tokens, n) == pytest.approx(naive_distinct(tokens, n))
    repeats = sum(
        any(tokens[i : i + n] == tokens[j : j + n] for j in range(i)) for i in range(max(0, len(tokens) - n + 1))
    )
    grams = max(0, len(tokens) - n + 1)
    assert metrics.rep_n(tokens, n) == pytest.approx(repeats / grams if grams else 0.0)


def test_a_loop_repeats_and_a_short_text_does_not() -> None:
    assert metrics.rep_n([1, 2] * 20) > 0.9
    assert metrics.rep_n([1, 2, 3]) == 0
    assert metrics.distinct_n([7]) == 1


def test_a_question_of_two_tasks_counts_once_over_all_tasks() -> None:
    asked = [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}]
    problems = [PROBLEMS[0] | asked[0], PROBLEMS[2] | asked[0], PROBLEMS[3] | asked[1]]
    found = metrics.from_records({"problems": problems})
    assert found["reasoning_accuracy"]["n"] == 2
    assert found["reasoning_accuracy/leg_counting"]["n"] == 2
    assert list(metrics.REASONING_ACCURACY.records({"problems": problems})) == [problems[0]["key"], problems[2]["key"]]


def test_every_metric_says_how_it_is_compared() -> None:
    for name, metric in metrics.KNOWN.items():
        assert metric.name == name
        assert metric.better in {"lower", "higher", ""}
        tests = {"documents": "ratio", "problems": "mcnemar", "generations": "", "": ""}
        assert metric.test == tests[metric.part]
        assert bool(metric.field) == bool(metric.part)
        assert bool(metric.size) == (metric.part == "documents")
    assert {name for name, metric in metrics.KNOWN.items() if metric.per_token} == {"perplexity", "token_accuracy"}


def test_a_results_file_names_its_metrics() -> None:
    """In the order in which they are shown, whatever the order of the file."""
    names = [
        *("decode/stability@12", "new_metric", "memory_mb", "stability@2", "stability@1", "commit_rate", "fix_rate"),
        *("harness/gsm8k/exact_match/strict-match", "reasoning_accuracy/b", "reasoning_accuracy/a:x=1/2"),
        *("relevance", "reasoning_accuracy", "perplexity"),
    ]
    first = {name: {"value": 1.0} for name in names}
    first["harness/gsm8k/exact_match/strict-match"]["better"] = "higher"
    found = metrics.metrics_of(first, {"bits_per_byte": {"value": 1.0}, "perplexity": {"value": 2.0}})
    assert [(metric.name, metric.label, metric.task) for metric in found] == [
        ("perplexity", "Perplexity", ""),
        ("bits_per_byte", "Bits per byte", ""),
        ("reasoning_accuracy", "Reasoning accuracy", ""),
        ("reasoning_accuracy/b", "  b", "b"),
        ("reasoning_accuracy/a:x=1/2", "  a:x=1/2", "a:x=1/2"),
        ("harness/gsm8k/exact_match/strict-match", "gsm8k exact_match strict-match", "gsm8k"),
        ("relevance", "Relevance", ""),
        ("memory_mb", "Peak memory", ""),
        ("decode/stability@12", "Stability at pass 12", ""),
        ("commit_rate", "Commit rate, teacher-forced", ""),
        ("stability@2", "Stability at pass 2, teacher-forced", ""),
        ("stability@1", "Stability at pass 1, teacher-forced", ""),
        ("fix_rate", "Fix rate", ""),
        ("new_metric", "New metric", ""),
    ]
    assert (found[5].part, found[5].test, found[5].better) == ("harness", "mcnemar_or_mean", "higher")
    assert [metric.name for metric in found if not metric.compared] == ["new_metric"]


def test_a_task_that_is_alone_is_not_compared_beside_the_overall_accuracy() -> None:
    found = metrics.metrics_of(metrics.from_records({"problems": PROBLEMS[:2]}))
    assert [metric.name for metric in found if metric.compared] == ["reasoning_accuracy"]
    assert [metric.name for metric in found if metric.task] == ["reasoning_accuracy/chain_sum"]


@pytest.mark.parametrize(
    ("name", "records", "score"),
    [
        ("reasoning_accuracy", {"problems": PROBLEMS}, {"p": 1, "q": 1, "r": 0, "s": 0}),
        ("reasoning_accuracy/leg_counting", {"problems": PROBLEMS}, {"r": 0, "s": 0}),
        (
            "harness/arc/acc",
            {
                "harness": [
                    {"key": "1", "task": "arc", "metric": "acc", "score": 0.5},
                    {"key": "2", "task": "arc", "metric": "acc_norm", "score": 0.1},
                    {"key": "3", "task": "arc_easy", "metric": "acc", "score": 0.2},
                ]
            },
            {"1": 0.5},
        ),
        ("rep_4", {"generations": [{"key": "g", "rep_4": 0.25}, {"key": "h", "rep_4": None}]}, {"g": 0.25}),
    ],
)
def test_a_metric_knows_its_records_and_their_scores(
    name: str, records: dict[str, list[Any]], score: dict[str, float]
) -> None:
    others = {"reasoning_accuracy/chain_sum": {"value": 1.0}}
    metric = next(m for m in metrics.metrics_of({name: {"value": 1.0}} | others) if m.name == name)
    assert {key: metric.score(record) for key, record in metric.records(records).items()} == score
