"""Rank program: runs the example of ColossalAI's README with its import lines changed, and nothing else but the model.

Usage: torchrun --nproc-per-node N colossalai_scripts.py CHECKPOINT
Each rank prints the answer of the script as JSON.
"""

from __future__ import annotations

import json
import sys

from foreign_scripts import README

HERE = "inference_shardformer.bridges"
IMPORTS = {
    "import colossalai\n": f"from {HERE} import colossalai\n",
    "from colossalai.inference import": f"from {HERE}.colossalai import",
}


def with_our_imports(script: str) -> str:
    """The script with other import lines."""
    for theirs, ours in IMPORTS.items():
        assert script.count(theirs) == 1, theirs
        script = script.replace(theirs, ours)
    return script


if __name__ == "__main__":
    path = sys.argv[1]
    for call in ("engine.generate(prompts=prompts)", "engine.generate(prompts)"):
        script = with_our_imports(README).replace("lmsys/vicuna-7b-v1.3", path).replace("pprint(response)", "")
        names: dict[str, object] = {}
        exec(compile(script.replace("engine.generate(prompts=prompts)", call), "README.py", "exec"), names)
        names["engine"].close()
        print(json.dumps(names["response"]))
