"""The wire: what both ends of a Xen split driver must agree on."""
