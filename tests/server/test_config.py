"""The token file: whose token is whose, and what each tenant may have."""

import pytest

from cola_common.errors import ColaError, Reason
from cola_server.config import ServerConfig
from cola_server.tenants import Quota

CLIENT, WORKER = "client-token-0123456789", "worker-token-0123456789"
ALICE, BOB = "alice-token-0123456789", "bob-token-0123456789"


@pytest.fixture
def read(tmp_path):
    def read(text, **flags):
        file = tmp_path / "tokens.toml"
        file.write_text(text)
        config = ServerConfig.read(None, {"models": "m=p", "data_dir": tmp_path, "token_file": file, **flags})
        return config, config.tokens()

    return read


def test_the_clients_token_is_that_of_the_tenant_default(read):
    config, tokens = read(f'client = "{CLIENT}"\nworker = "{WORKER}"')
    assert {name: tenant.token for name, tenant in tokens.clients.items()} == {"default": CLIENT}
    assert config.quotas(tokens).of("default") == Quota(max_running=8, max_queued=100, weight=1.0)


def test_tenants_have_tokens_weights_and_bounds_of_their_own_or_the_servers(read):
    config, tokens = read(
        f'worker = "{WORKER}"\n[tenants.alice]\ntoken = "{ALICE}"\nweight = 2.5\nmax_running = 3\nmax_queued = 7\n'
        f'[tenants.bob-2]\ntoken = "{BOB}"\n',
        max_running_jobs=5,
    )
    assert {name: tenant.token for name, tenant in tokens.clients.items()} == {"alice": ALICE, "bob-2": BOB}
    quotas = config.quotas(tokens)
    assert quotas.of("alice") == Quota(max_running=3, max_queued=7, weight=2.5)
    assert quotas.of("bob-2") == quotas.of("gone since") == Quota(max_running=5, max_queued=100, weight=1.0)


def test_without_a_token_file_there_are_no_tokens(tmp_path):
    config = ServerConfig.read(None, {"models": "m=p", "data_dir": tmp_path, "max_running_jobs": 3})
    assert config.tokens() is None
    assert config.quotas(None).of("default") == Quota(max_running=3)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f'worker = "{WORKER}"', "[tenants.NAME]"),
        (f'client = "{CLIENT}"', "worker"),
        (f'client = "short"\nworker = "{WORKER}"', "16 characters"),
        (f'client = "{WORKER}"\nworker = "{WORKER}"', "the worker and default have the same token"),
        (f'worker = "{WORKER}"\n[tenants.worker]\ntoken = "{WORKER}"', "the worker and worker have the same token"),
        (f'worker = "{WORKER}"\n[tenants.a]\ntoken = "{BOB}"\n[tenants.b]\ntoken = "{BOB}"', "a and b have the same"),
        (f'client = "{CLIENT}"\nworker = "{WORKER}"\n[tenants.default]\ntoken = "{BOB}"', "not both"),
        (f'worker = "{WORKER}"\n[tenants.Alice]\ntoken = "{ALICE}"', "Alice"),
        (f'worker = "{WORKER}"\n[tenants."a/b"]\ntoken = "{ALICE}"', "a/b"),
        (f'worker = "{WORKER}"\n[tenants."a\\n"]\ntoken = "{ALICE}"', "pattern"),
        (f'worker = "{WORKER}"\n[tenants.{"a" * 33}]\ntoken = "{ALICE}"', "a" * 33),
        (f'worker = "{WORKER}"\n[tenants.a]\ntoken = "{ALICE}"\nweight = 0', "weight"),
        (f'worker = "{WORKER}"\n[tenants.a]\ntoken = "{ALICE}"\nweight = nan', "weight"),
        (f'worker = "{WORKER}"\n[tenants.a]\ntoken = "{ALICE}"\nmax_running = 0', "max_running"),
        (f'worker = "{WORKER}"\n[tenants.a]\ntoken = "{ALICE}"\nmax_jobs = 1', "max_jobs"),
        ("not TOML", "tokens.toml"),
    ],
)
def test_a_token_file_that_cannot_be_is_refused_and_its_tokens_are_not_told(read, text, told):
    with pytest.raises(ColaError) as error:
        read(text)
    assert error.value.reason is Reason.INVALID_CONFIG
    assert error.value.details["setting"] == "token_file"
    assert told in error.value.message
    for token in (CLIENT, WORKER, ALICE, BOB):
        assert token not in error.value.message
