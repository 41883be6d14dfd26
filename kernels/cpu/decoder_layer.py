"""Whole decoder layers of LLaMA's shape, and whole models of them, in one native call."""

from __future__ import annotations

import ctypes

import torch

from inference_shardformer.kernels.cpu.arguments import RmsNormArgs, RotaryArgs
from inference_shardformer.kernels.cpu.library import native
from inference_shardformer.kernels.cpu.linear_arguments import LinearArgs, PackedEmbeddingArgs

_Pointer, _Size = ctypes.c_void_p, ctypes.c_int64


class LayerStep(ctypes.Structure):
    """What the layers of one step have in common; see `src/decoder_layer.h`."""

    _fields_ = [
        *((name, _Pointer) for name in ("hidden", "out", "workspace", "cos", "sin", "positions")),
        *((name, _Pointer) for name in ("slot_mapping", "attention")),
        *((name, _Size) for name in ("num_tokens", "rotary_dim")),
    ]


class DecoderLayerArgs(ctypes.Structure):
    """Arguments of `decoder_layer`: one layer."""

    _fields_ = [
        *((name, _Pointer) for name in ("step", "k_cache", "v_cache", "group")),
        *((name, LinearArgs) for name in ("qkv", "o", "gate_up", "down")),
        ("rotary", RotaryArgs),
    ]


class ModelEndsArgs(ctypes.Structure):
    """What stands before and behind the layers of a model."""

    _fields_ = [
        ("embedding", PackedEmbeddingArgs),
        ("table", _Pointer),
        ("norm", RmsNormArgs),
        ("head", LinearArgs),
        *((name, _Pointer) for name in ("ids", "rows", "logits", "values", "places")),
        *((name, _Size) for name in ("num_logits", "vocabulary")),
    ]


class DecoderLayersArgs(ctypes.Structure):
    """Arguments of `decoder_layers`: layers that follow one another, with the ends of their model or without."""

    _fields_ = [
        ("layers", ctypes.POINTER(ctypes.POINTER(DecoderLayerArgs))),
        *((name, _Size) for name in ("num_layers", "has_ends")),
        ("ends", ModelEndsArgs),
    ]


class LayerWorkspace:
    """The buffers inside a layer; layers run one after the other and share them. Grows with the largest step."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._address = 0
        self._num_tokens = 0
        self._threads = 0
        self._has_head = False
        self._size = native().function(
            "isf_decoder_layer_workspace",
            argtypes=(ctypes.POINTER(DecoderLayerArgs), ctypes.POINTER(LinearArgs), ctypes.c_int32),
            restype=ctypes.c_int64,
        )

    def at(self, layer: DecoderLayerArgs, num_tokens: int, threads: int, head: LinearArgs | None = None) -> int:
        """The address of memory that is large enough for a layer over so many tokens, on so many threads.

        With a `head` it is large enough for that, too; a model has one head.
        """
        has_head = self._has_head or head is not None
        if num_tokens > self._num_tokens or threads > self._threads or has_head != self._has_head:
            self._num_tokens, self._threads = max(num_tokens, self._num_tokens), max(threads, self._threads)
            self._has_head = has_head
            step = LayerStep(num_tokens=self._num_tokens)
            wanted = DecoderLayerArgs.from_buffer_copy(layer)
            wanted.step = ctypes.addressof(step)
            num_bytes = self._size(wanted, head, self._threads)
            if num_bytes > self._memory.numel():
                self._memory = torch.empty(num_bytes, dtype=torch.uint8)
                self._address = self._memory.data_ptr()
        return self._address
