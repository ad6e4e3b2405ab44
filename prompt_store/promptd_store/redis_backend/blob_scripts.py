"""The atomic steps of blobs, in Lua; their keys are told in `scripts`."""

from __future__ import annotations

from promptd_store.blobs import QUARANTINE_SECONDS
from promptd_store.redis_backend.scripts import CLOCK, TOMBSTONES, Script

_BLOB = (
    CLOCK
    + f"local function erased() return redis.call('EXISTS', {TOMBSTONES} .. ARGV[2]) == 1 end"
    + """
local index, hex = p .. 'blobs:' .. ARGV[2], ARGV[3]
local blob = p .. 'blob:' .. ARGV[2] .. ':' .. hex
local function entry()
  local stored = redis.call('HGET', index, hex)
  if not stored then return end
  return string.match(stored, '^(%d+) (%d+) (.*)$')
end
local function enter(size, place)
  redis.call('HSET', index, hex, whole(now()) .. ' ' .. size .. ' ' .. place)
end
"""
)

# ARGV: prefix, tenant, hex, bytes. Answers the place of other bytes that these replace; nothing for an erased tenant.
PUT_BLOB = Script(
    _BLOB
    + """
if erased() then return false end
local _, _, place = entry()
redis.call('SET', blob, ARGV[4])
enter(#ARGV[4], '')
return place or ''
"""
)

# ARGV: prefix, tenant, hex, size, place of the bytes outside. Answers the place that it replaces, or nothing as above.
PLACE_BLOB = Script(
    _BLOB
    + """
if erased() then return false end
local _, _, place = entry()
redis.call('DEL', blob)
enter(ARGV[4], ARGV[5])
return place or ''
"""
)

# ARGV: prefix, tenant, hex, place. Answers 1 where the blob is still there, and now younger.
RENEW_BLOB = Script(
    _BLOB
    + """
local _, size, place = entry()
if place ~= ARGV[4] then return 0 end
enter(size, place)
return 1
"""
)

# ARGV: prefix, tenant, hex. Answers nothing, or the place and the bytes that lie here.
GET_BLOB = Script(
    _BLOB
    + """
local _, _, place = entry()
if not place then return false end
return {place, redis.call('GET', blob) or false}
""",
    writes=False,
)

# ARGV: prefix, tenant, hex, least age in microseconds, when it was last put (or empty). Answers the place of what was
# deleted.
DELETE_BLOB = Script(
    _BLOB
    + """
local put_at, _, place = entry()
if not place or now() - tonumber(put_at) < tonumber(ARGV[4]) then return false end
if ARGV[5] ~= '' and ARGV[5] ~= put_at then return false end
redis.call('HDEL', index, hex)
redis.call('DEL', blob)
redis.call('INCR', p .. 'deleted')
return place
"""
)

# ARGV: prefix, tenant, hex, place, sha1 of the corrupt bytes. Sets aside what lies here, unless it was replaced since.
QUARANTINE_BLOB = Script(
    _BLOB
    + f"""
local _, _, place = entry()
if place ~= ARGV[4] then return 0 end
if place == '' then
  local data = redis.call('GET', blob)
  if data and redis.sha1hex(data) ~= ARGV[5] then return 0 end
  if data then
    local aside = p .. 'quarantine:' .. ARGV[2] .. ':' .. hex .. ':' .. whole(now())
    redis.call('RENAME', blob, aside)
    redis.call('EXPIRE', aside, {round(QUARANTINE_SECONDS)})
  end
end
redis.call('HDEL', index, hex)
return 1
"""
)

# KEYS: place. ARGV: a mark, for the first who comes. Answers the store's mark, behind `pending` while it is left there.
PLACE = Script(
    """
redis.call('SET', KEYS[1], 'pending ' .. ARGV[1], 'NX')
return redis.call('GET', KEYS[1])
"""
)

# KEYS: place. ARGV: the mark, which is there now.
SETTLE = Script("return redis.call('SET', KEYS[1], ARGV[1])")
