"""The alerts and the dashboard that come with Verve: carried out by Prometheus's own tool, for metrics that exist."""

import re
import subprocess
from pathlib import Path

import pytest
import support
import yaml
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
