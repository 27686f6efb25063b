"""A job's progress as a picture for a terminal: how far, how good, how fast, and where the time goes."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean
from time import monotonic
from typing import final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cola_common.client.quantities import bytes_text, count_text, duration_text, seconds_text
from cola_common.client.tables import STATUS_STYLES, adapter_text, status_text
from cola_common.jobs import Job, StepMetrics

WINDOW = 50  # steps that rates and shares are means of: enough to be steady, few enough to show a change
CURVE_WIDTH = 40
BAR_WIDTH = 30

_LEVELS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉"
_FULL, _EMPTY = "█", "░"

# What a step consists of: label, field of `StepMetrics`, colour.
PARTS = (
    ("model", "model_seconds", "blue"),
    ("reduce", "reduce_seconds", "bright_blue"),
    ("encode", "encode_seconds", "cyan"),
    ("wire", "wire_seconds", "yellow"),
    ("worker", "worker_seconds", "green"),
    ("fold", "fold_seconds", "magenta"),
)


@final
class JobProgress:
    """What is known of one job; a Rich renderable.

    One thread may update it while another renders it.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._records: dict[int, StepMetrics] = {}
        self._seen: tuple[StepMetrics, ...] = ()
        self._server_time = 0.0
        self._heard = monotonic()
        self._hear(job.created_at)

    def set_job(self, job: Job) -> None:
        """Takes the job as it stands now."""
        self.job = job
        self._hear(job.started_at or job.created_at)

    def add(self, metrics: Iterable[StepMetrics]) -> None:
        """Takes records of steps. A step that was done again after a rewind takes the place of its first record."""
        for record in metrics:
            self._records[record.step] = record
            self._hear(record.created_at)
        # After a rewind there are records of steps that are still to be done again: they do not count.
        _, current = max(((record.epoch, step) for step, record in self._records.items()), default=(0, 0))
        self._seen = tuple(self._records[step] for step in sorted(self._records) if step <= current)

    @property
    def newest(self) -> StepMetrics | None:
        """The record of the step that was done last."""
        return self._seen[-1] if self._seen else None

    @property
    def tokens_per_second(self) -> float:
        """Over the last `WINDOW` steps, with all waiting; 0 while nothing is known."""
        window = self._window()
        seconds = self._span(window)
        return sum(record.tokens for record in window[-_counted(window) :]) / seconds if seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Until the last step at the rate of the last `WINDOW` steps; None while nothing is known."""
        window = self._window()
        if not window or self.job.total_steps is None or self.job.status.terminal:
            return None
        return (self.job.total_steps - window[-1].step) * self._span(window) / _counted(window)

    @property
    def elapsed(self) -> float | None:
        """Seconds since the job started, until it ended; by the server's clock. None before it starts."""
        if self.job.started_at is None:
            return None
        now = self.job.finished_at or self._server_time + monotonic() - self._heard
        return max(now - self.job.started_at, 0.0)

    def line(self) -> str:
        """The progress in one line, for a log."""
        parts = [f"step {self._steps()}"]
        newest = self.newest
        if newest is not None:
            parts.append(f"loss {newest.train_loss:.4f}")
            parts.append(f"{count_text(self.tokens_per_second)} tokens/s")
        if self.seconds_left is not None:
            parts.append(f"{duration_text(self.seconds_left)} left")
        return "  ".join(parts)

    def __rich__(self) -> RenderableType:
        rows: list[RenderableType] = [self._title(), self._bar()]
        if self._seen:
            rows += [self._numbers(), Text(), self._shares()]
        return Group(*rows)

    def _hear(self, server_time: float) -> None:
        if server_time > self._server_time:
            self._server_time, self._heard = server_time, monotonic()

    def _window(self) -> Sequence[StepMetrics]:
        newest = self.newest
        return [] if newest is None else [r for r in self._seen[-WINDOW:] if r.epoch == newest.epoch]

    @staticmethod
    def _span(window: Sequence[StepMetrics]) -> float:
        """Seconds from the end of the window's first step to that of its last; of a lone step, its own."""
        if len(window) < 2:
            return window[0].seconds if window else 0.0
        return window[-1].created_at - window[0].created_at

    def _step(self) -> int:
        return self.job.step if self.newest is None else self.newest.step

    def _steps(self) -> str:
        total = self.job.total_steps
        return str(self._step()) if total is None else f"{self._step()}/{total}"

    def _title(self) -> Text:
        job = self.job
        title = Text.assemble((job.id, "bold"), "  ", job.model, "  ", adapter_text(job.spec.adapter), "  ")
        return title.append_text(status_text(job))

    def _bar(self) -> Text:
        total = self.job.total_steps
        parts = [f"step {self._steps()}"]
        if total:
            parts.append(f"{100 * self._step() / total:.0f} %")
        if self.elapsed is not None:
            parts.append(f"{duration_text(self.elapsed)} {'in all' if self.job.status.terminal else 'so far'}")
        if self.seconds_left is not None:
            parts.append(f"{duration_text(self.seconds_left)} left")
        done = self._step() / total if total else 0.0
        return Text.assemble((bar(done, BAR_WIDTH), STATUS_STYLES[self.job.status]), "  ", "  ".join(parts))

    def _numbers(self) -> Table:
        newest = self._seen[-1]
        window = self._window()
        losses = [record.train_loss for record in self._seen]
        valid = [record.valid_loss for record in self._seen if record.valid_loss is not None]
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(no_wrap=True)
        mean = fmean(record.train_loss for record in window)
        loss = Text.assemble((f"{newest.train_loss:.4f}", "bold"), f"  mean {mean:.4f} of {_last(window)}")
        if valid:
            loss.append(f"  validation {valid[-1]:.4f}")
        grid.add_row("loss", loss)
        grid.add_row("", Text(curve(losses, CURVE_WIDTH), "cyan"))
        done = sum(record.tokens for record in self._seen)
        grid.add_row("speed", f"{count_text(self.tokens_per_second)} tokens/s  {count_text(done)} tokens done")
        grid.add_row("learning rate", f"{newest.learning_rate:.2e}  gradient norm {newest.grad_norm:#.3g}")
        sent, back = fmean(r.sent_bytes for r in window), fmean(r.received_bytes for r in window)
        grid.add_row("traffic", f"{bytes_text(sent)} to the workers and {bytes_text(back)} back, each step")
        return grid

    def _shares(self) -> Group:
        window = self._window()
        step = fmean(record.seconds for record in window)
        grid = Table.grid(padding=(0, 2))
        for name, field, style in PARTS:
            seconds = fmean(getattr(record, field) for record in window)
            share = seconds / step if step else 0.0
            grid.add_row(
                Text(name, "dim"),
                Text(bar(share, BAR_WIDTH), style),
                Text(seconds_text(seconds), justify="right"),
                Text(f"{100 * share:.0f} %", justify="right"),
            )
        mean = f"  {seconds_text(step)}, mean of {_last(window)}; parts overlap"
        heading = Text.assemble(("Where a step's time goes", "bold"), mean)
        return Group(heading, grid)


def _last(window: Sequence[StepMetrics]) -> str:
    return "the last step" if len(window) == 1 else f"the last {len(window)} steps"


def _counted(window: Sequence[StepMetrics]) -> int:
    """The steps that the window's span covers."""
    return max(len(window) - 1, 1)


def curve(values: Sequence[float], width: int) -> str:
    """A line of blocks, each the mean of its share of the values; the lowest is the least."""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [fmean(values[start:end]) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(_LEVELS[round((mean - low) * scale)] for mean in means)


def bar(share: float, width: int) -> str:
    """A bar of `share` of `width`, to an eighth of a character; always `width` long."""
    whole, eighths = divmod(round(min(max(share, 0.0), 1.0) * width * 8), 8)
    return (_FULL * whole + (_EIGHTHS[eighths] if eighths else "")).ljust(width, _EMPTY)
