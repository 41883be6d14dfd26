"""Errors travel: between processes of a pool, into logs and through copies they say and hold the same."""

from __future__ import annotations

import copy
import pickle

import pytest

from inference_shardformer.config.loader import load_config
from inference_shardformer.config.sources import ConfigSources
from inference_shardformer.config.subscriptions import ConfigVeto
from inference_shardformer.distributed.simulated.errors import DeadlockError
from inference_shardformer.errors import CapacityError, ConfigError, InferenceShardformerError, RankFailure


def _violations() -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(ConfigSources(environ={"INFERENCE_SHARDFORMER_INFERENCE__SEED": "-1"}))
    return caught.value


ERRORS = [
    CapacityError("no room", remedy="make room"),
    RankFailure(rank=1, phase="decode", cause="it died", cause_code="capacity", remedy="look"),
    DeadlockError(rank=0, phase="load", waiting={0: "waits"}, stacks={0: "line 1"}),
    ConfigVeto("too many", remedy="ask for fewer", pattern="scheduler.*"),
    _violations(),
]


@pytest.mark.parametrize("error", ERRORS, ids=[type(error).__name__ for error in ERRORS])
@pytest.mark.parametrize("way", ["pickled", "copied", "copied deeply"])
def test_an_error_is_the_same_after_a_journey(error: InferenceShardformerError, way: str) -> None:
    again = {"pickled": pickle.loads(pickle.dumps(error)), "copied": copy.copy(error)}
    arrived = again.get(way, copy.deepcopy(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert arrived.args == error.args
    assert str(vars(arrived)) == str(vars(error))
    assert arrived.code == error.code
    with pytest.raises(type(error)):
        raise arrived
