"""The directory's Lua scripts. Redis 6.2 features only; each touches only the keys that it is given.

A family is one hash: page key -> names of the holders, one a line. It expires as a whole.
"""

LOOKUP = """
-- How long a leading run of pages each holder has.
-- KEYS[1]  the family's hash
-- ARGV[1]  page keys, 16 bytes each, end to end
-- ARGV[2]  milliseconds until a family that is found expires
-- returns  {holder, length, holder, length, ...}; every length is at least 1
local keys, count = ARGV[1], #ARGV[1] / 16
local runs = {}      -- finished: holder -> length
local alive = nil    -- holders that had every page so far; nil before the first
local depth, last = 0, nil
local sub = string.sub

-- Takes the next page's holders; false once nobody is left.
local function step(holders)
    if not holders then return false end
    local now = {}
    for holder in string.gmatch(holders, '[^\\n]+') do
        if alive == nil or alive[holder] then now[holder] = true end
    end
    for holder in pairs(alive or {}) do
        if not now[holder] then runs[holder] = depth end
    end
    alive, last = now, holders
    return next(now) ~= nil
end

local function walk()
    local size = 8  -- a miss at first costs little, a long run few calls
    while depth < count do
        local fields, n = {}, math.min(size, count - depth)
        for i = 1, n do
            local last_byte = (depth + i) * 16
            fields[i] = sub(keys, last_byte - 15, last_byte)
        end
        local found = redis.call('HMGET', KEYS[1], unpack(fields))
        for i = 1, n do
            local holders = found[i]
            -- As a rule, all pages of a run have the same holders.
            if holders ~= last and not step(holders) then return end
            depth = depth + 1
        end
        size = math.min(size * 4, 512)
    end
end

walk()
for holder in pairs(alive or {}) do runs[holder] = depth end
if depth > 0 then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
local flat = {}
for holder, length in pairs(runs) do
    flat[#flat + 1] = holder
    flat[#flat + 1] = length
end
return flat
"""

PUBLISH = """
-- Adds a holder to pages.
-- KEYS[1]  the family's hash
-- ARGV[1]  the holder
-- ARGV[2]  page keys, 16 bytes each, end to end
-- ARGV[3]  milliseconds until the family expires
local holder, keys = ARGV[1], ARGV[2]
for first = 1, #keys, 16 * 256 do  -- some at a time: Lua's stack is short
    local fields, changes = {}, {}
    for i = first, math.min(first + 16 * 255, #keys), 16 do
        fields[#fields + 1] = string.sub(keys, i, i + 15)
    end
    for i, holders in ipairs(redis.call('HMGET', KEYS[1], unpack(fields))) do
        local all = holder
        if holders and string.find('\\n' .. holders .. '\\n', '\\n' .. holder .. '\\n', 1, true) then
            all = nil
        elseif holders then
            all = holders .. '\\n' .. holder
        end
        if all then
            changes[#changes + 1] = fields[i]
            changes[#changes + 1] = all
        end
    end
    if #changes > 0 then redis.call('HSET', KEYS[1], unpack(changes)) end
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
"""

WITHDRAW = """
-- Takes a holder from pages.
-- KEYS[1]  the family's hash
-- ARGV[1]  the holder
-- ARGV[2]  page keys, 16 bytes each, end to end
local holder, keys = ARGV[1], ARGV[2]
for i = 1, #keys, 16 do
    local key = string.sub(keys, i, i + 15)
    local others = {}
    for other in string.gmatch(redis.call('HGET', KEYS[1], key) or '', '[^\\n]+') do
        if other ~= holder then others[#others + 1] = other end
    end
    if #others == 0 then
        redis.call('HDEL', KEYS[1], key)
    else
        redis.call('HSET', KEYS[1], key, table.concat(others, '\\n'))
    end
end
"""

RENEW = """
-- Registers a worker or renews its lease, and forgets those whose lease has ended.
-- KEYS[1]  hash: holder -> record
-- KEYS[2]  sorted set: holder -> end of its lease, milliseconds of Redis' own clock
-- ARGV[1]  the holder
-- ARGV[2]  its record
-- ARGV[3]  the lease in milliseconds
-- returns  1 if the holder had no lease, else 0
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, holder in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, 100)) do
    redis.call('HDEL', KEYS[1], holder)
    redis.call('ZREM', KEYS[2], holder)
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return redis.call('ZADD', KEYS[2], now + ARGV[3], ARGV[1])
"""

WORKERS = """
-- The records of the workers whose lease runs.
-- KEYS[1], KEYS[2]  as for RENEW
-- returns  {record, ...}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local records = {}
for _, holder in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. string.format('%.0f', now), '+inf')) do
    records[#records + 1] = redis.call('HGET', KEYS[1], holder)
end
return records
"""
