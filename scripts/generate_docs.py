"""Brings docs/configuration.md and docs/config.schema.json up to date with the configuration models."""

from __future__ import annotations

from pathlib import Path

from inference_shardformer.config.reference import generated_files

REPOSITORY = Path(__file__).parents[1]

if __name__ == "__main__":
    for name, content in generated_files(REPOSITORY).items():
        (REPOSITORY / name).write_text(content, encoding="utf-8")
        print(f"wrote {name}")
