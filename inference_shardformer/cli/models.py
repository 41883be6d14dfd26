"""What `--model` names: the shipped demo model, a checkpoint folder, or an id on the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from inference_shardformer.errors import CheckpointError

DEMO = "demo"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def resolve_model(name: str) -> str:
    """A folder that holds a readable `config.json`, or `name` itself where it can be a Hub id.

    Raises CheckpointError for everything that cannot be a checkpoint, without reading any weight.
    """
    if name == DEMO:
        folder = Path(str(files("inference_shardformer"))) / "demo_model"
        if not folder.is_dir():
            raise CheckpointError(
                "--model demo: the demo model is not part of this installation",
                remedy="train it: python scripts/train_demo_model.py --out inference_shardformer/demo_model",
            )
        return str(folder)
    path = Path(name).expanduser()
    if path.is_dir():
        _read_config(path)
        return str(path)
    if path.is_file():
        raise CheckpointError(
            f"--model {name}: is a file, not a checkpoint folder", remedy="give the folder that holds config.json"
        )
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"--model {name}: no such folder, and not a Hub id of the form owner/name",
            remedy="give a checkpoint folder, an id such as HuggingFaceTB/SmolLM2-135M, or demo",
        )
    return name


def has_tokenizer(model: str) -> bool:
    """Whether a model brings a tokenizer; one that is not a local folder is taken to have one."""
    folder = Path(model)
    return not folder.is_dir() or any((folder / name).is_file() for name in _TOKENIZER_FILES)


def check_before_launch(model: str, tp_size: int) -> None:
    """Refuse an unsupported architecture and an impossible tp size before any rank is started; download a Hub id once.

    Reading a configuration as transformers does takes seconds, so that is done only where its numbers look wrong. A
    policy with options is asked later, once these are known.
    """
    from inference_shardformer.huggingface import load_hf_config, locate_checkpoint
    from inference_shardformer.policies.registry import policy_for

    folder = locate_checkpoint(model)
    content = _read_config(folder)
    architectures = content.get("architectures")
    if isinstance(architectures, list) and architectures:
        policy = policy_for(str(architectures[0]))
        if policy.Options is None and _looks_impossible(content, tp_size):
            policy.check_tp_size(policy.facts(load_hf_config(folder, trust_remote_code=False)), tp_size)


def _looks_impossible(content: Mapping[str, object], tp_size: int) -> bool:
    """Whether the counts that are usually cut over the ranks do not fit their number."""
    whole = [content.get(name) for name in ("num_attention_heads", "intermediate_size")]
    kv_heads = content.get("num_key_value_heads")
    is_cut = isinstance(kv_heads, int) and kv_heads > 0 and kv_heads % tp_size and tp_size % kv_heads
    return bool(is_cut) or any(isinstance(count, int) and count % tp_size for count in whole)


def _read_config(folder: Path) -> dict[str, object]:
    """What `config.json` says. Refuses a folder that is no checkpoint before anything expensive starts."""
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(
            f"{folder}: is not a checkpoint, it holds no config.json",
            remedy="give the folder that `save_pretrained` wrote, with config.json and safetensors weights",
        )
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{config}: cannot be read as JSON: {exc}", remedy="download the file again") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{config}: holds no JSON object", remedy="download the file again")
    return content
