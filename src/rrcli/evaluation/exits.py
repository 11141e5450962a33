"""The frontier of exit rules: what each keeps of accuracy and nats, and what it costs, from one run.

Every position of known text, and every beginning of an answer, is looked at once with all passes; then each rule and
threshold is a choice among what was seen (`exit_answers`), and costs what its positions ran (`exit_costs`). Prefill and
the tokens that have to catch up are counted. Fixed depths are rules like the others, and run every pass for each token.

`random` has the same histogram of passes as `probability` at some threshold: what a rule gains over it, it gains by
knowing where to leave. The `oracle` knows the true token of known text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from rrcli.data.batching import affordable, batches, padded
from rrcli.data.dealing import ALONE, Team, deal
from rrcli.data.prompts import stop_strings
from rrcli.data.tokens import scored_after, text_ids
from rrcli.evaluation import stats
from rrcli.evaluation.answers import problem_prompts
from rrcli.evaluation.exit_answers import Answers, signals_of, together
from rrcli.evaluation.exit_costs import ExitCosts
from rrcli.evaluation.held_out import EvalData
from rrcli.evaluation.judging import judge
from rrcli.evaluation.windows import Window, windows_of
from rrcli.recursion.exits import ExitRule, Kind, Signals
from rrcli.recursion.families import input_device
from rrcli.recursion.readout import Readout
from rrcli.recursion.signals import draws, exit_passes
from rrcli.reporting import Reporter
from rrcli.settings import EvalSettings

SURE = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999)
THRESHOLDS: dict[Kind, tuple[float, ...]] = {
    "probability": SURE,
    "margin": SURE,
    "head": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99),
}
# At which shares of all changes the thresholds of `contraction` are.
CHANGES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.98)


@dataclass(frozen=True)
class Point:
    """One rule at one threshold.

    Attributes:
        like: of `random` alone: the rule that has the same histogram of passes.
        accuracy: share of problems answered right, with Wilson's interval; None without problems, and for the oracle.
        passes: mean passes after pass 0 of a new token. mflop: of an answer, prompt included, on average.
        nats: of a token of known text; None without documents. text_passes, text_mflop: of such a token.
        hits: for each problem, whether it was answered right. text_nats, text_tokens: the sums for each document.
    """

    rule: ExitRule
    like: ExitRule | None = None
    _: KW_ONLY
    accuracy: stats.Estimate | None = None
    passes: float | None = None
    mflop: float | None = None
    nats: float | None = None
    text_passes: float | None = None
    text_mflop: float | None = None
    hits: tuple[bool, ...] = ()
    text_nats: tuple[float, ...] = ()
    text_tokens: tuple[int, ...] = ()

    @property
    def cost(self) -> float:
        """What rules are compared by: FLOPs where they are known, else passes; of answers if there are any."""
        for value in (self.mflop, self.passes, self.text_mflop, self.text_passes):
            if value is not None:
                return value
        return math.inf

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        entry: dict[str, Any] | None = None
        if self.accuracy is not None:
            values = {name: getattr(self.accuracy, name) for name in ("value", "low", "high")}
            entry = {name: None if value is None else 100 * value for name, value in values.items()}
            entry["n"] = self.accuracy.n
        numbers = {name: getattr(self, name) for name in ("passes", "mflop", "nats", "text_passes", "text_mflop")}
        shares = {"shares": list(self.rule.shares)} if self.rule.shares else {}
        like = {"like": str(self.like)} if self.like else {}
        return {"name": str(self.rule), **self.rule.to_dict(), **like, **shares, "accuracy": entry, **numbers}


@dataclass(frozen=True)
class Texts:
    """What every pass says of known text, row by row; a row is a window of a document.

    Attributes:
        losses: `[passes, n]` in nats. lengths: the tokens of each row. documents: the number of each row's document.
    """

    losses: Tensor
    passes: list[Signals]
    lengths: list[int]
    documents: list[int]

    def by_document(self, values: Tensor) -> tuple[float, ...]:
        """Return the sums over the documents that have tokens of `[n]` values, one for each token."""
        numbers = torch.tensor(self.documents).repeat_interleave(torch.tensor(self.lengths))
        found, places = numbers.unique(return_inverse=True)
        return tuple(torch.zeros(len(found), dtype=torch.float64).index_add(0, places, values.double()).tolist())


class Frontier:
    """Everything that rules are measured on, on one side of the split.

    Args:
        costs: None where leaving early saves nothing, or where it cannot be counted.
        team: the processes among which batches are dealt out; all of them have all that was seen.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        data: EvalData,
        *,
        settings: EvalSettings,
        reporter: Reporter,
        costs: ExitCosts | None,
        team: Team = ALONE,
    ) -> None:
        self.data, self.costs, self.depth = data, costs, model.recursion.depth
        self.tasks = {task.spec: task for task in data.tasks}
        self.answers: Answers | None = None
        self.texts: Texts | None = None
        self._right: dict[tuple[int, tuple[int, ...]], bool] = {}
        documents = data.texts(tokenizer, settings)
        if documents and not settings.skip_perplexity:
            self.texts = _read_texts(model, tokenizer, documents, settings=settings, reporter=reporter, team=team)
        if data.problems and not settings.skip_reasoning:
            _, prompts = problem_prompts(model, tokenizer, data, settings=settings, reporter=reporter)
            self.answers = Answers(
                model, tokenizer, prompts, settings, stop_strings(settings.stop), reporter, team=team
            )

    def rules(self) -> list[ExitRule]:
        """Return the rules and thresholds that are compared; those of `contraction` depend on the model."""
        found = [ExitRule("depth", depth) for depth in range(self.depth + 1)]
        found += [ExitRule(kind, value) for kind, values in THRESHOLDS.items() for value in values]
        if self.depth > 1:  # with one pass after pass 0, there is nothing to leave after it
            found.append(ExitRule("unchanged"))
            seen = self.texts.passes if self.texts else self.answers.passes() if self.answers else []
            if seen:
                changes = torch.cat([one.change.flatten() for one in seen[1:]]).quantile(torch.tensor(CHANGES))
                found += [ExitRule("contraction", value) for value in sorted({float(f"{c:.2g}") for c in changes})]
        return found

    def measure(self, rules: Sequence[ExitRule], *, controls: bool = True) -> list[Point]:
        """Measure rules.

        Args:
            controls: measure for each threshold of `probability` also `random` with the same histogram, and the oracle.
        """
        like = [number for number, rule in enumerate(rules) if controls and rule.kind == "probability"]
        random = [Point(ExitRule("random"), rules[number]) for number in like]
        oracle = [Point(ExitRule("oracle"))] if controls and self.texts else []
        rows = [[*(Point(rule) for rule in rules), *random, *oracle]]
        if self.texts is not None:
            rows.append(self._measure_texts(rules, like, [point.rule for point in oracle]))
        if self.answers is not None:
            rows.append(self._measure_answers(rules, like) + oracle)
        return [_merged(parts) for parts in zip(*rows, strict=True)]

    def _measure_answers(self, rules: Sequence[ExitRule], like: Sequence[int]) -> list[Point]:
        assert self.answers is not None
        found = self.answers.under(rules)
        control = [
            ExitRule("random", shares=_shares([p for a in found[n] for p in a.passes], self.depth)) for n in like
        ]
        found += self.answers.under(control)
        points = []
        for rule, answers in zip([*rules, *control], found, strict=True):
            hits = tuple(self._judge(number, answer.tokens) for number, answer in enumerate(answers))
            share = stats.wilson(sum(hits), len(answers))
            passes = [left for answer in answers for left in answer.passes]
            flops = None
            if self.costs is not None:
                prompts = self.answers.prompts
                costs = [self.costs.of(len(p), a.passes) for p, a in zip(prompts, answers, strict=True)]
                flops = sum(costs) / len(costs) / 1e6
            points.append(Point(rule, accuracy=share, passes=sum(passes) / len(passes), mflop=flops, hits=hits))
        return points

    def _measure_texts(self, rules: Sequence[ExitRule], like: Sequence[int], oracle: Sequence[ExitRule]) -> list[Point]:
        assert self.texts is not None
        texts, points = self.texts, []
        found = [exit_passes(rule, texts.passes) for rule in rules]
        control = [ExitRule("random", shares=_shares(found[n].tolist(), self.depth)) for n in like]
        extra = [*control, *oracle]
        tokens = tuple(map(int, texts.by_document(torch.ones_like(texts.losses[0]))))
        for rule, left in zip([*rules, *extra], [*found, *(exit_passes(r, texts.passes) for r in extra)], strict=True):
            losses = texts.losses.gather(0, left[None])[0]
            flops = None
            if self.costs is not None:
                rows = left.split(texts.lengths)
                flops = sum(self.costs.of(1, row.tolist()) for row in rows) / len(left) / 1e6
            points.append(
                Point(
                    rule,
                    nats=float(losses.double().mean()),
                    text_passes=float(left.double().mean()),
                    text_mflop=flops,
                    text_nats=texts.by_document(losses),
                    text_tokens=tokens,
                )
            )
        return points

    def _judge(self, number: int, tokens: tuple[int, ...]) -> bool:
        assert self.answers is not None
        if (number, tokens) not in self._right:
            problem = self.data.problems[number]
            judged = judge(self.tasks[problem.task], problem, self.answers.cut(number, tokens))
            self._right[number, tokens] = judged.correct
        return self._right[number, tokens]


def _merged(parts: Sequence[Point]) -> Point:
    """Return one point with all that several measured of the same rule."""
    values: dict[str, Any] = {}
    for part in parts:
        values |= {name: value for name, value in vars(part).items() if value not in (None, ())}
    return Point(**values)


def _shares(passes: Sequence[int], depth: int) -> tuple[float, ...]:
    return tuple(passes.count(k) / len(passes) for k in range(depth + 1))


def _read_texts(
    model: Any, tokenizer: Any, documents: Sequence[str], *, settings: EvalSettings, reporter: Reporter, team: Team
) -> Texts:
    """Score every token of every document with all passes; a row is a window of a document."""
    readout = Readout(model)
    encoded = [scored_after(tokenizer, text_ids(tokenizer, text)) for text in documents]
    windows = windows_of(model, encoded, settings=settings, reporter=reporter)
    if (warning := readout.choose_way(*padded([windows[0].ids], input_device(model)))) is not None:
        reporter.warn(warning)
    token_bytes = readout.bytes_per_token(len(windows[0].ids))
    budget = affordable(model, settings.batch_tokens, token_bytes, reporter, team=team)

    def read(batch: list[Window]) -> tuple[Tensor, list[Signals]]:
        ids, mask = padded([window.ids for window in batch], input_device(model))
        scored = torch.zeros_like(mask, dtype=torch.bool)
        for row, window in enumerate(batch):
            scored[row, len(window.ids) - len(window.targets) : len(window.ids)] = True
        targets = torch.tensor([token for window in batch for token in window.targets], device=ids.device)
        scores = readout.score(ids, mask, scored, targets=targets)
        places = [(window.document, place) for window in batch for place in range(len(window.targets))]
        numbers, positions = torch.tensor(places).T
        return scores.losses.cpu(), signals_of(model.recursion, scores, draws(numbers, positions), targets)

    losses, passes, lengths, numbers_of = [], [], [], list[int]()
    with reporter.progress("texts", sum(len(window.targets) for window in windows), "tokens") as progress:
        for batch, (found, seen) in deal(batches(windows, budget, lambda window: len(window.ids)), read, team):
            losses.append(found)
            passes.append(seen)
            lengths += [len(window.targets) for window in batch]
            numbers_of += [window.document for window in batch]
            progress.advance(sum(len(window.targets) for window in batch))
    return Texts(torch.cat(losses, 1), together(passes), lengths, numbers_of)
