"""Scoring of text: held-out files of the demo model, logits at every token of an engine's prompts, and perplexity."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

from inference_shardformer import InferenceEngine, InferenceShardformer, SamplingParams

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}


def held_out_sequences(folder: Path, *, count: int, length: int) -> list[list[int]]:
    """The first tokens of files that the demo model was not trained on, by the rule of `train_demo_model.py`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    root, sequences = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        is_held_out = hashlib.sha256(relative.as_posix().encode()).digest()[0] % 20 == 0
        if SKIPPED.intersection(relative.parts) or not is_held_out:
            continue
        ids = tokenizer.encode(path.read_text(encoding="utf-8", errors="replace"))
        if len(ids) >= length:
            sequences.append(ids[:length])
        if len(sequences) == count:
            return sequences
    raise RuntimeError(f"{root} holds {len(sequences)} held-out files of {length} tokens, {count} are needed")


def engine_logits(
    shardformer: InferenceShardformer, engine: InferenceEngine, sequences: Sequence[list[int]]
) -> torch.Tensor:
    """float32 logits `[sequences, tokens, vocabulary]` of the sharded model, prompt by prompt; alike on every rank."""
    model = shardformer.sharded.model
    decoder, head = model.get_submodule("model"), model.get_submodule("lm_head")
    hidden: list[torch.Tensor] = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        hidden.append(output.last_hidden_state.flatten(0, -2).clone())

    found = []
    hook = decoder.register_forward_hook(keep)
    for sequence in sequences:
        hidden.clear()
        engine.reset_prefix_cache()  # every token is to be computed
        engine.generate([sequence], SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True))
        with torch.inference_mode():
            mine = head(torch.cat(hidden)[: len(sequence)]).float()
            found.append(shardformer.group.all_gather(mine, dim=-1)[:, : model.config.vocab_size].clone())
    hook.remove()
    return torch.stack(found)


def perplexity(logits: torch.Tensor, sequences: Sequence[list[int]]) -> float:
    """exp of the mean negative log-likelihood of every token but each sequence's first."""
    targets = torch.tensor(sequences)[:, 1:].flatten()
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), targets)
    return loss.exp().item()


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of the expected logits around their mean of each token."""
    spread = (expected - expected.mean(dim=-1, keepdim=True)).square().mean().sqrt()
    return ((logits - expected).square().mean().sqrt() / spread).item()
