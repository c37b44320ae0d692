"""The guest's side of the split drivers: honest peers with a public API, that any platform can carry.

    blkfront           Blkfront: a disk, its operations, and what came of them
    front              the handshake with a backend, from the directory in xenstore to an orderly close
    blkfront_life      what a disk does in it: its rings, and what is in flight when they go
    blkfront_keys      what both ends say to each other in xenstore, parsed and checked
    blkfront_io        operations, and their cutting into requests
    blkfront_queue     one ring with its event channel, its grants and the thread that waits for it
    blkfront_kernels   the compiled request and response path (blkfront_records: what it works on)
    netfront           Netfront: a vif, with the same rooms: netfront_keys, _queue, _kernels, _records
    netfront_tap       a TAP of the guest's kernel behind a vif (netfront_tap_kernels: its loop)
    load               a load generator with no Python per request (load_kernels: its loop)
    memory             pages of the guest that a backend may be given
    watches            one thread that shares out a store connection's events
"""
