"""The sections of RESULTS.md: each script writes its own, dated, and leaves the others as they are."""

import os
import platform
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")
ABOUT = """# What was measured

Servers are on core 0, clients and Redis on core 1, unless it says otherwise. CPU is the server's time for a request.
The ratios carry over to other machines, the figures themselves don't. A figure is the median of the rounds; behind a
ratio stand its lowest and its highest round, as machines like these are noisy. What is most like users' loads comes
first: header fields that differ in each request, and a network between the service and Redis.
"""
DIFFER = "Requests as a load balancer sends them"
DISTANCE = "Redis at a distance"
STEADY = "Latency at a constant rate"
MODEL = "More cores and more primaries"
GROWTH = "How cost grows"
SAME = "In the laboratory: the same header bytes in every request"
ORDER = [DIFFER, DISTANCE, STEADY, MODEL, GROWTH, SAME]


def write_section(title: str, text: str) -> None:
    """Print a section, and put it into RESULTS.md in the place of the one that had its title."""
    model = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    machine = f"{os.cpu_count()} cores of {model}, Python {platform.python_version()}"
    made = f"By `python bench/{Path(sys.argv[0]).name}` on {datetime.now(UTC):%Y-%m-%d}: {machine}."
    print(f"## {title}\n\n{made}\n\n{text.strip()}\n")
    old = RESULTS.read_text() if RESULTS.exists() else ""
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", old, re.DOTALL | re.MULTILINE))
    sections[title] = f"\n{made}\n\n{text.strip()}\n"
    known = [each for each in ORDER if each in sections]
    RESULTS.write_text(ABOUT + "".join(f"\n## {each}\n{sections[each].rstrip()}\n" for each in known))


def table(heads: str, rows: Iterable[Sequence[str]], words: int = 1) -> list[str]:
    """Return the lines of a table in Markdown. `heads` has `|` between; the first `words` columns are aligned left."""
    names = [name.strip() for name in heads.split("|")]
    rule = ["---"] * words + ["---:"] * (len(names) - words)
    return [f"| {' | '.join(row)} |" for row in (names, rule, *rows)]


def spread(values: Sequence[float]) -> str:
    """Return a ratio's median, and its lowest and highest round if there are several."""
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"
