"""Errors as the command line shows them: a block on standard error, with --json also an object on standard output."""

from __future__ import annotations

import json
import sys
import traceback
from contextlib import suppress

from inference_shardformer.errors import InferenceShardformerError, RankFailure

EXIT_INTERNAL = 1
EXIT_INTERRUPTED = 130


class UsageError(InferenceShardformerError, ValueError):
    """The command line, or a file named on it, is malformed."""

    code = "usage"
    exit_code = 2


class LostRankError(InferenceShardformerError, RuntimeError):
    """A rank that this command started ended without saying why."""

    code = RankFailure.code
    exit_code = RankFailure.exit_code


def report_error(error: InferenceShardformerError, *, as_json: bool, debug: bool, speaker: str = "") -> None:
    """Print one error; with `debug` its traceback stands before the block. `speaker` stands before the message."""
    if debug:
        traceback.print_exception(error)
    print(f"error: {speaker}{error}", file=sys.stderr, flush=True)
    if as_json:
        record = error_object(error)
        with suppress(OSError):  # a full disk or a reader that has gone: standard error has said it
            print(json.dumps({"error": record | {"message": speaker + record["message"]}}), flush=True)


def error_object(error: InferenceShardformerError) -> dict[str, str]:
    """An error as programs read it."""
    return {"code": error.code, "message": error.message, "remedy": error.remedy}


def unexpected(cause: BaseException) -> InferenceShardformerError:
    """An error for what no rule foresaw; exits with 1."""
    error = InferenceShardformerError(
        f"unexpected {type(cause).__name__}: {cause}", remedy="run again with --debug and report the traceback"
    )
    error.__cause__ = cause
    return error
