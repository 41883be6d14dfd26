"""A plug-in that only some ranks have, or that only some can load: every rank ends the same way, and is told which."""

from __future__ import annotations

from ranks import run_ranks

from inference_shardformer.kernels.cpu.library import native_problem


def test_broken_on_one_rank(tmp_path):
    first, second = (rank.said for rank in run_ranks("plugin_ranks.py", "broken", str(tmp_path), nproc=2))
    assert first == second
    assert first["auto"] == {"chosen": "sdpa" if native_problem() else "cpu"}
    assert first["named"]["type"] == "PluginError"
    said = "rank 1: attention backend 'plugged' from entry point plugged = uneven:Backend of uneven 1.2 failed to load"
    assert first["named"]["message"].startswith(said)
    assert "ImportError: uneven.so: undefined symbol: _ZN3c10 [abi_mismatch]" in first["named"]["message"]


def test_absent_on_one_rank(tmp_path):
    first, second = (rank.said for rank in run_ranks("plugin_ranks.py", "absent", str(tmp_path), nproc=2))
    assert first == second
    assert first["auto"]["type"] == "EnvironmentMismatchError"
    assert "uneven" in first["auto"]["message"]
    assert first["named"]["type"] == "BackendUnavailableError"
    assert first["named"]["message"].startswith("rank 1: unknown attention backend 'plugged'")
