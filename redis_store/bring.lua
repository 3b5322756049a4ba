-- Said by each instance that arrives while a server settles: what it knows of reports that may be lost.
--
-- KEYS: common.lua. ARGV from 3 on: the start of the newest report that the instance knows of, or -1; then pairs of a
-- report's start and member ("NAME SECONDS COUNT"). Returns 1.
--
-- The stream is built from them, in order, by the first ROLL after the server has settled: an entry that was added at
-- once would keep out all older ones that others still bring.

if tonumber(ARGV[3]) > newest_reported() then
  redis.call('SET', REPORTED, ARGV[3], 'EX', KEEP)
end
for i = 4, #ARGV, 2 do
  redis.call('ZADD', RETURNED, ARGV[i], ARGV[i + 1])
end
redis.call('EXPIRE', RETURNED, KEEP)
return 1
