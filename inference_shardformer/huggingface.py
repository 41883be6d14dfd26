"""What we ask of transformers: configuration, model on the meta device, end-of-sequence ids, no T x T masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch.overrides import TorchFunctionMode

from inference_shardformer.errors import CheckpointError, UnsupportedModelError
from inference_shardformer.importing import collection_paused
from inference_shardformer.resolving.examination import ModelSource

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

    from inference_shardformer.policies.base import Policy

_SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
_WEIGHTS = ("*.safetensors",)
_DRAWN = {"uniform_", "normal_", "kaiming_uniform_"}  # of torch.Tensor and of torch.nn.init, which fill in place


def locate_checkpoint(path_or_hub_id: str | Path, *, with_weights: bool = True) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded (without weights in other formats) first."""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder}: holds no config.json, so it is not a checkpoint in Hugging Face format",
                remedy="give the folder that config.json and model.safetensors lie in",
            )
        return folder
    name = str(path_or_hub_id)
    if folder.exists() or folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise CheckpointError(
            f"{name}: no such folder, and not a hub id of the form `owner/name`",
            remedy="give the folder of a checkpoint, or a hub id",
        )
    return _download(name, (*_SMALL_FILES, *_WEIGHTS) if with_weights else _SMALL_FILES)


def read_model(path_or_hub_id: str | Path, policy: Policy | None, *, trust_remote_code: bool) -> ModelSource:
    """What is known of a checkpoint before its weights; of a hub id the weights are not downloaded."""
    folder = locate_checkpoint(path_or_hub_id, with_weights=False)
    hf_config = load_hf_config(folder, trust_remote_code=trust_remote_code)
    return ModelSource(hf_config, architecture_of(hf_config), eos_token_ids(folder, hf_config), policy)


def model_in_memory(model: PreTrainedModel, policy: Policy | None = None) -> ModelSource:
    """What is known of a model that has its weights."""
    eos = eos_token_ids(model, model.config)
    return ModelSource(model.config, type(model).__name__, eos, policy, model.dtype)


def load_hf_config(folder: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    """Read config.json as transformers understands it."""
    with collection_paused():
        from transformers import AutoConfig

    try:
        with collection_paused():  # it imports the model's family
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except unreadable() as exc:
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers cannot read it: {exc}",
            remedy="correct the file; code that comes with a checkpoint runs only with "
            "inference.weights.trust_remote_code=true",
        ) from exc


def unreadable() -> tuple[type[Exception], ...]:
    """What transformers raises for files that it cannot read, or that hold values no model can have."""
    from huggingface_hub import errors

    strict = getattr(errors, "StrictDataclassError", ValueError)  # of transformers 5, for the value of a field
    return (strict, ValueError, OSError, KeyError, TypeError, AttributeError, ArithmeticError)


def architecture_of(hf_config: PreTrainedConfig) -> str:
    """The first architecture a checkpoint's configuration names, such as `LlamaForCausalLM`."""
    names = getattr(hf_config, "architectures", None) or []
    if not names:
        raise UnsupportedModelError(
            f"config.json (model_type {hf_config.model_type!r}) names no architecture",
            remedy='add `"architectures": ["LlamaForCausalLM"]`, or the one the weights belong to',
        )
    return str(names[0])


def build_on_meta(hf_config: PreTrainedConfig, architecture: str, folder: Path | None = None) -> PreTrainedModel:
    """The unsharded model without memory: every parameter on the meta device.

    Of a checkpoint in `folder` it gets the generation configuration, if there is one.
    """
    import transformers

    with collection_paused():  # what is looked up is imported
        known: object = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf_config), None)  # the user's own as well
        is_own = getattr(known, "__name__", None) == architecture
        found: object = known if is_own else getattr(transformers, architecture, None)
    model_class = cast("type[PreTrainedModel] | None", found)
    if model_class is None:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has no class {architecture!r}",
            remedy="upgrade transformers, or correct `architectures` in config.json",
        )
    try:
        with torch.device("meta"), _NothingDrawn():
            model: PreTrainedModel = model_class(hf_config)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as exc:
        raise CheckpointError(
            f"transformers cannot build {architecture} from this config.json: {type(exc).__name__}: {exc}",
            remedy="correct the field that it names",
        ) from exc
    generation = None if folder is None else _generation(folder)
    if generation is not None:
        model.generation_config = generation
    return model


def eos_token_ids(source: Path | PreTrainedModel, hf_config: PreTrainedConfig) -> int | list[int] | None:
    """End-of-sequence ids as `generate` would take them: the generation configuration's, else the model's."""
    generation = getattr(source, "generation_config", None) if not isinstance(source, Path) else _generation(source)
    eos = getattr(generation, "eos_token_id", None)
    return eos if eos is not None else getattr(hf_config, "eos_token_id", None)


def skip_attention_masks(hf_config: PreTrainedConfig) -> None:
    """Name an attention implementation for which transformers builds no mask: ours reads the packed batch instead.

    Since 4.53 any unknown name means that; before, the name of flash attention did.
    """
    has_mask_interface = find_spec("transformers.masking_utils") is not None
    hf_config._attn_implementation = "nopadding" if has_mask_interface else "flash_attention_2"


class _NothingDrawn(TorchFunctionMode):
    """Leaves out the random values of tensors that have no memory: torch takes a millisecond to draw each of them."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """What a mode is asked for each call of torch."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWN:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def _generation(folder: Path) -> GenerationConfig | None:
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except (ValueError, OSError, TypeError) as exc:
        raise CheckpointError(
            f"{folder / 'generation_config.json'}: transformers cannot read it: {exc}",
            remedy="correct or remove the file",
        ) from exc


def _download(hub_id: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as exc:
        raise CheckpointError(
            f"{hub_id!r} is neither a local folder nor a hub id that can be reached: {type(exc).__name__}",
            remedy="check the spelling, the network and access rights, or give a local folder",
        ) from exc
