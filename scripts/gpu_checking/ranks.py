"""Two ranks beside Hugging Face `generate`: on one device through gloo, and on two where there are two."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from benchmarking.workloads import ragged

from gpu_checking.engines import hf_greedy
from gpu_checking.models import make_model
from gpu_checking.section import Row

PROGRAM = Path(__file__).parents[1] / "gpu_check_rank.py"
SIZE = 2
NEW_TOKENS = 16
TIMEOUT_S = 120.0


class Setting(NamedTuple):
    """How two ranks run; `shares` makes them see one device."""

    name: str
    all_reduce: str
    inference: dict[str, object]
    shares: bool


ONE_DEVICE = (Setting("one device, gloo", "gloo", {}, True),)
TWO_DEVICES = (
    Setting("two devices, nccl", "nccl", {}, False),
    Setting("two devices, auto", "auto", {}, False),
    Setting("two devices, auto, eager", "auto", {"graphs": "none"}, False),
)


def rank_rows(device: torch.device) -> Iterator[Row]:
    """Tokens of two ranks, equal to Hugging Face's one by one, in fp32 on a tiny model."""
    model = make_model("tiny", device, torch.float32)
    prompts = [prompt[:40] for prompt in ragged(6, vocab_size=model.config.vocab_size).prompts]
    expected = [hf_greedy(model, prompt, NEW_TOKENS, device) for prompt in prompts]
    settings = ONE_DEVICE
    if device.type == "cuda" and torch.cuda.device_count() >= SIZE:
        settings += TWO_DEVICES
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for setting in settings:
            shard = {"device": device.type, "all_reduce": setting.all_reduce}
            inference = {"dtype": "fp32", "max_model_len": 256, **setting.inference}
            task = {"folder": folder, "shard": shard, "inference": inference, "prompts": prompts}
            said = _run({**task, "new_tokens": NEW_TOKENS}, setting)
            equal = sum(a == b for a, b in zip(said["token_ids"], expected, strict=True))
            value = f"{equal} of {len(prompts)} requests equal Hugging Face generate; {said['served']}"
            yield Row(setting.name, value, equal == len(prompts), {"equal": equal, "requests": len(prompts)})


def _run(task: dict, setting: Setting) -> dict:
    """What rank 0 of two processes says. Raises `RuntimeError` with what a rank that failed printed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": str(SIZE), "LOCAL_WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1"}
    if setting.shares:
        common["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps({**task, "rank": rank})],
            env={**os.environ, **common, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(SIZE)
    ]
    try:
        said = [rank.communicate(timeout=TIMEOUT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    failed = [f"rank {number}: {said[number][1][-800:]}" for number, rank in enumerate(ranks) if rank.returncode]
    if failed:
        raise RuntimeError("; ".join(failed))
    return json.loads(said[0][0].splitlines()[-1])
