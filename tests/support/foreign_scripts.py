"""Scripts of ColossalAI's users, as texts for the migration to read. None of them can run here."""

from __future__ import annotations

README = """\
import torch
import transformers
import colossalai
from colossalai.inference import InferenceEngine, InferenceConfig
from pprint import pprint

colossalai.launch_from_torch()
model_path = "lmsys/vicuna-7b-v1.3"
model = transformers.LlamaForCausalLM.from_pretrained(model_path).cuda()
tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
inference_config = InferenceConfig(
                dtype=torch.float16,
                max_batch_size=4,
                max_input_len=1024,
                max_output_len=512,
                use_cuda_kernel=True,
            )
engine = InferenceEngine(model, tokenizer, inference_config, verbose=True)
prompts = ['Who is the best player in the history of NBA?']
response = engine.generate(prompts=prompts)
pprint(response)
"""

ARGUMENTS = """\
import argparse
from colossalai.inference.config import InferenceConfig
from colossalai.inference.core.engine import InferenceEngine
from transformers import GenerationConfig

def infer(args, model, tokenizer, policy):
    inference_config = InferenceConfig(
        dtype=args.dtype,
        max_batch_size=args.max_batch_size,
        max_input_len=64,
        max_output_len=args.max_output_len,
        prefill_ratio=args.prefill_ratio,
        block_size=16,
        use_cuda_kernel=args.use_cuda_kernel,
        start_token_size=args.start_token_size,
        generated_token_size=args.generated_token_size,
    )
    engine = InferenceEngine(model, tokenizer, inference_config, model_policy=policy)
    generation_config = GenerationConfig(max_new_tokens=args.max_length, do_sample=args.do_sample)
    out = engine.generate([args.prompt], generation_config=generation_config)
    engine.enable_spec_dec(args.drafter)
    engine.add_request(prompts=["x"])
"""
