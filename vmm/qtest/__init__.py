"""The device side of a machine without KVM, for programs that speak QEMU's qtest protocol.

``options`` reads QEMU's command line, ``devices`` and ``backends`` turn it into our devices,
``machine`` is the board they are on, ``protocol`` and ``qmp`` are the two languages spoken to it,
``server`` the sockets, ``replay`` feeds a recorded session. docs/qtest.md is the user's view.
"""
