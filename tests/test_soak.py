"""The soak of `soak.py`, short and the same each time: strict about counts, generous about the machine's time."""

import servers
import soak

SLACK = 5.0  # seconds that a busy machine may add to an answer, and to a recovery


def test_soak() -> None:
    """It takes 40 s. `python tests/soak.py` does it for ten minutes, with what it draws by lot and without slack."""
    soak.run(35, 3, next(iter(servers.ENGINES)), SLACK)
