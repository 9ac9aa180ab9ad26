"""Bugs to plant: for each promise, a bus that breaks it. Each is what somebody could write: a line forgotten, two
lines exchanged. They are put over the real code from outside."""

from tests.simulation import bugs_of_decisions as _decisions
from tests.simulation import bugs_of_the_loop as _loop
from tests.simulation import bugs_of_work as _work
from tests.simulation.planting import BUGS, Bug, catch

assert _decisions and _loop and _work, "they have registered their bugs"

__all__ = ["BUGS", "Bug", "catch"]
