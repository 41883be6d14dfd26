"""Loading a checkpoint: each rank's peak memory beside its plan, and the rate beside the page cache and Hugging Face.

Four sides take turns, each in fresh processes that have loaded a small model before: ours on `--tp` ranks, Hugging
Face's `from_pretrained`, which maps the files and reads them at their first use, and a plain read of the files, into
one buffer or into memory of their own, by as many threads as ours has. The weights are random, in bf16.

Before it is timed a process writes as much memory as the weights need and gives it back, unless `--fresh-memory`: the
host of a virtual machine takes back what is free, and getting it again is slow and no business of whoever loads.
Ends with code 1 if a rank's peak is above 1.1 times its plan.

    python scripts/benchmark_load.py --size 1.1b --tp 2 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from benchmarking.memory import peak_rss_mib
from benchmarking.workloads import SHAPES, write_checkpoint
from transformers import LlamaForCausalLM

LIMIT = 1.1  # of the plan, beyond what the process takes before
_CHUNK_BYTES = 8 * 2**20
_PAGE_BYTES = 4096


def make_checkpoint(size: str, folder: Path) -> int:
    """Write random weights of one shape; returns the bytes of its files."""
    write_checkpoint(folder, size, torch.bfloat16)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def ours(folder: Path) -> dict[str, float]:
    """Load this rank's part; the seconds of all of it and of the weights alone, and the plan's bytes."""
    from inference_shardformer import InferenceConfig, InferenceShardformer, ShardConfig

    times: list[float] = []
    with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig(dtype="bf16")) as shardformer:
        started = time.perf_counter()
        shardformer.from_pretrained(folder, progress=lambda done, total: times.append(time.perf_counter()))
        seconds = time.perf_counter() - started
        planned = shardformer.sharded.rank_bytes[shardformer.group.rank]
    return {"seconds": seconds, "weights": times[-1] - times[0], "planned": planned}


def hugging_face(folder: Path) -> dict[str, float]:
    """Load the whole model, and touch every page of it: what it gives back are mapped files."""
    started = time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.detach().flatten()[:: _PAGE_BYTES // 2].sum()
    return {"seconds": time.perf_counter() - started}


def read_only(folder: Path) -> dict[str, float]:
    """Read every byte of the files, each thread into a buffer of its own."""
    buffers = threading.local()

    def read(fd: int, offset: int, size: int) -> None:
        if not hasattr(buffers, "bytes"):
            buffers.bytes = bytearray(_CHUNK_BYTES)
        _read_whole(fd, memoryview(buffers.bytes)[:size], offset)

    return {"seconds": _read_files(folder, read)}


def read_and_keep(folder: Path) -> dict[str, float]:
    """Read every byte of the files into huge pages of their own, as whoever keeps weights must."""
    kept: dict[int, memoryview] = {}

    def read(fd: int, offset: int, size: int) -> None:
        _read_whole(fd, kept[fd][offset : offset + size], offset)

    def keep(fd: int, size: int) -> None:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
        kept[fd] = memoryview(pages)

    return {"seconds": _read_files(folder, read, keep)}


def _read_whole(fd: int, view: memoryview, offset: int) -> None:
    count = os.preadv(fd, [view], offset)
    if count != len(view):
        raise OSError(f"{count} of {len(view)} bytes were read at once")


def _read_files(
    folder: Path, read: Callable[[int, int, int], None], begin: Callable[[int, int], None] | None = None
) -> float:
    """Seconds to read all files in chunks, with torch's number of threads."""
    started = time.perf_counter()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for path in sorted(folder.glob("*.safetensors")):
            fd, size = os.open(path, os.O_RDONLY), path.stat().st_size
            if begin is not None:
                begin(fd, size)
            starts = range(0, size, _CHUNK_BYTES)
            list(pool.map(lambda start, fd=fd, size=size: read(fd, start, min(_CHUNK_BYTES, size - start)), starts))
            os.close(fd)
    return time.perf_counter() - started


SIDES = {"ours": ours, "hugging-face": hugging_face, "read": read_only, "read and keep": read_and_keep}


def run_side(name: str, small: Path, folder: Path, *, is_fresh: bool) -> None:
    """What a process of one side does: load the small model, forget the peak so far, load the large one."""
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    SIDES[name](small)
    if not is_fresh:
        _have_memory(sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_rss_mib()
    result = SIDES[name](folder)
    print(json.dumps({**result, "peak": (peak_rss_mib() - before) * 2**20}), flush=True)
    if "RANK" in os.environ:
        torch.distributed.destroy_process_group()


def _have_memory(num_bytes: int) -> None:
    """Write so much memory, in huge pages, and give it back."""
    with mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, num_bytes, _PAGE_BYTES):
            pages[start] = 1


def _forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def start_side(
    name: str, small: Path, folder: Path, *, num_ranks: int, is_fresh: bool, is_cold: bool
) -> list[dict[str, float]]:
    """Run one side in fresh processes; what each has to say, in rank order."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, __file__, "--side", name, str(small), str(folder), *["--fresh-memory"] * is_fresh]
    if is_cold:
        _forget(folder)
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    processes = []
    for rank in range(num_ranks):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
        own = {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if name == "ours" else {}
        environment = os.environ | {key: str(value) for key, value in own.items()} | {"OMP_NUM_THREADS": str(threads)}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=600)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"the side {name} ended with {[process.returncode for process in processes]}")
    return [json.loads(text.splitlines()[-1]) for text in said]


def report(results: dict[str, list[list[dict[str, float]]]], num_bytes: int, tp_size: int) -> bool:
    """Print medians and ratios of rounds; whether every rank stayed within the limit."""
    seconds = {name: [max(each["seconds"] for each in ranks) for ranks in rounds] for name, rounds in results.items()}
    print(f"\n{num_bytes / 1e6:.0f} MB of weights, {tp_size} rank(s), median of {len(seconds['ours'])} rounds")
    seconds["ours, weights"] = [max(each["weights"] for each in ranks) for ranks in results["ours"]]
    for name, values in seconds.items():
        median = statistics.median(values)
        ratio = statistics.median(other / mine for mine, other in zip(seconds["ours"], values, strict=True))
        print(f"  {name:14} {median:8.3f} s  {num_bytes / median / 1e6:8.0f} MB/s  x {ratio:.2f} of our time")
    shares = [[each["peak"] / each["planned"] for each in ranks] for ranks in results["ours"]]
    worst = max(max(ranks) for ranks in shares)
    medians = ", ".join(f"{statistics.median(rank):.3f}" for rank in zip(*shares, strict=True))
    print(f"  peak of each rank relative to its plan: {medians}; at most {worst:.3f}")
    whole = statistics.median(ranks[0]["peak"] for ranks in results["hugging-face"])
    print(f"  peak of Hugging Face relative to the weights: {whole / num_bytes:.3f}")
    print(json.dumps({"num_bytes": num_bytes, "tp_size": tp_size, "results": results}))
    return worst <= LIMIT


def main() -> int:
    """Make the checkpoints, let the sides take turns, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="135m")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fresh-memory", action="store_true", help="take memory as the system gives it")
    parser.add_argument(
        "--cold", action="store_true", help="let the system forget the files before each side reads them"
    )
    parser.add_argument("--side", nargs=3, metavar=("NAME", "SMALL", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(args.side[0], Path(args.side[1]), Path(args.side[2]), is_fresh=args.fresh_memory)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        make_checkpoint("tiny", small)
        num_bytes = make_checkpoint(args.size, large)
        results: dict[str, list[list[dict[str, float]]]] = {name: [] for name in SIDES}
        for number in range(args.rounds):
            for name, rounds in results.items():
                num_ranks = args.tp if name == "ours" else 1
                rounds.append(
                    start_side(name, small, large, num_ranks=num_ranks, is_fresh=args.fresh_memory, is_cold=args.cold)
                )
                print(f"round {number + 1}: {name:14} {max(each['seconds'] for each in rounds[-1]):.3f} s", flush=True)
        return 0 if report(results, num_bytes, args.tp) else 1


if __name__ == "__main__":
    sys.exit(main())
