"""Generates with the plug-in, in one process or under torchrun."""

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig

shardformer = InferenceShardformer(
    ShardConfig(),
    InferenceConfig(attention={"backend": "chunked", "options": {"chunked": {"chunk_size": 64}}}),
)
model = shardformer.from_pretrained("path/to/llama")
engine = shardformer.attach(model)
for output in engine.generate([[1, 5, 9, 2]], SamplingParams(max_new_tokens=8)):
    print(output.token_ids)
print(shardformer.explain())
