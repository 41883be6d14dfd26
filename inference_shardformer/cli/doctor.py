"""`doctor`: examine the machine, the libraries and every backend, on each rank, and say what to do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from inference_shardformer.cli.doctor_view import show
from inference_shardformer.cli.models import check_before_launch, resolve_model
from inference_shardformer.cli.parser import add_model_options, sources_of
from inference_shardformer.cli.ranks import is_launched, is_main_rank, launch, ranks_to_launch
from inference_shardformer.cli.terminal import Terminal
from inference_shardformer.config.loader import gather, load_config
from inference_shardformer.errors import BackendUnavailableError

if TYPE_CHECKING:
    from inference_shardformer.cli.parser import Commands
    from inference_shardformer.config.sources import ConfigSources
    from inference_shardformer.doctor.findings import Findings


def add_command(commands: Commands) -> None:
    """Add `doctor` to the parser."""
    parser = commands.add_parser(
        "doctor",
        help="examine this machine and every backend",
        description="Examine versions, devices, libraries and every attention backend, on each rank, and say what "
        "differs between ranks. Exit code 0 if a backend can serve, 3 if none can.",
    )
    add_model_options(parser, is_required=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Examine this process, or as many ranks as were asked for."""
    sources = sources_of(args)
    shard = load_config(sources).shard
    model = None if args.model is None else resolve_model(args.model)
    if num_ranks := ranks_to_launch(shard):
        if model is not None:
            check_before_launch(model, num_ranks)
        return launch(words, num_ranks=num_ranks)
    terminal = Terminal(is_main=is_main_rank())
    return _examine(sources, model, terminal, as_json=args.json)


def _examine(sources: ConfigSources, model: str | None, terminal: Terminal, *, as_json: bool) -> int:
    from inference_shardformer.distributed.environment import RankEnvironment
    from inference_shardformer.doctor.findings import examine_alone, examine_ranks

    layers = gather(sources)
    if not is_launched() or RankEnvironment.detect().world_size == 1:
        findings = examine_alone(layers, model)
        _report(findings, terminal, as_json=as_json)
    else:
        findings, exchange = examine_ranks(layers, model, RankEnvironment.detect())
        _report(findings, terminal, as_json=as_json)
        exchange.leave()
    return 0 if findings.can_serve else BackendUnavailableError.exit_code


def _report(findings: Findings, terminal: Terminal, *, as_json: bool) -> None:
    if as_json:
        terminal.record(findings.to_json())
    elif terminal.is_main:
        show(findings, sys.stdout)
