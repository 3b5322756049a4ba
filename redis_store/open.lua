-- Goes before the first ids that a connection stores in a window.
--
-- KEYS: common.lua, then the window's set. ARGV from 3 on: start and member ("NAME SECONDS") of the window. Returns 1.
--
-- Puts the window into the index, so that it is found again even if everybody dies. One that is not newer than the
-- newest report is closed instead, where it has no set: nobody would count what is stored in it.

local set, start, member = KEYS[9], ARGV[3], ARGV[4]
if tonumber(start) > newest_reported() then
  redis.call('ZADD', INDEX, start, member)
  redis.call('EXPIRE', INDEX, KEEP)
elseif redis.call('EXISTS', set) == 0 then
  redis.call('SET', set, 'closed', 'EX', KEEP)
end
return 1
