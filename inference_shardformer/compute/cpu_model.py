"""A whole model of LLaMA's outline in one native call: embedding, layers, norm and head."""

from __future__ import annotations

import torch

from inference_shardformer.attention.base import AttentionMetadata
from inference_shardformer.compute.base import ComputeSpec
from inference_shardformer.compute.cpu_arguments import ends_arguments
from inference_shardformer.compute.cpu_layers import LayerChain, LayerRun
from inference_shardformer.compute.decoder_layer import Angles, ModelEnds, ModelResult
from inference_shardformer.kernels.cpu.decoder_layer import DecoderLayersArgs

_LINE = 64  # bytes, which tensors are aligned to


class WholeModel:
    """Calls the layers of a chain with the ends of their model, over buffers of its own that grow with the step."""

    def __init__(self, ends: ModelEnds, spec: ComputeSpec, chain: LayerChain) -> None:
        self._ends = ends  # what the arguments point to
        self._constant = ends_arguments(ends, spec)
        self._chain = chain
        self._row_bytes = self._constant.norm.size * spec.dtype.itemsize
        self._run: LayerRun | None = None
        self._arguments = DecoderLayersArgs()
        self._hidden = torch.empty(0, dtype=torch.uint8)  # the first layer's input, then the last one's output
        self._num_rows = 0
        self._result = self._room_for(0)

    def __call__(
        self, input_ids: torch.Tensor, angles: Angles, attn_metadata: AttentionMetadata, rows: torch.Tensor
    ) -> ModelResult | None:
        """As `ModelFunction` says."""
        run = self._chain.whole()
        if run is None:
            return None
        if run is not self._run:
            self._run, self._arguments = run, run.with_ends(self._constant)
        num_tokens, num_rows, ends = input_ids.shape[1], rows.shape[0], self._arguments.ends
        run.step.begin(run.first, num_tokens, angles, attn_metadata.of(0), ends.head)
        half = -(-num_tokens * self._row_bytes // _LINE) * _LINE
        if self._hidden.numel() < 2 * half:
            self._hidden = torch.empty(2 * half, dtype=torch.uint8)
        if self._num_rows != num_rows:
            self._num_rows, self._result = num_rows, self._room_for(num_rows)
        step, address = run.step.arguments, self._hidden.data_ptr()
        step.hidden, step.out = address, address + half
        ends.ids, ends.rows, ends.num_logits = input_ids.data_ptr(), rows.data_ptr(), num_rows
        logits, (values, places) = self._result
        ends.logits, ends.values, ends.places = logits.data_ptr(), values.data_ptr(), places.data_ptr()
        run(self._arguments)
        return self._result

    def _room_for(self, num_rows: int) -> ModelResult:
        greatest = torch.empty(num_rows), torch.empty(num_rows, dtype=torch.int64)
        return ModelResult(torch.empty(num_rows, self._constant.head.n), greatest)
