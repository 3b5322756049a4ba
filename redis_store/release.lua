-- Gives the webhook's lease up.
--
-- KEYS: the lease. ARGV: token of the one who has it; who does not have it gives nothing up.
-- Returns 1 if it was given up.

return redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('DEL', KEYS[1]) or 0
