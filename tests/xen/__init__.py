"""The product against the real Xen: these tests run inside dom0 of the bed in `bed/` (make test-xen)."""
