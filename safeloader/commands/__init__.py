"""What ``python -m safeloader`` can do, a file for each command. Runs in: main.

The exit status of every command but ``run``, which ends as its program does:

=====  ==========================================================================================
0      it is so, or was done: the run is read, each index came once, the sample came
1      the answer is no, or cannot be told: not exactly once, no such step or index, the sample
       fails again
2      the words of the command line, a folder or a file are not what they should be, or a library
       is missing; one sentence on stderr says which
130    Ctrl-C
=====  ==========================================================================================
"""

FINE, NO, BAD_INPUT = 0, 1, 2


class BadInput(Exception):
    """What was given cannot be used: one sentence says why, and what to give."""
