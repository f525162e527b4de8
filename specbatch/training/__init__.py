"""The trainer ranks: torchtitan's trainer with the draft as its model, fed from the store."""

EXIT_USER = 2
"""Exit code of a rank that the user can mend; the last line of its log says how."""
EXIT_FINAL = 70
"""Exit code of a rank that would fail in the same way after every restart."""
EXIT_ATTEMPT = 71
"""Exit code of a rank that would fail in the same way for the rest of this attempt, but perhaps not in the next."""
