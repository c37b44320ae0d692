"""The bed: real Xen, a Linux dom0 and Linux guests, in one QEMU. Runs on the host, with the standard library only."""
