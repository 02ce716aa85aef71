"""A fuzzer of ours: hostile files, options and calls, each made from a seed and run in a process of its own.

    python -m tests.fuzz --count 1000 --seed 3 --seconds 3600
    python -m tests.fuzz --seed 3 --only 17        # one case again, with all that it wrote

What a case must come to: success, or exit status 2 and one line on the error stream; within a minute, within 4 GiB.
"""
