"""Watch: follows a sharded model through its forwards, module by module, and finds where it first differs.

Where a module takes in the same features as the unsharded one, it is handed exactly those before it runs. Rounding then
never adds up from layer to layer, and one tight tolerance serves models of any depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from inference_shardformer.errors import StateError
from inference_shardformer.verification.compare import TOLERANCE, Comparison, compare_parts, compare_whole
from inference_shardformer.verification.mapping import Features
from inference_shardformer.verification.reference import (
    Activation,
    Reference,
    by_token,
    entering,
    is_token_major,
    tensors_of,
)


class Divergence(NamedTuple):
    """Where a rank first differs. `order` counts the places passed before, alike on every rank."""

    module: str
    message: str
    phase: str
    error: float
    order: int


@dataclass
class _Seen:
    """One comparison in the current forward."""

    path: str
    what: str  # "output" or "input"
    error: float
    is_equal: bool
    is_whole: bool
    order: int
    unchecked: tuple[str, ...]  # modules that ran since the last comparison that was equal
    is_in_order: bool = False  # an input that is this rank's run of features, but not what the plan says it holds


class Watch:
    """Compares every module of one rank's model with the reference until the first confirmed divergence.

    With a `free_tolerance` nothing is handed over, and what differs by less is taken for rounding that added up.
    """

    def __init__(
        self,
        model: nn.Module,
        features: dict[str, Features],
        reference: Reference,
        *,
        tp_rank: int,
        tp_size: int,
        free_tolerance: float | None = None,
    ) -> None:
        self.divergence: Divergence | None = None
        self.num_comparisons = 0
        self.worst_error = 0.0
        self.inside: list[str] = []  # the modules that are running, the innermost last
        self._features = features
        self._reference = reference
        self._place = {"tp_rank": tp_rank, "tp_size": tp_size}
        self._row_of = reference.row_of()
        self._prompt_rows = reference.prompt_rows()
        self._rows: torch.Tensor | None = None  # of the packed tokens; `None` while nothing is compared
        self._kept: torch.Tensor | None = None  # of the tokens that logits are wanted for
        self._phase = ""
        self._seen: list[_Seen] = []
        self._unchecked: list[str] = []
        self._calls: dict[str, int] = {}
        self._order = 0
        self._model = model
        self._is_free = free_tolerance is not None
        self._tolerance = TOLERANCE if free_tolerance is None else free_tolerance

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow every forward of the model."""
        handles = []
        for path, module in self._model.named_modules():
            enter = self._start if not path else self._enter(path)
            leave = self._finish if not path else self._leave(path)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def interrupted(self) -> None:
        """The model raised: what differed before that is not excused by what would have come."""
        if self.divergence is None:
            self._judge(is_complete=False)

    def _start(self, module: nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        self.inside, self._seen, self._unchecked, self._calls, self._rows = [], [], [], {}, None
        if self.divergence is not None:
            return
        positions, tokens = kwargs["position_ids"][0].tolist(), kwargs["input_ids"][0].tolist()
        rows = [self._row_of.get(place) for place in zip(positions, tokens, strict=True)]
        known = [row for row in rows if row is not None]
        if len(known) == len(rows):
            self._rows = torch.tensor(known)
            self._kept = self._rows[kwargs["logits_to_keep"].cpu()]
            self._phase = "prefill" if self._prompt_rows.intersection(known) else "decode"

    def _finish(self, module: nn.Module, args: object, kwargs: object, output: object) -> None:
        logits = getattr(output, "logits", None)
        head = self._features.get(self._reference.head)
        if self._rows is not None and isinstance(logits, torch.Tensor) and self._kept is not None and head is not None:
            whole = self._reference.activations[""][0].left[0]
            parts = head.outputs or ()
            if parts and whole.shape[-1] >= max(part.stop for part in parts):
                shifted = [part._replace(module="") for part in parts]
                got = logits.reshape(-1, logits.shape[-1])
                found = compare_parts(got, shifted, self._kept, self._reference, is_input=False)
                self._note("", "output", found)
        self._judge(is_complete=True)

    def _enter(self, path: str) -> object:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
            self.inside.append(path)
            self._order += 1
            if self._rows is None or self.divergence is not None:
                return None
            got = entering(args, kwargs)
            want = self._expected(path)
            tokens = self._tokens(got)
            if tokens is None or want is None or not isinstance(got, torch.Tensor):
                return None
            found = self._compare_input(path, tokens, want)
            self._note(path, "input", found, is_in_order=self._is_in_order(tokens, want))
            if found is None or not found.is_whole or self._is_free or self._has_differed():
                return None
            return _with(args, kwargs, got, self._handed(path, got, want))

        return hook

    def _leave(self, path: str) -> object:
        def hook(module: nn.Module, args: object, kwargs: object, output: object) -> None:
            if self.inside and self.inside[-1] == path:
                self.inside.pop()
            self._order += 1
            if self._rows is None or self.divergence is not None:
                return
            want = self._expected(path)
            self._calls[path] = self._calls.get(path, 0) + 1
            found = None if want is None else self._compare_output(path, output, want)
            if found is None:
                self._unchecked.append(path)
            self._note(path, "output", found)

        return hook

    def _expected(self, path: str) -> Activation | None:
        """What the unsharded model's call of this module was; of one that is called again, that same call."""
        features = self._features.get(path)
        native = path if features is None else features.native
        calls = self._reference.activations.get(native, [])
        number = self._calls.get(path, 0)
        return calls[number] if number < len(calls) else None

    def _tokens(self, t: object) -> torch.Tensor | None:
        """Features by token, of all packed tokens or of those that logits are wanted for."""
        for rows in (self._rows, self._kept):
            found = None if rows is None else by_token(t, len(rows))
            if found is not None:
                return found
        return None

    def _rows_for(self, t: torch.Tensor) -> torch.Tensor:
        if self._rows is None or self._kept is None:
            raise StateError("nothing is compared in this forward", remedy="ask only while rows are known")
        return self._rows if t.shape[0] == len(self._rows) else self._kept

    def _compare_input(self, path: str, got: torch.Tensor, want: Activation) -> Comparison | None:
        features, rows = self._features.get(path), self._rows_for(got)
        if features is not None and features.inputs is not None:
            return compare_parts(got, features.inputs, rows, self._reference, is_input=True)
        return None if want.entered is None else compare_whole(got, want.entered[rows], **self._place)

    def _compare_output(self, path: str, output: object, want: Activation) -> Comparison | None:
        features = self._features.get(path)
        found = [tokens for t in tensors_of(output) if (tokens := self._tokens(t)) is not None]
        if features is not None and features.outputs is not None and found:
            if found[0].shape[-1] != features.width:
                return None
            rows = self._rows_for(found[0])
            return compare_parts(found[0], features.outputs, rows, self._reference, is_input=False)
        pairs = zip(found, want.left)  # noqa: B905 - what one of them returns beside the result is its own affair
        all_compared = [compare_whole(got, left[self._rows_for(got)], **self._place) for got, left in pairs]
        compared = [each for each in all_compared if each is not None]
        return max(compared, key=lambda each: each.error) if compared else None

    def _handed(self, path: str, got: torch.Tensor, want: Activation) -> torch.Tensor | None:
        """The reference's input in the shape of this one; `None` where the input is cut over the ranks."""
        features = self._features.get(path)
        if want.entered is None or (features is not None and features.inputs is not None):
            return None
        tokens = self._tokens(got)
        if tokens is None or tokens.shape[-1] != want.entered.shape[-1] or not is_token_major(got, tokens.shape[0]):
            return None
        return want.entered[self._rows_for(tokens)].to(got.device, got.dtype).reshape(got.shape)

    def _is_in_order(self, got: torch.Tensor, want: Activation) -> bool:
        if want.entered is None:
            return False
        found = compare_whole(got, want.entered[self._rows_for(got)], **self._place)
        return found is not None and found.error <= self._tolerance

    def _note(self, path: str, what: str, found: Comparison | None, *, is_in_order: bool = False) -> None:
        if found is None:
            return
        self.num_comparisons += 1
        is_equal, unchecked = found.error <= self._tolerance, tuple(self._unchecked)
        seen = _Seen(path, what, found.error, is_equal, found.is_whole, self._order, unchecked, is_in_order)
        self._seen.append(seen)
        if is_equal:
            self.worst_error = max(self.worst_error, found.error)
            self._unchecked.clear()

    def _has_differed(self) -> bool:
        return any(not seen.is_equal for seen in self._seen)

    def _judge(self, *, is_complete: bool) -> None:
        """Confirm the first difference, unless the module around it gives out what it should all the same."""
        for seen in self._seen:
            if not seen.is_equal and not (is_complete and self._is_excused(seen)):
                self.divergence = _blamed(seen, self._phase)
                return

    def _is_excused(self, seen: _Seen) -> bool:
        later = [
            each
            for each in self._seen
            if each.what == "output" and each.is_whole and each.order > seen.order and _is_within(seen.path, each.path)
        ]
        return bool(later) and later[0].is_equal


def _blamed(seen: _Seen, phase: str) -> Divergence:
    if seen.what == "output":
        told = "its output differs, and what it takes in does not" if seen.path else "the logits differ"
        return Divergence(seen.path, told, phase, seen.error, seen.order)
    if seen.is_in_order:
        told = "it is handed this rank's run of features, and by its plan it holds the weights of others"
        return Divergence(seen.path, told, phase, seen.error, seen.order)
    parent, _, leaf = seen.path.rpartition(".")
    unchecked = [path for path in seen.unchecked if _is_within(path, parent)]
    if unchecked:
        told = f"what {leaf} takes in from it differs; it is the last to run before that cannot be compared itself"
        return Divergence(unchecked[-1], told, phase, seen.error, seen.order)
    return Divergence(parent, f"what it hands to {leaf} differs", phase, seen.error, seen.order)


def _is_within(path: str, parent: str) -> bool:
    return not parent or path.startswith(f"{parent}.")


def _with(
    args: tuple[object, ...], kwargs: dict[str, object], got: torch.Tensor, handed: torch.Tensor | None
) -> tuple[tuple[object, ...], dict[str, object]] | None:
    """The arguments with one tensor exchanged."""
    if handed is None:
        return None
    return (
        tuple(handed if value is got else value for value in args),
        {name: handed if value is got else value for name, value in kwargs.items()},
    )
