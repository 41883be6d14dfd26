"""How `doctor` looks: the findings as sections of rows, drawn by rich on a terminal, aligned elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TextIO

from inference_shardformer.explaining.text import aligned

if TYPE_CHECKING:
    from inference_shardformer.doctor.findings import Findings
    from inference_shardformer.doctor.report import AttentionReport, NativeReport, RankReport
    from inference_shardformer.probing.facts import DeviceFacts

_WIDTH = 100
_COLOURS = {"chosen": "green", "refused": "red", "failed": "red", "passed": "green", "could serve": "cyan"}


class Section(NamedTuple):
    """Rows under a title; the header's texts are shown where they are not empty."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def show(findings: Findings, out: TextIO) -> None:
    """Draw everything, at the width of the terminal, or of 100 columns where there is none."""
    if out.isatty():
        _draw(findings, out)
        return
    width = shutil.get_terminal_size((_WIDTH, 24)).columns
    out.write(as_text(findings, width))
    out.flush()


def as_text(findings: Findings, width: int) -> str:
    """Everything as aligned text."""
    lines = [summary(findings)]
    for section in sections(findings):
        has_header = any(section.header)
        table = aligned(section.header, section.rows, width - 2)
        lines += ["", section.title, *(f"  {line}".rstrip() for line in (table if has_header else table[1:]))]
    return "\n".join(lines) + "\n"


def summary(findings: Findings) -> str:
    """The verdict in one line."""
    ranks = len(findings.reports) + len(findings.missing)
    where = "this machine" if ranks == 1 else f"{ranks} ranks"
    chosen = dict.fromkeys(_chosen(report) for report in findings.reports if all(report.chosen))
    if findings.can_serve:
        return f"{where}: attention backend {next(iter(chosen))} can serve"
    if findings.missing:
        return f"{where}: {_counted(len(findings.missing), 'rank')} sent no report"
    if not all(all(report.chosen) for report in findings.reports):
        requested = findings.reports[0].attention.requested
        return f"{where}: {'no attention backend can' if requested == 'auto' else f'{requested} cannot'} serve"
    if len(chosen) > 1:
        return f"{where}: the ranks would choose different attention backends, {' and '.join(chosen)}"
    return f"{where}: attention backend {next(iter(chosen))} failed its proof"


def sections(findings: Findings) -> list[Section]:
    """The sections in order; those without content are left out."""
    first = findings.reports[0]
    found = [
        Section("machine", ("", ""), tuple(_machine(first))),
        *(section for each in first.layers for section in (_spec(each), _backends(each))),
        *(
            _backends(each, f" on rank {report.rank}")
            for report in _with_own_verdicts(findings)
            for each in report.layers
        ),
        Section("ColossalAI bridge", ("", ""), tuple(_bridge(first))),
        Section("missing ranks", ("rank", "why"), tuple((str(rank), why) for rank, why in findings.missing.items())),
        _differences(findings),
        Section("problems", ("", ""), tuple((f"rank {r.rank}", text) for r in findings.reports for text in r.problems)),
        Section("warnings", ("", ""), tuple(("-", text) for text in findings.warnings)),
    ]
    return [section for section in found if section.rows]


def _bridge(report: RankReport) -> list[tuple[str, str]]:
    """ColossalAI beside us, if it is installed."""
    bridge = report.bridge
    if bridge is None:
        return []
    missing = f", without {', '.join(bridge.missing)}" if bridge.missing else ""
    remedy = f"; install with: {bridge.remedy}" if bridge.remedy else ""
    told = [("colossalai", f"{bridge.version}{missing}{remedy}")]
    return told + [("worked around", defect) for defect in bridge.mended]


def _machine(report: RankReport) -> list[tuple[str, str]]:
    host, use, memory = report.host, report.cpu_use, report.memory
    installed = [f"{name} {version}" for name, version in report.versions.items() if version]
    limit = "" if memory.limit is None else f", limit {_gib(memory.limit)}"
    quota = "" if use.quota is None else f", control group allows {use.quota:g}"
    return [
        ("versions", ", ".join(installed)),
        ("processor", f"{host.cpu.name} ({host.cpu.architecture})"),
        ("instructions", " ".join(host.cpu.isa) or "none that kernels are written for"),
        ("devices", ", ".join(_device(each) for each in host.accelerators) or "no accelerator"),
        ("runs on", f"{report.device} ({report.device_reason})"),
        ("cores", f"{use.cores}{quota}; {_counted(use.threads, 'thread')} in each rank ({use.threads_reason})"),
        ("memory", f"{_gib(memory.total)}, {_gib(memory.available)} available{limit}"),
        ("OpenMP", ", ".join(use.openmp) or "none loaded"),
        ("native", _native(report.native)),
        ("groups", ", ".join(host.process_group_backends) or "no process-group back end"),
        ("launcher", f"rank {report.rank} of {report.world_size}" if "RANK" in report.environment else "none"),
        ("variables", " ".join(f"{name}={value}" for name, value in report.environment.items()) or "none set"),
        ("plug-ins", ", ".join(f"{name} ({origin})" for name, origin in report.plugins.items()) or "none installed"),
    ]


def _native(native: NativeReport) -> str:
    if native.problem is not None:
        return f"no kernels: {native.problem.message} [{native.problem.code}]"
    stale = ", built from other sources" if native.is_stale else ""
    return f"kernels for {native.isa_level} (of {', '.join(native.isa_levels)}){stale}"


def _spec(report: AttentionReport) -> Section:
    spec = " ".join(f"{name}={value}" for name, value in report.spec.items())
    return Section("attention", ("", ""), (("for", report.of), ("spec", spec), ("asked for", report.requested)))


def _backends(report: AttentionReport, of_rank: str = "") -> Section:
    """Each backend with its reasons; under a reason stands what to do about it."""
    rows: list[tuple[str, ...]] = []
    for backend in report.backends:
        texts = [text for each in backend.reasons for text in _why(f"{each.message} [{each.code}]", each.remedy)]
        rows += _under(backend.name, backend.verdict, texts)
    seconds = "" if report.proof.seconds is None else f" ({report.proof.seconds:.2f} s)"
    rows += _under("proof", report.proof.outcome, _why(report.proof.detail + seconds, report.proof.remedy))
    return Section(f"backends{of_rank}", ("", "", ""), tuple(rows))


def _why(text: str, remedy: str) -> list[str]:
    return [text, *([f"remedy: {remedy}"] if remedy else [])]


def _under(name: str, verdict: str, texts: Sequence[str]) -> list[tuple[str, ...]]:
    first, *others = texts or [""]
    return [(name, verdict, first), *(("", "", text) for text in others)]


def _with_own_verdicts(findings: Findings) -> list[RankReport]:
    """Ranks whose backends ended otherwise than those of the first one."""
    first = _ended(findings.reports[0])
    return [report for report in findings.reports[1:] if _ended(report) != first]


def _ended(report: RankReport) -> list[tuple[object, ...]]:
    return [(each.backends, each.proof.outcome) for each in report.layers]


def _chosen(report: RankReport) -> str:
    return " + ".join(dict.fromkeys(name for name in report.chosen if name))


def _differences(findings: Findings) -> Section:
    if len(findings.reports) < 2:
        return Section("", (), ())
    rows = [
        (
            each.path,
            "; ".join(f"{value or '(empty)'} on rank {_ranks(ranks)}" for value, ranks in each.groups().items()),
        )
        for each in findings.differences
    ]
    title = "differences between ranks"
    return Section(title, ("", ""), tuple(rows) or (("none", "every rank found the same"),))


def _draw(findings: Findings, out: TextIO) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(file=out)
    console.print(Text(summary(findings), style="bold green" if findings.can_serve else "bold red"))
    for section in sections(findings):
        console.print()
        console.print(Text(section.title, style="bold"))
        table = Table(
            box=None, show_header=any(section.header), header_style="dim", pad_edge=False, padding=(0, 2, 0, 0)
        )
        for place, name in enumerate(section.header):
            table.add_column(name, no_wrap=place == 0, overflow="fold")
        for row in section.rows:
            table.add_row(*(Text(cell, style=_COLOURS.get(cell, "")) for cell in row))
        console.print(Padding(table, (0, 0, 0, 2)))


def _device(device: DeviceFacts) -> str:
    capability = "" if device.capability is None else f", {device.capability[0]}.{device.capability[1]}"
    memory = "" if device.memory_bytes is None else f", {_gib(device.memory_bytes)}"
    return f"{device.name} ({device.platform}{capability}{memory})"


def _ranks(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
