"""Session: a loaded model with its engine, opened and closed the same way by every command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from inference_shardformer.cli.models import has_tokenizer
from inference_shardformer.cli.terminal import Terminal
from inference_shardformer.config.loader import load_config
from inference_shardformer.config.origins import Level
from inference_shardformer.config.sources import ConfigSources
from inference_shardformer.errors import CheckpointError
from inference_shardformer.importing import collection_paused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from inference_shardformer import InferenceEngine, InferenceShardformer

_SHOWN = (
    ("tp_size", "shard.tp_size"),
    ("device", "shard.device"),
    ("dtype", "inference.dtype"),
    ("attention", "inference.attention.backend"),
)


class Session(NamedTuple):
    """What a command works with on one rank."""

    shardformer: InferenceShardformer
    engine: InferenceEngine


@contextmanager
def open_session(
    model: str, sources: ConfigSources, terminal: Terminal, *, with_tokenizer: bool, plan: str | None = None
) -> Iterator[Session]:
    """Load `model` (a folder or Hub id) on this rank, say what was decided, and close everything at the end.

    `plan` is a plan file to load by.
    """
    from inference_shardformer import InferenceShardformer
    from inference_shardformer.huggingface import load_hf_config, locate_checkpoint

    terminal.note(f"model      {model}")
    folder = locate_checkpoint(model)
    weights = load_config(sources).inference.weights
    load_hf_config(folder, trust_remote_code=weights.trust_remote_code)  # what is wrong with it is not the tokenizer's
    tokenizer = _load_tokenizer(folder) if with_tokenizer and has_tokenizer(str(folder)) else None
    shardformer = InferenceShardformer(sources=sources)
    try:
        with terminal.loading() as progress:
            sharded = shardformer.from_pretrained(folder, plan=plan, progress=progress)
        engine = shardformer.attach(sharded, tokenizer=tokenizer)
        config = engine.config.current.config
        for label, path in _SHOWN:
            decision = config.decision(path)
            is_default = decision.origin.level is Level.DEFAULT
            why = decision.reason if is_default else f"{decision.origin}; {decision.reason}"
            terminal.note(f"{label:<10} {decision.value} ({why.strip('; ') or decision.origin})")
        yield Session(shardformer, engine)
    finally:
        shardformer.close()


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from inference_shardformer.huggingface import unreadable

    with collection_paused():
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except unreadable() as exc:
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be loaded: {exc}",
            remedy="repair config.json and the tokenizer files, or remove these; without them give prompts as token "
            "ids",
        ) from exc
