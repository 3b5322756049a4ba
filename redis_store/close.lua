-- Closes a window's set in a part: counts it, and leaves the count in its place. Who comes later is told the same.
--
-- KEYS: part.lua, then the set. ARGV from 2 on: the mark that this instance knows; the fleet's patience; how many ids
-- it holds of this part in the window.
-- Returns the count, or -1 if the part settles.

local set, held = KEYS[3], tonumber(ARGV[4])
if redis.call('GET', MARK) ~= ARGV[2] then
  return redis.error_reply('LOST its data')
end
local kind = redis.call('TYPE', set).ok
if kind == 'string' then
  local count = string.match(redis.call('GET', set), '^closed (%d+)$')
  return count and tonumber(count) or redis.error_reply('WRONGTYPE a key of this window is no set')
end
if number(SETTLING) > now then
  return -1
end
local count = kind == 'set' and redis.call('SCARD', set) or 0
-- A set that was deleted or evicted, and perhaps begun anew: only the first batch of a connection gives it a time to
-- live.
if count < held or (kind == 'set' and redis.call('TTL', set) == -1) then
  redis.call('EXPIRE', set, KEEP) -- found once is enough
  begin_to_settle(string.match(ARGV[2], '^%S+'), tonumber(ARGV[3]))
  return redis.error_reply('LOST ids of a window')
end
redis.call('UNLINK', set)
redis.call('SET', set, 'closed ' .. count, 'EX', KEEP)
return count
