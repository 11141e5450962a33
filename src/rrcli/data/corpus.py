"""The text of an experiment: one source or several with weights (`--data`), and text to evaluate on (`--eval-data`).

Several sources are written `a.jsonl=0.7,hf://NAME=0.3`: their shares of the texts that training shows. Of all of them
the test side is evaluated, whatever their weights.

Every document has one side. With `--eval-data`, its documents are the test side, all of them, and what the rule would
hold out of `--data` for test is trained on; but no document, near-twins included, and no problem that stands in it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any

from rrcli.data.conversations import Document
from rrcli.data.document_store import Documents, DocumentStore
from rrcli.data.novelty import novelty
from rrcli.data.sources import STDIN, Notes, fingerprint, read_decided
from rrcli.data.splits import Side, side_of
from rrcli.errors import RRError, UsageError
from rrcli.settings import CommonSettings

_WEIGHTED = re.compile(r"(.+)=(\d+(?:\.\d*)?|\.\d+)")


@dataclass(frozen=True)
class Source:
    """A source of text, and its share of the texts that training shows, in any unit."""

    spec: str
    weight: float = 1.0


def sources_of(data: str) -> tuple[Source, ...]:
    """Return what `--data` names: one source, or several with weights.

    Raises:
        UsageError: a source without a weight among others, one that is named twice, or a weight of 0.
    """
    found = [_WEIGHTED.fullmatch(part.strip()) for part in data.split(",")]
    if not any(found):
        return (Source(data),)
    hint = "Write SOURCE=WEIGHT,SOURCE=WEIGHT, for example a.jsonl=0.7,b.jsonl=0.3."
    if not all(found):
        raise UsageError(f"a source of --data {data} has no weight", hint)
    sources = tuple(Source(match[1], float(match[2])) for match in found if match)
    if len({source.spec for source in sources}) < len(sources):
        raise UsageError(f"a source of --data {data} is named twice", hint)
    if not all(source.weight > 0 for source in sources):
        raise UsageError(f"a source of --data {data} has the weight 0", "Leave it out.")
    return sources


def reads_stdin(settings: CommonSettings) -> bool:
    """Tell whether text comes from standard input, which can be read only once."""
    return STDIN in (settings.eval_data, *(source.spec for source in sources_of(settings.data)))


def refuse_stdin(settings: CommonSettings, command: str) -> None:
    """Raise an error if a source is standard input; for commands that read it in more than one process.

    Raises:
        UsageError: a source is standard input.
    """
    if reads_stdin(settings):
        raise UsageError(
            f"--data - is standard input, which 'rr {command}' cannot read again for every stage",
            "Write it to a file first: --data text.jsonl.",
        )


def corpus_fingerprint(settings: CommonSettings, directory: Path) -> list[Any]:
    """Return hashes of all sources, with the weights of several, and of the text to evaluate on."""
    sources = sources_of(settings.data)
    hashes = [fingerprint(source.spec, directory, settings.text_field) for source in sources]
    total = sum(source.weight for source in sources)
    weights = [[source.weight / total for source in sources]] if len(sources) > 1 else []
    own = [["evaluated", fingerprint(settings.eval_data, directory, settings.text_field)]] if settings.eval_data else []
    return [*hashes, *weights, *own]


class Corpus:
    """Reads the text that the settings name, once.

    Attributes:
        sources: those of `--data`. twins: how many of their documents were left out because `--eval-data` has them.
    """

    def __init__(self, settings: CommonSettings, directory: Path) -> None:
        self.sources = sources_of(settings.data)
        self.twins = 0
        self._settings, self._directory = settings, directory
        self._notes: dict[str, Notes] = {}
        self._tested: set[bytes] = set()

    def read(self) -> Iterator[tuple[Document, Side, int]]:
        """Yield every document once, with its side and the number of its source, which is -1 for `--eval-data`.

        Raises:
            UsageError, RRError: see `sources.read_decided`.
        """
        own, seen = self._settings.eval_data, set[bytes]()
        if own:
            for document, deciding in self._decided(own, seen):
                self._tested.add(_digest(deciding))
                yield document, "test", -1
        for number, source in enumerate(self.sources):
            for document, deciding in self._decided(source.spec, seen):
                side = side_of(deciding)
                if own and self.tests(deciding):
                    self.twins += 1
                elif own and side == "test":
                    yield document, "train", number
                else:
                    yield document, side, number

    def tests(self, question: str) -> bool:
        """Tell whether a question, or a near-twin of it, is in `--eval-data`; after reading that."""
        return bool(self._tested) and _digest(question) in self._tested

    @property
    def notice(self) -> str:
        """Sentences about what was left out, or ''."""
        said = [notes.notice(spec) for spec, notes in self._notes.items()]
        if self.twins:
            said.append(
                f"{self._settings.data}: {self.twins:,} documents were left out, because "
                f"{self._settings.eval_data} has them or near-twins of them"
            )
        return "\n".join(filter(None, said))

    def _decided(self, spec: str, seen: set[bytes]) -> Iterator[tuple[Document, str]]:
        settings, notes = self._settings, self._notes.setdefault(spec, Notes())
        return read_decided(
            spec, self._directory, settings.text_field, notes, on_bad_row=settings.on_bad_row, seen=seen
        )


class Mixture(Documents):
    """The documents of several sources, and the order in which training shows them.

    Place n of the order belongs to a source by the weights alone, as evenly as can be: after n places, every source had
    its share of them but for less than one. Each source has epochs of its own.

    Args:
        documents: (document, number of its source), in the order of the sources.
        directory: for temporary files; see `DocumentStore`.

    Raises:
        RRError: one of several sources has no document.
    """

    def __init__(self, documents: Iterable[tuple[Document, int]], sources: Sequence[Source], directory: Path) -> None:
        stores = {
            number: DocumentStore((document for document, _ in group), directory)
            for number, group in groupby(documents, key=lambda item: item[1])
        }
        for number, source in enumerate(sources):
            if stores and number not in stores:
                raise RRError(
                    f"no document of {source.spec} is on the training side of the split",
                    "Give more documents (about 50 or more), or leave this source out.",
                )
        self._stores = [stores[number] for number in sorted(stores)]
        self._weights = [source.weight for source in sources]

    def __len__(self) -> int:
        return sum(map(len, self._stores))

    def at(self, index: int) -> Document:
        """Return the document at a place: those of the first source come first."""
        for store in self._stores:
            if index < len(store):
                return store.at(index)
            index -= len(store)
        raise IndexError(index)

    def in_order(self, place: int, seed: int) -> Document:
        """Return the document at a place of the endless order, counted from 0."""
        number, own = shared_out(place, self._weights)
        return self._stores[number].in_order(own, seed)


def shared_out(place: int, weights: Sequence[float]) -> tuple[int, int]:
    """Return which of several sources has a place of a sequence, and how many places it had before.

    The first one has its share of all places, the second its share of the rest, and so on.
    """
    rest = sum(weights)
    for number, weight in enumerate(weights[:-1]):
        share = weight / rest
        before = math.floor(place * share)
        if math.floor((place + 1) * share) > before:
            return number, before
        place, rest = place - before, rest - weight
    return len(weights) - 1, place


def _digest(text: str) -> bytes:
    return blake2b(novelty(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()
