"""What the charts open and mount: TLS, metrics ports, key files, the secret of webhooks."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
from helm_python.errors import HelmError

from tests.unit.deploy.charts import container, render, stateful_set
from tests.unit.deploy.test_charts import KUBERNETES, load_rendered


def test_tls_comes_from_a_secret_that_may_be_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_rendered("edge-node", render("edge-node"), monkeypatch)
    assert plain.serving.tls.cert_file is None
    objects = render("edge-node", overrides={"tls": {"secretName": "acme-tls"}})
    settings = load_rendered("edge-node", objects, monkeypatch)
    main = container(objects)
    (mount,) = [m for m in main["volumeMounts"] if m["name"] == "tls"]
    assert "subPath" not in mount, "Kubernetes would never update it"
    assert str(settings.serving.tls.cert_file) == f"{mount['mountPath']}/tls.crt"
    assert str(settings.serving.tls.key_file) == f"{mount['mountPath']}/tls.key"
    probe = {"path": "/ready", "port": "http", "scheme": "HTTPS"}
    assert main["readinessProbe"]["httpGet"] == probe
    for item in objects:
        kubernetes_validate.validate(item, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize(
    ("chart", "name", "variable"),
    [
        ("edge-node", "experienceKey", "EDGE_EXPERIENCE__KEY_FILE"),
        ("central", "webhookSecret", "CENTRAL_WEBHOOKS__SECRET_FILE"),
    ],
)
def test_a_file_of_a_secret_is_where_the_settings_look(
    chart: str, name: str, variable: str
) -> None:
    assert variable not in {item["name"] for item in container(render(chart))["env"]}
    objects = render(chart, overrides={name: {"secretName": "mine", "key": "the.key"}})
    main, pod = container(objects), stateful_set(objects)["spec"]["template"]["spec"]
    (volume,) = [v for v in pod["volumes"] if v.get("secret", {}).get("secretName") == "mine"]
    (mount,) = [m for m in main["volumeMounts"] if m["name"] == volume["name"]]
    assert {item["name"]: item.get("value") for item in main["env"]}[variable] == (
        f"{mount['mountPath']}/the.key"
    )
    assert mount["readOnly"] is True
    assert volume["secret"]["defaultMode"] == 0o440, "the group reads it: root owns it"
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    kubernetes_validate.validate(stateful_set(objects), KUBERNETES[-1], strict=True)


@pytest.mark.parametrize(("chart", "group"), [("edge-node", "serving"), ("central", "listen")])
def test_prometheus_finds_the_metrics_port(
    chart: str, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor_values = {"enabled": True, "labels": {"release": "mine"}}
    wanted: dict[str, Any] = {"metrics": {"port": 9400, "serviceMonitor": monitor_values}}
    objects = render(chart, overrides=wanted)
    listening = getattr(load_rendered(chart, objects, monkeypatch), group)
    assert (listening.metrics_port, listening.metrics_host) == (9400, "0.0.0.0")
    assert {"name": "metrics", "containerPort": 9400, "protocol": "TCP"} in container(objects)[
        "ports"
    ]
    (monitor,) = [item for item in objects if item["kind"] == "ServiceMonitor"]
    assert monitor["metadata"]["labels"]["release"] == "mine"
    (endpoint,) = monitor["spec"]["endpoints"]
    services = [item for item in objects if item["kind"] == "Service"]
    found = [
        service["metadata"]["name"]
        for service in services
        if endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        and monitor["spec"]["selector"]["matchLabels"].items()
        <= service["metadata"]["labels"].items()
    ]
    targets = {
        port["targetPort"]
        for service in services
        for port in service["spec"]["ports"]
        if port["name"] == "metrics"
    }
    assert targets == {"metrics"}
    assert found == [f"demo-{chart}-headless"]


def test_central_opens_no_metrics_port_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_rendered("central", render("central"), monkeypatch).listen.metrics_port is None


def test_metrics_without_a_port_are_at_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = render("edge-node", overrides={"metrics": {"port": 0}})
    settings = load_rendered("edge-node", objects, monkeypatch)
    assert settings.serving.metrics_port is None
    assert [port["name"] for port in container(objects)["ports"]] == ["http"]
    monitor = {"metrics": {"port": 0, "serviceMonitor": {"enabled": True}}}
    with pytest.raises(HelmError, match="ServiceMonitor needs the metrics port"):
        render("edge-node", overrides=monitor)


def test_a_pod_asks_for_keys_which_may_come_from_a_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = load_rendered("edge-node", render("edge-node"), monkeypatch)
    assert (settings.serving.access, settings.serving.is_on_loopback) == ("auto", False)
    assert settings.serving.keys_file is None
    overrides = {
        "accessKeys": {"secretName": "acme-keys", "key": "acme.json"},
        "settings": {"serving": {"limits": {"requests_per_minute": 60}}},
    }
    objects = render("edge-node", overrides=overrides)
    settings = load_rendered("edge-node", objects, monkeypatch)
    assert settings.serving.limits.requests_per_minute == 60
    (mount,) = [m for m in container(objects)["volumeMounts"] if m["name"] == "access-keys"]
    assert "subPath" not in mount, "Kubernetes would never update it"
    assert mount["readOnly"] is True
    assert str(settings.serving.keys_file) == f"{mount['mountPath']}/acme.json"
    volumes = stateful_set(objects)["spec"]["template"]["spec"]["volumes"]
    (volume,) = [v for v in volumes if v["name"] == "access-keys"]
    assert volume["secret"] == {"secretName": "acme-keys", "defaultMode": 0o440}
    for item in objects:
        kubernetes_validate.validate(item, KUBERNETES[-1], strict=True)
