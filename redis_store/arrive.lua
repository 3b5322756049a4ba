-- The first thing said on a connection, and again with each chunk of ids that is brought back.
--
-- KEYS: common.lua. ARGV from 3 on: run_id of the server; the mark that this instance last saw, or ''; how many seconds
-- it needs to come back after a loss; the seconds after a loss in which settling may be prolonged.
-- Returns the mark, 1 if the server settles, and the fleet's patience.
--
-- A mark that is missing, of another server, or another than the one last seen is a possible loss of data. One that
-- settles just now is taken as it is: somebody else was here before, for the same reason.

local run_id, seen, most = ARGV[3], ARGV[4], tonumber(ARGV[6])
local patience = agree_on_patience(tonumber(ARGV[5]))
local mark = redis.call('GET', MARK)
local settles = number(SETTLING) >= now
local other = not mark or string.match(mark, '^%S+') ~= run_id
if other or (seen ~= '' and seen ~= mark and not settles) then
  mark = begin_to_settle(run_id, patience)
  settles = true
elseif settles and now < tonumber(string.match(mark, '%S+$')) + most then
  redis.call('SET', SETTLING, string.format('%.6f', now + patience), 'EX', KEEP)
end
return {mark, settles and 1 or 0, tostring(patience)}
