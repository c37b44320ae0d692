"""pvdrivers: Xen PV drivers in userspace."""

__version__ = "0.1.0"
