"""The atomic steps, in Lua, of commands no newer than Redis 7.0. Redis runs one at a time: each leaves a whole state.

Those of blobs are in `blob_scripts`. Keys, behind the prefix: `tick` the newest number given; `record:<key>` etag,
newline, value; `records` all keys, for ranges; `log:<log>` a stream whose ids are seqs; `logs` all logs; `feed` a short
stream of what was appended where; `lease:<key>` a hash; `blob:<tenant>:<hex>` bytes; `blobs:<tenant>` a hash of what
there is; `done:<nonce>` the answer of a transaction, for a caller that never got it; `deleted` how much was deleted
since its files were rewritten; `place` the mark of the place where large blobs lie; `quarantine:…` corrupt bytes.

etags, seqs and lease epochs are ticks: microseconds of the server's clock, one more where that would not grow. So they
do not come back either where a failover has lost the newest writes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from promptd_store.names import ERASED, PUBLIC_TENANT

FEED_LENGTH = 10_000
DONE_SECONDS = 60
MOST_LOOKED_AT = 5000
"""Keys that a search passes before it lets others have their turn."""

TOMBSTONES = f"p .. 'record:{ERASED}'"


@dataclass(frozen=True)
class Script:
    """One atomic step; `writes` where its answer must wait for the replicas."""

    text: str
    writes: bool = True

    @cached_property
    def sha(self) -> str:
        """What EVALSHA names it by."""
        return hashlib.sha1(self.text.encode()).hexdigest()  # noqa: S324 - Redis' own naming


CLOCK = """
local p = ARGV[1]
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end
local function whole(number) return string.format('%.0f', number) end
"""

_TICK = (
    CLOCK
    + """
local function tick()
  local number = math.max(now(), tonumber(redis.call('GET', KEYS[1]) or '0') + 1)
  redis.call('SET', KEYS[1], whole(number))
  return whole(number)
end
"""
)

# ARGV: prefix, nonce, then how many of each, then: checks (kind, key, etag or owner, epoch; of a blob tenant, hex, -),
# adds (key, amount, key of the limit), deletes (key), puts (key, value), appends (log, payload). Answers ok, the etag
# and the seqs; or what was found instead.
TRANSACT = Script(
    _TICK
    + f"""
local done_key = p .. 'done:' .. ARGV[2]
local done = redis.call('GET', done_key)
if done then
  local answer = {{}}
  for word in string.gmatch(done, '%S+') do answer[#answer + 1] = word end
  return answer
end
local at, renewed = 8, {{}}
local function take() local value = ARGV[at] at = at + 1 return value end
for _ = 1, tonumber(ARGV[3]) do
  local kind, key, wanted, epoch = take(), take(), take(), take()
  if kind == 'lease' then
    local lease = redis.call('HMGET', p .. 'lease:' .. key, 'owner', 'epoch')
    if lease[1] ~= wanted or lease[2] ~= epoch then return {{'lost', key, wanted, epoch}} end
  elseif kind == 'blob' then
    local entry = redis.call('HGET', p .. 'blobs:' .. key, wanted)
    if not entry then return {{'blob', wanted}} end
    renewed[#renewed + 1] = {{p .. 'blobs:' .. key, wanted, whole(now()) .. string.match(entry, ' .*$')}}
  else
    local head = redis.call('GETRANGE', p .. 'record:' .. key, 0, 23)
    local etag = string.match(head, '^(%d+)\\n') or ''
    if etag ~= wanted then return {{'check', key, wanted, etag}} end
  end
end
local known = {{}}
local function erased(key)
  local tenant = string.match(key, '^{{([^}}]*)}}')
  if tenant and known[tenant] == nil then known[tenant] = redis.call('EXISTS', {TOMBSTONES} .. tenant) == 1 end
  return tenant and known[tenant] and tenant
end
local behind = at
local function find_erased(count, words)
  for i = 1, tonumber(count) do
    local tenant = words > 1 and erased(ARGV[behind + (i - 1) * words])
    if tenant then return tenant end
  end
  behind = behind + count * words
end
local gone = find_erased(ARGV[4], 3) or find_erased(ARGV[5], 1) or find_erased(ARGV[6], 2) or find_erased(ARGV[7], 2)
if gone then return {{'erased', gone}} end
local function number(key)
  local stored = redis.call('GET', p .. 'record:' .. key)
  return stored and tonumber(string.match(stored, '^%d+\\n(-?%d+)$'))
end
local function drop(key)
  redis.call('DEL', p .. 'record:' .. key)
  redis.call('ZREM', p .. 'records', key)
end
local sums = {{}}
for _ = 1, tonumber(ARGV[4]) do
  local key, amount, limit_key = take(), tonumber(take()), take()
  local held, limit = number(key) or 0, limit_key ~= '' and number(limit_key)
  if amount > 0 and limit and held + amount > limit then
    return {{'limit', key, whole(held), whole(amount), whole(limit)}}
  end
  sums[key] = held + amount
end
for _, blob in ipairs(renewed) do redis.call('HSET', blob[1], blob[2], blob[3]) end
local etag = tick()
local function put(key, value)
  redis.call('SET', p .. 'record:' .. key, etag .. '\\n' .. value)
  redis.call('ZADD', p .. 'records', 0, key)
end
local content = 0
for _ = 1, tonumber(ARGV[5]) do
  local key = take()
  drop(key)
  if not string.find(key, '{PUBLIC_TENANT}', 2, true) then content = content + 1 end
end
if content > 0 then redis.call('INCRBY', p .. 'deleted', content) end
for key, sum in pairs(sums) do
  if sum == 0 then drop(key) else put(key, whole(sum)) end
end
for _ = 1, tonumber(ARGV[6]) do put(take(), take()) end
local answer = {{'ok', etag}}
for _ = 1, tonumber(ARGV[7]) do
  local log, payload = take(), take()
  local seq = tick()
  redis.call('XADD', p .. 'log:' .. log, seq .. '-0', 'p', payload)
  redis.call('ZADD', p .. 'logs', 0, log)
  redis.call('XADD', p .. 'feed', 'MAXLEN', '~', {FEED_LENGTH}, seq .. '-0', 'l', log)
  answer[#answer + 1] = seq
end
redis.call('SET', done_key, table.concat(answer, ' '), 'EX', {DONE_SECONDS})
return answer
"""
)

# ARGV: prefix, lowest, highest, limit (as ZRANGEBYLEX takes them), lower-case characters that keys must have, and
# behind how many bytes. Answers the key to go on behind, empty at the end; then key, stored, key, stored …
SCAN = Script(
    f"""
local p, limit, wanted, from = ARGV[1], tonumber(ARGV[4]), ARGV[5], ARGV[6] + 1
local find, lower = string.find, string.lower
local most = wanted == '' and limit or {MOST_LOOKED_AT}
local keys = redis.call('ZRANGEBYLEX', p .. 'records', ARGV[2], ARGV[3], 'LIMIT', 0, most)
local answer = {{#keys == most and keys[most] or ''}}
for _, key in ipairs(keys) do
  if find(lower(key), wanted, from, true) then
    answer[#answer + 1] = key
    answer[#answer + 1] = redis.call('GET', p .. 'record:' .. key)
    if #answer > 2 * limit then
      answer[1] = key
      break
    end
  end
end
return answer
""",
    writes=False,
)

# ARGV: prefix, key, owner, ttl in microseconds, nonce. Answers epoch and expiry; nothing while another has it.
ACQUIRE = Script(
    _TICK
    + """
local key = p .. 'lease:' .. ARGV[2]
local lease = redis.call('HMGET', key, 'epoch', 'expires', 'nonce')
if lease[1] and tonumber(lease[2]) > now() then
  if lease[3] == ARGV[5] then return {lease[1], lease[2]} end
  return false
end
local epoch, expires = tick(), whole(now() + tonumber(ARGV[4]))
redis.call('HSET', key, 'owner', ARGV[3], 'epoch', epoch, 'expires', expires, 'nonce', ARGV[5])
return {epoch, expires}
"""
)

# ARGV: prefix, key, owner, epoch, ttl in microseconds. Answers the expiry; nothing where it is lost.
RENEW = Script(
    CLOCK
    + """
local key = p .. 'lease:' .. ARGV[2]
local lease = redis.call('HMGET', key, 'owner', 'epoch')
if lease[1] ~= ARGV[3] or lease[2] ~= ARGV[4] then return false end
local expires = whole(now() + tonumber(ARGV[5]))
redis.call('HSET', key, 'expires', expires)
return expires
"""
)

# ARGV: prefix, key, epoch. The hash may go: its epoch was a tick, which never comes back.
RELEASE = Script(
    """
local key = ARGV[1] .. 'lease:' .. ARGV[2]
if redis.call('HGET', key, 'epoch') == ARGV[3] then redis.call('DEL', key) end
return 1
"""
)

# ARGV: prefix, lowest, highest log, first seq, limit. Answers the newest number, then seq, log, payload …
READ_LOG = Script(
    """
local p = ARGV[1]
local answer = {redis.call('GET', KEYS[1]) or '0'}
for _, log in ipairs(redis.call('ZRANGEBYLEX', p .. 'logs', ARGV[2], ARGV[3])) do
  for _, entry in ipairs(redis.call('XRANGE', p .. 'log:' .. log, ARGV[4], '+', 'COUNT', ARGV[5])) do
    answer[#answer + 1] = string.match(entry[1], '^%d+')
    answer[#answer + 1] = log
    answer[#answer + 1] = entry[2][2]
  end
end
return answer
""",
    writes=False,
)

# ARGV: prefix, log, last seq or +, limit. Answers seq, payload …
READ_TAIL = Script(
    """
local answer = {}
for _, entry in ipairs(redis.call('XREVRANGE', ARGV[1] .. 'log:' .. ARGV[2], ARGV[3], '-', 'COUNT', ARGV[4])) do
  answer[#answer + 1] = string.match(entry[1], '^%d+')
  answer[#answer + 1] = entry[2][2]
end
return answer
""",
    writes=False,
)

# ARGV: prefix, log, first seq to keep. Answers how many went.
TRIM = Script(
    """
local p, log = ARGV[1], ARGV[2]
local num = redis.call('XTRIM', p .. 'log:' .. log, 'MINID', ARGV[3])
redis.call('INCRBY', p .. 'deleted', num)
if redis.call('XLEN', p .. 'log:' .. log) == 0 then
  redis.call('DEL', p .. 'log:' .. log)
  redis.call('ZREM', p .. 'logs', log)
end
return num
"""
)

# ARGV: prefix, lowest, highest key (as ZRANGEBYLEX takes them), limit. Answers how many records went.
ERASE_RECORDS = Script(
    """
local p = ARGV[1]
local keys = redis.call('ZRANGEBYLEX', p .. 'records', ARGV[2], ARGV[3], 'LIMIT', 0, ARGV[4])
for _, key in ipairs(keys) do
  redis.call('DEL', p .. 'record:' .. key)
  redis.call('ZREM', p .. 'records', key)
end
redis.call('INCRBY', p .. 'deleted', #keys)
return #keys
"""
)

# ARGV: prefix, lowest, highest log. Answers how many entries went.
ERASE_LOGS = Script(
    """
local p, num = ARGV[1], 0
for _, log in ipairs(redis.call('ZRANGEBYLEX', p .. 'logs', ARGV[2], ARGV[3])) do
  num = num + redis.call('XLEN', p .. 'log:' .. log)
  redis.call('DEL', p .. 'log:' .. log)
  redis.call('ZREM', p .. 'logs', log)
end
redis.call('INCRBY', p .. 'deleted', num)
return num
"""
)
