"""Settings from file and command line: what wins, and what is refused by its name."""

from dataclasses import fields
from pathlib import Path

import pytest

from cluster.config import ClusterConfig, EngineSettings, RouterSettings, load_config, redact
from engine.config import EngineConfig
from protos import errors
from router.config import RouterConfig

ROOT = Path(__file__).parent.parent
ONE = "{secret: hunter2hunter2hunter2, api_key: hunter2hunter2hunter2}"


def refusal(path: Path | None = None, **overrides: object) -> str:
    with pytest.raises(errors.FixTheSetup) as caught:
        load_config(path, overrides)
    return caught.value.message


def test_without_a_file_everything_has_a_default():
    config = load_config(None, {})
    assert (config.prefill, config.decode, config.port, config.operator_port) == (1, 1, 50051, 50052)
    assert config.engine.to_engine() == EngineConfig()


def test_the_engine_settings_are_those_of_the_engine():
    assert {field.name for field in fields(EngineConfig)} == set(EngineSettings.model_fields)


def test_the_router_settings_are_some_of_the_router():
    assert set(RouterSettings.model_fields) <= {field.name for field in fields(RouterConfig)}


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("prefill: 2\ndecode: 3\nengine: {page_size: 16, threads: 2}\n")
    config = load_config(path, {"decode": 5, "model": None, "engine.page_size": 32})
    assert (config.prefill, config.decode, config.engine.page_size, config.engine.threads) == (2, 5, 32, 2)


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({}, (1, 1, 0)),
        ({"mode": "split", "colocated": 2}, (1, 1, 2)),
        ({"mode": "colocated"}, (0, 0, 1)),
        ({"mode": "colocated", "colocated": 3}, (0, 0, 3)),
        ({"mode": "colocated", "prefill": 1, "decode": 2}, (1, 2, 1)),
    ],
)
def test_the_mode_gives_the_sizes_that_are_not_given(given, sizes):
    config = load_config(None, given)
    assert (config.prefill, config.decode, config.colocated) == sizes
    assert ClusterConfig.model_validate_json(config.model_dump_json()) == config


def test_the_example_is_valid():
    assert load_config(ROOT / "examples" / "cluster.yaml", {}).decode == 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("decod: 2", "decod: unknown setting"),
        ("engine: {pages: 2}", "engine.pages: unknown setting"),
        ("engine: 3", "engine: "),
        ("decode: -1", "decode: "),
        ("mode: both", "mode: "),
        ("mode: [split]", "mode: "),
        ("decode: many", "decode: "),
        ("port: 70000", "port: "),
        ("port: 50052", "operator_port: must differ"),
        ("redis: http://h", "redis: must be a redis://"),
        ("redis: redis+sentinel://:hunter2@h", "redis: must be a redis://"),
        ("tenants: {a: {secret: hunter2hunter2hunter2}}", "tenants.a.api_key: "),
        ("tenants: {a: {secret: hunter2, api_key: hunter2hunter2hunter2}}", "tenants.a.secret: "),
        ("tenants: {a: {secret: hunter2hunter2hunter2, api_key: hunter2 hunter2hunter2}}", "tenants.a.api_key: "),
        (f"tenants: {{a: {ONE}, b: {ONE}}}", "tenants: each needs a secret of its own"),
        ("name: UPPER", "name: "),
        ("engine: {dtype: int4}", "engine.dtype: "),
        ("engine: {load: dummy}", "engine.load: "),
        ("transports: []", "transports: "),
        ("- 1", "must hold settings"),
        ("{", "cannot read"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(tmp_path, text, named):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    message = refusal(path)
    assert named in message
    assert str(path) in message
    assert "hunter2" not in message


def test_a_missing_file_is_named(tmp_path):
    assert "nowhere.yaml" in refusal(tmp_path / "nowhere.yaml")


def test_an_option_inside_what_is_no_section_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("engine: 3")
    assert "engine" in refusal(path, **{"engine.threads": 2})


def test_a_ray_cluster_needs_a_metadata_server():
    assert "--redis" in refusal(ray_address="10.0.0.1:6379")


def test_it_survives_the_way_to_an_actor_and_shows_no_secret():
    tenants = {"a": {"secret": "hunter4" * 3, "api_key": "hunter5" * 3, "max_pages": 7}}
    secrets = {"redis": "redis+sentinel://:hunter2@h:1,h:2/main", "tenant_secret": "hunter3", "tenants": tenants}
    config = load_config(None, secrets | {"host": "0.0.0.0"})
    assert ClusterConfig.model_validate_json(config.model_dump_json()) == config
    assert "hunter" not in repr(config)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:pw@h:1/0", "redis://:***@h:1/0"),
        ("rediss://u:p:w@h", "rediss://u:***@h"),
        ("redis://u:p@ss@h", "redis://u:***@h"),
        ("redis://u:p/w@h", "redis://u:***@h"),
        ("unix:///run/v.sock?password=pw&db=1", "unix:///run/v.sock?password=***&db=1"),
        ("unix:///run/v.sock", "unix:///run/v.sock"),
        (
            "redis+sentinel://:pw@a:1,b:2/main?sentinel_password=pw",
            "redis+sentinel://:***@a:1,b:2/main?sentinel_password=***",
        ),
        ("rediss+cluster://u:pw@a:1,b:2", "rediss+cluster://u:***@a:1,b:2"),
    ],
)
def test_a_shown_url_has_no_password(url, shown):
    assert redact(url) == shown
