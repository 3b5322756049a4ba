-- Closes and reports the windows that are over, oldest first, by this server's clock.
--
-- KEYS: common.lua. ARGV from 3 on: prefix; length of a window; how many windows to close at most; how many entries the
-- stream keeps; the mark of this connection; the seconds that this instance needs to come back after a loss; the start
-- of the last window that may be closed, or '+inf'; then triples of start, member ("NAME SECONDS") and number of ids
-- held, for each window that the instance lived through and does not know to be closed. From them the fleet learns of
-- windows without ids.
-- Returns the server's time, seconds and microseconds; the open window's start; how many windows are to be closed, or
-- reports put back, by the next call; the start of the newest window that was reported before; whether nothing is
-- closed since the server settles; the fleet's patience; how many reports were put back; and the window whose report an
-- entry of the stream keeps out, or ''.

local prefix, length, limit, entries, mark = ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6], ARGV[7]
if redis.call('GET', MARK) ~= mark then
  return redis.error_reply('LOST its data')
end
local other = redis.call('GET', LENGTH)
if other and other ~= length then
  return redis.error_reply('WINDOW ' .. other)
end
redis.call('SET', LENGTH, length, 'EX', AGREED)
local patience = agree_on_patience(tonumber(ARGV[8]))
local settles = number(SETTLING) > now
local before = newest_reported()
local last = before
local open = math.max(clock[1] - clock[1] % length, (math.floor(last / length) + 1) * length)

local function key_of(start)
  return prefix .. ':{' .. start .. '}:ids'
end

local function answer(left, put, bar)
  return {clock[1], clock[2], open, left, before, settles and 1 or 0, tostring(patience), put, bar}
end

local upto = ARGV[9] == '+inf' and '(' .. open or math.min(open - 1, ARGV[9])
for i = 10, #ARGV, 3 do
  local start, member, held = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
  if tonumber(start) > last then
    -- A set that was deleted or evicted, and perhaps begun anew: only what goes with OPEN gives it a time to live.
    local key = key_of(start)
    local kind = redis.call('TYPE', key).ok
    local lost = kind == 'none' and held > 0
    if kind == 'set' then
      lost = redis.call('SCARD', key) < held or redis.call('TTL', key) == -1
    end
    if lost and not settles then
      redis.call('EXPIRE', key, KEEP) -- found once is enough
      begin_to_settle(string.match(mark, '^%S+'), patience)
      return redis.error_reply('LOST ids of a window')
    end
    if tonumber(start) < open then
      redis.call('ZADD', INDEX, start, member)
      redis.call('EXPIRE', INDEX, KEEP)
    end
  end
end
if settles then
  return answer(0, 0, '')
end

local put, left, bar = put_back(entries, limit, last)
if left > 0 or bar ~= '' then
  return answer(left, put, bar)
end

local over = redis.call('ZRANGEBYSCORE', INDEX, '-inf', upto, 'WITHSCORES', 'LIMIT', 0, limit)
for i = 1, #over, 2 do
  local name, seconds = string.match(over[i], '^(%S+) (%d+)$')
  local start = over[i + 1]
  local key = key_of(start)
  local kind = redis.call('TYPE', key).ok
  if tonumber(start) > last then
    local count = kind == 'set' and redis.call('SCARD', key) or 0
    if not report(entries, start, name, seconds, count) then
      return answer(0, put, start)
    end
    last = tonumber(start)
    redis.call('SET', REPORTED, start, 'EX', KEEP)
  end
  if kind == 'set' then
    redis.call('UNLINK', key)
  end
  if kind == 'set' or kind == 'none' then
    redis.call('SET', key, 'closed', 'EX', KEEP)
  end
  redis.call('ZREM', INDEX, over[i])
end
return answer(redis.call('ZCOUNT', INDEX, '-inf', upto), put, '')
