"""Admission by bytes: what fits runs, what is taken comes back, and passes have room of their own."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cola_server.training.admission import LARGEST_PASS, Admission, free_bytes, share_out

CPU = torch.device("cpu")


def test_what_fits_beside_the_others_may_run_and_leaves_its_place_when_it_ends():
    admission = Admission(100)
    assert admission.fits(100)
    assert not admission.fits(101)
    admission.take("a", 60)
    admission.take("b", 40)
    assert not admission.fits(1)
    admission.release("a")
    assert admission.fits(60)
    assert not admission.fits(61)
    admission.release("b")
    admission.release("never was")
    assert admission.fits(100)


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 16), st.lists(st.integers(1, 1 << 24), min_size=1, max_size=4))
def test_a_full_pass_of_any_model_and_all_that_jobs_keep_fit_together(memory, wanted, token_bytes):
    tokens, kept = share_out(memory, wanted, token_bytes)
    assert 1 <= tokens <= wanted
    assert kept >= 0
    each = max(token_bytes)
    if each <= memory * LARGEST_PASS:
        assert tokens * each <= memory * LARGEST_PASS
        assert kept + tokens * each == memory
        assert tokens == wanted or (tokens + 1) * each > memory * LARGEST_PASS


def test_a_cohort_is_what_was_asked_for_where_there_is_room():
    assert share_out(1 << 30, 2048, [1000, 10]) == (2048, (1 << 30) - 2_048_000)


@pytest.mark.parametrize(
    ("limit", "current", "idle", "free"),
    [
        (None, 0, 0, 3_000 * 1024),  # no container
        ("max\n", 900, 0, 3_000 * 1024),
        ("1000000\n", 400_000, 0, 600_000),
        ("1000000\n", 900_000, 500_000, 600_000),  # file pages that nobody uses are as good as free
        ("1000000\n", 1_100_000, 0, 0),
        ("9000000\n", 0, 0, 3_000 * 1024),  # the machine has less than the container may take
    ],
)
def test_free_is_what_the_machine_and_the_container_both_have(tmp_path, limit, current, idle, free):
    (tmp_path / "meminfo").write_text("MemTotal:       9000 kB\nMemAvailable:    3000 kB\nBuffers: 1 kB\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text(f"{current}\n")
        (tmp_path / "memory.stat").write_text(f"anon 5\nactive_file 7\ninactive_file {idle}\n")
    assert free_bytes(CPU, tmp_path / "meminfo", tmp_path) == free


def test_this_machine_tells_what_is_free():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < free_bytes(CPU) <= total
