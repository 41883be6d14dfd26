"""The conformance kit on this backend, with its default options and with small ones."""

from chunked_attention import ChunkedAttention, ChunkedOptions

from inference_shardformer.attention.base import AttentionSpec
from inference_shardformer.conformance import backend_suite


def small_chunks(spec: AttentionSpec) -> ChunkedAttention:
    """Three queries at a time."""
    return ChunkedAttention(spec, ChunkedOptions(chunk_size=3))


TestChunked = backend_suite(ChunkedAttention)
TestSmallChunks = backend_suite(ChunkedAttention, make=small_chunks)
