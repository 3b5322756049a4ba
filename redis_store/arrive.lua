-- The first thing said on a connection to home, and again with each chunk of ids that is brought back.
--
-- KEYS: common.lua. ARGV from 3 on: run_id of the server; the mark that this instance last saw, or ''; how many seconds
-- it needs to come back after a loss; the seconds after a loss in which settling may be prolonged.
-- Returns the mark, 1 if the server settles, and the fleet's patience.

local patience = agree_on_patience(tonumber(ARGV[5]))
local mark, settles = arrive(ARGV[3], ARGV[4], patience, tonumber(ARGV[6]))
return {mark, settles, tostring(patience)}
