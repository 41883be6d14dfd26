"""The states of a shardformer, and the calls that are legal in each."""

from __future__ import annotations

from enum import Enum

from inference_shardformer.errors import StateError


class State(Enum):
    """Where a shardformer stands; each state names the calls that are legal in it."""

    CREATED = "created"
    SHARDED = "sharded"
    ATTACHED = "attached"
    RESTORED = "restored"
    CLOSED = "closed"
    FAILED = "failed"


LEGAL = {
    State.CREATED: "optimize(), from_pretrained(), load_sharded(), close()",
    State.SHARDED: "attach(), explain(), unshard(), save_pretrained(), save_sharded(), close()",
    State.ATTACHED: "explain(), unshard(), save_pretrained(), save_sharded(), close()",
    State.RESTORED: "close()",
    State.CLOSED: "none",
    State.FAILED: "close()",
}


def illegal(call: str, state: State) -> StateError:
    """The error of a call that is not possible now."""
    return StateError(
        f"{call} is not possible in the state {state.value!r}",
        remedy=f"legal now: {LEGAL[state]}; a shardformer shards one model, make another for the next",
    )
