"""Keeps the documents of a training, in a temporary file if they are many, and the order of each epoch."""

from __future__ import annotations

import functools
import json
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from tempfile import SpooledTemporaryFile
from typing import Any

from rrcli.data.conversations import Document
from rrcli.files import unwritable

# Documents up to this many bytes stay in memory.
MEMORY_BYTES = 2**24


class Documents(Sequence[Document]):
    """A sequence of documents: a class says how many there are (`__len__`), and which one has a place (`at`)."""

    def __getitem__(self, index: Any) -> Any:
        """Return the document at a place, counted from the end if it is negative, or a list of those in a slice."""
        if isinstance(index, slice):
            return [self.at(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.at(index % len(self))

    @abstractmethod
    def at(self, index: int) -> Document:
        """Return the document at a place from 0 to the length."""


class DocumentStore(Documents):
    """A sequence of documents that takes eight bytes of memory for each, and eight more once they are shuffled.

    More than MEMORY_BYTES of documents are kept in a temporary file. It has no name, so it disappears with the process,
    however that ends.

    Args:
        directory: where the temporary file is made. Its disk needs room for a copy of all documents. (The system's
            folder for temporary files would not do: it often lies in memory.)

    Raises:
        RRError: the disk is full.
    """

    def __init__(self, documents: Iterable[Document], directory: Path) -> None:
        self._file = SpooledTemporaryFile(max_size=MEMORY_BYTES, dir=str(directory))  # noqa: SIM115 (it lives as long)
        self._ends = array("Q", [0])
        for document in documents:
            self._write(json.dumps(document, ensure_ascii=False).encode(), directory)
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def at(self, index: int) -> Document:
        """Return the document at a place."""
        self._file.seek(self._ends[index])
        document: Document = json.loads(self._file.read(self._ends[index + 1] - self._ends[index]))
        return document

    def in_order(self, place: int, seed: int) -> Document:
        """Return the document at `place`, counted from 0, of an endless sequence of epochs.

        Each epoch shows every document once, in an order that follows from the seed and its own number.
        """
        epoch, number = divmod(place, len(self))
        return self.at(self._order(seed, epoch)[number])

    def _write(self, data: bytes, directory: Path) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            with suppress(OSError):  # closing writes what is left, which fails too
                self._file.close()
            raise unwritable(directory / "documents", error) from error
        self._ends.append(self._ends[-1] + len(data))

    def _shuffled(self, seed: int, epoch: int) -> array[int]:
        order = array("Q", range(len(self)))
        Random(f"documents/{seed}/{epoch}").shuffle(order)
        return order
