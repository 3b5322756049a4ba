"""Mutants of settings.py: limits, secrets in messages, who wins."""

from mutants import Mutant

ALL = ("tests/test_settings.py",)

MUTANTS = [
    Mutant(
        "settings.py",
        'if re.fullmatch("[0-9]{1,18}", text) and lowest <= int(text) <= highest:',
        'if re.fullmatch("[0-9]{1,18}", text) and lowest <= int(text) < highest:',
        ALL,
        "the largest number that a flag allows is refused",
    ),
    Mutant(
        "settings.py",
        r'if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) and 0 < float(text) <= DAY:',
        r'if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) and 0 <= float(text) <= DAY:',
        ALL,
        "a time-out of 0 is taken, and every request fails",
    ),
    Mutant(
        "settings.py",
        'actual = shown(text) if setting.repr else "a value that is not shown here"',
        "actual = shown(text)",
        ("tests/test_settings.py::test_secrets_are_never_shown",),
        "a bad URL is repeated with its password in it",
    ),
    Mutant(
        "settings.py",
        "if from_flag is not None:",
        'if from_flag is not None and not environ.get("VERVE_" + name.upper()):',
        ("tests/test_settings.py::test_the_flag_wins_over_the_environment_even_a_bad_one",),
        "the environment wins over a flag",
    ),
    Mutant(
        "settings.py",
        "if settings.workers > 1 and settings.redis_url is None:",
        "if settings.workers > 2 and settings.redis_url is None:",
        ("tests/test_settings.py::test_more_workers_need_redis",),
        "two workers without Redis each count for themselves",
    ),
    Mutant(
        "settings.py",
        "if given.ip != given.network.network_address:",
        "if False:",
        ALL,
        "10.1.2.3/16 is taken for 10.1.0.0/16, which allows more than was meant",
    ),
    Mutant(
        "settings.py",
        "        allow_abbrev=False,\n",
        "",
        ("tests/test_settings.py::test_what_is_no_flag",),
        "half a flag is taken for the whole one, and for another in a later version",
    ),
    Mutant(
        "settings.py",
        'padded = len(text) % 4 == 0 and re.fullmatch("[0-9A-Za-z+/]+={0,2}", text)',
        'padded = re.fullmatch("[0-9A-Za-z+/]+={0,2}", text)',
        ALL,
        "a secret that lacks its padding ends the program with a traceback",
    ),
    Mutant(
        "settings.py",
        "    environ = os.environ if environ is None else environ\n    parser = make_parser()\n",
        "    environ = environ or os.environ\n    parser = make_parser()\n",
        ALL,
        "an empty environment that is handed in is not the one that is read",
    ),
    Mutant(
        "settings.py",
        'host_port(text if ":" in text else "", expected',
        "host_port(text, expected",
        ALL,
        "a word without a port is called a bad host, and HOST:PORT is not asked for",
    ),
    Mutant(
        "settings.py",
        "[flag_name(setting.name) for setting in fields(Settings)], 1)",
        "[flag_name(setting.name) for setting in fields(Settings)], 2)",
        ALL,
        "nothing",
        lives="of two near flags only the first is shown, and it is the same one",
    ),
]
