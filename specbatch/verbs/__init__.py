"""One module a verb: it reads its options, calls one function, and prints.

What a verb needs is imported when it is called, so that help comes at once.
"""
