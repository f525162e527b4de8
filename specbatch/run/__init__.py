"""Starts, watches and ends the components of a run: the same components under every launcher.

`components` has what a launcher starts, in any process on any node; `head` decides when an attempt ends; `local` is the
launcher of ``specbatch run``.
"""
