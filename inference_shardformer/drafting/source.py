"""Writes a drafted table as the Python source of a policy, to be read, corrected and kept."""

from __future__ import annotations

import re
from textwrap import wrap

from inference_shardformer.drafting.rows import DraftFacts, DraftRow, DraftTable

_NATIVE = (
    "head_norm",
    "heads",
    "kv_heads",
    "native_attention",
    "native_layer",
    "native_packed_qkv",
    "native_rotary",
    "packed_column",
    "width_norm",
)
_ROWS = ("column", "replicate", "row", "scaled_vocab_embedding", "vocab_embedding", "vocab_head")


def policy_source(table: DraftTable) -> str:
    """A module with one policy class, named after the architecture."""
    name = class_name(table.architecture)
    used = {row.function for row in table.rows}
    window = table.facts.sliding_windows.partition("(")[0]
    stdlib = [
        "from dataclasses import replace" if _changes_facts(table.facts) else "",
        "from typing import TYPE_CHECKING, ClassVar",
    ]
    ours = [
        "from inference_shardformer.config.model import ModelFacts",
        "from inference_shardformer.errors import UnsupportedModelError" if table.undecided else "",
        "from inference_shardformer.policies.base import Policy, PolicyEntry",
        "from inference_shardformer.policies.facts import decoder_facts",
        _import("native", ["refuse_length_dependent_rope", *(each for each in _NATIVE if each in used)]),
        _import("rows", [each for each in _ROWS if each in used]),
        f"from inference_shardformer.policies.windows import {window}",
    ]
    lines = [
        f'"""Policy of {table.architecture}, drafted from its module tree. Read every row before you rely on it.',
        "",
        "Each row says how sure the draft is: `certain` follows from shapes and Hugging Face's own plan, `likely` from",
        "names and shapes, `guess` from neither.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        *filter(None, stdlib),
        "",
        *filter(None, ours),
        "",
        "if TYPE_CHECKING:",
        "    from transformers import PreTrainedConfig",
        "",
        "",
        f"class {name}(Policy):",
        f'    """Shards `{table.architecture}`; Hugging Face\'s own modules stay where they can."""',
        "",
        f'    architectures: ClassVar[tuple[str, ...]] = ("{table.architecture}",)',
        "",
        *_facts_lines(table),
        "",
        *_table_lines(table),
        *_optional_lines(table),
        "",
    ]
    return "\n".join(lines)


def class_name(architecture: str) -> str:
    """The policy's class: `OlmoForCausalLM` gives `OlmoPolicy`."""
    return f"{re.sub(r'(ForCausalLM|LMHeadModel|Model)$', '', architecture)}Policy"


def _changes_facts(facts: DraftFacts) -> bool:
    return facts.attention_scale is not None or facts.attention_softcap is not None


def _import(module: str, names: list[str]) -> str:
    if not names:
        return ""
    ordered = sorted(names)
    line = f"from inference_shardformer.policies.{module} import {', '.join(ordered)}"
    if len(line) <= 88:
        return line
    inner = "".join(f"    {name},\n" for name in ordered)
    return f"from inference_shardformer.policies.{module} import (\n{inner})"


def _facts_lines(table: DraftTable) -> list[str]:
    facts = table.facts
    lines = [
        "    def facts(self, hf_config: PreTrainedConfig) -> ModelFacts:",
        '        """Facts of a configuration, read from the fields the draft was made from."""',
    ]
    if table.undecided:
        lines += [
            "        # UNDECIDED: settle what follows, then delete these lines; until then the policy refuses models.",
            *(line for question in table.undecided for line in _wrapped(question)),
            "        raise UnsupportedModelError(",
            f'            "{len(table.undecided)} question(s) of the drafted policy are open",',
            '            remedy="see the lines marked UNDECIDED in its source",',
            "        )",
        ]
    lines += [
        f'        refuse_length_dependent_rope(hf_config, "{table.architecture}")',
        f"        {'facts =' if _changes_facts(facts) else 'return'} decoder_facts(",
        "            hf_config,",
        f'            architecture="{table.architecture}",',
        f'            intermediate_size="{facts.intermediate_size}",',
        "            activation=None,",
        f"            sliding_windows={facts.sliding_windows},",
        "        )",
    ]
    if _changes_facts(facts):
        changes = [f"attention_scale={facts.attention_scale}"] if facts.attention_scale else []
        changes += [f"attention_softcap={facts.attention_softcap}"] if facts.attention_softcap else []
        lines.append(f"        return replace(facts, {', '.join(changes)})")
    return lines


def _wrapped(question: str) -> list[str]:
    """A question as lines of a comment."""
    return wrap(question, 110, initial_indent="        #   - ", subsequent_indent="        #     ")


def _table_lines(table: DraftTable) -> list[str]:
    lines = [
        "    def table(self, facts: ModelFacts) -> tuple[PolicyEntry, ...]:",
        '        """Every module that holds parameters or buffers, by rows."""',
        "        return (",
    ]
    for row in table.rows:
        lines += [f"            # {row.confidence}: {row.reason}", *_row_lines(row)]
    return [*lines, "        )"]


def _optional_lines(table: DraftTable) -> list[str]:
    """A tied output head need not be in a checkpoint; what it is called is known unless it is `lm_head`."""
    head = next((row.pattern for row in table.rows if row.function == "vocab_head"), "lm_head")
    if head == "lm_head":
        return []
    return [
        "",
        "    def optional_tensors(self, facts: ModelFacts) -> frozenset[str]:",
        '        """The output head where it is tied."""',
        f'        return frozenset({{"{head}.weight"}}) if facts.tie_word_embeddings else frozenset()',
    ]


def _row_lines(row: DraftRow) -> list[str]:
    line = f"            {row.source()},"
    if len(line) <= 88:
        return [line]
    inner = [
        f'                "{row.pattern}",',
        *(f"                {name}={value}," for name, value in row.arguments),
    ]
    return [f"            {row.function}(", *inner, "            ),"]
