-- Said by each instance that arrives while a server settles: what it knows of reports that may be lost.
--
-- KEYS: common.lua. ARGV from 3 on: the start before which all windows are reported; then pairs of a report's start and
-- member ("NAME SECONDS COUNT"). Returns 1.
--
-- The stream is built from them, in order, by the first ROLL after the server has settled: an entry that were added at
-- once would keep out all older ones that others still bring.

local reported = tonumber(ARGV[3]) - 1
if reported > newest_reported() then
  redis.call('SET', REPORTED, string.format('%d', reported), 'EX', KEEP)
end
for i = 4, #ARGV, 2 do
  redis.call('ZADD', RETURNED, ARGV[i], ARGV[i + 1])
end
redis.call('EXPIRE', RETURNED, KEEP)
return 1
