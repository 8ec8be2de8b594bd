"""How long torch's threads wait busily for their next work, on a machine that others use too.

torch for Linux comes with GNU's OpenMP. Its threads turn in a loop for some milliseconds before they sleep. Where all
cores are theirs, work that follows soon begins at once. Where other programs run, a thread turns on the core that the
one it waits for would need. A bound serves both: docs/performance.md has the figures.
"""

import os
import sys

#: Turns of the loop; GNU's OpenMP has 300,000.
SPINS = '2000'
#: Variables by which a user says how threads wait.
CHOICES = ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')


def bound_spinning() -> bool:
    """Have OpenMP's threads turn at most :data:`SPINS` times; to be called before torch is imported, which reads it.

    Returns:
        Whether it was set: not if the user chose by one of :data:`CHOICES`, nor if torch is there already.
    """
    if 'torch' in sys.modules or any(name in os.environ for name in CHOICES):
        return False
    os.environ['GOMP_SPINCOUNT'] = SPINS
    return True
