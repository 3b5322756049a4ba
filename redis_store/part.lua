-- What the scripts on a part of a cluster share. Each of them begins with this text.
--
-- KEYS 1 and 2 are the same for all of them:
--   MARK      "RUN_ID TIME": which server this is, and when it may have lost data of this part last
--   SETTLING  the time until which nothing of this part is closed
-- ARGV 1 is, too: seconds that keys are kept for as a last resort.

local MARK, SETTLING = KEYS[1], KEYS[2]
local KEEP = ARGV[1]

-- When memory is full, Redis lets a script write on only if its first write is one that can't take memory.
redis.call('EXPIRE', MARK, KEEP)

local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6

local function number(key)
  return tonumber(redis.call('GET', key) or 0) or 0
end
