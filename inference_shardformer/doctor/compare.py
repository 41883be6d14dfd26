"""What differs between ranks, and what is worth a warning: functions of the reports alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from inference_shardformer.doctor.report import RankReport

# What is never equal, or follows from where a rank stands.
_EXPECTED = (
    *("rank", "device", "environment.RANK", "environment.LOCAL_RANK", "memory.available"),
    *("attention.spec.device", "attention.proof.seconds", "cpu_use.openmp"),
)
_OF_A_GROUP = (".spec.device", ".proof.seconds")
_ABSENT = "absent"


@dataclass(frozen=True)
class Difference:
    """One fact that is not the same on every rank: its path, and its value on each."""

    path: str
    values: Mapping[int, str]

    def groups(self) -> dict[str, list[int]]:
        """The ranks that have each value."""
        found: dict[str, list[int]] = {}
        for rank, value in self.values.items():
            found.setdefault(value, []).append(rank)
        return found


def differences(reports: Sequence[RankReport]) -> tuple[Difference, ...]:
    """Every fact that ranks should share and do not, by path. Ranks on several hosts may differ in their names."""
    flat = {report.rank: dict(_leaves(json.loads(report.to_json()))) for report in reports}
    paths = dict.fromkeys(path for leaves in flat.values() for path in leaves)
    several_hosts = len({report.hostname for report in reports}) > 1
    found = []
    for path in paths:
        values = {rank: leaves.get(path, _ABSENT) for rank, leaves in flat.items()}
        if len(set(values.values())) > 1 and not _is_expected(path, several_hosts=several_hosts):
            found.append(Difference(path, values))
    return tuple(found)


def _is_expected(path: str, *, several_hosts: bool) -> bool:
    if path.startswith("other_layers."):
        return path.endswith(_OF_A_GROUP)
    return path in _EXPECTED or (several_hosts and path == "hostname")


def warnings_of(reports: Sequence[RankReport]) -> tuple[str, ...]:
    """One line for each thing that works and should be looked at, the same line for all ranks once."""
    kinds = (_thread_warnings, _library_warnings, _native_warnings)
    lines = [line for report in reports for warnings in kinds for line in warnings(report)]
    return tuple(dict.fromkeys(lines))


def _thread_warnings(report: RankReport) -> Iterator[str]:
    use, ranks = report.cpu_use, report.ranks_on_host
    wanted = ranks * use.threads
    given = report.environment.get("OMP_NUM_THREADS")
    if given is not None and not (given.isdecimal() and int(given) > 0):
        yield f"OMP_NUM_THREADS={given} is no number of threads; OpenMP ignores it"
    threads = f"{_counted(ranks, 'rank')} x {_counted(use.threads, 'thread')}"
    limit = "" if use.usable == use.cores else f" (the control group allows no more of the {use.cores} that are seen)"
    if wanted > use.usable:
        yield (
            f"{threads} share {use.usable:g} cores{limit}: lower shard.threads_per_rank or OMP_NUM_THREADS, or use "
            "fewer ranks"
        )
    elif report.device == "cpu" and given is not None and wanted < use.usable:
        yield (
            f"{threads} leave {use.usable - wanted:g} of {use.usable:g} cores idle: unset OMP_NUM_THREADS={given}, or "
            "set shard.threads_per_rank"
        )


def _library_warnings(report: RankReport) -> Iterator[str]:
    runtimes = report.cpu_use.openmp
    if len(runtimes) > 1:
        yield (
            f"{len(runtimes)} OpenMP runtimes are loaded, each with threads of its own: {', '.join(runtimes)}; keep "
            "torch's and rebuild or remove what brings the other"
        )
    if report.world_size > 1 and not {"gloo", "nccl"} & {*report.host.process_group_backends}:
        yield "this torch has neither gloo nor nccl: ranks cannot form a process group; install another build of torch"


def _native_warnings(report: RankReport) -> Iterator[str]:
    native = report.native
    if report.device != "cpu":
        return
    if native.problem is not None:
        yield f"the native CPU kernels are not used: {native.problem.message}; to use them, {native.problem.remedy}"
    elif native.is_stale:
        yield f"{native.path} was built from other sources: run python -m inference_shardformer.kernels.cpu.build"


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of a JSON value with its path; lists of objects with names are keyed by those."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value and all(isinstance(item, dict) and "of" in item for item in value):
        for item in value:
            yield from _leaves(item, f"{path}.{item['of']}")
    elif isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        for item in value:
            yield from _leaves({k: v for k, v in item.items() if k != "name"}, f"{path}.{item['name']}")
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
