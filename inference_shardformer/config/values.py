"""Types of configuration values: strict, so that text and true are no numbers. Bounds are part of the type."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from inference_shardformer.config.frozen import FrozenMapping

Count = Annotated[int, Field(strict=True, ge=1)]
Bytes = Annotated[int, Field(strict=True, gt=1)]
Share = Annotated[float, Field(strict=True, gt=0, le=1)]
Threads = Annotated[int, Field(strict=True, ge=1, le=4096)]
BlockLength = Annotated[int, Field(strict=True, ge=1, le=1024)]
Auto = Literal["auto"]

PluginName = Annotated[str, Field(min_length=1)]
PluginOptions = Annotated[dict[PluginName, dict[PluginName, object]], AfterValidator(FrozenMapping)]
"""Options of plug-ins under their names; the plug-in itself validates them."""
