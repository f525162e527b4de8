"""Start the components of a run, watch them, and end them: the same components under every launcher.

`components` is what a launcher starts, in any process on any node; `head` decides when an attempt ends;
`local` is the launcher of ``specbatch run``.
"""
