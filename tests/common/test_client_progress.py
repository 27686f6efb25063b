"""The progress view tells what the records say; the plot draws them."""

import builtins
import io
import math

import pytest
from rich.console import Console

from cola_common import ids
from cola_common.client import ColaError, Reason
from cola_common.client.plot import plot, smoothed
from cola_common.client.progress import PARTS, WINDOW, JobProgress, bar, curve
from cola_common.client.quantities import bytes_text, count_text, duration_text, seconds_text, times_text
from cola_common.jobs import Job, JobSpec, JobStatus, StepMetrics
from tests.support.fake_server import START, step_metrics


def job(**fields: object) -> Job:
    values = {
        "id": ids.new("ftjob"),
        "created_at": START,
        "started_at": START,
        "status": JobStatus.RUNNING,
        "spec": JobSpec(model="tiny", training_file=ids.new("file")),
        "total_steps": 200,
    }
    return Job.model_validate(values | fields)


def records(count: int, pace: float = 0.5, **fields: object) -> list[StepMetrics]:
    return [step_metrics(step, created_at=START + pace * step, **fields) for step in range(1, count + 1)]


def rendered(view: JobProgress, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), record=True, color_system=None)
    console.print(view)
    return console.export_text()


@pytest.mark.parametrize("done", [1, 2, WINDOW, WINDOW + 30, 199, 200])
def test_rates_are_those_of_the_last_steps_by_the_servers_clock(done):
    view = JobProgress(job())
    view.add(records(done, pace=0.5, tokens=100, seconds=0.5))
    assert view.tokens_per_second == pytest.approx(100 / 0.5)
    assert view.seconds_left == pytest.approx((200 - done) * 0.5)
    assert view.elapsed == pytest.approx(0.5 * done, abs=1)


def test_waiting_between_steps_counts():
    view = JobProgress(job())
    view.add(records(10, pace=3.0, seconds=0.1, tokens=300))
    assert view.tokens_per_second == pytest.approx(100)
    assert view.seconds_left == pytest.approx(190 * 3)


@pytest.mark.parametrize("sizes", [[120], [60, 60], [1] * 120])
def test_the_picture_is_the_same_however_the_records_arrive(sizes):
    view, rest = JobProgress(job(id="ftjob-" + "0" * 24)), records(120)
    for size in sizes:
        view.add(rest[:size])
        del rest[:size]
    whole = JobProgress(job(id="ftjob-" + "0" * 24))
    whole.add(records(120))
    assert rendered(view) == rendered(whole)


def test_a_rewind_takes_the_progress_back():
    view = JobProgress(job())
    view.add(records(50))
    view.add([step_metrics(31, created_at=START + 60, epoch=2, train_loss=9.5)])
    assert view.newest is not None
    assert (view.newest.step, view.newest.train_loss) == (31, 9.5)
    assert view.seconds_left is not None
    assert "step 31/200" in rendered(view)
    view.add([step_metrics(step, created_at=START + 60 + step, epoch=2) for step in range(32, 61)])
    assert "step 60/200" in rendered(view)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("done", [0, 1, 77, 200])
@pytest.mark.parametrize("status", list(JobStatus))
def test_the_picture_holds_what_matters_in_every_state(width, done, status):
    finished = START + 100 if status.terminal else None
    view = JobProgress(job(status=status, finished_at=finished, step=done))
    view.add(records(done))
    text = rendered(view, width)
    assert view.job.id in text
    assert status.value in text
    assert f"step {done}/200" in text
    for name, field, _ in PARTS if done else ():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        share = getattr(records(1)[0], field) / records(1)[0].seconds
        assert f"{100 * share:.0f} %" in line or width < 80
    if done:
        assert f"{records(done)[-1].train_loss:.4f}" in text
    assert ("left" in text) == (done > 0 and not status.terminal)


def test_nothing_is_claimed_before_anything_is_known():
    view = JobProgress(job(status=JobStatus.QUEUED, started_at=None, total_steps=None))
    assert (view.newest, view.seconds_left, view.elapsed, view.tokens_per_second) == (None, None, None, 0.0)
    assert "left" not in rendered(view) + view.line()
    waiting = JobProgress(job(status=JobStatus.QUEUED, waiting_for_workers=True))
    assert "waits for workers" in rendered(waiting)


@pytest.mark.parametrize("width", [1, 7, 40])
@pytest.mark.parametrize("count", [1, 2, 39, 40, 41, 1000])
def test_a_curve_falls_as_its_values_do_and_spans_all_levels(count, width):
    blocks = curve([math.exp(-3 * i / count) for i in range(count)], width)
    assert len(blocks) == min(count, width)
    assert list(blocks) == sorted(blocks, reverse=True)
    if len(blocks) > 1:
        assert (blocks[0], blocks[-1]) == ("█", "▁")


@pytest.mark.parametrize("share", [-1.0, 0.0, 0.001, 0.124, 0.5, 0.999, 1.0, 3.0])
def test_a_bar_has_its_width_and_its_share(share):
    text = bar(share, 30)
    assert len(text) == 30
    assert text.count("█") == pytest.approx(30 * min(max(share, 0), 1), abs=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bytes_text(0), "0 B"),
        (bytes_text(999), "999 B"),
        (bytes_text(999.6), "1.00 kB"),
        (bytes_text(14_200_000), "14.2 MB"),
        (bytes_text(999_600_000), "1.00 GB"),
        (bytes_text(10**16), "10000 TB"),
        (count_text(52_149), "52.1k"),
        (count_text(134_515_008), "135M"),
        (seconds_text(0), "0 µs"),
        (seconds_text(0.00064), "640 µs"),
        (seconds_text(0.9994), "999 ms"),
        (seconds_text(0.9996), "1.00 s"),
        (seconds_text(2.414), "2.41 s"),
        (seconds_text(100), "100 s"),
        (duration_text(7.4), "0:07"),
        (duration_text(59.6), "1:00"),
        (duration_text(7500), "2:05:00"),
        (duration_text(-3), "0:00"),
        (times_text(10, 8), "1.25×"),
        (times_text(10, 20), "0.50×"),
        (times_text(99.94, 1), "99.9×"),
        (times_text(99.96, 1), "100×"),
        (times_text(3_200_000_000, 8_400_000), "381×"),
        (times_text(0, 7), ""),
        (times_text(7, 0), ""),
    ],
)
def test_quantities_read_as_people_write_them(text, expected):
    assert text == expected


# --- the plot --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "suffix", "magic"), [(1, "svg", b"<?xml"), (10, "pdf", b"%PDF"), (300, "png", b"\x89PNG")]
)
def test_a_plot_is_a_picture_of_the_format_that_its_name_says(tmp_path, count, suffix, magic):
    path = tmp_path / f"loss.{suffix}"
    plot(records(count, valid_loss=1.5), "tiny", path)
    assert path.read_bytes().startswith(magic)


def test_a_smoothed_curve_keeps_a_constant_and_damps_noise():
    assert smoothed([2.5] * 50) == pytest.approx([2.5] * 50)
    noisy = [1.0, 3.0] * 50
    assert max(smoothed(noisy)[20:]) - min(smoothed(noisy)[20:]) < 0.3
    assert smoothed(noisy)[0] == 1.0


@pytest.mark.parametrize(("count", "name"), [(0, "loss.png"), (5, "loss.xyz")])
def test_what_cannot_be_drawn_is_told(tmp_path, count, name):
    with pytest.raises(ColaError) as caught:
        plot(records(count), "tiny", tmp_path / name)
    assert caught.value.reason is Reason.INVALID_CONFIG


def test_without_matplotlib_the_plot_says_how_to_get_it(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ColaError, match=r"cola-ftaas\[plot\]"):
        plot(records(3), "tiny", tmp_path / "loss.png")
