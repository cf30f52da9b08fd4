-- The ledger: every transition of a task's life, each one atomic call.
--
--   FCALL <library>_submit|<library>_call 1 <prefix> <operation> <stream length> <retention> [argument ...]
--
-- prefix: "{cell}:". Then the limits of whoever calls, then the operation's own arguments: their names and their order
-- are those of the function `ops.<operation>` below and nowhere else, for Python reads them off this file (`script.py`) and
-- calls by name. `-- each:` names what follows them, any number of times.
--
-- States: pending → dispatched → running → succeeded | failed | expired | rejected | cancelled. The last five are final.
-- Every operation checks the state it leaves, writes the state it enters, moves the task between the state sets and
-- appends the event, in this one call: there is no moment between these at which a crash could lose or double anything.
--
-- Data model (all keys begin with the prefix; its braces keep one cell's keys in one Redis Cluster slot):
--
--   task:<id>          hash    payload     the TaskSpec, JSON
--                              features    what the scheduler needs of it, JSON (a Submitted event less its times),
--                                          and `preview`, the start of the prompt for people
--                              state, submitted, deadline, window (the deadline as given, s), attempt, strikes, tenant
--                              key         the name below the prefix of its idempotency key, if it has one
--                              while placed: node, model, dispatched, claimed, token
--                              why         the last Explanation, JSON
--                              of a task by a Celery producer: celery, what Celery is to be told on the way, of the
--                              words `started`, `progress` and `followers`
--                              when final: finished; withdrawn, where its producer ended it
--   result:<id>        string  of a task that has ended: its Result, JSON. Not of one that its producer ended (cancelled,
--                              or expired while nobody was there to end it): that is told by the record
--   of:<tenant>        zset    the tenant's tasks by the time they were submitted
--   text:<id>          list    the text of a task submitted with `stream`, as it is generated: pieces, each
--                              "<attempt> <text>"; gone an hour after the last
--   bytes              hash    tenant → bytes its tasks take: payload, features, result (twice: Celery's copy) and
--                              about a kilobyte each for all the rest; of one without a result what its features say it
--                              will take (`result_bytes`), or a tenant could hand in more than there is room for
--   in:<state>         zset    the tasks in that state: a task is in exactly one of them. Scores:
--                              pending: its deadline; dispatched, running: when its lease ends; final: when it ended.
--                              The lease on what is dispatched ends with its deadline at the latest, that on what runs
--                              one lease after it: an engine stops itself at the deadline
--   node:<name>        hash    of a live node: info (NodeInfo, JSON), boot, queue, beat (last Heartbeat, JSON), draining;
--                              distrusted: why the scheduler sends it little
--   node:<name>:tasks  set     the tasks dispatched to or running on it
--   nodes              zset    live nodes by the time until which they count as alive
--   gone               hash    node that left or died → "<when> <its info>", for some: who had what is asked for now; the
--                              info of one that left begins with `left`
--   key:<tenant> <key> string  idempotency key → task id, kept for as long as the task
--   events             stream  what schedulers and workers caused. One field `e`: an Event, JSON; trimmed to about the
--                              length given
--   requests           stream  what producers caused, submissions, cancellations and ends of what was overdue, alike.
--                              Two streams, since who may write to one can write anything there
--   untold             hash    task its producer ended → its node or '': those whose node and Celery producer are still
--                              to be told
--   refused            hash    id of a message that became no task → what its Celery producer is still to be told
--   followers          hash    task → what its Celery producer wants to follow it (callbacks, the rest of a chain, a
--                              chord's body), JSON, until that was sent
--   to_follow          zset    tasks by Celery producers that have ended and have followers, or ended before they began,
--                              by when the inbox is told of them (again)
--   totals             hash    submitted, succeeded, failed, expired, rejected, cancelled, forgotten: ever
--   revoked            zset    ids revoked before they were submitted, by when that is forgotten
--   epoch, leader      string  the scheduler's fencing number, and who leads under it (expires)
--   snapshot           string  what the scheduler learned, JSON, with the stream position it stands for
--   metrics            string  the sums it keeps for `/metrics`, JSON: they name tenants
--   learned            string  what it learned of the nodes, JSON, for everybody
--   signal:<name>      channel a task id whose generation on that node must stop
--   signal:@inbox      channel something was added to to_follow
--   said:<id>          channel a piece was added to text:<id>
--   ended:<id>         channel the task has ended, in which state: for whoever waits. Not with its result, which may be
--                              megabytes: the server cuts a subscriber that is sent more than it takes
--   may:<operation>    never a key: whoever may read it by the server's access rules (ACL) may call that operation
--
-- Outside the prefix, as Celery names them: the node's queue (a list of messages), celery-task-meta-<id> (the result
-- for AsyncResult) and the channel of the same name, on which it is sent to Celery producers that wait.
--
-- Attempts are fenced: `attempt` counts dispatches, `token` is chosen by the claimer. A call with another attempt or
-- token changes nothing. Calls may be repeated: the same claim or completion again gets the same answer.
-- A strike is an attempt that ended without a result by fault (lease lost while running, engine error).
-- Time is the server's. Numbers are seconds.
--
-- JSON is written by hand: payloads, features, outputs and receipts are passed on as they came, never decoded and encoded
-- again. That would be work on the one thread that serves everybody, and cjson does not give back what it was given: an
-- empty list comes back as an empty object, a number with 14 digits. Texts go through `str`.

-- A call runs with its caller's rights, and every role may write what its operations write, past these functions too. So
-- roles write to different keys wherever it matters who wrote (users.acl): a producer can spoil the tasks and sets it
-- needs for submitting, but write no result, no other role's event, no node. And whoever does more with what a producer
-- may have written checks it first (`read`).

local P, ARGV, now, stream_length, retention -- of the call that runs
local FIRST = 4 -- where an operation's own arguments begin in ARGV
local MOST_NAMED = 16 -- and how many of them have a name of their own at most

local FINAL = { succeeded = true, failed = true, expired = true, rejected = true, cancelled = true }
local OURS = 'perllm.broker.errors'
local EXCEPTION = { -- what Celery's producers see of an end that is none of success
    failed = { 'TaskFailed', OURS },
    expired = { 'TaskExpired', OURS },
    rejected = { 'TaskRejected', OURS },
    refused = { 'InvalidTask', OURS },
    revoked = { 'TaskRevokedError', 'celery.exceptions' },
    chord = { 'ChordError', 'celery.exceptions' },
}

local function num(x) return string.format('%.6f', x) end
local function task_key(id) return P .. 'task:' .. id end
local function set_key(state) return P .. 'in:' .. state end
local function str(x) return cjson.encode(x) end

local function append(stream, json)
    redis.call('XADD', P .. stream, 'MAXLEN', '~', stream_length, '*', 'e', json)
end

local function event(json) append('events', json) end

local function count(name, n) redis.pcall('HINCRBY', P .. 'totals', name, n) end -- nothing hangs on it

-- What a number is taken for that is none: it would be written into events, and compared.
local SPOILT = { attempt = '0', strikes = '0', deadline = '0', submitted = '0', claimed = '0', dispatched = '0' }

local function read(id, ...) -- fields of a task as a table, or nil where there is no such task
    local values = redis.call('HMGET', task_key(id), 'state', ...)
    if not values[1] then return nil end
    local t = { state = values[1] }
    for i, name in ipairs({ ... }) do
        local value = values[i + 1] or nil
        if value and SPOILT[name] and not (#value < 20 and string.match(value, '^%d+%.?%d*$')) then value = SPOILT[name] end
        t[name] = value
    end
    return t
end

local function move(id, from, to, score)
    redis.call('ZREM', set_key(from), id)
    redis.call('ZADD', set_key(to), num(score), id)
end

local TASK_BYTES = 1024 -- of a task's keys, set members and events, about

local function weigh(tenant, n) -- `n` bytes more, or less, are kept for a tenant; a producer may have spoilt the count
    local held = tenant and redis.pcall('HINCRBY', P .. 'bytes', tenant, n)
    if type(held) == 'number' and held <= 0 then redis.call('HDEL', P .. 'bytes', tenant) end
end

-- Bytes a task's result is expected to take, twice; in `features` no text of a user's can look so, for its quotes are
-- escaped.
local function reserved(features)
    return 2 * (tonumber(string.match(features or '', '"result_bytes": (%d+)') or '') or 0)
end

local function unplace(id, node)
    if node then redis.call('SREM', P .. 'node:' .. node .. ':tasks', id) end
    redis.call('HDEL', task_key(id), 'node', 'model', 'dispatched', 'claimed')
end

-- What AsyncResult shows, and its announcement; `new`: only where it shows nothing yet.
local function show_celery(id, status, result, new)
    local name = 'celery-task-meta-' .. id
    local meta = '{"status":"' .. status .. '","result":' .. result .. ',"traceback":null,"children":[],"task_id":' .. str(id) .. '}'
    if new and redis.call('EXISTS', name) == 1 then return end
    redis.call('SET', name, meta, 'EX', math.ceil(retention))
    redis.call('PUBLISH', name, meta)
end

-- The same of an end without a result.
local function fail_celery(id, kind, reason, new)
    local name, module = unpack(EXCEPTION[kind] or EXCEPTION.refused)
    local result = '{"exc_type":"' .. name .. '","exc_message":[' .. str(reason) .. '],"exc_module":"' .. module .. '"}'
    show_celery(id, kind == 'revoked' and 'REVOKED' or 'FAILURE', result, new)
end

local function wants(celery, word) return celery and string.find(celery, word, 1, true) ~= nil end

-- It has ended: the inbox sends what its producer wants to follow, and shows in Flower what no worker has.
local function to_follow(id, celery, unseen)
    if wants(celery, 'followers') or (celery and unseen) then
        redis.call('ZADD', P .. 'to_follow', num(now), id)
        redis.call('PUBLISH', P .. 'signal:@inbox', '')
    end
end

-- Tell who waits that a task has ended. Nothing hangs on it: he looks for himself now and then.
local function tell_waiting(id, state) redis.pcall('PUBLISH', P .. 'ended:' .. id, state) end

-- Enter a final state but cancelled: the result document, the set, the totals, Celery's copy and the announcements.
local function finish(id, t, state, on_time, reason, extra)
    local latency = now - tonumber(t.submitted)
    local doc = '{"id":' .. str(id) .. ',"state":"' .. state .. '","on_time":' .. tostring(on_time)
        .. ',"latency":' .. num(latency)
        .. (t.claimed and ',"queued":' .. num(tonumber(t.claimed) - tonumber(t.submitted)) or '')
        .. (reason and ',"reason":' .. str(reason) or '') .. (extra or '') .. '}'
    redis.call('HSET', task_key(id), 'state', state, 'finished', num(now))
    redis.call('SET', P .. 'result:' .. id, doc)
    local tenant, celery, features = unpack(redis.call('HMGET', task_key(id), 'tenant', 'celery', 'features'))
    weigh(tenant, 2 * #doc - reserved(features))
    move(id, t.state, state, now)
    if t.node then redis.call('SREM', P .. 'node:' .. t.node .. ':tasks', id) end
    count(state, 1)
    if state == 'succeeded' then show_celery(id, 'SUCCESS', doc) else fail_celery(id, state, reason or state) end
    tell_waiting(id, state)
    to_follow(id, celery, state ~= 'succeeded' and not t.claimed)
    return latency
end

local function ended(id, t, state, reason)
    finish(id, t, state, false, reason)
    event('{"type":"ended","at":' .. num(now) .. ',"id":' .. str(id) .. ',"state":"' .. state .. '","reason":' .. str(reason)
        .. (t.node and ',"node":' .. str(t.node) or '') .. '}')
end

-- Mend one thing of many. A task whose record was spoilt (it lacks a field, or is of another kind) must not keep the
-- others from being mended: it fails, or where not even that can be written down, it goes.
local function apart(id, state, mend)
    if pcall(mend) then return end
    local left = { state = state, submitted = num(now) }
    if pcall(ended, id, left, 'failed', 'what is stored of it cannot be read') then return end
    redis.call('ZREM', set_key(state), id)
    redis.call('UNLINK', task_key(id))
end

-- Back to pending, or to a final state when it struck out or its time is over.
local function give_back(id, t, cause, reason, strike, max_strikes)
    local strikes = tonumber(t.strikes) + (strike and 1 or 0)
    if strike then redis.call('HSET', task_key(id), 'strikes', strikes) end
    if strike and strikes >= max_strikes then
        return ended(id, t, 'failed', reason .. ' (attempt ' .. t.attempt .. ', strike ' .. strikes .. ' of ' .. max_strikes .. ')')
    end
    if tonumber(t.deadline) <= now then return ended(id, t, 'expired', 'the deadline passed: ' .. reason) end
    redis.call('HSET', task_key(id), 'state', 'pending')
    redis.call('HDEL', task_key(id), 'token')
    unplace(id, t.node)
    if t.celery and t.state == 'running' then redis.call('UNLINK', 'celery-task-meta-' .. id) end
    move(id, t.state, 'pending', tonumber(t.deadline))
    event('{"type":"returned","at":' .. num(now) .. ',"id":' .. str(id) .. ',"node":' .. str(t.node) .. ',"attempt":' .. t.attempt
        .. ',"cause":"' .. cause .. '","reason":' .. str(reason) .. ',"strikes":' .. strikes .. '}')
end

local PLACED = { 'attempt', 'node', 'token', 'strikes', 'deadline', 'submitted', 'claimed', 'dispatched', 'celery' }

local function placed_tasks(node, states, each)
    for _, id in ipairs(redis.call('SMEMBERS', P .. 'node:' .. node .. ':tasks')) do
        local readable, t = pcall(read, id, unpack(PLACED)) -- what is not is left to the sweep
        if readable and t and states[t.state] then apart(id, t.state, function() each(id, t) end) end
    end
end

-- The scheduler stops counting on the node; what waited there unclaimed is pending again.
local function node_down(name, reason)
    event('{"type":"node_down","at":' .. num(now) .. ',"node":' .. str(name) .. ',"reason":' .. str(reason) .. '}')
    placed_tasks(name, { dispatched = true }, function(id, t) give_back(id, t, 'handed_back', reason) end)
end

local MOST_GONE = 256

-- Every message in its queue is void by now, so the queue goes too.
local function forget_node(name, left)
    local queue, info = unpack(redis.call('HMGET', P .. 'node:' .. name, 'queue', 'info'))
    redis.call('ZREM', P .. 'nodes', name)
    redis.call('DEL', P .. 'node:' .. name)
    if queue then redis.call('DEL', queue) end
    if info then
        if redis.call('HLEN', P .. 'gone') >= MOST_GONE then
            redis.call('HDEL', P .. 'gone', redis.call('HRANDFIELD', P .. 'gone'))
        end
        if left then info = '{"left":true,' .. string.sub(info, 2) end
        redis.call('HSET', P .. 'gone', name, num(now) .. ' ' .. info)
        redis.call('EXPIRE', P .. 'gone', math.ceil(retention))
    end
end

-- Nothing of a final task is kept, but what is still to follow it.
local function drop(id, state)
    local tenant, key = unpack(redis.call('HMGET', task_key(id), 'tenant', 'key'))
    local followers = redis.call('HSTRLEN', P .. 'followers', id)
    if tenant then
        local function length(field) return redis.call('HSTRLEN', task_key(id), field) end
        redis.call('ZREM', P .. 'of:' .. tenant, id)
        weigh(tenant, -(TASK_BYTES + length('payload') + length('features') + followers + 2 * redis.call('STRLEN', P .. 'result:' .. id)))
    end
    if followers > 0 and not redis.call('ZSCORE', P .. 'to_follow', id) and redis.call('HEXISTS', P .. 'untold', id) == 0 then
        redis.call('HDEL', P .. 'followers', id)
    end
    redis.call('UNLINK', task_key(id), P .. 'result:' .. id, 'celery-task-meta-' .. id)
    if key and string.sub(key, 1, 4) == 'key:' then redis.call('UNLINK', P .. key) end
    redis.call('ZREM', set_key(state), id)
    count('forgotten', 1)
end

local function leads(epoch) return redis.call('GET', P .. 'epoch') == epoch end

local function running_under(id, attempt, token) -- the task if this attempt still runs it
    local t = read(id, unpack(PLACED))
    if t and t.attempt == attempt and t.token == token then return t end
    return nil
end

local ops = {}
local MOST = 1000 -- tasks and ids per call: one call must not hold the server for long

-- How producers end a task: its result is read off the record, and the rest is for `announce`.
local WITHDRAWN = { cancelled = 'cancelled on request', expired = 'the deadline passed' }
local function withdraw(id, t, state)
    local tenant, features = unpack(redis.call('HMGET', task_key(id), 'tenant', 'features'))
    if reserved(features) > 0 then weigh(tenant, -reserved(features)) end
    append('requests', '{"type":"ended","at":' .. num(now) .. ',"id":' .. str(id) .. ',"state":"' .. state
        .. '","reason":"' .. WITHDRAWN[state] .. '"' .. (t.node and ',"node":' .. str(t.node) or '') .. '}')
    redis.call('HSET', task_key(id), 'state', state, 'finished', num(now), 'withdrawn', 1)
    move(id, t.state, state, now)
    redis.call('HSET', P .. 'untold', id, t.node or '')
    count(state, 1)
end

-- End a task as cancelled; returns the state it was found in, or false.
local function cancel(id)
    local t = read(id, unpack(PLACED))
    if not t then return false end
    if not FINAL[t.state] then withdraw(id, t, 'cancelled') end
    return t.state
end

-- → the id in force for each: its own, or the one its idempotency key had; last the time
-- `celery` and `followers` of a task that came by Celery's inbox, else both empty
function ops.submit() -- each: id, payload, features, window, key, tenant, celery, followers
    local out, fresh, pending, of = {}, 0, {}, {}
    if #ARGV >= FIRST + 8 * MOST then return redis.error_reply('ERR too many tasks at once') end
    local revoked = redis.call('EXISTS', P .. 'revoked') == 1 and {} -- before they were submitted
    for i = FIRST, #ARGV, 8 do
        local id, payload, features, window, key, tenant, celery, followers = unpack(ARGV, i, i + 7)
        local first = key ~= '' and redis.call('GET', P .. 'key:' .. key)
        if first then
            id = first
        elseif redis.call('EXISTS', task_key(id)) == 0 then
            local deadline = num(now + tonumber(window))
            append('requests',
                '{"at":' .. num(now) .. ',"id":' .. str(id) .. ',"deadline":' .. deadline .. ',' .. string.sub(features, 2))
            redis.call('HSET', task_key(id), 'state', 'pending', 'submitted', num(now), 'deadline', deadline, 'window', window,
                'attempt', 0, 'strikes', 0, 'payload', payload, 'features', features, 'tenant', tenant)
            fresh = fresh + 1
            local mine = of[tenant] or {}
            of[tenant] = mine
            pending[2 * fresh - 1], pending[2 * fresh] = deadline, id
            if celery ~= '' then
                redis.call('HSET', task_key(id), 'celery', celery .. (followers ~= '' and ' followers' or ''))
                if followers ~= '' then redis.call('HSET', P .. 'followers', id, followers) end
            end
            weigh(tenant, TASK_BYTES + #payload + #features + #followers + reserved(features))
            mine[#mine + 1], mine[#mine + 2] = num(now + i * 1e-6), id -- tasks of one call keep their order
            if key ~= '' then
                redis.call('SET', P .. 'key:' .. key, id)
                redis.call('HSET', task_key(id), 'key', 'key:' .. key)
            end
            if revoked then
                local till = redis.call('ZSCORE', P .. 'revoked', id)
                if till and tonumber(till) > now then revoked[#revoked + 1] = id end
            end
        end
        out[#out + 1] = id
    end
    if fresh > 0 then
        redis.call('ZADD', set_key('pending'), unpack(pending))
        for tenant, mine in pairs(of) do redis.call('ZADD', P .. 'of:' .. tenant, unpack(mine)) end
        count('submitted', fresh)
        for _, id in ipairs(revoked or {}) do cancel(id) end
    end
    out[#out + 1] = num(now)
    return out
end

-- → ok | not_leader | refused | node_gone
function ops.dispatch(epoch, id, attempt, node, boot, model, queue, message, why, lease)
    if not leads(epoch) then return 'not_leader' end
    local t = read(id, 'attempt', 'features', 'deadline')
    if not t or t.state ~= 'pending' or tonumber(t.attempt) + 1 ~= tonumber(attempt) then return 'refused' end
    -- Only an event takes a node out of service, so that the scheduler and this agree; a lapsed one awaits its sweep.
    local known = redis.call('HMGET', P .. 'node:' .. node, 'boot', 'draining')
    if known[1] ~= boot or known[2] then return 'node_gone' end
    redis.call('HSET', task_key(id), 'state', 'dispatched', 'attempt', attempt, 'node', node, 'model', model,
        'dispatched', num(now), 'why', why)
    move(id, 'pending', 'dispatched', math.min(now + tonumber(lease), tonumber(t.deadline)))
    redis.call('SADD', P .. 'node:' .. node .. ':tasks', id)
    event('{"type":"dispatched","at":' .. num(now) .. ',"id":' .. str(id) .. ',"node":' .. str(node) .. ',"model":' .. str(model)
        .. ',"attempt":' .. attempt .. '}')
    local readable, features = pcall(cjson.decode, t.features)
    local preview = readable and type(features) == 'table' and features.preview
    preview = str(type(preview) == 'string' and preview or ''):sub(2, -2)
    redis.call('LPUSH', queue, (message:gsub('@preview@', function() return preview end, 1)))
    return 'ok'
end

-- → ok | not_leader | refused        a dispatched task its node does not take up is pending again
function ops.take_back(epoch, id, attempt, reason)
    if not leads(epoch) then return 'not_leader' end
    local t = read(id, unpack(PLACED))
    if not t or t.state ~= 'dispatched' or t.attempt ~= attempt then return 'refused' end
    give_back(id, t, 'lease_expired', reason)
    return 'ok'
end

-- → ok | not_leader | unknown        say why the scheduler sends a node little; an empty reason: it does so no more
function ops.distrust(epoch, name, boot, reason)
    if not leads(epoch) then return 'not_leader' end
    local key = P .. 'node:' .. name
    if redis.call('HGET', key, 'boot') ~= boot then return 'unknown' end
    if reason == '' then redis.call('HDEL', key, 'distrusted') else redis.call('HSET', key, 'distrusted', reason) end
    return 'ok'
end

-- → ok | not_leader | refused        the scheduler's own final decisions; `state` is rejected or expired
ops['end'] = function(epoch, id, state, reason, why)
    if not leads(epoch) then return 'not_leader' end
    local t = read(id, 'submitted')
    if not t or t.state ~= 'pending' then return 'refused' end
    redis.call('HSET', task_key(id), 'why', why)
    ended(id, t, state, reason)
    return 'ok'
end

-- → {payload, seconds to the deadline, model} | nothing when the attempt is void
function ops.claim(id, attempt, node, token, lease)
    local t = read(id, 'attempt', 'node', 'token', 'strikes', 'deadline', 'submitted', 'payload', 'model', 'celery')
    if not t or t.attempt ~= attempt or t.node ~= node then return false end
    if t.state == 'dispatched' then
        if tonumber(t.deadline) <= now then
            ended(id, t, 'expired', 'the deadline passed while it waited on ' .. node)
            return false
        end
        redis.call('HSET', task_key(id), 'state', 'running', 'token', token, 'claimed', num(now))
        move(id, 'dispatched', 'running', now + tonumber(lease))
        if t.celery then show_celery(id, 'STARTED', '{"hostname":' .. str(node) .. '}') end
        event('{"type":"claimed","at":' .. num(now) .. ',"id":' .. str(id) .. ',"node":' .. str(node) .. ',"attempt":' .. attempt .. '}')
    elseif t.state ~= 'running' or t.token ~= token then
        return false
    end
    return { t.payload, num(tonumber(t.deadline) - now), t.model }
end

-- → ok | void        `state` is succeeded or expired, `reason` may be empty
function ops.complete(id, attempt, token, state, output, receipt, reason)
    local t = running_under(id, attempt, token)
    if not t then return 'void' end
    if t.state ~= 'running' then return t.state == state and 'ok' or 'void' end
    local on_time = state == 'succeeded' and now <= tonumber(t.deadline)
    local latency = finish(id, t, state, on_time, reason ~= '' and reason or nil, ',"output":' .. output .. ',"receipt":' .. receipt)
    event('{"type":"completed","at":' .. num(now) .. ',"id":' .. str(id) .. ',"node":' .. str(t.node) .. ',"attempt":' .. attempt
        .. ',"state":"' .. state .. '","on_time":' .. tostring(on_time) .. ',"latency":' .. num(latency)
        .. ',"queued":' .. num(tonumber(t.claimed) - tonumber(t.submitted)) .. ',"receipt":' .. receipt .. '}')
    return 'ok'
end

-- → ok | void        `retry` is 0 or 1
function ops.fail(id, attempt, token, reason, retry, max_strikes)
    local t = running_under(id, attempt, token)
    if not t or t.state ~= 'running' then return 'void' end
    if retry == '1' then
        give_back(id, t, 'failed', reason, true, tonumber(max_strikes))
    else
        ended(id, t, 'failed', reason)
    end
    return 'ok'
end

-- → ok | void        a piece of its text, for whoever watches; beyond `most` pieces
-- nothing more is kept: the rest comes with the result
function ops.say(id, attempt, token, text, most)
    local t = running_under(id, attempt, token)
    if not t or t.state ~= 'running' then return 'void' end
    local key = P .. 'text:' .. id
    if redis.call('LLEN', key) < tonumber(most) then redis.call('RPUSH', key, attempt .. ' ' .. text) end
    redis.call('EXPIRE', key, 3600)
    redis.call('PUBLISH', P .. 'said:' .. id, '')
    return 'ok'
end

-- → ok | void        running work a stopping worker gives up, no strike
function ops.hand_back(id, attempt, token, reason)
    local t = running_under(id, attempt, token)
    if not t or t.state ~= 'running' then return 'void' end
    give_back(id, t, 'handed_back', reason)
    return 'ok'
end

-- → the state it found, or nothing for an unknown task
function ops.cancel(id) return cancel(id) end

-- → how many were ended: tasks whose deadline passed a while ago, `limit` of each state at most. It names none, so
-- whoever waits may call it. The scheduler, which can say more, or a worker, with the part that was done, came first if it
-- lives: what runs is left to it for a lease
local OVERDUE = 0.5 -- s
function ops.expire(limit)
    local ended_now = 0
    for _, state in ipairs({ 'pending', 'dispatched', 'running' }) do
        for _, id in ipairs(redis.call('ZRANGEBYSCORE', set_key(state), '-inf', num(now - OVERDUE), 'LIMIT', 0, limit)) do
            local readable, t = pcall(read, id, unpack(PLACED))
            if readable and t and t.state == state and tonumber(t.deadline) <= now - OVERDUE then
                withdraw(id, t, 'expired')
                ended_now = ended_now + 1
            end
        end
    end
    return ended_now
end

-- → for each the state it found, or '' for one not known yet: it is cancelled when it is submitted
-- within `keep` s. The latest `most` of these are kept.
function ops.revoke(keep, most) -- each: id
    local out = {}
    if #ARGV >= FIRST + 2 + MOST then return redis.error_reply('ERR too many ids at once') end
    for i = FIRST + 2, #ARGV do
        out[#out + 1] = cancel(ARGV[i]) or ''
        if out[#out] == '' then redis.call('ZADD', P .. 'revoked', num(now + tonumber(keep)), ARGV[i]) end
    end
    redis.call('ZREMRANGEBYSCORE', P .. 'revoked', '-inf', num(now))
    redis.call('ZREMRANGEBYRANK', P .. 'revoked', 0, -(tonumber(most) + 1))
    return out
end

-- → ok        a message becomes no task: its Celery producer is to be told. `kind` is one of EXCEPTION
function ops.refuse(id, kind, reason)
    redis.call('HSET', P .. 'refused', id, kind .. ' ' .. reason)
    return 'ok'
end

-- → {id, what is to follow it or '', ...} of tasks that have ended; again after `again` s, until `followed`
function ops.follow(limit, again)
    local out = {}
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'to_follow', '-inf', num(now), 'LIMIT', 0, tonumber(limit))) do
        redis.call('ZADD', P .. 'to_follow', num(now + tonumber(again)), id)
        out[#out + 1], out[#out + 2] = id, redis.call('HGET', P .. 'followers', id) or ''
    end
    return out
end

-- → ok        all that was to follow it is sent
function ops.followed(id)
    local readable, t = pcall(read, id, 'tenant')
    if readable and t then weigh(t.tenant, -redis.call('HSTRLEN', P .. 'followers', id)) end
    redis.call('HDEL', P .. 'followers', id)
    redis.call('ZREM', P .. 'to_follow', id)
    return 'ok'
end

-- → how many were told        tasks their producers ended, to their nodes and, as refusals, to Celery's producers
local function announce(limit)
    local function some(key, tell)
        local pairs_ = redis.call('HRANDFIELD', P .. key, limit, 'WITHVALUES')
        for i = 1, #pairs_, 2 do
            redis.call('HDEL', P .. key, pairs_[i])
            tell(pairs_[i], pairs_[i + 1], read(pairs_[i], 'celery', 'claimed') or {})
        end
        return #pairs_ / 2
    end
    return some('untold', function(id, node, t)
        if t.state and not WITHDRAWN[t.state] then return end
        if node ~= '' then
            redis.call('SREM', P .. 'node:' .. node .. ':tasks', id)
            redis.call('PUBLISH', P .. 'signal:' .. node, id)
        end
        if t.state then tell_waiting(id, t.state) end
        if t.state == 'cancelled' then fail_celery(id, 'revoked', 'cancelled') end
        if t.state == 'expired' then fail_celery(id, 'expired', WITHDRAWN.expired) end
        to_follow(id, redis.call('HEXISTS', P .. 'followers', id) == 1 and 'followers' or t.celery, not t.claimed)
    end) + some('refused', function(id, said, t)
        local kind, reason = string.match(said, '^(%a+) (.*)$')
        if kind and not t.state then fail_celery(id, kind, reason, true) end
    end)
end
function ops.announce(limit) return announce(tonumber(limit)) end

-- → ok, or nothing for an unknown task        drop it at its producer's wish, cancelled first if it goes on
function ops.forget(id)
    local state = cancel(id)
    if not state then return false end
    drop(id, FINAL[state] and state or 'cancelled')
    redis.call('UNLINK', P .. 'text:' .. id)
    return 'ok'
end

-- → 'ok' | seconds until a live namesake's registration would lapse
function ops.register(name, boot, info, queue, ttl, max_strikes)
    local key = P .. 'node:' .. name
    local before = redis.call('HGET', key, 'boot')
    if before and before ~= boot then
        local alive = redis.call('ZSCORE', P .. 'nodes', name)
        if alive and tonumber(alive) > now then return num(tonumber(alive) - now) end
        placed_tasks(name, { dispatched = true, running = true }, function(id, t)
            give_back(id, t, 'lease_expired', 'node ' .. name .. ' was restarted', t.state == 'running', tonumber(max_strikes))
        end)
    end
    redis.call('HSET', key, 'info', info, 'boot', boot, 'queue', queue)
    redis.call('HDEL', key, 'draining', 'beat', 'distrusted')
    redis.call('ZADD', P .. 'nodes', num(now + tonumber(ttl)), name)
    redis.call('HDEL', P .. 'gone', name)
    event('{"type":"node_up","at":' .. num(now) .. ',"info":' .. info .. '}')
    return 'ok'
end

-- → {'ok', ids to stop ...} | {'unknown'}
function ops.beat(name, boot, beat, ttl, lease) -- each: id, attempt, token, tokens
    local key = P .. 'node:' .. name
    if redis.call('HGET', key, 'boot') ~= boot or not redis.call('ZSCORE', P .. 'nodes', name) then return { 'unknown' } end
    redis.call('ZADD', P .. 'nodes', num(now + tonumber(ttl)), name)
    local json = '{"at":' .. num(now) .. ',' .. string.sub(beat, 2)
    redis.call('HSET', key, 'beat', json)
    event(json)
    local out = { 'ok' }
    for i = FIRST + 5, #ARGV, 4 do
        local id, attempt, token, tokens = unpack(ARGV, i, i + 3)
        local readable, t = pcall(running_under, id, attempt, token)
        local deadline = readable and t and t.state == 'running' and tonumber(t.deadline)
        if not deadline then
            out[#out + 1] = id
        else -- an engine that overruns by a whole lease is hung
            redis.call('ZADD', set_key('running'), num(math.min(now, deadline) + tonumber(lease)), id)
            if wants(t.celery, 'progress') and tokens and string.match(tokens, '^[1-9]%d*$') then
                show_celery(id, 'PROGRESS', '{"tokens":' .. tokens .. ',"hostname":' .. str(t.node) .. '}')
            end
        end
    end
    return out
end

-- → ok | unknown        no new work; what waits unclaimed goes back at once
function ops.drain(name, boot, reason)
    local key = P .. 'node:' .. name
    if redis.call('HGET', key, 'boot') ~= boot then return 'unknown' end
    redis.call('HSET', key, 'draining', '1')
    node_down(name, reason)
    return 'ok'
end

-- → ok | unknown        gone for good; anything still there goes back
function ops.leave(name, boot, reason)
    if redis.call('HGET', P .. 'node:' .. name, 'boot') ~= boot then return 'unknown' end
    node_down(name, reason)
    placed_tasks(name, { running = true }, function(id, t) give_back(id, t, 'handed_back', reason) end)
    forget_node(name, true)
    return 'ok'
end

-- → how many things were mended; call again while it returns `limit` or more. The leader's, and where none leads the
-- workers'
function ops.sweep(limit, max_strikes, max_kept)
    limit, max_strikes, max_kept = tonumber(limit), tonumber(max_strikes), tonumber(max_kept)
    local done = 0
    local function due(key, score)
        return redis.call('ZRANGEBYSCORE', key, '-inf', num(score), 'LIMIT', 0, limit)
    end
    local function known(state, id, ...) -- what is in a set but is no such task would stop every sweep: it goes
        local t = read(id, ...)
        if t and t.state == state then return t end
        redis.call('ZREM', set_key(state), id)
        return nil
    end
    for _, name in ipairs(due(P .. 'nodes', now)) do
        if not pcall(function()
            node_down(name, 'no heartbeat')
            forget_node(name)
        end) then
            redis.call('ZREM', P .. 'nodes', name)
            redis.call('UNLINK', P .. 'node:' .. name, P .. 'node:' .. name .. ':tasks')
        end
        done = done + 1
    end
    for _, id in ipairs(due(set_key('running'), now)) do
        apart(id, 'running', function()
            local t = known('running', id, unpack(PLACED))
            if t then give_back(id, t, 'lease_expired', 'the lease on ' .. (t.node or '?') .. ' lapsed', true, max_strikes) end
        end)
        done = done + 1
    end
    for _, id in ipairs(due(set_key('dispatched'), now)) do
        apart(id, 'dispatched', function()
            local t = known('dispatched', id, unpack(PLACED))
            if t then give_back(id, t, 'lease_expired', 'the lease on ' .. (t.node or '?') .. ' lapsed') end
        end)
        done = done + 1
    end
    for _, id in ipairs(due(set_key('pending'), now)) do
        apart(id, 'pending', function()
            local t = known('pending', id, 'submitted')
            if t then ended(id, t, 'expired', 'the deadline passed before a node could take it') end
        end)
        done = done + 1
    end
    for state in pairs(FINAL) do
        local old = due(set_key(state), now - retention)
        if #old == 0 then
            local beyond = redis.call('ZCARD', set_key(state)) - max_kept
            if beyond > 0 then old = redis.call('ZRANGE', set_key(state), 0, math.min(beyond, limit) - 1) end
        end
        for _, id in ipairs(old) do
            if not pcall(drop, id, state) then
                redis.call('ZREM', set_key(state), id)
                redis.call('UNLINK', task_key(id))
            end
            done = done + 1
        end
    end
    return announce(limit) < limit and done or math.max(done, limit)
end

-- → the epoch this holder leads under, or nothing while another leads
function ops.lead(holder, ttl)
    ttl = math.ceil(tonumber(ttl) * 1000)
    local leader = redis.call('GET', P .. 'leader')
    if leader and leader ~= holder then return false end
    if not leader then redis.call('INCR', P .. 'epoch') end
    redis.call('SET', P .. 'leader', holder, 'PX', ttl)
    return redis.call('GET', P .. 'epoch')
end

-- → ok        lets a standby take over at once
function ops.resign(holder)
    if redis.call('GET', P .. 'leader') == holder then redis.call('DEL', P .. 'leader') end
    return 'ok'
end

-- → ok | not_leader
function ops.snapshot(epoch, state, metrics, learned)
    if not leads(epoch) then return 'not_leader' end
    redis.call('SET', P .. 'snapshot', state)
    for key, value in pairs({ metrics = metrics, learned = learned }) do
        if value ~= '' then redis.pcall('SET', P .. key, value) end -- nothing hangs on them
    end
    return 'ok'
end

-- `submitting` is the one function that runs under the server's memory limit.
local function run(submitting)
    return function(keys, args)
        local op = args[1]
        P, ARGV, stream_length, retention = keys[1], args, args[2], tonumber(args[3])
        if not P or not string.match(P, '^{[%w_-]+}:$') then return redis.error_reply('ERR no prefix of a cell') end
        if not ops[op] or (op == 'submit') ~= submitting then
            return redis.error_reply('ERR unknown operation ' .. tostring(op))
        end
        if not redis.acl_check_cmd('GET', P .. 'may:' .. op) then
            return redis.error_reply('NOPERM this user may not call ' .. op)
        end
        local clock = redis.call('TIME')
        now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
        return ops[op](unpack(args, FIRST, FIRST + MOST_NAMED - 1))
    end
end

local flags = { 'allow-cross-slot-keys' }
redis.register_function { function_name = '@name@_submit', callback = run(true), flags = flags }
flags[2] = 'allow-oom'
redis.register_function { function_name = '@name@_call', callback = run(false), flags = flags }
