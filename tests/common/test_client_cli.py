"""The `cola` command: every record in either format, errors in one line, exit codes that scripts can use."""

import io
import json
import re
import threading
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cola_common import __version__, ids
from cola_common.client import Client, Reason
from cola_common.client.cli import app
from cola_common.client.commands import session
from cola_common.client.commands.session import REFRESH_SECONDS
from cola_common.client.connection import PATIENCE_SECONDS
from cola_common.client.details import asked_text, plan_text
from cola_common.client.sync import Models
from cola_common.client.tables import JOBS, METRICS, TRAFFIC, table
from cola_common.client.watch import watch
from cola_common.jobs import Estimate, FileObject, Job, JobStatus, Wire
from tests.support.fake_server import PLAN, START, running, step_metrics
from tests.support.wires import wire


@pytest.fixture
def served():
    with running() as server:
        yield server


@pytest.fixture
def cola(served, monkeypatch):
    """Runs a command against the server and returns its result; it must succeed unless told otherwise."""
    for name in ("COLA_TOKEN_FILE", "COLA_ROOT_CERTIFICATES", "COLA_INSECURE", "COLA_FORMAT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLA_SERVER", served.address)
    monkeypatch.setenv("TERM", "dumb")

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return run


@pytest.fixture
def job(cola):
    return cola("jobs", "create", "--model", "tiny", "--training-file", ids.new("file")).stdout.strip()


def as_json(cola, *arguments, code=0):
    return json.loads(cola(*arguments, "--format", "json", code=code).stdout)


def test_files_from_upload_to_deletion(cola, served, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "\xc3\xa9"}\n')
    file = cola("files", "create", path).stdout.strip()
    assert ids.valid("file", file)
    assert FileObject.model_validate(as_json(cola, "files", "retrieve", file)) == served.state.files[file]
    assert "train.jsonl" in cola("files", "list").stdout
    assert [found["id"] for found in as_json(cola, "files", "list")] == [file]
    assert cola("files", "content", file).stdout_bytes == path.read_bytes()
    cola("files", "content", file, "-o", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    assert file in cola("files", "delete", file).stdout
    assert cola("files", "list").stdout == "No files.\n"
    assert as_json(cola, "files", "list") == []


def test_flags_win_over_the_spec_file_and_set_over_both(cola, served, tmp_path):
    file = ids.new("file")
    text = f"""
        model = "tiny"
        training_file = "{file}"
        [adapter]
        type = "lora"
        r = 2
        target_modules = ["k_proj"]
        [hyperparameters]
        batch_size = 2
        max_steps = 9
        """
    (tmp_path / "job.toml").write_text(text)
    fields = {
        "model": "tiny",
        "training_file": file,
        "adapter": {"type": "lora", "r": 2, "target_modules": ["k_proj"]},
        "hyperparameters": {"batch_size": 2, "max_steps": 9},
    }
    (tmp_path / "job.json").write_text(json.dumps(fields))
    flags = ["--r", "16", "--target-modules", "q_proj, v_proj", "--batch-size", "3", "--learning-rate", "0.01"]
    settings = ["--set", "hyperparameters.batch_size=5", "--set", "wire.values=fp16", "--set", "metadata.team=red"]
    specs = []
    for name in ("job.toml", "job.json"):
        created = as_json(cola, "jobs", "create", tmp_path / name, *flags, *settings)
        specs.append(Job.model_validate(created).spec)
        assert served.state.jobs[created["id"]].spec == specs[-1]
    assert specs[0] == specs[1]
    spec = specs[0]
    assert (spec.adapter.type, spec.adapter.target_modules) == ("lora", ("q_proj", "v_proj"))
    assert spec.adapter.model_dump()["r"] == 16
    assert (spec.hyperparameters.batch_size, spec.hyperparameters.max_steps) == (5, 9)
    assert (spec.hyperparameters.learning_rate, spec.wire.values, spec.metadata) == (0.01, "fp16", {"team": "red"})


def test_a_path_in_place_of_a_files_id_is_uploaded(cola, served, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b"row\n")
    created = as_json(cola, "jobs", "create", "--model", "tiny", "--training-file", tmp_path / "train.jsonl")
    (file,) = served.state.files.values()
    assert created["spec"]["training_file"] == file.id


def test_joint_files_are_uploaded_in_their_order_and_a_group_is_asked_for(cola, served, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    known = ids.new("file")
    joint = [argument for file in (tmp_path / "b", known, tmp_path / "a") for argument in ("--joint-file", file)]
    group = ["--group", "ours", "--group-size", "3"]
    create = ["jobs", "create", "--model", "tiny", "--training-file", ids.new("file"), *joint, *group]
    created = as_json(cola, *create, "--idempotency-key", "one")
    assert created["spec"]["collaboration"] == {"group": "ours", "size": 3}
    first, second, third = created["spec"]["joint_files"]
    assert second == known
    assert [served.state.contents[file] for file in (first, third)] == [b"b", b"a"]
    assert as_json(cola, *create, "--idempotency-key", "one")["id"] == created["id"]
    shown = cola("jobs", "retrieve", created["id"]).stdout
    assert "ours, 3 jobs" in shown
    assert known in shown


def test_a_key_finds_what_it_made(cola, served, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b"row\n")
    upload = ["files", "create", tmp_path / "train.jsonl", "--idempotency-key", "data"]
    submit = ["jobs", "create", "--model", "tiny", "--training-file", tmp_path / "train.jsonl"]
    for command in (upload, [*submit, "--idempotency-key", "one"], [*submit, "--idempotency-key", "two"]):
        assert cola(*command).stdout == cola(*command).stdout
    assert len(served.state.jobs) == 2
    assert len(served.state.files) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--training-file", "none.jsonl", "--model", "tiny"], "training_file: none.jsonl is no file's id"),
        (["--training-file", "x"], "model: Field required"),
        (["--model", "tiny", "--training-file", "x", "--set", "nonsense"], "field=value"),
        (["--model", "tiny", "--training-file", "x", "--set", "seed.x.y=1", "--seed", "1"], "seed is no table"),
        (["--model", "tiny", "--training-file", "x", "--set", "adapter.q=1"], "adapter.lora.q: no such field"),
        (["--model", "tiny", "--training-file", "x", "--group", "g"], "collaboration.size: Field required"),
        (["--model", "huge", "--training-file", ids.new("file")], "no model 'huge' here; there is tiny"),
        (["none.toml"], "none.toml: No such file or directory"),
    ],
)
def test_what_is_wrong_with_a_job_is_one_line_on_stderr_and_nothing_is_made(cola, served, arguments, words):
    result = cola("jobs", "create", *arguments, code=1)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not served.state.jobs
    assert not served.state.files


def test_a_broken_spec_file_is_told(cola, tmp_path):
    for name, text in (("job.toml", "= 1"), ("job.json", "{"), ("list.json", "[]")):
        (tmp_path / name).write_text(text)
        assert name in cola("jobs", "create", tmp_path / name, code=1).stderr


def test_a_job_is_shown_and_steered(cola, served, job):
    assert cola("jobs", "pause", job).stdout.split("\n")[1].split() == ["status", "paused"]
    assert as_json(cola, "jobs", "resume", job)["status"] == "queued"
    assert as_json(cola, "jobs", "list")[0]["id"] == job
    assert job in cola("jobs", "list").stdout
    assert Job.model_validate(as_json(cola, "jobs", "retrieve", job)) == served.state.jobs[job]
    cola("jobs", "cancel", job)
    assert "cannot become paused" in cola("jobs", "pause", job, code=1).stderr


@pytest.mark.parametrize(("place", "told"), [(1, "queued, next in line"), (7, "queued, place 7 in line")])
def test_a_waiting_job_is_shown_with_its_place_and_another_tenants_with_its_name(cola, served, job, place, told):
    served.state.jobs[job] = served.state.jobs[job].model_copy(update={"queue_place": place, "tenant": "alice"})
    assert told in cola("jobs", "list").stdout
    assert told in cola("jobs", "retrieve", job).stdout
    assert ["tenant", "alice"] in [line.split() for line in cola("jobs", "retrieve", job).stdout.split("\n")]
    assert as_json(cola, "jobs", "retrieve", job)["queue_place"] == place


def test_a_list_says_where_to_go_on(cola, job):
    for _ in range(2):
        cola("jobs", "create", "--model", "tiny", "--training-file", ids.new("file"))
    found = as_json(cola, "jobs", "list", "--limit", 2)
    table = cola("jobs", "list", "--limit", 2).stdout
    assert f"--after {found[-1]['id']}" in table
    rest = as_json(cola, "jobs", "list", "--after", found[-1]["id"])
    assert len({record["id"] for record in found + rest}) == 3
    assert "--after" not in cola("jobs", "list").stdout


def test_metrics_events_and_checkpoints_in_both_formats(cola, served, job, tmp_path):
    assert cola("jobs", "metrics", job).stdout == "No steps yet.\n"
    given = [served.state.step(job) for _ in range(12)]
    checkpoint = served.state.checkpoint(job, {"adapter_config.json": b"{}"})
    assert as_json(cola, "jobs", "metrics", job) == [record.model_dump() for record in given]
    assert [m["step"] for m in as_json(cola, "jobs", "metrics", job, "--last", 2)] == [11, 12]
    assert [m["step"] for m in as_json(cola, "jobs", "metrics", job, "--after-step", 10)] == [11, 12]
    rows = cola("jobs", "metrics", job).stdout.splitlines()
    assert rows[0].split()[:2] == ["step", "loss"]
    assert [row.split()[0] for row in rows[1:]] == [str(record.step) for record in given]
    assert [event["id"] for event in as_json(cola, "jobs", "events", job, "--after", 3, "--limit", 2)] == [4, 5]
    assert "Step 12: training loss" in cola("jobs", "events", job).stdout
    assert as_json(cola, "checkpoints", "list", job)[0]["id"] == checkpoint.id
    assert checkpoint.id in cola("checkpoints", "list", job).stdout
    cola("checkpoints", "download", checkpoint.id, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == b"{}"
    assert "not empty" in cola("checkpoints", "download", checkpoint.id, "-o", tmp_path / "out", code=1).stderr
    cola("jobs", "plot", job, "-o", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# --- what travels ----------------------------------------------------------------------------------------------------

WIRE_FLAGS = ["--wire-rows", "sketch", "--wire-values", "int8", "--wire-deltas", "auto", "--max-error", "0.05"]


def test_flags_say_what_travels_and_narrow_what_a_file_leaves_open(cola, served, tmp_path):
    base = f'model = "tiny"\ntraining_file = "{ids.new("file")}"\n'
    files = {
        "nothing": (base, {}),
        "open": (f'{base}wire = "auto"\n', {}),
        "narrow": (f'{base}[wire]\nvalues = "fp16"\nsketch_rows = 9\n', {"sketch_rows": 9}),
    }
    for name, (text, kept) in files.items():
        (tmp_path / f"{name}.toml").write_text(text)
        created = Job.model_validate(as_json(cola, "jobs", "create", tmp_path / f"{name}.toml", *WIRE_FLAGS))
        asked = Wire(rows="sketch", values="int8", deltas="auto", max_error=0.05, **kept)
        assert created.spec.wire == served.state.jobs[created.id].spec.wire == asked
        cola("jobs", "estimate", tmp_path / f"{name}.toml", *WIRE_FLAGS)
        assert served.state.estimated[-1].wire == asked
    untouched = Job.model_validate(as_json(cola, "jobs", "create", tmp_path / "open.toml"))
    assert untouched.spec.wire == Wire()
    with_set = as_json(cola, "jobs", "create", tmp_path / "narrow.toml", "--wire-values", "int4", "--set", "wire=auto")
    assert Job.model_validate(with_set).spec.wire == Wire()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--max-error", "2"], 1, "wire.max_error"),
        (["--set", "wire.sketch_rows=0"], 1, "wire.sketch_rows"),
        (["--set", "wire.delta=int8"], 1, "wire.delta: no such field; there is deltas"),
        (["--wire-rows", "some"], 2, "--wire-rows"),
        (["--wire-values", "int2"], 2, "--wire-values"),
        (["--wire-deltas", "fp8"], 2, "--wire-deltas"),
    ],
)
def test_what_cannot_travel_is_refused_by_its_name_and_nothing_is_made(cola, served, flags, code, words):
    result = cola("jobs", "create", "--model", "tiny", "--training-file", ids.new("file"), *flags, code=code)
    assert words in result.stderr
    assert not served.state.jobs


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (Wire(), "auto, without loss"),
        (Wire(max_error=0.02), "auto, error up to 0.02"),
        (Wire(rows="all", values="bf16"), "all rows in bf16, deltas auto"),
        (Wire(values="int8", max_error=0.1), "auto rows in int8, deltas auto, error up to 0.1"),
        (Wire(rows="exact", deltas="int4"), "exact rows auto, deltas in int4"),
        (
            Wire(rows="sketch", values="fp16", deltas="fp32", sketch_rows=32),
            "sketch of 32 rows in fp16, deltas in fp32",
        ),
    ],
)
def test_what_a_job_asks_for_is_told_in_words(asked, text):
    assert asked_text(asked) == text


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (PLAN, "exact rows in fp32, deltas in fp32"),
        (wire("all", "bf16", "int8"), "all rows in bf16, deltas in int8"),
        (wire("sketch", "int8", "fp16", sketch_rows=64), "sketch of 64 rows in int8, deltas in fp16"),
    ],
)
def test_what_is_chosen_is_told_in_words(plan, text):
    assert plan_text(plan) == text


def shown(cola, *arguments):
    """What stands behind each name, or behind the line before, where there is none."""
    fields = [line.strip().split("  ", 1) for line in cola(*arguments).stdout.splitlines()]
    return [[field.strip() for field in pair] for pair in fields]


@pytest.mark.parametrize("command", ["retrieve", "get"])
def test_a_job_shows_what_it_asks_for_and_then_what_was_chosen_and_why(cola, served, job, command):
    assert ["wire", "auto, without loss"] in shown(cola, "jobs", command, job)
    assert as_json(cola, "jobs", command, job)["wire_plan"] is None
    served.state.jobs[job] = served.state.jobs[job].model_copy(update={"wire_plan": PLAN})
    lines = shown(cola, "jobs", command, job)
    place = lines.index(["wire", "exact rows in fp32, deltas in fp32"])
    assert lines[place + 1] == [PLAN.reason]
    assert as_json(cola, "jobs", command, job)["wire_plan"] == PLAN.model_dump()


def test_get_is_another_word_for_retrieve_and_takes_no_room_in_the_help(cola, job):
    assert cola("jobs", "get", job).stdout == cola("jobs", "retrieve", job).stdout
    commands = [line.split()[1:2] for line in cola("jobs", "--help").stdout.splitlines()]
    assert ["retrieve"] in commands
    assert ["get"] not in commands


def test_an_estimate_shows_what_would_be_chosen_and_why(cola):
    lines = shown(cola, "jobs", "estimate", "--model", "tiny", "--training-file", ids.new("file"))
    place = lines.index(["wire", "exact rows in fp32, deltas in fp32"])
    assert lines[place + 1] == [PLAN.reason]


def test_metrics_of_the_wire_tell_what_travelled_and_what_that_saved(cola, served, job):
    given = [served.state.step(job) for _ in range(3)]
    heading, *rows = cola("jobs", "metrics", job, "--wire").stdout.splitlines()[1:]
    names = ["step", "rows", "rows", "raw", "sent", "ratio", "back", "back", "reduce", "encode", "wire", "decode"]
    assert heading.split() == names
    step = ["28.8k", "480", "133MB", "14.2MB", "9.35×", "1.84MB", "922kB", "4ms", "10ms", "14ms", "2ms"]
    assert [row.split() for row in rows] == [[str(record.step), *step] for record in given]
    assert as_json(cola, "jobs", "metrics", job, "--wire") == [record.model_dump() for record in given]
    assert len(cola("jobs", "metrics", job, "--wire", "--last", 1).stdout.splitlines()) == 3


def test_metrics_of_steps_that_counted_less_leave_out_what_is_not_known(cola, served, job):
    served.state.step(job, rows=0, sent_rows=0, raw_bytes=0, raw_delta_bytes=0)
    heading, row = cola("jobs", "metrics", job, "--wire").stdout.splitlines()
    assert heading.split() == ["step", "sent", "back", "reduce", "encode", "wire", "decode"]
    assert row.split() == ["1", "14.2MB", "922kB", "4ms", "10ms", "14ms", "2ms"]


@pytest.mark.parametrize(("columns", "gap"), [(METRICS, 2), (TRAFFIC, 1)])
def test_metrics_fit_a_terminal_of_80_columns(columns, gap):
    raw = {"raw_bytes": 3_210_000_000, "sent_bytes": 84_200_000}
    records = [step_metrics(step, created_at=START, seconds=0.12 * step, **raw) for step in (1, 50, 250)]
    console = Console(width=200)
    assert console.measure(table(columns, records, gap=gap)).maximum <= 80


def test_models_and_workers_in_both_formats(cola, served):
    assert [model["id"] for model in as_json(cola, "models", "list")] == ["tiny"]
    assert "135M" in cola("models", "list").stdout
    assert [worker["status"] for worker in as_json(cola, "workers", "list")] == ["attending", "lost"]
    worker = served.state.workers[0].id
    assert worker in cola("workers", "list").stdout
    row = cola("workers", "drain", worker).stdout.splitlines()[1].split()
    assert row[:2] == [worker, "draining"]
    served.state.faults["Workers.Drain"] = [Reason.UNAVAILABLE]
    assert as_json(cola, "workers", "drain", worker)["status"] == "draining"
    assert as_json(cola, "workers", "list")[0]["status"] == "draining"
    assert "no worker 'me' attends" in cola("workers", "drain", "me", code=1).stderr
    served.state.workers.clear()
    assert cola("workers", "list").stdout == "No workers.\n"


def test_an_estimate_takes_the_fields_of_create_makes_nothing_and_keeps_no_file(cola, served, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"row\n")
    flags = ["--model", "tiny", "--training-file", path, "--r", 4, "--set", "wire.values=fp16", "--batch-size", 2]
    told = as_json(cola, "jobs", "estimate", *flags)
    assert Estimate.model_validate(told) == served.state.estimate
    (spec,) = served.state.estimated
    assert (spec.model, spec.wire.values, spec.hyperparameters.batch_size) == ("tiny", "fp16", 2)
    assert spec.adapter.model_dump()["r"] == 4
    assert not served.state.jobs
    assert not served.state.files
    text = cola("jobs", "estimate", *flags).stdout
    for words in ("461k parameters", "250", "unknown yet", "52.0 MB of 16.0 GB", "1.02 GB in the model", "14.2 MB to"):
        assert words in text, text
    served.state.estimate = served.state.estimate.model_copy(update={"server_limit_bytes": 1000, "seconds": 90.0})
    text = cola("jobs", "estimate", *flags).stdout
    assert "52.0 MB more than the 1.00 kB" in text
    assert "1:30 with the server to itself" in text
    assert not served.state.files


def test_create_and_estimate_take_the_same_flags(cola):
    def flags(command):
        return set(re.findall(r"--[a-z-]+", cola("jobs", command, "--help").stdout))

    assert flags("create") - flags("estimate") == {"--idempotency-key", "--watch"}
    assert flags("estimate") < flags("create")


def test_models_tell_what_the_model_thread_does_with_its_time(cola, served):
    heading, row = cola("models", "list").stdout.splitlines()
    assert heading.split()[-4:] == ["busy", "waits", "no", "jobs"]
    assert row.split()[-3:] == ["30%", "10%", "60%"]
    served.state.models[0] = served.state.models[0].model_copy(
        update=dict.fromkeys(("busy_seconds", "waiting_seconds", "jobless_seconds"), 0.0)
    )
    assert "busy" not in cola("models", "list").stdout


# --- watching lists --------------------------------------------------------------------------------------------------


@pytest.fixture
def rounds(monkeypatch):
    """Lets what watches look as often as there are functions: each is called after a look, then comes Ctrl-C."""

    def play(*between):
        acts = iter(between)

        def sleep(seconds):
            assert seconds == REFRESH_SECONDS
            act = next(acts, None)
            if act is None:
                raise KeyboardInterrupt
            act()

        monkeypatch.setattr(session.time, "sleep", sleep)

    return play


def nothing():
    pass


def test_watching_jobs_in_lines_tells_what_is_new_or_has_changed(cola, served, job, rounds):
    made = []
    rounds(
        nothing,
        lambda: served.state.become(job, JobStatus.RUNNING),
        lambda: served.state.step(job),
        nothing,
        lambda: made.append(
            cola("jobs", "create", "--model", "tiny", "--training-file", ids.new("file")).stdout.strip()
        ),
    )
    lines = cola("jobs", "list", "--watch", code=130).stdout.splitlines()
    assert [line.split()[0] for line in lines] == [job, job, job, *made]
    assert [line.split()[1] for line in lines[:3]] == ["queued", "running", "running"]
    assert "1/200" in lines[2]


def test_watching_workers_as_json_gives_a_record_a_line(cola, served, rounds):
    first = served.state.workers[0]

    def drain():
        served.state.workers[0] = first.model_copy(update={"status": "draining"})

    rounds(nothing, drain, nothing)
    lines = cola("workers", "list", "--watch", "--format", "json", code=130).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    assert [(record["id"], record["status"]) for record in records] == [
        (first.id, "attending"),
        (served.state.workers[1].id, "lost"),
        (first.id, "draining"),
    ]


def test_watching_on_a_terminal_redraws_one_table(served, job, rounds, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    made = session.Session(
        server=served.address, token_file=None, root_certificates=None, insecure=False, format=session.Format.TABLE
    )
    with made as opened:
        opened.console = Console(file=io.StringIO(), force_terminal=True, width=120)
        rounds(lambda: served.state.become(job, JobStatus.RUNNING), served.state.jobs.clear)
        with pytest.raises(KeyboardInterrupt):
            opened.watch(JOBS, opened.client.fine_tuning.jobs.list, none="No jobs.")
        text = opened.console.file.getvalue()
    assert "\x1b[1A" in text  # the cursor went up, to draw over what was there
    assert text.index("queued") < text.index("running") < text.index("No jobs.")


def test_what_watches_ends_when_the_server_is_gone(cola, served, job, rounds):
    rounds(served.stop)
    assert "cannot be reached" in cola("jobs", "list", "--watch", code=1).stderr


# --- following -------------------------------------------------------------------------------------------------------


class Player(threading.Thread):
    """Runs a job's steps from the moment in which a command follows it."""

    def __init__(self, served, *, fails=False, steps=30):
        super().__init__()
        self._state, self._fails, self._steps = served.state, fails, steps
        self.start()

    def run(self):
        state = self._state
        while not state.calls["Jobs.StreamEvents"]:
            time.sleep(0.005)
        (job,) = state.jobs
        state.become(job, JobStatus.RUNNING)
        for _ in range(self._steps):
            state.step(job, seconds=1.0)
            time.sleep(0.003)
        if self._fails:
            state.fail(job)
        else:
            state.become(job, JobStatus.SUCCEEDED)


@pytest.mark.parametrize(("fails", "code"), [(False, 0), (True, 1)])
@pytest.mark.parametrize("command", ["watch", "wait"])
def test_following_a_job_ends_with_it_and_tells_by_the_exit_code(cola, served, job, command, fails, code):
    player = Player(served, fails=fails)
    text = cola("jobs", command, job, code=code).stdout
    player.join()
    assert ("failed" if fails else "succeeded") in text
    assert ("the loss of step 7 is not finite" in text) == fails
    assert "30/200" in text


def test_watching_in_lines_tells_events_and_progress_now_and_then(cola, served, job):
    player = Player(served)
    lines = cola("jobs", "watch", job).stdout.splitlines()
    player.join()
    assert any(line.endswith("The job is running.") for line in lines)
    progress = [line for line in lines if " tokens/s  " in line and " left" in line and line[2] == ":"]
    assert 2 <= len(progress) <= 5  # 30 steps of a second each, a line in ten seconds
    # A step a second: a line knows at least the steps up to its own time.
    times = [int(line[3:5]) * 60 + int(line[6:8]) for line in progress]
    steps = [int(line.split()[2].removesuffix("/200")) for line in progress]
    assert [step >= time - times[0] for step, time in zip(steps, times, strict=True)] == [True] * len(steps)
    assert any(line.startswith("Where a step's time goes") for line in lines)


def test_following_in_json_gives_one_event_a_line(cola, served, job):
    player = Player(served)
    lines = cola("jobs", "watch", job, "--format", "json").stdout.splitlines()
    player.join()
    events = [event.model_dump(mode="json") for event in served.state.events[job]]
    assert [json.loads(line) for line in lines] == events
    assert [json.loads(line) for line in cola("jobs", "events", job, "-f", "--format", "json").stdout.splitlines()] == (
        events
    )


def test_watching_on_a_terminal_redraws_one_picture(served, cola, job, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    served.state.event(job, "A warning.", level="warn")
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    player = Player(served)
    with Client(served.address) as client:
        ended = watch(client, job, console)
    player.join()
    text = console.file.getvalue()
    assert ended == served.state.jobs[job]
    assert text.count("A warning.") == 1
    assert "\x1b[1A" in text  # the cursor went up, to draw over what was there
    assert "step 30/200" in text
    assert f"cola checkpoints list {job}" in text


def test_create_with_watch_shows_the_job_until_it_ends(cola, served):
    player = Player(served)
    result = cola("jobs", "create", "--model", "tiny", "--training-file", ids.new("file"), "--watch")
    player.join()
    assert result.stdout.startswith(f"Job {next(iter(served.state.jobs))}\n")
    assert "succeeded" in result.stdout


def test_waiting_is_bounded(cola, job):
    assert "has not ended after 0.1 s" in cola("jobs", "wait", job, "--timeout", "0.1", code=1).stderr


# --- reaching a server -----------------------------------------------------------------------------------------------


def test_the_token_comes_from_a_file(cola, tmp_path, monkeypatch):
    with running(token="secret") as guarded:
        monkeypatch.setenv("COLA_SERVER", guarded.address)
        assert "a valid token is needed" in cola("models", "list", code=1).stderr
        (tmp_path / "token").write_text("secret\n")
        assert "tiny" in cola("models", "list", "--token-file", tmp_path / "token").stdout
        monkeypatch.setenv("COLA_TOKEN_FILE", str(tmp_path / "token"))
        assert "tiny" in cola("models", "list").stdout
        (tmp_path / "empty").write_text("\n")
        assert "empty" in cola("models", "list", "--token-file", tmp_path / "empty", code=1).stderr
        assert "No such file" in cola("models", "list", "--token-file", tmp_path / "none", code=1).stderr


@pytest.mark.parametrize(
    ("server", "words"),
    [("nonsense", "is not HOST:PORT"), ("192.0.2.1:1", "is not loopback"), ("127.0.0.1:1", "cannot be reached")],
)
def test_a_server_that_cannot_be_called_is_one_line(cola, server, words):
    began = time.monotonic()
    result = cola("jobs", "list", "--server", server, code=1)
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert time.monotonic() - began < PATIENCE_SECONDS + 10


def test_an_interrupt_ends_a_command_as_shells_expect(cola, monkeypatch):
    def interrupted(_models):
        raise KeyboardInterrupt

    monkeypatch.setattr(Models, "list", interrupted)
    assert cola("models", "list", code=130).output == ""


@pytest.mark.parametrize("group", [[], ["files"], ["jobs"], ["checkpoints"], ["models"], ["workers"], ["demo"]])
def test_every_group_has_help(cola, group):
    assert "Usage" in cola(*group, "--help").stdout


def test_the_version_is_the_packages(cola):
    assert cola("--version").stdout.strip() == __version__
