"""The rules: what is refused at create and makes nothing, and what cancel, pause, resume and a restart mean."""

import io
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from structlog.testing import capture_logs

from cola_common.errors import ColaError, Reason
from cola_common.jobs import Checkpoint, Estimate, JobSpec, JobStatus, ModelCard
from cola_server.jobs import Artefacts, JobService, JobStore
from cola_server.tenants import Quota, Quotas
from tests.support.databases import new_store, url_of
from tests.support.wires import wire

TEXTS = [{"text": "a"}, {"text": "b"}]
LABELLED = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
TIMES = {"busy_seconds": 1.0, "waiting_seconds": 2.0, "jobless_seconds": 3.0}
CARDS = {
    name: ModelCard(id=name, task=task, dtype="float32", device="cpu", parameters=1, **TIMES)
    for name, task in {
        "smollm2": "causal-lm",
        "smollm2-chat": "causal-lm",
        "minilm": "sequence-classification",
    }.items()
}


class FakeCatalogue:
    def __init__(self):
        self.checked = []
        self.estimated = []
        self.error = None
        self.digests = dict.fromkeys(CARDS, "0" * 32)

    def cards(self):
        return list(CARDS.values())

    def digest(self, model):
        if model not in self.digests:
            raise ColaError(Reason.UNKNOWN_MODEL, model=model, known=", ".join(self.digests))
        return self.digests[model]

    def check(self, spec):
        self.checked.append(spec)
        if self.error is not None:
            raise self.error

    def estimate(self, spec, examples, labels):
        self.estimated.append((spec, examples, labels))
        counts = {name: 1 for name, field in Estimate.model_fields.items() if field.annotation is int}
        return Estimate(**{**counts, "examples": examples}, seconds=None, wire_plan=wire())


class FakeScheduler:
    """Notes what it is told, and the status that was committed by then."""

    def __init__(self, store):
        self._store = store
        self.told = []

        self.places = {}

    def place(self, job):
        return self.places.get(job)

    def submit(self, job):
        self._note("submit", job)

    def cancel(self, job):
        self._note("cancel", job)

    def pause(self, job):
        self._note("pause", job)

    def resume(self, job):
        self._note("resume", job)

    def _note(self, call, job):
        self.told.append((call, job.id, str(self._store.job(job.id).status)))


class Server:
    """A service with all that it needs, as it is after a start."""

    def __init__(self, folder, quotas=None):
        self.artefacts = Artefacts(folder / "data")
        try:
            self.store = JobStore(url_of(folder), create=not self.artefacts.ids())
        except ColaError:
            self.artefacts.close()
            raise
        self.catalogue = FakeCatalogue()
        self.scheduler = FakeScheduler(self.store)
        self.service = JobService(self.store, self.artefacts, self.catalogue, self.scheduler, quotas=quotas)

    def stop(self):
        self.store.close()
        self.artefacts.close()

    def upload(self, lines, filename="data.jsonl", purpose="fine-tune"):
        content = lines if isinstance(lines, bytes) else "\n".join(map(json.dumps, lines)).encode()
        with self.service.upload(filename, purpose) as upload:
            upload.write(content)
            return upload.finish().id

    def spec(self, lines=TEXTS, model="smollm2", **fields):
        fields.setdefault("training_file", self.upload(lines) if lines else None)
        return JobSpec.parse({"model": model, **fields})

    def running(self):
        job = self.service.create(self.spec()).id
        self.store.transition(job, JobStatus.QUEUED)
        self.store.transition(job, JobStatus.RUNNING)
        self.scheduler.told.clear()
        return job


@pytest.fixture
def server(tmp_path):
    new_store(tmp_path).close()
    server = Server(tmp_path)
    yield server
    server.stop()


def refused(server, **fields):
    with pytest.raises(ColaError) as error:
        server.service.create(server.spec(**fields))
    assert server.store.jobs() == []
    assert server.scheduler.told == []
    return error.value


# --- create ---------------------------------------------------------------------------------------------------------


def test_a_job_is_checked_stored_and_handed_over(server):
    spec = server.spec()
    job = server.service.create(spec, "key")
    assert server.catalogue.checked == [spec]
    assert server.scheduler.told == [("submit", job.id, "validating_files")]
    assert server.service.retrieve(job.id) == job
    assert server.service.jobs() == [job]


@pytest.mark.parametrize(
    ("model", "lines", "joint", "known"),
    [("smollm2", TEXTS, [TEXTS, TEXTS], (6, [])), ("minilm", LABELLED, [], (2, ["x", "y"]))],
)
def test_an_estimate_is_of_all_the_files_and_makes_nothing(server, model, lines, joint, known):
    spec = server.spec(lines, model, joint_files=[server.upload(more) for more in joint])
    assert server.service.estimate(spec).examples == known[0]
    assert server.catalogue.estimated == [(spec, *known)]
    assert server.store.jobs() == []
    assert server.scheduler.told == []


def test_an_estimate_is_refused_where_a_job_is(server):
    for fields in ({"model": "xyz"}, {"lines": [{"text": "a"}, {"nothing": 1}]}, {"training_file": "file-" + "0" * 24}):
        with pytest.raises(ColaError) as of_estimate:
            server.service.estimate(server.spec(**fields))
        assert of_estimate.value.reason == refused(server, **fields).reason
    assert server.catalogue.estimated == []


def test_the_same_key_finds_the_same_job_even_if_it_could_not_be_made_again(server):
    spec = server.spec()
    job = server.service.create(spec, "key")
    server.store.transition(job.id, JobStatus.CANCELLED)
    server.service.delete_file(spec.training_file)
    server.scheduler.told.clear()
    assert server.service.create(spec, "key").id == job.id
    assert server.scheduler.told == []


def test_what_the_catalogue_refuses_makes_no_job(server):
    server.catalogue.error = ColaError(Reason.UNKNOWN_TARGET, target="q_prj", nearest="q_proj")
    assert refused(server).reason == Reason.UNKNOWN_TARGET


@pytest.mark.parametrize(
    ("model", "known"), [("smolm2", "smollm2, smollm2-chat"), ("xyz", "minilm, smollm2, smollm2-chat")]
)
def test_an_unknown_model_is_refused_with_the_nearest_names(server, model, known):
    error = refused(server, model=model)
    assert error.reason == Reason.UNKNOWN_MODEL
    assert known in error.message
    assert server.catalogue.checked == []


def test_files_must_be_here_and_of_the_right_purpose(server, adapter_zip):
    adapter = server.upload(adapter_zip, "a.zip", "adapter")
    data = server.upload(TEXTS)
    missing = "file-" + "0" * 24
    for fields, reason in [
        ({"training_file": missing}, Reason.UNKNOWN_FILE),
        ({"training_file": "../../etc/passwd"}, Reason.UNKNOWN_FILE),
        ({"validation_file": missing}, Reason.UNKNOWN_FILE),
        ({"training_file": adapter}, Reason.INVALID_JOB),
        ({"validation_file": adapter}, Reason.INVALID_JOB),
        ({"adapter": {"type": "lora", "init_from": data}}, Reason.INVALID_JOB),
        ({"adapter": {"type": "lora", "init_from": missing}}, Reason.UNKNOWN_FILE),
        ({"adapter": {"type": "lora", "init_from": "ftckpt-" + "0" * 24}}, Reason.UNKNOWN_CHECKPOINT),
        ({"adapter": {"type": "lora", "init_from": "../adapter"}}, Reason.UNKNOWN_FILE),
    ]:
        assert refused(server, **fields).reason == reason
    assert server.service.create(server.spec(adapter={"type": "lora", "init_from": adapter}))


@pytest.mark.parametrize(
    ("model", "lines"), [("smollm2", LABELLED), ("minilm", TEXTS), ("minilm", [{"prompt": "a", "completion": "b"}])]
)
@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_data_must_fit_the_models_task(server, model, lines, param):
    good = LABELLED if model == "minilm" else TEXTS
    fields = {"training_file": server.upload(good)} | {param: server.upload(lines, f"{param}.jsonl")}
    error = refused(server, model=model, **fields)
    assert error.reason == Reason.INVALID_DATASET
    assert (error.details["file"], error.details["line"]) == (f"{param}.jsonl", "1")


def test_labels_must_differ_and_be_the_training_files(server):
    assert refused(server, model="minilm", lines=LABELLED[:1]).reason == Reason.INVALID_DATASET
    other = server.upload([*LABELLED, {"text": "c", "label": "z"}], "valid.jsonl")
    error = refused(server, model="minilm", lines=LABELLED, validation_file=other)
    assert (error.details["file"], error.details["line"]) == ("valid.jsonl", "3")
    fewer = server.upload(LABELLED[1:])
    assert server.service.create(server.spec(LABELLED, model="minilm", validation_file=fewer))


LORA, HYPER = "adapter", "hyperparameters"


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({LORA: {"type": "lora", "r": 0}}, "r", "greater than or equal to 1"),
        ({LORA: {"type": "lora", "r": -8}}, "r", "-8"),
        ({LORA: {"type": "lora", "r": 2.5}}, "r", "2.5"),
        ({LORA: {"type": "lora", "lora_alpha": float("nan")}}, "lora_alpha", "nan"),
        ({LORA: {"type": "lora", "rank": 8}}, "rank", "r"),
        ({LORA: {"type": "lora", "target_modules": []}}, "target_modules", "at least one"),
        ({LORA: {"type": "lora", "target_modules": "q_proj("}}, "target_modules", "regular expression"),
        ({LORA: {"type": "qlora"}}, "adapter", "lora"),
        ({LORA: {"type": "mlp", "hidden_sizes": [0]}}, "hidden_sizes", "0"),
        ({HYPER: {"optimizer": "adam"}}, "optimizer", "'adamw' or 'sgd'"),
        ({HYPER: {"optimzer": "adamw"}}, "optimzer", "optimizer"),
        ({HYPER: {"learning_rate": -1e-3}}, "learning_rate", "-0.001"),
        ({HYPER: {"learning_rate": float("inf")}}, "learning_rate", "inf"),
        ({HYPER: {"learning_rate": float("nan")}}, "learning_rate", "nan"),
        ({HYPER: {"batch_size": 0}}, "batch_size", "0"),
        ({HYPER: {"max_steps": 0}}, "max_steps", "0"),
        ({HYPER: {"n_epochs": "many"}}, "n_epochs", "many"),
        ({HYPER: {"weight_decay": -1}}, "weight_decay", "-1"),
        ({HYPER: {"warmup_ratio": 2}}, "warmup_ratio", "2"),
        ({HYPER: {"max_grad_norm": -1}}, "max_grad_norm", "-1"),
        ({HYPER: {"momentum": 0.9}}, "hyperparameters", "sgd"),
        ({HYPER: {"lr_scheduler_type": "step"}}, "lr_scheduler_type", "linear"),
        ({"seed": -1}, "seed", "-1"),
        ({"suffix": "../x"}, "suffix", "../x"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata", "16"),
        ({"fold": "both"}, "fold", "merged"),
        ({"wire": {"values": "int7"}}, "values", "bf16"),
        ({"trainin_file": "x"}, "trainin_file", "training_file"),
    ],
)
def test_a_spec_that_cannot_be_is_refused_by_field(server, fields, param, told):
    error = refused(server, **fields)
    assert error.reason == Reason.INVALID_JOB
    assert error.status == "INVALID_ARGUMENT"
    assert param in error.details["param"]
    assert told in error.message


def test_merging_what_is_not_linear_is_refused(server):
    assert refused(server, adapter={"type": "mlp"}, fold="merged").reason == Reason.NOT_MERGEABLE


def test_a_tenant_with_as_many_jobs_as_it_may_have_is_told_so_and_others_are_not(server, tmp_path):
    server.stop()
    server = Server(tmp_path, Quotas(Quota(max_queued=2), {"large": Quota(max_queued=3)}))

    def create(tenant):
        service = server.service.of(tenant)
        with service.upload("data.jsonl", "fine-tune") as upload:
            upload.write(b'{"text": "a"}')
            file = upload.finish().id
        return service.create(JobSpec(model="smollm2", training_file=file))

    for tenant, most in (("small", 2), ("large", 3)):
        for _ in range(most):
            assert create(tenant).tenant == tenant
        with pytest.raises(ColaError) as error:
            create(tenant)
        assert error.value.reason == Reason.QUOTA_EXCEEDED
    assert len(server.scheduler.told) == 5
    server.stop()


def test_a_waiting_job_is_told_with_its_place_and_no_other_is(server):
    waiting, running = server.service.create(server.spec()).id, server.running()
    server.scheduler.places = {waiting: 3, running: 1}
    assert server.service.retrieve(waiting).queue_place is None  # its files are not read yet
    server.store.transition(waiting, JobStatus.QUEUED)
    assert [(job.id, job.queue_place) for job in server.service.jobs()] == [(running, None), (waiting, 3)]
    assert server.service.retrieve(waiting).queue_place == 3
    assert server.store.job(waiting).queue_place is None
    server.scheduler.places = {}
    assert server.service.retrieve(waiting).queue_place is None


# --- cancel, pause, resume ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "status", "event"), [("cancel", "cancelled", "Cancelled."), ("pause", "paused", "Paused.")]
)
def test_a_status_is_committed_then_told_and_repeats_are_no_error(server, call, status, event):
    job = server.running()
    for _ in range(3):
        assert getattr(server.service, call)(job).status == status
    assert server.scheduler.told == [(call, job, status)]
    assert [event.message for event in server.service.events(job)] == [event]


@pytest.mark.parametrize("call", ["cancel", "pause"])
def test_of_calls_at_once_one_is_told(server, call):
    job = server.running()
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(getattr(server.service, call), [job] * 8))
    assert len({answer.status for answer in answers}) == 1
    assert len(server.scheduler.told) == 1


def test_a_paused_job_resumes_into_the_queue(server):
    job = server.running()
    server.service.pause(job)
    assert server.service.resume(job).status == "queued"
    assert server.service.resume(job).status == "queued"
    server.store.transition(job, JobStatus.RUNNING)
    assert server.service.resume(job).status == "running"
    assert [call for call, *_ in server.scheduler.told] == ["pause", "resume"]


@pytest.mark.parametrize("call", ["cancel", "pause", "resume"])
@pytest.mark.parametrize("end", [JobStatus.SUCCEEDED, JobStatus.FAILED])
def test_what_has_ended_stays_so(server, call, end):
    job = server.running()
    server.store.transition(job, end)
    with pytest.raises(ColaError) as error:
        getattr(server.service, call)(job)
    assert error.value.reason == Reason.ILLEGAL_TRANSITION
    assert server.scheduler.told == []


@pytest.mark.parametrize("call", ["retrieve", "cancel", "pause", "resume", "events", "metrics", "checkpoints"])
def test_an_unknown_job_is_told(server, call):
    with pytest.raises(ColaError) as error:
        getattr(server.service, call)("ftjob-" + "0" * 24)
    assert error.value.reason == Reason.UNKNOWN_JOB


def test_subscribers_hear_of_what_users_do(server):
    job, heard = server.running(), []
    unsubscribe = server.service.subscribe(heard.append)
    server.service.pause(job)
    unsubscribe()
    server.service.cancel(job)
    assert heard == [job]


# --- a restart ------------------------------------------------------------------------------------------------------


def test_a_restart_hands_over_what_is_unfinished_oldest_first(server, tmp_path):
    new, queued, running, paused, failed = [server.service.create(server.spec()).id for _ in range(5)]
    for job in (queued, running, paused):
        server.store.transition(job, JobStatus.QUEUED)
    server.store.transition(running, JobStatus.RUNNING)
    server.store.transition(paused, JobStatus.PAUSED)
    server.store.transition(failed, JobStatus.FAILED)
    server.stop()
    again = Server(tmp_path)
    again.service.recover()
    assert again.scheduler.told == [
        ("submit", new, "validating_files"),
        ("submit", queued, "queued"),
        ("submit", running, "queued"),
    ]
    assert "snapshot" in again.service.events(running)[0].message
    again.stop()


def test_a_restart_keeps_what_has_a_record_and_removes_the_rest(server, tmp_path, write_adapter):
    job = server.running()
    file = server.store.job(job).spec.training_file
    kept, orphan = "ftckpt-" + "a" * 24, "ftckpt-" + "b" * 24
    digest = server.artefacts.write_checkpoint(kept, write_adapter)
    ended = server.running()
    for each in (job, ended):
        server.artefacts.write_snapshot(each, "1.safetensors", b"x")
    server.store.transition(ended, JobStatus.FAILED)
    other = server.store.job(ended).spec.training_file
    server.store.add_checkpoint(Checkpoint(id=kept, job=job, step_number=1, created_at=1.0, digest=digest))
    server.artefacts.write_checkpoint(orphan, write_adapter)
    server.stop()
    again = Server(tmp_path)
    assert again.artefacts.ids() == {file, other, kept, job}
    assert [name for name, _ in again.service.checkpoint_files(kept)] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with pytest.raises(ColaError) as error:
        again.service.checkpoint_files(orphan)
    assert error.value.reason == Reason.UNKNOWN_CHECKPOINT
    again.stop()


LIVE = {
    "validating_files": [],
    "queued": [JobStatus.QUEUED],
    "running": [JobStatus.QUEUED, JobStatus.RUNNING],
    "paused": [JobStatus.QUEUED, JobStatus.PAUSED],
}


@pytest.mark.parametrize(
    ("digests", "reason", "words"),
    [
        ({"smollm2": "f" * 32, "minilm": "0" * 32}, Reason.BASE_MODEL_CHANGED, ["smollm2", "0" * 32, "f" * 32]),
        ({"minilm": "0" * 32}, Reason.UNKNOWN_MODEL, ["smollm2", "minilm"]),
    ],
    ids=["another one", "gone"],
)
@pytest.mark.parametrize("status", LIVE)
def test_a_job_whose_base_model_is_not_what_it_began_on_is_held_and_others_go_on(
    server, tmp_path, digests, reason, words, status
):
    job = server.service.create(server.spec()).id
    other = server.service.create(server.spec(LABELLED, model="minilm")).id
    for step in LIVE[status]:
        server.store.transition(job, step)
    server.stop()
    again = Server(tmp_path)
    again.catalogue.digests = digests
    again.service.recover()
    assert again.scheduler.told == [("submit", other, "validating_files")]
    assert again.service.retrieve(job).status == "paused"
    if status != "paused":
        (event,) = again.service.events(job)
        assert event.level == "error"
        assert all(word in event.message for word in words)
    for _ in range(2):
        with pytest.raises(ColaError) as error:
            again.service.resume(job)
        assert error.value.reason == reason
        assert all(word in error.value.message for word in words)
    again.catalogue.digests = {"smollm2": "0" * 32}
    assert again.service.resume(job).status == "queued"
    assert again.scheduler.told[1:] == [("resume", job, "queued")]
    again.stop()


def test_artefacts_that_are_not_here_are_told_by_name_to_the_log_and_to_jobs_that_need_them(
    server, tmp_path, write_adapter
):
    job, ended, other = server.running(), server.running(), server.running()
    server.store.transition(ended, JobStatus.FAILED)
    files = {id: server.store.file(server.store.job(id).spec.training_file) for id in (job, ended, other)}
    lost = Checkpoint(id="ftckpt-" + "a" * 24, job=ended, step_number=1, created_at=1.0, digest="")
    server.store.add_checkpoint(lost)
    server.service.file_path(files[job].id).write_bytes(b"")
    server.service.file_path(files[ended].id).unlink()
    server.stop()
    again = Server(tmp_path)
    with capture_logs() as logs:
        again.service.recover()
    told = {line["artefact"] for line in logs if line["log_level"] == "error"}
    assert told == {files[job].id, files[ended].id, lost.id}
    errors = {id: [e.message for e in again.service.events(id) if e.level == "error"] for id in files}
    assert errors[ended] == errors[other] == []
    (message,) = errors[job]
    assert files[job].id in message
    assert files[job].filename in message
    assert {id for _, id, _ in again.scheduler.told} == {job, other}
    again.stop()


def test_torn_weights_are_not_given_out(server, write_adapter):
    job, id = server.running(), "ftckpt-" + "a" * 24
    digest = server.artefacts.write_checkpoint(id, write_adapter)
    server.store.add_checkpoint(Checkpoint(id=id, job=job, step_number=1, created_at=1.0, digest=digest))
    (_, (_, weights)) = server.service.checkpoint_files(id)
    weights.write_bytes(b"v")
    with pytest.raises(ColaError) as error:
        server.service.checkpoint_files(id)
    assert (error.value.reason, error.value.details["file"]) == (Reason.INVALID_FILE, id)
    with pytest.raises(ColaError) as error, server.service.merged_files(id):
        pass
    assert error.value.reason == Reason.INVALID_FILE


def test_an_adapter_is_not_merged_into_another_model_than_it_was_made_on(server, write_adapter):
    job, id = server.running(), "ftckpt-" + "a" * 24
    digest = server.artefacts.write_checkpoint(id, write_adapter)
    server.store.add_checkpoint(Checkpoint(id=id, job=job, step_number=1, created_at=1.0, digest=digest))
    server.catalogue.digests["smollm2"] = "f" * 32
    with pytest.raises(ColaError) as error, server.service.merged_files(id):
        pass
    assert error.value.reason == Reason.BASE_MODEL_CHANGED
    assert len(server.service.checkpoint_files(id)) == 2


def test_a_lost_database_is_refused_and_nothing_is_removed(server, tmp_path):
    file = server.upload(TEXTS)
    server.stop()
    (tmp_path / "cola.db").unlink()
    for _ in range(2):
        with pytest.raises(ColaError) as error:
            Server(tmp_path)
        assert error.value.reason == Reason.INVALID_FILE
        assert (tmp_path / "data" / "files" / file).is_file()


# --- files ----------------------------------------------------------------------------------------------------------


def test_files_are_listed_read_and_deleted(server):
    first, second = server.upload(TEXTS), server.upload(LABELLED)
    assert [file.id for file in server.service.files()] == [second, first]
    assert [file.id for file in server.service.files(after=second)] == [first]
    assert server.service.file_path(first).read_bytes() == b'{"text": "a"}\n{"text": "b"}'
    server.service.delete_file(first)
    assert server.artefacts.ids() == {second}
    for call in (server.service.file, server.service.file_path, server.service.delete_file):
        with pytest.raises(ColaError) as error:
            call(first)
        assert error.value.reason == Reason.UNKNOWN_FILE


def test_a_file_in_use_is_kept(server):
    job = server.service.create(server.spec())
    with pytest.raises(ColaError) as error:
        server.service.delete_file(job.spec.training_file)
    assert error.value.reason == Reason.FILE_IN_USE
    assert server.service.file_path(job.spec.training_file).is_file()


@pytest.fixture
def write_adapter():
    def write(folder):
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(b"w")

    return write


@pytest.fixture
def adapter_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("adapter_config.json", "{}")
        archive.writestr("adapter_model.safetensors", "w")
    return buffer.getvalue()
