"""Draws a comparison: one panel for each phase, tokens per second of every backend over the buckets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from inference_shardformer.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from inference_shardformer.tuning.comparison import Comparison
    from inference_shardformer.tuning.measurement import Measurement

_SUFFIXES = (".png", ".svg")


def check_plot(path: str) -> None:
    """Raise, before anything is measured, if a plot cannot be drawn into `path`."""
    target = Path(path)
    if target.suffix.lower() not in _SUFFIXES:
        raise ConfigError(
            f"--plot {path}: must end in {' or '.join(_SUFFIXES)}", remedy="for example --plot backends.svg"
        )
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: its folder does not exist", remedy="make it first, or name another file")
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError as exc:
        raise MissingExtraError(
            f"--plot {path}: needs matplotlib, which is not installed ({exc})",
            remedy="pip install 'inference-shardformer[plot]'",
        ) from exc


def draw(comparison: Comparison, path: str) -> None:
    """Write the plot to `path`, which `check_plot` has accepted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    phases = list(dict.fromkeys(row.phase for row in comparison.rows))
    figure = Figure(figsize=(max(5.0, 4.0 * len(phases)), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(1, len(phases)), squeeze=False)[0]
    for phase, axes in zip(phases, panels, strict=False):
        _panel(axes, phase, [row for row in comparison.rows if row.phase == phase])
    figure.suptitle(f"{comparison.of}, {comparison.device}", fontsize=9)
    try:
        figure.savefig(path)
    except OSError as exc:
        raise ConfigError(f"--plot {path}: cannot be written: {exc}", remedy="give a file you may write") from exc


def _panel(axes: Axes, phase: str, rows: list[Measurement]) -> None:
    """Grouped bars; a disqualified row has none and is marked."""
    buckets = list(dict.fromkeys(row.bucket for row in rows))
    backends = list(dict.fromkeys(row.backend for row in rows))
    width = 0.8 / len(backends)
    for number, backend in enumerate(backends):
        own = {row.bucket: row for row in rows if row.backend == backend}
        places = [place + number * width for place in range(len(buckets))]
        heights = [_height(own.get(bucket)) for bucket in buckets]
        axes.bar(places, heights, width, label=backend)
        for place, height in zip(places, heights, strict=True):
            if height == 0:
                axes.annotate("x", (place, 0), ha="center", va="bottom", color="red")
    middle = 0.8 / 2 - width / 2
    axes.set_xticks([place + middle for place in range(len(buckets))], [f"{b.batch} x {b.length}" for b in buckets])
    axes.set(title=phase, xlabel="batch x length", ylabel="tokens/s of one layer")
    axes.legend()


def _height(row: Measurement | None) -> float:
    return row.tokens_per_second or 0.0 if row is not None and row.is_valid else 0.0
