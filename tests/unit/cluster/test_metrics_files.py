"""cluster/alerts.yaml, grafana.json and podmonitor.yaml name metrics, labels and values that the code has.

The expressions are parsed by promtool where it is installed, and by promql-parser where that is.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import yaml

from ltx_ray.driver.run_gauges import row_states
from ltx_ray.driver.run_metrics import METRICS
from ltx_ray.pools.protocol import LossCause
from ltx_ray.stages import Stage
from tests.support.kubernetes_schemas import strict

ROOT = Path(__file__).resolve().parents[3]
ALERTS = yaml.safe_load((ROOT / "cluster" / "alerts.yaml").read_text())
MONITOR = yaml.safe_load((ROOT / "cluster" / "podmonitor.yaml").read_text())
DASHBOARD = json.loads((ROOT / "cluster" / "grafana.json").read_text())
RULES = [rule for group in ALERTS["spec"]["groups"] for rule in group["rules"]]
NAME = re.compile(r"\bray_ltx_ray_\w+")
SELECTED = re.compile(r"\b(ray_ltx_ray_\w+)(?:\{([^}]*)\})?")
CONDITION = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
BY = re.compile(r"by \(([^)]*)\) \(")
#: What Prometheus calls each metric. Of a histogram the buckets are used: its sum is Ray's guess from them.
SCRAPED = {
    f"ray_{name}{'_total' if metric.counts else '_bucket' if metric.buckets else ''}": metric
    for name, metric in METRICS.items()
}
SCHEMAS = {"PodMonitor": "podmonitors", "PrometheusRule": "prometheusrules"}


def expressions() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return [rule["expr"] for rule in RULES] + panels


def own_values() -> dict[str, set[str]]:
    """The values that labels have, as far as the code has a list of them."""
    tracker = SimpleNamespace(
        counts=dict.fromkeys(("rows", "rendered", "already_done", "failed", "illegal", "removed"), 0),
        failures=Counter(), expected_rows=0,
    )  # fmt: skip
    source = "".join(path.read_text() for path in (ROOT / "ltx_ray").rglob("*.py"))
    kinds = set(re.findall(r'_?retry(?:\.once)?\("([a-z ]+)"|_put\("([a-z ]+)"', source)) - {("", "")}
    events = set(re.findall(r'(?:emit\(\s*|"event": )"(\w+)"', source)) | {"call", "preflight_call"}
    return {
        "stage": {str(stage) for stage in Stage},
        "cause": {*map(str, Stage), "memory", "rows", *LossCause},
        "state": {*row_states(tracker), "placing", "starting", "idle", "busy"},
        "event": events,
        "kind": {kind for pair in kinds for kind in pair if kind},
        "outcome": {"ok", "missing", "refused", "error"},
        "ok": {"true", "false"},
        "pool": {"text", "stage1", "stage2", "diffusion", "decode"},
    }


@pytest.mark.parametrize("expression", expressions())
def test_expressions_name_metrics_labels_and_values_that_exist(expression):
    assert NAME.findall(expression), "it is about a run"
    values, labels = own_values(), set()
    for name, selector in SELECTED.findall(expression):
        assert name in SCRAPED, f"{name} is not what Prometheus calls one of {sorted(SCRAPED)}"
        labels |= {"run", *SCRAPED[name].labels, *(["le"] if SCRAPED[name].buckets else [])}
        for label, how, value in CONDITION.findall(selector):
            assert label in {"run", *SCRAPED[name].labels}, f"{name} has no label {label}"
            wanted = set() if value.startswith("$") else set(value.split("|") if "~" in how else [value])
            assert wanted <= values.get(label, set()), f"{label} is never one of {wanted}"
    for by in BY.findall(expression):
        assert {label.strip() for label in by.split(",")} <= labels


def test_every_metric_is_on_the_dashboard():
    shown = {
        name for panel in DASHBOARD["panels"] for target in panel["targets"] for name in NAME.findall(target["expr"])
    }
    assert shown == set(SCRAPED)


def test_the_page_for_operators_lists_every_metric_with_its_labels():
    text = (ROOT / "docs" / "monitoring.md").read_text()
    for name, metric in METRICS.items():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        kind = "; a counter" if metric.counts else "; a histogram" if metric.buckets else ""
        assert f"| `{name}` | {labels} | {metric.help}{kind} |\n" in text


def test_the_page_for_operators_says_each_cause_of_a_loss():
    text = (ROOT / "docs" / "monitoring.md").read_text()
    (said,) = re.findall(r"^\* A replica was lost to(.*?)^\* ", text, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`(\w+)`", said)) - {"gang_lost", "cause"} == set(LossCause)


def test_the_runbook_names_metrics_and_alerts_that_exist():
    text = (ROOT / "docs" / "runbook.md").read_text()
    metrics, alerts = re.findall(r"\bltx_ray_\w+", text), re.findall(r"\bLtxRay\w+", text)
    assert metrics and set(metrics) <= set(METRICS)
    assert alerts and set(alerts) <= {rule["alert"] for rule in RULES}


def test_panels_have_ids_and_places_of_their_own_and_sources_that_are_variables():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in panels)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) == 23
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    (query,) = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["name"] == "run"]
    assert NAME.findall(query)[0] in SCRAPED


@pytest.mark.parametrize("document", [ALERTS, MONITOR], ids=lambda document: document["kind"])
def test_documents_fit_the_operators_schemas(document):
    path = ROOT / f"tests/data/prometheus-operator/{SCHEMAS[document['kind']]}.schema.json.gz"
    schema = strict(json.loads(gzip.decompress(path.read_bytes())))
    schema["properties"]["metadata"] = {"type": "object"}
    checks = jsonschema.Draft7Validator(schema)
    assert [error.message for error in checks.iter_errors(document)] == []
    misspelled = json.loads(json.dumps(document).replace('"labels"', '"lables"').replace('"selector"', '"selecter"'))
    assert list(checks.iter_errors(misspelled)), "the check is strict"


def test_prometheus_reaches_the_pods_that_are_monitored():
    selected = MONITOR["spec"]["selector"]["matchLabels"]
    policy = next(yaml.safe_load_all((ROOT / "cluster" / "policies.yaml").read_text()))
    assert policy["spec"]["podSelector"]["matchLabels"] == selected
    ports = [port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", ())]
    assert 8080 in ports, "KubeRay's port `metrics`"
    for name in ("raycluster.yaml", "rayjob.yaml"):
        text = (ROOT / "cluster" / name).read_text()
        assert text.count("app.kubernetes.io/part-of: ltx-ray") >= 2
        assert "metrics" not in re.findall(r"name: (\w+), containerPort", text), "KubeRay adds it where none is named"


def test_alerts_say_what_to_do():
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["alert"].startswith("LtxRay") and rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_promtool_takes_the_rules(tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(ALERTS["spec"]))
    done = subprocess.run([promtool, "check", "rules", str(tmp_path / "rules.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("expression", expressions())
def test_expressions_are_promql(expression):
    parser = pytest.importorskip("promql_parser")
    parser.parse(expression.replace("$run", ".*"))
