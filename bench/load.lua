-- Requests for wrk: `wrk -s load.lua URL -- CALL TARGETS`, CALL one of get and create, TARGETS a
-- file with a request target a line. What was measured is printed as one line of JSON.

local threads = 0

function setup(thread)
  threads = threads + 1
  thread:set("number", threads)
end

function init(args)
  local headers = {["Accept"] = "*/*", ["User-Agent"] = "bench"}
  if args[1] == "create" then
    headers["Content-Type"] = "application/json"
    local prefix = args[2] .. "-" .. number .. "-"
    local made = 0
    request = function()
      made = made + 1
      local body = '{"email": "' .. prefix .. made .. '@example.com", "name": "A new user"}'
      return wrk.format("POST", "/users", headers, body)
    end
    return
  end
  local requests = {}
  for target in io.lines(args[2]) do
    requests[#requests + 1] = wrk.format("GET", target, headers)
  end
  local at = 0
  request = function()
    at = at % #requests + 1
    return requests[at]
  end
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %f, "failed": %d, "p50_ms": %f, "p99_ms": %f}\n',
    summary.requests,
    summary.duration / 1e6,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3
  ))
end
