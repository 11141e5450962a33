"""Sample generations as pictures for TensorBoard's IMAGES tab: each token on the colour of the passes that it took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rrcli.evaluation.tracing import Piece, pieces
from rrcli.recursion.families import input_device

WIDTH, MARGIN, SIZE, LEADING = 900, 16, 18, 28
INK, FAINT, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)
# Light tints of the Okabe-Ito colours, which colour-blind readers tell apart; by passes after pass 0.
TINTS = ((255, 255, 255), (198, 227, 243), (250, 220, 170), (190, 230, 214), (240, 205, 224), (248, 242, 170))


def generate_traced(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> list[Piece]:
    """Continue a prompt greedily in chunks, by the model's exit rule, or with every pass where none was chosen.

    Args:
        model: with a recursion, at the depth that refining may reach; without one every token took pass 0 alone.

    Returns:
        The new text.
    """
    import torch

    from rrcli.data.tokens import encode_prompt, end_tokens
    from rrcli.evaluation.decoding import GREEDY, room_for
    from rrcli.evaluation.generation_settings import without_own_settings
    from rrcli.recursion.facts import context_length

    new_tokens = room_for(model, new_tokens)
    ids = encode_prompt(tokenizer, prompt)[-(context_length(model) - new_tokens) :]
    inputs, ends = torch.tensor([ids], device=input_device(model)), end_tokens(model, tokenizer)
    recursion = getattr(model, "recursion", None)
    decoding = None
    if recursion is not None and recursion.depth:
        from rrcli.recursion.chunked_decoding import ChunkedDecoding

        decoding = ChunkedDecoding()
    with without_own_settings(model):
        sequence = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
            custom_generate=decoding,
            **GREEDY,
        )[0, len(ids) :].tolist()
    passes, changed = [0] * len(sequence), [False] * len(sequence)
    if decoding is not None:
        passes, changed = decoding.traces[0].passes, decoding.traces[0].changed
    return pieces(tokenizer, zip(sequence, passes, changed, strict=True), prompt=ids, ends=ends)


def draw(samples: Sequence[tuple[str, Sequence[Piece]]], title: str) -> Any:
    """Draw prompts in grey, and after each the text that was generated.

    Returns:
        A `uint8` array `[height, width, 3]`.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    try:
        # More characters than Pillow's own font has. The basic layout takes any text; the other one refuses separators
        # of paragraphs.
        font: Any = ImageFont.truetype("DejaVuSans.ttf", SIZE, layout_engine=ImageFont.Layout.BASIC)
    except OSError:
        font = ImageFont.load_default(SIZE)
    # The layout comes first, because it gives the height: (x, y, text, ink, tint, underlined).
    marks: list[tuple[float, int, str, Any, Any, bool]] = []
    x, y = float(MARGIN), MARGIN

    def put(text: str, ink: Any, tint: Any = PAPER, changed: bool = False) -> None:
        nonlocal x, y
        for number, line in enumerate(text.split("\n")):
            if number:
                x, y = float(MARGIN), y + LEADING
            for part in _cut(line, font):
                length = font.getlength(part)
                if x + length > WIDTH - MARGIN and x > MARGIN:
                    x, y = float(MARGIN), y + LEADING
                marks.append((x, y, part, ink, tint, changed))
                x += length

    put(title + "   passes after pass 0:", FAINT)
    for passes in sorted({token.passes for _, tokens in samples for token in tokens} or {0}):
        put("  ", FAINT)
        put(f" {passes} ", INK, _tint(passes))
    put("   underlined: changed by refining", FAINT)
    for prompt, tokens in samples:
        x, y = float(MARGIN), y + LEADING * 3 // 2
        put(prompt, FAINT)
        for token in tokens:
            put(token.text, INK, _tint(token.passes), token.changed)
    image = Image.new("RGB", (WIDTH, y + LEADING + MARGIN), PAPER)
    canvas = ImageDraw.Draw(image)
    for left, top, text, ink, tint, changed in marks:
        right = left + font.getlength(text)
        if tint != PAPER:
            canvas.rectangle((left, top, right, top + LEADING - 3), fill=tint)
        canvas.text((left, top + 2), text, font=font, fill=ink)
        if changed and text.strip():
            canvas.line((left, top + LEADING - 5, right, top + LEADING - 5), fill=ink, width=2)
    return np.asarray(image)


def _tint(passes: int) -> tuple[int, int, int]:
    return TINTS[min(passes, len(TINTS) - 1)]


def _cut(line: str, font: Any) -> list[str]:
    """Cut a line after each space, and words that are wider than the picture also where they no longer fit."""
    words = line.split(" ")
    pieces = [word + " " for word in words[:-1]] + ([words[-1]] if words[-1] else [])
    room = WIDTH - 2 * MARGIN
    cut: list[str] = []
    for piece in pieces:
        while font.getlength(piece) > room:
            fits = next(n for n in range(len(piece), 0, -1) if font.getlength(piece[:n]) <= room)
            cut.append(piece[:fits])
            piece = piece[fits:]
        cut.append(piece)
    return cut
