"""BackendSwitch: exchanges the attention backend of a sharded model on one rank, in two phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ValidationError
from torch import nn

from inference_shardformer.attention.base import AttentionBackend
from inference_shardformer.attention.selector import Selection, build, select
from inference_shardformer.attention.survey import BACKENDS, BackendRegistry, Survey, make_survey
from inference_shardformer.errors import BackendUnavailableError, ConfigError
from inference_shardformer.kv_cache.cache import PagedKVCache

Options = Mapping[str, Mapping[str, object]]


class PreparedBackend(NamedTuple):
    """What one rank has ready: a backend that has proven itself, and the cache it works on. Dropped to give it up."""

    backend: AttentionBackend
    kv_cache: PagedKVCache
    selection: Selection


class BackendSwitch:
    """The attention backend of one sharded model on this rank, and the way to another one.

    `prepare` may fail and changes nothing; `bind` only assigns. `backend` is the one that the attention modules hold,
    `selection` how it was chosen, `options` what was asked for each backend by its name.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        backend: AttentionBackend,
        selection: Selection,
        num_layers: int,
        options: Options,
        registry: BackendRegistry = BACKENDS,
    ) -> None:
        self.backend = backend
        self.selection = selection
        self._options = options
        self._registry = registry
        self._num_layers = num_layers
        self._survey: tuple[tuple[str, ...], Survey] | None = None
        self._places = [
            (module, name) for module in model.modules() for name, held in vars(module).items() if held is backend
        ]

    def check(self, name: str) -> Selection:
        """The verdicts, when `name` may serve this rank. Raises `BackendUnavailableError` or `PluginError`."""
        if name == "auto":
            raise BackendUnavailableError(
                "a switch to 'auto' has no target: it was decided when the model was sharded",
                remedy=f"name one of {', '.join(self._registry.names())}",
            )
        return select(self.backend.spec, name, self._surveyed())

    def prepare(self, name: str, kv_cache: PagedKVCache, block_ids: Sequence[int]) -> PreparedBackend:
        """Choose, construct and prove a backend; convert the cache, with these blocks, if the layout differs.

        Nothing that serves is touched. For the backend that is bound already it returns what is there. Raises
        `BackendUnavailableError`, `PluginError`, `ConfigError` or `CapacityError`.
        """
        selection = self.check(name)
        if name == self.backend.name:
            return PreparedBackend(self.backend, kv_cache, self.selection)
        if len({id(module) for module, _ in self._places}) < self._num_layers:
            raise BackendUnavailableError(
                f"{len(self._places)} modules hold the attention backend as an attribute, and the model has "
                f"{self._num_layers} layers",
                remedy="let every attention module keep the backend of its BuildContext as an attribute",
            )
        backend = build(selection, self.backend.spec, self._registry, options=self._typed_options(name))
        layout = backend.capabilities.kv_layout
        cache = kv_cache if layout is kv_cache.layout else kv_cache.converted(layout, block_ids)
        return PreparedBackend(backend, cache, selection)

    def bind(self, backend: AttentionBackend, selection: Selection) -> None:
        """Give every attention module this backend."""
        for module, name in self._places:
            setattr(module, name, backend)
        self.backend, self.selection = backend, selection

    def _surveyed(self) -> Survey:
        """The survey of this machine; made again only when backends were registered since."""
        names = tuple(self._registry.names())
        if self._survey is None or self._survey[0] != names:
            self._survey = names, make_survey(self.backend.spec.device, self._registry)
        return self._survey[1]

    def _typed_options(self, name: str) -> BaseModel | None:
        declared = self._registry.get(name).Options
        try:
            return None if declared is None else declared.model_validate(dict(self._options.get(name, {})))
        except ValidationError as exc:
            raise ConfigError(
                f"the options of attention backend {name!r} are not valid: {exc.errors(include_url=False)[0]['msg']}",
                remedy=f"set inference.attention.options.{name} when the engine is built",
            ) from exc
