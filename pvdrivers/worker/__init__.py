"""The data plane: one thread, one compiled loop, many rings.

    records    what the loop works on: WORKER, RING, REQ, and the counters that `pvdrivers stats` reads
    marks      small moves between lists: a ring becomes ready, a request is done, a ring is dead
    journal    the commit points of a request: taken, done, free
    loop       the loop itself, which knows no device class
    control    the Python side of one worker: start, stop, attach a ring, hear of violations
    pool       all workers of a process
"""
