"""Batches of one piece of work, dealt out among processes, with the results of one process.

The batches are cut before they are dealt out, alike in every process, and each is computed by one of them just as a
single process would compute it. All get the results in the order of the batches. So what is made of them (records, the
log of an evaluation) does not depend on how many processes there are, and any other number of them can go on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from rrcli.errors import RRError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Team(Protocol):
    """Processes that work on the same model, as one of them sees them; `training.processes.Processes` is one."""

    @property
    def shares(self) -> int:
        """How many of them can work on batches of their own; the others do what one of these does."""
        ...

    @property
    def share(self) -> int:
        """The number of this process's share, from 0."""
        ...

    @property
    def tensor(self) -> int:
        """How many processes, one after the other, have the same share."""
        ...

    @property
    def in_step(self) -> bool:
        """Whether they hold parts of the model, so that all of them have to run as many forwards as each other."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, in their order, to all of them."""
        ...


@dataclass(frozen=True)
class Alone:
    """The team of a single process."""

    shares: int = 1
    share: int = 0
    tensor: int = 1
    in_step: bool = False

    def gather(self, value: Any) -> list[Any]:
        """Return the one value."""
        return [value]


ALONE = Alone()


def deal(
    batches: Iterable[list[Item]],
    work: Callable[[list[Item]], Result],
    team: Team,
    *,
    idle: Callable[[list[Item]], list[Item]] = lambda batch: batch,
) -> Iterator[tuple[list[Item], Result]]:
    """Yield every batch with its result, to all processes of a team alike; each result is computed by one of them.

    Args:
        batches: the same in every process. work: its result has to be picklable.
        idle: makes, from a batch of another one, the batch for a process that has none of its own while others have;
            only where all have to run as many forwards as each other. Its result is dropped.

    Raises:
        RRError: `work` raised it in one of them. It is raised in all; but not where they wait for each other inside of
            a forward: there it ends the command.
    """
    waiting = iter(batches)
    while dealt := list(islice(waiting, team.shares)):
        result: Any = None
        failed: RRError | None = None
        try:
            if team.share < len(dealt):
                result = work(dealt[team.share])
            elif team.in_step:
                work(idle(dealt[0]))
        except RRError as error:
            if team.in_step or team.shares == 1:
                raise
            failed = error
        outcomes = team.gather((result, failed))[:: team.tensor]
        for _, refusal in outcomes:
            if refusal is not None:
                raise refusal
        yield from ((batch, found) for batch, (found, _) in zip(dealt, outcomes, strict=False))
