"""`rr generate`: let the model of a stage go on with a prompt, and show how each token came about."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rrcli.data.prompts import stop_strings
from rrcli.errors import RRError, UsageError
from rrcli.evaluation.tracing import Piece, PieceBuilder
from rrcli.experiment.replicates import EQUAL_FLOPS_STAGE
from rrcli.experiment.workspace import Workspace
from rrcli.locks import reading
from rrcli.models.loading import load_for
from rrcli.models.placement import read_placement
from rrcli.recursion.exits import NEVER, exit_for
from rrcli.reporting import Reporter, Silent
from rrcli.settings import STAGES, GenerateSettings, with_changes
from rrcli.training.launching import launch, launched
from rrcli.training.processes import join


@dataclass(frozen=True)
class GenerateResult:
    """What was written, and how.

    Attributes:
        seconds: wall time, prompt included. metrics: the chunk metrics; empty without recursion.
        notice: a sentence about where texts end, or ''. seed: of the sampling. exit: the rule by which tokens left;
            None where every pass was run. max_new_tokens: the most that were asked for and had room in the context.
    """

    stage: str
    prompt: str
    pieces: list[Piece]
    depth: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    notice: str = ""
    seed: int = 0
    exit: str | None = None
    max_new_tokens: int = 0

    @property
    def text(self) -> str:
        """The continuation, without the prompt."""
        return "".join(piece.text for piece in self.pieces)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"text": self.text, **asdict(self)}


def generate(
    settings: GenerateSettings,
    prompt: str,
    directory: Path,
    emit: Callable[[Piece], None],
    *,
    stage: str | None = None,
    reporter: Reporter | None = None,
) -> GenerateResult:
    """Continue a prompt with the model of a stage, by default the last stage that has one.

    Args:
        emit: gets each piece as soon as it is committed; all at the end, if processes are started for it.

    Raises:
        UsageError: an empty prompt or stop string, or a depth that the model does not have. RRError: the stage has no
            model yet, or the prompt has no tokens that the model knows.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty", "Give some text to go on with.")
    stop = stop_strings(settings.stop)
    parallel = read_placement(settings, directory).parallel
    if parallel is not None and not launched():
        found = launch(
            parallel.processes, generate, settings, prompt, directory, _ignore, stage=stage, reporter=reporter
        )
        for piece in found.pieces:
            emit(piece)
        return found
    processes = join(settings.device, parallel)
    if not processes.main:
        emit, reporter = _ignore, Silent()
    workspace = Workspace(directory, settings)
    stage = stage or _last_stage(workspace)

    import torch

    from rrcli.data.tokens import encode_prompt, end_notice, end_tokens
    from rrcli.evaluation.decoding import GREEDY, StopStrings
    from rrcli.evaluation.generation_settings import unfollowed_settings, without_own_settings
    from rrcli.recursion.facts import context_length, refuse_unknown_tokens, vocabulary
    from rrcli.recursion.families import input_device

    with reading(lambda: workspace.stage_model(stage)) as source:
        placed = with_changes(settings, device=processes.device)
        model, tokenizer = load_for(placed, source, directory, reporter)
    recursion = getattr(model, "recursion", None)
    depth = _depth(settings, recursion, stage, reporter)
    encoded = encode_prompt(tokenizer, prompt)
    if not encoded:
        raise RRError(f"the tokenizer makes no token of the prompt {prompt[:40]!r}", "Give a text that it knows.")
    refuse_unknown_tokens(vocabulary(model), tokenizer, encoded, "the prompt")
    ids = torch.tensor([encoded], device=input_device(model))
    room = context_length(model) - ids.shape[1]
    if room < 1:
        raise UsageError(f"the prompt has {ids.shape[1]} tokens", f"The model's context is {context_length(model)}.")
    if settings.max_new_tokens > room and reporter is not None:
        reporter.warn(
            f"--max-new-tokens is {settings.max_new_tokens}, but after the {ids.shape[1]} tokens of the prompt the "
            f"model's context of {context_length(model)} has room for {room}: the text ends there"
        )
    new_tokens = min(settings.max_new_tokens, room)
    pieces: list[Piece] = []

    def take(piece: Piece) -> None:
        pieces.append(piece)
        emit(piece)

    ends = end_tokens(model, tokenizer)
    stream = _Stream(PieceBuilder(tokenizer, stop, prompt=ids[0].tolist(), ends=ends), take)
    decoding = _decoding(settings, recursion, stream)
    options = dict(GREEDY)
    if settings.temperature > 0:
        options |= {"do_sample": True, "temperature": settings.temperature}
        options |= {"top_p": settings.top_p, "top_k": settings.top_k}
    if stop:
        options["stopping_criteria"] = [StopStrings(tokenizer, stop, ids.shape[1], ends=ends)]
    unfollowed = unfollowed_settings(model)
    if unfollowed and reporter is not None:
        reporter.note(unfollowed)
    torch.manual_seed(settings.seed)
    begin = time.perf_counter()
    with without_own_settings(model):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
            **options,
            **({"streamer": stream} if decoding is None else {"custom_generate": decoding}),
        )
    seconds = time.perf_counter() - begin
    metrics = decoding.totals.metrics() if decoding is not None else {}
    notice = end_notice(model, tokenizer)
    processes.leave()
    rule = decoding.exit if decoding is not None and decoding.exit != NEVER else None
    return GenerateResult(
        stage=stage,
        prompt=prompt,
        pieces=pieces,
        depth=depth,
        seconds=seconds,
        metrics=metrics,
        notice=notice,
        seed=settings.seed,
        exit=None if rule is None else str(rule),
        max_new_tokens=new_tokens,
    )


def _ignore(_: Piece) -> None:
    """Show nothing, where another process does or all is shown at the end."""


def _last_stage(workspace: Workspace) -> str:
    # The control is not what one wants to read, unless it is asked for.
    for stage in reversed([stage for stage in STAGES if stage != EQUAL_FLOPS_STAGE]):
        try:
            workspace.stage_model(stage)
        except RRError:
            continue
        return stage
    return STAGES[0]


def _depth(settings: GenerateSettings, recursion: Any, stage: str, reporter: Reporter | None) -> int:
    if recursion is None:
        if settings.depth > 0:
            raise UsageError(f"depth is {settings.depth}, but stage '{stage}' has no recursion", "Leave --depth out.")
        return 0
    notice = recursion.allow(settings.depth)
    if notice and reporter is not None:
        reporter.note(notice)
    recursion.depth = recursion.config.max_steps if settings.depth < 0 else settings.depth
    return int(recursion.depth)


def _decoding(settings: GenerateSettings, recursion: Any, stream: _Stream) -> Any:
    if recursion is None or recursion.depth == 0:
        exit_for(recursion, settings.exit, settings.depth)
        return None
    from rrcli.recursion.chunked_decoding import ChunkedDecoding

    exit = exit_for(recursion, settings.exit, settings.depth)
    decoding = ChunkedDecoding(settings.chunk_width or None, exit or NEVER, streamer=stream)
    stream.decoding = decoding
    return decoding


class _Stream:
    """A streamer of `generate` that hands on each piece of text as soon as it is complete."""

    def __init__(self, builder: PieceBuilder, take: Callable[[Piece], None]) -> None:
        self.builder, self.take = builder, take
        self.decoding: Any = None
        self._is_prompt = True

    def put(self, value: Any) -> None:
        """Take the prompt, and from then on new tokens."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            passes, changed = 0, False
            if self.decoding is not None:
                trace, place = self.decoding.traces[0], len(self.builder.ids)
                passes, changed = trace.passes[place], trace.changed[place]
            self._give(self.builder.add(token, passes, changed))

    def end(self) -> None:
        """Give what is still held back."""
        self._give(self.builder.finish())

    def _give(self, piece: Piece | None) -> None:
        if piece is not None:
            self.take(piece)
