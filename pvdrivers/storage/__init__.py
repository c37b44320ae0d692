"""What disks are made of: files and block devices by io_uring, memory, nothing.

`uri` reads what the operator wrote, `store` opens it, `uring` moves the data from compiled code.
"""
