"""One module for each verb: it reads its options, calls one function, and prints.

Modules that a verb needs are imported when it is called, so that help appears at once.
"""
