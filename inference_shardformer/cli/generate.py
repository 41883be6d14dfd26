"""`generate`: load a model, generate for every prompt, show text to people or JSON lines to programs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inference_shardformer.cli.models import check_before_launch, has_tokenizer, resolve_model
from inference_shardformer.cli.output import write_json, write_text
from inference_shardformer.cli.parser import GENERATE_FLAGS, add_config_flags, add_model_options, sources_of
from inference_shardformer.cli.prompts import Prompt, collect_prompts
from inference_shardformer.cli.ranks import is_main_rank, launch, ranks_to_launch
from inference_shardformer.cli.report import UsageError
from inference_shardformer.cli.session import open_session
from inference_shardformer.cli.terminal import Terminal
from inference_shardformer.config.loader import MergedConfig, load_config
from inference_shardformer.config.origins import Level
from inference_shardformer.config.sources import ConfigSources

if TYPE_CHECKING:
    from inference_shardformer import SamplingParams, ShardConfig
    from inference_shardformer.cli.parser import Commands


@dataclass(frozen=True)
class Job:
    """Everything a command line asked for, checked as far as that goes without the model."""

    model: str
    sources: ConfigSources
    shard: ShardConfig
    prompts: list[str | list[int]]
    sampling: list[SamplingParams]
    plan: str | None = None


def add_command(commands: Commands) -> None:
    """Add `generate` to the parser."""
    parser = commands.add_parser("generate", help="generate text", description="Generate text for one or more prompts.")
    add_model_options(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; repeatable")
    parser.add_argument(
        "--prompts-file",
        metavar="F.jsonl",
        help='lines {"prompt": "..."} or {"prompt_token_ids": [...]}, with optional "max_new_tokens"',
    )
    add_config_flags(parser, GENERATE_FLAGS)
    parser.add_argument("--ignore-eos", action="store_true", help="do not end at an end-of-sequence token")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument(
        "--logprobs",
        type=int,
        metavar="K",
        help="with --json: log-probabilities of the generated tokens and of the K likeliest in the place of each",
    )
    parser.add_argument("--plan", metavar="FILE.json", help="load as this plan says, which `plan --out` wrote")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Check everything, then generate here, or on as many ranks as were asked for."""
    job = prepare(args)
    if num_ranks := ranks_to_launch(job.shard):
        check_before_launch(job.model, num_ranks)
        return launch(words, num_ranks=num_ranks)
    terminal = Terminal(is_main=is_main_rank())
    with open_session(job.model, job.sources, terminal, with_tokenizer=True, plan=job.plan) as session:
        write = write_json if args.json else write_text
        return write(session.engine, job.prompts, job.sampling, terminal)


def prepare(args: argparse.Namespace) -> Job:
    """The job of a command line. Raises what can be known to be wrong before a model is loaded."""
    if args.logprobs is not None and not args.json:
        raise UsageError(f"--logprobs {args.logprobs}: text has no place for them", remedy="add --json")
    sources = sources_of(args)
    merged = load_config(sources)
    prompts = collect_prompts(args.prompt, args.prompts_file)
    model = resolve_model(args.model)
    if not has_tokenizer(model) and any(isinstance(prompt.content, str) for prompt in prompts):
        raise UsageError(
            f"--model {args.model}: has no tokenizer, and a prompt is text",
            remedy='give token ids: a --prompts-file with lines {"prompt_token_ids": [...]}',
        )
    sampling = [_sampling(prompt, merged, args) for prompt in prompts]
    return Job(model, sources, merged.shard, [prompt.content for prompt in prompts], sampling, args.plan)


def _sampling(prompt: Prompt, merged: MergedConfig, args: argparse.Namespace) -> SamplingParams:
    """Sampling of one prompt. A limit that somebody asked for is binding; the default one gives way to the context.

    A seed that somebody asked for is that of every prompt, so that a prompt draws the same alone and in company.
    """
    from inference_shardformer import SamplingParams

    inference = merged.inference
    limit_is_asked = merged.origin("inference.sampling.max_new_tokens").level > Level.DEFAULT
    limit = inference.sampling.max_new_tokens if limit_is_asked else None
    return SamplingParams(
        max_new_tokens=prompt.max_new_tokens or limit,
        seed=inference.seed if merged.origin("inference.seed").level > Level.DEFAULT else None,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos or None,
        logprobs=args.logprobs,
    )
