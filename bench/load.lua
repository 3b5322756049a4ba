-- The requests that wrk sends. Arguments: the first id, the share of new ids, requests in one write, and the path of
-- the two files with what follows the id, as users.py writes them.
--
-- wrk and this script share one core. A request is its line with the id and two prepared strings, joined: 0.6 us for
-- the twelve fields that differ, of the 6.4 us that wrk takes for a request in all. So wrk alone can do 155,000 a second
-- (2.3 GHz), little more than nginx on a core: run.py shows what wrk took, and says where nginx's core was not the limit.
local POOL = 1000 -- ids that duplicates are taken from
local count, fresh, depth, joined = 0, 1, 1, {}
local first, second, a, b = {}, {}, 0, 0

local function read(path)
  local file, texts = assert(io.open(path, "rb")), {}
  for text in file:read("*a"):gmatch("(%Z+)%z") do texts[#texts + 1] = text end
  file:close()
  return texts
end

init = function(arguments)
  count, fresh, depth = tonumber(arguments[1]), tonumber(arguments[2]), tonumber(arguments[3])
  first, second = read(arguments[4] .. ".first"), read(arguments[4] .. ".second")
end

local function one()
  count = count + 1
  a, b = a % #first + 1, b % #second + 1
  local id = (count % 10 < fresh * 10) and count or count % POOL
  return "GET /api/verve/accept?id=" .. id .. first[a] .. second[b]
end

request = function()
  if depth == 1 then return one() end
  for number = 1, depth do joined[number] = one() end
  return table.concat(joined)
end
