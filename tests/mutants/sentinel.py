"""Mutants of what follows sentinels: redis_store/topology.py, and the advice on them."""

from mutants import Mutant

TOPOLOGY = "redis_store/topology.py"
SENTINEL = "tests/test_sentinel.py"
ADVICE = "tests/test_advice.py"

MUTANTS = [
    Mutant(
        TOPOLOGY,
        "max(known, key=lambda answer: answer[0])",
        "known[0]",
        (f"{SENTINEL}::test_the_sentinel_that_has_heard_of_the_latest_failover_is_right",),
        "a sentinel that has not heard of the failover leads back to the old primary",
    ),
    Mutant(
        TOPOLOGY,
        "answers = await asyncio.gather(*map(self._ask, self._sentinels), return_exceptions=True)",
        "answers = []\n"
        "            for one in self._sentinels:\n"
        "                answers += await asyncio.gather(self._ask(one), return_exceptions=True)",
        (f"{SENTINEL}::test_sentinels_are_asked_at_the_same_time",),
        "each sentinel whose machine is gone makes the failover longer",
    ),
    Mutant(
        TOPOLOGY,
        'return int(fields[b"config-epoch"]), where[0].decode(), int(where[1])',
        'return int(fields[b"config-epoch"]), fields[b"ip"].decode(), int(fields[b"port"])',
        (f"{SENTINEL}::test_the_sentinel_that_has_heard_of_the_latest_failover_is_right",),
        "in a failover the newest epoch comes with the old address",
    ),
    Mutant(
        TOPOLOGY,
        "                    leave(error)",
        "                    pass",
        (f"{SENTINEL}::test_a_switch_is_followed_though_all_sentinels_were_silent_for_a_while",),
        "after a failover that somebody asked for, ids go to the old primary for seconds",
    ),
    Mutant(
        TOPOLOGY,
        "        except redis.ConnectionError:\n            return",
        "        except redis.ConnectionError:\n            raise",
        (f"{SENTINEL}::test_a_switch_is_followed_though_all_sentinels_were_silent_for_a_while",),
        "requests fail while all sentinels are silent",
    ),
    Mutant(
        "redis_store/windows.py",
        "        await self._home.confirm_place()\n",
        "",
        (f"{SENTINEL}::test_who_follows_late_closes_nothing_that_others_still_fill",),
        "a count lacks what others stored on the new primary",
    ),
    Mutant(
        TOPOLOGY,
        "self.notices = 2 * ASK if sentinels else 0.0",
        "self.notices = 0.0",
        (f"{SENTINEL}::test_a_new_primary_waits_for_all_to_hear_of_it_however_short_the_time_of_a_request",),
        "with a short --request-timeout a count is told before all instances have brought their ids",
    ),
    Mutant(
        TOPOLOGY,
        "if wire is None or wire.closed.done():",
        "if wire is None:",
        (f"{SENTINEL}::test_a_switch_is_followed_though_all_sentinels_were_silent_for_a_while",),
        "a sentinel that was restarted is never asked again",
    ),
    Mutant(
        TOPOLOGY,
        "if wire is None or wire.closed.done():",
        "if True:",
        (f"{SENTINEL}::test_counting_goes_on_without_sentinels_but_no_primary_is_found_without_them",),
        "sentinels are connected to anew twice a second, and TLS costs more than the question",
    ),
    Mutant(
        TOPOLOGY,
        'username="", password=sentinel_password)',
        "password=sentinel_password)",
        (f"{SENTINEL}::test_passwords_of_the_sentinels_and_of_the_primary",),
        "sentinels are told the user of the primary, whom they do not know",
    ),
    Mutant(
        TOPOLOGY,
        'username="", password=sentinel_password)',
        'username="", password=sentinel_password, tls=False)',
        (f"{SENTINEL}::test_tls_to_the_sentinels_and_to_the_primary",),
        "sentinels that have a port for TLS alone can't be asked",
    ),
    Mutant(
        TOPOLOGY,
        "asyncio.timeout(ANSWER if self._wires else FIRST)",
        "asyncio.timeout(ANSWER)",
        (f"{ADVICE}::test_tls_where_sentinels_expect_none",),
        "the log says that there is no answer, and not that the sentinels expect no TLS",
    ),
    Mutant(
        TOPOLOGY,
        "raise next((error for error in errors if advice_in(advise(error))), errors[0])",
        "raise errors[0]",
        (f"{ADVICE}::test_the_sentinel_that_says_what_is_wrong_is_told",),
        "the log tells of the one sentinel that is away, and not of what is wrong with the URL",
    ),
]
