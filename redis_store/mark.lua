-- The mark of a server, or of a part of a cluster, and the settling after a possible loss of data.
--
-- KEYS, ARGV: common.lua or part.lua, behind which this text stands. Returns nothing.

-- Note that data may have been lost on the server `run_id`; return the new mark.
local function begin_to_settle(run_id, patience)
  local mark = run_id .. string.format(' %.6f', now)
  redis.call('SET', MARK, mark, 'EX', KEEP)
  redis.call('SET', SETTLING, string.format('%.6f', now + patience), 'EX', KEEP)
  return mark
end

-- Take note of an instance that arrives: the server's run_id, the mark that the instance last saw or '', the fleet's
-- patience, and the seconds after a loss in which settling may be prolonged. Return the mark, and 1 if it settles.
--
-- A mark that is missing, of another server, or another than the one last seen is a possible loss of data. One that
-- settles just now is taken as it is: somebody else was here before, for the same reason.
local function arrive(run_id, seen, patience, most)
  local mark = redis.call('GET', MARK)
  local settles = number(SETTLING) >= now
  local other = not mark or string.match(mark, '^%S+') ~= run_id
  if other or (seen ~= '' and seen ~= mark and not settles) then
    mark = begin_to_settle(run_id, patience)
    settles = true
  elseif settles and now < tonumber(string.match(mark, '%S+$')) + most then
    redis.call('SET', SETTLING, string.format('%.6f', now + patience), 'EX', KEEP)
  end
  return mark, settles and 1 or 0
end
