"""Native CPU kernels: an optional shared library with a plain C interface, chosen for the machine at run time."""
