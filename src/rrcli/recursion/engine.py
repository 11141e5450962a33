"""`attach`: forward hooks that run a span of a stock model's decoder layers again.

How one forward goes at depth d:

    the backbone is called   a frame is opened
    layer i is called        its arguments are kept in the frame; before layer 0, the cache gets a copy for each pass
    layer end-1 returns      pass 0 is complete. For k = 1..d the span's layers are called again, with the same
                             arguments but for two: the hidden state is the span's input plus the cell's feedback, and
                             the cache is that of pass k. The last pass's output replaces the layer's output, and the
                             model goes on with the layers after the span
    the backbone returns     the frame is closed

At depth 0 no frame is opened and the hooks return at once: the model is the stock model.

A caller may ask for hidden states, attentions and router logits. They are as many as the stock model returns: those of
pass 0 inside the span, and those of the last pass after it. What the passes after pass 0 compute is not recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rrcli import upstream
from rrcli.errors import RRError, UsageError
from rrcli.recursion import caches
from rrcli.recursion.boundary_head import BoundaryHead
from rrcli.recursion.config import MAX_STEPS_LIMIT, RecursionConfig
from rrcli.recursion.exits import ExitRule
from rrcli.recursion.facts import hidden_size
from rrcli.recursion.families import find_layout, home_of, is_skeleton
from rrcli.recursion.feedback_cell import FeedbackCell
from rrcli.recursion.frames import Frame, Record, hidden_of, with_hidden
from rrcli.recursion.proof import prove, self_check


@dataclass
class Passes:
    """What `Recursion.passes` measured; index k is pass k, shapes are `[batch, position, hidden]`.

    Attributes:
        states: the span's output h(k), which the boundary head reads.
        hidden: the readout of h(k), after the remaining layers and the final norm: what the model's head reads.
        feedback_norm: root mean square of the last pass's feedback relative to the span's input (0 = silently off).
    """

    states: list[Tensor]
    hidden: list[Tensor]
    feedback_norm: Tensor


class Recursion(nn.Module):
    """A recursion attached to a model. `.parameters()` are its own (the sidecar), never the model's.

    Set `.depth` to choose how many passes follow pass 0 (0 = the stock model). `.detach()` takes it off again.

    Attributes:
        exit: the exit rule that was chosen for this model, which decoding uses unless told otherwise; None if none was.
        deepest: the greatest depth that may be set; `max_steps` unless `allow` raised it.
    """

    model: Any
    backbone: Any
    layers: list[nn.Module]
    tail: list[nn.Module]

    def __init__(self, model: Any, config: RecursionConfig) -> None:
        super().__init__()
        layout, known = find_layout(model)
        # Plain references: the model must not become a submodule of its own sidecar.
        self.__dict__["model"] = model
        self.__dict__["backbone"] = model.get_submodule(layout.backbone)
        self.__dict__["layers"] = list(model.get_submodule(layout.layers))
        tail = [_submodule_or_none(model, path) for path in layout.tail]
        self.__dict__["tail"] = [module for module in tail if module is not None]
        self.config = config
        self.start, self.end = config.resolve_span(len(self.layers))
        # A dependency may have changed since it was tested: then even a family of the table has to prove itself.
        self.needs_check = not known or bool(upstream.untested())

        # Weights of one byte (fp8) are storage, not something to compute in.
        like = next(p for p in self.layers[self.start].parameters() if p.is_floating_point() and p.element_size() > 1)
        self.cell, self.head = _drawn(config, hidden_size(model))
        self.to(device=home_of(self.layers[self.start]), dtype=like.dtype)

        # Passes beyond `max_steps` were not trained; they use the last step's embedding, where a caller allows them.
        self.deepest = config.max_steps
        self.exit: ExitRule | None = None
        self._depth = config.max_steps
        self._frame: Frame | None = None
        self._untranslate = upstream.translate(model)
        self._hooks = self._install()
        model.__dict__["recursion"] = self

    # -- what users touch ---------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """How many passes follow pass 0, `0..deepest`."""
        return self._depth

    @depth.setter
    def depth(self, depth: int) -> None:
        if not 0 <= depth <= self.deepest:
            raise UsageError(f"depth is {depth}", f"It must be between 0 and {self.deepest}.")
        self._depth = depth

    @property
    def can_exit(self) -> bool:
        """Whether texts can be decoded with an exit rule: only the last pass goes through layers after the span."""
        return self.end == len(self.layers)

    def allow(self, depth: int) -> str:
        """Allow depths up to this one, also beyond `max_steps`; say what that means, or nothing.

        Raises:
            UsageError: more than the most passes that any recursion may have.
        """
        if depth > MAX_STEPS_LIMIT:
            raise UsageError(f"depth is {depth}", f"It must be between 0 and {MAX_STEPS_LIMIT}.")
        self.deepest = max(self.deepest, depth)
        trained = self.config.max_steps
        if depth <= trained:
            return ""
        return (
            f"the recursion was made for {trained} passes after pass 0: later ones were not trained, and use the step "
            f"embedding of pass {trained}"
        )

    def redraw(self, seed: int) -> None:
        """Give cell and head the initial weights of another seed; what they had learned is lost."""
        self.config = replace(self.config, seed=seed)
        for part, drawn in zip((self.cell, self.head), _drawn(self.config, hidden_size(self.model)), strict=True):
            part.load_state_dict(drawn.state_dict())

    @contextmanager
    def at_depth(self, depth: int) -> Iterator[None]:
        """Use another depth for a while; afterwards, and after an exception, the depth is what it was."""
        before, self.depth = self.depth, depth
        try:
            yield
        finally:
            self.depth = before

    @contextmanager
    def drafting(self) -> Iterator[Record]:
        """Run pass 0 alone in the forwards inside, and record them.

        The caches of the passes after pass 0 do not see these tokens; `refining` adds them.
        """
        record = Record()
        with self._forced(Frame(0, record, prepares_caches=False)):
            yield record

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """Run all passes in the forwards inside, and record them."""
        record = Record()
        with self._forced(Frame(self._depth, record)):
            yield record

    @contextmanager
    def refining(self, before: tuple[Tensor, Tensor], *, first: int = 1, last: int | None = None) -> Iterator[Record]:
        """Run the passes `first` to `last` in the one forward inside, over tokens that went through those before them.

        The passes before `first` are not run again: the layers before the span's end return h(first - 1), and leave
        the caches of these passes alone.

        Args:
            before: the span's input and h(first - 1) of the forward's tokens, both `[batch, position, hidden]`, as they
                were recorded.
            last: the recursion's depth if not given.
        """
        record, depth = Record(), self._depth if last is None else last
        prepares = first == 1 and depth == self._depth
        frame = Frame(depth, record, prepares_caches=prepares, first=first, before=before)
        with ExitStack() as stubs, self._forced(frame):
            frame.stubs = stubs
            for layer in self.layers[: self.end]:
                stubs.enter_context(upstream.patched(layer, forward=lambda *_, **__: before[1]))
            yield record

    def prepare(self, cache: Any) -> None:
        """Make a cache carry one copy for each pass up to the depth, as a forward at that depth would."""
        if not caches.is_ready(cache, self._depth):
            caches.prepare(cache, self._depth, full=self.can_exit, start=self.start)

    def readout(self, state: Tensor) -> Tensor:
        """Return what the model's head reads for the output of a pass, `[batch, position, hidden]`.

        For a span that ends with the last layer.
        """
        assert self.can_exit
        for module in self.tail:
            state = module(state)
        return state

    def detach(self) -> None:
        """Remove every hook, and the adapters of the passes; the model is the stock model again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._untranslate()
        if self.model.__dict__.get("recursion") is self:
            del self.model.__dict__["recursion"]
            lora = self.model.__dict__.get("lora")
            if lora is not None and not lora.always:
                lora.remove()

    def passes(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        depth: int | None = None,
    ) -> Passes:
        """Run the backbone once, without a cache, and return what every pass 0..depth produced.

        Args:
            input_ids: `[batch, position]`; attention_mask: the same shape, 1 = a real token. position_ids: the same
                shape; the model counts them itself if not given.
            depth: how many passes follow pass 0; the recursion's own depth if not given.
        """
        record = Record()
        frame = Frame(self.depth if depth is None else depth, record)
        with self._forced(frame):
            told = {} if position_ids is None else {"position_ids": position_ids}
            output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **told)
        hidden = [self._readout(frame, state) for state in record.states[:-1]] + [output.last_hidden_state]
        norm = record.feedback[-1] if record.feedback else torch.zeros((), device=input_ids.device)
        return Passes(record.states, hidden, norm)

    # -- how it works -------------------------------------------------------------------------------------------------

    def _install(self) -> list[Any]:
        hooks = [
            self.backbone.register_forward_pre_hook(self._open, with_kwargs=True),
            self.backbone.register_forward_hook(self._close, always_call=True),
            self.layers[0].register_forward_pre_hook(self._prepare_caches, with_kwargs=True),
            # First of the layer's hooks: other hooks that record its output see what the model goes on with.
            self.layers[self.end - 1].register_forward_hook(self._after_pass_0, prepend=True),
        ]
        for index in range(self.start, len(self.layers)):
            note = functools.partial(self._note, index)
            hooks.append(self.layers[index].register_forward_pre_hook(note, with_kwargs=True))
        return hooks

    @contextmanager
    def _forced(self, frame: Frame | None) -> Iterator[Any]:
        """Run the forwards inside in this frame; with None, layers that are called directly are in no frame."""
        before, self._frame = self._frame, frame
        try:
            yield frame
        finally:
            self._frame = before

    def _open(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open a frame when the backbone is called, unless a frame is forced on the forward."""
        if self._frame is None and self._depth > 0:
            upstream.refuse_unhidden_outputs(self.model, kwargs)
            self._frame = Frame(self._depth)

    def _close(self, *_: Any) -> None:
        """Close the frame that `_open` opened; those that record are forced, and stay for further forwards."""
        if self._frame is not None and self._frame.record is None:
            self._frame = None

    def _prepare_caches(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the cache that the first layer is called with carry the caches of the passes."""
        if self._frame is not None and not self._frame.prepares_caches:
            return
        depth = self._frame.depth if self._frame else 0
        for value in (*args, *kwargs.values()):
            # `prepare` is left out of compiled graphs: call it when a generation begins, not for every token.
            if upstream.is_cache(value) and not caches.is_ready(value, depth):
                caches.prepare(value, depth, full=self.end == len(self.layers), start=self.start)

    def _note(self, index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of layer `index`."""
        if self._frame is not None:
            # Of the hidden states only the span's input is needed again; keeping those of all layers costs memory.
            call = (args, kwargs)
            self._frame.calls[index] = call if index == self.start else with_hidden(call, None)

    def _after_pass_0(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        """Run the passes after pass 0 when the span's last layer returns, and return the last one's output."""
        frame = self._frame
        if frame is None:
            return None
        if frame.stubs is not None:
            frame.stubs.close()
        span = range(self.start, self.end)
        entry = hidden_of(frame.calls[self.start]) if frame.before is None else frame.before[0]
        if frame.record is not None and isinstance(output, Tensor):
            frame.record.entries.append(entry)
        hidden = output if isinstance(output, Tensor) else output[0]
        states = [hidden]
        # Layers may be on different devices; the sidecar is on that of the span's first layer.
        home = self.head.score.weight.device
        entry = entry.to(home)
        scale = _root_mean_square(entry) if self.config.relative_feedback else None
        with self._forced(None), upstream.unrecorded():
            for step in range(frame.first, frame.depth + 1):
                feedback = self.cell(hidden.to(home), step)
                if scale is not None:
                    feedback = feedback * scale
                if frame.record is not None:
                    frame.record.feedback.append(_relative_norm(feedback, entry))
                hidden = self._run(span, entry + feedback.to(entry.dtype), frame, step)
                states.append(hidden)
        if frame.record is not None:
            frame.record.states.extend(states)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    def _run(self, span: Iterable[int], hidden: Tensor, frame: Frame, step: int) -> Tensor:
        """Call layers again as the model called them, with another hidden state and the cache of pass `step`."""
        lora = self.model.__dict__.get("lora") if step else None
        for index in span:
            args, kwargs = frame.calls[index]
            args = tuple(caches.of_pass(value, step) if upstream.is_cache(value) else value for value in args)
            kwargs = {
                k: caches.of_pass(value, step) if upstream.is_cache(value) else value for k, value in kwargs.items()
            }
            args, kwargs = with_hidden((args, kwargs), hidden)
            layer = self.layers[index]
            output = layer(*args, **kwargs) if lora is None else lora.call(layer, *args, **kwargs)
            hidden = output if isinstance(output, Tensor) else output[0]
        return hidden

    def _readout(self, frame: Frame, hidden: Tensor) -> Tensor:
        """Run the layers after the span and the tail on the output of a pass."""
        with self._forced(None):
            hidden = self._run(range(self.end, len(self.layers)), hidden, frame, 0)
            for module in self.tail:
                hidden = module(hidden)
        return hidden


def attach(model: Any, config: RecursionConfig | None = None) -> Recursion:
    """Attach a zero-initialised recursion to a causal language model of transformers, and return it.

    The model stays the same object, so that `generate`, `peft` and `lm-eval` keep working on it. The recursion is also
    reachable as `model.recursion`. Its depth starts at `max_steps`.

    Raises:
        UsageError: the configuration does not fit the model.
        RRError: the model has a recursion already, or its family cannot be supported.
    """
    if getattr(model, "recursion", None) is not None:
        raise RRError("the model has a recursion attached already", "Call model.recursion.detach() first.")
    recursion = Recursion(model, config or RecursionConfig())
    if recursion.needs_check:
        try:
            if is_skeleton(model):
                raise RRError(
                    f"'{model.config.model_type}' models need a self-check, which a model without weights cannot run",
                    "Load the model's weights; for 'rr surgery', leave out --no-verify.",
                )
            prove(recursion)
            self_check(recursion)
        except Exception as error:
            recursion.detach()
            if isinstance(error, RRError):
                raise
            raise RRError(f"'{model.config.model_type}' models cannot be supported: {error}") from error
    return recursion


def at_depth(model: Any, depth: int) -> AbstractContextManager[None]:
    """Let a model run at a depth for a while; one without a recursion has pass 0 alone, and runs as it is."""
    recursion = getattr(model, "recursion", None)
    return nullcontext() if recursion is None else recursion.at_depth(depth)


def _drawn(config: RecursionConfig, hidden: int) -> tuple[FeedbackCell, BoundaryHead]:
    """Return a fresh cell and head; their initial weights follow from the configuration's seed alone."""
    generator = torch.Generator().manual_seed(config.seed)
    cell = FeedbackCell(hidden, config.cell_width or hidden, config.max_steps, generator)
    return cell, BoundaryHead(hidden, generator, signals=config.head_signals)


def _root_mean_square(hidden: Tensor) -> Tensor:
    """Return the root mean square of each position, `[batch, position, 1]`, in fp32."""
    return hidden.float().pow(2).mean(-1, keepdim=True).sqrt()


def _relative_norm(feedback: Tensor, entry: Tensor) -> Tensor:
    with torch.no_grad():
        return feedback.float().pow(2).mean().sqrt() / entry.float().pow(2).mean().sqrt().clamp_min(1e-12)


def _submodule_or_none(model: nn.Module, path: str) -> nn.Module | None:
    parent, _, name = path.rpartition(".")
    return getattr(model.get_submodule(parent), name, None)
