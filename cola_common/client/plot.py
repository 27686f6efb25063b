"""A job's learning curve as a picture. Needs matplotlib, which is imported when a picture is drawn."""

from collections.abc import Sequence
from pathlib import Path

from cola_common.errors import ColaError, Reason
from cola_common.jobs import StepMetrics

SMOOTHING = 0.9  # weight of the past in the smoothed loss, as TensorBoard has it by default for noisy curves

_INK, _TRAIN, _VALID, _RATE = "#333333", "#2a6fbb", "#d1495b", "#5b8c5a"


def plot(metrics: Sequence[StepMetrics], title: str, path: Path) -> None:
    """Draws training and validation loss, and below them the learning rate, over the steps. The path's suffix says
    which format.

    Raises: `ColaError(INVALID_CONFIG)` without matplotlib, without metrics, or for a format that is not known.
    """
    if not metrics:
        raise ColaError(Reason.INVALID_CONFIG, setting="plot", problem="the job has no metrics yet")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        problem = "matplotlib is not installed; install it with: pip install 'cola-ftaas[plot]'"
        raise ColaError(Reason.INVALID_CONFIG, setting="plot", problem=problem) from None

    steps = [m.step for m in metrics]
    losses = [m.train_loss for m in metrics]
    valid = [(m.step, m.valid_loss) for m in metrics if m.valid_loss is not None]
    figure = Figure(figsize=(8, 5), layout="constrained")
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])

    few = len(steps) < 20  # a smoothed curve of few points says nothing
    loss_axes.plot(
        steps,
        losses,
        color=_TRAIN,
        linewidth=1.6 if few else 0.8,
        alpha=1.0 if few else 0.35,
        marker="." if few else None,
        label="training loss of a step",
    )
    if not few:
        loss_axes.plot(steps, smoothed(losses), color=_TRAIN, linewidth=1.8, label="training loss, smoothed")
    if valid:
        loss_axes.plot(
            *zip(*valid, strict=True), color=_VALID, linewidth=1.2, marker="o", markersize=4, label="validation loss"
        )
    loss_axes.set_ylabel("loss")
    loss_axes.set_title(title, loc="left", fontsize=11, color=_INK)
    loss_axes.legend(frameon=False)
    rate_axes.plot(steps, [m.learning_rate for m in metrics], color=_RATE, linewidth=1.4)
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_xlabel("step")
    rate_axes.set_ylim(bottom=0)
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    rate_axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (loss_axes, rate_axes):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK, labelsize=9)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:  # a suffix that matplotlib does not know
        raise ColaError(Reason.INVALID_CONFIG, setting="output", problem=error) from None


def smoothed(values: Sequence[float]) -> list[float]:
    """An exponential mean without the pull of its start: s_n = Σ βⁿ⁻ⁱ xᵢ / Σ βⁿ⁻ⁱ."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(mean / weight)
    return result
