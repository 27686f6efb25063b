"""`cola demo` on a tiny model: the daemons as processes, the SDK, and PEFT's word on the adapter."""

import io
import json
from pathlib import Path

import pytest
from peft import PeftModel
from rich.console import Console

from cola_common.client.daemons import Daemons
from cola_common.client.demo import run, show
from cola_common.errors import ColaError
from tests.support.models import save_tiny, tiny


@pytest.mark.timeout(180)
def test_demo_leaves_a_checked_adapter(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120, record=True)
    save_tiny("llama", tmp_path / "model")
    output = tmp_path / "output"
    report = run(console, model=str(tmp_path / "model"), steps=6, workers=2, output=output, cache=tmp_path / "cache")
    show(console, report, output)

    assert report.agrees
    assert report.perplexity_after < report.perplexity_before
    assert report.sent_bytes > 0
    assert report.received_bytes > 0
    assert json.loads((output / "report.json").read_text())["job"] == report.job
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "cache").glob("*")), "another model needs no SmolLM2"
    PeftModel.from_pretrained(tiny("llama"), str(output / "adapter"))
    assert "they agree" in console.export_text()


def test_server_that_does_not_start_is_told_with_its_log(tmp_path: Path) -> None:
    with (
        Daemons(tmp_path / "data", tmp_path / "logs") as daemons,
        pytest.raises(ColaError, match="server ended with status") as caught,
    ):
        daemons.start_server("", "no-such-model", split_jobs=1)
    assert "NAME=PATH" in str(caught.value)


def test_daemon_that_ends_early_is_noticed(tmp_path: Path) -> None:
    noticed: list[str] = []
    with Daemons(tmp_path / "data", tmp_path / "logs") as daemons:
        daemons.start_worker("worker-1", "not an address")
        watching = daemons.watch(lambda: noticed.append("failure"))
        watching["worker-1"].join(timeout=50)
        assert noticed == ["failure"]
        assert daemons.failure is not None
        assert "worker-1 ended with status" in str(daemons.failure)


def test_daemons_that_the_block_ends_are_no_failure(tmp_path: Path) -> None:
    noticed: list[str] = []
    with Daemons(tmp_path / "data", tmp_path / "logs") as daemons:
        daemons.start_worker("worker-1", "127.0.0.1:1")
        watching = daemons.watch(lambda: noticed.append("failure"))
    watching["worker-1"].join(timeout=50)
    assert not watching["worker-1"].is_alive()
    assert noticed == []
    assert daemons.failure is None
