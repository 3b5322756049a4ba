-- Adding reports to the stream, in order.
--
-- KEYS, ARGV: common.lua, behind which this text stands. Returns nothing.

local top = top_of_stream()

-- Add a report; return whether it can be. `entries` is how many the stream keeps.
local function report(entries, start, name, seconds, count)
  if tonumber(start) <= top then
    return false
  end
  redis.call('XADD', STREAM, 'MAXLEN', '~', entries, start .. '000-0',
    'window', name, 'seconds', seconds, 'count', count)
  top = tonumber(start)
  return true
end

local function others_last()
  local entry = redis.call('XREVRANGE', STREAM, '+', '-', 'COUNT', 1)[1]
  return entry and entry[2][1] ~= 'window'
end

-- Put back up to `limit` reports that were brought. Return how many there were, how many are left, and the window whose
-- report an entry of the stream keeps out, or ''. `last` is the newest window that was reported.
local function put_back(entries, limit, last)
  local put = 0
  local returned = redis.call('ZRANGE', RETURNED, 0, limit - 1, 'WITHSCORES')
  for i = 1, #returned, 2 do
    local name, seconds, count = string.match(returned[i], '^(%S+) (%d+) (%d+)$')
    if report(entries, returned[i + 1], name, seconds, count) then
      put = put + 1
    elseif top > last or others_last() then
      return put, 0, returned[i + 1]
    end  -- else the stream has it, or had it and it was taken out
    redis.call('ZREM', RETURNED, returned[i])
  end
  return put, redis.call('ZCARD', RETURNED), ''
end
