"""Mutants of the store: dedup.py, redis_store/ and its scripts."""

from mutants import Mutant

WINDOWS = "tests/test_windows.py"
REDIS = "tests/test_redis.py"
LINK = "tests/test_redis_link.py"
LOSS = "tests/test_redis_loss.py"
FAILOVER = "tests/test_redis_failover.py"
MEMORY = "tests/test_redis_memory.py"
REPORTS = "tests/test_redis_reports.py"
EDGES = "tests/test_redis_edges.py"
STOP = "tests/test_redis_stop.py"
IN_REDIS = "tests/test_redis_windows.py"
ERRORS = "tests/test_redis_errors.py"
FLEET = "tests/test_fleet.py"
MODEL = f"{FLEET}::test_model"
WIRE = "tests/test_redis_wire.py"

ROLL = "redis_store/roll.lua"
COMMON = "redis_store/common.lua"
MARK = "redis_store/mark.lua"
STREAM = "redis_store/stream.lua"

MUTANTS = [
    # dedup.py
    Mutant(
        "dedup.py",
        "        if self.count >= self.max_ids:\n",
        "        if self.count > self.max_ids:\n",
        (WINDOWS,),
        "one id more than --max-ids",
    ),
    Mutant(
        "dedup.py",
        "        return self.window + self.seconds - self._clock()",
        "        return self.window + self.seconds - self._clock() + 0.001",
        (WINDOWS,),
        "an edge belongs to the window before",
    ),
    Mutant(
        "dedup.py",
        "        if start <= self.window:\n            return ()",
        "        if start < self.window:\n            return ()",
        (WINDOWS,),
        "a roll without an end empties the open window",
    ),
    Mutant(
        "dedup.py",
        "            yield start, count\n            count = 0",
        "            yield start, count",
        (WINDOWS,),
        "windows slept through are told with the count of the one before",
    ),
    Mutant(
        "dedup.py",
        "            self.shards += self.sets[-1:] * next(widths)",
        "            self.shards += self.sets[-1:] * 8",
        (f"{WINDOWS}::test_sets_do_not_grow_all_at_once",),
        "all sets grow within the same thousand ids",
    ),
    Mutant(
        "dedup.py",
        "            if number not in ids:\n                ids.add(number)\n                new += 1",
        "            ids.add(number)\n            new += 1",
        (f"{REDIS}::test_the_count_of_a_process_is_of_distinct_ids",),
        "duplicates in a batch count twice here",
    ),
    # scripts: what is over
    Mutant(
        ROLL,
        "  if kind == 'set' or kind == 'none' then\n    redis.call('SET', key",
        "  if kind == 'set' then\n    redis.call('SET', key",
        (f"{EDGES}::test_a_late_batch_of_a_window_whose_set_was_deleted",),
        "ids stored in a window that was told empty are counted nowhere",
    ),
    Mutant(
        ROLL,
        "    redis.call('SET', REPORTED, start, 'EX', KEEP)\n",
        "",
        (f"{REPORTS}::test_a_window_is_not_reported_again_by_one_who_was_cut_off", MODEL),
        "a window that was taken out of the stream is reported again",
    ),
    Mutant(
        ROLL,
        "  if tonumber(start) > last then\n    local count",
        "  if tonumber(start) >= last then\n    local count",
        (f"{IN_REDIS}::test_a_closed_window_that_is_still_indexed_is_not_told_again", MODEL),
        "a reported window bars all later ones",
    ),
    Mutant(
        ROLL,
        "if redis.call('GET', MARK) ~= mark then",
        "if not redis.call('GET', MARK) then",
        (f"{FAILOVER}::test_two_databases_that_change_places_as_a_window_is_closed",),
        "a server that another took the place of closes windows that lack ids",
    ),
    Mutant(
        ROLL,
        "if settles then\n  return answer(0, 0, '')\nend",
        "",
        (
            f"{FLEET}::test_a_window_reported_before_redis_lost_its_data_is_not_told_otherwise",
            f"{LOSS}::test_a_redis_that_comes_back_with_old_data_waits_for_all",
        ),
        "windows are closed before all have brought their ids back",
    ),
    Mutant(
        ROLL,
        "    local lost = kind == 'none' and held > 0",
        "    local lost = false",
        (f"{LOSS}::test_the_set_of_the_open_window_deleted_by_hand",),
        "a set that was deleted is told as empty",
    ),
    Mutant(
        ROLL,
        " or redis.call('TTL', key) == -1",
        "",
        (f"{EDGES}::test_a_set_without_a_time_to_live_is_no_loss_for_ever",),
        "a set that was begun anew by others is not seen to be so",
    ),
    Mutant(
        ROLL,
        "lost = redis.call('SCARD', key) < held or",
        "lost =",
        (f"{LOSS}::test_the_set_of_the_open_window_deleted_by_hand",),
        "a set with too few ids is told as it is",
    ),
    Mutant(
        ROLL,
        "      redis.call('EXPIRE', key, KEEP) -- found once",
        "      redis.call('EXISTS', key) -- found once",
        (f"{EDGES}::test_a_set_without_a_time_to_live_is_no_loss_for_ever",),
        "a set that was begun anew by one who is dead ends all reports for ever",
    ),
    Mutant(
        ROLL,
        "    if tonumber(start) < open then\n",
        "    if tonumber(start) <= open then\n",
        (f"{IN_REDIS}::test_an_empty_window_that_nobody_lived_through_is_not_told",),
        "an empty window is told though nobody lived through it",
    ),
    Mutant(
        ROLL,
        "      redis.call('ZADD', INDEX, start, member)\n",
        "",
        (f"{IN_REDIS}::test_no_window_is_skipped",),
        "empty windows are not told",
    ),
    Mutant(
        ROLL,
        "  redis.call('ZREM', INDEX, over[i])\n",
        "",
        (
            f"{IN_REDIS}::test_a_closed_window_that_is_still_indexed_is_not_told_again",
            f"{IN_REDIS}::test_many_windows_left_open",
        ),
        "the index grows without end",
    ),
    Mutant(
        ROLL,
        "    redis.call('UNLINK', key)\n",
        "",
        (f"{REDIS}::test_redis_does_not_grow_from_window_to_window",),
        "a set is freed at once and blocks Redis",
    ),
    Mutant(
        STREAM,
        "'MAXLEN', '~', entries, ",
        "",
        (f"{REDIS}::test_the_stream_is_kept_short",),
        "the stream grows without end",
    ),
    Mutant(
        ROLL,
        "  return redis.error_reply('WINDOW ' .. other)",
        "  length = other",
        (f"{IN_REDIS}::test_another_length_of_windows_is_refused",),
        "two lengths of windows are counted under one prefix",
    ),
    Mutant(
        ROLL,
        "local open = math.max(clock[1] - clock[1] % length, (math.floor(last / length) + 1) * length)",
        "local open = clock[1] - clock[1] % length",
        (f"{IN_REDIS}::test_the_clock_of_redis_is_set", MODEL),
        "a clock that is set back opens windows again that were reported",
    ),
    Mutant(
        STREAM,
        "  redis.call('ZREM', RETURNED, returned[i])\n",
        "",
        (f"{REPORTS}::test_reports_are_put_back_into_an_empty_redis",),
        "reports that were put back hold up all later ones",
    ),
    Mutant(
        STREAM,
        "local returned = redis.call('ZRANGE', RETURNED, 0, limit - 1, 'WITHSCORES')",
        "local returned = {}",
        (f"{REPORTS}::test_reports_are_put_back_into_an_empty_redis",),
        "lost reports stay lost",
    ),
    Mutant(
        ROLL,
        "      return answer(0, put, start)",
        "      return answer(0, put, '')",
        (f"{REPORTS}::test_an_entry_with_a_later_id_holds_the_reports_back",),
        "nobody says why no window is told",
    ),
    Mutant(
        STREAM,
        "  if tonumber(start) <= top then\n    return false\n  end\n",
        "",
        (f"{REPORTS}::test_an_entry_with_a_later_id_holds_the_reports_back",),
        "an entry with a later id has the link break again and again",
    ),
    # scripts: arriving
    Mutant(
        MARK,
        "local other = not mark or string.match(mark, '^%S+') ~= run_id",
        "local other = not mark",
        (f"{FAILOVER}::test_a_silent_link_beside_one_that_was_reset",),
        "a replica that was promoted closes windows that lack ids",
    ),
    Mutant(
        MARK,
        "(seen ~= '' and seen ~= mark and not settles)",
        "false",
        (
            f"{EDGES}::test_another_mark_than_the_one_seen_last_is_a_loss",
            f"{FAILOVER}::test_a_failback_to_a_server_that_lived_on",
        ),
        "a failback loses what was stored elsewhere",
    ),
    Mutant(
        MARK,
        " and not settles) then",
        ") then",
        (f"{EDGES}::test_another_mark_than_the_one_seen_last_is_a_loss",),
        "each who arrives begins the settling anew, and sends all others away",
    ),
    Mutant(
        MARK,
        "elseif settles and now < tonumber(string.match(mark, '%S+$')) + most then",
        "elseif settles then",
        (f"{EDGES}::test_settling_ends_though_somebody_still_brings_ids_back",),
        "one who brings ids back again and again keeps all windows from being closed",
    ),
    Mutant(
        MARK,
        "most then\n    redis.call('SET', SETTLING, string.format('%.6f', now + patience), 'EX', KEEP)\n",
        "most then\n",
        (
            f"{EDGES}::test_settling_ends_though_somebody_still_brings_ids_back",
            f"{LOSS}::test_an_instance_that_brings_many_ids_back_is_waited_for",
        ),
        "one who brings many ids back is not waited for",
    ),
    Mutant(
        COMMON,
        "  if mine >= agreed then\n",
        "  if agreed == 0 then\n",
        (f"{EDGES}::test_the_fleet_settles_for_as_long_as_its_slowest_instance_needs",),
        "the fleet does not wait for its slowest instance",
    ),
    Mutant(
        COMMON,
        "redis.call('EXPIRE', MARK, KEEP)\n",
        "",
        (f"{MEMORY}::test_memory_that_is_full_is_freed_by_the_end_of_the_window",),
        "full memory keeps windows from being closed",
    ),
    Mutant(
        "redis_store/bring.lua",
        "  redis.call('ZADD', RETURNED, ARGV[i], ARGV[i + 1])\n",
        "",
        (f"{REPORTS}::test_reports_are_put_back_by_all_who_know_them",),
        "lost reports stay lost",
    ),
    Mutant(
        "redis_store/bring.lua",
        "  redis.call('SET', REPORTED, ARGV[3], 'EX', KEEP)\n",
        "",
        (f"{REPORTS}::test_a_window_is_not_reported_again_by_one_who_was_cut_off", MODEL),
        "a window told as 12 is told again as 9",
    ),
    Mutant(
        "redis_store/open.lua",
        "if tonumber(start) > newest_reported() then",
        "if tonumber(start) >= newest_reported() then",
        (f"{EDGES}::test_a_window_that_is_reported_is_not_opened_again",),
        "ids are stored in a window that was told",
    ),
    Mutant(
        "redis_store/open.lua",
        "  redis.call('EXPIRE', INDEX, KEEP)\n",
        "",
        (
            f"{REDIS}::test_windows_are_told_by_every_instance_and_once_in_the_stream",
            f"{LOSS}::test_all_that_is_brought_back_expires",
        ),
        "the index never expires",
    ),
    Mutant(
        "redis_store/hold.lua",
        "if holder and holder ~= ARGV[1] then",
        "if holder then",
        (f"{EDGES}::test_the_lease_is_kept_by_who_holds_it_and_given_up_by_nobody_else",),
        "the lease is not renewed, and taken from a living holder",
    ),
    Mutant(
        "redis_store/release.lua",
        "redis.call('GET', KEYS[1]) == ARGV[1] and ",
        "",
        (f"{EDGES}::test_the_lease_is_kept_by_who_holds_it_and_given_up_by_nobody_else",),
        "the lease is given up by one who does not hold it",
    ),
    Mutant(
        "redis_store/count.lua",
        "  replies[#replies + 1] = redis.call('SCARD', KEYS[1])",
        "  replies[#replies + 1] = redis.call('SCARD', KEYS[1]) + 1",
        ("tests/test_callbacks.py::test_one_for_each_new_id",),
        "a callback tells a count that is one too high",
    ),
    # redis_store/*.py
    Mutant(
        "redis_store/advice.py",
        'LINK_ERRORS = ("READONLY", ',
        "LINK_ERRORS = (",
        (f"{FAILOVER}::test_a_primary_that_was_demoted_is_left_for_the_new_one",),
        "every id is refused after a failover",
    ),
    Mutant(
        "redis_store/advice.py",
        '.partition(", with args beginning with")[0]',
        "",
        ("tests/test_redis_program.py::test_what_redis_repeats_of_a_command_is_not_logged",),
        "a password is logged",
    ),
    Mutant(
        "redis_store/alone.py",
        "        if mark != self.mark:\n",
        "        if not mark:\n",
        (f"{FAILOVER}::test_databases_that_change_places_within_one_window",),
        "another mark behind a link that stands is not noticed before the window's end",
    ),
    Mutant(
        "redis_store/node.py",
        "    return PROBE + timeout + RETRY[1] + RECONNECT",
        "    return RETRY[1] + RECONNECT",
        (f"{FAILOVER}::test_a_silent_link_beside_one_that_was_reset",),
        "windows are closed before a silent link was noticed",
    ),
    Mutant(
        "redis_store/node.py",
        "            await asyncio.wait([closed], timeout=PROBE)\n",
        "            await asyncio.wait([closed])\n",
        (f"{FAILOVER}::test_a_link_that_falls_silent_is_noticed_though_nobody_asks",),
        "a link that fell silent is not noticed while nobody asks",
    ),
    Mutant(
        "redis_store/alone.py",
        "        self._part.seen = self.mark\n",
        '        self._part.seen = b""\n',
        (f"{FAILOVER}::test_a_failback_to_a_server_that_lived_on", f"{STOP}::test_a_stop_soon_after_redis_was_emptied"),
        "a failback loses what was stored elsewhere",
    ),
    Mutant(
        "redis_store/node.py",
        "            delay = min(2 * delay, RETRY[1])",
        "            delay = 0.0",
        ("tests/test_redis_program.py::test_a_link_that_comes_and_goes_does_not_flood_the_log",),
        "a Redis that is away is asked without a pause",
    ),
    Mutant(
        "redis_store/replay.py",
        "                            wanted.discard(part.number)\n                            continue\n",
        "                            pass\n",
        (f"{REPORTS}::test_a_window_is_not_reported_again_by_one_who_was_cut_off",),
        "who holds ids of a window that is closed is not back before all have settled",
    ),
    Mutant(
        "redis_store/replay.py",
        'code_of(reply) not in ("OOM", "WRONGTYPE")',
        'code_of(reply) not in ("WRONGTYPE",)',
        (f"{MEMORY}::test_full_memory_and_a_cut_of_all_links",),
        "full memory and a broken link: an outage that never ends",
    ),
    Mutant(
        "redis_store/replay.py",
        "if not found]",
        "if found]",
        (f"{MEMORY}::test_full_memory_and_a_cut_of_all_links",),
        "ids that are there are known as missing",
    ),
    Mutant(
        "redis_store/held.py",
        "        self.missing.setdefault((window, part), []).extend(numbers)",
        "        self.missing.setdefault((window, part), [])",
        (f"{MEMORY}::test_ids_that_never_find_memory_are_told_as_missing",),
        "a count lacks ids without a word",
    ),
    Mutant(
        "redis_store/held.py",
        "        if self.count or self.flying:",
        "        if self.count:",
        (f"{LINK}::test_a_batch_under_way_over_the_end_of_its_window_is_brought_back",),
        "a batch on its way over the end is lost with Redis's data",
    ),
    Mutant(
        "redis_store/held.py",
        "        yield from [(window, kept.ids) for window, kept in sorted(self.past.items())]\n",
        "        yield from [(window, ids) for window, (ids, _) in sorted(self.past.items())[-1:]]\n",
        (f"{LOSS}::test_several_windows_that_wait_are_all_brought_back",),
        "of the windows that wait only the newest is brought back",
    ),
    Mutant(
        "redis_store/batches.py",
        "        if len(numbers) >= MAX_WAITING:\n            return BUSY\n        numbers",
        "        if len(numbers) > MAX_WAITING:\n            return BUSY\n        numbers",
        (f"{REDIS}::test_as_many_ids_may_wait_as_allowed_and_no_more",),
        "one id more waits than is allowed",
    ),
    Mutant(
        "redis_store/batches.py",
        "        if not numbers and not waiting.counted:\n            waiting.since",
        "        if not numbers or counted is not None:\n            waiting.since",
        (f"{EDGES}::test_ids_with_an_endpoint_do_not_make_those_before_wait_longer",),
        "ids wait for 1.8 s at a time-out of 1 s",
    ),
    Mutant(
        "redis_store/batches.py",
        "                tell(batch.window, count)",
        "                tell(self._windows.turn(), count)",
        ("tests/test_callbacks.py::test_a_callback_names_the_window_that_its_id_is_in_though_that_has_ended",),
        "a callback names the wrong window",
    ),
    Mutant(
        "redis_store/batches.py",
        "        if self._reopening is None:\n",
        "        if True:\n",
        (f"{IN_REDIS}::test_a_batch_that_comes_too_late_is_stored_in_the_open_window", MODEL),
        "two rolls at once for late batches",
        "the second finds nothing left to store, or its share",
    ),
    Mutant(
        "redis_store/windows.py",
        "-(-self._resume // seconds) * seconds or opened)",
        "opened)",
        (f"{EDGES}::test_a_successor_tells_the_empty_windows_since_its_predecessor",),
        "a worker's successor leaves out empty windows",
    ),
    Mutant(
        "redis_store/windows.py",
        "self.reported_until = self.first = self._resume or newest + 1",
        "self.reported_until = self.first = self._resume or opened + 1",
        (f"{EDGES}::test_the_webhook_begins_with_the_window_that_is_open_when_it_is_first_configured", IN_REDIS),
        "the webhook begins a window late",
    ),
    Mutant(
        "redis_store/windows.py",
        '                self._home.mark = b""\n',
        "",
        (f"{STOP}::test_a_stop_that_knows_of_a_loss_and_can_not_mend_it_says_so",),
        "a stop that knows of a loss exits with 0",
    ),
    Mutant(
        "redis_store/windows.py",
        "        if barred != self.barred:\n",
        "        if barred:\n",
        (f"{REPORTS}::test_an_entry_with_a_later_id_holds_the_reports_back",),
        "the log is flooded while a report can't be made",
    ),
    Mutant(
        "redis_store/wire.py",
        "    if depth == MAX_DEPTH:\n",
        "    if depth == 10**9:\n",
        (WIRE,),
        "a reply nested without end is a RecursionError",
    ),
    Mutant(
        "redis_store/scripts.py",
        '(("EXPIRE", key, self.keep), ("EXEC",))',
        '(("EXISTS", key), ("EXEC",))',
        (f"{LOSS}::test_all_that_is_brought_back_expires",),
        "sets never expire",
    ),
    Mutant(
        "redis_store/outbox.py",
        "1000 * self._store.first - 1)",
        "1000 * self._store.first)",
        (f"{EDGES}::test_the_webhook_begins_with_the_window_that_is_open_when_it_is_first_configured",),
        "the webhook begins a window late",
    ),
]
