"""The dashboards and alert rules: each metric that they name is exported; Prometheus reads them.

What Prometheus itself says (promtool) is asked where it is installed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.fakes.metric_names import central_names, node_names
from tests.unit.deploy.charts import container, render, stateful_set
from tests.unit.deploy.test_charts import KUBERNETES, load_rendered

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "deploy" / "monitoring"
DASHBOARDS = ("node-dashboard.json", "central-dashboard.json")
OURS = re.compile(r"\b(?:lorikeet_(?:node|central)_|process_)[a-z_]+\b")
RULES_TEST = Path(__file__).with_name("monitoring_rules.yaml")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("names")
    return central_names(folder) | node_names(folder)


def expressions(dashboard: str) -> Iterator[str]:
    document = json.loads((FOLDER / dashboard).read_text())
    for panel in document["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in document["templating"]["list"]:
        yield variable["query"]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_a_dashboard_names_only_what_is_exported(dashboard: str, exported: set[str]) -> None:
    named = {name for text in expressions(dashboard) for name in OURS.findall(text)}
    assert len(named) > 10
    assert named <= exported


def test_rules_name_only_what_is_exported(exported: set[str]) -> None:
    named = {name for rule in rules() for name in OURS.findall(rule["expr"])}
    assert len(named) > 15
    assert named <= exported


def test_the_page_has_every_metric_and_every_alert(exported: set[str]) -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text()
    assert {name for name in exported if name.startswith("lorikeet_")} == {
        name for name in OURS.findall(page) if name.startswith("lorikeet_")
    }
    assert {rule["alert"] for rule in rules()} == set(re.findall(r"\bLorikeet[A-Z]\w+", page))


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "next_step"}, rule["alert"]


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_a_dashboard_is_whole(dashboard: str) -> None:
    document = json.loads((FOLDER / dashboard).read_text())
    ids = [panel["id"] for panel in document["panels"]]
    assert len(ids) == len(set(ids))
    for panel in document["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["targets"]
            assert panel["datasource"]["uid"] == "${datasource}", "of whoever imports it"


def promtool(*arguments: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_rules_and_config() -> None:
    promtool("check", "rules", "rules.yaml")
    promtool("check", "config", "prometheus.yaml")


def test_promtool_fires_the_alerts_that_it_should() -> None:
    promtool("test", "rules", str(RULES_TEST))


def test_promtool_reads_every_expression_of_the_dashboards(tmp_path: Path) -> None:
    texts = [
        text.replace("$instance", "a").replace("$cohort", "shared")
        for dashboard in DASHBOARDS
        for text in expressions(dashboard)
        if not text.startswith("label_values") and text != "prometheus"
    ]
    assert len(texts) > 40
    records = [{"record": f"a:b{n}", "expr": text} for n, text in enumerate(texts)]
    file = tmp_path / "expressions.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))
    promtool("check", "rules", str(file))


def test_the_webhook_secret_is_a_file_of_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = {
        "webhookSecret": {"secretName": "hook"},
        "settings": {"webhooks": {"urls": ["https://alerts.example.org/x"]}},
    }
    objects = render("central", overrides=overrides)
    kubernetes_validate.validate(stateful_set(objects), KUBERNETES[-1], strict=True)
    mounts = {mount["name"]: mount for mount in container(objects)["volumeMounts"]}
    assert mounts["webhook"] == {"name": "webhook", "mountPath": "/webhook", "readOnly": True}
    webhooks = load_rendered("central", objects, monkeypatch).webhooks
    assert str(webhooks.secret_file) == "/webhook/secret"
    names = {mount["name"] for mount in container(render("central"))["volumeMounts"]}
    assert "webhook" not in names
