"""Decides on which side of the split the rows of a file are, where what they ask cannot decide it.

A plain text decides by its own words, and a conversation by what is asked first: then all answers to one question are
on one side of the split. But where a large part of a file asks the same ("Write a short story.", or "Hi" in every
chat), that part would be on one side as a whole. Such a question does not decide; the next turn of the user does, or,
if there is none, the whole conversation.

Which questions are so common follows from the file alone, so training and evaluation agree on it, also if one of them
reads a folder that holds the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import chain
from pathlib import Path

from rrcli.data.conversations import Document, asked, identity
from rrcli.data.document_store import DocumentStore

# A question is common if so many conversations of its file ask it, and more than one in so many.
COMMON_ROWS = 10
COMMON_ONE_IN = 20
# How much of a common question is shown.
SHOWN = 60


def decided(
    documents: Iterable[Document], directory: Path, name: str, said: list[str]
) -> Iterator[tuple[Document, str]]:
    """Yield each document of a file with the text that decides on which side of the split it is, in the file's order.

    Plain texts are streamed. From the first conversation on, all documents are kept until the last one is read (see
    `DocumentStore`), because their questions have to be counted first.

    Args:
        directory: for the temporary file of many conversations. name: the file's, for `said`.
        said: gets a sentence about questions that are common.

    Raises:
        RRError: see `DocumentStore`.
    """
    rest = iter(documents)
    for document in rest:
        if isinstance(document, str):
            yield document, document
            continue
        counts: Counter[bytes] = Counter()
        kept = DocumentStore(_counted(chain([document], rest), counts), directory)
        for later in kept:
            yield later, _deciding(later, counts)
        if sentence := _sentence(kept, counts, name):
            said.append(sentence)


def _counted(documents: Iterable[Document], counts: Counter[bytes]) -> Iterator[Document]:
    """Yield the documents, and count what conversations ask; how many there are stands under the empty key."""
    for document in documents:
        if not isinstance(document, str):
            counts[b""] += 1
            counts.update({_digest(text) for text in asked(document)})
        yield document


def _deciding(document: Document, counts: Counter[bytes]) -> str:
    """Return the text whose hash decides on which side a document is."""
    if isinstance(document, str):
        return document
    return next((text for text in asked(document) if not _is_common(text, counts)), identity(document))


def _is_common(text: str, counts: Counter[bytes]) -> bool:
    return _is_often(counts[_digest(text)], counts[b""])


def _is_often(count: int, total: int) -> bool:
    return count >= COMMON_ROWS and count * COMMON_ONE_IN > total


def _sentence(documents: Iterable[Document], counts: Counter[bytes], name: str) -> str:
    """Return a sentence about the questions that do not decide, or '' if there is none."""
    total = counts[b""]
    if not any(_is_often(count, total) for question, count in counts.items() if question):
        return ""  # without reading the documents again
    conversations = (d for d in documents if not isinstance(d, str))
    common = {text: None for d in conversations for text in asked(d) if _is_common(text, counts)}
    most = max(common, key=lambda text: counts[_digest(text)])
    words = " ".join(most.split())
    shown = words if len(words) <= SHOWN else f"{words[:SHOWN]}..."
    others = f", and {len(common) - 1} other questions are as common" if len(common) > 1 else ""
    return (
        f"{name}: {counts[_digest(most)]:,} of {total:,} conversations ask '{shown}'{others}: on which side they are "
        "is decided by the rest of what they say"
    )


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
