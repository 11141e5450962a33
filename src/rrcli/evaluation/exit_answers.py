"""The answers that a model gives under any number of exit rules, from few forwards.

Under a rule the next token is a function of the text so far. So all rules walk through one tree: a node is the
beginning of an answer, and holds what every pass says about the next token. Nodes are filled by reading known text:
first the answers at depth 0 and at the full depth, then what a rule wrote that is in neither, with a guess of how it
goes on. A wrong guess costs a little time and changes nothing. Most rules write what one of the depths writes, so a
rule more costs next to nothing.

Answers are those of decoding token by token without a cache. Chunked decoding writes the same ones, up to ties and
rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import repeat
from typing import Any

import torch

from rrcli.data.batching import affordable, batches, halving, padded
from rrcli.data.dealing import ALONE, Team, deal
from rrcli.data.tokens import end_tokens
from rrcli.errors import RRError
from rrcli.evaluation.decoding import Ends, decode
from rrcli.evaluation.tracing import pieces
from rrcli.recursion.exits import ExitRule, Signals
from rrcli.recursion.families import input_device
from rrcli.recursion.readout import Readout, Scores
from rrcli.recursion.signals import draws, exit_passes, look
from rrcli.reporting import Reporter
from rrcli.settings import EvalSettings


@dataclass(frozen=True)
class Answer:
    """What was written after one prompt.

    Attributes:
        tokens: the new ids, without the end token. passes: with which pass each new id left, also the end token.
        ended: True if an end token or a stop string ended it, False if it reached the most new tokens.
    """

    tokens: tuple[int, ...]
    passes: tuple[int, ...]
    ended: bool


@dataclass
class Answers:
    """A tree of beginnings for each prompt; see the module's docstring.

    Args:
        prompts: token ids. stop: texts that end an answer.
        decoded: answers that are known already: depth -> number of the prompt -> new tokens.
        team: the processes among which batches are dealt out; all of them have the whole tree.
    """

    model: Any
    tokenizer: Any
    prompts: Sequence[list[int]]
    settings: EvalSettings
    stop: Sequence[str]
    reporter: Reporter
    decoded: Mapping[int, Mapping[int, Sequence[int]]] = field(default_factory=dict)
    team: Team = ALONE
    _nodes: dict[tuple[int, tuple[int, ...]], int] = field(default_factory=dict)
    _passes: list[Signals] = field(default_factory=list)
    _guesses: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ends = Ends(self.tokenizer, end_tokens(self.model, self.tokenizer), self.stop)
        self._readout, self._ended = Readout(self.model), dict[tuple[int, tuple[int, ...]], bool]()
        self._budget = 0

    def passes(self) -> list[Signals]:
        """Return what every pass says at all beginnings that are known so far."""
        if not self._nodes:
            self._begin()
        return self._passes

    def under(self, rules: Sequence[ExitRule]) -> list[list[Answer]]:
        """Return for each rule the answer to every prompt.

        Raises:
            RRError: memory runs out for a single prompt.
        """
        if not self._nodes:
            self._begin()
        while True:
            missing: dict[tuple[int, tuple[int, ...]], None] = {}
            found = [self._walk(rule, missing) for rule in rules]
            if not missing:
                return found
            self._read([(number, known, self._guess(number, known)) for number, known in missing])

    def _begin(self) -> None:
        """Read the answers to every prompt at depth 0 and at the full depth; decode those that are not known."""
        texts = []
        for depth in (0, self.model.recursion.depth):
            found = {number: tuple(tokens) for number, tokens in self.decoded.get(depth, {}).items()}
            missing = [number for number in range(len(self.prompts)) if number not in found]
            decoded = decode(
                self.model, self.tokenizer, [self.prompts[number] for number in missing], depth=depth,
                new_tokens=self.settings.max_new_tokens, batch_tokens=self.settings.batch_tokens, stop=self.stop,
                team=self.team,
            )  # fmt: skip
            found |= {missing[one.number]: tuple(one.tokens) for batch in decoded for one in batch}
            self._guesses |= found
            texts += [(number, (), found[number]) for number in range(len(self.prompts))]
        self._read(texts)

    def _guess(self, number: int, known: tuple[int, ...]) -> tuple[int, ...]:
        """Guess how an answer goes on: as the one at the full depth does from the same place on."""
        return self._guesses[number][len(known) :]

    def _walk(self, rule: ExitRule, missing: dict[tuple[int, tuple[int, ...]], None]) -> list[Answer]:
        """Follow a rule from every prompt, and note the beginnings at which nothing is known yet."""
        left = exit_passes(rule, self._passes)
        tokens = torch.stack([seen.prediction for seen in self._passes]).gather(0, left[None])[0].tolist()
        passes, answers = left.tolist(), []
        for number in range(len(self.prompts)):
            known: tuple[int, ...] = ()
            taken, ended = list[int](), False
            while not ended and len(known) < self.settings.max_new_tokens:
                node = self._nodes.get((number, known))
                if node is None:
                    missing[number, known] = None
                    break
                taken.append(passes[node])
                ended = tokens[node] in self._ends.tokens
                if not ended:
                    known = (*known, tokens[node])
                    ended = self._stopped(number, known)
            answers.append(Answer(known, tuple(taken), ended))
        return answers

    def _stopped(self, number: int, known: tuple[int, ...]) -> bool:
        """Tell whether an answer so far completes a stop string."""
        if not self.stop:
            return False
        if (number, known) not in self._ended:
            self._ended[number, known] = self._ends.cut(self.text(number, known))[1]
        return self._ended[number, known]

    def text(self, number: int, tokens: Sequence[int]) -> str:
        """Return the text of an answer, with its stop string if it has one."""
        return self._ends.text_after(self.prompts[number], list(tokens))

    def cut(self, number: int, tokens: Sequence[int]) -> str:
        """Return the text of an answer up to its stop string."""
        return self._ends.cut(self.text(number, tokens))[0]

    def pieces(self, number: int, answer: Answer) -> list[tuple[str, int]]:
        """Return the pieces of an answer's text up to its stop string, each with the pass that it left with."""
        tokens = zip(answer.tokens, answer.passes, repeat(False), strict=False)  # the end token has a pass, and no text
        made = pieces(
            self.tokenizer, tokens, stop=self.stop, prompt=self.prompts[number], ends=self._ends.tokens
        )  # fmt: skip
        return [(piece.text, piece.passes) for piece in made]

    def _read(self, texts: Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]]) -> None:
        """Read beginnings with their guesses, and note what every pass says after the beginning and each guessed token.

        Args:
            texts: prompt's number, known beginning, guess.
        """
        rows = sorted(texts, key=lambda row: -self._length(row))
        if not self._budget:
            longest = self._length(rows[0])
            token_bytes = self._readout.bytes_per_token(longest)
            first = padded([(self._ids(rows[0]))], input_device(self.model))
            if (warning := self._readout.choose_way(*first)) is not None:
                self.reporter.warn(warning)
            tokens = self.settings.batch_tokens
            self._budget = affordable(self.model, tokens, token_bytes, self.reporter, team=self.team)
        cut = batches(rows, self._budget, self._length)
        for _, parts in deal(cut, lambda batch: halving(self._read_batch, batch, self._too_large), self.team):
            for part in parts:
                self._add(part)

    def _ids(self, row: tuple[int, tuple[int, ...], tuple[int, ...]]) -> list[int]:
        return [*self.prompts[row[0]], *row[1], *row[2]]

    def _length(self, row: tuple[int, tuple[int, ...], tuple[int, ...]]) -> int:
        return len(self._ids(row))

    def _too_large(self, row: tuple[int, tuple[int, ...], tuple[int, ...]]) -> RRError:
        return RRError(f"memory runs out for a single row of {self._length(row)} tokens", "Use a smaller --dtype.")

    def _read_batch(
        self, batch: list[tuple[int, tuple[int, ...], tuple[int, ...]]]
    ) -> tuple[list[tuple[int, tuple[int, ...]]], list[Signals]]:
        ids, mask = padded([self._ids(row) for row in batch], input_device(self.model))
        scored, keys = torch.zeros_like(mask, dtype=torch.bool), []
        for place, (number, known, guess) in enumerate(batch):
            first = len(self.prompts[number]) + len(known) - 1
            scored[place, first : first + len(guess) + 1] = True
            keys += [(number, (*known, *guess[:count])) for count in range(len(guess) + 1)]
        targets = ids.roll(-1, 1)[scored]  # any token will do: the losses are not used
        scores = self._readout.score(ids, mask, scored, targets=targets)
        rows, places = torch.tensor([[number, len(known)] for number, known in keys]).T
        return keys, signals_of(self.model.recursion, scores, draws(rows, places))

    def _add(self, part: tuple[list[tuple[int, tuple[int, ...]]], list[Signals]]) -> None:
        keys, passes = part
        count = len(self._passes[0].prediction) if self._passes else 0
        self._passes = together([self._passes, passes] if self._passes else [passes])
        for place, key in enumerate(keys, start=count):
            self._nodes.setdefault(key, place)


def signals_of(
    recursion: Any, scores: Scores, draw: torch.Tensor, targets: torch.Tensor | None = None
) -> list[Signals]:
    """Return the signals of every pass at the n positions of some scores, on the CPU and without the states.

    Args:
        draw: `[n]`, see `signals.draws`. targets: `[n]` the true tokens, if they are known.
    """
    names = [item.name for item in fields(Signals) if item.name not in ("step", "right")]
    found, before = list[Signals](), None
    for step, (top, state) in enumerate(zip(scores.tops, scores.states, strict=True)):
        before = look(recursion, step, top, state=state, draw=draw.to(top[0].device), before=before)
        right = None if targets is None else scores.predictions[step].eq(targets).cpu()
        tensors = {name: getattr(before, name) for name in names}
        tensors |= {"state": before.state[:, :0], "prediction": scores.predictions[step]}
        found.append(Signals(step=step, right=right, **{name: tensor.cpu() for name, tensor in tensors.items()}))
    return found


def together(parts: Sequence[list[Signals]]) -> list[Signals]:
    """Return the signals of several batches as one, pass by pass."""
    return [
        replace(passes[0], **{
            item.name: torch.cat([getattr(seen, item.name) for seen in passes])
            for item in fields(Signals)
            if item.name != "step" and getattr(passes[0], item.name) is not None
        })
        for passes in zip(*parts, strict=True)
    ]  # fmt: skip
