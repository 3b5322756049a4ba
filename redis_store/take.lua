-- The first thing said of a part to the node that it is on, and again with each chunk of ids that is brought back.
--
-- KEYS: part.lua. ARGV from 2 on: run_id of the server; the mark that this instance last saw of the part, or ''; the
-- fleet's patience; the seconds after a loss in which settling may be prolonged.
-- Returns the mark, and 1 if the part settles.

return {arrive(ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]))}
