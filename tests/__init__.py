"""The tests of Gatehouse, in rooms: see docs/architecture.md.

What they start runs compiled, as in production. What they import does not: unit tests put fakes in
the place of objects, and compiled code takes none. tests/wire needs no fakes. It is run compiled too,
by tests/house/test_compiled.py.
"""

import os
import sys

if os.environ.get("TEST_COMPILED") != "1":
    sys.meta_path[:] = [
        one for one in sys.meta_path if type(one).__module__ != "gatehouse_compiled"
    ]
else:
    import wire.request

    assert not str(wire.request.__file__).endswith(".py"), "nothing is compiled"
