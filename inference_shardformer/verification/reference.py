"""Reference: what every module of the unsharded model takes in and gives out while it generates greedily."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_ATTEMPTS = 20
CLEAR_MARGIN = 2e-3  # above what rounding may do to logits


class Activation(NamedTuple):
    """One call of one module over all tokens of all sequences; `None` for what is no tensor of features by token."""

    entered: torch.Tensor | None  # [num_tokens, width]
    left: tuple[torch.Tensor, ...]  # each [num_tokens, width]


@dataclass
class Reference:
    """The unsharded model and its activations. Rows are tokens: of sequence 0 by position, then of sequence 1, ..."""

    model: PreTrainedModel
    prompts: list[list[int]]
    sequences: list[list[int]] = field(default_factory=list)  # prompts and what follows them
    activations: dict[str, list[Activation]] = field(default_factory=dict)  # path -> one for each call in a forward
    margin: float = float("inf")  # of the closest greedy choice, relative to the largest logit

    @property
    def is_clear(self) -> bool:
        """Whether no greedy choice is close, and tokens are told apart by their position and id."""
        return self.margin > CLEAR_MARGIN and len(self.row_of()) == self.num_rows

    def row_of(self) -> dict[tuple[int, int], int]:
        """The row of each (position, token id) that the model is given. Sequences are chosen so that it is unique."""
        rows: dict[tuple[int, int], int] = {}
        start = 0
        for sequence in self.sequences:
            rows.update({(position, token): start + position for position, token in enumerate(sequence[:-1])})
            start += len(sequence) - 1
        return rows

    def prompt_rows(self) -> set[int]:
        """The rows of the prompts' tokens; the others were generated."""
        rows: set[int] = set()
        start = 0
        for prompt, sequence in zip(self.prompts, self.sequences, strict=True):
            rows.update(range(start, start + len(prompt)))
            start += len(sequence) - 1
        return rows

    @property
    def head(self) -> str:
        """The path of the output head; empty if there is none."""
        head = self.model.get_output_embeddings()
        return next((path for path, module in self.model.named_modules() if module is head), "")

    @property
    def num_rows(self) -> int:
        """Tokens that the model is given, over all sequences."""
        return sum(len(sequence) - 1 for sequence in self.sequences)

    def is_embedding(self, path: str) -> bool:
        """Whether the native module looks rows of its weight up."""
        return isinstance(self._native(path), nn.Embedding)

    def is_transposed(self, path: str) -> bool:
        """Whether the native module keeps its weight as `[in_features, out_features]`."""
        return type(self._native(path)).__name__ == "Conv1D"

    def _native(self, path: str) -> nn.Module | None:
        try:
            return self.model.get_submodule(path)
        except AttributeError:  # a module that only the sharded model has
            return None


def record(model: PreTrainedModel, *, prompt_lengths: Sequence[int], max_new_tokens: int, seed: int = 0) -> Reference:
    """Generate for random prompts and record everything. Tokens are told apart by their position and id."""
    vocab_size = int(cast("nn.Embedding", model.get_input_embeddings()).weight.shape[0])
    for attempt in range(seed, seed + _ATTEMPTS):
        generator = torch.Generator().manual_seed(attempt)
        prompts = [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in prompt_lengths]
        reference = Reference(model, prompts)
        forwards: list[dict[str, list[Activation]]] = []
        for prompt in prompts:
            sequence, margin = _generate(model, prompt, max_new_tokens, forwards)
            reference.sequences.append(sequence)
            reference.margin = min(reference.margin, margin)
        if reference.is_clear:
            break
    reference.activations = _joined(forwards)
    return reference


def by_token(t: object, num_tokens: int) -> torch.Tensor | None:
    """Features as `[num_tokens, width]`; `None` for anything else, and where it cannot be told which axis is which."""
    if not isinstance(t, torch.Tensor) or not t.is_floating_point() or t.dim() < 2:
        return None
    is_by_head = t.dim() == 4 and t.shape[0] == 1 and t.shape[2] == num_tokens  # [1, heads, num_tokens, head_dim]
    if is_token_major(t, num_tokens):
        return None if is_by_head and num_tokens > 1 else t.reshape(num_tokens, -1)
    return t.transpose(1, 2).reshape(num_tokens, -1) if is_by_head else None


def is_token_major(t: torch.Tensor, num_tokens: int) -> bool:
    """Whether the features of a token lie together."""
    return t.shape[0] == num_tokens or (t.shape[0] == 1 and t.shape[1] == num_tokens)


def tensors_of(output: object) -> list[object]:
    """What a module returned, as a flat list."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        return list(output.values())
    return list(output) if isinstance(output, (tuple, list)) else []


def entering(args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """The tensor a module works on: its first argument, or `hidden_states`."""
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))


@torch.no_grad()
def _generate(
    model: PreTrainedModel, prompt: list[int], max_new_tokens: int, forwards: list[dict[str, list[Activation]]]
) -> tuple[list[int], float]:
    """Greedy decoding with Hugging Face's own cache, one forward for each step; and how close the closest choice was.

    A model without a cache is given everything again in each step, and recorded once it has all tokens.
    """
    tokens, new, past, margin, steps = list(prompt), list(prompt), None, float("inf"), []
    for _ in range(max_new_tokens):
        with _recording(model, len(new)) as calls:
            output = model(input_ids=torch.tensor([new], device=model.device), past_key_values=past, use_cache=True)
        steps.append(calls)
        past = _used_cache(output)
        token, gap = _choice(output.logits[0, -1])
        margin = min(margin, gap)
        tokens.append(token)
        new = tokens.copy() if past is None else [token]
    forwards += steps if past is not None else steps[-1:]
    return tokens, margin


def _used_cache(output: object) -> object:
    """The cache that a forward has filled; `None` where the model makes one and computes without it."""
    past = getattr(output, "past_key_values", None)
    length = getattr(past, "get_seq_length", None)
    return None if callable(length) and length() == 0 else past


def _choice(logits: torch.Tensor) -> tuple[int, float]:
    """The greedy token, and how far the next best is, relative to the largest logit."""
    first, second = torch.topk(logits, 2).values.tolist()
    return int(logits.argmax()), (first - second) / max(float(logits.abs().max()), 1e-6)


@contextmanager
def _recording(model: nn.Module, num_tokens: int) -> Iterator[dict[str, list[Activation]]]:
    calls: dict[str, list[Activation]] = {}

    def recorder(path: str) -> object:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            entered = by_token(entering(args, kwargs), num_tokens)
            left = [by_token(t, num_tokens) for t in tensors_of(output)]
            kept = tuple(_copy(t) for t in left if t is not None)
            calls.setdefault(path, []).append(Activation(None if entered is None else _copy(entered), kept))

        return hook

    handles = [module.register_forward_hook(recorder(path), with_kwargs=True) for path, module in model.named_modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _copy(t: torch.Tensor) -> torch.Tensor:
    return t.detach().float().cpu().clone()


def _joined(forwards: list[dict[str, list[Activation]]]) -> dict[str, list[Activation]]:
    """All forwards one after the other; modules that not every forward calls alike are left out."""
    joined = {}
    for path, first in forwards[0].items():
        calls = [forward.get(path, []) for forward in forwards]
        if all(len(each) == len(first) for each in calls):
            columns = [[each[number] for each in calls] for number in range(len(first))]
            if all(len({len(call.left) for call in column}) == 1 for column in columns):
                joined[path] = [_joined_call(column) for column in columns]
    return joined


def _joined_call(calls: list[Activation]) -> Activation:
    entered = [call.entered for call in calls if call.entered is not None]
    is_uniform = len(entered) == len(calls) and len({t.shape[-1] for t in entered}) == 1
    whole = torch.cat(entered) if is_uniform else None
    left = []
    for parts in zip(*(call.left for call in calls), strict=True):
        if len({part.shape[-1] for part in parts}) > 1:  # attention weights, as wide as what is visible
            break
        left.append(torch.cat(parts))
    return Activation(whole, tuple(left))
