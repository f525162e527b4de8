"""The trainer ranks: torchtitan's trainer with the draft as its model, fed from the store."""

EXIT_USER = 2
"""Exit code of a rank whose log's last line names what the user can mend."""
EXIT_FINAL = 70
"""Exit code of a rank that would fail again in the same way, however often it is started."""
EXIT_ATTEMPT = 71
"""Exit code of a rank that would fail again in the same way in this attempt; another one may do better."""
