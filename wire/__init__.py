"""Bytes and what they mean, and back: no socket, no thread, and no clock but for ids.

Heads, headers, bodies, JSON, rows and WebSocket frames become values here, and values bytes.
Its door: the functions and small classes of each module. It imports the standard library and
`problems`. It touches no socket, so that a test can split every message at every byte.
"""
