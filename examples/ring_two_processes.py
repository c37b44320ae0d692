"""Two processes on one ring: the child answers each number with its square. Of this project it needs only rings/.

python examples/ring_two_processes.py [HOW_MANY]
"""

import mmap
import os
import sys

import numpy as np

from rings.ring import RING_END, back_end, final_check, format_page, front_end, push, put, ring_entries, room, take

count, size = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000, 8
page = np.frombuffer(mmap.mmap(-1, 4096), np.uint8)  # shared by both; strangers would map a memfd
end, numbers = np.zeros(1, RING_END), np.zeros(512, np.int64)  # each has its own
sring, at, inbox, slots = page.ctypes.data, end.ctypes.data, numbers.ctypes.data, ring_entries(4096, size)
to_front, to_back = os.eventfd(0), os.eventfd(0)

format_page(sring)
child = os.fork()
if child == 0:
    assert back_end(at, sring, slots, size) == 0
    for done in iter(lambda: take(at, inbox, size, slots), -1):  # -1: the other side lies
        numbers[:done] **= 2
        for i in range(done):
            put(at, inbox + i * size)
        if done and push(at):
            os.eventfd_write(to_front, 1)
        if not done and final_check(at) == 0:
            os.eventfd_read(to_back)

assert front_end(at, sring, slots, size) == 0
sent = got = 0
while got < count:
    numbers[: room(at)] = np.arange(sent, sent + room(at))
    for i in range(min(room(at), count - sent)):
        put(at, inbox + i * size)
        sent += 1
    if push(at):
        os.eventfd_write(to_back, 1)
    done = take(at, inbox, size, slots)
    assert (numbers[:done] == np.arange(got, got + done) ** 2).all(), "not what was asked"
    got += done
    if not done and final_check(at) == 0:
        os.eventfd_read(to_front)
os.kill(child, 15)
os.waitpid(child, 0)
print(f"{got} squares; woke the other side {end['notify_sent'][0]} times, saved it {end['notify_saved'][0]} times")
