"""The block backend: what a guest's blkfront talks to.

    backend    talks xenbus: what is advertised, what the frontend's keys may say, rings handed to a worker
    request    pure: bytes from a guest -> a checked plan
    take       requests leave the ring: private copy, journal, plan
    queue      the worker's two entries: step (take, plan, acquire, submit) and finish (release, respond)
    disk       what is behind it: reads, writes, flushes, discards and barriers on a store
"""
