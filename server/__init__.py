"""Sockets, threads and processes: one loop owns every socket of a worker.

Threads get values and give values back; they never touch a socket. The server learns of the
application only what it is given: whose a request is, the rules of heads, a WSGI callable.
Its doors: `workers.serve` with a `server.Server`, which takes `options.Options` with an
`exchange.Patience`; and `listener`, `logs`, `systemd` and `connector.UpstreamConnector` for the
command line.
"""
