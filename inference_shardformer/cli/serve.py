"""`serve`: a server with the routes of the OpenAI API, over one model on as many ranks as were asked for."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from inference_shardformer.cli.models import check_before_launch, has_tokenizer, resolve_model
from inference_shardformer.cli.parser import GENERATE_FLAGS, add_config_flags, add_model_options, sources_of
from inference_shardformer.cli.ranks import is_main_rank, launch, ranks_to_launch
from inference_shardformer.cli.report import UsageError
from inference_shardformer.cli.session import Session, open_session
from inference_shardformer.cli.terminal import Terminal
from inference_shardformer.config.loader import load_config

if TYPE_CHECKING:
    import socket

    from inference_shardformer.cli.parser import Commands

_MAX_GRACE_S = 20.0  # a launcher kills ranks 30 s after it has asked them to end
_TIME_BEYOND_GRACE_S = 6.0


def add_command(commands: Commands) -> None:
    """Add `serve` to the parser."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model with the routes of the OpenAI API, with metrics, and with a report of what was "
        "decided. Ctrl-C and SIGTERM end it: what runs may finish within a grace period.",
    )
    add_model_options(parser)
    add_config_flags(parser, GENERATE_FLAGS)
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen; default 127.0.0.1")
    parser.add_argument("--port", default=8000, type=int, metavar="P", help="default 8000; 0 takes a free one")
    parser.add_argument("--api-key", action="append", default=[], metavar="KEY", help="clients need it; repeatable")
    parser.add_argument("--api-key-file", metavar="FILE", help="one key a line, which no list of processes shows")
    parser.add_argument("--served-model-name", action="append", default=[], metavar="NAME", help="repeatable")
    parser.add_argument("--chat-template", metavar="FILE", help="a Jinja template instead of the tokenizer's")
    parser.add_argument("--max-queue", default=256, type=int, metavar="N", help="requests that may wait; default 256")
    parser.add_argument(
        "--grace", default=5.0, type=float, metavar="SECONDS", help="for requests that run at the end; default 5"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Check everything, then serve here, or on as many ranks as were asked for."""
    check(args)
    sources = sources_of(args)
    shard = load_config(sources).shard
    model = resolve_model(args.model)
    if not has_tokenizer(model):
        raise UsageError(
            f"--model {args.model}: has no tokenizer, and a server answers with text",
            remedy="put the tokenizer's files into its folder, or use `generate --prompts-file` with token ids",
        )
    if num_ranks := ranks_to_launch(shard):
        check_before_launch(model, num_ranks)
        return launch(words, num_ranks=num_ranks)
    from inference_shardformer.distributed.leaving import take_time_to_leave

    terminal = Terminal(is_main=is_main_rank())
    bound = _bound(args)
    with open_session(model, sources, terminal, with_tokenizer=True) as session:
        take_time_to_leave(args.grace + _TIME_BEYOND_GRACE_S)
        if bound is None:
            return _follow(session)
        return _serve(session, args, terminal, bound)


def check(args: argparse.Namespace) -> None:
    """Raise what can be known to be wrong before a model is loaded."""
    from inference_shardformer.serving.extra import check_libraries

    if not 0 <= args.port < 65536:
        raise UsageError(f"--port {args.port}: is no port", remedy="give one from 0 to 65535; 0 takes a free one")
    if args.max_queue < 0:
        raise UsageError(f"--max-queue {args.max_queue}: must be at least 0", remedy="0 lets nobody wait")
    if not 0 <= args.grace <= _MAX_GRACE_S:
        raise UsageError(
            f"--grace {args.grace:g}: must be 0 to {_MAX_GRACE_S:g} seconds",
            remedy="let clients send again what takes longer",
        )
    if args.chat_template is not None:
        _read(args.chat_template, "--chat-template")
    api_keys(args)
    check_libraries()


def api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """The keys of the command line and of its file. Raises `UsageError` for an empty one, or for a file of none."""
    lines = [] if args.api_key_file is None else _read(args.api_key_file, "--api-key-file").splitlines()
    listed = [line.strip() for line in lines if line.strip()]
    if args.api_key_file is not None and not listed:
        raise UsageError(f"--api-key-file {args.api_key_file}: holds no key", remedy="write one key on each line")
    if not all(key.strip() for key in args.api_key):
        raise UsageError("--api-key: is empty", remedy="give a key, or leave the option out to let everybody in")
    return (*args.api_key, *listed)


def _read(path: str, option: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{option} {path}: cannot be read: {exc}", remedy="name a readable text file") from exc


def _bound(args: argparse.Namespace) -> socket.socket | None:
    """The address, taken before anything is loaded; on the main rank alone."""
    if not is_main_rank():
        return None
    from inference_shardformer.serving.server import bind

    return bind(args.host, args.port)


def _follow(session: Session) -> int:
    from inference_shardformer.serving.signals import ignored

    with ignored():
        session.engine.follow()
    return 0


def _serve(session: Session, args: argparse.Namespace, terminal: Terminal, bound: socket.socket) -> int:
    from inference_shardformer.serving.server import Settings, serve_engine, url_of

    names = tuple(dict.fromkeys(args.served_model_name)) or (args.model,)
    settings = Settings(
        models=names,
        api_keys=api_keys(args),
        chat_template=None if args.chat_template is None else _read(args.chat_template, "--chat-template"),
        max_queue=args.max_queue,
        grace_s=args.grace,
    )
    url = url_of(bound)

    def on_ready() -> None:
        terminal.note(f"serving    {url} as {', '.join(names)}; Ctrl-C ends it")
        if args.json:
            terminal.record({"url": url, "models": list(names), "pid": os.getpid()})

    ended_by = asyncio.run(serve_engine(session.shardformer, session.engine, bound, settings, on_ready=on_ready))
    terminal.note(f"stopped    by {ended_by.name}")
    if ended_by is signal.SIGINT:
        raise KeyboardInterrupt
    return 0
