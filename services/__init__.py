"""What Gatehouse knows: the rules of users, what is up, which header passes.

Values in, values out: nothing here knows Bottle, the server or the settings. Its door: the table of
`fields`, the functions of `users`, `search` and `transfer`, those of `query`, `access.Access`,
`health.Health`, the rules of `proxy.Proxy`, and `browser.load`.
"""
