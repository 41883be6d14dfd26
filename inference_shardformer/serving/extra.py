"""Whether the libraries are there that the server needs."""

from __future__ import annotations

from importlib.util import find_spec

from inference_shardformer.errors import MissingExtraError

LIBRARIES = ("starlette", "uvicorn", "prometheus_client")


def check_libraries() -> None:
    """Raise `MissingExtraError` that names every library that is missing."""
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"the server needs {', '.join(LIBRARIES)}; not installed: {', '.join(missing)}",
            remedy="pip install 'inference-shardformer[serve]'",
        )
