"""deploy/ray-cluster.yaml is valid by Ray's own schema, and gives every host the role that it says."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.ray_process import HEAD

PATH = Path(__file__).parent.parent / "deploy" / "ray-cluster.yaml"


@pytest.fixture
def config() -> dict:
    return yaml.safe_load(PATH.read_text())


def test_ray_accepts_it(config):
    prepared = prepare_config(config)
    validate_config(prepared)
    workers = len(config["provider"]["worker_ips"])
    node_type = prepared["available_node_types"][prepared["head_node_type"]]
    assert (node_type["min_workers"], node_type["max_workers"]) == (workers, workers)


def test_ray_would_refuse_a_mistake(config):
    config["provider"]["worker_ips"] = "10.0.0.11"
    with pytest.raises(Exception, match=r"10\.0\.0\.11"):
        validate_config(prepare_config(config))


def resources(commands: list[str], address: str, tmp_path: Path) -> dict[str, float]:
    """What `ray start` is told on the host with this address, by running the commands with stand-ins."""
    said = tmp_path / "said"
    said.unlink(missing_ok=True)
    tools = {
        tmp_path / "diptych-env" / "bin" / "ray": f'printf "%s\\n" "$@" >> {said}',
        tmp_path / "bin" / "hostname": f"echo {address} fe80::1",
    }
    for path, script in tools.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "RAY_HEAD_IP": "10.0.0.10"}
    for command in commands:
        subprocess.run(["bash", "-c", command], env=environment, check=True, timeout=30)
    arguments = said.read_text().splitlines()
    assert arguments[:2] == ["stop", "start"]
    given = [argument.removeprefix("--resources=") for argument in arguments if argument.startswith("--resources=")]
    return json.loads(given[0]) if given else {}


@pytest.mark.parametrize(
    ("address", "role"), [("10.0.0.11", "prefill"), ("10.0.0.12", "decode"), ("10.0.0.111", "decode")]
)
def test_every_worker_host_has_one_role_and_room_for_a_store(config, tmp_path, address, role):
    assert resources(config["worker_start_ray_commands"], address, tmp_path) == {role: 1, "store": 1}


def test_the_head_has_no_role_of_the_pools(config, tmp_path):
    assert resources(config["head_start_ray_commands"], "10.0.0.10", tmp_path) == {}
    assert HEAD == "node:__internal_head__"  # Ray gives it to the head by itself: router and controller go there
