"""A backend whose module sets things up while it is imported."""

from __future__ import annotations

import os

from backend_zoo.sound import SoundAttention

os.environ["ZOO_IMPORTED"] = "1"


class WorksAtImport(SoundAttention):
    """Nothing is wrong with the class."""

    name = "works_at_import"
