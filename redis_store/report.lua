-- Reports a window of a cluster, as soon as all parts' counts are there and no older window waits.
--
-- KEYS: common.lua; AHEAD and CLOSING, as in closing.lua; COUNTS, a hash of the window's counts by part.
-- ARGV from 3 on: how many entries the stream keeps; the mark of this connection; how many parts there are; start, name
-- and length of the window; then pairs of part and count. Of a part's counts the first that is brought stands.
-- Returns 1 if the window is over and done with, else 0.

local AHEAD, COUNTS = KEYS[9], KEYS[11]
local parts, start = tonumber(ARGV[5]), ARGV[6]
if redis.call('GET', MARK) ~= ARGV[4] then
  return redis.error_reply('LOST its data')
end
if tonumber(start) <= newest_reported() then
  return 1
end
for i = 9, #ARGV, 2 do
  redis.call('HSETNX', COUNTS, ARGV[i], ARGV[i + 1])
end
redis.call('EXPIRE', COUNTS, KEEP)
local older = '(' .. start
if redis.call('HLEN', COUNTS) < parts or redis.call('ZCARD', RETURNED) > 0
  or redis.call('ZCOUNT', INDEX, '-inf', older) > 0 or redis.call('ZCOUNT', AHEAD, '-inf', older) > 0 then
  return 0
end
local total = 0
for _, count in ipairs(redis.call('HVALS', COUNTS)) do
  total = total + tonumber(count)
end
-- One that was opened ahead, and that nobody lived through, is not told if it holds nothing.
local told = total > 0 or redis.call('ZCOUNT', INDEX, start, start) > 0
if told and not report(ARGV[3], start, ARGV[7], ARGV[8], string.format('%d', total)) then
  return 0
end
redis.call('SET', REPORTED, start, 'EX', KEEP)
redis.call('ZREMRANGEBYSCORE', INDEX, start, start)
redis.call('ZREMRANGEBYSCORE', AHEAD, start, start)
redis.call('UNLINK', COUNTS)
return 1
