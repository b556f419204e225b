"""x86-64: the architecture is in ``pc``, what loads kernels in modules of their own."""
