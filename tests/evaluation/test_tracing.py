"""Pieces of generated text: whole characters, and the passes that their tokens took."""

from __future__ import annotations

import rrcli
from rrcli.evaluation.tracing import Piece, PieceBuilder, pieces

# A vocabulary by hand: the three bytes of one character, words, and an end token.
BYTES = {1: b"a", 2: b" b", 3: b"\xe8", 4: b"\xaa", 5: b"\x9e", 6: b".\n", 7: b"\n"}
END = 0


class ByBytes:
    eos_token_id = END

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return b"".join(BYTES[token] for token in ids).decode(errors="replace")


def test_each_token_is_a_piece_and_an_end_token_is_none() -> None:
    tokens = [(1, 0, False), (2, 2, True), (END, 1, False)]
    assert pieces(ByBytes(), tokens) == [Piece("a"), Piece(" b", 2, True)]


def test_a_character_of_several_tokens_is_one_piece_changed_if_any_of_them_was() -> None:
    tokens = [(1, 0, False), (3, 1, False), (4, 1, True), (5, 2, False), (2, 0, False)]
    assert pieces(ByBytes(), tokens) == [Piece("a"), Piece("語", 2, True), Piece(" b")]


def test_a_character_that_is_never_completed_is_shown_at_the_end() -> None:
    assert pieces(ByBytes(), [(1, 0, False), (3, 1, False)]) == [Piece("a"), Piece("\ufffd", 1)]


def test_characters_of_several_real_tokens_come_whole() -> None:
    text = "naïve 語 🙂 x"
    tokenizer = rrcli.load("default")[1]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, [(token, 0, False) for token in ids])
    assert "".join(piece.text for piece in found) == text
    assert not any("\ufffd" in piece.text for piece in found)
    assert len(found) < len(ids), "some character takes several tokens"


def test_what_may_become_a_stop_string_is_held_back_until_it_is_decided() -> None:
    builder = PieceBuilder(ByBytes(), stop=[".\n\n"])
    assert [builder.add(token) for token in (1, 6, 2)] == [Piece("a"), None, Piece(".\n b")]
    assert [builder.add(token) for token in (6, 7, 1)] == [None, None, None]
    assert builder.finish() is None
    undecided = PieceBuilder(ByBytes(), stop=[".\n\n"])
    assert [undecided.add(6), undecided.finish()] == [None, Piece(".\n")]
