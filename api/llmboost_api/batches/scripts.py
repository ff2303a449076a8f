"""The scripts of `holding`. All but `CLAIM` begin by asking whether whoever calls them still holds the batch:
`KEYS[1]` is its hash, `ARGV[1]` the holder and `ARGV[2]` the attempt."""

from llmboost.lua import ENQUEUE_ARQ, NOW, Script
from llmboost_api.files.catalogue import PUBLISH_FILE

CLAIM = Script(
    NOW
    + """
local holder, lease, count, batches = unpack(ARGV)
local taken = {}
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], '-inf', now, 'BYSCORE', 'LIMIT', 0, count)) do
  local batch = batches .. id
  redis.call('ZADD', KEYS[1], now + lease, id)
  redis.call('HSET', batch, 'holder', holder)
  taken[#taken + 1] = {id, redis.call('HINCRBY', batch, 'attempt', 1)}
  -- The hash of a batch that has expired has just come back.
  if redis.call('PTTL', batch) < 0 then redis.call('PEXPIRE', batch, 3600000) end
end
return taken
"""
)

MINE = (
    NOW
    + """
local batch = KEYS[1]
local held_by, held_attempt = unpack(redis.call('HMGET', batch, 'holder', 'attempt'))
if held_by ~= ARGV[1] or held_attempt ~= ARGV[2] then return false end
local seconds = math.floor(now / 1000)
"""
)
"""Lua prelude: ends here, with nil, unless the holder holds the batch."""

RENEW = Script(
    MINE
    + """
redis.call('ZADD', KEYS[2], 'XX', now + ARGV[4], ARGV[3])
return redis.call('HGET', batch, 'status') or ''
"""
)

RELEASE = Script(
    MINE
    + """
redis.call('HSET', batch, 'holder', '')
redis.call('ZADD', KEYS[2], 'XX', now + ARGV[4], ARGV[3])
return 1
"""
)

BEGIN = Script(
    MINE
    + """
redis.call('HSET', batch, 'total', ARGV[3])
redis.call('HSETNX', batch, 'in_progress_at', seconds)
if ARGV[4] ~= '' then redis.call('HSET', batch, 'model', ARGV[4]) end
if redis.call('HGET', batch, 'status') == 'validating' then
  redis.call('HSET', batch, 'status', 'in_progress')
end
return 1
"""
)

LINES_DONE = Script(MINE + "return redis.call('GET', KEYS[2]) or ''")

COMMIT = Script(
    MINE
    + """
local lines, parts = KEYS[2], KEYS[3]
local each = {'completed', 'failed', 'expired', 'prompt_tokens', 'completion_tokens', 'cached_tokens'}
local first_part, first_line = 4 + #each, 4 + #each + ARGV[3]
if redis.call('ZSCORE', parts, ARGV[first_part]) then return 1 end
for i = first_part, first_line - 1 do redis.call('ZADD', parts, redis.call('ZCARD', parts), ARGV[i]) end
for i = first_line, #ARGV do redis.call('SETBIT', lines, ARGV[i] - 1, 1) end
for i, field in ipairs(each) do redis.call('HINCRBY', batch, field, ARGV[3 + i]) end
local ttl = redis.call('PTTL', batch)
redis.call('PEXPIRE', lines, ttl)
redis.call('PEXPIRE', parts, ttl)
return 1
"""
)

FINALIZE = Script(
    MINE
    + """
local get = function(field) return tonumber(redis.call('HGET', batch, field) or 0) end
local status = redis.call('HGET', batch, 'status')
if get('completed') + get('failed') < get('total') then return 'incomplete' end
if status == 'cancelling' then return 'cancelled' end
redis.call('HSET', batch, 'status', 'finalizing')
redis.call('HSETNX', batch, 'finalizing_at', seconds)
return get('expired') > 0 and 'expired' or 'completed'
"""
)

FINISH = Script(
    PUBLISH_FILE
    + MINE
    + ENQUEUE_ARQ
    + """
local status, ttl, errors, files = unpack(ARGV, 3, 6)
if redis.call('HGET', batch, 'status') == status then return 1 end
redis.call('HSET', batch, 'status', status, status .. '_at', seconds)
if errors ~= '' then redis.call('HSET', batch, 'errors', errors) end
for i = 0, files - 1 do
  local k, a = 2 + 3 * i, 7 + 5 * i
  redis.call('HSET', batch, ARGV[a], ARGV[a + 1])
  publish_file(KEYS[k], KEYS[k + 1], KEYS[k + 2], unpack(ARGV, a + 1, a + 4))
end
redis.call('PEXPIRE', batch, ttl)
local once = redis.call('HGET', batch, 'once')
if once then redis.call('PEXPIRE', once, ttl) end
local k, a = 2 + 3 * files, 7 + 5 * files
if KEYS[k] then enqueue_arq(KEYS[k], KEYS[k + 1], ARGV[a], ARGV[a + 1]) end
return 1
"""
)

FORGET = Script(
    MINE
    + """
redis.call('ZREM', KEYS[2], ARGV[3])
redis.call('DEL', unpack(KEYS, 3))
if redis.call('HEXISTS', batch, 'record') == 0 then redis.call('DEL', batch) end
return 1
"""
)
