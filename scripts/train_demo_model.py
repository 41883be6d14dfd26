"""Train the demo model: a small LLaMA checkpoint that continues Python source.

The training text is the standard library of the running interpreter, so nothing is downloaded. The same interpreter,
seed, threads, library versions and kind of CPU give the same model. The result is a Hugging Face folder of less than
ten megabytes: configuration, bfloat16 weights, byte-level BPE tokenizer, model card.

    python scripts/train_demo_model.py --out demo_model
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import Progress, TextColumn
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

EOS, EOS_ID = "<|endoftext|>", 0
VOCAB, CONTEXT, ROPE_THETA = 2048, 1024, 10000.0
# Architecture under names that every transformers release reads; `save` adds the rest.
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": CONTEXT,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "attention_bias": False,
    "mlp_bias": False, "initializer_range": 0.02, "use_cache": True, "bos_token_id": EOS_ID, "eos_token_id": EOS_ID,
}  # fmt: skip
# Runs of newlines; runs of blanks (indentation); words, digits and signs with at most one leading space.
PRETOKENS = r"\n+|[ \t]{2,}| ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s"
# Tests, installed packages, and generated text (code page tables, the manual's topics, build settings).
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
# (until this share of the steps, window length): short windows are cheap, the last make the whole context usable.
PHASES = ((0.70, 256), (0.85, 512), (1.0, CONTEXT))
TOKENS_PER_STEP = 4096
SPLIT_SPACE = 0.05  # share of " word" tokens fed as " " and "word", so that prompts may end with a space
MUON_LR, MOMENTUM, WEIGHT_DECAY, ADAM_LR, WARMUP = 0.02, 0.95, 0.1, 3e-3, 60

CARD = """---
license: apache-2.0
---
# A small Python model for demonstrations

It continues Python source, to try sharded inference with a real trained model and no download. Not an assistant.

- Architecture: `LlamaForCausalLM`, {num_hidden_layers} layers, hidden size {hidden_size}, {num_attention_heads} heads
  ({num_key_value_heads} for keys and values), MLP size {intermediate_size}, tied embeddings; {parameters:,} parameters
  in bfloat16; {max_position_embeddings} tokens of context.
- Tokenizer: byte-level BPE of {vocab_size} tokens. It encodes any text and adds no special tokens.
- Training: {steps} steps, {tokens:.1f} million tokens ({passes:.1f} passes) in {minutes:.0f} minutes by the clock,
  {arithmetic}, {threads} CPU threads. The token `{eos}` stood before and after every file.
- Held-out files: {loss:.3f} nats per token, {bits:.3f} bits per byte. Token frequencies alone, for scale:
  {unigram_loss:.3f} and {unigram_bits:.3f}.
- Data and licences: {train_files} files ({train_bytes:,} bytes) of the standard library of CPython {python}, which is
  under the Python Software Foundation License Version 2. {held_files} more ({held_bytes:,} bytes), chosen by the hash
  of their path, were held out; tests, installed packages, `encodings` and `pydoc_data` were left out. The model is
  under Apache-2.0. It can repeat passages of its training files word for word; those stay under their own licence.
- Limits: it has seen one style of Python and little prose. Its code is plausible and seldom correct; long
  continuations drift or repeat themselves.

To train it again (another version of Python is other data, and so another model; this one
was made with {versions}):

    python scripts/train_demo_model.py --out FOLDER --steps {steps} --seed {seed} --threads {threads}
"""
SUMMARY = """{minutes:.1f} minutes, {size:,} bytes, held-out loss {loss:.3f} nats per token, {bits:.3f} bits per byte
(token frequencies alone: {unigram_loss:.3f} and {unigram_bits:.3f})"""


def read_corpus(root: Path) -> tuple[list[str], list[str]]:
    """Read the modules in sorted order: those to train on, and those held out (one in twenty, by hash of the path)."""
    files: dict[bool, list[str]] = {True: [], False: []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.intersection(relative.parts) or any(p.startswith(SKIPPED_PREFIXES) for p in relative.parts):
            continue
        text = path.read_bytes().decode("utf-8", errors="replace")
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        files[digest[0] % 20 == 0].append(text)
    if len(files[False]) < 100 or not files[True]:
        raise SystemExit("error: this interpreter ships without the source (.py files) of its library; use one with it")
    return files[False], files[True]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE that round-trips any text and adds nothing on encoding."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[EOS], initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Join the texts in one stream of token ids: the end-of-text token stands before and after every file."""
    ids = [EOS_ID]
    for encoding in tokenizer.encode_batch(texts):
        ids += [*encoding.ids, EOS_ID]
    return torch.tensor(ids)


def split_spaces(tokenizer: Tokenizer, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Replace a small random share of " word" tokens by the two tokens " " and "word"."""
    vocab = tokenizer.get_vocab()
    rest = torch.full((VOCAB,), -1)
    for token, index in vocab.items():
        if token[0] == "Ġ" and len(token) > 1 and token[1] != "Ġ":
            rest[index] = vocab.get(token[1:], -1)
    chosen = (torch.rand(len(ids), generator=generator) < SPLIT_SPACE) & (rest[ids] >= 0)
    pairs = torch.stack([torch.where(chosen, vocab["Ġ"], -1), torch.where(chosen, rest[ids], ids)], dim=1).flatten()
    return pairs[pairs >= 0]


def orthogonalize(update: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration in bfloat16: the nearest semi-orthogonal matrix, roughly, of each in a stack."""
    x = update.bfloat16()
    wide = x if x.size(-2) <= x.size(-1) else x.mT
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return (wide if x.size(-2) <= x.size(-1) else wide.mT).float()


class Muon:
    """Momentum, orthogonalized per matrix; matrices of one shape are handled in one batch."""

    def __init__(self, matrices: list[torch.nn.Parameter]) -> None:
        shapes = sorted({tuple(matrix.shape) for matrix in matrices})
        self.groups = [[m for m in matrices if tuple(m.shape) == shape] for shape in shapes]
        self.averages = [torch.zeros(len(group), *group[0].shape) for group in self.groups]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every matrix from its gradient."""
        for group, average in zip(self.groups, self.averages, strict=True):
            gradient = torch.stack([matrix.grad for matrix in group])
            average.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonalize(gradient.lerp(average, MOMENTUM))
            scale = max(1.0, gradient.size(1) / gradient.size(2)) ** 0.5
            for matrix, direction in zip(group, update, strict=True):
                matrix.mul_(1 - lr * WEIGHT_DECAY).add_(direction, alpha=-lr * scale)


def batches(ids: torch.Tensor, steps: int, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (inputs, targets) of `TOKENS_PER_STEP` tokens: random windows, longer in the later phases."""
    for step in range(steps):
        length = next(size for until, size in PHASES if step < round(until * steps))
        starts = torch.randint(len(ids) - length, (TOKENS_PER_STEP // length, 1), generator=generator)
        window = ids[starts + torch.arange(length + 1)]
        yield window[:, :-1], window[:, 1:]


def loss_of(model: LlamaForCausalLM, inputs: torch.Tensor, targets: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Mean cross-entropy in nats per token."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def train(model: LlamaForCausalLM, ids: torch.Tensor, args: argparse.Namespace, console: Console) -> float:
    """Run all steps under a progress bar; return the seconds they took."""
    others = [p for p in model.parameters() if p.ndim < 2] + [model.model.embed_tokens.weight]
    muon = Muon([p for p in model.model.layers.parameters() if p.ndim == 2])
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(args.seed)
    model.train()
    started, average = time.perf_counter(), math.log(VOCAB)
    loss_column = TextColumn("loss {task.fields[loss]:.3f}")
    with Progress(*Progress.get_default_columns(), loss_column, console=console) as progress:
        task = progress.add_task("train", total=args.steps, loss=average)
        for step, (inputs, targets) in enumerate(batches(ids, args.steps, generator)):
            factor = min((step + 1) / WARMUP, (args.steps - step) / args.steps)
            loss = loss_of(model, inputs, targets, args.bf16)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            muon.step(MUON_LR * factor)
            adam.param_groups[0]["lr"] = ADAM_LR * factor
            adam.step()
            model.zero_grad()
            average += (loss.item() - average) * 0.02
            progress.update(task, advance=1, loss=average)
            if not console.is_terminal and (step + 1) % 100 == 0:
                console.print(f"step {step + 1}/{args.steps} loss {average:.3f} {time.perf_counter() - started:.0f} s")
    return time.perf_counter() - started


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Mean loss over a stream of token ids, each predicted once, in windows of the full context."""
    model.eval()
    total = 0.0
    for start in range(0, len(ids) - 1, CONTEXT):
        window = ids[None, start : start + CONTEXT + 1]
        total += loss_of(model, window[:, :-1], window[:, 1:], bf16=False).item() * (window.size(1) - 1)
    return total / (len(ids) - 1)


def measure(model: LlamaForCausalLM, tokenizer: Tokenizer, kept: list[str], held: list[str]) -> dict[str, float]:
    """Held-out figures of the finished model, and of the training files' (add-one smoothed) token frequencies."""
    ids, held_ids = (encode(tokenizer, texts) for texts in (kept, held))
    train_bytes, held_bytes = (sum(len(text.encode()) for text in texts) for texts in (kept, held))
    counts = torch.bincount(ids, minlength=VOCAB).double() + 1
    unigram = -(counts / counts.sum()).log()[held_ids[1:]].mean().item()
    loss, bits = evaluate(model, held_ids), (len(held_ids) - 1) / math.log(2) / held_bytes
    sizes = {"train_bytes": train_bytes, "held_bytes": held_bytes}
    return {**sizes, "loss": loss, "bits": loss * bits, "unigram_loss": unigram, "unigram_bits": unigram * bits}


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model folder; the output matrix, which is the embedding, is not stored."""
    # Rotary base and type under the names of transformers 4 and under those of transformers 5.
    rope = {"rope_theta": ROPE_THETA, "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA}}
    dtype = {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    load = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    text = {"model_max_length": CONTEXT, "clean_up_tokenization_spaces": False}
    documents = {
        "config.json": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **ARCHITECTURE, **rope, **dtype},
        "generation_config.json": {"bos_token_id": EOS_ID, "eos_token_id": EOS_ID, "do_sample": False},
        "tokenizer_config.json": {**load, **text, "bos_token": EOS, "eos_token": EOS},
    }
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(out / "tokenizer.json"))
    weights = {k: v.bfloat16().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


def sample(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str) -> str:
    """Continue a prompt greedily; the prompt is included."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, pad_token_id=EOS_ID)
    return tokenizer.decode(output[0].tolist())


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model into")
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--fp32", dest="bf16", action="store_false", help="no bfloat16, for a CPU slow at it")
    args = parser.parse_args()
    if min(args.steps, args.threads) < 1:
        parser.error("--steps and --threads must be at least 1")
    return args


def main() -> None:
    """Train, measure, save, report."""
    args = parse_arguments()
    console = Console()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and changes nothing
    kept, held = read_corpus(Path(sysconfig.get_path("stdlib")))
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(kept)
    ids = split_spaces(tokenizer, encode(tokenizer, kept), torch.Generator().manual_seed(args.seed))
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE))
    minutes = train(model, ids, args, console) / 60
    model.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    save(model, tokenizer, args.out)
    figures = measure(model, tokenizer, kept, held)
    tokens = args.steps * TOKENS_PER_STEP
    facts = {
        **ARCHITECTURE, **vars(args), **figures, "minutes": minutes, "parameters": model.num_parameters(), "eos": EOS,
        "train_files": len(kept), "held_files": len(held), "tokens": tokens / 1e6, "passes": tokens / len(ids),
        "arithmetic": "bfloat16 autocast" if args.bf16 else "float32", "python": platform.python_version(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }  # fmt: skip
    (args.out / "README.md").write_text(CARD.format_map(facts), encoding="utf-8")
    size = sum(path.stat().st_size for path in args.out.iterdir() if path.is_file())
    console.print(SUMMARY.format_map({**facts, "size": size}))
    console.print(sample(model, tokenizer, "def "), markup=False, highlight=False)


if __name__ == "__main__":
    main()
