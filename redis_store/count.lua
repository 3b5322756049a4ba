-- Stores a batch in which somebody wants to be told the count with an id.
--
-- KEYS: the window's set. ARGV: how many ids are counted one by one, those ids, the other ids.
-- Returns how many were new, then of each of the first whether it was, and how many ids there are with it.
--
-- Nothing is stored if the first can't be. Redis 6.2 hides the kind of an error that it does not get through pcall;
-- `unpack` takes up to 7,999.

local rest = tonumber(ARGV[1]) + 2
local replies = {0}
for i = 2, rest - 1 do
  local new = redis.pcall('SADD', KEYS[1], ARGV[i])
  if type(new) == 'table' then
    return new
  end
  replies[1] = replies[1] + new
  replies[#replies + 1] = new
  replies[#replies + 1] = redis.call('SCARD', KEYS[1])
end
for i = rest, #ARGV, 5000 do
  replies[1] = replies[1] + redis.call('SADD', KEYS[1], unpack(ARGV, i, math.min(i + 4999, #ARGV)))
end
return replies
