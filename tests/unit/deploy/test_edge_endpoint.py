"""What the edge node's chart opens: TLS at the endpoint, and the metrics port."""

from __future__ import annotations

import kubernetes_validate
import pytest
from helm_python.errors import HelmError

from tests.unit.deploy.charts import container, render
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


def test_prometheus_finds_the_metrics_port(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"metrics": {"serviceMonitor": {"enabled": True, "labels": {"release": "mine"}}}}
    objects = render("edge-node", overrides=wanted)
    settings = load_rendered("edge-node", objects, monkeypatch)
    assert (settings.serving.metrics_port, settings.serving.metrics_host) == (9400, "0.0.0.0")
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
    assert found == ["demo-edge-node-headless"]


def test_metrics_without_a_port_are_at_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = render("edge-node", overrides={"metrics": {"port": 0}})
    settings = load_rendered("edge-node", objects, monkeypatch)
    assert settings.serving.metrics_port is None
    assert [port["name"] for port in container(objects)["ports"]] == ["http"]
    monitor = {"metrics": {"port": 0, "serviceMonitor": {"enabled": True}}}
    with pytest.raises(HelmError, match="ServiceMonitor needs the metrics port"):
        render("edge-node", overrides=monitor)
