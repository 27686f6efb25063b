"""The store: what it is told stays, across threads, repeats, restarts and damage."""

import math
import sqlite3
import threading
import time

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import event

from cola_common import ids
from cola_common.errors import ColaError, Reason
from cola_common.jobs import (
    TRANSITIONS,
    Checkpoint,
    FileObject,
    Hyperparameters,
    JobFailure,
    JobSpec,
    JobStatus,
    LoraAdapter,
    StepMetrics,
)
from cola_server.jobs import JobStore
from cola_server.jobs.database import MIGRATIONS, RESERVE_BYTES, Database
from cola_server.jobs.tables import Table
from tests.support.databases import new_store, url_of
from tests.support.wires import wire


@pytest.fixture
def url(tmp_path):
    return url_of(tmp_path)


@pytest.fixture
def store(tmp_path):
    store = new_store(tmp_path)
    yield store
    store.close()


def add_file(store, purpose="fine-tune", key=None, digest="0" * 64):
    return store.add_file(
        FileObject(
            id=ids.new("file"), filename="a.jsonl", purpose=purpose, bytes=1, created_at=time.time(), digest=digest
        ),
        key,
    )


def make_job(store, key=None, **fields):
    fields.setdefault("training_file", add_file(store).id)
    return store.create_job(JobSpec(model="m", **fields), key)


def metrics(step, **fields):
    numbers = {name: float(step) for name, field in StepMetrics.model_fields.items() if field.annotation is float}
    counts = {name: step for name, field in StepMetrics.model_fields.items() if field.annotation is int}
    return StepMetrics(**{**numbers, **counts, "step": step, **fields})


def checkpoint(job, step, **fields):
    return Checkpoint(
        id=ids.new("ftckpt"),
        job=job,
        step_number=step,
        created_at=1.0,
        metrics={"train_loss": 0.5},
        digest="d",
        **fields,
    )


def record_step(store, job, metrics, **fields):
    given = {
        "trained_tokens": metrics.step * 10,
        "estimated_finish": 1e9,
        "message": f"Step {metrics.step}",
        "data": {},
    }
    store.record_step(job, metrics, **given | fields)


def reason(error):
    return error.value.reason


# --- jobs -----------------------------------------------------------------------------------------------------------


def test_a_new_job_is_its_spec_and_waits_for_validation(store):
    spec = JobSpec(
        model="m",
        training_file=add_file(store).id,
        seed=2**63 - 1,
        metadata={"team": "á"},
        adapter=LoraAdapter(target_modules=("q", "v")),
        hyperparameters=Hyperparameters(max_steps=3, learning_rate=1e-5),
    )
    job = store.create_job(spec)
    assert job.spec == spec
    assert (job.status, job.step, job.epoch, job.total_steps, job.error) == ("validating_files", 0, 0, None, None)
    assert ids.valid("ftjob", job.id)
    assert store.job(job.id) == job


def test_everything_survives_a_restart(store, url):
    job = make_job(store, "key")
    store.set_total_steps(job.id, 7)
    store.transition(job.id, JobStatus.QUEUED, event="Queued.")
    store.transition(job.id, JobStatus.RUNNING)
    store.begin_epoch(job.id)
    record_step(store, job.id, metrics(1), trained_tokens=2**40)
    kept = store.add_checkpoint(checkpoint(job.id, 2))
    before = (store.job(job.id), store.events(job.id), store.metrics(job.id), store.files())
    store.close()
    again = JobStore(url, create=True)
    assert (again.job(job.id), again.events(job.id), again.metrics(job.id), again.files()) == before
    assert again.checkpoint(kept.id) == kept
    assert before[0].trained_tokens == 2**40
    again.close()


def test_one_key_makes_one_job(store):
    spec = JobSpec(model="m", training_file=add_file(store).id)
    first = store.create_job(spec, "key")
    assert store.create_job(spec, "key") == first
    assert store.job_by_key(spec, "key") == first
    assert store.job_by_key(spec, "other") is None
    assert store.create_job(spec, "other").id != first.id
    assert store.create_job(spec).id != store.create_job(spec).id
    with pytest.raises(ColaError) as error:
        store.create_job(spec.model_copy(update={"seed": 1}), "key")
    assert reason(error) == Reason.INVALID_JOB


def test_one_key_makes_one_job_from_many_threads_at_once(store):
    spec = JobSpec(model="m", training_file=add_file(store).id)
    made = []
    run_at_once(lambda: made.append(store.create_job(spec, "key").id), threads=8)
    assert len(made) == 8
    assert len(set(made)) == 1
    assert len(store.jobs()) == 1


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"training_file": "file-" + "0" * 24}, Reason.UNKNOWN_FILE),
        ({"validation_file": "file-" + "0" * 24}, Reason.UNKNOWN_FILE),
        ({"adapter": LoraAdapter(init_from="file-" + "0" * 24)}, Reason.UNKNOWN_FILE),
        ({"adapter": LoraAdapter(init_from="ftckpt-" + "0" * 24)}, Reason.UNKNOWN_CHECKPOINT),
    ],
)
def test_no_job_is_made_of_what_is_not_here(store, fields, wanted):
    with pytest.raises(ColaError) as error:
        make_job(store, **fields)
    assert reason(error) == wanted
    assert store.jobs() == []


def walk_to(store, status):
    """A job in that status, by a legal way."""
    ways = {
        JobStatus.VALIDATING_FILES: [],
        JobStatus.QUEUED: [JobStatus.QUEUED],
        JobStatus.RUNNING: [JobStatus.QUEUED, JobStatus.RUNNING],
        JobStatus.PAUSED: [JobStatus.QUEUED, JobStatus.PAUSED],
        JobStatus.SUCCEEDED: [JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.SUCCEEDED],
        JobStatus.FAILED: [JobStatus.FAILED],
        JobStatus.CANCELLED: [JobStatus.CANCELLED],
    }
    job = make_job(store)
    for step in ways[status]:
        job = store.transition(job.id, step)
    return job


@pytest.mark.parametrize("wanted", JobStatus)
@pytest.mark.parametrize("status", JobStatus)
def test_a_status_moves_along_legal_transitions_only(store, status, wanted):
    job = walk_to(store, status)
    if wanted in TRANSITIONS[status]:
        moved = store.transition(job.id, wanted, event="So it is.")
        assert moved.status == wanted
        assert (moved.finished_at is not None) == wanted.terminal
        (event,) = store.events(job.id)
        assert (event.type, event.message, event.data) == ("status", "So it is.", {"status": wanted.value})
    else:
        with pytest.raises(ColaError) as error:
            store.transition(job.id, wanted, event="So it is.")
        assert reason(error) == Reason.ILLEGAL_TRANSITION
        assert store.job(job.id) == job
        assert store.events(job.id) == []


@pytest.mark.parametrize("status", [s for s in JobStatus if JobStatus.QUEUED in TRANSITIONS[s]])
def test_a_source_may_be_asked_for(store, status):
    job = walk_to(store, status)
    if status == JobStatus.PAUSED:
        assert store.transition(job.id, JobStatus.QUEUED, source=JobStatus.PAUSED).status == JobStatus.QUEUED
    else:
        with pytest.raises(ColaError) as error:
            store.transition(job.id, JobStatus.QUEUED, source=JobStatus.PAUSED)
        assert reason(error) == Reason.ILLEGAL_TRANSITION
        assert store.job(job.id) == job


def test_of_many_threads_one_ends_a_job(store):
    job = walk_to(store, JobStatus.RUNNING)
    outcomes = []

    def end():
        try:
            outcomes.append(store.transition(job.id, JobStatus.CANCELLED).status)
        except ColaError as error:
            outcomes.append(error.reason)

    run_at_once(end, threads=6)
    assert sorted(outcomes) == sorted([JobStatus.CANCELLED, *[Reason.ILLEGAL_TRANSITION] * 5])


def test_a_failure_is_kept_with_its_reason(store):
    job = make_job(store)
    failure = JobFailure(code="INVALID_DATASET", message="line 3", param="training_file")
    assert store.transition(job.id, JobStatus.FAILED, error=failure).error == failure
    assert store.job(job.id).error == failure


def test_started_once_and_waiting_only_while_it_runs(store):
    job = walk_to(store, JobStatus.RUNNING)
    started = store.job(job.id).started_at
    store.set_waiting(job.id, True)
    assert store.job(job.id).waiting_for_workers
    assert not store.transition(job.id, JobStatus.QUEUED).waiting_for_workers
    assert store.transition(job.id, JobStatus.RUNNING).started_at == started


def test_epochs_count_up_and_are_never_given_out_twice(store, url):
    job = make_job(store)
    given = []
    run_at_once(lambda: given.extend(store.begin_epoch(job.id) for _ in range(10)), threads=4)
    assert sorted(given) == list(range(1, 41))
    store.close()
    again = JobStore(url, create=True)
    assert again.begin_epoch(job.id) == 41
    again.close()


def test_lists_go_from_new_to_old_and_go_on_after_any(store):
    made = [make_job(store).id for _ in range(7)]
    assert [job.id for job in store.jobs()] == made[::-1]
    assert [job.id for job in store.jobs(limit=3)] == made[:3:-1]
    assert [job.id for job in store.jobs(after=made[4], limit=3)] == [made[3], made[2], made[1]]
    assert store.jobs(after=made[0]) == []
    files = [file.id for file in store.files(limit=100)]
    assert [file.id for file in store.files(after=files[2], limit=2)] == files[3:5]


def test_unfinished_jobs_from_old_to_new(store):
    made = {status: walk_to(store, status).id for status in JobStatus}
    assert [job.id for job in store.unfinished()] == [made[s] for s in JobStatus if not s.terminal]


@pytest.mark.parametrize(
    "call",
    [
        lambda store, job: store.job(job),
        lambda store, job: store.jobs(after=job),
        lambda store, job: store.transition(job, JobStatus.QUEUED),
        lambda store, job: store.set_total_steps(job, 1),
        lambda store, job: store.set_waiting(job, True),
        lambda store, job: store.begin_epoch(job),
        lambda store, job: store.add_event(job, "x"),
        lambda store, job: store.events(job),
        lambda store, job: record_step(store, job, metrics(1)),
        lambda store, job: store.base_digest(job),
        lambda store, job: store.metrics(job),
        lambda store, job: store.add_checkpoint(checkpoint(job, 1)),
        lambda store, job: store.checkpoints(job),
    ],
)
def test_an_unknown_job_is_told(store, call):
    with pytest.raises(ColaError) as error:
        call(store, "ftjob-" + "0" * 24)
    assert reason(error) == Reason.UNKNOWN_JOB


# --- events and metrics ---------------------------------------------------------------------------------------------


def test_events_are_numbered_within_each_job(store):
    one, two = make_job(store).id, make_job(store).id
    for number in range(1, 6):
        assert store.add_event(one, f"event {number}", "warn", "metrics", {"loss": 0.5, "at": "x"}).id == number
    assert store.add_event(two, "other").id == 1
    assert [event.id for event in store.events(one, after=2, limit=2)] == [3, 4]
    assert store.events(one)[0].data == {"loss": 0.5, "at": "x"}
    assert store.events(one, after=5) == []


def test_events_of_many_threads_have_no_gap_and_no_repeat(store):
    job = make_job(store).id
    run_at_once(lambda: [store.add_event(job, "x") for _ in range(10)], threads=4)
    assert [event.id for event in store.events(job)] == list(range(1, 41))


def test_a_repeated_step_overwrites_its_metrics(store):
    job = make_job(store).id
    for step in (1, 2, 3):
        record_step(store, job, metrics(step))
    record_step(store, job, metrics(2, epoch=2, valid_loss=0.25))
    assert store.metrics(job) == [metrics(1), metrics(2, epoch=2, valid_loss=0.25), metrics(3)]
    assert store.metrics(job, after_step=2) == [metrics(3)]


def test_metrics_keep_every_bit(store):
    job = make_job(store).id
    odd = metrics(1, train_loss=0.1 + 0.2, grad_norm=math.inf, learning_rate=5e-324, sent_bytes=2**62)
    record_step(store, job, odd)
    assert store.metrics(job) == [odd]


def test_a_step_is_one_commit_with_its_event_and_how_far_the_job_is(store, url):
    job = make_job(store).id
    beside = JobStore(url, create=True)  # sees what is committed only
    seen = []
    store.subscribe(lambda _: seen.append((beside.job(job).step, beside.metrics(job), beside.events(job))))
    record_step(store, job, metrics(1), trained_tokens=7, message="Step 1/9", data={"train_loss": 0.5})
    ((step, known, (event,)),) = seen
    assert (step, known) == (1, [metrics(1)])
    assert (event.type, event.level, event.message, event.data) == ("metrics", "info", "Step 1/9", {"train_loss": 0.5})
    assert (store.job(job).trained_tokens, store.job(job).estimated_finish) == (7, 1e9)
    beside.close()


def test_a_new_epoch_takes_the_job_back_to_its_step_and_leaves_its_history(store):
    job = make_job(store).id
    for step in (1, 2, 3):
        record_step(store, job, metrics(step))
    assert store.begin_epoch(job, step=2, trained_tokens=20) == 1
    assert (store.job(job).step, store.job(job).trained_tokens) == (2, 20)
    assert [known.step for known in store.metrics(job)] == [1, 2, 3]
    assert len(store.events(job)) == 3
    assert store.begin_epoch(job) == 2
    assert (store.job(job).step, store.job(job).trained_tokens) == (0, 0)


def test_what_travels_is_that_of_the_newest_epoch_and_survives_a_restart(store, url):
    job = make_job(store).id
    assert store.job(job).wire_plan is None
    first = wire("sketch", "int8", "bf16", sketch_rows=64, max_error=0.1)
    odd = first.model_copy(update={"error": 0.1 + 0.2, "max_error": 5e-324, "reason": "é 'quoted' \n"})
    for epoch, plan in enumerate([first, odd, wire("exact"), odd], start=1):
        assert store.begin_epoch(job, wire_plan=plan) == epoch
        assert store.job(job).wire_plan == plan
        assert [each.wire_plan for each in store.jobs()] == [plan]
    store.close()
    again = JobStore(url, create=False)
    assert again.job(job).wire_plan == odd
    assert again.begin_epoch(job) == 5
    assert again.job(job).wire_plan is None
    again.close()


def test_a_step_of_a_repeated_epoch_overwrites_what_the_wire_made_of_it(store):
    job = make_job(store).id
    of_rows = {"rows": 100, "sent_rows": 100, "raw_bytes": 2**40, "raw_delta_bytes": 2**33, "reduce_seconds": 0.0}
    of_gradient = {**of_rows, "sent_rows": 8, "reduce_seconds": 0.1 + 0.2, "decode_seconds": 5e-324}
    record_step(store, job, metrics(1, epoch=1, **of_rows))
    store.begin_epoch(job, wire_plan=wire("exact"))
    record_step(store, job, metrics(1, epoch=2, **of_gradient))
    assert store.metrics(job) == [metrics(1, epoch=2, **of_gradient)]


# --- files and checkpoints ------------------------------------------------------------------------------------------


def test_one_key_makes_one_file(store):
    first = add_file(store, key="key")
    assert add_file(store, key="key") == first
    assert len(store.files()) == 1
    with pytest.raises(ColaError) as error:
        add_file(store, key="key", digest="1" * 64)
    assert reason(error) == Reason.INVALID_FILE


@pytest.mark.parametrize("use", ["training_file", "validation_file", "init_from"])
def test_a_file_stays_while_a_job_needs_it(store, use):
    file = add_file(store)
    fields = {"adapter": LoraAdapter(init_from=file.id)} if use == "init_from" else {use: file.id}
    job = make_job(store, **fields)
    with pytest.raises(ColaError) as error:
        store.delete_file(file.id)
    assert reason(error) == Reason.FILE_IN_USE
    store.transition(job.id, JobStatus.CANCELLED)
    store.delete_file(file.id)
    with pytest.raises(ColaError) as error:
        store.file(file.id)
    assert reason(error) == Reason.UNKNOWN_FILE


def test_a_step_has_one_checkpoint(store):
    job, other = make_job(store).id, make_job(store).id
    first = store.add_checkpoint(checkpoint(job, 10))
    assert store.add_checkpoint(checkpoint(job, 10)) == first
    second = store.add_checkpoint(checkpoint(job, 20))
    store.add_checkpoint(checkpoint(other, 10))
    assert store.checkpoints(job) == [second, first]
    assert store.checkpoints(job, after=second.id) == [first]
    with pytest.raises(ColaError) as error:
        store.checkpoint("ftckpt-" + "0" * 24)
    assert reason(error) == Reason.UNKNOWN_CHECKPOINT
    assert store.artefacts() == [*store.files()[::-1], first, second, *store.checkpoints(other)]


# --- tenants --------------------------------------------------------------------------------------------------------


OF_A_JOB = {
    "job": [],
    "base_digest": [],
    "transition": [JobStatus.CANCELLED],
    "set_total_steps": [3],
    "set_waiting": [True],
    "begin_epoch": [],
    "add_event": ["An event."],
    "events": [],
    "metrics": [],
    "checkpoints": [],
}


def refused_by(function, *args, **fields):
    with pytest.raises(ColaError) as error:
        function(*args, **fields)
    return error.value


@pytest.mark.parametrize("call", OF_A_JOB)
def test_anothers_job_is_as_one_that_never_was(store, call):
    job, nobodys = make_job(store.of("a")).id, "ftjob-" + "0" * 24
    theirs = refused_by(getattr(store.of("b"), call), job, *OF_A_JOB[call])
    none = refused_by(getattr(store.of("b"), call), nobodys, *OF_A_JOB[call])
    assert theirs.reason == none.reason == Reason.UNKNOWN_JOB
    assert theirs.message.replace(job, nobodys) == none.message
    assert store.job(job).status == "validating_files"
    assert store.events(job) == []
    getattr(store.of("a"), call)(job, *OF_A_JOB[call])  # whose it is finds it


def test_anothers_files_checkpoints_and_steps_are_as_if_they_never_were(store):
    a, b = store.of("a"), store.of("b")
    file, job = add_file(a), make_job(a)
    kept = a.add_checkpoint(checkpoint(job.id, 1))
    for call, id in ((b.file, file.id), (b.delete_file, file.id)):
        assert refused_by(call, id).reason == Reason.UNKNOWN_FILE
    assert refused_by(b.checkpoint, kept.id).reason == Reason.UNKNOWN_CHECKPOINT
    assert refused_by(b.add_checkpoint, checkpoint(job.id, 2)).reason == Reason.UNKNOWN_JOB
    assert refused_by(record_step, b, job.id, metrics(1)).reason == Reason.UNKNOWN_JOB
    assert refused_by(b.files, after=file.id).reason == Reason.UNKNOWN_FILE
    assert refused_by(b.jobs, after=job.id).reason == Reason.UNKNOWN_JOB
    own = make_job(b)
    assert refused_by(b.checkpoints, own.id, after=kept.id).reason == Reason.UNKNOWN_CHECKPOINT
    assert (a.file(file.id), a.checkpoint(kept.id)) == (file, kept)


@pytest.mark.parametrize("field", ["training_file", "validation_file", "joint_files", "init_from", "a checkpoint"])
def test_no_job_is_made_of_what_is_anothers(store, field):
    a, b = store.of("a"), store.of("b")
    source = a.add_checkpoint(checkpoint(make_job(a).id, 1)) if field == "a checkpoint" else add_file(a)
    of_adapter = {"adapter": LoraAdapter(init_from=source.id)}
    fields = {field: source.id} if field.endswith("_file") else of_adapter
    if field == "joint_files":
        fields = {field: (source.id,)}
    assert refused_by(make_job, b, **fields).reason in (Reason.UNKNOWN_FILE, Reason.UNKNOWN_CHECKPOINT)
    assert b.jobs() == []
    assert make_job(a, **fields).tenant == "a"


def test_lists_hold_a_tenants_own_and_the_servers_hold_all(store):
    made = [(tenant, make_job(store.of(tenant)).id) for tenant in "abaab"]
    for tenant in "ab":
        own = store.of(tenant)
        ids = [id for owner, id in made if owner == tenant][::-1]
        assert [job.id for job in own.jobs()] == ids
        assert [job.id for job in own.jobs(after=ids[0], limit=1)] == ids[1:2]
        assert [job.id for job in own.unfinished()] == ids[::-1]
        assert {job.tenant for job in own.jobs()} == {tenant}
        assert len(own.files()) == len(ids)
    assert [job.id for job in store.jobs()] == [id for _, id in made][::-1]
    assert store.of("c").jobs() == store.of("c").files() == store.of("c").unfinished() == []
    assert len(store.files()) == 5


def test_a_key_is_a_tenants_own(store):
    file = {tenant: add_file(store.of(tenant), key="key") for tenant in "ab"}
    job = {tenant: make_job(store.of(tenant), "key", training_file=file[tenant].id) for tenant in "ab"}
    assert file["a"].id != file["b"].id
    assert job["a"].id != job["b"].id
    for tenant in "ab":
        assert add_file(store.of(tenant), key="key") == file[tenant]
        assert store.of(tenant).job_by_key(job[tenant].spec, "key") == job[tenant]
    assert store.of("c").job_by_key(job["a"].spec, "key") is None


def test_a_tenant_has_no_more_unfinished_jobs_than_it_may(store):
    a, b = store.of("a"), store.of("b")
    spec = JobSpec(model="m", training_file=add_file(a).id)
    jobs = [a.create_job(spec, f"key {n}", most=3) for n in range(3)]
    error = refused_by(a.create_job, spec, most=3)
    assert (error.reason, error.status) == (Reason.QUOTA_EXCEEDED, "RESOURCE_EXHAUSTED")
    assert error.details == {"tenant": "a", "limit": "3"}
    assert len(a.jobs()) == 3
    assert a.create_job(spec, "key 0", most=3) == jobs[0]
    assert b.create_job(JobSpec(model="m", training_file=add_file(b).id), most=3)
    a.transition(jobs[0].id, JobStatus.PAUSED)
    assert refused_by(a.create_job, spec, most=3).reason == Reason.QUOTA_EXCEEDED
    a.transition(jobs[0].id, JobStatus.CANCELLED)
    assert a.create_job(spec, most=3)


def test_of_many_threads_no_more_jobs_are_made_than_may_be(store):
    a, made = store.of("a"), []
    spec = JobSpec(model="m", training_file=add_file(a).id)

    def make():
        try:
            made.append(a.create_job(spec, most=3).id)
        except ColaError as error:
            made.append(error.reason)

    run_at_once(make, threads=8)
    assert made.count(Reason.QUOTA_EXCEEDED) == 5
    assert len(a.jobs()) == 3


# --- telling --------------------------------------------------------------------------------------------------------


def test_subscribers_hear_of_each_change_after_it_is_committed(store, url):
    job = make_job(store)
    heard = []
    beside = JobStore(url, create=True)  # sees what is committed only
    unsubscribe = store.subscribe(lambda job: heard.append((job, beside.job(job).status, len(beside.events(job)))))
    store.transition(job.id, JobStatus.QUEUED)
    store.add_event(job.id, "x")
    assert heard == [(job.id, "queued", 0), (job.id, "queued", 1)]
    unsubscribe()
    store.add_event(job.id, "y")
    assert len(heard) == 2
    beside.close()


def test_nobody_hears_of_what_was_refused(store):
    job = make_job(store)
    heard = []
    store.subscribe(heard.append)
    with pytest.raises(ColaError):
        store.transition(job.id, JobStatus.SUCCEEDED)
    assert heard == []


# --- the database itself --------------------------------------------------------------------------------------------


def test_migrations_make_the_tables_of_the_models(url):
    database = Database(url, create=True)
    with database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []
    database.close()


def test_a_power_cut_takes_nothing_back_and_references_hold(url):
    database = Database(url, create=True)
    with database.reading() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1
    database.close()


def test_readers_do_not_wait_for_a_writer(store):
    job = make_job(store)
    with store._database.writing() as connection:
        connection.exec_driver_sql("UPDATE jobs SET step = 9")
        assert store.job(job.id).step == 0
    assert store.job(job.id).step == 9


def damage_middle(path):
    data = bytearray(path.read_bytes())
    data[4096:8192] = b"\xa5" * 4096
    path.write_bytes(data)


def another_database(path):
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE other (x)")
    connection.close()


def newer_schema(path):
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a database at all" * 100),
        lambda path: path.write_bytes(path.read_bytes()[: 4096 * 3]),
        lambda path: path.write_bytes(path.read_bytes()[:50]),
        damage_middle,
        another_database,
        newer_schema,
    ],
    ids=["empty", "text", "cut short", "torn header", "overwritten", "another program's", "newer schema"],
)
def test_a_damaged_database_is_refused_by_name_and_left_alone(url, tmp_path, damage):
    store = JobStore(url, create=True)
    job = make_job(store)
    for _ in range(50):
        store.add_event(job.id, "x" * 100)
    store.close()
    path = tmp_path / "cola.db"
    damage(path)
    found = path.read_bytes()
    with pytest.raises(ColaError) as error:
        JobStore(url, create=True)
    assert reason(error) == Reason.INVALID_FILE
    assert str(path) in error.value.message
    assert path.read_bytes() == found


def test_a_first_start_that_was_cut_off_leaves_no_half_database(url, tmp_path):
    (tmp_path / "cola.db.new").write_bytes(b"half")
    (tmp_path / "cola.db.new-wal").write_bytes(b"half")
    store = JobStore(url, create=True)
    make_job(store)
    store.close()
    assert {path.name for path in tmp_path.iterdir()} == {"cola.db", "cola.reserve"}


def test_a_missing_database_is_not_recreated_where_there_was_one(url, tmp_path):
    for _ in range(2):
        with pytest.raises(ColaError) as error:
            JobStore(url, create=False)
        assert reason(error) == Reason.INVALID_FILE
        assert str(tmp_path / "cola.db") in error.value.message
        assert list(tmp_path.iterdir()) == []


def downgrade(store, revision):
    """Takes the schema back, as it was before later versions of this program, and closes the store."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with store._database.writing() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)
    store.close()


def test_jobs_of_the_first_schema_are_kept_and_have_no_base_digest(url):
    store = JobStore(url, create=True)
    old = make_job(store)
    downgrade(store, "0001")
    store = JobStore(url, create=False)
    assert store.job(old.id) == old
    assert store.base_digest(old.id) is None
    assert store.base_digest(store.create_job(old.spec, base_digest="d").id) == "d"
    store.close()


def test_what_is_older_than_tenants_is_the_default_tenants_and_its_keys_find_it(url, tmp_path):
    store = JobStore(url, create=True)
    file = add_file(store, key="key")
    job = make_job(store, "key", training_file=file.id)
    store.add_event(job.id, "An event.")
    kept = store.add_checkpoint(checkpoint(job.id, 1))
    make_job(store.of("other"), "key")
    downgrade(store, "0002")
    with sqlite3.connect(tmp_path / "cola.db") as connection:
        assert connection.execute("SELECT idempotency_key FROM jobs ORDER BY number").fetchall() == [("key",), (None,)]
    connection.close()
    store = JobStore(url, create=False)
    mine = store.of("default")
    assert mine.create_job(job.spec, "key").id == job.id
    assert add_file(mine, key="key").id == file.id
    assert [event.message for event in mine.events(job.id)] == ["An event."]
    assert mine.checkpoint(kept.id) == kept
    assert store.of("other").jobs() == []
    store.close()


def test_what_is_older_than_wire_plans_has_none_and_its_steps_have_zeros(url):
    store = JobStore(url, create=True)
    job = make_job(store).id
    store.begin_epoch(job, wire_plan=wire())
    record_step(store, job, metrics(3))
    downgrade(store, "0004")
    store = JobStore(url, create=False)
    assert store.job(job).wire_plan is None
    new = dict.fromkeys(("rows", "sent_rows", "raw_bytes", "raw_delta_bytes", "reduce_seconds", "decode_seconds"), 0)
    assert store.metrics(job) == [metrics(3, **new)]
    store.close()


def page_count(store):
    with store._database.reading() as connection:
        return connection.exec_driver_sql("PRAGMA page_count").scalar_one()


def limit_pages(store, pages):
    """Bounds the database as a full disk would: SQLite fails alike."""

    def limit(connection, _record, _proxy):
        connection.execute(f"PRAGMA max_page_count = {pages}")

    event.listen(store._database.engine, "checkout", limit)


def test_a_full_disk_is_told_changes_nothing_and_passes(store):
    job = walk_to(store, JobStatus.RUNNING).id
    pages = page_count(store)
    limit_pages(store, pages + 1)

    def fill():
        for step in range(1, 1000):
            record_step(store, job, metrics(step), message="x" * 1000)

    with pytest.raises(ColaError) as error:
        fill()
    assert reason(error) == Reason.STORAGE_FULL
    assert error.value.details == {"file": "cola.db"}
    steps = store.job(job).step
    assert steps == len(store.metrics(job)) == len(store.events(job))
    limit_pages(store, pages + 1000)
    record_step(store, job, metrics(steps + 1))
    assert store.job(job).step == steps + 1


def test_a_full_disk_has_room_for_a_status(store, tmp_path):
    job = walk_to(store, JobStatus.RUNNING).id
    reserve = tmp_path / "cola.reserve"
    assert reserve.stat().st_blocks * 512 >= RESERVE_BYTES
    pages = page_count(store)

    def limit(connection, _record, _proxy):  # the room is what the reserve leaves
        connection.execute(f"PRAGMA max_page_count = {pages if reserve.exists() else pages + 100}")

    event.listen(store._database.engine, "checkout", limit)

    def fill():
        for _ in range(99):
            store.add_event(job, "x" * 1000)

    with pytest.raises(ColaError) as error:
        fill()
    assert reason(error) == Reason.STORAGE_FULL
    assert store.transition(job, JobStatus.PAUSED, event="y" * 5000).status == JobStatus.PAUSED
    assert not reserve.exists()
    assert len(store.events(job)[-1].message) == 5000
    store.begin_epoch(job)
    assert reserve.exists()


@pytest.mark.parametrize("wrong", ["no url", "sqlite://", "sqlite:///:memory:"])
def test_a_url_that_keeps_nothing_is_refused(wrong):
    with pytest.raises(ColaError) as error:
        JobStore(wrong, create=True)
    assert reason(error) == Reason.INVALID_CONFIG


def run_at_once(function, threads):
    """Runs a function in several threads that start together; raises what any raised."""
    gate, errors = threading.Barrier(threads), []

    def run():
        gate.wait()
        try:
            function()
        except Exception as error:  # noqa: BLE001 — raised below
            errors.append(error)

    running = [threading.Thread(target=run) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]
