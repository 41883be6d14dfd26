"""A stand-in for FlashInfer: its two wrappers with their plans, as of 0.6.4 and 0.7.2."""

from __future__ import annotations

from types import ModuleType

import torch
from attention_standins import attend, check_floats, made, need


class _Wrapper:
    """What both wrappers keep between plan() and run()."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str) -> None:
        need(workspace.dtype == torch.uint8 and workspace.numel() >= 128 << 20, "a workspace of 128 MiB")
        need(not workspace[:4096].any(), "the workspace is zero at its first use")
        need(kv_layout == "NHD", kv_layout)
        self._planned: dict[str, object] = {}

    def _plan(self, indptr, indices, last_page_len, heads, kv_heads, head_dim, page_size, **given) -> None:
        num_seqs = len(last_page_len)
        for name, tensor in (("indptr", indptr), ("last_page_len", last_page_len)):
            need(tensor.dtype == torch.int32 and tensor.dim() == 1 and tensor.is_contiguous(), f"{name} is int32 [n]")
            need(tensor.device.type == "cpu", f"{name} on a device is fetched to the host, which waits")
        need(indices.dtype == torch.int32 and indices.dim() == 1, "indices are int32 [n]")
        need(len(indptr) == num_seqs + 1 and int(indptr[-1]) == len(indices), "indptr does not fit")
        need(bool(((last_page_len >= 1) & (last_page_len <= page_size)).all()), "last_page_len out of its range")
        need(heads % kv_heads == 0 and head_dim in (64, 128, 256), f"{heads}/{kv_heads} heads of {head_dim}")
        need(given["q_data_type"] == given["kv_data_type"], "types")
        need(isinstance(given["disable_split_kv"], bool), "disable_split_kv")
        need(given["window_left"] >= -1, "window_left")
        cap = given["logits_soft_cap"]
        need(cap is None or cap > 0, "logits_soft_cap")
        shape = (heads, kv_heads, head_dim, page_size)
        self._planned = {**given, "shape": shape, "indptr": indptr.clone(), "last": last_page_len.clone()}
        self._keep(indices)

    def _keep(self, indices: torch.Tensor) -> None:
        self._indices = indices

    def _run(self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], starts: torch.Tensor) -> torch.Tensor:
        planned = self._planned
        heads, kv_heads, head_dim, page_size = planned["shape"]
        k, v = cache
        check_floats(q, k, v)
        need(tuple(q.shape) == (int(starts[-1]), heads, head_dim), f"queries {tuple(q.shape)} are not as planned")
        need(tuple(k.shape[1:]) == (page_size, kv_heads, head_dim), f"keys {tuple(k.shape)} are not as planned")
        need(q.dtype == planned["q_data_type"], "the type is not the planned one")
        indptr, last = planned["indptr"], planned["last"]
        counts = indptr.diff()
        tables = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
        for row, (start, count) in enumerate(zip(indptr.tolist(), counts.tolist(), strict=False)):
            tables[row, :count] = self._indices[start : start + count]
        lens = (counts - 1) * page_size + last
        window = None if planned["window_left"] == -1 else planned["window_left"] + 1
        cap = planned["logits_soft_cap"]
        return attend(q, k, v, starts, lens, tables, planned["sm_scale"], window, cap)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False,
        paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None,
        backend="auto", jit_args=None,
    ) -> None:  # fmt: skip
        super().__init__(float_workspace_buffer, kv_layout)
        need(use_tensor_cores, "without tensor cores a few numbers of heads are served only")
        self._buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        self._is_captured = use_cuda_graph
        need(not use_cuda_graph or all(each.dtype == torch.int32 for each in self._buffers), "buffers are int32")
        need(not use_cuda_graph or len(self._buffers[0]) == len(self._buffers[2]) + 1, "buffers of one size")

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *,
        window_left=-1, logits_soft_cap=None, q_data_type="float16", kv_data_type=None, sm_scale=None,
        disable_split_kv=False,
    ) -> None:  # fmt: skip
        if self._is_captured:
            need(len(last_page_len) == len(self._buffers[2]), "the batch size should be fixed in cudagraph mode")
        self._plan(
            indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, window_left=window_left,
            logits_soft_cap=logits_soft_cap, q_data_type=q_data_type, kv_data_type=kv_data_type, sm_scale=sm_scale,
            disable_split_kv=disable_split_kv,
        )  # fmt: skip

    def run(self, q, paged_kv_cache) -> torch.Tensor:
        return self._run(q, paged_kv_cache, torch.arange(len(self._planned["last"]) + 1))

    def _keep(self, indices: torch.Tensor) -> None:
        if not self._is_captured:
            super()._keep(indices)
            return
        need(len(indices) <= len(self._buffers[1]), "more indices than the buffer holds")
        self._buffers[1][: len(indices)].copy_(indices)
        self._indices = self._buffers[1]


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False) -> None:
        super().__init__(float_workspace_buffer, kv_layout)

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, *, causal=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        q_data_type="float16", kv_data_type=None, disable_split_kv=False,
    ) -> None:  # fmt: skip
        need(causal, "prompts are causal")
        need(qo_indptr.dtype == torch.int32 and qo_indptr.device.type == "cpu", "qo_indptr is int32 on the host")
        need(len(qo_indptr) == len(paged_kv_last_page_len) + 1 and int(qo_indptr[0]) == 0, "qo_indptr does not fit")
        self._starts = qo_indptr.clone()
        self._plan(
            paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk,
            page_size, window_left=window_left, logits_soft_cap=logits_soft_cap, q_data_type=q_data_type,
            kv_data_type=kv_data_type, sm_scale=sm_scale, disable_split_kv=disable_split_kv,
        )  # fmt: skip

    def run(self, q, paged_kv_cache) -> torch.Tensor:
        return self._run(q, paged_kv_cache, self._starts)


def flashinfer_module() -> ModuleType:
    wrappers = (BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper)
    return made("flashinfer", **{wrapper.__name__: wrapper for wrapper in wrappers})
