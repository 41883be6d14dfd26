"""The exception tree. Every error says what was given, which rule it breaks and what to do.

InferenceShardformerError
├── ConfigError (ValueError)            a configuration value is wrong, unknown or in conflict
│   ├── ConfigVeto                      a subscriber refused a live update
│   ├── QueuedUpdateError               a live update took effect, but not what its callbacks asked for
│   └── UnknownSettingError (KeyError, AttributeError)  a name that is no setting
├── PolicyError (ValueError)            the model cannot be sharded as asked
│   ├── UnsupportedModelError           no policy for this architecture
│   ├── PlanFileError                   a plan file is unreadable, edited, or made for something else
│   └── TensorParallelSizeError         this tp size is impossible for this model
├── CheckpointError (ValueError)        the checkpoint is missing, corrupt or incomplete
├── BackendUnavailableError (RuntimeError)  a compute backend cannot serve this model here
├── EnvironmentMismatchError (RuntimeError) world size, device or process group do not fit the request
│   └── MissingExtraError               an optional part was asked for and is not installed
├── PluginError (RuntimeError)          a plug-in failed to load or broke its contract
├── CapacityError (RuntimeError)        memory or cache cannot hold what was asked
│   └── QueueFullError                  as many requests wait as may
├── RequestError (ValueError)           one request is invalid; others are not affected
├── StateError (RuntimeError)           a call that is illegal in the current state
└── RankFailure (RuntimeError)          a rank raised, died or stalled; the same on every rank
"""

from __future__ import annotations

from typing import Any, TypeVar

_Error = TypeVar("_Error", bound=BaseException)


class InferenceShardformerError(Exception):
    """Base of all errors of this package.

    `code` is stable and meant for programs, `remedy` says what to do, `exit_code` is what the command line returns.
    `is_shared`: every rank raises the same, so that it is enough if one of them reports it.
    """

    code = "internal"
    exit_code = 1
    is_shared = False

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied as it is: constructors differ, and take what the message was made of."""
        return _as_it_was, (type(self), self.args), self.__dict__

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.remedy}" if self.remedy else self.message


class ConfigError(InferenceShardformerError, ValueError):
    """A configuration value is wrong, unknown, or in conflict with another."""

    code = "config"
    exit_code = 2


class PolicyError(InferenceShardformerError, ValueError):
    """The model cannot be sharded as asked, or a policy does not cover it."""

    code = "policy"
    exit_code = 2


class UnsupportedModelError(PolicyError):
    """No policy is registered for the model's architecture."""

    code = "unsupported_model"


class PlanFileError(PolicyError):
    """A plan file cannot be read, is not consistent, or was made for another model or another number of ranks."""

    code = "plan_file"


class TensorParallelSizeError(PolicyError):
    """The tensor-parallel size is impossible for this model; the possible ones are listed."""

    code = "tp_size"


class CheckpointError(InferenceShardformerError, ValueError):
    """The checkpoint is missing, unreadable, corrupt, or does not hold the expected tensors."""

    code = "checkpoint"
    exit_code = 2


class BackendUnavailableError(InferenceShardformerError, RuntimeError):
    """A named compute backend, or every candidate, cannot serve this model on this device."""

    code = "backend"
    exit_code = 3


class EnvironmentMismatchError(InferenceShardformerError, RuntimeError):
    """World size, device, or process group do not fit what was asked."""

    code = "environment"
    exit_code = 3


class MissingExtraError(EnvironmentMismatchError):
    """An optional part of this package was asked for and is not installed."""

    code = "missing_extra"


class PluginError(InferenceShardformerError, RuntimeError):
    """A plug-in failed to load, is registered twice, or broke its contract."""

    code = "plugin"
    exit_code = 3


class CapacityError(InferenceShardformerError, RuntimeError):
    """Memory, or the paged cache, cannot hold what was asked."""

    code = "capacity"
    exit_code = 2


class QueueFullError(CapacityError):
    """As many requests wait as may. Nothing is wrong with this one."""

    code = "queue_full"


class RequestError(InferenceShardformerError, ValueError):
    """One request is invalid. It is refused alone, before anything is queued."""

    code = "request"
    exit_code = 2


class StateError(InferenceShardformerError, RuntimeError):
    """A call that is illegal in the current state; names the state and the legal calls."""

    code = "state"


class RankFailure(InferenceShardformerError, RuntimeError):
    """A rank raised, died or stalled. Every rank raises it with the same rank, phase and cause."""

    code = "rank_failure"
    exit_code = 4
    is_shared = True

    def __init__(self, *, rank: int, phase: str, cause: str, cause_code: str = "internal", remedy: str = "") -> None:
        super().__init__(f"rank {rank} failed during {phase}: {cause}", remedy=remedy)
        self.rank = rank
        self.phase = phase
        self.cause = cause
        self.cause_code = cause_code


def _as_it_was(kind: type[_Error], args: tuple[object, ...]) -> _Error:
    """An error of this type and text, whose attributes come afterwards."""
    error = kind.__new__(kind, *args)
    error.args = args
    return error
