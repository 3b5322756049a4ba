-- Begins to close what is over in a cluster, and opens the window of now and the one after it, by home's clock.
--
-- KEYS: common.lua; AHEAD, a sorted set of windows that are open though nobody may have lived through them, "START
-- SECONDS" by start; CLOSING, the start of the newest window that is being closed.
-- ARGV from 3 on: length of a window; how many windows to begin with at most; how many entries the stream keeps; the
-- mark of this connection; the seconds that this instance needs to come back after a loss; the start of the last window
-- that may be closed, or '+inf'; how many parts there are; the newest window that this instance knows is being closed,
-- or -1; then pairs of start and member ("NAME SECONDS"), for each window that it lived through and does not know to be
-- closed.
-- Returns what roll.lua does; and a list of START and SECONDS of windows that are to be counted, part by part, and then
-- reported, oldest first; SECONDS is 0 of one that has to wait, since somebody may still name it.

local AHEAD, CLOSING = KEYS[9], KEYS[10]
local length, limit, entries, mark = ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6]
if redis.call('GET', MARK) ~= mark then
  return redis.error_reply('LOST its data')
end
local agreed = length .. ' ' .. ARGV[9]
local other = redis.call('GET', LENGTH)
if other and other ~= agreed then
  return redis.error_reply('WINDOW ' .. other)
end
redis.call('SET', LENGTH, agreed, 'EX', AGREED)
local patience = agree_on_patience(tonumber(ARGV[7]))
local settles = number(SETTLING) > now
local last = newest_reported()
local begun = math.max(tonumber(redis.call('GET', CLOSING) or -1), tonumber(ARGV[10]), last)
local open = math.max(clock[1] - clock[1] % length, (math.floor(begun / length) + 1) * length)

local function answer(left, put, bar, closing)
  return {clock[1], clock[2], open, left, last, settles and 1 or 0, tostring(patience), put, bar, closing}
end

for _, start in ipairs({open, open + length}) do
  redis.call('ZADD', AHEAD, start, string.format('%d ', start) .. length)
end
redis.call('EXPIRE', AHEAD, KEEP)
for i = 11, #ARGV, 2 do
  if tonumber(ARGV[i]) > last and tonumber(ARGV[i]) < open then
    redis.call('ZADD', INDEX, ARGV[i], ARGV[i + 1])
  end
end
redis.call('EXPIRE', INDEX, KEEP)
if settles then
  return answer(0, 0, '', {})
end

local put, left, bar = put_back(entries, limit, last)
if left > 0 or bar ~= '' then
  return answer(left, put, bar, {})
end

redis.call('SET', CLOSING, string.format('%d', open - length), 'EX', KEEP)
local upto = ARGV[8] == '+inf' and '(' .. open or math.min(open - 1, ARGV[8])
local over, starts = {}, {}
for _, key in ipairs({INDEX, AHEAD}) do
  local found = redis.call('ZRANGEBYSCORE', key, '-inf', upto, 'WITHSCORES', 'LIMIT', 0, limit)
  for i = 1, #found, 2 do
    local start = found[i + 1]
    if tonumber(start) <= last then
      redis.call('ZREM', key, found[i])
    elseif not over[start] then
      -- Whoever lived through one that was opened ahead names it within a second after its end.
      local named = key == INDEX or now >= start + length + 1
      over[start] = named and string.match(found[i], '%d+$') or '0'
      starts[#starts + 1] = start
    end
  end
end
table.sort(starts, function(one, other) return tonumber(one) < tonumber(other) end)
local closing = {}
for i = 1, math.min(limit, #starts) do
  closing[#closing + 1] = starts[i]
  closing[#closing + 1] = over[starts[i]]
end
return answer(0, put, #starts > 0 and tonumber(starts[1]) <= top and starts[1] or '', closing)
