"""The charts: rendered by Helm, validated strictly, and read back by the settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helm_python import Chart
from helm_python.chart import lint
from helm_python.errors import HelmError
from pydantic import BaseModel

import central.settings
import edge_node.settings
from tests.unit.deploy.charts import (
    CHARTS,
    REQUIRED,
    ROOT,
    VARIANTS,
    container,
    merge,
    render,
    stateful_set,
)

SETTINGS = {"central": central.settings, "edge-node": edge_node.settings}
MODEL: dict[str, type[BaseModel]] = {
    "central": central.settings.CentralSettings,
    "edge-node": edge_node.settings.EdgeSettings,
}
SET_BY_CHART = {
    "central": {
        "data_dir",
        "base.path",
        "listen.host",
        "listen.metrics_port",
        "listen.metrics_host",
        "journal.url",
        "webhooks.secret_file",
    },
    "edge-node": {
        "data_dir",
        "base.path",
        "serving.host",
        "serving.keys_file",
        "serving.metrics_port",
        "serving.metrics_host",
        "serving.tls",
        "experience.key_file",
        "central.join_token",
    },
}
KUBERNETES = ("1.29", "1.33")


def load_rendered(
    chart: str, objects: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """The settings that the container would start with; Secret references get a stand-in."""
    for name in list(os.environ):
        if name.startswith(SETTINGS[chart].PREFIX):
            monkeypatch.delenv(name)
    for item in container(objects)["env"]:
        monkeypatch.setenv(item["name"], item.get("value", "from-the-secret"))
    return SETTINGS[chart].load_settings()


def setting_names(model: type[BaseModel]) -> set[str]:
    names = set()
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names |= {f"{name}.{inner}" for inner in kind.model_fields}
        else:
            names.add(name)
    return names


@pytest.mark.parametrize(("chart", "value_file"), VARIANTS)
@pytest.mark.parametrize("version", KUBERNETES)
def test_every_object_is_valid_kubernetes(chart: str, value_file: str | None, version: str) -> None:
    objects = render(chart, value_file)
    assert sorted(item["kind"] for item in objects) == [
        "Service",
        "Service",
        "ServiceAccount",
        "StatefulSet",
    ]
    for item in objects:
        kubernetes_validate.validate(item, version, strict=True)


def test_strict_validation_catches_a_misspelt_field() -> None:
    broken = stateful_set(render("central"))
    broken["spec"]["template"]["spec"]["terminationGracePeriodSecond"] = 3
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriodSecond"):
        kubernetes_validate.validate(broken, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize("chart", ["central", "edge-node"])
def test_helm_lint_has_no_errors(chart: str) -> None:
    assert lint(CHARTS / chart, REQUIRED[chart])["errors"] == []


@pytest.mark.parametrize(("chart", "value_file"), VARIANTS)
def test_the_rendered_environment_builds_the_settings(
    chart: str, value_file: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_rendered(chart, render(chart, value_file), monkeypatch)
    assert str(settings.data_dir) == "/data"
    assert str(settings.base.path) == "/model"
    if chart == "edge-node":
        assert settings.node_name == "demo-edge-node"
        assert settings.central.join_token.get_secret_value() == "from-the-secret"
        assert settings.environments[0].options == {"seed": 3}
        assert settings.serving.host == "0.0.0.0"
        assert settings.serving.max_loras == (8 if value_file == "values-gpu.yaml" else 4)
    else:
        assert "demo-central.lorikeet.svc" in settings.listen.names
        assert settings.limits.node_quota_bytes == 16 << 30


def test_nested_values_arrive_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    merge_values = {"cohorts": {"zeta": {"min_updates": 1}}, "strategy_options": {"beta": 1e-7}}
    overrides = {"settings": {"merge": merge_values, "listen": {"names": ["central.example.org"]}}}
    settings = load_rendered("central", render("central", overrides=overrides), monkeypatch)
    assert settings.merge.policy("zeta").min_updates == 1
    assert settings.merge.strategy_options == {"beta": 1e-7}
    assert settings.listen.names[0] == "central.example.org"


@pytest.mark.parametrize("chart", ["central", "edge-node"])
def test_default_values_are_the_defaults_of_the_settings(
    chart: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = SET_BY_CHART[chart] | {"node_name", "environments", "listen.names"}
    chosen |= {"central.address", "central.enrollment_address"}
    rendered = load_rendered(chart, render(chart), monkeypatch)
    for item in container(render(chart))["env"]:
        monkeypatch.delenv(item["name"])
    default = MODEL[chart]()
    for name in setting_names(MODEL[chart]) - chosen:
        group, _, field = name.partition(".")
        assert getattr(getattr(rendered, group), field) == getattr(
            getattr(default, group), field
        ), name


@pytest.mark.parametrize("chart", ["central", "edge-node"])
def test_values_and_schema_know_every_setting(chart: str) -> None:
    expected = setting_names(MODEL[chart]) - SET_BY_CHART[chart]
    schema = json.loads((CHARTS / chart / "values.schema.json").read_text())["properties"][
        "settings"
    ]
    values = yaml.safe_load((CHARTS / chart / "values.yaml").read_text())["settings"]
    groups = {name for name, part in schema["properties"].items() if "properties" in part}
    flat = {name for name in schema["properties"] if name not in groups}
    in_schema = flat | {f"{g}.{n}" for g in groups for n in schema["properties"][g]["properties"]}
    in_values = (values.keys() - groups) | {f"{g}.{n}" for g in groups for n in values[g]}
    assert in_schema == expected, (
        "values.schema.json and settings.py differ: add or remove the setting in the chart"
    )
    assert in_values == expected, (
        "values.yaml and settings.py differ: add or remove the setting in the chart"
    )


@pytest.mark.parametrize("chart", ["central", "edge-node"])
def test_the_schema_closes_every_object_of_ours(chart: str) -> None:
    def closed(schema: Any, where: str) -> None:
        if "properties" in schema:
            assert schema.get("additionalProperties") is False, where
            for name, part in schema["properties"].items():
                closed(part, f"{where}.{name}")

    closed(json.loads((CHARTS / chart / "values.schema.json").read_text()), chart)


@pytest.mark.parametrize(
    ("chart", "bad"),
    [
        ("central", {"image": {"repo": "x"}}),
        ("central", {"settings": {"merge": {"min_update": 1}}}),
        ("central", {"settings": {"listen": {"port": 70000}}}),
        ("central", {"image": {"tag": "latest"}}),
        ("central", {"securityContext": {"runAsUser": 0}}),
        ("edge-node", {"setings": {}}),
        ("edge-node", {"settings": {"serving": {"max_lora_rank": 7}}}),
        ("edge-node", {"settings": {"outbox": {"approval": "maybe"}}}),
        ("edge-node", {"joinToken": {"token": "lkt1.secret"}}),
        ("edge-node", {"accessKeys": {"keys": "lk-secret"}}),
        ("edge-node", {"experienceKey": {"secret": "acme-key"}}),
        ("edge-node", {"settings": {"experience": {"key_file": "/unmounted"}}}),
        ("central", {"settings": {"listen": {"metrics_port": 9445}}}),
        ("central", {"metrics": {"ports": 9445}}),
        ("central", {"webhookSecret": {"secret": "hook"}}),
        ("edge-node", {"settings": {"serving": {"access": "closed"}}}),
        ("edge-node", {"settings": {"serving": {"limits": {"choices": 0}}}}),
        ("edge-node", {"extraEnv": [{"name": "EDGE_SERVING__PORT", "value": "1"}]}),
    ],
)
def test_the_schema_refuses_a_mistake(chart: str, bad: dict[str, Any]) -> None:
    with Chart.load(CHARTS / chart) as loaded:
        loaded.validate_schema(REQUIRED[chart])
        with pytest.raises(HelmError):
            loaded.validate_schema(merge(REQUIRED[chart], bad))


@pytest.mark.parametrize(
    ("chart", "missing"),
    [("central", "model"), ("edge-node", "model"), ("edge-node", "settings")],
)
def test_a_missing_required_value_is_named(chart: str, missing: str) -> None:
    values = {key: value for key, value in REQUIRED[chart].items() if key != missing}
    with (
        Chart.load(CHARTS / chart) as loaded,
        pytest.raises(HelmError, match=f"{missing}.* is empty"),
    ):
        loaded.render(values, name="demo")


@pytest.mark.parametrize(("chart", "value_file"), VARIANTS)
def test_command_line_and_ports(
    chart: str, value_file: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = render(chart, value_file)
    main = container(objects)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert main["args"] == [chart, "serve"]
    assert chart in scripts
    assert "command" not in main, (
        "it would replace the image's entry point, which passes signals on"
    )
    settings = load_rendered(chart, objects, monkeypatch)
    listening = settings.listen if chart == "central" else settings.serving
    others = {"enrollment": listening.enrollment_port} if chart == "central" else {}
    metrics = {"metrics": listening.metrics_port} if chart == "edge-node" else {}
    clients = {listening.port} | set(others.values())
    assert {port["containerPort"] for port in main["ports"]} == clients | set(metrics.values())
    names = {port["name"] for port in main["ports"]}
    for service in (item for item in objects if item["kind"] == "Service"):
        headless = service["spec"].get("clusterIP") == "None"
        ports = service["spec"]["ports"]
        assert {p["port"] for p in ports} == clients | set(metrics.values() if headless else ())
        assert {p["targetPort"] for p in ports} == names - set(() if headless else metrics)


@pytest.mark.parametrize(
    ("module", "command", "option"),
    [
        ("edge_node.cli", "serve", None),
        ("edge_node.cli", "status", "--live"),
        ("central.cli", "serve", None),
    ],
)
def test_the_command_lines_are_known_to_the_programs(
    module: str, command: str, option: str | None
) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", module, command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert option is None or option in answer.stdout


@pytest.mark.parametrize(("chart", "value_file"), VARIANTS)
def test_the_pod_is_locked_down(chart: str, value_file: str | None) -> None:
    objects = render(chart, value_file)
    pod = stateful_set(objects)["spec"]["template"]["spec"]
    main = container(objects)
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert main["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not any("hostPath" in volume for volume in pod["volumes"])
    mounts = {mount["mountPath"]: mount for mount in main["volumeMounts"]}
    assert {"/data", "/tmp", "/model"} <= mounts.keys()
    assert mounts["/model"]["readOnly"] is True
    assert main["resources"]["requests"]
    assert main["resources"]["limits"]["memory"]


def test_secrets_come_by_reference_only() -> None:
    journal = {"journalUrl": {"secretName": "journal", "key": "url"}}
    references = {
        item["name"]: item["valueFrom"]["secretKeyRef"]["name"]
        for objects in (render("edge-node"), render("central", overrides=journal))
        for item in container(objects)["env"]
        if "valueFrom" in item
    }
    assert references == {
        "EDGE_CENTRAL__JOIN_TOKEN": "join-token",
        "CENTRAL_JOURNAL__URL": "journal",
    }


def test_the_blob_stores_credentials_come_from_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = {
        "blobStore": {"credentialsSecret": "bucket"},
        "settings": {
            "blobs": {
                "url": "s3://lorikeet/central",
                "options": {"endpoint_url": "https://s3.example.org"},
            }
        },
    }
    objects = render("central", overrides=overrides)
    kubernetes_validate.validate(stateful_set(objects), KUBERNETES[-1], strict=True)
    assert container(objects)["envFrom"] == [{"secretRef": {"name": "bucket"}}]
    blobs = load_rendered("central", objects, monkeypatch).blobs
    assert (blobs.url, blobs.options) == (
        "s3://lorikeet/central",
        {"endpoint_url": "https://s3.example.org"},
    )
    assert "envFrom" not in container(render("central"))


def test_a_backup_has_a_volume_of_its_own() -> None:
    overrides = {"backup": {"existingClaim": "central-backup", "subPath": "acme"}}
    objects = render("central", overrides=overrides)
    kubernetes_validate.validate(stateful_set(objects), KUBERNETES[-1], strict=True)
    mounts = {mount["name"]: mount for mount in container(objects)["volumeMounts"]}
    assert mounts["backup"] == {"name": "backup", "mountPath": "/backup", "subPath": "acme"}
    volumes = {
        volume["name"]: volume
        for volume in stateful_set(objects)["spec"]["template"]["spec"]["volumes"]
    }
    assert volumes["backup"]["persistentVolumeClaim"] == {"claimName": "central-backup"}
    assert "backup" not in {mount["name"] for mount in container(render("central"))["volumeMounts"]}


@pytest.mark.parametrize(("chart", "value_file"), VARIANTS)
def test_no_value_of_ours_replaces_the_nodes_own_sizing(chart: str, value_file: str | None) -> None:
    assert "VLLM_CPU_KVCACHE_SPACE" not in {
        item["name"] for item in container(render(chart, value_file))["env"]
    }


@pytest.mark.parametrize("value_file", ["values-cpu.yaml", "values-gpu.yaml"])
def test_edge_probes_follow_the_supervisor_and_vllm(value_file: str) -> None:
    objects = render("edge-node", value_file)
    main = container(objects)
    live = {"command": ["edge-node", "status", "--live"]}
    assert main["startupProbe"]["exec"] == main["livenessProbe"]["exec"] == live
    assert main["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http"}
    grace = stateful_set(objects)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    pre_stop = int(main["lifecycle"]["preStop"]["exec"]["command"][1])
    assert grace >= pre_stop + 20 + 30, (
        "preStop, vLLM's 20 s drain, and 30 s for the learner and the stores"
    )


def test_gpu_values_ask_for_one_gpu() -> None:
    objects = render("edge-node", "values-gpu.yaml")
    pod = stateful_set(objects)["spec"]["template"]["spec"]
    assert container(objects)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["nodeSelector"]
    assert pod["tolerations"]
    assert pod["runtimeClassName"] == "nvidia"
    assert (
        "nvidia.com/gpu"
        not in container(render("edge-node", "values-cpu.yaml"))["resources"]["limits"]
    )
