"""The soak of `soak.py`, short and the same each time: strict about counts, generous about the machine's time."""

import pytest
import servers
import soak

SLACK = 5.0  # seconds that a busy machine may add to an answer, and to a recovery


@pytest.mark.soak
def test_soak() -> None:
    """It takes some 30 s, in which each fault is done once at least.

    `python tests/soak.py` does them for ten minutes, with a seed drawn by lot and without slack.
    """
    soak.run(0, 1, next(iter(servers.ENGINES)), SLACK)
