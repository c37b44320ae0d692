"""The guest's side of the split drivers: honest peers with a public API, that any platform can carry.

blkfront           Blkfront: a disk's life, from its directory in xenstore to an orderly close
blkfront_keys      what both ends say to each other in xenstore, parsed and checked
blkfront_queue     one ring with its event channel, its grants and the thread that waits for it
blkfront_kernels   the compiled request and response path
load               a load generator with no Python per request (load_kernels: its loop)
memory             pages of the guest that a backend may be given
watches            one thread that shares out a store connection's events
"""
