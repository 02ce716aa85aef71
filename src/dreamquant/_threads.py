"""Imported before torch is: how the threads of its loops wait for one another.

OpenMP's threads spin while they wait. On a machine with other work that costs more than it gains: the steps of a small
network took up to thirty times as long beside two busy processes. `OMP_WAIT_POLICY`, where the user has set it, stays
as it is.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
