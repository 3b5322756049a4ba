-- Takes the webhook's lease, or keeps it.
--
-- KEYS: the lease. ARGV: token of the one who asks, milliseconds that the lease lasts.
-- Returns 1 if that one has it now, 0 if another does.

-- A write that can't take memory, so that the next one is let through when memory is full.
redis.call('UNLINK', KEYS[1] .. ':none')
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
