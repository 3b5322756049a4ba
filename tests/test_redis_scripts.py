"""The Lua scripts: what each file owes its reader, and that the servers take them."""

from pathlib import Path

import pytest
import servers

import redis_store
from redis_store import scripts

FILES = sorted(Path(redis_store.__file__).parent.glob("*.lua"))
SCRIPTS = {
    name.strip("_"): text for name in dir(scripts) if name.isupper() and isinstance(text := getattr(scripts, name), str)
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_script_opens_with_its_keys_and_arguments(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    opening = text.partition("\n\n")[0]
    assert all(line.startswith("--") for line in opening.split("\n"))
    assert "KEYS" in opening
    assert "ARGV" in opening
    assert "Returns" in opening or path.stem in ("common", "part")


def test_each_file_is_used() -> None:
    assert {path.stem.upper() for path in FILES} == {*SCRIPTS}
    for path in FILES:
        assert any(path.read_text(encoding="utf-8") in text for text in SCRIPTS.values())


def test_the_servers_take_them(server: servers.Redis) -> None:
    with server.client() as client:
        for text in SCRIPTS.values():
            assert client.script_load(text)
