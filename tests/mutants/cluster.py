"""Mutants of the store on a cluster: redis_store/ and its scripts."""

from mutants import Mutant

MODEL = "tests/test_cluster_model.py"
ADDRESSES = "tests/test_cluster_addresses.py"
REPORTS = "tests/test_redis_reports.py"

MUTANTS = [
    # close.lua
    Mutant(
        "redis_store/close.lua",
        "if redis.call('GET', MARK) ~= ARGV[2] then",
        "if false then",
        (f"{MODEL}::test_a_part_that_was_flushed_is_not_closed_by_who_holds_nothing_of_it",),
        "a part that lost its ids unseen is closed without them",
    ),
    Mutant(
        "redis_store/close.lua",
        "if number(SETTLING) > now then",
        "if false then",
        (f"{MODEL}::test_a_part_is_not_closed_while_it_settles",),
        "a part is closed before all have brought their ids back",
    ),
    Mutant(
        "redis_store/close.lua",
        "if count < held or (kind == 'set' and",
        "if (kind == 'set' and",
        (f"{MODEL}::test_a_set_that_is_deleted_by_hand",),
        "ids that were deleted by hand are not counted",
    ),
    Mutant(
        "redis_store/close.lua",
        "or (kind == 'set' and redis.call('TTL', set) == -1) then",
        "then",
        (f"{MODEL}::test_a_set_that_is_deleted_by_hand",),
        "a set that was deleted and begun anew is counted as it is",
    ),
    Mutant(
        "redis_store/close.lua",
        "redis.call('SET', set, 'closed ' .. count, 'EX', KEEP)\n",
        "",
        (MODEL,),
        "ids are taken in a window that is closed, and are not counted",
    ),
    # closing.lua
    Mutant(
        "redis_store/closing.lua",
        "for _, start in ipairs({open, open + length}) do",
        "for _, start in ipairs({open}) do",
        (f"{MODEL}::test_home_is_away_over_the_end_of_a_window",),
        "a window that holds ids is not known at home",
    ),
    Mutant(
        "redis_store/closing.lua",
        "local put, left, bar = put_back(entries, limit, last)",
        "local put, left, bar = 0, 0, ''",
        (MODEL,),
        "reports that were brought are not put back",
    ),
    # report.lua
    Mutant(
        "redis_store/report.lua",
        "redis.call('HSETNX', COUNTS,",
        "redis.call('HSET', COUNTS,",
        (f"{MODEL}::test_a_count_stands_though_its_part_is_lost_before_the_window_is_reported",),
        "a count that was brought is changed by who comes later",
    ),
    Mutant(
        "redis_store/report.lua",
        "if redis.call('HLEN', COUNTS) < parts or",
        "if redis.call('HLEN', COUNTS) < parts - 1 or",
        (MODEL,),
        "a window is reported without one of its parts",
    ),
    Mutant(
        "redis_store/report.lua",
        "local told = total > 0 or redis.call('ZCOUNT', INDEX, start, start) > 0",
        "local told = true",
        (f"{MODEL}::test_a_window_that_was_opened_and_that_nobody_lived_through_is_not_told",),
        "a window that nobody lived through is reported",
    ),
    Mutant(
        "redis_store/report.lua",
        "local told = total > 0 or redis.call('ZCOUNT', INDEX, start, start) > 0",
        "local told = total > 0",
        (MODEL,),
        "empty windows are not reported",
    ),
    # mark.lua
    Mutant(
        "redis_store/mark.lua",
        "  local other = not mark or string.match(mark, '^%S+') ~= run_id",
        "  local other = not mark",
        (MODEL,),
        "a replica that lagged and was promoted closes without what it missed",
    ),
    # closing.py
    Mutant(
        "redis_store/closing.py",
        "        if window > self._open + seconds:",
        "        if window > self._open:",
        (f"{MODEL}::test_home_is_away_over_the_end_of_a_window",),
        "all ids fail when home is away over the end of a window",
    ),
    Mutant(
        "redis_store/closing.py",
        "        if window > self._open + seconds:\n            return 0  # home has not opened it\n",
        "",
        (f"{MODEL}::test_home_is_away_over_the_end_of_a_window",),
        "ids are stored in a window that home does not know",
    ),
    Mutant(
        "redis_store/closing.py",
        "str(self._held.of(start, part.number)))",
        '"0")',
        (f"{MODEL}::test_a_set_that_is_deleted_by_hand",),
        "ids that were deleted by hand are not counted",
    ),
    # member.py
    Mutant(
        "redis_store/member.py",
        "        return replies, isinstance(kept, int) and kept > 0",
        "        return replies, True",
        (f"{MODEL}::test_a_count_of_a_stale_primary_is_not_taken",),
        "a primary that was replaced closes a part, and what its replica stored is not counted",
    ),
    Mutant(
        "redis_store/member.py",
        '        if f"run_id:{self._run_id}".encode() not in info.split():',
        "        if False:",
        (f"{MODEL}::test_a_roll_does_not_reach_a_server_that_took_the_place_of_home",),
        "a server that lost its data closes windows before anybody has arrived there",
    ),
    Mutant(
        "redis_store/member.py",
        "        if self.hosts_home:\n            self._home.lose()\n        if self._keeping",
        "        if self._keeping",
        (f"{MODEL}::test_home_that_restarts_with_an_older_stream_is_told_what_it_had",),
        "home that restarts with old data is not told the reports that it lacks",
    ),
    Mutant(
        "redis_store/member.py",
        "        waiting = [part for part in self.parts if part.batches is None]\n        if not waiting:",
        "        waiting = [part for part in self.parts if part.batches is None]\n        if not waiting or not self._home.reachable:",
        (f"{MODEL}::test_who_cannot_reach_home_is_waited_for",),
        "a part is closed before an instance that can't reach home has brought its ids",
    ),
    Mutant(
        "redis_store/member.py",
        '            elif mark != part.mark:\n                part.mark = mark or b""\n                self.lose(part)\n                lost += 1',
        "            elif mark != part.mark:\n                lost += 1",
        (f"{MODEL}::test_who_cannot_reach_home_is_waited_for",),
        "ids that were flushed are not brought back",
    ),
    Mutant(
        "redis_store/member.py",
        "        if not (self.replicas or self._followers):",
        "        if not self.replicas:",
        (f"{ADDRESSES}::test_windows_are_closed_over_tls_when_a_replica_has_acknowledged",),
        "on a young cluster no replica acknowledges a window's end",
    ),
    Mutant(
        "redis_store/member.py",
        "wire = await connect(self.own, self._allowed)",
        "wire = await connect(Address(self.own.host, self.own.port, password=self.own.password), self._allowed)",
        (f"{ADDRESSES}::test_windows_are_closed_over_tls_when_a_replica_has_acknowledged",),
        "no window is closed over TLS where nodes have replicas",
    ),
    # home.py
    Mutant(
        "redis_store/home.py",
        '        elif self.reachable and mark != self.mark:\n            self.mark = mark or b""\n            self.lose()',
        "        elif self.reachable and mark != self.mark:\n            pass",
        (MODEL,),
        "reports that were flushed are not brought back before a window is closed",
    ),
    # cluster.py
    Mutant(
        "redis_store/cluster.py",
        "if looked and not self.away and not self.lost and self.home.reachable:",
        "if looked and not self.away and not self.lost:",
        (f"{MODEL}::test_who_stops_waits_until_home_knows_its_windows_again",),
        "who stops leaves windows behind that home does not know",
    ),
    Mutant(
        "redis_store/cluster.py",
        "if looked and not self.away and not self.lost and self.home.reachable:",
        "if not self.away and not self.lost and self.home.reachable:",
        (f"{MODEL}::test_who_stops_does_not_take_a_silent_link_for_a_good_one",),
        "who stops takes a silent link for a good one, and ids are lost",
    ),
    Mutant(
        "redis_store/cluster.py",
        "                replies[place] = reply if kept or isinstance(reply, redis.ResponseError) else None",
        "                replies[place] = reply",
        (f"{MODEL}::test_a_count_of_a_stale_primary_is_not_taken",),
        "a count is taken that a primary has forgotten as it was replaced",
    ),
    Mutant(
        "redis_store/cluster.py",
        "        if before is not None:\n            before.drop(part)\n",
        "",
        (f"{MODEL}::test_a_count_of_a_stale_primary_is_not_taken",),
        "ids of a part that moved go on to the node that had it",
    ),
    # batches.py
    Mutant(
        "redis_store/batches.py",
        "            not isinstance(reply, redis.ResponseError) and part.batches is self\n",
        "            not isinstance(reply, redis.ResponseError)\n",
        (f"{MODEL}::test_what_an_old_primary_says_of_an_id_is_not_believed_once_its_part_is_elsewhere",),
        "an id is acknowledged by a node that lost its part meanwhile",
    ),
    Mutant(
        "redis_store/batches.py",
        "        elif kind in NOT_EXECUTED and self._counting.moved is not None:",
        "        elif False:",
        (f"{MODEL}::test_an_id_whose_slot_moves_is_sent_again",),
        "ids fail whenever a slot is moved",
    ),
    Mutant(
        "redis_store/batches.py",
        "        if self._loop.time() >= batch.deadline:\n            self._end(batch, DOWN)\n        elif part.batches is None:",
        "        if part.batches is None:",
        (f"{MODEL}::test_an_id_whose_slot_moves_to_a_node_that_is_away_fails_in_time",),
        "an id whose part is away is answered late",
    ),
    # windows.py
    Mutant(
        "redis_store/windows.py",
        "        while not self._recalled:",
        "        while False:",
        (f"{REPORTS}::test_reports_are_put_back_by_who_was_started_after_them",),
        "reports that are older than all instances are lost for good",
    ),
    # replay.py
    Mutant(
        "redis_store/replay.py",
        "            wanted = {part.number for part in arrived}  # without those in which the window is closed",
        "            wanted = {part.number for part in self._parts}",
        (f"{MODEL}::test_a_part_waits_for_who_comes_back_late_after_a_failover_that_lost_its_ids",),
        "ids are brought to a part that is not arrived at",
    ),
    # slots.py
    Mutant(
        "redis_store/slots.py",
        '(named or announced or b"").decode() or asked.host',
        '(announced or named or b"").decode() or asked.host',
        (ADDRESSES,),
        "TLS fails where certificates are for host names",
    ),
    Mutant(
        "redis_store/slots.py",
        '"" if host == "?" else host',
        "host",
        (ADDRESSES,),
        "a node without an address is looked for at `?`",
    ),
    Mutant(
        "redis_store/slots.py",
        "    return (host or asked.host, int(port)) if",
        "    return (host, int(port)) if",
        (ADDRESSES,),
        "a redirection that names no host leads nowhere",
    ),
]
