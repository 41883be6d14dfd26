"""BackendSwitch: exchanges the attention backends of a sharded model on one rank, in two phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ValidationError
from torch import nn

from inference_shardformer.attention.layered import LayeredAttention
from inference_shardformer.attention.selecting import build_each, select_each
from inference_shardformer.attention.selector import Selection, select
from inference_shardformer.attention.survey import BACKENDS, BackendRegistry, Survey, make_survey
from inference_shardformer.attention.verdicts import LayerVerdicts, verdicts_of
from inference_shardformer.config.plugin_options import without_version
from inference_shardformer.errors import BackendUnavailableError, ConfigError
from inference_shardformer.kv_cache.cache import PagedKVCache

Options = Mapping[str, Mapping[str, object]]


class PreparedBackends(NamedTuple):
    """What one rank has ready: backends that have proven themselves, and the cache they work on. Dropped to give up."""

    attention: LayeredAttention
    kv_cache: PagedKVCache
    selections: tuple[Selection, ...]


class BackendSwitch:
    """The attention backends of one sharded model on this rank, and the way to another one for all its layers.

    `prepare` may fail and changes nothing; `bind` only assigns. `attention` has the backends that the modules hold,
    `selections` how the one of each group of layers was chosen, `rank_verdicts` what every rank says of that, `options`
    what was asked for each backend by its name.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        attention: LayeredAttention,
        selections: tuple[Selection, ...],
        rank_verdicts: Sequence[tuple[LayerVerdicts, ...]],
        options: Options,
        registry: BackendRegistry = BACKENDS,
    ) -> None:
        self.attention = attention
        self.selections = selections
        self.rank_verdicts = tuple(rank_verdicts)
        self._options = options
        self._registry = registry
        self._survey: tuple[tuple[str, ...], Survey] | None = None
        groups = {id(backend): group for group, backend in enumerate(attention.backends)}
        self._places = [
            (module, name, groups[id(held)])
            for module in model.modules()
            for name, held in vars(module).items()
            if id(held) in groups
        ]

    def check(self, name: str) -> tuple[Selection, ...]:
        """The verdicts for each group of layers, when `name` may serve all of them on this rank.

        Raises `BackendUnavailableError` or `PluginError`.
        """
        if name == "auto":
            raise BackendUnavailableError(
                "a switch to 'auto' has no target: it was decided when the model was sharded",
                remedy=f"name one of {', '.join(self._registry.names())}",
            )
        survey = self._surveyed()
        return select_each(self.attention.groups, lambda spec: select(spec, name, survey))

    def prepare(self, name: str, kv_cache: PagedKVCache, block_ids: Sequence[int]) -> PreparedBackends:
        """Choose, construct and prove a backend for every group; convert the cache, with these blocks, if need be.

        Nothing that serves is touched. Where the backend is bound already it returns what is there. Raises
        `BackendUnavailableError`, `PluginError`, `ConfigError` or `CapacityError`.
        """
        selections = self.check(name)
        if self.attention.names == (name,):
            return PreparedBackends(self.attention, kv_cache, self.selections)
        num_layers = self.attention.groups.num_layers
        if len({id(module) for module, _, _ in self._places}) < num_layers:
            raise BackendUnavailableError(
                f"{len(self._places)} modules hold the attention backend as an attribute, and the model has "
                f"{num_layers} layers",
                remedy="let every attention module keep the backend of its layer in the BuildContext as an attribute",
            )
        attention = build_each(
            self.attention.groups,
            selections,
            options={name: self._typed_options(name)},
            registry=self._registry,
            keep=self.attention.backends,
        )
        layouts = attention.kv_layouts
        cache = kv_cache if layouts == kv_cache.layouts else kv_cache.converted(layouts, block_ids)
        return PreparedBackends(attention, cache, selections)

    def bind(self, attention: LayeredAttention, selections: tuple[Selection, ...]) -> None:
        """Give every attention module the backend of its layer."""
        for module, name, group in self._places:
            setattr(module, name, attention.backends[group])
        self.attention, self.selections = attention, selections

    def verdicts(self) -> tuple[LayerVerdicts, ...]:
        """What this rank says of the backends that are bound."""
        return verdicts_of(self.attention.groups, self.selections)

    def _surveyed(self) -> Survey:
        """The survey of this machine; made again only when backends were registered since."""
        names = tuple(self._registry.names())
        if self._survey is None or self._survey[0] != names:
            self._survey = names, make_survey(self.attention.groups.specs[0].device, self._registry)
        return self._survey[1]

    def _typed_options(self, name: str) -> BaseModel | None:
        declared = self._registry.get(name).Options
        try:
            return None if declared is None else declared.model_validate(without_version(self._options.get(name, {})))
        except ValidationError as exc:
            raise ConfigError(
                f"the options of attention backend {name!r} are not valid: {exc.errors(include_url=False)[0]['msg']}",
                remedy=f"set inference.attention.options.{name} when the engine is built",
            ) from exc
