"""Local disks and object stores: reading, writing, retrying, leases, images."""
