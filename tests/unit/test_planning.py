"""Plans made offline: bytes, capacity, possible numbers of ranks, text, and the command."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path

import pytest
import torch
from scaled_mm_standin import scaled_mm
from tiny_models import save_tiny_model, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from inference_shardformer import (
    ConfigSources,
    InferenceConfig,
    InferenceShardformer,
    SamplingParams,
    ShardConfig,
    plan_model,
)
from inference_shardformer.cli.main import main
from inference_shardformer.compute import fp8_linear
from inference_shardformer.compute.fp8_linear import multiplies_on_cpu
from inference_shardformer.errors import CheckpointError, TensorParallelSizeError
from inference_shardformer.kernels.cpu.library import native_problem
from inference_shardformer.planning.rows import as_ranges, compressed
from inference_shardformer.planning.text import amount
from inference_shardformer.planning.traffic import plan_traffic
from inference_shardformer.sharding.plan import ModulePlan, ParameterPlan, RankLayout, ShardingPlan

NOTHING = ConfigSources(environ={})
ROOT = Path(__file__).parents[2]


def plan(folder: Path, tp_size: int = 1, *, memory: int | None = 2**30, **inference):
    return plan_model(
        folder, ShardConfig(tp_size=tp_size), InferenceConfig(**inference), sources=NOTHING, memory=memory
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save_tiny_model("odd_vocabulary", path)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a model of 30 layers, without weights."""
    path = tmp_path_factory.mktemp("large")
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 8192}
    config = LlamaConfig(num_hidden_layers=30, num_attention_heads=32, num_key_value_heads=8, **shape)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    return path


def test_nothing_is_joined_and_no_weight_is_read(large):
    report = plan(large, 8, dtype="bf16", kernels={"linear": "torch"})
    assert not torch.distributed.is_initialized()
    heads, kv_heads, head_dim = 4, 1, 128  # of one of eight ranks
    layer = (heads + 2 * kv_heads) * head_dim * 4096 + 4096 * heads * head_dim + 3 * 1376 * 4096 + 2 * 4096
    assert report.rank_bytes == (2 * (30 * layer + 4096 + 2 * 4000 * 4096),) * 8
    assert report.kv_cache.bytes_per_token == 2 * 30 * kv_heads * head_dim * 2
    assert report.traffic.num_bytes("token") == (1 + 2 * 30) * 4096 * 2


@pytest.mark.parametrize(
    ("linear", "weights"),
    [
        ("torch", {}),
        ("cpu", {"compression": "none"}),
        ("cpu", {"compression": "auto"}),
        ("cpu", {"quantization": "int8"}),
        ("fp8", {"quantization": "fp8"}),
    ],
)
@pytest.mark.parametrize("case", ["odd_vocabulary", "odd_vocabulary_tied", "biased"])
def test_bytes_are_those_of_the_kernel_that_stores_the_weights(tmp_path, monkeypatch, case, linear, weights):
    if linear == "cpu" and native_problem() is not None:
        pytest.skip(native_problem()[1])
    if not multiplies_on_cpu():
        monkeypatch.setattr(fp8_linear, "multiplies_on_cpu", lambda: True)
        monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    save_tiny_model(case, tmp_path)
    config = {"dtype": "bf16", "kernels": {"linear": linear}, "weights": weights}
    report = plan(tmp_path, **config)
    inference = InferenceConfig.model_validate(config)
    with InferenceShardformer(ShardConfig(device="cpu"), inference, sources=NOTHING) as shardformer:
        model = shardformer.from_pretrained(tmp_path)
        held = {tensor.data_ptr(): tensor.nbytes for tensor in model.parameters()}
        assert (sum(held.values()),) == report.rank_bytes == shardformer.sharded.rank_bytes
    assert sum(size for row in report.rows for size in row.num_bytes) == report.rank_bytes[0]


@pytest.mark.skipif(native_problem() is not None, reason="the native kernels compress")
def test_compressed_weights_take_a_quarter_less(large):
    auto, none = (plan(large, 8, dtype="bf16", weights={"compression": each}) for each in ("auto", "none"))
    if auto.compression.value != "lossless":
        pytest.skip(auto.compression.reason)
    shares = {
        mine.name: mine.num_bytes[0] / plain.num_bytes[0] for mine, plain in zip(auto.rows, none.rows, strict=True)
    }
    assert {share for name, share in shares.items() if "norm" in name} == {1.0}
    projections = [share for name, share in shares.items() if name.endswith("proj.weight")]
    assert len(projections) == 30 * 4
    assert all(share == pytest.approx(0.755, rel=0.01) for share in projections)
    assert auto.rank_bytes[0] < 0.85 * none.rank_bytes[0]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"dtype": "bf16", "weights": {"compression": "none"}}, "as asked"),
        ({"dtype": "bf16", "kernels": {"linear": "torch"}}, "linear kernel torch compresses no weights"),
    ],
)
def test_it_says_how_weights_are_kept(folder, config, reason):
    report = plan(folder, **config)
    assert report.to_json()["compression"] == {"value": "none", "reason": reason}
    lines = str(report).splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("weights "))
    assert lines[place + 1].strip() == f"compression none: {reason}"


def test_a_cache_in_fp8_takes_half(folder):
    usual, half = (plan(folder, dtype="bf16", memory=2**24, cache={"dtype": dtype}) for dtype in (None, "fp8"))
    assert 2 * half.kv_cache.bytes_per_token == usual.kv_cache.bytes_per_token
    assert half.capacity.num_blocks == half.capacity.cache_bytes // half.kv_cache.bytes_per_block
    assert half.capacity.num_tokens > 1.9 * usual.capacity.num_tokens
    assert half.rank_bytes == usual.rank_bytes


def test_headers_are_compared(folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    tiny_config("gqa").save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match="embed_tokens"):
        plan(tmp_path)


def test_possible_sizes_are_those_that_can_be_planned(folder):
    report = plan(folder)
    assert list(report.tp_sizes) == list(range(1, 9))
    for size, problem in report.tp_sizes.items():
        if problem is None:
            assert plan(folder, size).tp_size == size
        else:
            with pytest.raises(TensorParallelSizeError, match=problem.replace("(", r"\(")):
                plan(folder, size)
    assert report.legal_tp_sizes == (1, 2, 4, 8)


@pytest.mark.parametrize("memory", [2**20, 50 * 2**20, 2**30])
def test_what_is_left_for_the_cache_fits_and_no_block_more(folder, memory):
    report = plan(folder, 2, memory=memory, max_model_len=100)
    used = max(report.rank_bytes) + report.workspace.num_bytes
    block, capacity = report.kv_cache.bytes_per_block, report.capacity
    assert capacity.cache_bytes == memory - used
    if used + block > memory:
        assert (capacity.num_blocks, capacity.num_tokens, capacity.max_context) == (0, 0, 0)
        assert "not enough" in str(report)
    else:
        assert used + capacity.num_blocks * block <= memory < used + (capacity.num_blocks + 1) * block
        assert capacity.num_sequences == {100: capacity.num_blocks // 7}  # 100 tokens take 7 blocks of 16
        assert capacity.max_context == 100


def test_without_a_memory_the_machine_is_shared(folder):
    memory = plan(folder, 4, memory=None).capacity.memory
    words = memory.reason.split()
    assert words[:3] == ["its", "share", "of"]
    free = float(words[3]) * {"GiB": 2**30, "MiB": 2**20}[words[4]]
    assert free / 4 == pytest.approx(memory.num_bytes, rel=0.01)


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it, at their highest."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, list[int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = {tensor.untyped_storage().data_ptr() for tensor in given} - set(self.held)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage().data_ptr()) not in known:
                self._hold(tensor, key)
        return out

    def _hold(self, tensor: torch.Tensor, key: int) -> None:
        if key not in self.held:
            self.held[key] = [0, tensor.untyped_storage().nbytes()]
            self.now += self.held[key][1]
            self.peak = max(self.peak, self.now)
        self.held[key][0] += 1
        weakref.finalize(tensor, self._drop, key)

    def _drop(self, key: int) -> None:
        self.held[key][0] -= 1
        if not self.held[key][0]:
            self.now -= self.held.pop(key)[1]


def test_the_workspace_is_an_estimate_from_above(folder):
    limits = {"max_num_batched_tokens": 400, "max_num_seqs": 4}
    config = InferenceConfig.model_validate({"dtype": "fp32", "scheduler": limits})
    report = plan_model(folder, ShardConfig(tp_size=1, device="cpu"), config, sources=NOTHING)
    with InferenceShardformer(ShardConfig(device="cpu"), config, sources=NOTHING) as shardformer:
        engine = shardformer.attach(shardformer.from_pretrained(folder))
        for first in range(1, 5):  # none begins as another one does
            engine.add_request(list(range(first, first + 100)), SamplingParams(max_new_tokens=2, ignore_eos=True))
        with Live() as live:
            engine.step()
    assert live.peak <= report.workspace.num_bytes < 3 * live.peak


def test_a_style_that_is_not_known_is_said_to_be_so(folder):
    facts = plan(folder).facts
    weight = ParameterPlan("model.odd.weight", (4, 4), ())
    odd = ModulePlan("model.odd", "model.odd", "my_style", (weight,))
    traffic = plan_traffic(ShardingPlan(facts, RankLayout(2, 0), (odd,), (), (0, 8)), torch.float32, embeddings=())
    assert traffic.undeclared == ("model.odd",)


def test_one_rank_exchanges_nothing(folder):
    report = plan(folder)
    assert report.traffic.exchanges == ()
    assert report.traffic.step_bytes(10, 2) == 0
    assert "exchanged" not in str(report)


class TestText:
    def test_thirty_layers_fit_on_a_screen(self, large):
        text = plan(large, 4).as_text(120)
        assert len(text.splitlines()) <= 40
        assert max(map(len, text.splitlines())) <= 120
        assert "model.layers.0-29.self_attn.qkv_proj.weight" in text
        assert "30 x " in text

    def test_every_row_can_be_asked_for(self, large):
        report = plan(large, 4)
        lines = report.as_text(is_complete=True).splitlines()
        for row in report.rows:
            assert [line for line in lines if line.startswith(f"{row.name} ")]

    def test_it_says_what_is_copied_padded_tied_and_impossible(self, tmp_path):
        save_tiny_model("odd_vocabulary_tied", tmp_path)
        text = str(plan(tmp_path, 8))
        assert "k_proj 2 times, v_proj 2 times" in text
        assert "7 of padding on rank 7" in text
        assert "is model.embed_tokens.weight" in text
        assert "whole on every rank" in text
        assert "not 3,5-7: num_attention_heads=8 is not a multiple of it" in text

    def test_names_are_joined_only_where_nothing_is_left_out(self):
        named = [("a.0.b", 1), ("a.1.b", 1), ("a.3.b", 1), ("c.0.1", 1), ("c.1.0", 1), ("d", 2)]
        assert compressed(named) == [("a.0-1,3.b", 1, 3), ("c.0.1", 1, 1), ("c.1.0", 1, 1), ("d", 2, 1)]
        assert compressed([(f"e.{i}.{j}", 0) for i in (0, 1) for j in (2, 3)]) == [("e.0-1.2-3", 0, 4)]
        assert as_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"

    @pytest.mark.parametrize(("size", "text"), [(0, "0 bytes"), (2**10, "1.00 KiB"), (3 * 2**29, "1.50 GiB")])
    def test_amounts(self, size, text):
        assert amount(size) == text


class TestCommand:
    def run(self, capsys, *words: str) -> tuple[int, str, str]:
        code = main(["plan", *words])
        out, err = capsys.readouterr()
        return code, out, err

    def test_text_and_file(self, capsys, folder, tmp_path):
        out = tmp_path / "plan.json"
        code, text, err = self.run(capsys, "--model", str(folder), "--tp", "2", "--memory", "1GiB", "--out", str(out))
        assert code == 0
        assert text == str(plan(folder, 2)) + "\n"
        assert out.read_text() == plan(folder, 2).file.document.to_text()
        assert f"saved      {out}" in err

    def test_json(self, capsys, folder):
        code, text, _ = self.run(capsys, "--model", str(folder), "--tp", "2", "--json", "--memory", str(2**30))
        document = json.loads(text)
        assert code == 0
        assert document == json.loads(json.dumps(plan(folder, 2).to_json()))
        assert document["capacity"]["memory_bytes"] == 2**30
        held = [sum(parameter["num_bytes"][rank] for parameter in document["parameters"]) for rank in (0, 1)]
        assert held == [rank["weight_bytes"] for rank in document["ranks"]]

    def test_options_of_the_configuration_count(self, capsys, folder):
        words = ("--model", str(folder), "--json", "--dtype", "bf16", "--set", "cache.block_size=8")
        _, text, _ = self.run(capsys, *words)
        document = json.loads(text)
        assert (document["dtype"], document["kv_cache"]["block_size"]) == ("bf16", 8)

    def test_a_policy_of_the_users_own(self, capsys, folder, tmp_path):
        source = "from inference_shardformer.policies.llama import LlamaPolicy\n\nclass Mine(LlamaPolicy):\n    pass\n"
        (tmp_path / "mine.py").write_text(source)
        code, text, _ = self.run(capsys, "--model", str(folder), "--policy", f"{tmp_path / 'mine.py'}:Mine")
        assert code == 0
        assert "LlamaForCausalLM by mine" in text

    @pytest.mark.parametrize("size", ["lots", "-3", "0", "12 parsecs"])
    def test_a_wrong_size_is_refused(self, capsys, folder, size):
        code, _, err = self.run(capsys, "--model", str(folder), f"--memory={size}")
        assert code == 2
        assert "is not a size" in err

    def test_an_impossible_size_lists_the_possible_ones(self, capsys, folder):
        code, _, err = self.run(capsys, "--model", str(folder), "--tp", "3")
        assert code == 2
        assert "use one of 1, 2, 4, 8" in err

    def test_generating_by_a_plan(self, capsys, folder, tmp_path):
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text('{"prompt_token_ids": [3, 5, 7]}\n')
        words = ["generate", "--model", str(folder), "--prompts-file", str(prompts), "--max-new-tokens", "3", "--json"]
        for tp_size, expected in ((1, 0), (2, 2)):
            plan(folder, tp_size).file.write(tmp_path / "plan.json")
            assert main([*words, "--plan", str(tmp_path / "plan.json")]) == expected
        assert "made for tp_size 2" in capsys.readouterr().err


def test_the_page_about_plans_runs(capsys, monkeypatch, tmp_path):
    page = (ROOT / "docs" / "plans.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-model").symlink_to(ROOT / "inference_shardformer" / "demo_model")
    (command,) = re.findall(r"^inference-shardformer (.*)$", page, re.MULTILINE)
    assert main(command.split()) == 0
    text = capsys.readouterr().out
    assert "model.layers.0-5.mlp.down_proj.weight" in text
    for line in re.findall(r"^\| `(\w[\w ]+)` \|", page, re.MULTILINE):
        assert f"\n{line} " in text
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(snippet, "plans.md", "exec"), names)
    (shown,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    assert list(json.loads(f"{{{shown}}}")["model.norm.weight"]) == ["module", "ranks"]
