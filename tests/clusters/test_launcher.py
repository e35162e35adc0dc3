"""aws.yaml and gcp.yaml: Ray's launcher takes them, the head stays, workers come and go, and nothing is open to the world."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
from ray.autoscaler._private.util import prepare_config, validate_config

from kdbench.errors import UserError
from tests.clusters.files import CLUSTERS, IMAGE, documents, values

FILES = ("aws.yaml", "gcp.yaml")


def read(name: str) -> dict[str, Any]:
    [config] = documents(CLUSTERS / name)
    return config


def workers_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for name, node in config["available_node_types"].items() if name != config["head_node_type"]]


def head_of(config: dict[str, Any]) -> dict[str, Any]:
    return config["available_node_types"][config["head_node_type"]]


@pytest.mark.parametrize("name", FILES)
def test_a_launcher_file_passes_rays_schema_and_rays_own_checks(name: str) -> None:
    config = read(name)
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    validate_config(prepare_config(config))


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    twice = tmp_path / "twice.yaml"
    twice.write_text((CLUSTERS / "aws.yaml").read_text() + "max_workers: 3\n")
    with pytest.raises(UserError, match="the key 'max_workers' is listed twice"):
        documents(twice)


@pytest.mark.parametrize("name", FILES)
def test_workers_come_from_zero_and_on_spot_and_the_head_stays(name: str) -> None:
    config = read(name)
    spot = [{"MarketType": "spot"}] if config["provider"]["type"] == "aws" else ["SPOT"]
    market = "InstanceMarketOptions" if config["provider"]["type"] == "aws" else "provisioningModel"
    assert list(values(head_of(config), market)) == []
    assert head_of(config)["resources"]["CPU"] == 0
    for worker in workers_of(config):
        assert worker["min_workers"] == 0
        assert list(values(worker, market)) == spot
    assert config["idle_timeout_minutes"] > 0


@pytest.mark.parametrize("name", FILES)
def test_every_ray_of_a_launcher_file_asks_for_the_token_and_keeps_its_dashboard_on_loopback(name: str) -> None:
    config = read(name)
    head, worker = (config[f"{role}_start_ray_commands"] for role in ("head", "worker"))
    starts = [command for command in [*head, *worker] if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        assert re.search(r"RAY_AUTH_MODE=token ray start", command)
        assert "--dashboard-agent-listen-port=8267" in command
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert config["file_mounts"] == {"/home/kdbench/.ray/auth_token": "~/.ray/auth_token"}
    assert "0.0.0.0" not in (CLUSTERS / name).read_text()


def test_on_aws_no_node_gets_the_security_group_that_ray_would_make() -> None:
    for node in read("aws.yaml")["available_node_types"].values():
        assert node["node_config"]["SecurityGroupIds"] == ["REPLACE_SECURITY_GROUP"]
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


def test_on_google_cloud_no_node_has_a_public_address() -> None:
    config = read("gcp.yaml")
    assert config["provider"]["use_internal_ips"] is True
    for node in config["available_node_types"].values():
        assert len(node["node_config"]["networkInterfaces"]) == 1
        assert list(values(node, "accessConfigs")) == []


@pytest.mark.parametrize("name", FILES)
def test_head_and_workers_run_the_images_of_this_version(name: str) -> None:
    docker = read(name)["docker"]
    assert IMAGE.fullmatch(docker["head_image"])[1] == "cpu"
    assert IMAGE.fullmatch(docker["worker_image"])[1] == "gpu"
