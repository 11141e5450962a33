"""Several sampled answers to each problem, for avg@k and pass@k; logged batch by batch, so that they can be resumed.

What is drawn depends on the seed, the problem, the number of the answer and the temperature alone (`sampling`): neither
on the batch nor on where an evaluation was interrupted, and it is alike for all stages.
"""

from __future__ import annotations

from typing import Any

from rrcli.data.dealing import ALONE, Team
from rrcli.data.prompts import stop_strings
from rrcli.evaluation.answers import problem_prompts
from rrcli.evaluation.decoding import Decoded, decode
from rrcli.evaluation.held_out import EvalData
from rrcli.evaluation.judging import judge
from rrcli.evaluation.samples import SampleLog
from rrcli.evaluation.sampling import Sampling, row_key
from rrcli.recursion.exits import ExitRule
from rrcli.reporting import Reporter, Silent
from rrcli.settings import EvalSettings

PART = "sampled"
# What is recorded of each sampled answer.
FIELDS = ("output", "extracted", "correct", "strict", "length", "ended")


def sample_answers(
    model: Any,
    tokenizer: Any,
    data: EvalData,
    *,
    depth: int,
    settings: EvalSettings,
    reporter: Reporter,
    log: SampleLog | None = None,
    exit: ExitRule | None = None,
    team: Team = ALONE,
) -> list[list[dict[str, Any]]]:
    """Draw `settings.samples` answers to every problem at a depth, or with an exit rule, and judge them.

    The batches are dealt out among the processes of a team.

    Returns:
        For each problem, for each answer: `output`, `extracted`, `correct`, `strict`, `length`, `ended`, as in
        `answers.solve_problems`.

    Raises:
        RRError: as `solve_problems`; or the log holds answers to other problems.
    """
    log = log or SampleLog()
    count = settings.samples
    _, prompts = problem_prompts(model, tokenizer, data, settings=settings, reporter=Silent())  # told before
    found: list[list[dict[str, Any]]] = [[{}] * count for _ in data.problems]
    places = [span for span in data.spans for _ in range(len(span) * count)]

    def fits(place: int, entry: dict[str, Any]) -> bool:
        number, sample = entry["number"], entry["sample"]
        in_order = place < len(places) and number in places[place] and sample < count
        new = in_order and not found[number][sample] and entry["key"] == data.problems[number].key
        if new:
            found[number][sample] = {name: entry[name] for name in FIELDS}
        return bool(new)

    done = len(log.done(PART, fits))
    tasks = {task.spec: task for task in data.tasks}
    with reporter.progress("sampling", len(places), "answers") as progress:
        progress.advance(done)
        for span in data.spans:  # a set after the other, so that sets may be added to an evaluation
            numbers = [number for number in span for _ in range(count)]
            skip = min(len(numbers), done)
            done -= skip
            keys = [
                row_key(settings.seed, data.problems[number].key, place % count) for place, number in enumerate(numbers)
            ]

            def judged(answer: Decoded, numbers: list[int] = numbers) -> dict[str, Any]:
                problem = data.problems[numbers[answer.number]]
                return vars(judge(tasks[problem.task], problem, answer.text))

            for batch in decode(
                model,
                tokenizer,
                [prompts[number] for number in numbers],
                depth=depth,
                new_tokens=settings.max_new_tokens,
                batch_tokens=settings.batch_tokens,
                stop=stop_strings(settings.stop),
                skip=skip,
                exit=exit,
                sampling=Sampling(settings.temperature, keys),
                team=team,
                make=judged,
            ):
                new = []
                for answer in batch:
                    number, sample = numbers[answer.number], answer.number % count
                    entry = {"output": answer.text, "length": len(answer.tokens), "ended": answer.ended, **answer.made}
                    found[number][sample] = {name: entry[name] for name in FIELDS}
                    new.append(
                        {"number": number, "sample": sample, "key": data.problems[number].key, **found[number][sample]}
                    )
                log.append(PART, new)
                progress.advance(len(new))
    return found
