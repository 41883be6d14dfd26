"""How ColossalAI is installed beside a current torch and transformers, and what it means when it is not."""

from __future__ import annotations

from inference_shardformer.errors import EnvironmentMismatchError

VERSION = "0.5.0"
IMPORTED = ("psutil", "einops", "peft", "accelerate", "galore_torch", "bitsandbytes")
"""What `colossalai.shardformer` imports beside torch and transformers; it asks pip for a hundred packages."""

INSTALL = f"pip install --no-deps colossalai=={VERSION} {' '.join(IMPORTED)}"


def missing_colossalai(cause: ImportError) -> EnvironmentMismatchError:
    """The error of a bridge without the other side."""
    return EnvironmentMismatchError(
        f"the bridge needs ColossalAI {VERSION}, which cannot be imported here: {cause}",
        remedy=f"{INSTALL}; or, with ColossalAI's own torch and transformers, pip install "
        "'inference-shardformer[colossalai]'",
    )
