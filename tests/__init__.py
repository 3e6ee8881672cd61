"""The tests of Gatehouse, in rooms: see docs/extending.md.

What they start runs compiled, as `make install` leaves it. What they import does not: unit tests put
fakes in the place of objects, for which compiled code has no room.
"""

import sys

sys.meta_path[:] = [one for one in sys.meta_path if type(one).__module__ != "gatehouse_compiled"]
