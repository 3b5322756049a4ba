-- What the scripts at home share: home is the server that has the eight keys below, the only one outside a cluster.
-- Each of them begins with this text.
--
-- KEYS 1 to 8 are the same for all of them:
--   INDEX     sorted set of windows that are not closed: "NAME SECONDS" by start
--   STREAM    the reports
--   REPORTED  start of the newest window that was ever reported, whether its entry still stands in the stream or not
--   MARK      "RUN_ID TIME": which server this is, and when it may have lost data last
--   SETTLING  the time until which nothing is closed
--   LENGTH    length of a window, seconds
--   PATIENCE  seconds for which a server settles after a loss: the most that any instance of the fleet needs
--   RETURNED  sorted set of reports that the stream may have lost: "NAME SECONDS COUNT" by start
-- ARGV 1 and 2 are, too: seconds that keys are kept for as a last resort, and those that an agreement holds for.

local INDEX, STREAM, REPORTED, MARK = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local SETTLING, LENGTH, PATIENCE, RETURNED = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local KEEP, AGREED = ARGV[1], ARGV[2]

-- When memory is full, Redis lets a script write on only if its first write is one that can't take memory.
redis.call('EXPIRE', MARK, KEEP)

local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6

local function number(key)
  return tonumber(redis.call('GET', key) or 0) or 0
end

-- The start of the newest window that was ever reported; -1 if there is none. The stream is looked at for the sake of
-- instances of version 1.0, which keep no REPORTED: its newest entry counts if it is a report and not of the future.
local function newest_reported()
  local newest = tonumber(redis.call('GET', REPORTED) or -1) or -1
  local entry = redis.call('XREVRANGE', STREAM, '+', '-', 'COUNT', 1)[1]
  if entry then
    local start = tonumber(string.match(entry[1], '^(%d+)000%-0$') or -1)
    if entry[2][1] == 'window' and start > newest and start <= now then
      return start
    end
  end
  return newest
end

-- The time in the greatest id that the stream ever had, in seconds; the next entry's has to be greater.
local function top_of_stream()
  if redis.call('EXISTS', STREAM) == 0 then
    return -1
  end
  local info = redis.call('XINFO', 'STREAM', STREAM)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then
      return tonumber(string.match(info[i + 1], '^%d+')) / 1000
    end
  end
end

-- Tell how many seconds this instance needs after a loss; return how many the fleet does.
local function agree_on_patience(mine)
  local agreed = number(PATIENCE)
  if mine >= agreed then
    redis.call('SET', PATIENCE, mine, 'EX', AGREED)
    return mine
  end
  return agreed
end
