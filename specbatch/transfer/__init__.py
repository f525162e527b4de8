"""Transfers hidden states from engines to ranks: Mooncake's master, its client, and the layout of packs in memory."""
