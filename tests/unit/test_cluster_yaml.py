"""cluster.yaml passes Ray's own validation, and our lint of what Ray passes on unchecked.

Ray checks the top level only: a misspelt key under `provider` or `node_config` is found by AWS, minutes
into `ray up`, or never. The lint checks node_config with the parameters of the EC2 call it ends in.
"""

import copy
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROVIDER_KEYS = {
    "type",
    "region",
    "availability_zone",
    "cache_stopped_nodes",
    "use_internal_ips",
    "security_group",
    "disable_node_updaters",
}
SET_BY_RAY = {"MinCount", "MaxCount", "SubnetId", "SecurityGroupIds", "TagSpecifications"}


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def validator():
    """botocore's check of the parameters of EC2 RunInstances; no network."""
    import botocore.session
    from botocore.validate import ParamValidator

    model = botocore.session.get_session().get_service_model("ec2")
    shape = model.operation_model("RunInstances").input_shape
    return lambda node_config: ParamValidator().validate(
        {"MinCount": 1, "MaxCount": 1, **node_config}, shape
    )


def lint(cluster: dict[str, Any], validate_run_instances) -> list[str]:
    """Every mistake that Ray would pass on."""
    provider, node_types = cluster["provider"], cluster["available_node_types"]
    found = [f"provider.{key}: unknown" for key in provider if key not in PROVIDER_KEYS]
    for zone in provider.get("availability_zone", "").split(","):
        if not re.fullmatch(re.escape(provider.get("region", "")) + "[a-f]", zone):
            found.append(f"provider.availability_zone: {zone} is not in the region")
    for name, node in node_types.items():
        config, where = node["node_config"], f"{name}.node_config"
        if report := validate_run_instances(config).generate_report():
            found.append(f"{where}: {report}")
        found += [f"{where}.{key}: Ray sets it" for key in config if key in SET_BY_RAY]
        if not re.fullmatch(r"ami-[0-9a-f]{8,17}|resolve:ssm:/.+", config.get("ImageId", "")):
            found.append(f"{where}.ImageId: Ray's default image is too old for Python 3.11")
        if not re.fullmatch(r"[a-z0-9-]+\.[a-z0-9]+", config.get("InstanceType", "")):
            found.append(f"{where}.InstanceType: {config.get('InstanceType')}")
        disks = [disk.get("Ebs", {}) for disk in config.get("BlockDeviceMappings", [])]
        if not any(disk.get("VolumeSize", 0) >= 60 for disk in disks):
            found.append(
                f"{where}.BlockDeviceMappings: the installation alone takes 7 GB, the base 12"
            )
        if "KeyName" in config and "ssh_private_key" not in cluster["auth"]:
            found.append(f"{where}.KeyName: needs auth.ssh_private_key")
        if node.get("max_workers", 0) > cluster["max_workers"]:
            found.append(f"{name}.max_workers: above the cluster's max_workers")
    head = node_types[cluster["head_node_type"]]["node_config"]
    if "InstanceMarketOptions" in head:
        found.append("the head must be on demand: a spot interruption would end the sweep")
    return found


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


def test_lint_finds_nothing(cluster: dict[str, Any], validator) -> None:
    assert lint(cluster, validator) == []


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("provider", "regoin"), "us-west-2", "provider.regoin: unknown"),
        (("provider", "availability_zone"), "us-east-1a", "us-east-1a is not in the region"),
        (("gpu_spot", "InstanceTyp"), "g6e.2xlarge", 'Unknown parameter in input: "InstanceTyp"'),
        (("gpu_spot", "InstanceMarketOptions"), "spot", "Invalid type for parameter"),
        (("gpu_spot", "ImageId"), "latest", "ImageId: Ray's default image is too old"),
        (("gpu_spot", "MinCount"), 1, "MinCount: Ray sets it"),
        (("gpu_spot", "KeyName"), "mine", "KeyName: needs auth.ssh_private_key"),
        (("gpu_spot", "BlockDeviceMappings"), [], "the installation alone"),
        (("head", "InstanceMarketOptions"), {"MarketType": "spot"}, "the head must be on demand"),
    ],
)
def test_lint_finds_mistakes_that_ray_passes_on(
    cluster: dict[str, Any], validator, path: tuple[str, str], value: Any, message: str
) -> None:
    broken = copy.deepcopy(cluster)
    if path[0] == "provider":
        broken["provider"][path[1]] = value
    else:
        broken["available_node_types"][path[0]]["node_config"][path[1]] = value
    assert message in "\n".join(lint(broken, validator))


def test_workers_cost_nothing_until_trials_wait(cluster: dict[str, Any]) -> None:
    worker = cluster["available_node_types"]["gpu_spot"]
    assert worker["min_workers"] == 0
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_head_uses_rays_firewall_and_a_loopback_dashboard(cluster: dict[str, Any]) -> None:
    (start,) = [c for c in cluster["head_start_ray_commands"] if "ray start" in c]
    assert "--dashboard-host=127.0.0.1" in shlex.split(start)
    assert "security_group" not in cluster["provider"]  # Ray's default: SSH, and all among nodes


def test_authentication_is_explicit_wherever_ray_starts(cluster: dict[str, Any]) -> None:
    for role in ("head", "worker"):
        (start,) = [c for c in cluster[f"{role}_start_ray_commands"] if "ray start" in c]
        assert start.startswith("export RAY_AUTH_MODE=disabled;")
    assert any("RAY_AUTH_MODE=disabled" in command for command in cluster["setup_commands"])


def test_nodes_install_the_pinned_versions_of_this_checkout(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"] == {"/home/ubuntu/higgs-tune": "."}
    (install,) = [c for c in cluster["setup_commands"] if "pip install" in c]
    assert "--constraint ~/higgs-tune/constraints.txt" in install


def commands(cluster: dict[str, Any]) -> list[str]:
    """All commands that Ray passes to a shell."""
    return [
        command for key, value in cluster.items() if key.endswith("_commands") for command in value
    ]


def test_every_command_has_valid_shell_syntax(cluster: dict[str, Any]) -> None:
    assert len(commands(cluster)) == 10
    for command in commands(cluster):  # in unquoted YAML, " #" would cut it short
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_bashrc_sets_the_environment_of_non_interactive_shells(
    cluster: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / ".bashrc").write_text("case $- in *i*) ;; *) return;; esac\n", encoding="utf-8")
    command = tmp_path / "venv" / "bin" / "higgs-tune"
    command.parent.mkdir(parents=True)
    command.write_text("#!/bin/sh\necho $RAY_AUTH_MODE\n", encoding="utf-8")
    command.chmod(0o755)
    (add,) = [command for command in cluster["setup_commands"] if ".bashrc" in command]
    shell = {"env": {**os.environ, "HOME": str(tmp_path)}, "check": True}
    for _ in range(2):  # a second `ray up` adds nothing
        subprocess.run(["bash", "-c", add], **shell)
    assert (tmp_path / ".bashrc").read_text(encoding="utf-8").count("export PATH") == 1
    found = subprocess.run(
        ["bash", "-c", "source ~/.bashrc; higgs-tune"], capture_output=True, text=True, **shell
    )
    assert found.stdout == "disabled\n"
