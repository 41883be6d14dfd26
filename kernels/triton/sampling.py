"""One token per row of logits, drawn on the device."""

from __future__ import annotations

import torch

from inference_shardformer.kernels.triton.runtime import unit_stride
from inference_shardformer.kernels.triton.sampling_kernel import sample_kernel
from inference_shardformer.kernels.triton.shapes import power_of_two

_BLOCK = 4096
_WARPS = 32  # as many as a processor holds: a row is one program


def sample(
    logits: torch.Tensor,  # [num_rows, vocab_size]
    *,
    temperatures: torch.Tensor,  # float32 or float64 [num_rows], 0: the first of the likeliest
    top_ks: torch.Tensor,  # int32, or whole numbers in float64, [num_rows], below 1: all
    top_ps: torch.Tensor,  # float64 [num_rows], 1: all
    uniforms: torch.Tensor,  # float64 [num_rows], in [0, 1)
) -> torch.Tensor:
    """Token ids, int64 `[num_rows]`. A row's result depends on that row alone; nothing waits for the device.

    As `engine.distribution` draws: scores are divided by the temperature, the `top_k` likeliest are kept with those
    equal to the last of them, then the fewest whose probability reaches `top_p`, lower ids first among equals; the
    token is where the cumulative probability in order of ids first exceeds the row's number.
    """
    logits = unit_stride(logits)
    num_rows, vocab_size = logits.shape
    ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    scores = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=logits.device)
    if num_rows:
        sample_kernel[(num_rows,)](
            *(ids, scores, logits, temperatures, top_ks, top_ps, uniforms, logits.stride(0)),
            VOCAB=vocab_size,
            BLOCK=min(_BLOCK, power_of_two(vocab_size)),
            num_warps=_WARPS,
        )
    return ids
