"""The alerts and the dashboard that come with Verve: carried out by Prometheus's own tool, for metrics that exist."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import servers
import support
import yaml
from operators import watched
from processes import wait_until
from receivers import Receiver
from support import ROOT

import admin

RULES = ROOT / "deploy" / "alerts.yaml"


@pytest.fixture
def promtool() -> None:
    support.need("promtool", "prometheus")


def run(*words: str | Path) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=support.DEADLINE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics_in(expression: str) -> set[str]:
    """Return the metrics that an expression names, as admin.METRICS does."""
    names = set(re.findall(r"\b(?:verve|process)_[a-z_]+", expression))
    return {name if name in admin.METRICS else re.sub("_(bucket|sum|count)$", "", name) for name in names}


@pytest.mark.usefixtures("promtool")
def test_prometheus_takes_the_rules() -> None:
    assert "SUCCESS: 9 rules found" in run("promtool", "check", "rules", RULES)


@pytest.mark.usefixtures("promtool")
def test_the_alerts_fire_when_they_should_and_when_series_vanish(tmp_path: Path) -> None:
    file = tmp_path / "alerts.yaml"
    file.write_text((ROOT / "tests" / "alerts.yaml").read_text().replace("RULES", str(RULES)))
    assert "SUCCESS" in run("promtool", "test", "rules", file)


def test_each_alert_is_about_metrics_that_exist_and_says_what_to_do() -> None:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]:
        names = metrics_in(rule["expr"])
        assert names or rule["expr"].startswith("up{")
        assert names <= set(admin.METRICS), rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}
        for name in metrics_in(rule["annotations"]["description"]):
            assert name in admin.METRICS


def dashboard() -> dict[str, Any]:
    found = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    assert isinstance(found, dict)
    return found


def expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def test_the_dashboard_shows_metrics_that_are_there() -> None:
    with Receiver() as receiver, servers.Redis(next(iter(servers.ENGINES))) as server:
        flags = "--redis-url", server.url, "--window", "1", "--report-url", receiver.url
        with watched(*flags) as (_, operators):
            wait_until(lambda: "verve_last_window_ids" in operators.numbers())
            there = {name.partition("{")[0] for name in operators.numbers()}
    for expression in expressions():
        names = set(re.findall(r"\b(?:verve|process)_[a-z_]+", expression))
        assert names, expression
        assert names <= there, expression


def test_the_dashboard_leaves_out_no_subject() -> None:
    shown = set().union(*map(metrics_in, expressions()))
    assert set(admin.METRICS) - shown == {"verve_start_time_seconds", "process_start_time_seconds"}


@pytest.mark.usefixtures("promtool")
def test_prometheus_takes_the_expressions_of_the_dashboard(tmp_path: Path) -> None:
    """As recording rules, since promtool checks nothing smaller without a server."""
    filled = [expression.replace("$__rate_interval", "1m").replace("$job", ".+") for expression in expressions()]
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(filled)]
    assert not [expression for expression in filled if "$" in expression]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"SUCCESS: {len(rules)} rules found" in run("promtool", "check", "rules", file)


def test_the_panels_of_the_dashboard_do_not_overlap_and_have_names() -> None:
    panels = dashboard()["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["title"] for panel in panels}) == len({panel["id"] for panel in panels}) == len(panels)
