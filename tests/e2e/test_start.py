"""What a fresh process imports on its way to the first token: torch, transformers, and little beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tiny_models import save_tiny_model

# Everything that belongs to these may be imported beside torch and transformers.
OURS = {"inference_shardformer", "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "psutil", "yaml"}

SCRIPT = """
import json, sys
import torch
import torch.backends.opt_einsum  # which torch 2.5 imports for the first einsum
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM
before = set(sys.modules)
from inference_shardformer import ConfigSources, InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
one = ShardConfig(tp_size=1, device="cpu", threads_per_rank=1)
config = InferenceConfig(cache={"num_blocks": 8}, scheduler={"max_num_seqs": 4}, max_model_len=64)
with InferenceShardformer(one, config, sources=ConfigSources(environ={})) as shardformer:
    engine = shardformer.attach(shardformer.from_pretrained(sys.argv[1]))
    tokens = engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=1, ignore_eos=True))[0].token_ids
print(json.dumps({"tokens": len(tokens), "imported": sorted(set(sys.modules) - before)}))
"""


def test_the_way_to_the_first_token_imports_little(tmp_path: Path) -> None:
    save_tiny_model("gqa", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False, cwd="/", timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["tokens"] == 1
    known = OURS | set(sys.stdlib_module_names)
    foreign = [name for name in report["imported"] if name.partition(".")[0] not in known]
    assert not [name for name in foreign if not name.startswith("_sysconfigdata")]  # the standard library's, per system
